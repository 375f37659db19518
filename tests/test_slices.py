"""The thick axis of oblique scans: which order of axes agrees, what is written, shown, refused and warned about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.folders import use_folders

from nnunet_uda import plans
from nnunet_uda.commands import configure, preprocess
from nnunet_uda.commands.convert import main
from nnunet_uda.data.slices import FILE, MIXED, REORIENTED, Grid, elsewhere, odd_tests, refuse_mixed_slices, slice_order
from nnunet_uda.errors import UDAError

THICK = (1.0, 1.0, 8.0)


def short_axis(degrees: float, tilt: float = 35.0) -> np.ndarray:
    """Directions (columns) of a double-oblique heart: the stack's axis turned by ``degrees`` from left to back."""
    a, t = np.radians((degrees, tilt))
    normal = np.array([np.cos(a) * np.cos(t), np.sin(a) * np.cos(t), np.sin(t)])
    row = np.cross([0, 0, 1.0], normal)
    row /= np.linalg.norm(row)
    return np.stack([row, np.cross(normal, row), normal], axis=1)


def image(directions: np.ndarray, spacing=THICK, seed: int = 0) -> sitk.Image:
    made = sitk.GetImageFromArray(np.random.default_rng(seed).integers(0, 500, (5, 12, 10)).astype(np.int16))
    made.SetSpacing(spacing)
    made.SetDirection(directions.ravel().tolist())
    return made


def grids(*scans: sitk.Image, prefix: str = "a") -> dict[str, Grid]:
    return {f"{prefix}{i}": Grid.of(scan) for i, scan in enumerate(scans)}


AXIAL, CORONAL = np.eye(3), np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])


def test_hearts_at_different_rotations_keep_the_files_order():
    source = grids(*(image(short_axis(d)) for d in (30, 40, 55, 60)))
    assert {grid.body[2] for grid in source.values()} == {0, 1}, "the nearest axis of the body differs"
    target = grids(image(short_axis(35)), image(short_axis(58)), prefix="b")
    found = slice_order([source, target])
    assert (found.order, found.reader, found.odd, dict(found.mirrored)) == (FILE, "SimpleITKIO", (), {})
    assert slice_order([grids(*(image(short_axis(d)) for d in (10, 20, 30))), {}]).order == REORIENTED
    assert slice_order([grids(image(AXIAL), image(short_axis(30), (1, 1, 1)))]).order == REORIENTED, "only one is thick"


def test_another_axis_of_the_file_is_mixed():
    odd = short_axis(58)[:, [2, 0, 1]]  # the thick axis stored first
    found = slice_order([grids(image(short_axis(30)), image(short_axis(35)), image(odd, (8.0, 1, 1)))])
    assert (found.order, found.reader, found.odd) == (MIXED, "SimpleITKIOWithReorient", ("a2",))
    with pytest.raises(UDAError, match=r"d\.json: the thick slices of a2 lie along another axis.*2D.*3d_fullres"):
        refuse_mixed_slices({"uda": {"slices": found.to_json()}}, (32, 32), "d.json")
    refuse_mixed_slices({"uda": {"slices": found.to_json()}}, (8, 32, 32), "d.json")
    refuse_mixed_slices({"uda": {"slices": {"order": FILE}}}, (32, 32), "d.json")
    refuse_mixed_slices({}, (32, 32), "d.json")


def test_stored_along_other_axes_is_no_matter_where_the_body_agrees():
    sagittal_file = AXIAL[:, [2, 0, 1]]
    assert slice_order([grids(image(AXIAL), image(sagittal_file, (8.0, 1, 1)))]).order == REORIENTED


def test_really_different_planes():
    """The domains' planes differ: body axes stay, for a plane may be chosen. Inside one domain they are mixed."""
    axial, coronal = grids(image(AXIAL), image(AXIAL)), grids(image(CORONAL), image(CORONAL), prefix="b")
    assert slice_order([axial, coronal]).order == REORIENTED
    assert slice_order([axial | dict([next(iter(coronal.items()))]), {}]).odd == ("b0",)


