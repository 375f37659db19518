"""``nnUNetUDA_compare``: what is planned and refused, the tables' arithmetic, the engines, and a real tiny road."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from subprocess import CompletedProcess as Done

import numpy as np
import pytest
import torch
from conftest import make_raw_dataset, write_volume
from matplotlib.image import imread
from support.jobs import DATASET, a_job
from support.pages import read_csv, read_page

from nnunet_uda import figures
from nnunet_uda.commands import train
from nnunet_uda.commands.compare import main, parse_arguments
from nnunet_uda.demo.road import Demo, run_demo
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation import compare_plot
from nnunet_uda.evaluation.runs import Labels
from nnunet_uda.evaluation.tables import Spread, Volume
from nnunet_uda.experiments import compare, engines, job
from nnunet_uda.experiments.compare import (
    LOWER,
    UPPER,
    Method,
    Row,
    find_methods,
    method_table,
    plan_plans,
    plan_rows,
    run_record,
    write_tables,
)
from nnunet_uda.experiments.engines import LocalEngine, run_jobs
from nnunet_uda.experiments.job import Job, Score, TargetTest, last_error
from nnunet_uda.training.interruption import wait_for_fold
from nnunet_uda.training.launch import spawn

NAMES = ("left", "right")


WORDS = ["-d", "501", "-tr", "SourceOnlyTrainer", "-p", "tiny"]


def test_a_job_survives_its_file(tmp_path):
    first = a_job(tmp_path)
    assert Job.read(first.write()) == first


def test_a_measured_score_holds_the_last_running_means_of_the_criteria(tmp_path, monkeypatch):
    trained, labels = tmp_path / "trained", tmp_path / "labelsTs"
    monkeypatch.setattr(Job, "trained", trained)
    monkeypatch.setattr(Job, "predicted", lambda self: True)
    monkeypatch.setattr(job, "evaluate_folder", lambda *_: {"x": {"left": {"Dice": 0.5, "ASSD": 1.0, "HD95": 2.0}}})
    for folder in (trained, labels, tmp_path / "runs" / "a"):
        folder.mkdir(parents=True)
    (labels / "x.nii.gz").touch()
    logging = {"mean_fg_dice": [0.1, 0.2], "epoch_start_timestamps": [0, 10], "epoch_end_timestamps": [4, 15]}
    criteria = {"agreement": [0.5, 1.0], "snd": []}
    torch.save({"logging": logging, "uda": {"criteria": criteria}}, trained / "checkpoint_final.pth")
    (trained / "training_cost.json").write_text("[")  # cut short: the scores are worth more than it
    one = a_job(tmp_path)
    one.measure(trained / "checkpoint_final.pth")
    score = one.score()
    assert score.criteria == {"agreement": 0.75}, "half of the last value and half of the mean before"
    assert (score.pseudo_dice, score.seconds) == (0.2, 9) and math.isnan(score.memory)


def test_scores_that_were_cut_short_are_made_again(tmp_path, monkeypatch):
    """No other program writes them, so that nobody is asked to mend them."""
    job_, path = a_job(tmp_path), tmp_path / "runs" / "a" / "score.json"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(Job, "predicted", lambda self: True)
    monkeypatch.setattr(Job, "_origin", lambda self: {"checkpoint": [1]})
    scores = {"left": {"Dice": 0.5, "ASSD": None, "HD95": 1.0}}
    whole = {"made_from": {"checkpoint": [1]}, "validation_pseudo_dice": 0.5, "metrics": {"x": scores}}
    path.write_text(json.dumps(whole))
    assert job_.score().volumes[0].metrics["left"]["Dice"] == 0.5
    changes = [{"metrics": []}, {"metrics": {"x": "y"}}, {"metrics": {"x": {"left": 1}}}, {"criteria": []},
               {"made_from": 1}, {"metrics": {"x": {"left": {"Dice": "y"}}}}, {"training_seconds": "y"},
               {"metrics": {"x": {}}}, {"metrics": {"x": {"right": scores["left"]}}}, {"metrics": {}},
               {"metrics": {"x": {"left": {"Dice": 0.5}}}}, {"metrics": {"y": scores}}]  # fmt: skip
    for text in ("", json.dumps(whole)[:-9], "[]", *(json.dumps(whole | change) for change in changes)):
        path.write_text(text)
        assert job_.score() is None, text


# --- tables ----------------------------------------------------------------------------------------------------------


def volumes(dice: float, assd: float) -> list[Volume]:
    return [Volume("x", {name: {"Dice": dice, "ASSD": assd, "HD95": 2 * assd} for name in NAMES})]


def rows_of(tmp_path: Path, *runs: tuple[str, str, int]) -> list[Row]:
    rows = []
    for label, fold, seed in runs:
        method = Method(label, f"{label}-trainer" if label in (LOWER, UPPER) else label, DATASET, DATASET)
        rows.append(Row(method, fold, seed, a_job(tmp_path, f"{label}_{fold}_{seed}")))
    return rows


def test_tables_against_values_by_hand(tmp_path):
    runs = [(LOWER, "0", 1), (LOWER, "0", 2), ("A", "0", 1), ("A", "0", 2), ("B", "0", 1), (UPPER, "0", 1),
            (LOWER, "1", 1), ("A", "1", 1), (UPPER, "1", 1)]  # fmt: skip
    rows = rows_of(tmp_path, *runs)
    dice = {f"{LOWER}_0_1": 0.2, f"{LOWER}_0_2": 0.4, f"{UPPER}_0_1": 0.8, "A_0_1": 0.55, "A_0_2": 0.8,
            f"{LOWER}_1_1": 0.5, f"{UPPER}_1_1": 0.9, "A_1_1": 0.6}  # fmt: skip
    scores = {name: Score(volumes(value, 10 * value), 0.5, 120.0, 2.0) for name, value in dice.items()}
    cells = write_tables(tmp_path, {"plans": "P", "configuration": "2d"}, rows, scores, {"B_0_1": "it broke"})

    # bounds of fold 0: 0.3 (over both seeds) and 0.8; of fold 1: 0.5 and 0.9
    expected = {"A_0_1": 50.0, "A_0_2": 100.0, "A_1_1": 25.0}
    assert compare.gaps(rows, scores) == pytest.approx(expected)
    by_label = {entry.method.label: entry for entry in cells}
    assert list(by_label) == [LOWER, "A", "B", UPPER]
    a = by_label["A"].figures
    assert (a["Dice"].mean, a["gap"].mean, a["gap"].std) == pytest.approx((0.65, 175 / 3, 38.188), rel=1e-4)
    assert a["Dice"].std == pytest.approx(0.13229, rel=1e-4) and a["seconds"].mean == 120
    assert math.isnan(by_label[LOWER].figures["gap"].mean) and by_label["B"].figures["Dice"].n == 0

    table = method_table(DATASET, cells)["rows"]
    assert table[1] == ["A", "0.650 ± 0.132", "6.50 ± 1.32", "58.3 ± 38.2", "2.0 ± 0.0", "2.0 ± 0.0", "–", "3"]
    assert table[0][0] == f"{LOWER}: {LOWER}-trainer" and table[0][3] == "–"
    assert table[2] == ["B", "–", "–", "–", "–", "–", "–", "0 of 1"]
    text = (tmp_path / "compare.md").read_text()
    assert "- B_0_1: it broke" in text and "- A_0_1" not in text and compare.RULES[1] in text

    found = read_csv(tmp_path / "compare.csv")
    assert [row["state"] for row in found] == ["finished"] * 4 + ["failed"] + ["finished"] * 4
    assert float(found[2]["gap_closed_percent"]) == pytest.approx(50) and found[0]["gap_closed_percent"] == ""
    assert float(found[2]["assd_mm"]) == pytest.approx(5.5) and found[4]["dice"] == ""
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["means"][1]["Dice"]["mean"] == pytest.approx(0.65) and content["means"][1]["runs"] == 3
    assert content["runs"][4]["state"] == "failed" and content["means"][2]["Dice"]["mean"] is None


def test_undefined_distances_are_counted(tmp_path):
    rows = rows_of(tmp_path, ("A", "0", 1))
    scores = {"A_0_1": Score(volumes(0.0, math.nan), math.nan)}
    [cells] = compare.summarise_methods(rows, scores)
    assert cells.undefined == 2 and method_table(DATASET, [cells])["rows"][0][2] == "–"
    record = run_record(rows[0], scores, {}, {})
    assert record["assd_mm"] is None and record["distances_undefined"] == 2 and record["dice"] == 0


def test_the_plot_shows_every_run(tmp_path):
    rows = rows_of(tmp_path, (LOWER, "0", 1), ("A", "0", 1), ("A", "0", 2), ("B", "0", 1))
    scores = {row.job.name: Score(volumes(0.4, 3), 0.5) for row in rows[:3]}
    bars = compare.bars(rows, compare.summarise_methods(rows, scores), scores)
    assert [(bar.label, len(bar.runs)) for bar in bars] == [(LOWER, 1), ("A", 2), ("B", 0)]
    compare.draw_comparison(tmp_path / "plot.png", bars, "title")
    assert imread(tmp_path / "plot.png").std() > 0
    many = [dataclasses.replace(bar, test=f"test {number}") for number in range(5) for bar in bars]
    compare.draw_comparison(tmp_path / "many.png", many, "title")
    one, two = imread(tmp_path / "plot.png"), imread(tmp_path / "many.png")
    assert two.shape[0] == 2 * one.shape[0] and two[one.shape[0] :].std() > 0


def test_the_page_has_structures_distances_tests_and_every_slice(tmp_path):
    cases, label = ["x", "y", "z"], np.zeros((5, 12, 12), np.uint8)
    label[1:4, 3:8, 3:8] = 1
    test = TargetTest(cases, tmp_path / "labelsTs", Labels({"left": 1}, None, ".nii.gz"), None)
    rows, scores = [], {}
    for name, shift, seed in ((LOWER, 4, 1), ("A", 1, 1), ("A", 2, 2), (UPPER, 0, 1), ("B", 0, 1)):
        job = dataclasses.replace(a_job(tmp_path, f"{name}_{seed}"), test=test)
        rows.append(Row(Method(name, name, DATASET, DATASET), "0", seed, job))
        if name == "B":
            continue  # it failed
        found = []
        for index, case in enumerate(cases):
            moved = np.roll(label, shift, 2) if index else label
            write_volume(tmp_path / "labelsTs" / f"{case}.nii.gz", label)
            write_volume(tmp_path / "imagesTs" / f"{case}_0000.nii.gz", label.astype(np.float32))
            write_volume(job.folder / "predictions" / f"{case}.nii.gz", moved)
            dice = 1 - 0.2 * shift * (index > 0)
            found.append(Volume(case, {"left": {"Dice": dice, "ASSD": float(shift), "HD95": 2.0 * shift}}))
        scores[job.name] = Score(found, 0.5)
    [page] = compare.write_pages(tmp_path, rows, scores, 1)
    text, data = read_page(tmp_path / page)
    assert page == f"compare_{DATASET}.html" and data["runs"] == [LOWER, "A", UPPER], "B has no run"
    assert data["values"]["HD95"]["left"][1] == pytest.approx([3.0] * 3), "the mean of two seeds"
    assert data["values"]["Dice"]["left"][1] == pytest.approx([1.0, 0.7, 0.7])
    assert [overlay["stack"]["slices"] for overlay in data["overlays"]] == [list(range(5))] * 3
    assert "Wilcoxon" in text and "Gap closed" in text and "HD95 (mm)" in text
    assert len(list((tmp_path / f"compare_{DATASET}_overlays").iterdir())) >= 3
    assert compare.write_pages(tmp_path, rows[-1:], scores, 1) == [], "nothing to show"


def test_the_dice_axis_is_not_a_magnifying_glass(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.extend(figure.axes))
    bars = [compare_plot.Bar(test, label, Spread(dice, 0.001, 2), Spread(60, 1, 2), [dice])
            for test in ("a", "b") for label, dice in (("A", 0.003), ("B", 0.019))]  # fmt: skip
    compare_plot.draw_comparison(tmp_path / "c.png", bars, "title")
    dice, assd = drawn[:2], drawn[2:4]
    assert all(axis.get_ylim() == (0, 1) for axis in dice) and all(axis.get_ylim()[0] == 0 for axis in assd)


# --- what is planned -------------------------------------------------------------------------------------------------


def test_methods_seeds_folds_and_bounds_are_planned(in_workspace, tmp_path):
    methods = find_methods(["501"], ["CISFATrainer"], ["SourceOnlyTrainer"], [f"SupervisedTrainer:{DATASET}"])
    assert [(m.label, m.trainer) for m in methods] == [
        (LOWER, "SourceOnlyTrainer"), ("CISFATrainer", "CISFATrainer"), (UPPER, "SupervisedTrainer"),
    ]  # fmt: skip
    plans = plan_plans(methods, "tiny", "2d", [7, 3])
    assert [(key[1], value["plans_name"], value["uda"]["seed"]) for key, value in plans.items()] == [
        (7, "tiny_seed_7", 7), (3, "tiny_seed_3", 3),
    ]  # fmt: skip
    rows = plan_rows(methods, plans, "2d", ["0"], tmp_path, "cpu", 1)
    assert [(row.seed, row.job.plans, row.job.trainer) for row in rows[2:4]] == [
        (7, "tiny_seed_7", "SupervisedTrainer"), (3, "tiny_seed_3", "SourceOnlyTrainer"),
    ]  # fmt: skip
    assert rows[0].job.images == in_workspace.raw / DATASET / "imagesTs" and len({row.job.name for row in rows}) == 6
    assert plan_plans(methods, "tiny", "2d", None)[DATASET, None]["plans_name"] == "tiny", "the plans as they are"


def test_a_bound_among_the_trainers_has_one_row(in_workspace):
    trainers = ["SourceOnlyTrainer", "CISFATrainer", "SupervisedTrainer"]
    methods = find_methods(["501"], trainers, trainers[:1], ["SupervisedTrainer:501"])
    assert [method.label for method in methods] == [LOWER, "CISFATrainer", UPPER]


def test_a_bound_trained_elsewhere_is_tested_on_this_target(tmp_path, monkeypatch):
    for name in (DATASET, "Dataset502_Back", "Dataset511_Upper", "Dataset512_UpperBack"):
        make_raw_dataset(tmp_path / "raw", name, num_source=1, num_target=1, num_test=1, size=(2, 6, 6))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    upper = ["SupervisedTrainer:511", "SupervisedTrainer:512"]
    with pytest.raises(UDAError, match="one bound for all datasets or one for each"):
        parse_arguments([*WORDS, "-o", "out", "-upper", *upper, "-d", "501", "502", "503"])
    methods = find_methods(["501", "502"], ["SourceOnlyTrainer"], upper=upper)
    assert [(m.test, m.dataset) for m in methods] == [
        (DATASET, DATASET), (DATASET, "Dataset511_Upper"),
        ("Dataset502_Back", "Dataset502_Back"), ("Dataset502_Back", "Dataset512_UpperBack"),
    ]  # fmt: skip
    plans = {(method.dataset, None): {"plans_name": "tiny"} for method in methods}
    rows = plan_rows(methods, plans, "2d", ["0"], tmp_path / "out", "cpu", 1)
    assert rows[1].job.dataset == "Dataset511_Upper" and DATASET in str(rows[1].job.test.reference)
    assert rows[1].job.name == f"{DATASET}__SupervisedTrainer_on_Dataset511_Upper__tiny__fold_0"


def test_each_fold_of_a_fold_protocol_has_its_own_test_images(tmp_path, monkeypatch):
    raw = make_raw_dataset(tmp_path / "raw", num_source=2, num_target=3, num_test=0, size=(2, 6, 6))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    cases = ["ct_Tu00", "ct_Tu01", "ct_Tu02"]
    splits = [{"train": [c for c in cases if c != case], "val": [case]} for case in cases[:2]]
    (raw / "splits_target.json").write_text(json.dumps(splits))
    (raw / "labelsTs").mkdir()
    for case in cases[:2]:
        shutil.copy(raw / "labelsTr" / "mr_Tr00.nii.gz", raw / "labelsTs" / f"{case}.nii.gz")
    method, plans = Method("T", "T", DATASET, DATASET), {(DATASET, None): {"plans_name": "tiny"}}
    rows = plan_rows([method], plans, "2d", ["0", "1"], tmp_path / "out", "cpu", 1)
    assert [row.job.test.cases for row in rows] == [["ct_Tu00"], ["ct_Tu01"]]
    assert len({row.job.images for row in rows}) == 2 and not (tmp_path / "out").exists()


def test_nothing_made_otherwise_is_taken_for_a_part(in_workspace, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(compare, "run_jobs", lambda *_: pytest.fail("nothing must be trained"))
    words = [*WORDS, "-o", tmp_path / "o"]
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").touch()
    assert "is not empty and holds no former comparison" in refused(main, words)
    (tmp_path / "o" / "mine").unlink()
    (tmp_path / "o" / "setup.json").write_text('{"plans": "others", "configuration": "2d"}')
    assert "holds a comparison of" in refused(main, words)
    (tmp_path / "o" / "setup.json").unlink()
    trained = tmp_path / "results" / DATASET / "SourceOnlyTrainer__tiny__2d" / "plans.json"
    trained.parent.mkdir(parents=True)
    trained.write_text("{}")
    assert f"{trained} exists, and differs from what tiny now gives" in refused(main, words)


# --- engines ---------------------------------------------------------------------------------------------------------

FAKE = """
import sys, time, pathlib
job = pathlib.Path(sys.argv[1])
(job / "started").write_text(str(time.monotonic()))
print("about to work", flush=True)
if "bad" in job.name:
    sys.exit("ERROR: it broke\\nERROR: nnUNetUDA_train ended with status 1")
