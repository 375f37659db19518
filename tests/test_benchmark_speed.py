"""The benchmarks of steps at tiny sizes: what they compare."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import REPOSITORY

pytestmark = pytest.mark.slow

CUT = {"generator_width": 4, "generator_blocks": 2, "discriminator_width": 4, "patches": 16}


@pytest.fixture(scope="module")
def with_target(planned):
    planned.run("nnUNetUDA_preprocess", "-d", "501", "-np", "1")


@pytest.fixture
def benchmarks(with_target, in_workspace, monkeypatch):
    """The repository as the first place of imports, and the preprocessed dataset."""
    monkeypatch.syspath_prepend(REPOSITORY)
    return in_workspace.preprocessed / "Dataset501_Blobs"


@pytest.fixture
def plans(benchmarks):
    return json.loads((benchmarks / "tiny.json").read_text())


def test_the_last_epoch_is_the_whole_method(benchmarks, plans, monkeypatch):
    from benchmarks.speed import step_time

    plans["uda"] |= {"cut": CUT}
    trainers = [step_time.make_trainer("CUTTrainer", benchmarks.name, plans, "2d", torch.device("cpu"), last)
                for last in (False, True)]  # fmt: skip
    assert [trainer.generator_learns for trainer in trainers] == [True, False]


def test_steps_are_timed_in_turn_and_weighed(benchmarks, tmp_path, capsys):
    from benchmarks.speed import step_time

    out = tmp_path / "figures.json"
    trainers = ["SourceOnlyTrainer", "CISFATrainer"]
    step_time.main(["-d", "501", "-p", "tiny", "-tr", *trainers, "-steps", "2", "-threads", "1", "-o", str(out)])
    runs, shown = json.loads(out.read_text())["runs"], capsys.readouterr().out
    assert [run["trainer"] for run in runs] == trainers
    assert all(len(run["seconds"]) == 2 and f"| {run['peak_bytes'] / 2**20:.0f} |" in shown for run in runs)
    assert 0 < runs[0]["peak_bytes"] < runs[1]["peak_bytes"]
    assert "nnUNet_results" in os.environ, "as before"


def test_a_step_is_set_against_a_plain_network_s_over_the_whole_schedule(benchmarks, plans, monkeypatch):
    from benchmarks.speed import calibrate, step_time

    plans["uda"] |= {"num_epochs": 20, "cut": CUT}
    epochs, make = [], step_time.make_trainer

    def watched(*arguments, **more):
        trainer = make(*arguments, **more)
        start = trainer.on_train_epoch_start
        trainer.on_train_epoch_start = lambda: (epochs.append((type(trainer).__name__, trainer.current_epoch)), start())
        return trainer

    monkeypatch.setattr(step_time, "make_trainer", watched)
    run = {"trainer": "CUTTrainer", "dataset": benchmarks.name, "plans": plans, "configuration": "2d", "fold": "0",
           "device": "cpu"}  # fmt: skip
    plain, own = calibrate.step_seconds(run)
    assert 0 < plain < own
    assert epochs == [(name, epoch) for epoch in (2, 7, 12, 17) for name in ("SourceOnlyTrainer", "CUTTrainer")]
