"""The yardstick: every trainer on every task, at equal time or at equal iterations, in tables and one plot.

    python -m benchmarks.accuracy.table -o FOLDER -data $NNUNET_UDA_TEST_DATA -device cpu -jobs 2 \\
        -with docs/real_tasks.json

makes the real tasks (``tasks.py``), trains, tests, and writes table.md, table.csv, table.json, table.png into FOLDER.
The same command goes on where it was stopped, and may name other ``-tasks``, ``-tr`` and ``-seeds``; ``--only_table``
puts together what is finished, at any time.

**Equal time** (``-equal time``): every training takes the time of ``-budget`` steps of a plain network. What a step of
each trainer takes is measured on this machine once (``calibrate.py``) and kept in FOLDER/calibration.json. ``-equal
iterations``: every training has ``-budget`` steps. The bounds are the same in both; both tables are written where there
are runs of both. ``-budget 40`` tries everything in minutes.

**Variants** are further rows with settings of their own, for ablations. A name stands for its settings: with others its
runs are other ones.

    ... -variant Plain:CISFATrainer:cisfa.foreground_weight=1 Few:CISFATrainer:cisfa.patches=64,cisfa.identity_weight=1

**Records**: every line of table.json is a finished run with its settings, steps, minutes, code, machine and the scores
of every test case. ``-with`` takes such files of other days and machines: what is in them is not trained again. A run
counts whatever code trained it (the table says how many there were); ``-again TRAINER ...`` trains rows anew that the
present code did not train. Leave the code alone while this runs: every training begins with what it then finds.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

import nnunet_uda
from benchmarks.accuracy.tasks import PLANS, TASKS, add_task_arguments, chosen_tasks, make_task
from benchmarks.speed.calibrate import PLAIN, step_seconds
from nnunet_uda import dataset_conversion
from nnunet_uda.data.convention import environment_folder, is_plain_name, read_json
from nnunet_uda.demo.road import Demo
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.compare_plot import Bar, draw_comparison
from nnunet_uda.evaluation.report import jsonable, markdown_table
from nnunet_uda.evaluation.runs import find_raw_dataset
from nnunet_uda.evaluation.tables import MEAN, Spread, gap_closed, spread, summarise
from nnunet_uda.experiments.compare import LOWER, UPPER
from nnunet_uda.experiments.engines import LocalEngine, run_jobs
from nnunet_uda.experiments.job import Job, Score, find_target_test, find_trainer
from nnunet_uda.files import exclusive, whole_file, write_json
from nnunet_uda.plans import derive_plans, merge_uda
from nnunet_uda.settings import describe_settings, parse_assignment
from nnunet_uda.training.criteria import HIGHER_IS_BETTER
from nnunet_uda.training.fold import COST
from nnunet_uda.workers import as_done

BOUNDS = {LOWER: PLAIN, UPPER: "SupervisedTrainer"}
TRAINERS = ("RandomStyleTrainer", "CISFATrainer", "SimilarityPrototypesTrainer", "UUDSAdversarialTrainer",
            "CASTTrainer", "CUTTrainer")  # fmt: skip
FLAT = ("UUDSTrainer", "UUDSAdversarialTrainer")
"""2D only."""
EPOCHS = 20
SCHEDULE = {"num_epochs": EPOCHS, "val_iterations_per_epoch": 5, "save_every": 5, "picture_every": 1000}
CLIP = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
RATES = {
    "similarity_prototypes": {"generator_learning_rate": 1e-3},
    "uuds": {"clip_weights": "random", "clip_config": CLIP, "learning_rate": 5e-4, "optimizer": "adamw"},
}
"""Rates for networks this small; everything else is every trainer's default. CLIP is small and starts at random."""
MODES = {"time": "Equal time: every training takes that of {} steps of a plain network",
         "iterations": "Equal iterations: every training has {} steps"}  # fmt: skip
CRITERIA = {"pseudo_dice": True, **HIGHER_IS_BETTER}
NOTES = (
    "Dice and ASSD (mm): mean over structures, then over test cases, as in nnUNetUDA_evaluate; then mean ± sample "
    "deviation over seeds. ASSD is undefined where exactly one of prediction and reference is empty: such distances "
    "are missing from its mean and counted beside it. Gap: (run - lower) / (upper - lower) of the Dice, in percent, "
    "with the bounds' means.",
    "**Bold**: the best Dice between the bounds, and what is within noise of it: less below it than twice the standard "
    "error of the difference, with the median of the task's deviations over seeds. With one seed only the best.",
    "Minutes: processor time of a training (validation and start included) where it ran at one go on a CPU, else the "
    "epochs' durations. Steps: of that training.",
    "These are test scores: what was chosen by them must be judged on other tasks.",
)


