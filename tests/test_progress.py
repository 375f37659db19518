"""What a training and a series of runs say of the time that they take."""

from __future__ import annotations

from datetime import datetime

import pytest

from nnunet_uda.durations import duration_text, moment_text
from nnunet_uda.experiments.engines import Pace
from nnunet_uda.training.log import in_columns, settings_table
from nnunet_uda.training.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def progress(epochs: int, steps: int, device: str = "cpu"):
    clock, said = Clock(), []
    return Progress(epochs, steps, device, "REMEDY", said.append, clock), clock, said


def train(one: Progress, clock: Clock, epochs, steps: int, seconds: float, between: float = 0.0) -> None:
    for epoch in epochs:
        one.epoch_begins(epoch, 0)
        for _ in range(steps):
            clock.now += seconds
            one.step_done()
        clock.now += between


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (0.996, "1.0 s"), (7.2, "7.2 s"), (9.96, "10 s"), (119.4, "119 s"), (119.6, "2 min"),
     (3599, "1 h 00 min"), (2 * 3600 + 601, "2 h 10 min"), (36000, "10 h"), (47 * 3600, "47 h"),
     (4.1 * 86400, "4 days")],
)  # fmt: skip
def test_durations_as_people_say_them(seconds, text):
    assert duration_text(seconds) == text


def test_the_end_has_a_date_where_it_is_not_today():
    now = datetime(2026, 11, 30, 22, 30)
    assert moment_text(3600, now) == "23:30"
    assert moment_text(2 * 3600, now) == "Tue 1 Dec, 00:30"


def test_the_first_estimate_leaves_the_first_step_out_and_names_the_remedy():
    one, clock, said = progress(200, 250)
    one.epoch_begins(0, 0)
    clock.now = 300  # a step that compiles
    one.step_done()
    for _ in range(4):
        clock.now += 7.2
        one.step_done()
    assert len(said) == 1, said
    assert said[0].startswith("200 epochs x 250 steps, 7.2 s each: 4 days and the validations; about 4 days left")
    assert said[0].endswith("For less: REMEDY")


@pytest.mark.parametrize(("device", "seconds", "remedy"), [("cpu", 2, True), ("cpu", 0.5, False), ("cuda", 2, False)])
def test_the_remedy_is_for_what_lasts_long_on_its_device(device, seconds, remedy):
    one, clock, said = progress(100, 100, device)
    train(one, clock, [0], 100, seconds)
    assert ("REMEDY" in said[0]) == remedy


def test_lines_become_rarer_and_count_the_validation():
    one, clock, said = progress(10, 100)
    train(one, clock, range(9), 100, 1.0, between=50)
    assert 5 <= len(said) <= 10, said
    assert said[1].startswith("Epoch 0 (of 0 to 9), step 15 of 100: 1.0 s a step, about 16 min left, until ")
    one.epoch_begins(9, 0)
    assert one.left_seconds == 150, "100 steps, and the last validation"


def test_an_epoch_that_goes_on_is_not_taken_for_a_pause():
    one, clock, _ = progress(2, 100)
    one.epoch_begins(0, 90)
    for _ in range(10):
        clock.now += 1
        one.step_done()
    assert one.left_seconds == 100 and one.step_seconds == 1


def test_runs_that_are_left():
    clock = Clock()
    pace = Pace(5, 2, clock)
    pace.started("a")
    pace.started("b")
    clock.now = 3600
    assert pace.done("b", False) == "4 runs left", "a failure says nothing of what a run takes"
    assert pace.done("a", True).startswith("3 runs left, 1 h 00 min each: about 1 h 30 min, until ")
    pace.started("c")
    pace.started("d")
    clock.now = 5400
    assert pace.done("c", True).startswith("2 runs left, 45 min each: about 30 min, until ")
    assert Pace(1, None, clock).left == 1


def test_a_queue_is_not_foretold():
    pace = Pace(2, None, Clock())
    pace.started("a")
    assert pace.done("a", True) == "1 run left"
    pace.started("b")
    assert pace.done("b", True) is None


def test_losses_stand_in_columns():
    text = in_columns("losses", {"segmentation": -0.12345, "a": 123.0})
    assert text == "losses      segmentation         a\n                 -0.1235  123.0000"


def test_settings_that_differ_alone():
    defaults = {"seed": None, "mirror": "auto", "cast": {"confidence": 0.9, "x": 1}}
    text = settings_table({"seed": 3, "mirror": "auto", "cast": {"confidence": 0.8, "x": 1}}, defaults)
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["setting", "here", "default"], ["seed", "3", "null"], ["cast.confidence", "0.8", "0.9"],
    ]  # fmt: skip
    assert settings_table(defaults, defaults).startswith("Settings: all at their defaults")
