"""The table of trainers on real tasks: what is trained for how long, what counts, and what the tables say."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys

import pytest
from conftest import REPOSITORY
from support.pages import read_csv

from nnunet_uda.evaluation.metrics import METRICS
from nnunet_uda.files import write_json

pytestmark = pytest.mark.slow

SECONDS = {"CISFATrainer": 0.8, "CASTTrainer": 0.4}
"""Of a step; a plain network's takes 0.2."""
STRUCTURES = {"left": 1, "right": 2}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    for name in ("table", "tasks"):
        monkeypatch.delitem(sys.modules, f"benchmarks.accuracy.{name}", raising=False)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.setenv(name, "")  # put back what the script sets
    for name in ("OMP_NUM_THREADS", "nnUNet_n_proc_DA"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    return importlib.import_module("benchmarks.accuracy.table")


@pytest.fixture
def trained(table, tmp_path, monkeypatch):
    """All that would be trained, as jobs; datasets are there at once, and trainings end with the Dice of ``dice``."""
    jobs, dice, drawn = [], {}, []

    def make_task(name, folder, *_):
        task = table.TASKS[name]
        for number in (task.dataset, *task.bounds):
            dataset = f"Dataset{number}_{name}"
            raw, preprocessed = folder / "nnUNet_raw" / dataset, folder / "nnUNet_preprocessed" / dataset
            unlabelled = number == task.dataset and name not in ("heart", "vs")
            cases = [f"case_{number}"] if len(task.bounds) > 1 and number in task.bounds else ["a", "b"]
            for place in (preprocessed, raw / ("imagesTu" if unlabelled else "imagesTs"), raw / "labelsTs"):
                place.mkdir(parents=True, exist_ok=True)
            for case in cases:
                (raw / ("imagesTu" if unlabelled else "imagesTs") / f"{case}_0000.nii.gz").touch()
                if not (raw / "labelsTs" / f"{case}.nii.gz").exists():  # its time of change is known to runs
                    (raw / "labelsTs" / f"{case}.nii.gz").touch()
            content = {"labels": {"background": 0, **STRUCTURES}, "file_ending": ".nii.gz"}
            write_json({"channel_names": {"0": "intensity"}, "numTraining": 2, **content}, raw / "dataset.json")
            write_json({"task": name}, preprocessed / f"{table.PLANS}.json")

    def stamp(path):
        return [path.stat().st_size, path.stat().st_mtime_ns]

    def run(engine, waiting, started, done):
        for job in waiting:
            job.folder.mkdir(parents=True, exist_ok=True)
            started(job)
            jobs.append(job)
            found = dice.get((job.trainer, job.dataset), dice.get(job.trainer, 0.5))
            if found is None:
                done(job, "it diverged")
                continue
            checkpoint, predictions = job.trained / "checkpoint_final.pth", job.folder / "predictions"
            for path in (checkpoint, *(predictions / f"{case}.nii.gz" for case in job.test.cases)):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            origin = {"checkpoint": stamp(checkpoint)}
            write_json(origin, predictions / "made_from.json")
            references = {case: stamp(job.test.reference / f"{case}.nii.gz") for case in job.test.cases}
            structure = dict(zip(METRICS, (found, 2.0, 4.0), strict=True))
            write_json({
                "made_from": {**origin, "references": references}, "validation_pseudo_dice": 0.5,
                "training_seconds": 90.0, "criteria": {"agreement": found},
                "metrics": {case: dict.fromkeys(STRUCTURES, structure) for case in job.test.cases},
            }, job.folder / "score.json")  # fmt: skip
            write_json({"peak_memory_gib": 1.0, "cpu_seconds": 60.0}, job.trained / "training_cost.json")
            done(job, None)

    def derive(base, configuration, name, uda):
        return base | {"plans_name": name, "uda": uda}

    monkeypatch.setattr(table, "make_task", make_task)
    monkeypatch.setattr(table.LocalEngine, "run", run)
    monkeypatch.setattr(table, "derive_plans", derive)
    monkeypatch.setattr(table, "draw_comparison", lambda path, bars, title: drawn.append((path.name, len(bars), title)))
    measured = []

    def as_done(function, asked, processes):
        measured.extend(asked)
        return [(0.2, SECONDS.get(one["trainer"], 0.2)) for one in asked]

    monkeypatch.setattr(table, "as_done", as_done)

    class Trained:
        folder = tmp_path / "out"

        def main(self, *words: str) -> str:
            jobs.clear()
            measured.clear()
            table.main(["-o", str(self.folder), "-data", str(tmp_path), "-device", "cpu", *words])
            return (self.folder / "table.md").read_text()

        def uda(self, job) -> dict:
            path = self.folder / "nnUNet_preprocessed" / job.dataset / f"{job.plans}.json"
            return json.loads(path.read_text())["uda"]

        def record(self) -> list[dict]:
            return json.loads((self.folder / "table.json").read_text())["runs"]

    found = Trained()
    found.jobs, found.dice, found.measured, found.drawn = jobs, dice, measured, drawn
    return found


def cells(text: str, caption: str) -> list[list[str]]:
    """The rows of the first table of this caption."""
    lines = text[text.index(f"**{caption}**") :].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in [lines[0], *lines[2:]]]


