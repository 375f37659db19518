"""The benchmark of a few labelled target scans: its tasks, and the curves of finished runs."""

from __future__ import annotations

import importlib
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from conftest import REPOSITORY, write_volume

from nnunet_uda.experiments.compare import LOWER


@pytest.fixture
def few_labels(monkeypatch):
    """The script with its tasks registered, as it registers them when it is run."""
    monkeypatch.syspath_prepend(REPOSITORY)
    for name in ("few_labels", "table", "tasks"):
        monkeypatch.delitem(sys.modules, f"benchmarks.accuracy.{name}", raising=False)
    few_labels = importlib.import_module("benchmarks.accuracy.few_labels")

    few_labels.TASKS.update(few_labels.FEW_TASKS)
    return few_labels


def labelled(command: list[str]) -> set[str]:
    start = command.index("-target_few_labels") + 1
    return {word for word in command[start:] if word.endswith(".nii.gz") and "target_labels" in word}


def test_a_smaller_number_of_labels_is_among_a_greater_and_no_bound_is_made_again(few_labels, tmp_path):
    for folder, number in (("source", 2), ("target", 9), ("test", 2)):
        for kind in ("images", "labels"):
            for index in range(number):
                path = tmp_path / "cardiac_cine_to_lge" / f"{folder}_{kind}" / f"{folder}{index}.nii.gz"
                write_volume(path, np.zeros((2, 4, 4), np.uint8))
    tasks = importlib.import_module("benchmarks.accuracy.tasks")

    chosen = []
    for number in few_labels.NUMBERS:
        (command,) = tasks.conversions(few_labels.NAMES[number], tmp_path / "out", tmp_path)
        chosen.append(labelled(command))
        assert len(chosen[-1]) == number and "--upper_bound" not in command
    assert all(less < more for less, more in pairwise(chosen))
    ids = [task.dataset for task in tasks.TASKS.values()] + [i for task in tasks.TASKS.values() for i in task.bounds]
    assert len(ids) == len(set(ids))


def test_bounds_are_those_of_the_task_without_labels_and_steps_are_timed_apart(few_labels):
    args = type("Arguments", (), {"seeds": [0], "equal": ["time"], "budget": 100})()
    table = importlib.import_module("benchmarks.accuracy.table")
    lines = [table.Line(LOWER, "SourceOnlyTrainer"), table.Line("CASTTrainer", "CASTTrainer")]
    runs = table.planned(["heart", "heart_few2"], lines, args)
    assert [(run.task, run.line.label) for run in runs] == [
        ("heart", LOWER), ("heart", "CASTTrainer"), ("heart_few2", "CASTTrainer"),
    ]  # fmt: skip
    assert table.kind_of_step(runs[1]) != table.kind_of_step(runs[2])


def record(task: str, label: str, dice: float) -> dict:
    metrics = {"a": {"cavity": {"Dice": dice, "ASSD": 1.0, "HD95": 1.0}}}
    return {
        "task": task, "label": label, "trainer": label, "seed": 0, "equal": "time", "budget": 100, "settings": {},
        "steps": 100, "step_ratio": 1.0, "trainings": 1, "transductive": False, "minutes": 1.0,
        "training_seconds": 60.0,
        "peak_memory_gib": 1.0, "peak_device_memory_gib": 0.0, "code": ["x"], "revision": ["x"], "machine": ["x"],
        "validation_pseudo_dice": 0.5, "criteria": {}, "metrics": metrics,
    }  # fmt: skip


def test_curves_have_a_column_for_each_number_and_gaps_where_nothing_is_finished(few_labels, tmp_path):
    records = [record("heart", "CASTTrainer", 0.5), record("heart_few2", "CASTTrainer", 0.7),
               record("heart_few2", "LabelledTargetTrainer", 0.6), record("brain", "CASTTrainer", 0.1)]  # fmt: skip
    whole = few_labels.curves(records)
    assert list(whole.columns) == [0, 1, 2, 4, 8] and list(whole.index) == ["CASTTrainer", "LabelledTargetTrainer"]
    assert whole.loc["CASTTrainer", 0] == 0.5 and whole.loc["CASTTrainer", 2] == 0.7
    assert math.isnan(whole.loc["LabelledTargetTrainer", 0]) and whole.loc["LabelledTargetTrainer", 2] == 0.6
    few_labels.draw(whole, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
