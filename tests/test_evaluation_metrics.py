"""Scores against hand-made cases, a brute-force reference, MONAI's whole metrics and nnU-Net's own evaluation."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import LPS, write_volume
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation import evaluate_case, evaluate_folder, metrics
from nnunet_uda.evaluation.metrics import evaluate_masks
from nnunet_uda.images.reading import read_image

LABELS = {"background": 0, "organ": 1, "vessel": 2}
ROTATION = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
ORIENTATIONS = {
    "identity": np.eye(3),
    "oblique": ROTATION,
    "flipped and permuted": np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]], dtype=float),
}


def write(path: Path, array: np.ndarray, spacing=(1.0, 1.0, 1.0), direction=LPS, **geometry) -> Path:
    return write_volume(path, array, spacing, np.asarray(direction, dtype=float).ravel(), **geometry)


def blobs(seed: int, shape=(9, 14, 12), n_labels=2) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(n_labels, *shape)), (0, 1.2, 1.2, 1.2))
    labels = np.zeros(shape, np.uint8)
    for value in range(1, n_labels + 1):
        labels[noise[value - 1] > np.quantile(noise[value - 1], 0.85)] = value
    return labels


def slow_surface(image: sitk.Image, value: int) -> np.ndarray:
    """Physical points (mm) of the voxels that have a face neighbour with another value or outside the image."""
    size = image.GetSize()
    points = []
    for x in range(size[0]):
        for y in range(size[1]):
            for z in range(size[2]):
                if image[x, y, z] != value:
                    continue
                neighbours = [(x - 1, y, z), (x + 1, y, z), (x, y - 1, z), (x, y + 1, z), (x, y, z - 1), (x, y, z + 1)]
                inside = [n for n in neighbours if all(0 <= i < s for i, s in zip(n, size, strict=True))]
                if len(inside) < 6 or any(image[n] != value for n in inside):
                    points.append(image.TransformIndexToPhysicalPoint((x, y, z)))
    return np.array(points)


def slow_percentile(values: np.ndarray, percent: float) -> float:
    """Linear interpolation between the two nearest ranks."""
    ordered = sorted(values)
    rank = percent / 100 * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 4.0)])
def test_distances_agree_with_brute_force_in_physical_space(tmp_path, orientation, spacing):
    geometry = {"spacing": spacing, "origin": (12.0, -30.0, 7.5), "direction": ORIENTATIONS[orientation]}
    reference = write(tmp_path / "r.nii.gz", blobs(1), **geometry)
    prediction = write(tmp_path / "p.nii.gz", blobs(2), **geometry)
    scores = evaluate_case(reference, prediction, LABELS)
    assert list(scores) == ["organ", "vessel"]
    for name, value in (("organ", 1), ("vessel", 2)):
        r, p = (slow_surface(sitk.ReadImage(str(path)), value) for path in (reference, prediction))
        distances = cdist(p, r)
        there, back = distances.min(axis=1), distances.min(axis=0)
        expected = (there.sum() + back.sum()) / (len(there) + len(back))
        assert scores[name]["ASSD"] == pytest.approx(expected, abs=1e-4)
        expected = max(slow_percentile(there, 95), slow_percentile(back, 95))
        assert scores[name]["HD95"] == pytest.approx(expected, abs=1e-4)


def test_agrees_with_monai_whole_metrics():
    """MONAI's symmetric average surface distance pools both directions, which is the ASSD stated here."""
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    reference, prediction = blobs(3) == 1, blobs(4) == 1
    spacing = (4.0, 1.3, 0.7)
    scores = evaluate_masks(reference, prediction, spacing)
    r, p = (torch.from_numpy(mask)[None, None].float() for mask in (reference, prediction))
    assd = compute_average_surface_distance(p, r, include_background=True, symmetric=True, spacing=spacing)
    hd95 = compute_hausdorff_distance(p, r, include_background=True, percentile=95, spacing=spacing)
    assert scores["ASSD"] == pytest.approx(float(assd), rel=1e-5)
    assert scores["HD95"] == pytest.approx(float(hd95), rel=1e-5)


@pytest.mark.parametrize(("axis", "mm"), [(0, 6.0), (1, 4.0), (2, 2.0)])
def test_spacing_belongs_to_its_axis(tmp_path, axis, mm):
    reference, prediction = np.zeros((2, 5, 6, 7), np.uint8)
    reference[1, 1, 1] = 1
    prediction[tuple(3 if i == axis else 1 for i in range(3))] = 1
    paths = [write(tmp_path / f"{i}.nii.gz", a, spacing=(1, 2, 3)) for i, a in enumerate((reference, prediction))]
    scores = evaluate_case(*paths, {"organ": 1})["organ"]
    assert scores == {"Dice": 0, "ASSD": mm, "HD95": mm, "n_reference": 1, "n_prediction": 1}


