from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import litter, make_raw_dataset

from nnunet_uda.data import convention
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation.metrics import list_cases
from nnunet_uda.evaluation.prediction import unlabelled_images


@pytest.fixture
def raw(tmp_path):
    return make_raw_dataset(tmp_path / "raw", num_source=2, num_target=3, num_test=1, size=(2, 6, 6))


def read(raw):
    return convention.read_json(raw / "dataset.json")


def test_target_cases_are_found_by_id(raw):
    assert list(convention.target_cases(raw, read(raw))) == ["ct_Tu00", "ct_Tu01", "ct_Tu02"]


def test_what_systems_leave_beside_files_is_no_case(raw):
    litter(raw)
    assert list(convention.target_cases(raw, read(raw))) == ["ct_Tu00", "ct_Tu01", "ct_Tu02"]
    assert list(convention.case_files(raw / "imagesTs", ".nii.gz")) == ["ct_Ts00"]
    assert list_cases(raw / "labelsTs", ".nii.gz") == ["ct_Ts00"]


@pytest.mark.parametrize("name", ["ct_Tu09.nii.gz", "ct_Tu09_0000.NII.GZ", "ct_Tu09_0000.mha", "ct_Tu09_00.nii.gz"])
def test_an_image_that_nothing_would_read_is_refused(raw, name):
    first = raw / "imagesTu" / "ct_Tu00_0000.nii.gz"
    (raw / "imagesTu" / name).write_bytes(first.read_bytes())
    with pytest.raises(UDAError, match=rf"imagesTu/{name}: its name is not like CASE_0000\.nii\.gz"):
        convention.target_cases(raw, convention.read_json(raw / "dataset.json"))


def test_missing_and_empty_target_folders_are_refused(raw):
    for path in (raw / "imagesTu").iterdir():
        path.unlink()
    with pytest.raises(UDAError, match="imagesTu holds no image"):
        convention.target_cases(raw, read(raw))
    (raw / "imagesTu").rmdir()
    with pytest.raises(UDAError, match="imagesTu does not exist"):
        convention.target_cases(raw, read(raw))


def test_a_target_label_in_a_training_folder_is_refused(raw):
    label = raw / "labelsTr" / "ct_Tu01.nii.gz"
    label.write_bytes((raw / "labelsTr" / "mr_Tr00.nii.gz").read_bytes())
    with pytest.raises(UDAError, match=r"labelsTr/ct_Tu01.nii.gz belongs to a target case"):
        convention.target_cases(raw, read(raw))
    label.unlink()
    (raw / "labelsTu").mkdir()
    with pytest.raises(UDAError, match="labelsTu exists"):
        convention.target_cases(raw, read(raw))


@pytest.mark.parametrize(
    ("listed", "files", "message"),
    [
        (["ct_Tu01"], ["ct_Tu01", "ct_Tu02"], r"holds ct_Tu02, but dataset.json names ct_Tu01"),
        (["ct_Tu01", "ct_Tu02"], ["ct_Tu01"], r"labelsTu/ct_Tu02.nii.gz does not exist"),
        (["ct_Ts00"], ["ct_Ts00"], r"names ct_Ts00, which is not in .*imagesTu"),
        (["ct_Tu01", "ct_Tu01"], ["ct_Tu01"], r"names ct_Tu01 twice"),
        ("ct_Tu01", ["ct_Tu01"], r"must be a list of case ids"),
        (["../ct"], [], r"must be a list of case ids"),
    ],
)
def test_only_labels_that_the_dataset_names_may_lie_beside_target_images(raw, listed, files, message):
    (raw / "labelsTu").mkdir()
    for name in files:
        (raw / "labelsTu" / f"{name}.nii.gz").write_bytes(b"")
    content = read(raw)
    content["uda"]["labelled_target"] = listed
    with pytest.raises(UDAError, match=message):
        convention.target_cases(raw, content)


def test_labels_that_the_dataset_names_are_found(raw):
    (raw / "labelsTu").mkdir()
    (raw / "labelsTu" / "ct_Tu01.nii.gz").write_bytes(b"")
    content = read(raw)
    content["uda"]["labelled_target"] = ["ct_Tu01"]
    cases = convention.target_cases(raw, content)
    found = convention.labelled_target_files(raw, content, cases)
    assert found == {"ct_Tu01": raw / "labelsTu" / "ct_Tu01.nii.gz"} and len(cases) == 3


def test_a_target_with_other_channels_is_refused(raw):
    (raw / "imagesTu" / "ct_Tu01_0001.nii.gz").write_bytes((raw / "imagesTu" / "ct_Tu01_0000.nii.gz").read_bytes())
    with pytest.raises(UDAError, match=r"ct_Tu01 has 2 channel file\(s\).*1 channel\(s\)"):
        convention.target_cases(raw, read(raw))


