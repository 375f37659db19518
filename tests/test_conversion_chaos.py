"""CHAOS converter on vendor trees made here, and on the real case."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import litter
from PIL import Image
from support.chaos import CT, MR, REAL, SHAPE, assert_image, make_chaos, make_patient, nth, organs, orientation, stored
from support.dicom import edit, shorter
from support.folders import converter, use_folders, vendor_fixtures
from support.scans import VENDORS, load, names

from nnunet_uda.dataset_conversion.chaos import MR_GREYS, read_label
from nnunet_uda.errors import UDAError
from nnunet_uda.images.dicom import by_name, read_series

made, tree = vendor_fixtures(make_chaos)
convert, refused = converter("chaos", "510", *VENDORS, source="ct", target="t2spir")


# --- what is written --------------------------------------------------------------------------------------------------


def test_ct_to_mr_round_trip(tree):
    out = convert(tree)
    assert out.name == "Dataset510_CHAOS_CT2T2SPIR"
    assert names(out / "imagesTr") == names(out / "labelsTr") == ["ct_02", "ct_05", "ct_13"]
    assert names(out / "imagesTu") == ["t2spir_02", "t2spir_03", "t2spir_20", "t2spir_21"]
    assert names(out / "imagesTs") == names(out / "labelsTs") == ["t2spir_01", "t2spir_13"]
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "liver": 1} and content["licence"] == "CHAOS: CC BY-SA 4.0"
    assert content["uda"]["source_domain"] == "CT" and content["uda"]["target_domain"] == "T2SPIR"
    for number in CT:
        assert_image(out / f"imagesTr/ct_{number:02d}_0000.nii.gz", stored(500 + number) - 1000.0, orientation(number))
        assert (load(out / f"labelsTr/ct_{number:02d}.nii.gz") == (organs(number) == 1)).all()
    for folder, numbers in (("Tu", (2, 3, 20, 21)), ("Ts", (1, 13))):
        for number in numbers:
            path = out / f"images{folder}/t2spir_{number:02d}_0000.nii.gz"
            assert_image(path, stored(number), orientation(number))
    for number in (1, 13):
        label = sitk.ReadImage(str(out / f"labelsTs/t2spir_{number:02d}.nii.gz"))
        image = sitk.ReadImage(str(out / f"imagesTs/t2spir_{number:02d}_0000.nii.gz"))
        assert (sitk.GetArrayFromImage(label) == (organs(number) == 1)).all()
        for get in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(label, get)() == getattr(image, get)()


def test_two_sequences_of_the_same_patients_share_none(tree):
    out = convert(tree, source="t1in", target="t1out")
    source, target, test = (names(out / f"images{k}") for k in ("Tr", "Tu", "Ts"))
    assert test == ["t1out_01", "t1out_13"] and len(source) == len(target) == 2
    numbers = [[int(name.split("_")[1]) for name in group] for group in (source, target, test)]
    assert sorted(number for group in numbers for number in group) == sorted(MR)
    for number in numbers[0]:
        assert (load(out / f"imagesTr/t1in_{number:02d}_0000.nii.gz") == stored(100 + number)).all()
        assert (load(out / f"labelsTr/t1in_{number:02d}.nii.gz") == organs(number)).all()
    for number in numbers[1]:
        assert (load(out / f"imagesTu/t1out_{number:02d}_0000.nii.gz") == stored(200 + number)).all()
    for number in numbers[2]:
        assert (load(out / f"labelsTs/t1out_{number:02d}.nii.gz") == organs(number)).all()
    content = json.loads((out / "dataset.json").read_text())
    assert list(content["labels"]) == ["background", "liver", "right_kidney", "left_kidney", "spleen"]
    assert "patients divided" in content["description"]
    again = convert(tree, "--upper_bound", source="t1in", target="t1out", d="511")
    assert names(again / "imagesTr") == target and names(again / "labelsTr") == target


def test_a_patient_with_one_sequence_alone_counts_for_it(tree, capsys):
    shutil.rmtree(tree / "Train_Sets/MR/20/T2SPIR")
    shutil.rmtree(tree / "Train_Sets/MR/21/T1DUAL")
    out = convert(tree, "-protocol", "sifa", source="t1in", target="t2spir")
    assert "t1in_20" in names(out / "imagesTr") and "t2spir_21" in names(out / "imagesTu")
    assert len(names(out / "imagesTr")) == len(names(out / "imagesTu")) == 2
    assert "MR/21: T1DUAL/DICOM_anon/InPhase is missing or empty: this case is left out" in capsys.readouterr().out


def test_cisfa_folds(tree):
    make_chaos(tree, mr=(), ct=(30,))
    out = convert(tree, "-protocol", "cisfa", source="t2spir", target="ct")
    assert names(out / "imagesTu") == names(out / "labelsTs") == ["ct_02", "ct_05", "ct_13", "ct_30"]
    assert names(out / "imagesTr") == [f"t2spir_{i:02d}" for i in MR] and not (out / "imagesTs").exists()
    for name, folder in (("splits_final", "imagesTr"), ("splits_target", "imagesTu")):
        splits = json.loads((out / f"{name}.json").read_text())
        assert len(splits) == 4 and sorted(i for s in splits for i in s["val"]) == names(out / folder)


def test_slices_of_another_modality_are_refused(tree, refused):
    for path in (tree / "Train_Sets/CT/5/DICOM_anon").iterdir():
        edit(path, Modality="")
    convert(tree)  # an anonymiser's work; the class says CT
    edit(path, Modality="MR")
    said = refused(tree, "--overwrite")
    assert f"{path}: its Modality is MR; expected CT in this folder" in said


def test_chosen_structures_and_test_ids(tree):
    out = convert(tree, "-structures", "spleen", "liver", "-test_ids", "2", "03", source="t1out", target="t2spir")
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0, "spleen": 1, "liver": 2}
    assert names(out / "imagesTs") == ["t2spir_02", "t2spir_03"]
    assert (load(out / "labelsTs/t2spir_03.nii.gz") == (organs(3) == 4) * 1 + (organs(3) == 1) * 2).all()


def test_unusual_greys_are_read_by_range_and_reported(tree, capsys):
    path = by_name((tree / "Train_Sets/MR/1/T2SPIR/Ground").iterdir())[1]
    grey = np.array(Image.open(path))
    Image.fromarray(np.where(grey == 63, 60, np.where(grey == 252, 240, grey)).astype(np.uint8)).save(path)
    out = convert(tree)
    assert (load(out / "labelsTs/t2spir_01.nii.gz") == (organs(1) == 1)).all()
    assert "unusual grey values read as 60 (liver), 240 (spleen)" in capsys.readouterr().out


@pytest.mark.parametrize(("low", "high", "structure"), [(55, 70, 1), (110, 135, 2), (175, 200, 3), (240, 255, 4)])
def test_the_ranges_of_greys(tmp_path, low, high, structure):
    make_patient(tmp_path, {"DICOM_anon": 1}, 1)
    slices, path = tmp_path / "DICOM_anon", tmp_path / "Ground" / "IMG-0002-00008.png"
    image = read_series(slices)
    for value in (low, high):
        set_grey(path, value)
        assert sitk.GetArrayFromImage(read_label(tmp_path / "Ground", image, slices, MR_GREYS)[0])[1, 0, 0] == structure
    for value in {low - 1, high + 1} - {256}:
        set_grey(path, value)
        with pytest.raises(UDAError, match=f"IMG-0002-00008.png: grey values {value}; expected 0, 55-70"):
            read_label(tmp_path / "Ground", image, slices, MR_GREYS)


def test_missing_sequence_or_masks_is_a_warning_or_with_strict_an_error(tree, refused, capsys):
    shutil.rmtree(tree / "Train_Sets/MR/2/T2SPIR/DICOM_anon")
    shutil.rmtree(tree / "Train_Sets/CT/5/Ground")
    out = convert(tree)
    text = capsys.readouterr().out
    assert "MR/2: T2SPIR/DICOM_anon is missing or empty: this case is left out" in text
    assert "CT/5/DICOM_anon: there is no label for this scan: this case is left out" in text
    assert names(out / "imagesTr") == ["ct_02", "ct_13"] and "t2spir_02" not in names(out / "imagesTu")
    options = ("--strict", "-test_ids", "1")
    assert "MR/2: T2SPIR/DICOM_anon is missing or empty. Complete the input" in refused(tree, *options, d="511")
    message = refused(tree, *options, target="t1in", d="511")
    assert "CT/5/DICOM_anon: there is no label for this scan. Complete the input" in message


# --- what is refused --------------------------------------------------------------------------------------------------

MASKS, SLICES, LIVER = "MR/1/T2SPIR/Ground", "MR/1/T2SPIR/DICOM_anon", "CT/2/Ground"


def set_grey(path: Path, value: int) -> None:
    grey = np.array(Image.open(path))
    grey[0, 0] = value
    Image.fromarray(grey).save(path)


def resave(path: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    change(Image.open(path).copy()).save(path)


def move_in(train: Path) -> None:
    for phase in ("InPhase", "OutPhase"):
        for path in (train / "MR/1/T1DUAL/DICOM_anon" / phase).iterdir():
            path.rename(train / SLICES / f"{phase}-{path.name}")


CT_OPTIONS = ("-source", "t2spir", "-target", "ct")
MALFORMED = {
    "a mask is missing": (
        lambda t: nth(t / MASKS, 2).unlink(), (), r"MR/1/T2SPIR/Ground: 4 PNG masks .* for 5 DICOM slices"
    ),
    "a mask too many": (
        lambda t: shutil.copy(nth(t / MASKS, 4), t / MASKS / "IMG-9999.png"), (), r"Ground: 6 PNG masks .*IMG-9999\.png"
    ),
    "the last slice is missing": (
        lambda t: nth(t / SLICES, 4).unlink(), (), r"5 PNG masks .* for 4 DICOM slices .*MR/1/T2SPIR/DICOM_anon"
    ),
    "a slice inside is missing": (
        lambda t: nth(t / "MR/3/T2SPIR/DICOM_anon", 2).unlink(), (), r"IMG-0004-00004\.dcm: 4\.000 mm to the next"
    ),
    "a slice and a mask inside are missing": (
        lambda t: (nth(t / SLICES, 2).unlink(), nth(t / MASKS, 2).unlink()), (), r"about 1 missing"
    ),
    "a slice twice": (
        lambda t: shutil.copy(nth(t / SLICES, 2), t / SLICES / "copy.dcm"), (), r"\.dcm: at the same position as "
    ),
    "two series": (move_in, (), r"MR/1/T2SPIR/DICOM_anon/\S+: 3 series in one folder, of 5, 5, 5"),
    "a mask of another size": (
        lambda t: resave(nth(t / MASKS, 3), lambda i: i.resize((18, 14))), (),
        r"IMG-0002-00010\.png: 18 x 14 pixels; expected 9 x 7",
    ),
    "a turned mask": (
        lambda t: resave(nth(t / MASKS, 3), lambda i: i.rotate(90, expand=True)), (), r"00010\.png: 7 x 9 pixels"
    ),
    "an unknown grey": (
        lambda t: set_grey(nth(t / MASKS, 1), 90), (), r"IMG-0002-00008\.png: grey values 90; expected 0, 55-70 \(liver"
    ),
    "a kidney in CT": (lambda t: set_grey(nth(t / LIVER, 1), 126), (), r"liver_GT_001\.png: grey values 126"),
    "a mask in colour": (
        lambda t: resave(nth(t / MASKS, 0), lambda i: i.convert("RGB")), (), r"00007\.png: a PNG of mode RGB"
    ),
    "a mask of 16 bits": (
        lambda t: Image.fromarray(np.full(SHAPE[1:], 63, np.uint16)).save(nth(t / MASKS, 0)), (), r"mode I;16"
    ),
    "a mask cut short": (lambda t: shorter(nth(t / MASKS, 2), 0.7), (), r"IMG-0002-00009\.png: cannot be read"),
    "a mask that is none": (lambda t: nth(t / LIVER, 2).write_bytes(b"?"), (), r"liver_GT_002\.png: cannot be read"),
    "a corrupt slice": (lambda t: shorter(nth(t / SLICES, 2), 0.98), (), r"IMG-0004-00007\.dcm: cannot be read"),
    "slices of two sizes": (
        lambda t: edit(nth(t / SLICES, 2), Rows=9, Columns=7), (), r"IMG-0004-00007\.dcm: the slice is 7 x 9"
    ),
    "a patient twice": (
        lambda t: shutil.copytree(t / "MR/1", t / "MR/01"), (), r"MR/0?1: the same patient number as 0?1;"
    ),
    "a folder that is no patient": (lambda t: (t / "CT/liver").mkdir(), (), r"CT/liver: unexpected folder"),
    "no CT": (lambda t: shutil.rmtree(t / "CT"), (), r"Train_Sets: no CT folder \(found: MR\)"),
    "no scan": (lambda t: [shutil.rmtree(p) for p in (t / "CT").iterdir()], (), r"Train_Sets/CT holds no scan"),
    "no labelled scan": (lambda t: [shutil.rmtree(p) for p in t.glob("CT/*/Ground")], (), "no labelled case"),
    "no tree": (lambda t: t.rename(t.parent / "Other"), (), r"vendor: no CT folder \(found: Other\)"),
    "kidneys asked of CT": (lambda t: None, ("-structures", "liver", "spleen"), r"CHAOS's CT masks hold the liver"),
    "no fixed test set": (lambda t: None, CT_OPTIONS, r"Train_Sets/CT holds 2, 5, 13; -protocol sifa fixes no test"),
    "too few for folds": (lambda t: None, (*CT_OPTIONS, "-protocol", "cisfa"), r"4 folds were asked for, with 3 cases"),
    "an unknown test scan": (lambda t: None, ("-test_ids", "99"), r"Train_Sets/MR: -test_ids names 99"),
    "one sequence": (lambda t: None, ("-source", "t2spir"), r"-source and -target are both t2spir"),
}  # fmt: skip


def test_warnings_are_printed_where_an_error_stops(tree, capsys):
    for number in MR:
        shutil.rmtree(tree / f"Train_Sets/MR/{number}/T2SPIR/DICOM_anon")
    litter(tree)
    with pytest.raises(SystemExit):
        convert(tree)
    printed = capsys.readouterr().err
    assert printed.count("T2SPIR/DICOM_anon is missing or empty: this case is left out") == len(MR)
    assert "Train_Sets/MR holds no scan (found: 1, 13, 2, 20, 21, 3); expected MR/<number>" in printed


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_trees_are_refused_by_name(tree, refused, case):
    spoil, options, message = MALFORMED[case]
    spoil(tree / "Train_Sets")
    found = refused(tree, *options)
    assert re.search(message, found, re.DOTALL), found


# --- the real case ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="NNUNET_UDA_TEST_DATA is not set, or holds no CHAOS: no real CT case")
def test_real_case(tmp_path, monkeypatch):
    use_folders(monkeypatch, tmp_path)
    tree = make_chaos(tmp_path / "vendor", mr=(1, 2), ct=())
    (tree / "Train_Sets/CT").mkdir()
    (tree / "Train_Sets/CT/3").symlink_to(REAL)
    out = convert(tree)
    image, label = (sitk.ReadImage(str(out / p)) for p in ("imagesTr/ct_03_0000.nii.gz", "labelsTr/ct_03.nii.gz"))
    assert image.GetSize() == (512, 512, 78) and np.allclose(image.GetSpacing(), (0.7265625, 0.7265625, 2.0))
    assert image.GetOrigin() == (-185, -98, 1536.5)
    voxels, liver = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(label) == 1
    assert 140 < voxels[liver].mean() < 142 and 33 < voxels[liver].std() < 35
    assert voxels[liver[::-1]].std() > 200
    assert 1000 < liver.sum() * np.prod(image.GetSpacing()) / 1000 < 2500  # ml