def test_assd_pools_all_surface_voxels_instead_of_averaging_the_two_directions():
    reference, prediction = np.zeros((2, 1, 1, 12), bool)
    reference[0, 0, 0] = True
    prediction[0, 0, [0, 1, 2, 3]] = True
    scores = evaluate_masks(reference, prediction, (1, 1, 2.0))
    assert scores["ASSD"] == pytest.approx((0 + 2 + 4 + 6 + 0) / 5)
    assert scores["HD95"] == pytest.approx(slow_percentile(np.array([0, 2, 4, 6]), 95))
    assert scores["Dice"] == pytest.approx(2 / 5)


def test_identical_masks_that_touch_the_border_have_distance_zero():
    mask = np.zeros((4, 5, 6), bool)
    mask[:2, :3] = True
    scores = evaluate_masks(mask, mask.copy(), (3, 1, 1))
    assert (scores["Dice"], scores["ASSD"], scores["HD95"]) == (1, 0, 0)


def test_rule_for_empty_masks():
    empty, full = np.zeros((3, 4, 4), bool), np.ones((3, 4, 4), bool)
    both = evaluate_masks(empty, empty, (1, 1, 1))
    assert all(math.isnan(both[metric]) for metric in ("Dice", "ASSD", "HD95"))
    for masks in ((full, empty), (empty, full)):
        one = evaluate_masks(*masks, (1, 1, 1))
        assert one["Dice"] == 0 and math.isnan(one["ASSD"]) and math.isnan(one["HD95"])


def test_dice_agrees_exactly_with_nnunet(serial, tmp_path):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient

    for i in range(3):
        reference, prediction = blobs(10 + i), blobs(20 + i)
        if i == 1:
            reference[reference == 2] = prediction[prediction == 2] = 0
        if i == 2:
            prediction[prediction == 1] = 0
        reference[0, :4] = 3  # to be ignored
        for folder, array in (("r", reference), ("p", prediction)):
            write(tmp_path / folder / f"case{i}.nii.gz", array, spacing=(1, 1, 3), direction=ROTATION)
    ours = evaluate_folder(tmp_path / "r", tmp_path / "p", {"organ": 1, "vessel": 2}, ignore_label=3)
    theirs = compute_metrics_on_folder(
        str(tmp_path / "r"), str(tmp_path / "p"), None, SimpleITKIOWithReorient(), ".nii.gz", [1, 2], 3, 1
    )
    assert len(theirs["metric_per_case"]) == 3
    for case in theirs["metric_per_case"]:
        scores = ours[Path(case["reference_file"]).name[: -len(".nii.gz")]]
        for name, value in (("organ", 1), ("vessel", 2)):
            expected = case["metrics"][value]["Dice"]
            assert scores[name]["Dice"] == expected or (math.isnan(scores[name]["Dice"]) and math.isnan(expected))
    assert math.isnan(ours["case1"]["vessel"]["Dice"])
    assert ours["case2"]["organ"]["Dice"] == 0


def test_several_processes_give_the_same_scores_and_none_is_started_for_moments(forked, tmp_path, monkeypatch):
    for i in range(3):
        for folder, seed in (("r", i), ("p", 50 + i)):
            write(tmp_path / folder / f"case{i}.nii.gz", blobs(seed))
    arguments = (tmp_path / "r", tmp_path / "p", {"organ": 1, "vessel": 2})
    alone = evaluate_folder(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "as_done", lambda *_: pytest.fail("a process is started"))
        assert evaluate_folder(*arguments, num_processes=2) == alone
    monkeypatch.setattr(metrics, "PATIENCE", -1.0)
    assert evaluate_folder(*arguments, num_processes=2) == alone


def test_2d_images(tmp_path):
    reference, prediction = np.zeros((2, 8, 8), np.uint8)
    reference[2, 2] = prediction[2, 5] = 1
    paths = [write(tmp_path / f"{i}.nii.gz", a, spacing=(0.5, 9)) for i, a in enumerate((reference, prediction))]
    assert evaluate_case(*paths, {"organ": 1})["organ"]["ASSD"] == 1.5


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spacing": (1, 1, 1.01)}, "spacing"),
        ({"origin": (0, 0.11, 0)}, "origin"),
        ({"direction": np.diag([-1.0, -1.0, 1.0])}, "direction"),
    ],
)
def test_geometry_mismatch_names_both_files(tmp_path, change, word):
    reference = write(tmp_path / "r" / "a.nii.gz", blobs(1))
    prediction = write(tmp_path / "p" / "a.nii.gz", blobs(1), **change)
    with pytest.raises(UDAError, match=word) as error:
        evaluate_case(reference, prediction, LABELS)
    assert str(reference) in str(error.value)
    assert str(prediction) in str(error.value)


def test_other_size_or_number_of_dimensions_is_refused(tmp_path):
    reference = write(tmp_path / "r.nii.gz", blobs(1))
    for array in (blobs(1)[:-1], blobs(1)[0]):
        with pytest.raises(UDAError, match=r"size \("):
            evaluate_case(reference, write(tmp_path / "p.nii.gz", array), LABELS)


