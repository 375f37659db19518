"""The table of all trainers on all tasks: what is run, and how finished runs of several seeds come together."""

from __future__ import annotations

import csv
import math
import sys

import pytest
from conftest import REPOSITORY

from nnunet_uda.evaluation.metrics import METRICS
from nnunet_uda.evaluation.runs import Labels
from nnunet_uda.experiments.job import Job, TargetTest
from nnunet_uda.files import write_json


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    for name in ("table", "tasks", "criteria"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.setenv(name, "")  # put back what the script sets
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    import table

    return table


def finish(folder, seed: int, dataset: str, test: str, trainer: str, dice: float, group: str = "phantom",
           **criteria: float) -> Job:  # fmt: skip
    """A finished run with nnU-Net's folders below ``folder/seed_N``."""
    root = folder / f"seed_{seed}"
    cases = TargetTest(["x"], root / "labelsTs", Labels({"left": 1}, None, ".nii.gz"), None, group == "totalseg")
    name = f"{test}__{trainer}__fold_0"
    job = Job(name, root / f"compare_{group}" / "runs" / name, dataset, "2d", "0", trainer, "P", cases, root, "cpu", 1)
    trained = root / "nnUNet_results" / dataset / f"{trainer}__P__2d" / "fold_0"
    predictions = job.folder / "predictions"
    for path in (trained / "checkpoint_final.pth", predictions / "x.nii.gz", cases.reference / "x.nii.gz"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # runs share the reference, whose time of change they know
            path.write_bytes(b"as it is")

    def stamp(path):
        return [path.stat().st_size, path.stat().st_mtime_ns]

    checkpoint = {"checkpoint": stamp(trained / "checkpoint_final.pth")}
    write_json(checkpoint, predictions / "made_from.json")
    content = {
        "made_from": {**checkpoint, "references": {"x": stamp(cases.reference / "x.nii.gz")}},
        "validation_pseudo_dice": 0.5, "training_seconds": 60.0, "criteria": criteria,
        "metrics": {"x": {"left": dict(zip(METRICS, (dice, 2.0, 4.0), strict=True))}},
    }  # fmt: skip
    job.write()
    write_json(content, job.folder / "score.json")
    return job


BACK = "Dataset502_PhantomBack"
PHANTOM, UPPER, PAIR = "Dataset501_Phantom", "Dataset511_PhantomSupervised", "Dataset521_TotalSegCT2MR"


def test_seeds_and_tasks_come_together(table, tmp_path, capsys):
    for seed, lower, cisfa in ((0, 0.2, 0.6), (1, 0.4, 0.8)):
        finish(tmp_path, seed, PHANTOM, PHANTOM, "SourceOnlyTrainer", lower)
        finish(tmp_path, seed, PHANTOM, PHANTOM, "CISFATrainer", cisfa)
    finish(tmp_path, 0, UPPER, PHANTOM, "SupervisedTrainer", 0.9)
    finish(tmp_path, 0, PAIR, PAIR, "CASTTrainer", 0.25, "totalseg")
    unfinished = finish(tmp_path, 1, PHANTOM, PHANTOM, "CASTTrainer", 0.7)
    (unfinished.folder / "score.json").unlink()
    table.main(["-o", str(tmp_path), "--only_table", "-seeds", "0", "1"])

    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    overview = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
                for line in text.split("\n\n")[1].splitlines()[1:]}  # fmt: skip
    # lower bound 0.3 and upper 0.9 over all seeds: 0.6 and 0.8 close 50 and 83.3 percent
    assert overview["lower bound"] == ["0.300 ± 0.141", "–"]
    assert overview["CISFATrainer"] == ["0.700 ± 0.141 (67 %)", "–"]
    assert overview["CASTTrainer"] == ["–", "0.250"] and overview["upper bound"] == ["0.900", "–"]
    assert "EntMinTrainer" not in overview
    assert "upper bound: SupervisedTrainer on Dataset511_PhantomSupervised" in text and "| 1 of 2" in text
    assert "lower bound: SourceOnlyTrainer on" not in text
    assert text.count("Transductive") == 1
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["test"], row["label"], row["seed"]) for row in rows]
    assert found == [
        ("phantom_mr2ct", "lower bound", "0"), ("phantom_mr2ct", "lower bound", "1"),
        ("phantom_mr2ct", "CISFATrainer", "0"), ("phantom_mr2ct", "CISFATrainer", "1"),
        ("phantom_mr2ct", "upper bound", "0"), ("totalseg", "CASTTrainer", "0"),
    ]  # fmt: skip
    assert float(rows[3]["gap_closed_percent"]) == pytest.approx(250 / 3)
    assert (tmp_path / "table.png").stat().st_size > 1000