def overview(text: str) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in cells(text, "Dice (share of the gap)")}


def test_equal_time_gives_slower_steps_fewer_of_them(trained):
    trained.main("-tasks", "heart", "-tr", "CISFATrainer", "RandomStyleTrainer")
    steps = {job.trainer: trained.uda(job)["iterations_per_epoch"] * trained.uda(job)["num_epochs"]
             for job in trained.jobs}  # fmt: skip
    assert steps == {"SourceOnlyTrainer": 2000, "CISFATrainer": 500, "RandomStyleTrainer": 2000,
                     "SupervisedTrainer": 2000}  # fmt: skip
    assert [trained.uda(job)["seed"] for job in trained.jobs] == [0] * 4 + [1] * 4 + [2] * 4
    assert [one["trainer"] for one in trained.measured] == ["CISFATrainer", "RandomStyleTrainer"]
    assert os.environ["OMP_NUM_THREADS"] == "1"
    row = cells((trained.folder / "table.md").read_text(), "Every trainer and task")[2]
    assert row[:2] == ["heart", "RandomStyleTrainer"] and row[5:] == ["1.0", "2000", "3"]


def test_a_second_start_trains_and_measures_nothing_again(trained, capsys):
    words = ("-tasks", "heart", "totalseg", "-tr", "CISFATrainer", "-seeds", "0")
    first = trained.main(*words)
    assert len(trained.jobs) == 5  # no upper bound where no labelled target scan is left
    assert trained.main(*words) == first and not trained.jobs and not trained.measured
    trained.main(*words[:-1], "0", "4")
    assert {trained.uda(job)["seed"] for job in trained.jobs} == {4} and not trained.measured
    assert trained.main(*words, "--only_table") in capsys.readouterr().out


def test_an_upper_bound_that_leaves_scans_out_is_one_run_over_all_of_them(trained):
    trained.dice.update(
        {("SupervisedTrainer", "Dataset552_brain"): 0.6, ("SupervisedTrainer", "Dataset553_brain"): 0.9}
    )
    text = trained.main("-tasks", "brain", "-tr", "-seeds", "0")
    upper = [job for job in trained.jobs if job.trainer == "SupervisedTrainer"]
    assert [(job.dataset[:10], job.fold, job.test.cases) for job in upper] == [
        (f"Dataset{i}", "all", [f"case_{i}"]) for i in (552, 553, 554)
    ]
    assert trained.jobs[0].fold == "0" and trained.jobs[0].images.name == "imagesTu"
    assert overview(text)["upper bound"] == ["0.667"]  # of 0.6, 0.9 and 0.5
    (record,) = (one for one in trained.record() if one["label"] == "upper bound")
    assert record["trainings"] == 3 and len(record["metrics"]) == 3 and record["minutes"] == 1.0
    assert "brain: T1 to T2; tested on the very scans that training sees without their labels; upper bound: trained " \
           "on the other target scan(s), for each in turn." in text  # fmt: skip


def test_a_run_without_all_its_trainings_is_not_there_yet(trained):
    trained.dice["SupervisedTrainer", "Dataset553_brain"] = None
    with pytest.raises(SystemExit):
        trained.main("-tasks", "brain", "-tr", "-seeds", "0")
    assert [one["label"] for one in trained.record()] == ["lower bound"]
    trained.dice["SupervisedTrainer", "Dataset553_brain"] = 0.5
    trained.main("-tasks", "brain", "-tr", "-seeds", "0")
    assert [job.dataset for job in trained.jobs] == ["Dataset553_brain"]