@pytest.mark.parametrize(("millimetres", "degrees"), [(0.09, 0), (0.003, 0), (0, 0.07)])
def test_a_reference_that_conversion_accepts_is_scored(tmp_path, millimetres, degrees):
    """A tenth of a voxel, and what programs round in headers; predictions have the geometry of the image."""
    turned = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
    reference = write(tmp_path / "r.nii.gz", blobs(1), direction=turned)
    prediction = write(tmp_path / "p.nii.gz", blobs(1), origin=(millimetres, 0, 0))
    assert evaluate_case(reference, prediction, LABELS)["organ"]["Dice"] == 1


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize("kept", [0.1, 0.6, 0.99])
def test_truncated_file_is_named(tmp_path, ending, kept):
    """ITK reads a truncated NIfTI without an error and fills it up with zeros."""
    path = write(tmp_path / f"p{ending}", np.random.default_rng(0).integers(0, 3, (20, 20, 20)).astype(np.uint8))
    whole = path.read_bytes()
    assert read_image(path).GetSize() == (20, 20, 20)
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UDAError, match="truncated") as error:
        read_image(path)
    assert str(path) in str(error.value)


def test_gzip_of_a_truncated_nifti_is_refused(tmp_path):
    path = write(tmp_path / "p.nii", blobs(1))
    packed = tmp_path / "p.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()[:-100]))
    with pytest.raises(UDAError, match="truncated"):
        read_image(packed)


def test_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "p.nii.gz"
    path.write_text("not an image")
    with pytest.raises(UDAError, match=r"p\.nii\.gz: cannot be read"):
        read_image(path)


@pytest.mark.parametrize("order", [1, -1])
def test_unknown_label_names_file_and_value(tmp_path, order):
    """In the prediction, and in the reference."""
    good, strange = write(tmp_path / "good.nii.gz", blobs(1)), blobs(1)
    strange[0, 0, 0] = 7
    bad = write(tmp_path / "bad.nii.gz", strange)
    with pytest.raises(UDAError, match=rf"{bad} holds the label\(s\) 7"):
        evaluate_case(*[good, bad][::order], LABELS)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha"])
@pytest.mark.parametrize(("value", "words"), [(0.5, "non-integer"), (math.nan, "1 of 1512 voxels are NaN")])
def test_non_integer_label_names_file(tmp_path, value, words, ending):
    """ITK reads a NaN in a NIfTI as 0."""
    reference = write(tmp_path / f"r{ending}", blobs(1))
    array = blobs(1).astype(np.float32)
    array[0, 0, 0] = value
    prediction = write(tmp_path / f"p{ending}", array)
    with pytest.raises(UDAError, match=words) as error:
        evaluate_case(reference, prediction, LABELS)
    assert str(prediction) in str(error.value)


def test_float_file_with_integer_labels_is_accepted(tmp_path):
    reference = write(tmp_path / "r.nii.gz", blobs(1))
    prediction = write(tmp_path / "p.nii.gz", blobs(1).astype(np.float32))
    assert evaluate_case(reference, prediction, LABELS)["organ"]["Dice"] == 1


def test_missing_extra_and_empty_folders(tmp_path):
    for folder, names in (("r", "ab"), ("p", "ab")):
        for name in names:
            write(tmp_path / folder / f"{name}.nii.gz", blobs(1))
    arguments = (tmp_path / "r", tmp_path / "p", {"organ": 1, "vessel": 2})
    (tmp_path / "p" / "summary.json").write_text("{}")
    assert list(evaluate_folder(*arguments)) == ["a", "b"]
    with pytest.raises(UDAError, match=r"no reference in .*r: c\.nii\.gz"):
        evaluate_folder(*arguments, cases=["a", "b", "c"])
    with pytest.raises(UDAError, match=r"a prediction in .*p, but not among the cases of the fold\(s\): b\.nii\.gz"):
        evaluate_folder(*arguments, cases=["a"])
    (tmp_path / "r" / "b.nii.gz").unlink()
    with pytest.raises(UDAError, match=r"not among the references in .*r: b\.nii\.gz"):
        evaluate_folder(*arguments)
    write(tmp_path / "r" / "b.nii.gz", blobs(1))
    (tmp_path / "p" / "a.nii.gz").unlink()
    with pytest.raises(UDAError, match=r"no prediction in .*p: a\.nii\.gz"):
        evaluate_folder(*arguments)
    (tmp_path / "p" / "b.nii.gz").unlink()
    with pytest.raises(UDAError, match="p holds no segmentation"):
        evaluate_folder(*arguments)
    with pytest.raises(UDAError, match="nowhere does not exist"):
        evaluate_folder(tmp_path / "nowhere", tmp_path / "p", {"organ": 1})
    with pytest.raises(UDAError, match=r"a\.nii\.gz is no folder; expected one with files named like CASE\.nii\.gz"):
        evaluate_folder(tmp_path / "r" / "a.nii.gz", tmp_path / "p", {"organ": 1})
