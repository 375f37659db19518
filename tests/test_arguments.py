"""Every argument of every command is looked at before work begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import TRAINERS, call
from support.plans import plans

import nnunet_uda.experiments.compare
import nnunet_uda.experiments.sweep
import nnunet_uda.plans
from nnunet_uda.commands import (
    adapt,
    compare,
    configure,
    convert,
    demo,
    evaluate,
    evaluate_unsupervised,
    export,
    preprocess,
    pseudo_labels,
    quality,
    sweep,
    train,
)
from nnunet_uda.data import pseudo_dataset
from nnunet_uda.demo.road import Demo
from nnunet_uda.evaluation import unsupervised
from nnunet_uda.evaluation.scoring import Evaluation
from nnunet_uda.training import fold

JSON = {"channel_names": {"0": "x"}, "labels": {"background": 0, "a": 1}, "numTraining": 1, "file_ending": ".nii.gz",
        "uda": {"source_domain": "A", "target_domain": "B"}}  # fmt: skip
GRIDS = (nnunet_uda.experiments.sweep, nnunet_uda.experiments.compare)
COMMANDS = [entry for entry in entry_points(group="console_scripts") if entry.name.startswith("nnUNetUDA_")]


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A dataset with plans, a reference and predictions; nothing may be scored, read, planned, trained or written."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
        dataset = tmp_path / name / "Dataset501_Blobs"
        dataset.mkdir(parents=True)
        (dataset / "dataset.json").write_text(json.dumps(JSON))
        (dataset / "P.json").write_text(json.dumps(plans()))
        (dataset / "P_2d").mkdir()
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS))
    raw = tmp_path / "nnUNet_raw" / "Dataset501_Blobs"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "made.md").write_text("the user's own")
    for path in (raw / "imagesTu/b_0000.nii.gz", raw / "imagesTs/c_0000.nii.gz", raw / "labelsTs/c.nii.gz",
                 tmp_path / "one/c.nii.gz", tmp_path / "two/c.nii.gz", tmp_path / "taken/file.txt"):  # fmt: skip
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".gz":
            sitk.WriteImage(sitk.GetImageFromArray(np.ones((2, 3, 4), np.uint8)), str(path))
        else:
            path.touch()

    def no_work(*_: object, **__: object) -> None:
        pytest.fail("work has begun")

    for module, name in (
        (Evaluation, "score"), (evaluate, "read_references"), (unsupervised, "preprocessed"),
        (preprocess, "preprocess_target"), (nnunet_uda.plans, "replan_plane"), (nnunet_uda.plans, "write_json"),
        (Demo, "run"),
        *((module, name) for module in GRIDS for name in ("run_jobs", "lay_out_images")),
        (pseudo_dataset, "_source_volumes"), (fold, "load_pretrained"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, no_work)
    for converter in convert.CONVERTERS.values():
        monkeypatch.setattr(converter, "convert", no_work)
    return tmp_path


TWO = ["-d", "501", "-pred", "one=one", "two=two", "--no_overlays", "-o", "out"]
FOLDERS = ["folders", "-source", "A", "-target", "B", "-source_images", "s", "-source_labels", "l", "-target_images",
           "t", "-labels", "a=1"]  # fmt: skip
MMWHS = ["mmwhs", "-i", "tree", "-source", "mr", "-target", "ct"]
SWEEP = ["-d", "501", "-p", "P", "-tr", "CISFATrainer", "-vary", "mirror", "true", "-o", "out"]
COMPARE = ["-d", "501", "-p", "P", "-tr", "CISFATrainer", "-o", "out"]
EXPERIMENTS = ((sweep.main, SWEEP), (compare.main, COMPARE))
EXPORT = ["-f", "0", "-device", "cpu"]
MODELS = ((export.main, ["-m", "taken", "-o", "a.zip"]), (quality.main, ["-m", "taken", "-i", "one", "-o", "out"]),
          (adapt.main, ["-m", "taken", "-i", "one", "-o", "out", "-device", "cpu"]),
          (evaluate_unsupervised.main, ["-d", "501", "-tr", "T", "-o", "out", "-device", "cpu"]))  # fmt: skip
PSEUDO = ["-d", "501", "-i", "one", "-o", "Dataset502_X"]
CASES: list[tuple[Callable[..., None], list[str], str]] = [
    (evaluate.main, [*TWO, "-lower", "one"], "needs two bounds"),
    (evaluate.main, [*TWO, "-upper", "two"], "needs two bounds"),
    (evaluate.main, [*TWO, "-lower", "one", "-upper", "one"], "needs two bounds"),
    (evaluate.main, [*TWO, "-lower", "one", "-upper", "three"], "-upper three is not among the runs"),
    (evaluate.main, [*TWO, "-np", "0"], "at least 1"),
    (evaluate.main, [*TWO, "-slices", "0"], "at least 1"),
    (evaluate.main, [*TWO[:-1], "taken"], "holds no former evaluation"),
    (evaluate.main, [*TWO, "-splits", "x.json"], "-splits is of use with -f only"),
    (evaluate.main, ["--unsupervised", "-d", "501", "-tr", "T", "-o", "taken"], "holds no former evaluation"),
    (evaluate.main, ["--unsupervised", "-d", "501", "-tr", "T", "-o", "out", "-device", "tpu"], "-device tpu"),
    (preprocess.main, ["-d", "501", "-p", "P", "-np", "0"], "-np must be at least 1"),
    (preprocess.main, ["-d", "501", "-p", "P", "-c", "2d", "3d_lowres"], "no configuration '3d_lowres'"),
    (preprocess.main, ["-d", "501", "Dataset777_Absent", "-p", "P"], "Dataset777_Absent/P.json does not exist"),
    *((configure.main, ["-d", "501", "-p", "Q", "-from", "P", "-plane", "coronal", *words], text) for words, text in (
        (["-stages", "0"], "-stages must be at least 1"),
        (["-base_features", "-4"], "-base_features must be at least 1"),
        (["-max_features", "0"], "-max_features must be at least 1"),
        (["-batch_size", "0"], "-batch_size must be at least 1"),
        (["-patch_size", "32", "0"], "-patch_size must be at least 1"),
        (["-slice_size", "0", "9"], "-slice_size must be at least 1"),
        (["-patch_size", "32"], "has 2 numbers"),
        (["-c", "3d_lowres"], "no configuration '3d_lowres'"),
        (["-set", "num_epochs"], "-set takes NAME=VALUE"),
        (["-set", "num_epochs=0"], "'num_epochs' must be at least 1"),
        (["-set", "cisfa.nothing=0"], "unknown setting 'nothing'"),
        (["-set", "num_epoch=4"], "unknown setting 'num_epoch'. Did you mean num_epochs? Existing"),
        (["-set", "cats.confidence=4"], "unknown method 'cats'. Did you mean cast"),
    )),
    (configure.main, ["-d", "501", "-p", "Q__2d", "-from", "P"], "'__'"),
    *((main, [*words, *more], text) for main, words in EXPERIMENTS for more, text in (
        (["-np", "0"], "-np must be at least 1"), (["-jobs", "0"], "-jobs must be at least 1"),
        (["-device", "tpu"], "-device takes cpu, cuda or mps"), (["-time", "0"], "-time must be at least 1"),
        (["-gpus", "-1"], "-gpus must be at least 0"), (["-mem", "0"], "-mem must be at least 1"),
        (["-cpus", "0"], "-cpus must be at least 1"), (["-slurm", "account"], "-slurm takes KEY=VALUE"),
        (["-f", "x"], "-f takes a fold's number"), (["-o", "taken"], "is not empty"),
        (["-seeds", "1", "2", "1"], "-seeds: a value is given twice"),
        (["-c", "3d_lowres"], "no configuration '3d_lowres'"), (["-p", "absent"], "absent.json does not exist"),
        (["-tr", "AbsentTrainer"], "-tr AbsentTrainer: no trainer of that name"),
        (["-tr", "nnUNetTrainer_1epoch"], "does not read the settings"),
        (["-o", "M\udcfcller"], "its path holds bytes that are no UTF-8"),
    )),
    (compare.main, [*COMPARE, "-f", "0", "0"], "-f: a value is given twice"),
    *((sweep.main, [*SWEEP, *more], text) for more, text in (
        (["-vary", "confidence", "0.5"], "unknown setting 'confidence'"),
        (["-vary", "num_epochs", "2.5"], "'num_epochs' must be an integer, found 2.5"),
        (["-vary", "foreground_oversampling", "0.1", "2"], "between 0 and 1"),
        (["-vary", "segmenter_learning_rate", "1", "1.0"], "segmenter_learning_rate 1.0: this value is given twice"),
        (["-vary", "save_every"], "-vary save_every has no value"),
        (["-vary", "mirror", "false"], "-vary mirror is given twice"),
        (["-vary", "uuds.threshold", "1"], "CISFATrainer does not read it"),
        (["-vary", "seed", "1", "2"], "give the seeds with -seeds"),
        (["-vary", "cisfa.foreground_weight", "2", "-tr", "CISFANoWeightTrainer"], "fixes it to 1.0"),
    )),
    (compare.main, [*COMPARE, "-lower", ":501"], "-tr :"),
    (compare.main, [*COMPARE, "-lower", "EntMinTrainer", "-upper", "EntMinTrainer:501"], "are the same, EntMin"),
    *((convert.main, [*words, *more], text) for words in (FOLDERS, MMWHS) for more, text in (
        (["-d", "0"], "-d 0: expected a dataset id"), (["-d", "5", "-np", "0"], "-np 0"),
        (["-d", "5", "-name", "a b"], "-name 'a b'"), (["-d", "5", "-seed", "-1"], "-seed -1"),
        (["-d", "5", "-channel", "a\nb"], "-channel: 'a\\nb' cannot be a name"),
        (["-d", "5", "-target_intensities", "bananas"], "-target_intensities bananas: expected two numbers"),
    )),
    *((main, [*words, *more], text) for main, words in MODELS for more, text in (
        (["-f", "0", "1", "0"], "-f: 0 is given twice"), (["-chk", "../x.pth"], "-chk: '../x.pth' cannot be a name"),
    )),
    *((export.main, [*EXPORT, "-m", "taken", "-o", place], text) for place, text in (
        ("taken/made.zip", "made.md exists: choose another name"), ("taken/file.txt/a.zip", "file.txt is no folder"),
    )),
    *((evaluate.main, ["--unsupervised", "-d", "501", "-tr", "T", "-o", "out", "-device", device], "no such device")
      for device in ("cpu:x", "cpu:1", "cuda:99")),
    (pseudo_labels.main, [*PSEUDO, "-volume_factor", "nan"], "-volume_factor must be at least 1"),
    (pseudo_labels.main, [*PSEUDO, "-component_share", "nan"], "-component_share must be between"),
    (pseudo_labels.main, [*PSEUDO[:-1], "Dataset501_X"], "give a dataset id that is free"),
    (train.main, ["501", "3d_lowres", "0", "-tr", "CISFATrainer", "-p", "P", "-device", "cpu"], "no configuration"),
    (train.main, ["501", "2d", "0", "-tr", "Nope", "-p", "P", "-device", "cpu"], "-tr Nope"),
    *((train.main, ["501", "2d", "0", "-tr", name, "-p", "P", "-device", "cpu"], f"Did you mean {meant}")
      for name, meant in (("CASTrainer", "CASTTrainer"), ("cisfa", "CISFATrainer"), ("CAST", "CASTTrainer"),
                          ("RandomStylesTrainer", "RandomStyleTrainer"), ("nnUNetTrainr", "nnUNetTrainer"))),
    (train.main, ["501", "2d", "0", "-tr", "np", "-p", "P", "-device", "cpu"], "-tr np"),
    (train.main, ["501", "2d", "first", "-tr", "CISFATrainer"], "the fold is a number or 'all'"),
    (demo.main, ["-o", "taken/file.txt"], "is a file"),
    (demo.main, ["-o", "out", "-seed", "-1"], "-seed is from 0"),
]  # fmt: skip


@pytest.mark.parametrize(("main", "words", "text"), CASES, ids=[f"{w[0]} {w[-2:]}" for _, w, _ in CASES])
def test_an_argument_is_refused_before_work_begins(work, monkeypatch, refused, main, words, text):
    monkeypatch.chdir(work)
    before = sorted(work.rglob("*"))
    assert text in refused(main, words)
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize(("variable", "value"), [("nnUNet_def_n_proc", "eight"), ("nnUNet_n_proc_DA", "-1")])
def test_variables_that_are_no_numbers_are_said_before_nnunet_is_imported(variable, value):
    """Which ends in a traceback otherwise, of every command."""
    words = [sys.executable, "-c", "import nnunet_uda.commands"]
    done = subprocess.run(words, env=os.environ | {variable: value}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"ERROR: the environment variable {variable} is '{value}'; expected a number")


def test_training_names_a_broken_dataset_json(work, refused):
    """nnU-Net's own reader ends in a traceback that names no file."""
    path = work / "nnUNet_preprocessed" / "Dataset501_Blobs" / "dataset.json"
    path.write_text('{"labels": {')
    words = ["501", "2d", "0", "-tr", "SourceOnlyTrainer", "-p", "P", "-device", "cpu"]
    assert f"{path} is not valid JSON" in refused(train.main, words)


@pytest.mark.parametrize("name", sorted({entry.name for entry in COMMANDS} - {"nnUNetUDA_clip"}))
def test_every_command_reads_its_own_words_and_turns_errors_into_a_message(name):
    """As the console script calls it, without arguments."""
    [main] = [entry.load() for entry in COMMANDS if entry.name == name]
    assert hasattr(main, "__wrapped__"), "decorated with nnunet_uda.errors.command"
    done = call(name, (name, "--no_such_option"), {**os.environ})
    assert done.returncode == 2 and f"usage: {name}" in done.stderr, done.stderr
