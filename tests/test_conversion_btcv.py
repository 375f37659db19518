"""BTCV converter on vendor trees made here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.btcv import MADE, SHAPE, make_btcv, organs, renumbered, save, scan
from support.dicom import shorter
from support.folders import converter, vendor_fixtures
from support.scans import names

from nnunet_uda.commands.convert import main
from nnunet_uda.dataset_conversion.btcv import NUMBERS, SIFA_TEST, VALUES

made, tree = vendor_fixtures(make_btcv)
convert, refused = converter("btcv", "520", "-source_intensities", "none")


def test_round_trip_of_all_organs(tree):
    out = convert(tree)
    assert out.name == "Dataset520_BTCV"
    assert names(out / "imagesTr") == names(out / "labelsTr") == [f"ct_{n:04d}" for n in MADE]
    assert not (out / "imagesTu").exists() and not (out / "imagesTs").exists()
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, **VALUES} and content["channel_names"] == {"0": "CT"}
    assert "target_domain" not in content.get("uda", {}) and "registration" in content["licence"]
    for number in MADE:
        before = sitk.ReadImage(str(tree / f"RawData/Training/img/img{number:04d}.nii.gz"))
        image = sitk.ReadImage(str(out / f"imagesTr/ct_{number:04d}_0000.nii.gz"))
        label = sitk.ReadImage(str(out / f"labelsTr/ct_{number:04d}.nii.gz"))
        assert (sitk.GetArrayFromImage(image) == scan(number)).all() and image.GetPixelID() == sitk.sitkInt16
        assert (sitk.GetArrayFromImage(label) == organs(number)).all()
        for get in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(getattr(before, get)(), getattr(image, get)(), atol=1e-6)
            assert getattr(label, get)() == getattr(image, get)()
    splits = json.loads((out / "splits_final.json").read_text())
    assert len(splits) == 5 and sorted(i for s in splits for i in s["val"]) == names(out / "imagesTr")


def test_chosen_organs_and_test_scans(tree):
    out = convert(tree, "-structures", "liver", "spleen", "-test_ids", "0009", "30", "-channel", "intensity")
    assert names(out / "imagesTs") == names(out / "labelsTs") == ["ct_0009", "ct_0030"]
    assert names(out / "imagesTr") == ["ct_0001", "ct_0002", "ct_0021", "ct_0040"]
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "labelsTs/ct_0009.nii.gz")))
    assert (label == (organs(9) == 6) * 1 + (organs(9) == 1) * 2).all()
    assert json.loads((out / "dataset.json").read_text())["channel_names"] == {"0": "intensity"}


@pytest.mark.parametrize("inside", ["RawData", "RawData/Training"])
def test_the_tree_may_be_given_from_within(tree, inside):
    main(["btcv", "-i", str(tree / inside), "-d", "520", "-np", "1"])
    assert len(names(tree.parent / "nnUNet_raw" / "Dataset520_BTCV" / "imagesTr")) == 6


def test_a_scan_without_label_is_a_warning_or_with_strict_an_error(tree, refused, capsys):
    (tree / "RawData/Training/label/label0002.nii.gz").unlink()
    out = convert(tree)
    assert "ct_0002" not in names(out / "imagesTr")
    assert "img0002.nii.gz: there is no label for this scan: this case is left out" in capsys.readouterr().out
    assert "img0002.nii.gz: there is no label for this scan. Complete" in refused(tree, "--strict", d="521")


def another_patient(training: Path) -> None:
    (training / "img/img0002.nii.gz").unlink()
    (training / "label/label0001.nii.gz").unlink()


def relabel(path: Path, change) -> None:
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    save(change(array), path, int(path.name[5:9]))


def renamed(name: str):
    return lambda training: (training / FIRST_IMAGE).rename(training / "img" / name)


def copied(path: str, to: str):
    return lambda training: shutil.copy(training / path, training / to)


FIRST_IMAGE, FIRST_LABEL = "img/img0001.nii.gz", "label/label0001.nii.gz"
MALFORMED = {
    "renumbered": (
        renumbered, (),
        r"img0011\.nii\.gz: BTCV has no training scan 11; .*renumbered 1-30.*other patients.*1, 9, 30, 32, 33, 39",
    ),
    "a label of another patient": (another_patient, (), r"label0002\.nii\.gz: its image is missing"),
    "a scan twice": (copied(FIRST_IMAGE, "img/img001.nii.gz"), (), r"img001\.nii\.gz: the same number as"),
    "packed and unpacked": (copied(FIRST_LABEL, "label/label0001.nii"), (), r"label0001\.nii(\.gz)?: the same number"),
    "another name": (renamed("case1.nii.gz"), (), r"case1\.nii\.gz: unexpected file"),
    "number 0": (renamed("img0000.nii.gz"), (), r"img0000\.nii\.gz: BTCV has no training scan"),
    "a test scan": (copied(FIRST_IMAGE, "img/img0061.nii.gz"), (), r"img0061\.nii\.gz: BTCV has no training"),
    "a label of another size": (
        lambda t: relabel(t / FIRST_LABEL, lambda a: a[:-1]), (), r"label0001\.nii\.gz: its geometry differs.*size"
    ),
    "a label that lies elsewhere": (
        lambda t: save(organs(1), t / FIRST_LABEL, 2), (), r"label0001\.nii\.gz: its geometry differs.*direction"
    ),
    "an unknown value": (
        lambda t: relabel(t / FIRST_LABEL, lambda a: np.where(a == 6, 14, a)), (),
        r"label0001\.nii\.gz: the label holds the values 14, .*6 \(liver\)",
    ),
    "an interpolated label": (
        lambda t: relabel(t / FIRST_LABEL, lambda a: a + np.float32(0.5)), (), r"label0001\.nii\.gz: .*non-integer"
    ),
    "an image cut short": (lambda t: shorter(t / FIRST_IMAGE, 0.8), (), r"img0001\.nii\.gz: .*truncated"),
    "a label cut short": (lambda t: shorter(t / FIRST_LABEL, 0.8), (), r"label0001\.nii\.gz: .*truncated"),
    "an empty image": (
        lambda t: save(np.zeros(SHAPE, np.int16), t / FIRST_IMAGE, 1), (), r"img0001\.nii\.gz: every voxel is 0"
    ),
    "no labels": (lambda t: shutil.rmtree(t / "label"), (), r"vendor: no img and label folder \(found: RawData\)"),
    "no images": (lambda t: [p.unlink() for p in (t / "img").iterdir()], (), r"Training/img holds no image"),
    "an unknown test scan": (lambda t: None, ("-test_ids", "33"), r"Training: -test_ids names 33, which is not there"),
    "all of them test scans": (lambda t: None, ("-test_ids", *map(str, MADE)), "no labelled case"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_trees_are_refused_by_name(tree, refused, case):
    spoil, options, message = MALFORMED[case]
    spoil(tree / "RawData" / "Training")
    found = refused(tree, *options)
    assert re.search(message, found, re.DOTALL), found


def test_the_numbers_are_those_of_the_owner():
    assert len(NUMBERS) == 30 and {int(n) for n in SIFA_TEST} <= set(NUMBERS)
    assert set(NUMBERS) == set(range(1, 41)) - set(range(11, 21))
