"""Folders that may not be written or read, for every command: one message, and nothing half written."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import make_raw_dataset, make_trainer
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_uda.commands import (
    compare,
    configure,
    convert,
    evaluate,
    fold_images,
    intensities,
    preprocess,
    pseudo_labels,
    sweep,
    train,
)

CAPABILITIES = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: by these root passes over permissions."""


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Permissions count for this process, though it be root's."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root passes over permissions here")
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    effective, *rest = struct.unpack("6I", data.raw)
    assert libc.capset(header, struct.pack("6I", effective & ~CAPABILITIES, *rest)) == 0
    try:
        yield
    finally:
        assert libc.capset(header, data.raw) == 0


@contextmanager
def mode(folder: Path, bits: int) -> Iterator[None]:
    before = folder.stat().st_mode
    folder.chmod(bits)
    try:
        yield
    finally:
        folder.chmod(before)


def tree(root: Path) -> dict[str, int]:
    """Every file below ``root`` and its size; locks, which are empty, may be left."""
    return {str(path): path.stat().st_size for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


def refused(capsys, root: Path, place: Path, bits: int, main, words: list[str]) -> str:
    """The one message of a command that must fail on ``place`` and leave everything as it was."""
    before = tree(root)
    with ordinary_user(), mode(place, bits), pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("ERROR: ") == 1, said
    assert tree(root) == before
    return said[said.index("ERROR: ") :]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """nnU-Net's folders with a raw dataset that has folds, predictions of its target, and a folder for output."""
    dataset = make_raw_dataset(tmp_path / "raw", num_source=2, num_target=2, num_test=2, size=(4, 12, 12))
    (dataset / "splits_target.json").write_text('[{"train": ["ct_Tu00"], "val": ["ct_Tu01"]}]')
    for folder in ("preprocessed", "results", "out", "predictions"):
        (tmp_path / folder).mkdir()
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    for index in range(2):
        shutil.copy(dataset / "labelsTr" / "mr_Tr00.nii.gz", tmp_path / "predictions" / f"ct_Tu0{index}.nii.gz")
    return tmp_path


def light_commands(root: Path) -> dict[str, tuple]:
    """Commands that need no plans: ``(main, arguments)``."""
    raw = root / "raw" / "Dataset501_Blobs"
    out = str(root / "out" / "new")
    return {
        "convert": (convert.main, [
            "folders", "-d", "777", "-name", "New", "-source", "MR", "-target", "CT", "-np", "1", "-labels", "left=1",
            "right=2", "-source_images", str(raw / "imagesTr"), "-source_labels", str(raw / "labelsTr"),
            "-target_images", str(raw / "imagesTu"),
        ]),
        "fold_images": (fold_images.main, ["-d", "501", "-f", "0", "-o", out]),
        "clip": (intensities.main, ["-percentiles", "5", "95", "-i", str(raw / "imagesTs"), "-o", out]),
        "pseudo_labels": (pseudo_labels.main, ["-d", "501", "-i", str(root / "predictions"), "-o", "Dataset601_S"]),
        "evaluate": (evaluate.main, ["-d", "501", "-p", str(raw / "labelsTs"), "-o", out, "-np", "1",
                                     "--no_overlays"]),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "place", "bits"),
    [
        ("convert", "raw", 0o555),
        ("convert", "raw", 0o000),
        ("convert", "raw/Dataset501_Blobs/imagesTu", 0o000),
        ("convert", "preprocessed", 0o000),
        ("fold_images", "raw", 0o000),
        ("fold_images", "out", 0o555),
        ("fold_images", "out", 0o000),
        ("clip", "out", 0o555),
        ("clip", "out", 0o000),
        ("clip", "raw/Dataset501_Blobs/imagesTs", 0o000),
        ("pseudo_labels", "raw", 0o555),
        ("pseudo_labels", "raw", 0o000),
        ("pseudo_labels", "predictions", 0o000),
        ("evaluate", "raw", 0o000),
        ("evaluate", "raw/Dataset501_Blobs/labelsTs", 0o000),
        ("evaluate", "out", 0o555),
        ("evaluate", "out", 0o000),
    ],
)
def test_a_folder_without_permission_is_one_message(files, capsys, name, place, bits):
    main, words = light_commands(files)[name]
    said = refused(capsys, files, files / place, bits, main, words)
    assert "ermission" in said and str(files) in said, said


