"""AMOS22 converter on vendor trees made here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import litter
from support.amos import SHAPE, make_amos, organs, save, scan
from support.folders import converter, vendor_fixtures
from support.scans import load, names

from nnunet_uda.dataset_conversion.amos import IN_BOTH, STRUCTURES

made, tree = vendor_fixtures(make_amos)
convert, refused = converter("amos", "530", source="ct", target="mr")


def ids(modality: str, *numbers: int) -> list[str]:
    return [f"{modality}_{number:04d}" for number in numbers]


def test_ct_to_mr_by_the_vendors_split(tree, capsys):
    litter(tree)
    (tree.parent / "above").mkdir()
    tree.rename(tree.parent / "above" / "amos22")
    out = convert(tree.parent / "above", "-target_intensities", "none")
    assert out.name == "Dataset530_AMOS_CT2MR"
    assert names(out / "imagesTr") == names(out / "labelsTr") == ids("ct", 1, 4, 21)
    assert names(out / "imagesTu") == ids("mr", 507, 510, 600)
    assert names(out / "imagesTs") == names(out / "labelsTs") == ids("mr", 508)
    content = json.loads((out / "dataset.json").read_text())
    assert list(content["labels"].items()) == [("background", 0), *((n, i) for i, n in enumerate(IN_BOTH, 1))]
    assert "the split of AMOS22, seed 12345" in content["description"] and "zenodo" in content["reference"]
    assert (content["uda"]["source_domain"], content["uda"]["target_domain"]) == ("CT", "MR")
    window = content["uda"]["intensities"]["source"]
    assert window["unit"] == "HU" and "found around the structures labelled in CT" in window["from"]
    for number in (507, 510, 600):
        assert (load(out / f"imagesTu/mr_{number:04d}_0000.nii.gz") == scan(number)).all()
    for number in (1, 4, 21):
        label = organs(number)
        assert (load(out / f"labelsTr/ct_{number:04d}.nii.gz") == np.where(label > 13, 0, label)).all()
    folds = json.loads((out / "splits_final.json").read_text())
    assert sorted(case for fold in folds for case in fold["val"]) == ids("ct", 1, 4, 21)
    assert "imagesTs: 1 MR case(s), 1 with labels in labelsTs" in capsys.readouterr().out


def test_mr_to_ct_with_a_choice_of_organs(tree, refused, capsys):
    out = convert(tree, "-structures", "liver", "duodenum", source="mr", target="ct")
    assert names(out / "imagesTr") == ids("mr", 507, 510, 600) and names(out / "imagesTs") == ids("ct", 8, 499)
    assert "2 duodenum: mean" in (said := capsys.readouterr().out) and "in 2 of 3 cases" in said
    expected = np.zeros(16, np.uint8)
    expected[[6, 13]] = 1, 2
    for number in (507, 510):
        assert (load(out / f"labelsTr/mr_{number:04d}.nii.gz") == expected[organs(number)]).all()
    assert (load(out / "labelsTs/ct_0499.nii.gz") == expected[organs(499)]).all()
    whole = convert(tree, "-structures", "all", d="531")
    assert list(json.loads((whole / "dataset.json").read_text())["labels"]) == ["background", *STRUCTURES]
    message = refused(tree, "-structures", "all", source="mr", target="ct", d="532")
    assert "holds the structure 'bladder'" in message


def test_test_ids(tree):
    out = convert(tree, "-test_ids", "510", "0507")
    assert names(out / "imagesTr") == ids("ct", 1, 4, 8, 21, 499), "the source is used whole"
    assert names(out / "imagesTu") == ids("mr", 508, 600) and names(out / "imagesTs") == ids("mr", 507, 510)


def test_a_scan_without_a_label(tree, refused, capsys):
    (tree / "labelsTr" / "amos_0004.nii.gz").unlink()
    assert "amos_0004.nii.gz: there is no label for this scan" in refused(tree, "--strict")
    out = convert(tree)
    assert names(out / "imagesTr") == ids("ct", 1, 21)
    assert "WARNING: " in (said := capsys.readouterr().out) and "amos_0004.nii.gz: there is no label" in said


def _only_ct(tree: Path) -> None:
    for path in (*tree.glob("*/amos_05*"), *tree.glob("*/amos_06*")):
        path.unlink()


def _drop(tree: Path, *folders: str) -> None:
    for folder in folders:
        shutil.rmtree(tree / folder)


FIRST = "imagesTr/amos_0001.nii.gz"
REFUSED = {
    "no labels": (lambda t: _drop(t, "labelsTr"), (), r"vendor: no imagesTr and labelsTr folder \(found: .*imagesTr"),
    "no MR": (_only_ct, (), r"vendor holds no MR scan among 5 \(found in imagesTr: amos_0001"),
    "no test set": (
        lambda t: _drop(t, "imagesVa", "labelsVa"), (), r"fixes no test set for MR\. Name the test scans with -test_i"
    ),
    "no image": (lambda t: (t / FIRST).unlink(), (), r"labelsTr/amos_0001.nii.gz: its image is missing"),
    "another name": (
        lambda t: (t / FIRST).rename(t / "imagesTr/amos_0001_0000.nii.gz"), (),
        r"amos_0001_0000.nii.gz: unexpected file; expected only imagesTr/amos_<number>",
    ),
    "in both parts": (
        lambda t: shutil.copy(t / FIRST, t / "imagesVa"), (),
        r"imagesVa/amos_0001.nii.gz: the same number as .*imagesTr/amos_0001.nii.gz",
    ),
    "a number twice": (
        lambda t: save(scan(1), t / "imagesTr/amos_1.nii.gz", 1), (), r"amos_1.nii.gz: the same number as amos_0001"
    ),
    "all and more": (lambda t: None, ("-structures", "all", "liver"), "expected all, or names"),
    "one modality": (lambda t: None, ("-target", "ct"), "-source and -target are both ct"),
    "folds and tests": (
        lambda t: None, ("-protocol", "cisfa", "-test_ids", "507"), "-test_ids goes with the split of AMOS22"
    ),
    "an unknown test": (lambda t: None, ("-test_ids", "1"), "-test_ids names 1, which is not there"),
    "a value": (
        lambda t: save(np.full(SHAPE, 16, np.uint8), t / "labelsTr/amos_0001.nii.gz", 1), (), "amos_0001.*the values 16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tree, refused, case):
    spoil, options, words = REFUSED[case]
    spoil(tree)
    assert re.search(words, refused(tree, *options), re.DOTALL)


def test_a_folder_that_is_not_there(tree, refused):
    assert "nowhere: no imagesTr and labelsTr folder (found: no such folder)" in refused(tree / "nowhere")