def test_criteria_are_ranked_against_the_target_without_the_upper_bounds(table, tmp_path):
    runs = {"SourceOnlyTrainer": (0.2, {"pseudo_dice": 0.9}),
            "EntMinTrainer": (0.3, {"agreement": 0.5, "entropy": 0.1}),
            "CUTTrainer": (0.5, {"agreement": 0.7, "entropy": 0.2, "pseudo_dice": 0.8}),
            "CISFATrainer": (0.7, {"agreement": 0.8, "entropy": 0.4, "pseudo_dice": 0.7})}  # fmt: skip
    for trainer, (dice, criteria) in runs.items():
        finish(tmp_path, 0, PHANTOM, PHANTOM, trainer, dice, **criteria)
    finish(tmp_path, 0, UPPER, PHANTOM, "SupervisedTrainer", 0.9, agreement=0.0, entropy=0.9, pseudo_dice=1.0)
    table.main(["-o", str(tmp_path), "--only_table", "-seeds", "0"])
    for text in ((tmp_path / "table.md").read_text(), again(table, tmp_path)):
        ranked = text[text.index("Rank correlation of the criteria") :]
        cells = {line.split("|")[1].strip(): line.split("|")[2].strip()
                 for line in ranked.splitlines() if line.startswith("|")}  # fmt: skip
        assert cells["agreement"] == "1.00 (3 runs)" and cells["entropy"] == "-1.00 (3 runs)"
        assert cells["pseudo_dice"] == "-1.00 (3 runs)" and cells["snd"] == "–"


def again(table, folder) -> str:
    """The tables of a folder's records alone."""
    table.main(["-o", str(folder / "again"), "--only_table", "-with", str(folder / "table.json")])
    return (folder / "again" / "table.md").read_text()


