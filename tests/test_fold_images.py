from __future__ import annotations

import json

import pytest
from conftest import litter, make_raw_dataset

from nnunet_uda.commands import fold_images


@pytest.fixture
def raw(tmp_path, monkeypatch):
    folder = make_raw_dataset(tmp_path / "raw", num_source=2, num_target=3, num_test=0, size=(2, 6, 6))
    splits = [{"train": ["ct_Tu00", "ct_Tu01"], "val": ["ct_Tu02"]}, {"train": ["ct_Tu02"], "val": []}]
    (folder / "splits_target.json").write_text(json.dumps(splits))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    return folder


def test_exactly_the_folds_test_images_are_laid_out(raw, tmp_path):
    litter(raw)
    fold_images.main(["-d", "501", "-f", "0", "-o", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ct_Tu02_0000.nii.gz"]
    original = raw / "imagesTu" / "ct_Tu02_0000.nii.gz"
    assert (tmp_path / "out" / "ct_Tu02_0000.nii.gz").read_bytes() == original.read_bytes()


@pytest.mark.parametrize(("fold", "words"), [("1", "empty 'val'"), ("2", "fold 2 does not exist")])
def test_folds_without_test_images_are_refused(raw, tmp_path, refused, fold, words):
    assert words in refused(fold_images.main, ["-d", "501", "-f", fold, "-o", tmp_path / "out"])


def test_a_full_folder_and_a_dataset_without_folds_are_refused(raw, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "is not empty" in refused(fold_images.main, ["-d", "501", "-f", "0", "-o", tmp_path / "out"])
    (raw / "splits_target.json").unlink()
    words = ["-d", "501", "-f", "0", "-o", tmp_path / "new"]
    assert "no folds of target images" in refused(fold_images.main, words)
