"""The general converter: names, channels, labels by name, domains, and real scans."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import litter
from support.dicom import DIRECTIONS, write_series
from support.folders import refuser, use_folders
from support.rtstruct import save_rtstruct
from support.scans import load

from nnunet_uda.commands.convert import main
from nnunet_uda.dataset_conversion.folders import list_scans
from nnunet_uda.images.dicom import read_series

SHAPE = (6, 8, 10)


def save(path: Path, seed: int | None = None, array: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if array is None:
        array = np.random.default_rng(seed).integers(0, 900, SHAPE).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path), path.name.endswith("gz"))
    return path


def organs(*values: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    for i, value in enumerate(values):
        array[2:4, 3:5, 2 * i] = value
    return array


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    use_folders(monkeypatch, tmp_path)
    for i in range(3):
        save(tmp_path / "si" / f"a{i}.nii.gz", i)
        save(tmp_path / "sl" / f"a{i}.nrrd", array=organs(5, 1))
        save(tmp_path / "ti" / f"a{i}.mha", 10 + i)  # the same names as in the source
    save(tmp_path / "xi" / "b 1.nii", 20)
    save(tmp_path / "xl" / "b 1.nii.gz", array=organs(5, 1))
    return tmp_path


def arguments(data: Path, *more: str, **changes: str | list[str] | None) -> list[str]:
    options: dict = {
        "-d": "510", "-source": "CT", "-target": "MR", "-np": "1", "-source_intensities": "none",
        "-target_intensities": "none",
        "-source_images": str(data / "si"), "-source_labels": str(data / "sl"), "-target_images": str(data / "ti"),
        "-labels": ["liver=5", "spleen=1"], **{f"-{key}": value for key, value in changes.items()},
    }  # fmt: skip
    words = []
    for option, value in options.items():
        if value is not None:
            words += [option, *([value] if isinstance(value, str) else value)]
    return ["folders", *words, *more]


def convert(data: Path, *more: str, **changes: str | list[str] | None) -> Path:
    main(arguments(data, *more, **changes))
    return next((data / "nnUNet_raw").glob("Dataset510_*"))


refused = refuser(convert)


def names(folder: Path) -> list[str]:
    return sorted(p.name.removesuffix(".nii.gz") for p in folder.iterdir())


def test_formats_names_and_labels(data):
    out = convert(data, target_test_images=str(data / "xi"), target_test_labels=str(data / "xl"))
    assert out.name == "Dataset510_CT2MR"
    assert names(out / "imagesTr") == ["CT_a0_0000", "CT_a1_0000", "CT_a2_0000"]
    assert names(out / "labelsTr") == ["CT_a0", "CT_a1", "CT_a2"]
    assert names(out / "imagesTu") == ["MR_a0_0000", "MR_a1_0000", "MR_a2_0000"]
    assert names(out / "imagesTs") == ["MR_b_1_0000"] and names(out / "labelsTs") == ["MR_b_1"]
    expected = (organs(5, 1) == 5) * 1 + (organs(5, 1) == 1) * 2
    assert (load(out / "labelsTr/CT_a1.nii.gz") == expected).all()
    assert (load(out / "labelsTs/MR_b_1.nii.gz") == expected).all()
    assert (load(out / "imagesTu/MR_a2_0000.nii.gz") == load(data / "ti/a2.mha")).all()
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert content["uda"]["numTest"] == 1
    assert len(json.loads((out / "splits_final.json").read_text())) == 3


def test_several_values_to_one_name_and_other_labels(data, refused):
    save(data / "sl" / "a0.nrrd", array=organs(5, 1, 9, 200))
    text = refused(data)
    assert "a0.nrrd: the label holds the values 9, 200" in text and "--ignore_other_labels" in text
    out = convert(data, "--ignore_other_labels", labels=["both=1,5", "nine=9"])
    assert load(out / "labelsTr/CT_a0.nii.gz")[2, 3, :8].tolist() == [1, 0, 1, 0, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["liver"], "-labels liver: expected name=value"),
        (["liver=5.5"], "expected name=value"),
        (["liver=0"], "already the background"),
        (["liver=5", "spleen=5"], "value 5 is already liver"),
        (["liver=5", "liver=1"], "liver is named twice"),
        (["liver=5", "background=1"], "'background'"),
    ],
)
def test_label_arguments_that_are_refused(data, refused, labels, message):
    assert message in refused(data, labels=labels)


def test_wrong_value_for_a_structure_is_refused(data, refused):
    text = refused(data, "--ignore_other_labels", labels=["liver=50", "spleen=1"])
    assert "the structure 'liver'" in text


def test_channels(data, refused):
    for i in range(2):
        for c in range(2):
            save(data / "sm" / f"a{i}_{c:04d}.nii.gz", 30 + 2 * i + c)
            save(data / "tm" / f"a{i}_{c:04d}.nii.gz", 40 + 2 * i + c)
    (data / "sl" / "a2.nrrd").unlink()
    many = {"source_images": str(data / "sm"), "target_images": str(data / "tm")}
    text = refused(data, source_images=many["source_images"])
    assert "ti/a0.mha: this case has 1 channel(s), that of" in text and "has 2, since" in text
    out = convert(data, **many)
    assert names(out / "imagesTu") == ["MR_a0_0000", "MR_a0_0001", "MR_a1_0000", "MR_a1_0001"]
    assert (load(out / "imagesTr/CT_a1_0001.nii.gz") == load(data / "sm/a1_0001.nii.gz")).all()
    content = json.loads((out / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "intensity_0", "1": "intensity_1"}


def test_channel_gaps_and_numbers_that_are_no_channels(data, refused):
    save(data / "tm" / "a_0000.nii.gz", 1)
    save(data / "tm" / "a_0002.nii.gz", 2)
    text = refused(data, target_images=str(data / "tm"))
    assert "a_0002.nii.gz: case a has the channels 0000, 0002" in text and "--single_channel" in text
    out = convert(data, "--single_channel", target_images=str(data / "tm"))
    assert names(out / "imagesTu") == ["MR_a_0000_0000", "MR_a_0002_0000"]


@pytest.mark.parametrize("upper", [False, True])
def test_cases_numbered_like_channels_name_the_option(data, refused, upper):
    """patient_0000, patient_0001: two cases for who wrote them, two channels of one by the convention."""
    for i in range(2):
        save(data / "ni" / f"patient_{i:04d}.nii.gz", i)
        save(data / "nl" / f"patient_{i:04d}.nii.gz", array=organs(5, 1))
    numbered = {"source_images": str(data / "ni"), "source_labels": str(data / "nl")}
    if upper:
        numbered = {"target_images": str(data / "ni"), "target_labels": str(data / "nl")}
    text = refused(data, *(["--upper_bound"] if upper else []), **numbered)
    assert "nl/patient_0001.nii.gz: its image of the same name was read as a channel of the case patient" in text
    assert "--single_channel" in text
    text = refused(data, target_images=str(data / "ni"))
    assert "this case has 1 channel(s), that of" in text and "patient_0000.nii.gz has 2" in text
    assert "--single_channel" in text
    out = convert(data, "--single_channel", **numbered)
    assert len(names(out / "imagesTu")) == (2 if upper else 3) and len(names(out / "imagesTr")) == (3 if upper else 2)


def test_year_like_numbers_stay_in_the_name(data):
    save(data / "tm" / "ct_train_1001.nii.gz", 1)
    save(data / "tm" / "ct_train_1002.nii.gz", 2)
    out = convert(data, target_images=str(data / "tm"))
    assert names(out / "imagesTu") == ["MR_ct_train_1001_0000", "MR_ct_train_1002_0000"]


def test_nnunet_style_single_channel_images(data):
    for i in range(3):
        (data / "si" / f"a{i}.nii.gz").rename(data / "si" / f"a{i}_0000.nii.gz")
    (data / "sl" / "a0.nrrd").rename(data / "sl" / "a0_0000.nrrd")  # tolerated beside a1.nrrd
    out = convert(data)
    assert names(out / "imagesTr") == ["CT_a0_0000", "CT_a1_0000", "CT_a2_0000"]
    assert names(out / "labelsTr") == ["CT_a0", "CT_a1", "CT_a2"]


def test_files_patterns_and_one_pair_of_unlike_names(data):
    save(data / "other" / "seg.nii.gz", array=organs(5, 1))
    out = convert(
        data,
        source_images=str(data / "si" / "a0.nii.gz"),
        source_labels=str(data / "other" / "seg.nii.gz"),
        target_images=[str(data / "ti" / "a[01].mha"), str(data / "xi")],
    )
    assert names(out / "labelsTr") == ["CT_a0"] and len(names(out / "imagesTu")) == 3


# --- DICOM ------------------------------------------------------------------------------------------------------------


def series(folder: Path, seed: int, spacing: tuple[float, float, float] = (1.5, 1.5, 4.0), **options) -> np.ndarray:
    """A folder of slices 4 mm apart, and their voxels."""
    array = np.random.default_rng(seed).integers(0, 900, SHAPE).astype(np.int16)
    write_series(folder, array, spacing=spacing, **options)
    return array


def study(folder: Path, *names: str) -> None:
    """Series of one patient in one study."""
    for seed, name in enumerate(names):
        series(folder / name, seed, change=lambda ds, z: setattr(ds, "PatientID", "P"))


@pytest.mark.parametrize("below", ["", "study/series"])
@pytest.mark.parametrize("names", [None, [f"1.2.840.{z}" for z in range(6)], [f"IMG{z}.DCM" for z in range(6)]])
def test_folders_of_dicom_series_are_scans(data, below, names):
    arrays = {name: series(data / "dicom" / name / below, seed, names=names) for seed, name in enumerate(("P1", "P2"))}
    save_rtstruct(data / "dicom" / "P1" / below / "RTSS.dcm", [])
    litter(data / "dicom")
    out = convert(data, target_images=str(data / "dicom"))
    assert sorted(p.name for p in (out / "imagesTu").iterdir()) == ["MR_P1_0000.nii.gz", "MR_P2_0000.nii.gz"]
    for name, array in arrays.items():
        image = sitk.ReadImage(str(out / "imagesTu" / f"MR_{name}_0000.nii.gz"))
        assert (sitk.GetArrayFromImage(image) == array).all()
        assert np.allclose(image.GetSpacing(), (1.5, 1.5, 4.0)) and np.allclose(image.GetOrigin(), (-10.5, 20.25, -30))


def test_one_series_and_its_labels(data):
    array = series(data / "dicom" / "P1", 1)
    image = read_series(data / "dicom" / "P1")
    label = sitk.GetImageFromArray(organs(5, 1))
    label.CopyInformation(image)
    (data / "dl").mkdir()
    sitk.WriteImage(label, str(data / "dl" / "P1.nii.gz"))
    series(data / "td" / "a", 7)
    write_series(data / "tdl" / "a", organs(1, 5).astype(np.int16), spacing=(1.5, 1.5, 4.0))
    out = convert(
        data, source_images=str(data / "dicom" / "P1"), source_labels=str(data / "dl"),
        target_images=str(data / "td"), target_labels=str(data / "tdl"),
    )  # fmt: skip
    assert names(out / "imagesTr") == ["CT_P1_0000"] and (load(out / "imagesTr/CT_P1_0000.nii.gz") == array).all()
    assert (load(out / "labelsTr/CT_P1.nii.gz") == (organs(5, 1) == 5) + 2 * (organs(5, 1) == 1)).all()
    assert (load(out / "labelsTs/MR_a.nii.gz") == (organs(1, 5) == 5) + 2 * (organs(1, 5) == 1)).all()


@pytest.mark.parametrize("orientation", ["axial", "sagittal", "oblique"])
def test_labels_of_a_series_whose_axes_a_converter_turned(data, capsys, orientation):
    series(data / "dicom" / "P1", 1, direction=DIRECTIONS[orientation])
    image = read_series(data / "dicom" / "P1")
    label = sitk.GetImageFromArray(organs(5, 1))
    label.CopyInformation(image)
    (data / "dl").mkdir()
    sitk.WriteImage(sitk.DICOMOrient(label, "RAS"), str(data / "dl" / "P1.nii.gz"))
    out = convert(data, source_images=str(data / "dicom"), source_labels=str(data / "dl"))
    assert (load(out / "labelsTr/CT_P1.nii.gz") == (organs(5, 1) == 5) + 2 * (organs(5, 1) == 1)).all()
    assert "P1.nii.gz: axes turned to those of the slices" in capsys.readouterr().out


def test_a_pattern_chooses_among_series(data, refused):
    for name in ("P1", "P2"):
        study(data / "dicom" / name / "exam", "loc", "t2")
    text = refused(data, target_images=str(data / "dicom"))
    assert "dicom/P1 (-target_images): 2 series in the folder of one case (exam/loc, exam/t2); expected one" in text
    assert f"quoted pattern, as '{data}/dicom/*/exam/loc'" in text
    out = convert(data, target_images=str(data / "dicom" / "*" / "exam" / "t2"))
    assert names(out / "imagesTu") == ["MR_P1_0000", "MR_P2_0000"]


def test_series_given_one_by_one_are_told_apart(data, capsys):
    for name in ("P1", "P2"):
        study(data / "dicom" / name, "t2")
    out = convert(data, target_images=[str(data / "dicom" / name / "t2") for name in ("P1", "P2")])
    assert names(out / "imagesTu") == ["MR_P1_0000", "MR_P2_0000"]


def test_series_of_one_study_are_warned_of(data, capsys):
    study(data / "dicom", "t1", "t2")
    convert(data, target_images=str(data / "dicom"))
    assert "dicom/t1 and" in (printed := capsys.readouterr().out) and "are series of one study" in printed


def test_dicom_that_is_no_folder_of_slices_is_refused(data, refused):
    folder = data / "dicom" / "P1"
    series(folder, 1, names=[f"1.2.{z}" for z in range(6)])
    for given in (str(folder / "1.2.3"), str(data / "dicom" / "*" / "*"), str(folder / "1.*")):
        text = refused(data, target_images=given)
        assert "1.2." in text and "(-target_images): a DICOM file, which is one slice of a series" in text
        assert f"Give {folder}, or the folder that holds such folders" in text
    save(folder / "b.nii.gz", 1)
    text = refused(data, target_images=str(folder))
    assert "P1 (-target_images) holds images, as b.nii.gz, and DICOM files, as 1.2.0; expected one kind" in text
    (folder / "b.nii.gz").unlink()
    series(folder / "old", 2)
    text = refused(data, target_images=str(folder))
    assert "P1 (-target_images) holds DICOM slices, and so does" in text and "P1/old below it" in text
    shutil.rmtree(folder / "old")
    series(folder, 3, names=[f"2.2.{z}" for z in range(6)])
    text = refused(data, target_images=str(data / "dicom"))
    assert "2 series in one folder, of 6, 6 slices; expected one" in text


def test_folders_beside_images_that_are_not_taken_are_warned_of(tmp_path):
    save(tmp_path / "b.nii.gz", 1)
    for beside, name in (("P1", "P1/1.2.0"), ("nifti", "nifti/c.nii.gz")):
        if beside == "P1":
            series(tmp_path / beside, 1, names=[f"1.2.{z}" for z in range(6)])
        else:
            save(tmp_path / beside / "c.nii.gz", 2)
        warnings: list[str] = []
        assert list_scans([str(tmp_path)], "-target_images", warnings) == {"b": tmp_path / "b.nii.gz"}
        (warning,) = warnings
        assert "holds images, as b.nii.gz, which are taken, and folders with others" in warning and name in warning
        shutil.rmtree(tmp_path / beside)


def test_multi_frame_dicom_and_structures_as_labels_are_refused(data, refused):
    folder = data / "dicom" / "P1"
    series(folder, 1)
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    ds = pydicom.dcmread(folder / "IMG-0001.dcm")
    ds.NumberOfFrames = 6
    ds.save_as(folder / "IMG-0001.dcm")
    text = refused(data, target_images=str(data / "dicom"))
    assert "IMG-0001.dcm: a multi-frame DICOM of 6 frames" in text and "dcm2niix" in text
    save_rtstruct(data / "rt" / "a0.dcm", [])
    text = refused(data, source_labels=str(data / "rt"))
    assert "a0.dcm (-source_labels): a DICOM file of modality RTSTRUCT; expected label files" in text


def test_an_image_with_and_one_without_a_channel_number_are_not_one_case(data, refused):
    save(data / "ti" / "a0_0000.mha", 50)
    assert "a0_0000.mha: its case id a0 is already that of" in refused(data)


def test_what_systems_leave_beside_files_is_passed_over(data):
    for folder in ("si", "sl", "ti"):
        litter(data / folder)
    out = convert(data, target_images=str(data / "t*"))
    assert len(names(out / "imagesTr")) == len(names(out / "imagesTu")) == 3


@pytest.mark.parametrize("inside", [(), ("a1.mha",)])
def test_a_folder_in_place_of_a_file_is_refused(data, refused, inside):
    held = (data / "ti" / "a1.mha").rename(data / "held")
    (data / "ti" / "a1.mha").mkdir()
    for name in inside:
        shutil.copy(held, data / "ti" / "a1.mha" / name)
    assert "ti/a1.mha: a folder; expected an image file" in refused(data)


def test_links_that_lead_nowhere_are_refused_by_name(data, refused):
    (data / "ti" / "z.nii").symlink_to(data / "ti" / "z.nii")
    (data / "ti" / "y.nii").symlink_to(data / "gone.nii")
    said = refused(data)
    assert "ti/z.nii: a link to" in said and "ti/y.nii: a link to" in said


def test_a_header_without_geometry_is_warned_of_and_a_sheared_one_refused(data, refused, capsys):
    path = data / "ti" / "a0.mha"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"TransformMatrix = 1 0 0 0 1 0 0 0 1\n", b""))
    convert(data)
    assert "WARNING: MR_a0: a0.mha: its header holds no orientation" in capsys.readouterr().out
    shutil.rmtree(data / "nnUNet_raw")
    path.write_bytes(whole.replace(b"TransformMatrix = 1 0 0 0 1", b"TransformMatrix = 1 0.2 0 0 1"))
    assert "a0.mha: its axes are not at right angles" in refused(data)


def test_warnings_are_printed_where_an_error_stops(data, capsys):
    for name in ("a1", "a2"):
        (data / "si" / f"{name}.nii.gz").unlink()
        (data / "sl" / f"{name}.nrrd").unlink()
    (data / "ti" / "a1.mha").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        main(arguments(data))
    printed = capsys.readouterr().err
    assert "WARNING: only one labelled case (CT_a0)" in printed
    assert printed.index("WARNING: ") < printed.index("ERROR: ")


def test_same_domain_names(data):
    out = convert(data, source="MR", target="mr")
    assert names(out / "imagesTr")[0] == "source_a0_0000" and names(out / "imagesTu")[0] == "target_a0_0000"


def test_target_folds_for_own_data(data):
    for i in range(3):
        save(data / "tl" / f"a{i}.nii.gz", array=organs(1, 5))
    out = convert(data, target_labels=str(data / "tl"), target_folds="3", folds="2")
    assert names(out / "labelsTs") == ["MR_a0", "MR_a1", "MR_a2"] and not (out / "imagesTs").exists()
    splits = json.loads((out / "splits_target.json").read_text())
    assert sorted(i for s in splits for i in s["val"]) == names(out / "labelsTs") and len(splits) == 3
    assert len(json.loads((out / "splits_final.json").read_text())) == 2


def test_the_upper_bound_learns_from_target_labels_alone(data, refused):
    assert "expected -target_labels to train on" in refused(data, "--upper_bound")
    for i in range(3):
        save(data / "tl" / f"a{i}.nii.gz", array=organs(1, 5))
    test = {"target_test_images": str(data / "xi"), "target_test_labels": str(data / "xl")}
    out = convert(data, "--upper_bound", target_labels=str(data / "tl"), **test)
    assert out.name == "Dataset510_MR_upper_bound"
    assert names(out / "labelsTr") == ["MR_a0", "MR_a1", "MR_a2"] and names(out / "labelsTs") == ["MR_b_1"]
    assert not (out / "imagesTu").exists() and "uda" not in json.loads((out / "dataset.json").read_text())
    splits = json.loads((out / "splits_final.json").read_text())
    assert sorted(i for s in splits for i in s["val"]) == names(out / "labelsTr")


def test_a_few_target_scans_are_labelled_for_training(data, refused, capsys):
    for i in range(3):
        save(data / "tl" / f"a{i}.nii.gz", array=organs(1, 5))
    save(data / "fl" / "a1.nii.gz", array=organs(5, 1))
    assert "without -target_labels" in refused(data, few="1")
    both = refused(data, few="1", target_few_labels=str(data / "fl"), target_labels=str(data / "tl"))
    assert "expected one" in both
    asked = {"target_labels": str(data / "tl"), "target_folds": "3"}
    assert "MR_a9 is no MR training scan" in refused(data, few="MR_a9", **asked)
    assert "3 of the 3 MR training scans have a label" in refused(data, few="4", **asked)
    all_tests = refused(data, few="1", **asked)
    assert "all test scans of the target's fold" in all_tests
    save(data / "fl" / "a7.nii.gz", array=organs(5, 1))
    assert "no image belongs to this label" in refused(data, target_few_labels=str(data / "fl"))
    (data / "fl" / "a7.nii.gz").unlink()

    out = convert(data, target_labels=str(data / "tl"), target_few_labels=str(data / "fl"))
    assert names(out / "imagesTu") == ["MR_a0_0000", "MR_a1_0000", "MR_a2_0000"]
    assert names(out / "labelsTu") == ["MR_a1"] and names(out / "labelsTs") == ["MR_a0", "MR_a2"]
    assert (load(out / "labelsTu/MR_a1.nii.gz") == (organs(5, 1) == 5) + 2 * (organs(5, 1) == 1)).all()
    content = json.loads((out / "dataset.json").read_text())
    assert content["uda"]["labelled_target"] == ["MR_a1"] and content["numTraining"] == 3
    assert "trained on with their labels: MR_a1" in capsys.readouterr().out


def test_a_smaller_number_of_labelled_scans_is_among_a_greater_one(data):
    for i in range(3):
        save(data / "tl" / f"a{i}.nii.gz", array=organs(1, 5))
    chosen = []
    for number in ("1", "2", "3"):
        out = convert(data, "--overwrite", target_labels=str(data / "tl"), few=number)
        chosen.append(set(names(out / "labelsTu")))
        left = set(names(out / "labelsTs")) if (out / "labelsTs").exists() else set()
        assert not chosen[-1] & left and len(chosen[-1] | left) == 3
    assert chosen[0] < chosen[1] < chosen[2]
    bound = convert(data, "--upper_bound", "--overwrite", target_labels=str(data / "tl"), few="1", name="CT2MR")
    assert names(bound / "labelsTr") == ["MR_a0", "MR_a1", "MR_a2"] and not (bound / "labelsTu").exists()


def test_channel_called_ct(data, capsys):
    convert(data, channel="CT")
    assert "nnU-Net will clip and normalise every image" in capsys.readouterr().out


def test_inputs_that_are_refused(data, refused):
    empty = data / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("x")
    assert "(-target_images) holds no image (found: notes.txt)" in refused(data, target_images=str(empty))
    assert "no such folder or file" in refused(data, target_images=str(data / "nowhere"))
    assert "4 folds were asked for, with 3 cases" in refused(data, folds="4")
    assert "without -target_test_images" in refused(data, target_test_labels=str(data / "xl"))
    assert "without -target_labels" in refused(data, target_folds="2")
    assert "-channel a b: 2 name(s)" in refused(data, channel=["a", "b"])
    assert "the same file is used" in refused(data, target_images=str(data / "si"))
    assert "is already that of" in refused(data, target_test_images=str(data / "ti"))
    save(data / "dup" / "a-b.nii.gz", 1)
    save(data / "dup" / "a-b.nrrd", 2)
    assert "a-b.nrrd: its case id a-b is already that of" in refused(data, target_images=str(data / "dup"))
    save(data / "dup2" / "a b.nii.gz", 1)
    save(data / "dup2" / "a_b.nii.gz", 2)
    assert "case id MR_a_b is already that of" in refused(data, target_images=str(data / "dup2"))
    (data / "sl" / "a1.nrrd").rename(data / "sl" / "c1.nrrd")
    assert "c1.nrrd: no image belongs to this label" in refused(data)
    (data / "sl" / "c1.nrrd").unlink()
    assert "a1.nii.gz: there is no label for this CT case" in refused(data)


def test_bad_voxels_are_refused(data, refused):
    target = data / "ti" / "a0.mha"
    bad = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    bad[0, 0, 0] = np.nan
    save(target, array=bad)
    assert "a0.mha: 1 of 480 voxels are NaN" in refused(data)
    save(target, array=np.zeros(SHAPE, np.int16))
    assert "a0.mha: every voxel is 0" in refused(data)
    volume = sitk.GetImageFromArray(np.zeros(SHAPE, np.int16))
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(target))
    assert "a0.mha: the image has 4 dimensions" in refused(data)


def test_real_ct_to_mr(tmp_path, monkeypatch, capsys):
    if not os.environ.get("NNUNET_UDA_TEST_DATA"):
        pytest.skip("NNUNET_UDA_TEST_DATA is not set: no real scans to convert")
    real = Path(os.environ["NNUNET_UDA_TEST_DATA"]) / "totalseg"
    if not real.is_dir():
        pytest.skip(f"{real} is absent")
    use_folders(monkeypatch, tmp_path)
    main(
        [
            "folders", "-d", "510", "-source", "CT", "-target", "MR", "-np", "1", "--ignore_other_labels",
            "-source_images", str(real / "example_ct_sm.nii.gz"), "-source_labels", str(real / "example_seg.nii.gz"),
            "-target_images", str(real / "example_mr_sm.nii.gz"), "-target_labels", str(real / "example_seg_mr.nii.gz"),
            "-labels", "liver=5", "spleen=1",
        ]
    )  # fmt: skip
    out = tmp_path / "nnUNet_raw" / "Dataset510_CT2MR"
    before, after = load(real / "example_seg.nii.gz"), load(out / "labelsTr" / "CT_example_ct_sm.nii.gz")
    assert ((before == 5) == (after == 1)).all() and ((before == 1) == (after == 2)).all()
    before, after = load(real / "example_mr_sm.nii.gz"), load(out / "imagesTu/MR_example_mr_sm_0000.nii.gz")
    assert after.dtype == before.dtype and (before == after).mean() > 0.98  # the rest is clipped
    assert "RAS (1)" in capsys.readouterr().out
