"""The abdominal task on vendor trees of CHAOS and BTCV made here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import btcv, chaos
from support.dicom import shorter
from support.folders import refuser, vendor_fixtures
from support.scans import VENDORS, load, names

from nnunet_uda.commands.convert import main

MR, CT = (1, 2, 3, 13, 20, 38), (1, 2, 9, 21, 30, 40)
BTCV_CLASSES = np.array([0, 4, 2, 3, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], np.uint8)
"""BTCV's values to liver 1, right kidney 2, left kidney 3, spleen 4."""


def make_both(folder: Path) -> None:
    chaos.make_chaos(folder / "CHAOS", mr=MR, ct=(2,))
    btcv.make_btcv(folder / "BTCV", CT)


made, trees = vendor_fixtures(make_both)


def convert(
    trees: Path, *options: str, source: str = "ct", target: str = "mr", d: str = "503", order=("CHAOS", "BTCV")
) -> Path:
    inputs = [str(trees / name) for name in order]
    main(["abdomen", "-i", *inputs, "-d", d, "-source", source, "-target", target, "-np", "1", *VENDORS, *options])
    return next((trees.parent / "nnUNet_raw").glob(f"Dataset{d}_*"))


refused = refuser(convert)


def ct_ids(*numbers: int) -> list[str]:
    return [f"ct_{n:04d}" for n in numbers]


def mr_ids(*numbers: int) -> list[str]:
    return [f"mr_{n:02d}" for n in numbers]


def test_ct_to_mr(trees):
    out = convert(trees)
    assert out.name == "Dataset503_Abdomen_CT2MR"
    assert names(out / "imagesTr") == names(out / "labelsTr") == ct_ids(2, 21, 40)
    assert names(out / "imagesTu") == mr_ids(2, 3, 20)
    assert names(out / "imagesTs") == names(out / "labelsTs") == mr_ids(1, 13, 38)
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4}
    assert content["channel_names"] == {"0": "intensity"}
    assert "CC BY-SA 4.0" in content["licence"] and "Synapse" in content["licence"]
    assert content["uda"].pop("slices")["order"] == "mixed"  # thick slices of these small scans lie along any axis
    assert content["uda"] == {
        "source_domain": "CT", "target_domain": "MR", "numSource": 3, "numTarget": 3, "numTest": 3,
        "label_values": {
            "CT": {"spleen": [1], "right_kidney": [2], "left_kidney": [3], "liver": [6],
                   "background": [4, 5, *range(7, 14)]},
            "MR": {"liver": [*range(55, 71)], "right_kidney": [*range(110, 136)], "left_kidney": [*range(175, 201)],
                   "spleen": [*range(240, 256)]},
        },
    }  # fmt: skip
    for number in (2, 21, 40):
        assert (load(out / f"imagesTr/ct_{number:04d}_0000.nii.gz") == btcv.scan(number)).all()
        assert (load(out / f"labelsTr/ct_{number:04d}.nii.gz") == BTCV_CLASSES[btcv.organs(number)]).all()
    for number in (1, 13, 38):
        path = out / f"imagesTs/mr_{number:02d}_0000.nii.gz"
        chaos.assert_image(path, chaos.stored(number), chaos.orientation(number))
        assert (load(out / f"labelsTs/mr_{number:02d}.nii.gz") == chaos.organs(number)).all()


def test_mr_to_ct_with_the_trees_in_the_other_order(trees):
    out = convert(trees, source="mr", target="ct", d="504", order=("BTCV", "CHAOS"))
    assert out.name == "Dataset504_Abdomen_MR2CT"
    assert names(out / "imagesTr") == names(out / "labelsTr") == mr_ids(2, 3, 20)
    assert names(out / "imagesTu") == ct_ids(2, 21, 40)
    assert names(out / "imagesTs") == names(out / "labelsTs") == ct_ids(1, 9, 30)
    for number in (2, 3, 20):
        assert (load(out / f"labelsTr/mr_{number:02d}.nii.gz") == chaos.organs(number)).all()
    assert (load(out / "labelsTs/ct_0009.nii.gz") == BTCV_CLASSES[btcv.organs(9)]).all()