def test_one_failure_stops_no_other_and_is_said(trained, capsys):
    trained.dice["CISFATrainer"] = None
    with pytest.raises(SystemExit):
        trained.main("-tasks", "heart", "-tr", "CISFATrainer", "CASTTrainer", "-seeds", "0")
    said = capsys.readouterr().err
    assert "1 training(s) failed" in said and "it diverged" in said
    assert {one["label"] for one in trained.record()} == {"lower bound", "CASTTrainer", "upper bound"}


def test_share_of_the_gap_and_what_is_within_noise_of_the_best(table):
    import pandas as pd

    dice = {"lower bound": (0.2, 0.4), "CASTTrainer": (0.7, 0.8), "CISFATrainer": (0.68, 0.78),
            "CUTTrainer": (0.5, 0.6), "upper bound": (0.9,)}  # fmt: skip
    runs = pd.DataFrame([
        {"task": "heart", "label": label, "dice": one, "assd_mm": 1.0, "minutes": 1.0, "steps": 10, "undefined": 0}
        for label, values in dice.items() for one in values
    ])  # fmt: skip
    rows = {row["label"]: row for row in table.summarise_lines(runs, list(dice))}
    # bounds 0.3 and 0.9: 0.7 and 0.8 close 66.7 and 83.3 percent
    assert rows["CASTTrainer"]["gap"].mean == pytest.approx(75) and rows["CASTTrainer"]["gap"].std > 0
    assert rows["upper bound"]["gap"].n == rows["lower bound"]["gap"].n == 0
    # deviations of 0.07 over two seeds: 0.14 is noise, 0.2 is not
    assert {label for label, row in rows.items() if row["best"]} == {"CASTTrainer", "CISFATrainer"}
    one_seed = table.summarise_lines(runs.drop_duplicates("label"), list(dice))
    assert [row["label"] for row in one_seed if row["best"]] == ["CASTTrainer"]


def test_equal_iterations_are_a_second_table_with_the_same_bounds(trained):
    words = ("-tasks", "heart", "-tr", "CISFATrainer", "-seeds", "0", "-budget", "200")
    first = trained.main(*words)
    assert "Equal iterations" not in first
    both = trained.main(*words, "-equal", "time", "iterations")
    (job,) = trained.jobs
    assert job.trainer == "CISFATrainer" and trained.uda(job)["iterations_per_epoch"] == 10 and not trained.measured
    time, iterations = both.split("## Equal ")[1:]
    assert time.startswith("time: every training takes that of 200 steps")
    assert iterations.startswith("iterations: every training has 200 steps")
    steps = [cells(part, "Every trainer and task")[2][6] for part in (time, iterations)]
    assert steps == ["40", "200"]  # 2.5 an epoch, rounded
    assert overview(time)["lower bound"] == overview(iterations)["lower bound"]
    # another budget is another comparison
    text = trained.main(*words[:-1], "2000")
    assert len(trained.jobs) == 3 and "200 steps" not in text.replace("2000 steps", "")


def test_variants_are_lines_with_their_settings(trained, capsys):
    few = "Few:CISFATrainer:cisfa.patches=64,cisfa.segmenter_adversarial=both,segmenter_learning_rate=1e-4"
    words = ("-tasks", "heart", "-tr", "CISFATrainer", "-seeds", "0", "-variant")
    text = trained.main(*words, few, "Same:CISFATrainer")
    udas = {job.plans.split("_")[0]: trained.uda(job) for job in trained.jobs if job.trainer == "CISFATrainer"}
    usual = udas["CISFATrainer"]
    assert udas["Few"]["cisfa"] == usual["cisfa"] | {"patches": 64, "segmenter_adversarial": "both"}
    assert udas["Few"]["segmenter_learning_rate"] == 1e-4 and udas["Same"] == usual
    assert list(overview(text)) == ["trainer", "lower bound", "CISFATrainer", "Few", "Same", "upper bound"]
    # the name alone does not say what it is: with other settings its runs are other ones
    trained.dice["CISFATrainer"] = 0.8
    text = trained.main(*words, "Few:CISFATrainer:cisfa.patches=32")
    assert len(trained.jobs) == 1 and overview(text)["Few"] == ["**0.800**"]
    assert "1 finished run(s) of these tasks with other settings or another budget are left out" in text
    # and a table without the option shows what there is
    assert "Same" in overview(trained.main(*words[:-1], "--only_table"))