time.sleep(float(sys.argv[2]))
(job / "ended").write_text(str(time.monotonic()))
"""


@pytest.fixture
def fake(monkeypatch):
    """Jobs that are a few lines of Python; ``fake`` sets their duration."""
    seconds = {"": 0.3}

    def command_of(job: Job) -> list[str]:
        code = f"import os, sys\nlog = os.open({str(job.log)!r}, os.O_WRONLY | os.O_APPEND)\nos.dup2(log, 1)\n"
        return [sys.executable, "-c", code + "os.dup2(log, 2)\n" + FAKE, str(job.folder), str(seconds[""])]

    monkeypatch.setattr(engines, "command_of", command_of)
    monkeypatch.setattr(engines, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(Job, "score", lambda self: Score([], 0.5) if (self.folder / "ended").exists() else None)
    return lambda duration: seconds.update({"": duration})


def test_local_jobs_run_at_once_a_failure_stops_none_and_what_is_done_is_not_done_again(tmp_path, fake, capsys):
    fake(1.0)
    jobs = [a_job(tmp_path, name) for name in ("a", "bad", "b")]
    scores, failed, changes = {}, {}, []
    run_jobs(LocalEngine(2, "cpu"), jobs, scores, failed, lambda: changes.append(dict(scores)))
    assert set(scores) == {"a", "b"} and len(changes) == 4
    assert failed["bad"].startswith("ERROR: it broke (status 1; log: ") and str(jobs[1].log) in failed["bad"]
    read = {(job.name, what): float((job.folder / what).read_text()) for job in (jobs[0], jobs[2])
            for what in ("started", "ended")}  # fmt: skip
    assert read["b", "started"] < read["a", "ended"], "two at a time"

    fake(0.0)
    (jobs[2].folder / "ended").unlink()
    first = (jobs[0].folder / "started").read_text()
    scores, failed = {}, {}
    run_jobs(LocalEngine(1, "cpu"), jobs, scores, failed, lambda: None)
    assert set(scores) == {"a", "b"} and set(failed) == {"bad"}
    assert (jobs[0].folder / "started").read_text() == first, "not run again"
    assert "3 runs, 1 of them finished before" in capsys.readouterr().out


def test_a_local_engine_that_is_ended_leaves_nothing_running(tmp_path, fake):
    fake(60.0)
    job = a_job(tmp_path)
    engine = LocalEngine(1, "cpu")
    begun = time.monotonic()

    def started(_: Job) -> None:
        while not (job.folder / "started").exists():
            time.sleep(0.02)
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit):
            engine.run([job], started, lambda *_: None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begun < 30
    found = subprocess.run(["pgrep", "-f", str(job.folder)], capture_output=True, text=True, check=False)
    assert found.stdout == ""


def lives(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "zombie" not in status.read_text()


CHAIN = """
import os, signal, subprocess, sys, time
from nnunet_uda.workers import end_with_starter, tied
end_with_starter()
assert "NNUNET_UDA_STARTER" not in os.environ, "it is for this process alone"
depth = int(sys.argv[1])
if depth:
    child = subprocess.Popen([sys.executable, __file__, str(depth - 1)], env=tied(os.environ))
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
print(2 - depth, os.getpid(), flush=True)
child.wait() if depth else time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("killed", [0, 1])
def test_what_a_killed_process_has_started_ends_too(tmp_path, killed):
    """A command, its job and the job's training; ``killed`` is the one that SIGKILL ends."""
    (tmp_path / "chain.py").write_text(CHAIN)
    command = subprocess.Popen([sys.executable, tmp_path / "chain.py", "2"], stdout=subprocess.PIPE, text=True)
    found = dict(map(int, command.stdout.readline().split()) for _ in range(3))
    processes = [found[index] for index in range(3)]
    os.kill(processes[killed], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(lives(process) for process in processes[killed + 1 :]):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)
    command.kill()
    command.wait()