def test_an_isotropic_scan_of_another_plane_is_not_sliced_with_the_hearts():
    hearts = [image(short_axis(d)) for d in (30, 60)]
    assert slice_order([grids(*hearts, image(short_axis(40), (1, 1, 1)))]).order == FILE
    assert slice_order([grids(*hearts, image(AXIAL[:, [1, 0, 2]] * [1, 1, -1], (1, 1, 1)))]).order == MIXED


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d * [-1, 1, 1], "reversed along x"),
        (lambda d: d * [-1, -1, 1], "reversed along x, reversed along y"),
        (lambda d: d * [1, 1, -1], "reversed along z"),
        (lambda d: d[:, [1, 0, 2]], "x and y swapped"),
        (lambda d: d, None),
    ],
)
def test_flips_between_cases(change, words):
    scans = [*(image(short_axis(d)) for d in (30, 40, 50, 60)), image(change(short_axis(45)))]
    found = slice_order([grids(*scans)])
    assert found.order == FILE and dict(found.mirrored) == ({} if words is None else {"a4": words})


def test_test_scans_that_lie_elsewhere():
    training = [grids(*(image(short_axis(d)) for d in (30, 60)))]
    order = slice_order(training)
    tests = grids(image(short_axis(45)), image(short_axis(45)[:, [2, 0, 1]], (8.0, 1, 1)), image(AXIAL, (1, 1, 1)))
    assert odd_tests(order, training, tests) == ["a1"]
    training = [grids(image(AXIAL))]
    assert odd_tests(slice_order(training), training, grids(image(AXIAL), image(CORONAL))) == ["a1"]


@pytest.mark.parametrize(
    ("spacing", "trained", "transpose", "slices", "odd"),
    [
        ((8, 1, 1), (8, 1, 1), (0, 1, 2), True, False),
        ((1, 8, 1), (8, 1, 1), (0, 1, 2), True, True),
        ((1, 8, 1), (8, 1, 1), (1, 0, 2), True, False),
        ((1, 1, 1), (8, 1, 1), (0, 1, 2), True, False),
        ((1, 1, 5), (1, 1, 1), (0, 1, 2), True, True),
        ((5, 1, 1), (1, 1, 1), (0, 1, 2), True, False),
        ((5, 1, 1), (1, 1, 1), (0, 1, 2), False, True),
        ((5, 1, 1), (4, 1, 1), (0, 1, 2), False, False),
    ],
)
def test_a_new_scan_whose_thick_axis_lies_elsewhere(spacing, trained, transpose, slices, odd):
    reason = elsewhere(spacing, trained, transpose, slices)
    assert (reason is not None and "its thick slices lie elsewhere" in reason) if odd else reason is None


# --- converted --------------------------------------------------------------------------------------------------------


def convert(folder: Path, monkeypatch, scans: dict[str, list[sitk.Image]], *options: str) -> dict:
    use_folders(monkeypatch, folder)
    for domain, images in scans.items():
        for i, scan in enumerate(images):
            label = sitk.GetImageFromArray((np.indices((5, 12, 10)).sum(0) % 5 == 0).astype(np.uint8))
            label.CopyInformation(scan)
            for kind, volume in ((domain, scan), (f"{domain}_labels", label)):
                (folder / kind).mkdir(exist_ok=True)
                name = f"T{i}" if domain == "T" else f"{i}"  # the target has a test scan and a training scan
                sitk.WriteImage(volume, str(folder / kind / f"{name}.nii.gz"))
    main([
        "folders", "-d", "510", "-name", "X", "-np", "1", "-labels", "organ=1", "-source", "A", "-target", "B",
        "-source_images", str(folder / "A"), "-source_labels", str(folder / "A_labels"), "-target_images",
        str(folder / "B"), *options,
    ])  # fmt: skip
    return json.loads((folder / "nnUNet_raw/Dataset510_X/dataset.json").read_text())


def test_the_converter_keeps_the_files_order_and_says_so(tmp_path, monkeypatch, capsys):
    hearts = [image(short_axis(d), seed=d) for d in (30, 60)]
    flipped = image(short_axis(45) * [-1, 1, 1])
    content = convert(tmp_path, monkeypatch, {"A": hearts, "B": [image(short_axis(50)), flipped]})
    text = capsys.readouterr().out
    assert content["overwrite_image_reader_writer"] == "SimpleITKIO" and content["uda"]["slices"] == {"order": FILE}
    assert "axes: kept in the files' order (SimpleITKIO in dataset.json)" in text
    assert "WARNING: axes of B_1 (reversed along x) do not run as in most other scans" in text
    assert "thick slices lie along" not in text
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset510_X"
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UDAError, match="-plane axial: .*kept in the files' order.*Leave -plane out"):
        plans.replan_plane("Dataset510_X", {"image_reader_writer": "SimpleITKIO"}, "axial", "new")