@pytest.mark.parametrize(("words", "said"), [
    (["-variant", "Few"], "-variant takes NAME:TRAINER:KEY=VALUE,KEY=VALUE, found 'Few'"),
    (["-variant", "a/b:CISFATrainer:"], "-variant takes"),
    (["-variant", "CASTTrainer:CISFATrainer:cisfa.patches=64"], "expected every name once"),
    (["-again", "Few"], "-again Few"),
    (["-budget", "5"], "-budget must be at least 20"),
    (["-variant", "Few:NoSuchTrainer:"], "NoSuchTrainer"),
])  # fmt: skip
def test_what_no_line_can_be_is_refused(trained, capsys, words, said):
    with pytest.raises(SystemExit):
        trained.main("-tasks", "heart", *words)
    assert said in capsys.readouterr().err and not trained.jobs


def test_records_of_another_day_are_not_trained_again(trained, table, tmp_path):
    words = ("-tasks", "heart", "brain", "-tr", "CISFATrainer", "-seeds", "0")
    first = trained.main(*words)
    recorded = tmp_path / "recorded.json"
    (trained.folder / "table.json").rename(recorded)
    assert str(tmp_path) not in recorded.read_text()
    trained.folder = tmp_path / "elsewhere"
    assert trained.main(*words, "-with", str(recorded)) == first and not trained.jobs
    text = trained.main(*words[:4], "CISFATrainer", "CASTTrainer", "-seeds", "0", "-with", str(recorded))
    assert [job.trainer for job in trained.jobs] == ["CASTTrainer"] * 2
    assert "CISFATrainer" in overview(text) and "CASTTrainer" in overview(text)
    # what the table was not asked for is handed on all the same
    trained.main("-tasks", "heart", "-tr", "--only_table", "-with", str(recorded))
    assert {one["task"] for one in trained.record()} == {"heart", "brain"}
    assert len(trained.record()) == len(json.loads(recorded.read_text())["runs"]) + 2