def test_jobs_and_their_trainings_are_tied_to_what_starts_them(tmp_path, fake, monkeypatch, capsys):
    seen = []
    popen = subprocess.Popen

    def note(words, env, **options):
        seen.append(env["NNUNET_UDA_STARTER"])
        return popen(words, env=env, **options)

    fake(0.0)
    monkeypatch.setattr(subprocess, "Popen", note)
    run_jobs(LocalEngine(1, "cpu"), [a_job(tmp_path)], {}, {}, lambda: None)
    a_job(tmp_path).call("true")
    spawn(2, ["true"])
    assert seen == [str(os.getpid())] * 4
    monkeypatch.setattr(Demo, "say", lambda *_: None)
    monkeypatch.setattr(subprocess, "run", lambda words, env, check: commands.append((words[0], env)) or Done(words, 0))
    commands: list[tuple[str, dict[str, str]]] = []
    run_demo(tmp_path / "demo", 0, "cpu")
    trainings = [env for command, env in commands if command.endswith("_train")]
    assert [env["NNUNET_UDA_STARTER"] for env in trainings] == [str(os.getpid())] * 3
    assert "nnUNetv2_train" not in [command for command, _ in commands], "which looks after nobody"


@pytest.mark.parametrize("module", [job, train])
def test_what_may_be_started_by_others_looks_after_them_before_all_else(monkeypatch, module):
    def looks() -> None:
        raise UDAError("it looks")

    monkeypatch.setattr(module, "end_with_starter", looks)
    monkeypatch.setattr(module, "let_find", lambda: pytest.fail("work has begun"))
    with pytest.raises(UDAError, match="it looks"):
        module.main.__wrapped__(["501", "2d", "0", "-tr", "SourceOnlyTrainer"] if module is train else ["no.json"])