@functools.cache
def trainer_class(name: str) -> type:
    """``find_trainer``, which loads files, once."""
    return find_trainer(name)


@dataclass(frozen=True)
class Line:
    """A line of the tables: a bound, a trainer, or a variant of one.

    Attributes:
        settings: further ones, as ``nnUNetUDA_configure -set`` takes them.
        code: only runs by this code count; empty: by any.
    """

    label: str
    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    code: str = ""

    def uda(self, task: str) -> dict[str, Any]:
        """Its settings on a task, without seed and number of iterations; sizes follow the task's network."""
        trainer, width = trainer_class(self.trainer), TASKS[task].width
        sizes = {"generator_width": width, "generator_blocks": 4, "discriminator_width": 2 * width,
                 "warmup_epochs": EPOCHS // 10}  # fmt: skip
        known = {name for name, *_ in describe_settings(trainer.method_settings)} if trainer.method_settings else {}
        own = {name: size for name, size in sizes.items() if name in known} | RATES.get(trainer.method, {})
        uda = SCHEDULE | dict(parse_assignment(text) for text in TASKS[task].settings)
        return merge_uda(uda | ({trainer.method: own} if own else {}), self.settings)


@dataclass(frozen=True)
class Run:
    """A line with one seed on one task; where the upper bound leaves scans out, a training for each of them."""

    task: str
    line: Line
    seed: int
    equal: str | None
    budget: int

    @property
    def key(self) -> tuple:
        return self.task, self.line.label, self.seed, self.equal

    def uda(self, ratio: float) -> dict[str, Any]:
        """All its settings, where a step takes ``ratio`` times a plain network's."""
        iterations = self.budget / EPOCHS / (ratio if self.equal == "time" else 1)
        return self.line.uda(self.task) | {"seed": self.seed, "iterations_per_epoch": max(1, round(iterations))}

    def jobs(self, folder: Path, device: str, ratio: float) -> list[Job]:
        """Write the plans; returns the trainings."""
        task, jobs, uda = TASKS[self.task], [], self.uda(ratio)
        steps = EPOCHS * uda["iterations_per_epoch"]
        name = f"{self.line.label.replace(' ', '_')}_{steps}_seed_{self.seed}_{digest([uda, self.line.code])}"
        upper = self.line.label == UPPER
        for number in task.bounds if upper else (task.dataset,):
            raw, fold = find_raw_dataset(str(number)), "all" if upper and len(task.bounds) > 1 else task.fold
            plans = write_plans(raw.name, task.configuration, name, uda)
            test = find_target_test(raw, fold)
            jobs.append(Job(f"{self.task}/{name}/{raw.name}", folder / "runs" / self.task / name / raw.name, raw.name,
                            task.configuration, fold, self.line.trainer, plans, test, raw / test.images, device, 1)
                        )  # fmt: skip
        return jobs


def digest(content: Any) -> str:
    """A short name of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def write_plans(dataset: str, configuration: str, name: str, uda: dict[str, Any]) -> str:
    """The task's plans with other settings, under another name; returns it."""
    folder = environment_folder("nnUNet_preprocessed") / dataset
    write_json(derive_plans(read_json(folder / f"{PLANS}.json"), configuration, name, uda), folder / f"{name}.json")
    return name


# --- what trains -----------------------------------------------------------------------------------------------------


def code_now() -> dict[str, str]:
    """A digest of the code of package, converters and trainers, and git's name of it, with a + where files differ."""
    package = Path(nnunet_uda.__file__).parent
    folders = [package, Path(dataset_conversion.__file__).parent, *os.environ["nnUNet_extTrainer"].split(os.pathsep)]
    files = {path for folder in folders for path in Path(folder).rglob("*.py")}
    content = hashlib.sha256(b"".join(sorted(path.read_bytes() for path in files))).hexdigest()[:12]
    git = subprocess.run(["git", "-C", package, "describe", "--always", "--exclude=*", "--dirty=+"], check=False,
                         capture_output=True, text=True)  # fmt: skip
    return {"code": content, "revision": git.stdout.strip()}


def machine(device: str) -> str:
    """The processor, or the CUDA device, and PyTorch's version."""
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = re.findall(r"model name\s*: (.*)", info)
        name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {os.environ['OMP_NUM_THREADS']} thread(s), torch {version('torch')}"


class RecordingEngine(LocalEngine):
    """Writes down with what code and on what machine each job was started."""

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None], done: Callable) -> None:
        def recorded(job: Job) -> None:
            path = job.folder / "starts.json"
            former = read_json(path) if path.exists() else []
            write_json([*former, code_now() | {"machine": machine(self.device)}], path)
            started(job)

        super().run(jobs, recorded, done)