@pytest.mark.parametrize("name", ["fold_images", "clip", "evaluate"])
def test_what_is_only_read_may_be_read_only(files, name):
    main, words = light_commands(files)[name]
    with ordinary_user(), mode(files / "raw", 0o555), mode(files / "raw" / "Dataset501_Blobs", 0o555):
        main(words)
    assert list((files / "out" / "new").iterdir())


def test_names_that_are_too_long_are_one_message(files, capsys):
    for name in ("fold_images", "evaluate"):
        main, words = light_commands(files)[name]
        words[words.index("-o") + 1] = str(files / "out" / ("x" * 300))
        with pytest.raises(SystemExit):
            main(words)
        assert "File name too long" in capsys.readouterr().err


# -- with plans --------------------------------------------------------------------------------------------------------


def planned_commands(root: Path) -> dict[str, tuple]:
    out = str(root / "out" / "new")
    runs = ["-d", "501", "-p", "tiny", "-o", out, "-device", "cpu", "-np", "1"]
    return {
        "configure": (configure.main, ["-d", "501", "-p", "new", "-set", "num_epochs=3"]),
        "preprocess": (preprocess.main, ["-d", "501", "-np", "1"]),
        "train": (train.main, ["501", "2d", "0", "-tr", "CISFATrainer", "-p", "tiny", "-device", "cpu"]),
        "compare": (compare.main, [*runs, "-tr", "SourceOnlyTrainer"]),
        "sweep": (sweep.main, [*runs, "-tr", "SourceOnlyTrainer", "-vary", "num_epochs", "1"]),
    }


@pytest.fixture
def plans(in_workspace, tmp_path, monkeypatch) -> Path:
    """A copy of the planned dataset, with an untouched folder for results and one for output."""
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(in_workspace, name), tmp_path / name)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    for name in ("results", "out"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_with_plans_a_folder_without_permission_is_one_message(plans, capsys):
    dataset = "preprocessed/Dataset501_Blobs"
    shutil.rmtree(plans / dataset / "nnUNetPlans_2d_target", ignore_errors=True)
    for name, place, bits in [
        ("configure", dataset, 0o555),
        ("configure", "preprocessed", 0o000),
        ("preprocess", dataset, 0o555),
        ("preprocess", "preprocessed", 0o000),
        ("preprocess", "raw/Dataset501_Blobs", 0o000),
        ("train", "results", 0o555),
        ("train", "results", 0o000),
        ("train", "preprocessed", 0o000),
        ("compare", "out", 0o555),
        ("compare", dataset, 0o000),
        ("sweep", "out", 0o555),
        ("sweep", dataset, 0o555),
    ]:
        main, words = planned_commands(plans)[name]
        said = refused(capsys, plans, plans / place, bits, main, words)
        assert "ermission" in said and str(plans) in said, (name, place, said)
        shutil.rmtree(plans / "out" / "new", ignore_errors=True)


def test_training_from_read_only_folders(plans):
    preprocess.main(["-d", "501", "-p", "tiny", "-np", "1"])
    trainer = make_trainer("SourceOnlyTrainer")
    trainer.dataset_class = infer_dataset_class(trainer.preprocessed_dataset_folder)
    trainer.do_split()  # writes splits_final.json
    folders = [path for name in ("raw", "preprocessed") for path in (plans / name).rglob("*") if path.is_dir()]
    with ordinary_user(), ExitStack() as stack:
        for path in folders:
            stack.enter_context(mode(path, 0o555))
        trainer = make_trainer("CISFATrainer", num_epochs=1)
        trainer.run_training()
    assert Path(trainer.output_folder, "checkpoint_final.pth").exists()