def test_a_job_waits_for_the_training_that_still_holds_its_fold(tmp_path, capfd):
    code = "\n".join([
        "import pathlib, sys, time",
        "from nnunet_uda.training.interruption import fold_lock",
        "with fold_lock(pathlib.Path(sys.argv[1])):",
        "    print(flush=True)",
        "    sys.stdin.readline()",
    ])  # fmt: skip
    words = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    waiting = threading.Thread(target=wait_for_fold, args=(tmp_path,))
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive() and f"(process {holder.pid} on " in capfd.readouterr().out
    holder.communicate("\n")
    waiting.join(20)
    assert not waiting.is_alive()


def test_a_missing_device_is_said_before_anything_is_started(in_workspace, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "-device cuda is not available" in refused(main, [*WORDS, "-device", "cuda", "-o", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_each_local_job_has_its_share(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name in ("OMP_NUM_THREADS", "nnUNet_n_proc_DA", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert "OMP_NUM_THREADS" not in LocalEngine(1, "cpu").environment(0)
    assert LocalEngine(4, "cpu").environment(3)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    devices = [LocalEngine(3, "cuda").environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert devices == ["4", "6", "4"]
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert LocalEngine(2, "cpu").environment(0)["nnUNet_n_proc_DA"] == "0", "what the user has set stays"


def test_the_reason_of_a_failure(tmp_path):
    log = tmp_path / "log"
    log.write_text("ERROR: of the start before\n")
    start = log.stat().st_size
    assert last_error(log, start, "nothing") == "nothing"
    with open(log, "a") as file:
        file.write("some words\n")
    assert last_error(log, start, "nothing") == "some words"
    with open(log, "a") as file:
        file.write("torch.OutOfMemoryError: no memory\nmore\nERROR: nnUNetUDA_train ended with status 1\n")
    assert last_error(log, start, "nothing") == "torch.OutOfMemoryError: no memory"


# --- the whole road --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_stopped(in_workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["-d", "501", "-tr", "EntMinTrainer", "-p", "tiny", "-o", str(tmp_path / "out"), "-device", "cpu", "-np",
             "1", "-lower", "SourceOnlyTrainer", "-upper", "SupervisedTrainer"]  # fmt: skip
    main([*words, "-jobs", "2"])
    out = tmp_path / "out"
    content = json.loads((out / "compare.json").read_text())
    assert [run["state"] for run in content["runs"]] == ["finished"] * 3
    for run in content["runs"]:
        assert 0 <= run["dice"] <= 1 and run["training_seconds"] > 0 and 0.1 < run["peak_memory_gib"] < 50
    assert imread(out / "compare.png").std() > 0
    logs = {path: path.read_text() for path in out.glob("runs/*/log.txt")}
    assert len(logs) == 3 and all(text.count("$ nnUNetUDA_train") == 1 for text in logs.values())

    [entmin] = out.glob("runs/*EntMin*")
    (entmin / "score.json").unlink()
    main(words)
    again = {path: path.read_text() for path in logs}
    assert all(text == logs[path] for path, text in again.items() if entmin not in path.parents)
    assert again[entmin / "log.txt"].count("$ nnUNetUDA_train") == 1, "neither trained nor predicted again"
    assert again[entmin / "log.txt"].count("] predicting ") == 1 and (entmin / "score.json").exists()
    assert job.Job.read(entmin / "job.json").score() is not None