def kind_of_step(run: Run) -> tuple[str, str]:
    """Runs whose steps take equally long: of one line and configuration, with or without labelled target scans."""
    task = TASKS[run.task]
    return f"{run.line.label}{' with target labels' if task.few else ''}", task.configuration


def calibrate(runs: Sequence[Run], folder: Path, device: str) -> dict[tuple[str, str], float]:
    """Times that a step of each line takes a plain network's, by label and configuration; measured where not known.

    Measured on the first of the tasks: a step takes hardly longer on other scans. Known is what was measured here with
    the same settings, by whatever code unless the line is to be trained by the present one.
    """
    path, here, ratios = folder / "calibration.json", f"{machine(device)}, {device}", {}
    known = read_json(path) if path.exists() else {}
    for run in runs:
        task, key = TASKS[run.task], kind_of_step(run)
        if run.equal != "time" or key in ratios:
            continue
        uda = run.line.uda(run.task)
        name = f"{' '.join(key)} {digest([run.line.trainer, uda])}"
        entry = known.setdefault(here, {}).get(name)
        if entry is None or run.line.code not in ("", entry["code"]):
            dataset = find_raw_dataset(str(task.dataset)).name
            base = read_json(environment_folder("nnUNet_preprocessed") / dataset / f"{PLANS}.json")
            plans = derive_plans(base, task.configuration, "Calibration", uda)
            asked = {"trainer": run.line.trainer, "dataset": dataset, "plans": plans, "fold": task.fold,
                     "configuration": task.configuration, "device": device}  # fmt: skip
            ((plain, own),) = as_done(step_seconds, [asked], 1)
            entry = {"trainer": run.line.trainer, "settings": uda, "task": run.task, "plain_seconds": plain,
                     "seconds": own, **code_now()}  # fmt: skip
            known[here][name] = entry
            write_json(known, path)
        ratios[key] = entry["seconds"] / entry["plain_seconds"]
        print(f"A step of {' in '.join(key)} takes {ratios[key]:.2f} times a plain network's "
              f"({entry['plain_seconds']:.3f} s)", flush=True)  # fmt: skip
    return ratios


def record_of(run: Run, jobs: Sequence[Job], ratio: float) -> dict[str, Any]:
    """A finished run, as table.json holds it: no folder of this machine is in it."""
    scores = [job.score() for job in jobs]
    costs = [read_json(job.trained / COST) for job in jobs]
    starts = [read_json(job.folder / "starts.json") for job in jobs]
    whole = all(len(one) == 1 for one in starts) and jobs[0].device == "cpu"
    metrics = {volume.case: {name: {metric: round(value, 4) for metric, value in of.items()}
                             for name, of in volume.metrics.items()} for score in scores for volume in score.volumes
               }  # fmt: skip
    uda = run.uda(ratio)

    def mean(values: Sequence[float]) -> float:
        return round(statistics.mean(values), 4)

    return jsonable({
        "task": run.task, "label": run.line.label, "trainer": run.line.trainer, "seed": run.seed, "equal": run.equal,
        "budget": run.budget, "settings": run.line.uda(run.task), "steps": EPOCHS * uda["iterations_per_epoch"],
        "step_ratio": round(ratio, 3), "trainings": len(jobs), "transductive": jobs[0].test.transductive,
        "minutes": mean([(cost["cpu_seconds"] if whole else score.seconds) / 60
                         for cost, score in zip(costs, scores, strict=True)]),
        "training_seconds": mean([score.seconds for score in scores]),
        "peak_memory_gib": max(score.memory for score in scores),
        "peak_device_memory_gib": max(score.device_memory for score in scores),
        **{key: sorted({start[key] for one in starts for start in one}) for key in ("code", "revision", "machine")},
        "validation_pseudo_dice": mean([score.pseudo_dice for score in scores]),
        "criteria": {name: mean([score.criteria[name] for score in scores]) for name in scores[0].criteria},
        "metrics": metrics,
    })  # fmt: skip