def test_recorded_runs_of_another_machine_join_the_table(table, tmp_path, capsys):
    there, here = tmp_path / "there", tmp_path / "here"
    for seed, dice in ((0, 0.2), (1, 0.4)):
        finish(there, seed, PHANTOM, PHANTOM, "SourceOnlyTrainer", dice)
    finish(there, 0, PHANTOM, PHANTOM, "CISFATrainer", 0.6)
    finish(there, 0, UPPER, PHANTOM, "SupervisedTrainer", 0.9)
    finish(there, 0, PAIR, PAIR, "CASTTrainer", math.nan, "totalseg")
    table.main(["-o", str(there), "--only_table", "-seeds", "0", "1"])
    recorded = there / "table.json"
    assert str(tmp_path) not in recorded.read_text()
    finish(here, 0, PHANTOM, PHANTOM, "CISFATrainer", 0.7)  # counts instead of its record
    capsys.readouterr()
    table.main(["-o", str(here), "--only_table", "-groups", "phantom", "-seeds", "0", "-with", str(recorded)])

    text = capsys.readouterr().out
    overview = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
                for line in text.split("\n\n")[1].splitlines()[1:]}  # fmt: skip
    assert overview["lower bound"] == ["0.300 ± 0.141", "–"] and overview["upper bound"] == ["0.900", "–"]
    assert overview["CISFATrainer"] == ["0.700 (67 %)", "–"] and overview["CASTTrainer"] == ["–", "–"]
    assert "upper bound: SupervisedTrainer on Dataset511_PhantomSupervised" in text and text.count("Transductive") == 1
    with open(here / "table.csv", newline="") as file:
        rows = {(row["test"], row["label"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 5 and rows["phantom_mr2ct", "lower bound", "1"]["assd_mm_left"] == "2.0"
    # what was put together can be handed on, nothing lost
    table.main(["-o", str(tmp_path / "third"), "--only_table", "-with", str(here / "table.json")])
    assert (tmp_path / "third" / "table.json").read_text() == (here / "table.json").read_text()


def test_what_is_recorded_is_not_trained_again(table, tmp_path, monkeypatch):
    there, here, made, ran = tmp_path / "there", tmp_path / "here", [], []
    finish(there, 0, PHANTOM, PHANTOM, "SourceOnlyTrainer", 0.2)
    finish(there, 0, PHANTOM, PHANTOM, "CISFATrainer", 0.6)
    for test in (PHANTOM, BACK):  # of the other direction all of the second seed
        finish(there, 0, UPPER, PHANTOM, "SupervisedTrainer", 0.9)
        finish(there, 1, test, test, "CISFATrainer", 0.6)
        finish(there, 1, test, test, "CASTTrainer", 0.6)
    finish(there, 1, BACK, BACK, "SourceOnlyTrainer", 0.6)
    finish(there, 1, "Dataset512_PhantomBackSupervised", BACK, "SupervisedTrainer", 0.6)
    table.main(["-o", str(there), "--only_table", "-seeds", "0", "1"])
    monkeypatch.setattr(table, "make_task", lambda name, folder, *_: made.append((name, folder.name)))
    monkeypatch.setattr(table.Demo, "run", lambda demo, *words, **_: ran.append((demo.folder.name, words)))
    table.main(["-o", str(here), "-groups", "phantom", "-seeds", "0", "1", "-tr", "CISFATrainer", "CASTTrainer",
                "-with", str(there / "table.json")])  # fmt: skip
    assert made == [("phantom_mr2ct", "seed_0"), ("phantom_ct2mr", "seed_0"), ("phantom_mr2ct", "seed_1")]
    compared = [(folder, words) for folder, words in ran if words[0] == "nnUNetUDA_compare"]
    assert [folder for folder, _ in compared] == ["seed_0", "seed_0", "seed_1"]

    def of(words, option):
        rest = words[words.index(option) + 1 :] if option in words else ()
        return list(rest[: next((i for i, word in enumerate(rest) if word.startswith("-")), None)])

    asked = [[of(words, option) for option in ("-d", "-tr", "-lower", "-upper")] for _, words in compared]
    both = ["CISFATrainer", "CASTTrainer"]
    assert asked == [
        [["501"], ["CASTTrainer"], [], []],
        [["502"], both, ["SourceOnlyTrainer"], ["SupervisedTrainer:512"]],
        [["501"], ["SourceOnlyTrainer"], [], ["SupervisedTrainer:511"]],  # the bounds alone
    ]
    configured = [of(words, "-d") for _, words in ran if words[0] == "nnUNetUDA_configure"]
    assert configured == [["501"], ["502"], ["512"], ["501"], ["511"]]


@pytest.mark.parametrize("content", ["[]", '{"runs": [{"test": "phantom_mr2ct"}]}', '{"means": []}'])
def test_a_file_of_another_kind_is_no_record(table, tmp_path, capsys, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(SystemExit):
        table.main(["-o", str(tmp_path / "out"), "--only_table", "-with", str(tmp_path / "other.json")])
    assert "other.json is no table.json of this command" in capsys.readouterr().err


def test_every_comparison_with_one_schedule_for_all_trainers(table, tmp_path, monkeypatch):
    made, ran = [], []
    monkeypatch.setattr(table, "make_task", lambda name, folder, seed, *more: made.append((name, folder.name, seed)))

    def run(demo, *words, **_):
        ran.append((demo.folder.name, words))
        if words[0] == "nnUNetUDA_compare":
            finish(tmp_path, int(demo.folder.name[-1]), PHANTOM, PHANTOM, "CASTTrainer", 0.5)

    monkeypatch.setattr(table.Demo, "run", run)
    table.main(["-o", str(tmp_path), "-seeds", "4", "5", "-tr", "CASTTrainer", "-data", str(tmp_path), "-jobs", "2"])
    phantoms = ("phantom_mr2ct", "phantom_ct2mr")
    assert made[:8] == [(name, "seed_4", 4) for name in phantoms] * 4  # with both schedules, and in 3D
    assert made[-6:] == [(name, "seed_5", 5) for name in phantoms] * 3
    assert [(name, folder) for name, folder, _ in made[8:-6]] == [
        (name, "seed_0") for pair in (("brain_t12t2", "brain_t22t1"), ("vs", "vs_back"), ("totalseg", "totalseg_back"))
        for name in pair * 2
    ]  # fmt: skip
    compared = [words for _, words in ran if words[0] == "nnUNetUDA_compare"]
    assert len(compared) == 17
    bounds = [words[words.index("-upper") + 1] if "-upper" in words else None for words in compared]
    assert bounds == [
        f"SupervisedTrainer:{i}" if i else None
        for i in (511, None, 511, 511, 533, 533, 534, 523, None, 523, *4 * [None], 511, None, 511)
    ]
    assert all("-jobs" in words and words[words.index("-tr") + 1] == "CASTTrainer" for words in compared)
    configured = [words[words.index("-set") + 1 :] for _, words in ran if words[0] == "nnUNetUDA_configure"]
    of_task = ("seed", "iterations", "foreground")
    schedules = {tuple(w for w in words if not w.startswith(of_task) and "_width" not in w) for words in configured}
    assert len(configured) == 5 * 4 + 2 * 2 + 4 + 4 + 2 * (2 + 1 + 2) and len(schedules) == 1


def test_the_longer_schedule_is_cast_s_alone(table, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(table, "make_task", lambda *_: None)
    monkeypatch.setattr(table.Demo, "run", lambda demo, *words, **_: ran.append(words))
    finish(tmp_path, 3, PHANTOM, PHANTOM, "CASTTrainer", 0.5, "phantom_long")
    table.main(["-o", str(tmp_path), "-groups", "phantom", "phantom_long", "-seeds", "3"])
    short, long = (words for words in ran if words[0] == "nnUNetUDA_compare")
    assert list(long[long.index("-tr") + 1 : long.index("-f")]) == ["CASTTrainer"]
    assert list(short[short.index("-tr") + 1 : short.index("-f")]) == list(table.TRAINERS)
    iterations = [next(w for w in words if "iterations_per_epoch" in w) for words in ran if "-set" in words]
    assert iterations == ["iterations_per_epoch=100"] * 4 + ["iterations_per_epoch=180"] * 2
    assert all("foreground_oversampling=0" in words for words in ran if "-set" in words)
    ran.clear()
    table.main(["-o", str(tmp_path), "-groups", "phantom_long", "-seeds", "3", "-tr", "CASTTrainer", "MyTrainer"])
    assert ran[-1][ran[-1].index("-tr") + 1 : ran[-1].index("-f")] == ("CASTTrainer", "MyTrainer")
    ran.clear()
    with pytest.raises(SystemExit):
        table.main(["-o", str(tmp_path), "-groups", "phantom_long", "-seeds", "3", "-tr", "CUTTrainer"])
    assert not ran


@pytest.mark.parametrize(("group", "datasets"), [
    ("phantom_styles", ("501", "502")), ("brain_styles", ("531", "532")), ("totalseg_styles", ("521", "524")),
])  # fmt: skip
def test_random_styles_alone_get_the_time_of_cisfa_s_steps(table, tmp_path, monkeypatch, group, datasets):
    ran = []
    monkeypatch.setattr(table, "make_task", lambda *_: None)
    monkeypatch.setattr(table.Demo, "run", lambda demo, *words, **_: ran.append(words))
    finish(tmp_path, 3, PHANTOM, PHANTOM, "RandomStyleTrainer", 0.5)
    table.main(["-o", str(tmp_path), "-groups", group, "phantom", "-seeds", "3", "-data", str(tmp_path)])
    (compared,) = (words for words in ran if words[0] == "nnUNetUDA_compare" and "nnUNetPlansTableStyles" in words)
    assert compared[1 : compared.index("-tr")] == ("-d", *datasets)
    assert compared[compared.index("-tr") + 1 : compared.index("-f")] == ("RandomStyleTrainer",)
    iterations = {next(w for w in words if "iterations_per_epoch" in w) for words in ran
                  if "nnUNetPlansTableStyles" in words and "-set" in words}  # fmt: skip
    usual = table.GROUPS[group.removesuffix("_styles")].iterations
    assert iterations == {f"iterations_per_epoch={5 * usual}"}


def test_in_3d_the_same_scans_are_preprocessed_once_and_what_is_2d_only_is_left_out(table, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(table, "make_task", lambda *_: (tmp_path / "seed_3").mkdir(exist_ok=True))
    monkeypatch.setattr(table.Demo, "run", lambda demo, *words, **_: ran.append(words))
    finish(tmp_path, 3, PHANTOM, PHANTOM, "CASTTrainer", 0.5, "phantom_3d")
    for _ in range(2):
        table.main(["-o", str(tmp_path), "-groups", "phantom_3d", "-seeds", "3"])
    preprocessed = [words[:-2] for words in ran if "preprocess" in words[0]]
    assert preprocessed == [
        ("nnUNetv2_preprocess", "-d", "501", "511", "-c", "3d_fullres"),
        ("nnUNetUDA_preprocess", "-d", "501", "-c", "3d_fullres"),
        ("nnUNetv2_preprocess", "-d", "502", "512", "-c", "3d_fullres"),
        ("nnUNetUDA_preprocess", "-d", "502", "-c", "3d_fullres"),
    ]
    (compared,) = {tuple(words) for words in ran if words[0] == "nnUNetUDA_compare"}
    assert compared[compared.index("-c") + 1] == "3d_fullres" and "CASTTrainer" in compared
    assert not any(word.startswith("UUDS") for word in compared)
    assert "phantom_mr2ct_3d" in (tmp_path / "table.md").read_text()


def test_every_task_is_compared_in_2d_and_in_3d(table):
    whole = {"2d": set(table.TRAINERS), "3d_fullres": set(table.TRAINERS) - set(table.FLAT)}
    for name in table.TASKS:
        groups = [group for group in table.GROUPS.values() if name in group.tasks and group.bounds]
        assert [group.configuration for group in groups if set(group.trainers) == whole[group.configuration]] == [
            "2d", "3d_fullres",
        ]  # fmt: skip
    assert len(set(table.TESTS)) == len(table.TESTS)  # no task's runs pass for another group's


def test_no_finished_run_is_said(table, tmp_path, capsys):
    with pytest.raises(SystemExit):
        table.main(["-o", str(tmp_path), "--only_table"])
    assert "holds no finished run yet" in capsys.readouterr().err and not list(tmp_path.iterdir())