@pytest.mark.parametrize(
    ("put", "said"),
    [(os.mkfifo, "a pipe, a socket or a device"), (os.mkdir, "a folder"), (lambda p: os.symlink(p, p), "a link to ")],
)
def test_a_target_image_that_is_no_file_is_named_before_it_is_opened(raw, put, said):
    path = raw / "imagesTu" / "ct_Tu01_0000.nii.gz"
    path.unlink()
    put(path)
    with pytest.raises(UDAError, match=rf"ct_Tu01_0000\.nii\.gz: {said}.*; expected an image"):
        convention.target_cases(raw, read(raw))


@pytest.mark.parametrize("name", ["b.nii.gz", "b_0000.NII.GZ", "b_0000.mha", "b_1.nii.gz"])
def test_no_scan_is_left_out_in_silence_wherever_scans_are_given(tmp_path, name):
    """To nnUNetUDA_checkpoints, _quality, _export and _adapt."""
    dataset_json = {"file_ending": ".nii.gz", "channel_names": {"0": "x"}}
    (tmp_path / "a_0000.nii.gz").write_bytes(b"x")
    assert unlabelled_images(tmp_path, dataset_json) == {"a": [tmp_path / "a_0000.nii.gz"]}
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UDAError, match=rf"{name}: its name is not like CASE_0000\.nii\.gz"):
        unlabelled_images(tmp_path, dataset_json)
    with pytest.raises(UDAError, match="absent is no folder: expected files named like"):
        unlabelled_images(tmp_path / "absent", dataset_json)


def test_domains_are_read_and_a_missing_key_explained(raw):
    assert convention.read_domains(read(raw)) == convention.Domains("MR", "CT")
    with pytest.raises(UDAError, match="nnUNetUDA_convert"):
        convention.read_domains({"labels": {}})
    with pytest.raises(UDAError, match="target_domain"):
        convention.read_domains({"uda": {"source_domain": "MR"}})


@pytest.mark.parametrize(
    ("channel", "domains", "warned"),
    [("CT", ("MR", "CT"), True), ("CT", ("CT", "CT"), False), ("intensity", ("MR", "CT"), False)],
)
def test_a_channel_called_ct_with_another_domain_is_warned_about(channel, domains, warned):
    text = convention.normalisation_warning({"channel_names": {"0": channel}}, convention.Domains(*domains))
    assert (text is not None) == warned
    if warned:
        assert "source's statistics" in text and "Rename" in text


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({}, "list of folds"),
        ([], "list of folds"),
        ([{"train": ["a"]}], "two lists"),
        ([{"train": "a", "val": []}], "two lists"),
        ([{"train": ["a"], "val": ["zz"]}], "zz"),
        ([{"train": ["a"], "val": ["a"]}], "both"),
        ([{"train": [], "val": ["a"]}], "no training case"),
    ],
)
def test_broken_splits_are_refused(splits, words):
    with pytest.raises(UDAError, match=words):
        convention.check_splits(splits, {"a", "b"}, "splits_target.json")


def test_a_fold_outside_the_splits_is_refused():
    splits = convention.check_splits([{"train": ["a"], "val": ["b"]}], {"a", "b"}, "s")
    assert convention.fold_of(splits, 0, "s")["val"] == ["b"]
    for fold in (1, -1):
        with pytest.raises(UDAError, match=r"holds 1 fold\(s\), 0 to 0"):
            convention.fold_of(splits, fold, "s")


def test_an_unset_variable_is_named_with_the_line_to_add(monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(UDAError, match="export nnUNet_raw="):
        convention.environment_folder("nnUNet_raw")


@pytest.mark.parametrize(
    ("value", "words"),
    [("", "is not set"), ("  ", "is not set"), ("~/raw", "take .HOME"), ("/data/raw\n", "line breaks")],
)
def test_a_variable_that_is_no_folder_anybody_meant_is_refused(monkeypatch, value, words):
    """Else a folder called ~ is made, or the present one filled."""
    monkeypatch.setenv("nnUNet_raw", value)
    with pytest.raises(UDAError, match=f"nnUNet_raw {words}|nnUNet_raw is .*{words}"):
        convention.environment_folder("nnUNet_raw")


def test_dataset_names(monkeypatch, raw):
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    assert convention.dataset_name("501") == convention.dataset_name("Dataset501_Blobs") == "Dataset501_Blobs"
    with pytest.raises(UDAError, match="777"):
        convention.dataset_name("777")
    with pytest.raises(UDAError, match="Blobs"):
        convention.dataset_name("Blobs")


def test_json_errors_name_the_file(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UDAError, match=r"x\.json is not valid JSON"):
        convention.read_json(tmp_path / "x.json")
    with pytest.raises(UDAError, match=r"y\.json does not exist"):
        convention.read_json(tmp_path / "y.json")


def test_json_is_utf8_whatever_the_locale(tmp_path):
    """With an ASCII locale Python would read it as ASCII."""
    (tmp_path / "labels.json").write_text('{"Rückenmark": 1}', encoding="utf-8")
    code = "import sys; from pathlib import Path; from nnunet_uda.data.convention import read_json; " \
           "print(ascii(read_json(Path(sys.argv[1]))))"  # fmt: skip
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", code, str(tmp_path / "labels.json")]
    done = subprocess.run(words, env=environment, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == ascii({"Rückenmark": 1})