@pytest.mark.parametrize("content", ["[]", '{"runs": [{"task": "heart"}]}', '{"means": []}'])
def test_a_file_of_another_kind_is_no_record(trained, tmp_path, capsys, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(SystemExit):
        trained.main("--only_table", "-with", str(tmp_path / "other.json"))
    assert "other.json is no table.json of this command" in capsys.readouterr().err


def test_code_is_recorded_and_only_on_demand_a_reason_to_train_again(trained, table, monkeypatch):
    words = ("-tasks", "heart", "-tr", "CISFATrainer", "CASTTrainer", "-seeds", "0")
    trained.main(*words)
    (here,) = {tuple(one["code"]) for one in trained.record()}
    assert here == (table.code_now()["code"],)
    monkeypatch.setattr(table, "code_now", lambda: {"code": "other", "revision": "r"})
    trained.main(*words)
    assert not trained.jobs
    trained.dice["CASTTrainer"] = 0.7
    text = trained.main(*words, "-again", "CASTTrainer")
    assert [job.trainer for job in trained.jobs] == ["CASTTrainer"]
    assert "0.700" in overview(text)["CASTTrainer"][0] and "Trained by 2 state(s) of the code." in text
    assert [one["trainer"] for one in trained.measured] == ["CASTTrainer"]  # its steps may take another time now
    trained.main(*words, "-again", "CASTTrainer")
    assert not trained.jobs and not trained.measured


def test_of_two_runs_of_a_line_the_later_counts(trained):
    words = ("-tasks", "heart", "-tr", "CASTTrainer", "-seeds", "0")
    trained.main(*words)
    (path,) = trained.folder.glob("runs/heart/CASTTrainer*/record.json")
    for name, steps, age in (("A", 1, 0), ("Z", 2, 100)):  # Z is older than A and comes behind it by name
        other = path.parents[1] / name / path.name
        other.parent.mkdir()
        write_json(json.loads(path.read_text()) | {"steps": steps}, other)
        os.utime(other, (2e9 - age, 2e9 - age))
    trained.main(*words, "--only_table")
    assert [one["steps"] for one in trained.record() if one["label"] == "CASTTrainer"] == [1]


def test_the_criteria_are_ranked_against_the_target_without_the_upper_bounds(trained):
    trained.dice.update(dict(zip(("CISFATrainer", "CASTTrainer", "SourceOnlyTrainer"), (0.3, 0.6, 0.1), strict=True)))
    text = trained.main("-tasks", "heart", "-tr", "CISFATrainer", "CASTTrainer", "-seeds", "0")
    caption = "Rank correlation of the criteria without labels with the Dice, over last checkpoints"
    ranks = dict(cells(text, caption)[1:])
    assert ranks["agreement"] == "1.00 (3 runs)" and ranks["entropy"] == "–"


def test_every_figure_is_in_the_csv_and_every_line_in_the_plot(trained, table):
    trained.dice["CISFATrainer"] = math.nan
    trained.main("-tasks", "heart", "-tr", "CISFATrainer", "-seeds", "0")
    rows = {row["label"]: row for row in read_csv(trained.folder / "table.csv")}
    assert rows["lower bound"]["dice_left"] == "0.5" and rows["lower bound"]["assd_mm_right"] == "2.0"
    assert rows["CISFATrainer"]["dice"] == "" and rows["CISFATrainer"]["criterion_agreement"] == ""
    assert trained.drawn == [("table.png", 3, table.MODES["time"].format(2000))]


def test_what_is_2d_only_has_no_row_in_3d(trained):
    trained.main("-tasks", "brain_3d", "-seeds", "0", "-tr", "UUDSAdversarialTrainer", "CISFATrainer")
    assert {job.configuration for job in trained.jobs} == {"3d_fullres"}
    assert not any(job.trainer.startswith("UUDS") for job in trained.jobs)
    (cisfa,) = (trained.uda(job)["cisfa"] for job in trained.jobs if job.trainer == "CISFATrainer")
    assert cisfa == {"generator_width": 8, "generator_blocks": 4, "discriminator_width": 16}


def test_a_trainer_of_the_user_s_own_is_a_line(trained, table, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text(
        "from nnunet_uda.trainers.source_only import SourceOnlyTrainer\n\n\nclass MineTrainer(SourceOnlyTrainer):\n"
        '    """Mine."""\n'
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "mine"))
    text = trained.main("-tasks", "heart", "-tr", "MineTrainer", "-seeds", "0")
    assert "MineTrainer" in overview(text)
    before = table.code_now()["code"]
    (tmp_path / "mine" / "more.py").write_text("x = 1\n")
    assert table.code_now()["code"] != before


def test_real_tasks_are_the_default_and_phantoms_are_called_so(trained, table):
    text = trained.main("-tr", "-seeds", "0")
    assert overview(text)["trainer"] == [name for name, task in table.TASKS.items() if not task.made]
    text = trained.main("-groups", "phantom_mr2ct", "-tr", "-seeds", "0")
    assert "- phantom_mr2ct: phantom, mr to ct; " in text


def test_every_setting_of_the_table_exists(table, monkeypatch):
    from nnunet_uda.methods import trainers_folder
    from nnunet_uda.plans import check_uda

    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    for trainer in (*table.TRAINERS, *table.BOUNDS.values(), "ADVENTTrainer", "EntMinTrainer"):
        check_uda(table.Line(trainer, trainer).uda("heart"), trainer)


def test_no_finished_run_is_said(trained, capsys):
    with pytest.raises(SystemExit):
        trained.main("--only_table")
    assert "holds no finished run of these tasks" in capsys.readouterr().err


def test_a_calibration_is_of_its_machine(trained, table, monkeypatch):
    words = ("-tasks", "heart", "-tr", "CISFATrainer", "-seeds", "0")
    trained.main(*words)
    monkeypatch.setattr(table, "machine", lambda device: "another")
    trained.main(*words[:-1], "1")
    assert len(trained.measured) == 1
    known = json.loads((trained.folder / "calibration.json").read_text())
    assert len(known) == 2 and all([entry["seconds"] for entry in one.values()] == [0.8] for one in known.values())