# --- tables ----------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> list[dict[str, Any]]:
    """The runs of a table.json.

    Raises:
        UDAError: no such file, or another one.
    """
    content = read_json(path)
    try:
        for record in content["runs"]:
            figures_of(record)
        return content["runs"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UDAError(
            f"{path} is no table.json of this command ({type(error).__name__}: {error}): check -with"
        ) from error


def figures_of(record: dict[str, Any]) -> dict[str, Any]:
    """A row of table.csv."""
    score = Score.parse(record)
    summary = summarise(score.volumes)
    of_structures = {f"{short}_{structure}": row[metric]["mean"] for structure, row in summary.items()
                     if structure != MEAN for short, metric in (("dice", "Dice"), ("assd_mm", "ASSD"))}  # fmt: skip
    names = ("task", "label", "trainer", "seed", "equal", "budget", "steps", "trainings", "transductive", "minutes")
    return {
        **{name: record[name] for name in names}, "dice": summary[MEAN]["Dice"]["mean"],
        "assd_mm": summary[MEAN]["ASSD"]["mean"], "undefined": summary[MEAN]["ASSD"]["n_undefined"],
        "pseudo_dice": score.pseudo_dice, "code": " ".join(record["code"]),
        **{f"criterion_{name}": score.criteria.get(name, math.nan) for name in CRITERIA}, **of_structures,
    }  # fmt: skip


class Records:
    """Finished runs by what they are: task, line, seed, kind of comparison, budget and settings; the last of each."""

    def __init__(self, lines: Sequence[Line], records: Sequence[dict[str, Any]] = ()) -> None:
        self.lines = {line.label: line for line in lines}
        self.all: dict[str, dict[str, Any]] = {}
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        names = ("task", "label", "seed", "equal", "budget", "settings")
        self.all[json.dumps([record[name] for name in names], sort_keys=True)] = record

    def chosen(self, tasks: Sequence[str], budget: int) -> dict[tuple, dict[str, Any]]:
        """Those that count, by ``Run.key``: of lines the ones with their settings, others as they are."""
        found, settings = {}, {}
        for record in self.all.values():
            label, task = record["label"], record["task"]
            if task not in tasks or record["budget"] != budget:
                continue
            if line := self.lines.get(label):
                if (label, task) not in settings:
                    settings[label, task] = jsonable(line.uda(task))
                if record["settings"] != settings[label, task] or line.code not in ("", *record["code"]):
                    continue
            found[task, label, record["seed"], record["equal"]] = record
        return found

    def labels(self) -> list[str]:
        """The lower bound, then lines and other records' labels, then the upper bound."""
        return [LOWER, *dict.fromkeys(label for label in [*self.lines, *(one["label"] for one in self.all.values())]
                                      if label not in BOUNDS), UPPER]  # fmt: skip


def text(cell: Spread, digits: int) -> str:
    """Mean ± deviation."""
    if not cell.n:
        return "–"
    return f"{cell.mean:.{digits}f}" + ("" if math.isnan(cell.std) else f" ± {cell.std:.{digits}f}")


def summarise_lines(runs: pd.DataFrame, labels: Sequence[str]) -> list[dict[str, Any]]:
    """A row a task and line, in the order of tasks and labels; ``best`` marks the best Dice and what is as good."""
    found = []
    for task in (name for name in TASKS if name in set(runs.task)):
        rows = []
        for label in labels:
            part = runs[(runs.task == task) & (runs.label == label)]
            if len(part):
                figures = {name: spread(part[name].tolist()) for name in ("dice", "assd_mm", "minutes", "steps")}
                rows.append({"task": task, "label": label, "runs": len(part), "undefined": part.undefined.sum(),
                             "points": part.dice.tolist(), **figures})  # fmt: skip
        bounds = {row["label"]: row["dice"].mean for row in rows if row["label"] in BOUNDS}
        between = [row for row in rows if row["label"] not in BOUNDS]
        best = max(between, key=lambda row: row["dice"].mean, default=None)
        deviations = [row["dice"].std for row in between if not math.isnan(row["dice"].std)]
        deviation = statistics.median(deviations) if deviations else 0.0
        for row in rows:
            apart = row["label"] in BOUNDS
            shares = [gap_closed(dice, bounds.get(LOWER, math.nan), bounds.get(UPPER, math.nan), "Dice")[0]
                      for dice in row["points"]]  # fmt: skip
            row["gap"] = spread([] if apart else shares)
            noise = 2 * deviation * math.sqrt(1 / row["runs"] + 1 / best["runs"]) if best else 0.0
            row["best"] = not apart and row["dice"].mean >= best["dice"].mean - noise
        found += rows
    return found


def marked(row: dict[str, Any]) -> str:
    return f"**{text(row['dice'], 3)}**" if row["best"] else text(row["dice"], 3)


def mode_tables(mode: str, budget: int, rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[str]:
    """Heading, overview and the table with a line for each trainer and task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = {(row["label"], row["task"]): marked(row) + (f" ({row['gap'].mean:.0f} %)" if row["gap"].n else "")
             for row in rows}  # fmt: skip
    shown = [label for label in labels if any(label == row["label"] for row in rows)]
    overview = [[label, *(cells.get((label, task), "–") for task in tasks)] for label in shown]
    whole = []
    for row in rows:
        undefined = f" ({row['undefined']} undefined)" if row["undefined"] else ""
        whole.append([row["task"], row["label"], marked(row), text(row["assd_mm"], 2) + undefined, text(row["gap"], 1),
                      f"{row['minutes'].mean:.1f}", f"{row['steps'].mean:.0f}", row["runs"]])  # fmt: skip
    header = ["task", "trainer", "Dice", "ASSD (mm)", "gap (%)", "minutes", "steps", "seeds"]
    return [
        f"## {MODES[mode].format(budget)}",
        markdown_table({"caption": "Dice (share of the gap)", "header": ["trainer", *tasks], "rows": overview}),
        markdown_table({"caption": "Every trainer and task", "header": header, "rows": whole}),
    ]


def criteria_table(runs: pd.DataFrame) -> str:
    """How the criteria without labels order a task's runs, by Spearman's correlation with the Dice on the target."""
    runs = runs[runs.label != UPPER]  # trained on target labels
    tasks = [name for name in TASKS if name in set(runs.task)]
    rows = []
    for name, higher in CRITERIA.items():
        row = []
        for task in tasks:
            pairs = runs[runs.task == task][[f"criterion_{name}", "dice"]].astype(float).dropna()
            rank = pairs.corr("spearman").iloc[0, 1] * (1 if higher else -1) if len(pairs) > 2 else math.nan
            row.append("–" if math.isnan(rank) else f"{rank:.2f} ({len(pairs)} runs)")
        rows.append([name, *row])
    caption = "Rank correlation of the criteria without labels with the Dice, over last checkpoints"
    return markdown_table({"caption": caption, "header": ["criterion", *tasks], "rows": rows})


def task_notes(runs: pd.DataFrame) -> str:
    """What each task is tested on, and what its upper bound is trained on."""
    lines = []
    for name, task in TASKS.items():
        part = runs[runs.task == name]
        if not len(part):
            continue
        words = [f"{'phantom, ' if task.made else ''}{task.source} to {task.target}"]
        unlabelled = bool(part[part.label != UPPER].transductive.any())
        words.append("tested on the very scans that training sees without their labels" if unlabelled
                     else "tested on scans that no training sees")  # fmt: skip
        if task.few:
            words.append(f"{task.few} target scan(s) labelled for training")
        elif len(task.bounds) > 1:
            joined = " and the labelled source" if len(task.bounds) == 2 else ""
            words.append(f"upper bound: trained on the other target scan(s){joined}, for each in turn")
        elif not task.bounds:
            words.append("no upper bound: no labelled target scan is left to train on")
        lines.append(f"- {name}: {'; '.join(words)}.")
    return "\n".join(lines)


def write_table(folder: Path, records: Records, tasks: Sequence[str], budget: int, plot: bool = True) -> str:
    """table.md, table.csv and table.png of the tasks' finished runs, and all in table.json; returns the Markdown.

    Raises:
        UDAError: nothing is finished.
    """
    labels = records.labels()
    order = {name: place for place, name in enumerate([*TASKS, *labels])}

    def place(record: dict[str, Any]) -> tuple:
        return order.get(record["task"], -1), order[record["label"]], str(record["equal"]), record["seed"]

    chosen = sorted(records.chosen(tasks, budget).values(), key=place)
    if not chosen:
        raise UDAError(f"{folder} holds no finished run of these tasks with this budget yet")
    runs = pd.DataFrame([figures_of(record) for record in chosen])
    blocks, plotted = ["# Trainers on tasks"], None
    only_bounds = runs.equal.isna().all()
    for mode in MODES:
        if (runs.equal == mode).any() or (only_bounds and mode == "time"):
            rows = summarise_lines(runs[runs.equal.isna() | (runs.equal == mode)], labels)
            blocks += mode_tables(mode, budget, rows, labels)
            plotted = plotted or (mode, rows)
    codes = sorted({code for record in chosen for code in record["code"]})
    others = sum(record["task"] in tasks for record in records.all.values()) - len(chosen)
    blocks += [criteria_table(runs), task_notes(runs), *NOTES,
               f"Trained by {len(codes)} state(s) of the code. {others} finished run(s) of these tasks with other "
               "settings or another budget are left out."]  # fmt: skip
    markdown = "\n\n".join(blocks) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "table.md") as temporary:
        temporary.write_text(markdown, encoding="utf-8")
    with whole_file(folder / "table.csv") as temporary:
        runs.to_csv(temporary, index=False)
    with whole_file(folder / "table.json") as temporary:
        whole = ",\n".join(map(json.dumps, sorted(records.all.values(), key=place)))
        temporary.write_text(f'{{"runs": [\n{whole}\n]}}\n', encoding="utf-8")
    if plot:
        mode, rows = plotted
        bars = [Bar(row["task"], row["label"], row["dice"], row["assd_mm"], row["points"]) for row in rows]
        draw_comparison(folder / "table.png", bars, MODES[mode].format(budget))
    return markdown


# --- the command -----------------------------------------------------------------------------------------------------


def parse_variant(text: str) -> Line:
    """``NAME:TRAINER:key=value,key=value``.

    Raises:
        UDAError: it is none.
    """
    parts = text.split(":", 2)
    if len(parts) < 2 or not is_plain_name(parts[0]) or not parts[1]:
        raise UDAError(f"-variant takes NAME:TRAINER:KEY=VALUE,KEY=VALUE, found {text!r}")
    words = re.split(r",(?=[\w.]+=)", parts[2]) if len(parts) == 3 and parts[2] else []
    return Line(parts[0], parts[1], dict(map(parse_assignment, words)))


def chosen_lines(args: argparse.Namespace) -> list[Line]:
    """Lower bound, trainers, variants, upper bound.

    Raises:
        UDAError: a name is given twice, or ``-again`` names no line.
    """
    lines = [Line(name, name) for name in args.tr] + [parse_variant(text) for text in args.variant]
    lines = [Line(LOWER, BOUNDS[LOWER]), *lines, Line(UPPER, BOUNDS[UPPER])]
    labels = [line.label for line in lines]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice or set(args.again) - set(labels):
        raise UDAError(f"-tr, -variant, -again: expected every name once and known, found {', '.join(labels)}; "
                       f"-again {' '.join(args.again)}")  # fmt: skip
    now = code_now()["code"] if args.again else ""
    return [Line(line.label, line.trainer, line.settings, now if line.label in args.again else "") for line in lines]


def planned(tasks: Sequence[str], lines: Sequence[Line], args: argparse.Namespace) -> list[Run]:
    """All runs that are asked for, the first seed of every task before the others."""
    runs = []
    for place in range(max(len(args.seeds or TASKS[name].seeds) for name in tasks)):
        for name in tasks:
            task, seeds = TASKS[name], args.seeds or TASKS[name].seeds
            for line in lines if place < len(seeds) else ():
                if line.label in BOUNDS and task.few:  # they are those of the task without
                    continue
                if (line.label == UPPER and not task.bounds) or (task.configuration != "2d" and line.trainer in FLAT):
                    continue
                modes = [None] if line.label in BOUNDS else args.equal
                runs += [Run(name, line, seeds[place], mode, args.budget) for mode in modes]
    return runs


def train(runs: Sequence[Run], args: argparse.Namespace, folder: Path, finished: Callable[[dict], object]) -> None:
    """Make the tasks, train and test; ``finished`` is called with the record of each run.

    Raises:
        UDAError: a run failed; the others were trained.
    """
    data = args.data and args.data.resolve()
    for name in dict.fromkeys(run.task for run in runs):
        make_task(name, folder, 0, data, args.np)
    ratios = calibrate(runs, folder, args.device)
    waiting = []
    for run in runs:
        ratio = ratios.get(kind_of_step(run), 1.0)
        waiting.append((run, ratio, run.jobs(folder, args.device, ratio)))
    scores: dict[str, Score] = {}
    failed: dict[str, str] = {}

    def changed() -> None:
        for entry in [entry for entry in waiting if all(job.name in scores for job in entry[2])]:
            waiting.remove(entry)
            run, ratio, own = entry
            record = record_of(run, own, ratio)
            write_json(record, own[0].folder.parent / "record.json")
            finished(record)

    jobs = [job for _, _, own in waiting for job in own]
    run_jobs(RecordingEngine(args.jobs, args.device), jobs, scores, failed, changed)
    changed()
    if failed:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise UDAError(f"{len(failed)} training(s) failed; the same command tries them again, and only them:{listed}")


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    parser.add_argument("-tr", nargs="*", default=list(TRAINERS), metavar="TRAINER",
                        help=f"between the bounds [{' '.join(TRAINERS)}]")  # fmt: skip
    parser.add_argument("-variant", nargs="+", default=[], metavar="NAME:TRAINER:KEY=VALUE,...", help="further lines")
    parser.add_argument("-equal", nargs="+", choices=MODES, default=["time"], help="what to train [time]")
    parser.add_argument("-budget", type=int, default=2000, help="in steps of a plain network [2000]")
    parser.add_argument("-seeds", nargs="+", type=int, help="[three on heart and brain, two elsewhere]")
    parser.add_argument("-again", nargs="+", default=[], metavar="TRAINER", help="train lines anew that another state "
                        "of the code trained")  # fmt: skip
    parser.add_argument("-device", default="cuda", help="cpu, cuda or mps [cuda]")
    parser.add_argument("-jobs", type=int, default=1, help="trainings at a time [1]")
    parser.add_argument("--only_table", action="store_true", help="train nothing")
    parser.add_argument("-with", dest="recorded", nargs="+", type=Path, default=[], metavar="RECORDED.json",
                        help="table.json of other days and machines, whose runs are not trained again")  # fmt: skip
    args = parser.parse_args(argv)
    if args.budget < EPOCHS or args.jobs < 1:
        raise UDAError(f"-budget must be at least {EPOCHS} and -jobs 1, found {args.budget} and {args.jobs}")
    folder, tasks = args.o.resolve(), chosen_tasks(args)
    own, further = Demo(folder).variables, os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)
    trainers = dict.fromkeys([own["nnUNet_extTrainer"], *filter(None, further)])  # the user's own, too
    os.environ.update(own | {"nnUNet_extTrainer": os.pathsep.join(trainers)})
    for name, value in (("OMP_NUM_THREADS", "1"), ("nnUNet_n_proc_DA", "0")):
        os.environ.setdefault(name, value)
    lines = chosen_lines(args)
    finished_runs = sorted(folder.glob("runs/*/*/record.json"), key=lambda path: path.stat().st_mtime_ns)
    own = [read_json(path) for path in finished_runs]
    shown = {line.label: line for line in [*(Line(name, name) for name in TRAINERS), *lines]}
    records = Records(list(shown.values()), [*(one for path in args.recorded for one in read_records(path)), *own])

    def finished(record: dict[str, Any]) -> None:
        records.add(record)
        write_table(folder, records, tasks, args.budget, plot=False)

    if not args.only_table:
        done = records.chosen(tasks, args.budget)
        with exclusive(folder):
            train([run for run in planned(tasks, lines, args) if run.key not in done], args, folder, finished)
    print(write_table(folder, records, tasks, args.budget))


if __name__ == "__main__":
    main()