def test_the_converter_warns_where_nothing_agrees_and_2d_is_refused(tmp_path, monkeypatch, capsys):
    odd = image(short_axis(58)[:, [2, 0, 1]], (8.0, 1.0, 1.0))
    content = convert(tmp_path, monkeypatch, {"A": [image(short_axis(30)), odd], "B": [image(short_axis(32))]})
    assert "WARNING: the thick slices of A_1 lie along another axis" in capsys.readouterr().out
    assert content["overwrite_image_reader_writer"] == "SimpleITKIOWithReorient"
    assert content["uda"]["slices"] == {"order": MIXED, "odd": ["A_1"]}


def test_test_scans_that_lie_elsewhere_change_no_order_and_are_warned_of(tmp_path, monkeypatch, capsys):
    scans = {"A": [image(short_axis(30))], "B": [image(short_axis(32))], "T": [image(AXIAL), image(CORONAL)]}
    content = convert(tmp_path, monkeypatch, scans, "-target_test_images", str(tmp_path / "T"))
    assert "slices" not in content["uda"], "what training sees agrees"
    assert "WARNING: the thick slices of the test scans B_T0, B_T1 lie along another axis" in capsys.readouterr().out


@pytest.fixture
def folder(in_workspace, tmp_path, monkeypatch) -> Path:
    """The planned dataset's folder of plans, copied."""
    made = tmp_path / "preprocessed" / "Dataset501_Blobs"
    made.mkdir(parents=True)
    for name in ("nnUNetPlans.json", "dataset_fingerprint.json", "dataset.json"):
        shutil.copy(in_workspace.preprocessed / made.name / name, made)
    monkeypatch.setenv("nnUNet_preprocessed", str(made.parent))
    return made


@pytest.fixture
def mixed(folder) -> Path:
    """The same, as if its scans' slices lay along several axes."""
    content = json.loads((folder / "dataset.json").read_text())
    content["uda"]["slices"] = {"order": MIXED, "odd": ["mr_Tr01"]}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("options", [(), ("-plane", "coronal"), ("-patch_size", "32", "32")])
def test_no_2d_plans_are_made_where_no_plane_is_the_slices_in_all(mixed, refused, options):
    said = refused(configure.main, ["-d", "501", "-p", "new", *options])
    assert "dataset.json, -c 2d: the thick slices of mr_Tr01 lie along another axis" in said
    assert not (mixed / "new.json").exists()
    configure.main(["-d", "501", "-p", "new", "-c", "3d_fullres", "-batch_size", "2"])
    assert (mixed / "new.json").exists(), "3D has no slices"


def test_no_target_is_preprocessed_in_2d_where_no_plane_is_the_slices_in_all(mixed, refused):
    words = ["-d", "501", "-c", "3d_fullres", "2d", "-np", "1"]
    assert "-c 2d: the thick slices of mr_Tr01" in refused(preprocess.main, words)
    assert not list(mixed.glob("*_target")), "not even in 3D: everything asked for is looked at first"


def test_slices_that_are_rows_are_warned_of_where_plans_are_made_and_the_target_preprocessed(folder, capsys):
    content = json.loads((folder / "nnUNetPlans.json").read_text())
    content["original_median_shape_after_transp"] = [48, 1, 48]
    (folder / "nnUNetPlans.json").write_text(json.dumps(content))
    configure.main(["-d", "501", "-p", "new", "-batch_size", "2"])
    warning = "WARNING: the slices of 2d are 1 x 48 voxels"
    assert warning in capsys.readouterr().out
    preprocess.main(["-d", "501", "-p", "new", "-np", "1"])
    assert warning in capsys.readouterr().out
    configure.main(["-d", "501", "-p", "new3d", "-c", "3d_fullres", "-batch_size", "2"])
    assert "WARNING" not in capsys.readouterr().out


def test_scans_along_the_body_are_as_before(tmp_path, monkeypatch, capsys):
    content = convert(tmp_path, monkeypatch, {"A": [image(AXIAL)], "B": [image(AXIAL * [-1, -1, 1])]})
    assert content["overwrite_image_reader_writer"] == "SimpleITKIOWithReorient" and "slices" not in content["uda"]
    assert "axes: kept" not in capsys.readouterr().out
