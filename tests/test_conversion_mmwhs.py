"""MM-WHS converter on vendor trees made here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.folders import converter, use_folders
from support.mmwhs import DIRECTIONS, IDS, SHAPE, heart, save
from support.scans import VENDORS, load, names

from nnunet_uda.dataset_conversion.mmwhs import border_pieces


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    use_folders(monkeypatch, tmp_path)
    for modality, ids in IDS.items():
        folder = tmp_path / "vendor" / f"{modality}_train"
        folder.mkdir(parents=True)
        for i, number in enumerate(ids):
            rng = np.random.default_rng(number + (modality == "ct"))
            direction = DIRECTIONS[i % 3]
            name = f"{modality}_train_{number}"
            save(rng.integers(-100, 900, SHAPE).astype(np.int16), folder / f"{name}_image.nii.gz", direction)
            save(heart(i), folder / f"{name}_label.nii.gz", direction)
    return tmp_path / "vendor"


convert, refused = converter("mmwhs", "501", *VENDORS, source="mr", target="ct")


def test_sifa_split_both_directions(tree):
    out = convert(tree)
    assert out.name == "Dataset501_MMWHS_MR2CT"
    assert names(out / "imagesTr") == names(out / "labelsTr") == ["mr_1001", "mr_1002", "mr_1010", "mr_1011"]
    assert names(out / "imagesTu") == ["ct_1001", "ct_1002", "ct_1009", "ct_1011"]
    assert names(out / "imagesTs") == names(out / "labelsTs") == ["ct_1003", "ct_1008"]
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "myocardium": 1, "LA": 2, "LV": 3, "AA": 4}
    assert content["channel_names"] == {"0": "intensity"}
    assert content["uda"] == {
        "source_domain": "MR",
        "target_domain": "CT",
        "numSource": 4,
        "numTarget": 4,
        "numTest": 2,
        "label_values": {
            domain: {"myocardium": [205], "LA": [420, 421], "LV": [500], "AA": [820], "background": [550, 600, 850]}
            for domain in ("MR", "CT")
        },
    }  # fmt: skip
    splits = json.loads((out / "splits_final.json").read_text())
    assert sorted(i for fold in splits for i in fold["val"]) == names(out / "imagesTr") and len(splits) == 4
    assert not (out / "splits_target.json").exists()

    out = convert(tree, source="ct", target="mr", d="502")
    assert names(out / "imagesTr") == ["ct_1001", "ct_1002", "ct_1009", "ct_1011"]
    assert names(out / "imagesTs") == ["mr_1007", "mr_1009"]


def test_voxels_and_labels_are_kept(tree):
    out = convert(tree)
    vendor = tree / "mr_train" / "mr_train_1001_image.nii.gz"
    before, after = sitk.ReadImage(str(vendor)), sitk.ReadImage(str(out / "imagesTr/mr_1001_0000.nii.gz"))
    assert (sitk.GetArrayFromImage(before) == sitk.GetArrayFromImage(after)).all()
    assert before.GetPixelID() == after.GetPixelID() and before.GetDirection() == after.GetDirection()
    expected = np.zeros(SHAPE, np.uint8)
    for index, value in enumerate((205, 420, 500, 820), 1):
        expected[heart() == value] = index
    assert (load(out / "labelsTr/mr_1001.nii.gz") == expected).all()


def test_chosen_structures(tree):
    out = convert(tree, "-structures", "PA", "LV")
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0, "PA": 1, "LV": 2}
    converted = load(out / "labelsTr/mr_1001.nii.gz")
    assert (converted == (heart() == 850) * 1 + (heart() == 500) * 2).all()


def test_value_421_is_repaired_and_reported(tree, capsys):
    path = tree / "mr_train" / "mr_train_1010_label.nii.gz"
    array = load(path)
    wrong = np.argwhere(array == 420)[:3]
    array[tuple(wrong.T)] = 421
    save(array, path, sitk.ReadImage(str(path)).GetDirection())
    out = convert(tree)
    assert "mr_1010: mr_train_1010_label.nii.gz: 3 voxels of value 421 set to 420 (LA)" in capsys.readouterr().out
    assert (load(out / "labelsTr/mr_1010.nii.gz") == 2).sum() == (heart() == 420).sum()


def test_spurious_border_labels_are_removed_and_reported(tree, capsys):
    path = tree / "mr_train" / "mr_train_1002_label.nii.gz"
    clean = load(path)
    array = clean.copy()
    array[0, :4, :] = 500
    array[-2:, 0, 0] = 820
    save(array, path, sitk.ReadImage(str(path)).GetDirection())
    out = convert(tree)
    text = capsys.readouterr().out
    assert "mr_train_1002_label.nii.gz: 48 spurious LV voxels on the border set to background" in text
    assert "2 spurious AA voxels" in text
    assert ((load(out / "labelsTr/mr_1002.nii.gz") == 3) == (clean == 500)).all()


def test_border_rule_by_hand():
    mask = np.zeros((20, 30, 30), bool)
    mask[0:12, 5:15, 5:15] = True  # the structure itself, cut by the border
    kept = mask.copy()
    mask[:2, 20:25, 20:25] = True  # within two layers of a face: goes
    mask[17:, 20:22, 20:22] = True  # deeper, touching, 12 of 1200 voxels (not below 1 %): stays
    kept[17:, 20:22, 20:22] = True
    mask[14:17, 0, 0:3] = True  # in the outermost layer: goes
    mask[10:13, 20, 20] = True  # small but inside: stays
    kept[10:13, 20, 20] = True
    assert (mask & ~border_pieces(mask) == kept).all()
    mask[19, 21, 21] = False  # now 11 of 1200, below 1 %: goes
    kept[17:, 20:22, 20:22] = False
    assert (mask & ~border_pieces(mask) == kept).all()
    assert not border_pieces(kept[:, :, :15]).any() and not border_pieces(mask[:2]).any()
    assert not border_pieces(np.zeros((3, 4, 5), bool)).any()


def test_test_ids(tree, refused):
    out = convert(tree, "-test_ids", "1001", "1011")
    assert names(out / "imagesTs") == ["ct_1001", "ct_1011"] and len(names(out / "imagesTr")) == 6
    assert "-test_ids names 1999, which is not there" in refused(tree, "-test_ids", "1999", d="503")
    assert "none is left to train" in refused(tree, "-test_ids", *map(str, IDS["ct"]), d="503")
    for number in (1003, 1008):
        for kind in ("image", "label"):
            (tree / "ct_train" / f"ct_train_{number}_{kind}.nii.gz").unlink()
    assert "Name the test scans with -test_ids" in refused(tree, d="503")
    assert "-test_ids goes with -protocol sifa" in refused(tree, "-protocol", "cisfa", "-test_ids", "1001", d="503")


def test_trees_that_are_refused(tree, refused):
    mr, ct = tree / "mr_train", tree / "ct_train"
    first = mr / "mr_train_1001_label.nii.gz"

    def check(message: str, *options: str) -> None:
        assert message in refused(tree, *options)

    whole = first.read_bytes()
    first.unlink()
    check("mr_train_1001_image.nii.gz: there is no label for this MR case")
    first.write_bytes(whole[:-30])
    check("mr_train_1001_label.nii.gz: the compressed file is truncated")
    for array, message in (
        (heart() + 1, "holds the values 1, 206, 501, 551, 601, 821, 851"),  # 421 is repaired
        (heart() + np.float32(0.5) * (heart() > 0), "non-integer"),
        (heart()[:-1], "its geometry differs"),
    ):
        save(array, first)
        check(message)
    first.write_bytes(whole)
    (mr / "mr_train_1001.nii.gz").write_bytes(whole)
    check("mr_train_1001.nii.gz: unexpected file")
    (mr / "mr_train_1001.nii.gz").unlink()
    (mr / "mr_train_1055_label.nii.gz").write_bytes(whole)
    check("mr_train_1055_label.nii.gz: its image is missing")
    (mr / "mr_train_1055_label.nii.gz").unlink()
    image = ct / "ct_train_1001_image.nii.gz"
    save(np.zeros(SHAPE, np.int16), image)
    check("ct_train_1001_image.nii.gz: every voxel is 0")
    image.write_bytes(whole[:100])
    check("ct_train_1001_image.nii.gz: ")
    for path in ct.iterdir():
        path.unlink()
    check("ct_train holds no image")
    ct.rmdir()
    check("ct_train is missing")
    assert "-source and -target are both mr" in refused(tree, target="mr")


def test_too_few_cases_for_cisfa(tree, refused):
    for number in IDS["ct"][:3]:
        for kind in ("image", "label"):
            (tree / "ct_train" / f"ct_train_{number}_{kind}.nii.gz").unlink()
    assert "4 folds were asked for, with 3 cases" in refused(tree, "-protocol", "cisfa")


def test_upper_bound_needs_target_labels(tree, refused):
    (tree / "ct_train" / "ct_train_1001_label.nii.gz").unlink()
    assert "ct_train_1001_image.nii.gz: there is no label for this CT case" in refused(tree, "--upper_bound")


def test_runs_as_a_script_and_in_parallel(tree):
    script = Path(__file__).parent.parent / "dataset_conversion" / "mmwhs.py"
    options = ["-i", str(tree), "-d", "501", "-source", "mr", "-target", "ct", "-np", "2"]
    clipped = ["-source_intensities", "percentiles", "-target_intensities", "heart"]
    subprocess.run([sys.executable, str(script), *options, *clipped], check=True, capture_output=True)
    parallel = next((tree.parent / "nnUNet_raw").glob("Dataset501_*"))
    alone = convert(tree, *clipped, d="502")
    files = [p.relative_to(alone) for p in alone.rglob("*.nii.gz")]
    assert len(files) == 16 and all((alone / f).read_bytes() == (parallel / f).read_bytes() for f in files)
