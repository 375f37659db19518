"""The picture of a converted dataset: planes and edges by the header, labels only where the group has them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread
from support.folders import use_folders

from nnunet_uda.dataset_conversion import dataset as conversion
from nnunet_uda.dataset_conversion.case import Case, Group
from nnunet_uda.dataset_conversion.dataset import write_dataset
from nnunet_uda.dataset_conversion.quicklook import draw_quicklook, obliquity, slices, window
from nnunet_uda.images.reading import LabelMap
from nnunet_uda.palette import structure_colour

SPACING = (1.0, 2.0, 4.0)


def lps(array: np.ndarray) -> sitk.Image:
    """Array axes from inferior to superior, from anterior to posterior, from right to left."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    return image


@pytest.fixture
def scan() -> sitk.Image:
    """Bright where it is right, anterior and superior; the values rise towards there along every axis."""
    z, y, x = np.meshgrid(np.arange(10), np.arange(12), np.arange(14), indexing="ij")
    return lps((z * 10 - y * 5 - x * 3).astype(np.int16))


@pytest.fixture
def label() -> sitk.Image:
    array = np.zeros((10, 12, 14), np.uint8)
    array[7, 2, 3] = 1
    array[2:4, 4:8, 4:8] = 2
    array[3, 9, 11] = 1
    return lps(array)


@pytest.mark.parametrize("code", ["LPS", "RAS", "RAI", "ASR", "SLP", "PIR"])
def test_slices_do_not_depend_on_the_order_in_the_file(scan, label, code):
    stored, stored_label = sitk.DICOMOrient(scan, code), sitk.DICOMOrient(label, code)
    cuts = slices(stored, stored_label)
    array, mask = sitk.GetArrayFromImage(scan), sitk.GetArrayFromImage(label)
    expected = {  # index 3 holds both structures; 4 and 4 the most voxels
        "axial": (array[3], mask[3], (2.0, 1.0)),
        "coronal": (array[::-1, 4], mask[::-1, 4], (4.0, 1.0)),
        "sagittal": (array[::-1, :, 4], mask[::-1, :, 4], (4.0, 2.0)),
    }
    for plane, (cut, cut_mask, spacing) in expected.items():
        assert (cuts[plane][0] == cut).all() and (cuts[plane][1] == cut_mask).all(), plane
        assert cuts[plane][2] == spacing
    for plane, top_left in (("axial", "AR"), ("coronal", "SR"), ("sagittal", "SA")):
        cut = cuts[plane][0].astype(int)
        assert cut[0, 0] == cut.max() and cut[-1, -1] == cut.min(), f"{plane}: {top_left} must be at the top left"


def test_middle_slice_without_labels(scan, label):
    array = sitk.GetArrayFromImage(scan)
    for nothing in (None, label * 0):
        cuts = slices(scan, nothing)
        assert (cuts["axial"][0] == array[5]).all() and (cuts["sagittal"][0] == array[::-1, :, 7]).all()
    assert slices(scan, None)["axial"][1] is None


def test_window_and_obliquity(scan):
    values = sitk.GetArrayFromImage(scan)
    assert window(scan) == tuple(np.percentile(values, (0.5, 99.5)))
    spiked = np.zeros((20, 20, 20))
    spiked[2, 2, 2] = 9
    assert window(lps(spiked)) == (0, 9)  # both percentiles are 0
    c, s = math.cos(math.radians(20)), math.sin(math.radians(20))
    scan.SetDirection((1, 0, 0, 0, c, -s, 0, s, c))
    assert obliquity(scan) == pytest.approx(20) and obliquity(sitk.DICOMOrient(scan, "RAS")) == pytest.approx(20)


def coloured(picture: np.ndarray) -> np.ndarray:
    """Where a picture in grey has the first structure's colour (0 to 1)."""
    return (np.abs(picture[..., :3] - np.array(structure_colour(0)) / 255) < 0.02).all(axis=-1)


def test_picture_shows_labels_in_their_row_alone(tmp_path, scan, label):
    for name, image in (("scan", scan), ("label", label), ("thin", scan[:, :, 4:5])):
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    one, two, thin = (tmp_path / f"{name}.nii.gz" for name in ("scan", "label", "thin"))
    draw_quicklook([("a", one, two), ("b", one, None), ("c", thin, None)], ["organ", "other"], tmp_path / "out.png")
    picture = imread(tmp_path / "out.png")
    rows = np.flatnonzero(coloured(picture).any(axis=1))
    drawn = rows[rows < len(picture) - 40]  # below is the legend
    assert len(drawn) and drawn.max() < len(picture) / 2
    assert len(np.flatnonzero(coloured(picture[-40:]).any(axis=1)))


@pytest.fixture
def dataset(tmp_path, monkeypatch, scan, label) -> list[Group]:
    use_folders(monkeypatch, tmp_path)
    cases = {}
    for name in ("few", "many", "t", "u"):
        sitk.WriteImage(scan, str(tmp_path / f"{name}.nii.gz"))
        drawn = label if name != "few" else sitk.Cast(label == 1, sitk.sitkUInt8)
        drawn.CopyInformation(scan)
        sitk.WriteImage(drawn, str(tmp_path / f"{name}_l.nii.gz"))
        label_path, label_map = tmp_path / f"{name}_l.nii.gz", LabelMap({1: 1, 2: 2})
        cases[name] = Case(name, (tmp_path / f"{name}.nii.gz",), label_path, label_map)
    return [
        Group("MR", [cases["few"], cases["many"]], "imagesTr", "labelsTr"),
        Group("CT", [cases["u"]], "imagesTu"),
        Group("CT", [cases["t"]], "imagesTs", "labelsTs"),
    ]


def test_every_group_has_a_row_and_no_label_is_shown_that_was_not_written(dataset, monkeypatch):
    seen: list = []
    monkeypatch.setattr(
        conversion, "draw_quicklook", lambda rows, *rest: (seen.extend(rows), draw_quicklook(rows, *rest))
    )
    out = write_dataset(7, "Tiny", dataset, ["organ", "other"], ["intensity"], processes=1)
    assert [(title, image.name, label.name if label else None) for title, image, label in seen] == [
        ("imagesTr: MR, many, percentiles 0.5 to 99.5 of the nonzero voxels", "many_0000.nii.gz", "many.nii.gz"),
        ("imagesTu: CT, u, window -160 to 240 HU", "u_0000.nii.gz", None),
        ("imagesTs: CT, t, window -160 to 240 HU", "t_0000.nii.gz", "t.nii.gz"),
    ]
    assert all(Path(out).name not in str(image) for _, image, _ in seen)  # drawn before the dataset appears
    assert imread(out / "quicklook.png").shape[1] > 900
