"""ACDC, EMIDEC, and both as a pair, on vendor trees made here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import litter
from support.folders import refuser, vendor_fixtures
from support.hearts import CASES, PATIENTS, UNLABELLED, frames, heart, make_acdc, make_emidec, scan
from support.scans import load, names

from nnunet_uda.commands.convert import main
from nnunet_uda.dataset_conversion import emidec

CINE, LGE = np.array([0, 0, 2, 1], np.uint8), np.array([0, 1, 2, 2, 2], np.uint8)
"""Values of ACDC and of EMIDEC to LV 1, myocardium 2."""


def make_both(folder: Path) -> None:
    make_acdc(folder / "ACDC")
    make_emidec(folder / "EMIDEC")


made, trees = vendor_fixtures(make_both)


def convert(trees: Path, name: str, *options: str, d: str = "540") -> Path:
    given = {"cine_lge": ("EMIDEC", "ACDC"), "acdc": ("ACDC",), "emidec": ("EMIDEC",)}[name]
    inputs = [str(trees / tree) for tree in given]
    words = ["-source_intensities", "none", "-target_intensities", "none"]
    main([name, "-i", *inputs, "-d", d, "-np", "1", *words, *options])
    return next((trees.parent / "nnUNet_raw").glob(f"Dataset{d}_*"))


refused = refuser(convert)


def patient(trees: Path, number: int) -> Path:
    return trees / "ACDC" / "database" / ("training" if number <= 100 else "testing") / f"patient{number:03d}"


def case(trees: Path, name: str) -> Path:
    return trees / "EMIDEC" / "emidec-dataset-1.0.1" / f"Case_{name}"


# --- the pair ---------------------------------------------------------------------------------------------------------


def test_cine_to_lge(trees):
    litter(trees)
    out = convert(trees, "cine_lge")
    assert out.name == "Dataset540_CineLGE_cine2LGE"
    assert names(out / "imagesTr") == names(out / "labelsTr") == ["cine_001", "cine_002", "cine_003"]
    (test,) = names(out / "imagesTs")
    assert names(out / "labelsTs") == [test] and test.removeprefix("lge_") in CASES, (
        "a third of four, which have labels"
    )
    everything = sorted(f"lge_{name}" for name in (*CASES, UNLABELLED))
    assert sorted([*names(out / "imagesTu"), test]) == everything
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "LV": 1, "myocardium": 2}
    assert "ACDC (cine, ED) and EMIDEC (LGE)" in content["description"] and "emidec.com" in content["reference"]
    assert (content["uda"]["source_domain"], content["uda"]["target_domain"]) == ("cine", "LGE")
    assert content["uda"]["label_values"]["LGE"]["myocardium"] == [2, 3, 4]
    for number in (1, 2, 3):
        frame, _ = frames(number)
        assert (load(out / f"imagesTr/cine_{number:03d}_0000.nii.gz") == scan(number, frame)).all()
        assert (load(out / f"labelsTr/cine_{number:03d}.nii.gz") == CINE[heart(3, number, frame)]).all()
    index = CASES.index(test.removeprefix("lge_"))
    assert (load(out / f"imagesTs/{test}_0000.nii.gz") == scan(index)).all()
    label = heart(4 if "P" in test else 2, index)
    assert (load(out / f"labelsTs/{test}.nii.gz") == LGE[label]).all()
    again = convert(trees, "cine_lge", d="541")
    assert names(again / "imagesTs") == [test], "the seed decides"


def test_lge_to_cine(trees, capsys):
    out = convert(trees, "cine_lge", "-source", "lge", "-target", "cine", "-frame", "es", "-structures", "myocardium")
    assert names(out / "imagesTr") == names(out / "labelsTr") == [f"lge_{name}" for name in CASES]
    assert names(out / "imagesTu") == ["cine_001", "cine_002", "cine_003"]
    assert names(out / "imagesTs") == names(out / "labelsTs") == ["cine_101", "cine_150"]
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0, "myocardium": 1}
    assert (load(out / "imagesTu/cine_002_0000.nii.gz") == scan(2, 4)).all()
    assert (load(out / "labelsTs/cine_101.nii.gz") == (heart(3, 101, 7) == 2)).all()
    assert "Case_101.nii.gz: there is no label for this scan" in capsys.readouterr().out


def test_test_ids_folds_and_the_upper_bound(trees):
    out = convert(trees, "cine_lge", "-test_ids", "p1", "Case_N003")
    assert names(out / "imagesTs") == ["lge_N003", "lge_P001"] and len(names(out / "imagesTu")) == 3
    assert names(out / "imagesTr") == [f"cine_{n:03d}" for n in PATIENTS], "the source is used whole"
    folds = convert(trees, "cine_lge", "-protocol", "cisfa", d="541")
    splits = json.loads((folds / "splits_target.json").read_text())
    assert sorted(name for split in splits for name in split["val"]) == names(folds / "imagesTu")
    bound = convert(trees, "cine_lge", "--upper_bound", "-test_ids", "P002", d="542")
    assert names(bound / "imagesTr") == names(bound / "labelsTr") == ["lge_N003", "lge_N004", "lge_P001"]


# --- each alone -------------------------------------------------------------------------------------------------------


def test_acdc_alone(trees):
    out = convert(trees, "acdc")
    assert out.name == "Dataset540_ACDC" and names(out / "imagesTr") == ["cine_001", "cine_002", "cine_003"]
    assert names(out / "imagesTs") == names(out / "labelsTs") == ["cine_101", "cine_150"]
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "RV": 1, "myocardium": 2, "LV": 3} and "uda" not in content
    assert (load(out / "labelsTr/cine_002.nii.gz") == heart(3, 2, 11)).all()
    out = convert(trees, "acdc", "-test_ids", "2", "-structures", "LV", d="541")
    assert names(out / "imagesTs") == ["cine_002"] and names(out / "imagesTr")[-1] == "cine_150"
    assert (load(out / "labelsTs/cine_002.nii.gz") == (heart(3, 2, 11) == 3)).all()


def test_emidec_alone(trees, capsys):
    out = convert(trees, "emidec", "-test_ids", "P1")
    assert out.name == "Dataset540_EMIDEC" and names(out / "imagesTr") == ["lge_N003", "lge_N004", "lge_P002"]
    assert names(out / "imagesTs") == ["lge_P001"]
    labels = json.loads((out / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "LV": 1, "myocardium": 2, "infarct": 3, "no_reflow": 4}
    assert (load(out / "labelsTr/lge_P002.nii.gz") == heart(4, 3)).all()
    assert "Case_101.nii.gz: there is no label for this scan: this case is left out" in capsys.readouterr().out
    drawn = convert(trees, "emidec", d="541")
    assert len(names(drawn / "imagesTs")) == 1 and len(names(drawn / "imagesTr")) == 3


@pytest.mark.parametrize(
    ("structures", "classes"),
    [
        (["LV", "myocardium", "infarct", "no_reflow"], [1, 2, 3, 4]),
        (["LV", "myocardium"], [1, 2, 2, 2]),
        (["infarct", "LV"], [2, 0, 1, 1]),
        (["no_reflow"], [0, 0, 0, 1]),
    ],
)
def test_a_part_that_is_not_named_is_what_it_is_part_of(structures, classes):
    assert [emidec.classes(structures).values[value] for value in (1, 2, 3, 4)] == classes


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_frame_that_was_unpacked_as_a_folder(trees):
    for name in ("patient001_frame01.nii.gz", "patient001_frame01_gt.nii.gz"):
        path = patient(trees, 1) / name
        path.rename(path.with_name("held"))
        path.mkdir()
        path.with_name("held").rename(path / name)
    out = convert(trees, "acdc")
    assert (load(out / "imagesTr/cine_001_0000.nii.gz") == scan(1, 1)).all()
    assert (load(out / "labelsTr/cine_001.nii.gz") == heart(3, 1, 1)).all()


def test_without_info_the_first_or_last_frame_is_taken_and_said(trees, refused, capsys):
    (patient(trees, 1) / "Info.cfg").unlink()
    (patient(trees, 3) / "Info.cfg").write_bytes(b"ED one\xff\nES: \n")
    (patient(trees, 2) / "Info.cfg").write_text("ED: 11\nES: 4\nED: 4\n")
    patient(trees, 2).rename(patient(trees, 2).with_name("Patient002"))  # the files keep their names
    assert re.search(r"patient001/Info\.cfg is missing, or does not say which frame is ED\. Complete the input",
                     refused(trees, "acdc", "--strict"))  # fmt: skip
    out = convert(trees, "acdc")
    said = capsys.readouterr().out
    assert "patient001/Info.cfg is missing" in said and "the first frame of the folder, 1, is taken" in said
    for name in ("patient003", "Patient002"):
        assert f"{name}/Info.cfg is missing, or does not say" in said
    assert (load(out / "imagesTr/cine_003_0000.nii.gz") == scan(3, 1)).all()
    out = convert(trees, "acdc", "-frame", "es", d="541")
    assert (load(out / "imagesTr/cine_001_0000.nii.gz") == scan(1, 7)).all()


def test_a_patient_without_the_frame_is_left_out_and_said(trees, capsys):
    for path in patient(trees, 2).glob("*frame11*"):
        path.unlink()
    convert(trees, "acdc")
    assert "patient002: there is no frame 11 (ED; found: 04): this case is left out" in capsys.readouterr().out


def _rename_info(trees: Path) -> None:
    for path in trees.glob("ACDC/database/*/patient*"):
        path.rename(path.with_name(path.name.replace("patient", "p")))


def gone(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("/mnt/gone")


def packed(folder: Path) -> None:
    shutil.make_archive(str(folder), "zip", folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "spoil", "options", "words"),
    [
        ("acdc", _rename_info, (), r"ACDC: no folder of a patient .*\(found: database\); expected patient<"),
        ("emidec", lambda t: shutil.rmtree(t / "EMIDEC/emidec-dataset-1.0.1"), (), r"EMIDEC: no folder of a case"),
        ("cine_lge", _rename_info, (), r"EMIDEC \(EMIDEC\), .*ACDC \(neither\): expected one ACDC tree"),
        ("cine_lge", lambda t: None, ("-target", "cine"), "-source and -target are both cine"),
        ("cine_lge", lambda t: None, ("-test_ids", "P009"), "-test_ids names P009, which is not there"),
        ("cine_lge", lambda t: None, ("-protocol", "cisfa", "-test_ids", "P1"), "the split of ACDC and EMIDEC"),
        ("acdc", lambda t: shutil.copytree(patient(t, 1), t / "ACDC/database/testing/patient001"), (),
         r"testing/patient001: the same patient as .*training/patient001"),
        ("acdc", lambda t: (patient(t, 1) / "patient001_frame01.nii.gz").unlink(), (),
         r"patient001_frame01_gt.nii.gz: its image is missing"),
        ("acdc", lambda t: (patient(t, 3) / "patient003_frame01.nii").touch(), (), "the same frame as patient003"),
        ("acdc", lambda t: patient(t, 3).rename(patient(t, 3).with_name("patient003 (1)")), (), "unexpected folder"),
        ("cine_lge", lambda t: gone(case(t, "P001") / "Contours"), (), "Contours: a link to /mnt/gone, where there is"),
        ("cine_lge", lambda t: gone(patient(t, 1).parent), (), "training: a link to /mnt/gone, where there is nothing"),
        ("emidec", lambda t: packed(case(t, "P001")), (), r"Case_P001.zip: a file; expected a folder.*Unpack it"),
        ("emidec", lambda t: shutil.rmtree(case(t, "P001") / "Images"), (),
         r"Contours/Case_P001.nii.gz: its image is missing"),
        ("emidec", lambda t: shutil.copy(case(t, "P002") / "Contours/Case_P002.nii.gz", case(t, "P001") / "Contours"),
         (), r"Contours/Case_P002.nii.gz: unexpected file; expected Case_P001.nii.gz alone"),
        ("emidec", lambda t: shutil.copytree(case(t, "P001"), case(t, "P1")), (), r"P1: the same case as Case_P001"),
    ],
)  # fmt: skip
def test_what_is_refused(trees, refused, name, spoil, options, words):
    spoil(trees)
    assert re.search(words, refused(trees, name, *options), re.DOTALL)


def test_an_empty_folder_in_place_of_a_frame(trees, refused):
    path = patient(trees, 1) / "patient001_frame01.nii.gz"
    path.unlink()
    path.mkdir()
    assert "patient001_frame01.nii.gz: a folder with 0 NIfTI files" in refused(trees, "acdc")


def test_what_is_no_number_of_a_case(trees, capsys):
    with pytest.raises(SystemExit) as exit_:
        convert(trees, "emidec", "-test_ids", "X7")
    assert exit_.value.code == 2 and "invalid number value: 'X7'" in capsys.readouterr().err