def test_structures_sequence_and_test_ids(trees):
    options = ("-structures", "spleen", "right_kidney", "-sequence", "t1out", "-test_ids", "0009", "2")
    out = convert(trees, *options, source="mr", target="ct")
    labels = json.loads((out / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "spleen": 1, "right_kidney": 2}
    assert names(out / "imagesTr") == mr_ids(*MR) and names(out / "imagesTs") == ct_ids(2, 9)
    assert (load(out / "imagesTr/mr_03_0000.nii.gz") == chaos.stored(203)).all()
    assert (load(out / "labelsTr/mr_03.nii.gz") == np.array([0, 0, 2, 0, 1])[chaos.organs(3)]).all()
    expected = (btcv.organs(9) == 1) * 1 + (btcv.organs(9) == 2) * 2
    assert (load(out / "labelsTs/ct_0009.nii.gz") == expected).all()


def test_a_missing_sequence_is_a_warning_or_with_strict_an_error(trees, refused, capsys):
    shutil.rmtree(trees / "CHAOS/Train_Sets/MR/2/T2SPIR")
    assert names(convert(trees) / "imagesTu") == mr_ids(3, 20)
    assert "MR/2: T2SPIR/DICOM_anon is missing or empty: this case is left out" in capsys.readouterr().out
    assert "MR/2: T2SPIR/DICOM_anon is missing" in refused(trees, "--strict", d="505")


def test_the_fixed_test_set_is_incomplete(trees, refused, capsys):
    convert(trees)
    assert "holds only 1, 13, 38 of the fixed test set 1, 13, 32, 38" in capsys.readouterr().out
    assert "holds only 1, 9, 30 of" in refused(trees, "--strict", source="mr", target="ct", d="505")


MALFORMED = {
    "CHAOS twice": ({"order": ("CHAOS", "CHAOS")}, (), r"CHAOS \(CHAOS\), \S+CHAOS \(CHAOS\): expected one CHAOS tree"),
    "BTCV twice": ({"order": ("BTCV", "BTCV")}, (), r"BTCV \(BTCV\), \S+BTCV \(BTCV\): expected one CHAOS tree"),
    "a tree of neither": ({"order": ("CHAOS", "BTCV/RawData/Training/img")}, (), r"Training/img \(neither\)"),
    "no such folder": ({"order": ("CHAOS", "nowhere")}, (), r"nowhere \(neither\)"),
    "one modality": ({"target": "ct"}, (), r"-source and -target are both ct"),
    "folds and test scans": ({}, ("-protocol", "cisfa", "-test_ids", "1"), r"-test_ids goes with -protocol sifa"),
    "an unknown test scan": ({}, ("-test_ids", "4"), r"Train_Sets/MR: -test_ids names 4"),
    "all of them test scans": ({}, ("-test_ids", *map(str, MR)), r"MR: all of its scans are test scans"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_requests_that_are_refused(trees, refused, case):
    changes, options, message = MALFORMED[case]
    found = refused(trees, *options, **changes)
    assert re.search(message, found), found
    assert not (trees.parent / "nnUNet_raw").exists()


def test_faults_of_both_trees_are_listed_together(trees, refused):
    for path in (
        trees / "BTCV/RawData/Training/img/img0002.nii.gz",
        trees / "BTCV/RawData/Training/img/img0021.nii.gz",
    ):
        shorter(path, 0.8)
    chaos.nth(trees / "CHAOS/Train_Sets/MR/1/T2SPIR/Ground", 2).unlink()
    chaos.nth(trees / "CHAOS/Train_Sets/MR/3/T2SPIR/DICOM_anon", 2).unlink()
    found = refused(trees)
    for message in ("4 cases cannot be converted", "img0002.nii.gz", "img0021.nii.gz", "MR/1/T2SPIR/Ground: 4 PNG"):
        assert message in found
    assert "MR/3/T2SPIR/DICOM_anon/IMG-0004-00004.dcm: 4.000 mm" in found


def test_renumbered_btcv(trees, refused):
    btcv.renumbered(trees / "BTCV/RawData/Training")
    assert "img0011.nii.gz: BTCV has no training scan 11" in refused(trees)


def test_help_shows_trees_licences_and_pages(capsys):
    with pytest.raises(SystemExit):
        main(["abdomen", "-h"])
    text = capsys.readouterr().out
    for words in ("Train_Sets/MR/1/T2SPIR", "RawData/Training/img", "CC BY-SA 4.0", "https://doi.org", "synapse.org"):
        assert words in text
