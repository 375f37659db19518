"""A trainer at several values of settings: plan the runs, and show how the target's scores depend on the values."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import SPLITS_TARGET, environment_folder
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation.report import DIGITS, markdown_table, mean_cell, write_rows
from nnunet_uda.evaluation.runs import find_raw_dataset
from nnunet_uda.evaluation.sweep_plot import Point, draw_sweeps
from nnunet_uda.evaluation.tables import spread
from nnunet_uda.experiments.engines import Engine, run_jobs
from nnunet_uda.experiments.grid import check_output, check_run, figures_of, missing_runs, over_runs, settings_in_force
from nnunet_uda.experiments.job import (
    TRANSDUCTIVE,
    Job,
    Score,
    TargetTest,
    find_target_test,
    find_trainer,
    lay_out_images,
)
from nnunet_uda.files import exclusive, write_json, write_text
from nnunet_uda.foreign_plans import read_plans
from nnunet_uda.methods import check_uda
from nnunet_uda.names import check_name
from nnunet_uda.plans import derive_plans, merge_uda
from nnunet_uda.settings import parse_assignment
from nnunet_uda.training.criteria import HIGHER_IS_BETTER

SWEEP = "sweep.json"
WARNING = (
    "Dice and ASSD here are measured with the labels of the target's test cases. Do not choose a setting by them: the "
    "result would no longer be unsupervised, and its score on these cases no longer a test."
)
CRITERIA = (
    "The other columns need no target label (↑: higher is better, ↓: lower is better). Agreement: Dice between the "
    "segmentations of an unlabelled target patch and of the same patch darkened and mirrored, a running mean over the "
    "last epochs, as checkpoint_best follows it; likewise the other criteria. If a setting is chosen here, then by "
    "agreement: on the phantom its rank correlation with the target's Dice was 0.83, that of validation pseudo Dice, "
    "which is measured on source patches as the trainer shows them to the segmenter, 0.26. None of them is a Dice on "
    "the target: label a few scans before you trust a choice."
)
CELLS = (
    "Every run's figure is the mean over structures and then over test cases, as in nnUNetUDA_evaluate. Cells: mean ± "
    "sample standard deviation over seeds; n: seeds. ASSD is undefined, and missing from its mean, where exactly one "
    "of prediction and reference is empty: such distances are counted beside it."
)


@dataclass(frozen=True)
class PlannedRun:
    """Plans of their own name, the settings' differences from the sweep's plans, and the seed."""

    name: str
    plans: dict[str, Any]
    seed: int | None


@dataclass(frozen=True)
class Value:
    """One value of a swept setting and the names of its runs, one a seed."""

    value: Any
    text: str
    in_plans: bool
    runs: list[str]


@dataclass(frozen=True)
class Sweep:
    """A sweep as it is planned; nothing is written yet.

    Attributes:
        out: its folder.
        setup: dataset, configuration, fold, trainer and plans: what tells one sweep from another.
        values: of each setting that varies.
        runs: by name, in the order of training.
    """

    out: Path
    setup: dict[str, str]
    test: TargetTest
    values: dict[str, list[Value]]
    runs: dict[str, PlannedRun]


# --- what to train ---------------------------------------------------------------------------------------------------


def plan_sweep(
    out: Path,
    dataset: str,
    trainer: str,
    plans_name: str,
    configuration: str,
    fold: str,
    vary: list[list[str]],
    seeds: list[int] | None,
) -> Sweep:
    """Plan and check the runs of a sweep.

    Args:
        dataset: id or name.
        vary: for each setting its name and values, as words.
        seeds: with each of which every run is trained; None: the one of the plans.

    Raises:
        UDAError: for bad arguments, and a folder, plans or results that were made otherwise.
    """
    environment_folder("nnUNet_results")
    raw = find_raw_dataset(dataset)
    base = read_plans(environment_folder("nnUNet_preprocessed") / raw.name, plans_name)
    values, runs = plan_runs(base, plans_name, configuration, find_trainer(trainer), vary, seeds)
    setup = {"dataset": raw.name, "configuration": configuration, "fold": fold, "trainer": trainer,
             "plans": plans_name}  # fmt: skip
    test = find_target_test(raw, fold)
    check_output(out, SWEEP, setup, "sweep")
    for run in runs.values():
        check_run(raw.name, trainer, run.plans, configuration, plans_name)
    return Sweep(out, setup, test, values, runs)


def value_text(value: Any) -> str:
    """A value for tables and names: 1.0 and 1 are the same."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def plan_runs(
    base: dict[str, Any],
    name: str,
    configuration: str,
    trainer: type[Any],
    vary: list[list[str]],
    seeds: list[int] | None,
) -> tuple[dict[str, list[Value]], dict[str, PlannedRun]]:
    """List the values of each setting and the runs they need, by name and in the order of training.

    A run's plans state only what differs from ``base``, so that equal settings are one run, in every sweep.

    Raises:
        UDAError: for everything ``nnUNetUDA_configure`` refuses, a setting that the trainer does not read or fixes,
            a setting or a value given twice.
    """
    uda = base.get("uda", {})
    check_uda(uda, f"plans {name!r}, key 'uda'")
    before = settings_in_force(trainer, uda, f"plans {name!r}, key 'uda'")
    sweeps: dict[str, list[Value]] = {}
    for setting, *texts in vary:
        method, _, key = setting.rpartition(".")
        if setting in sweeps:
            raise UDAError(f"-vary {setting} is given twice: put all its values behind one -vary")
        if setting == "seed":
            raise UDAError("-vary seed: give the seeds with -seeds")
        if method not in ("", trainer.method):
            raise UDAError(f"-vary {setting}: {trainer.__name__} does not read it. Its settings: {', '.join(before)}")
        if method and key in trainer.fixed_settings:
            raise UDAError(f"-vary {setting}: {trainer.__name__} fixes it to {trainer.fixed_settings[key]}")
        values: list[Value] = []
        sweeps[setting] = values
        for text in texts:
            where = f"-vary {setting} {text}"
            changed = merge_uda(uda, dict([parse_assignment(f"{setting}={text}")]))
            check_uda(changed, where)
            value = settings_in_force(trainer, changed, where)[setting]
            if value in [other.value for other in values]:
                raise UDAError(f"{where}: this value is given twice")
            values.append(Value(value, value_text(value), value == before[setting], []))

    runs: dict[str, PlannedRun] = {}
    for seed in seeds if seeds is not None else [before["seed"]]:
        for setting, values in sweeps.items():
            for value in values:
                changes = {} if value.in_plans else {setting: value.value}
                parts = [name, *(f"{key.rpartition('.')[2]}_{_safe(value.text)}" for key in changes)]
                if seed is not None:
                    parts.append(f"seed_{seed}")
                elif not changes:
                    parts.append("unchanged")
                if seed != before["seed"]:
                    changes["seed"] = seed
                run_name = check_name("_".join(parts), "the name of a run's plans", file=True)
                run = PlannedRun(run_name, derive_plans(base, configuration, run_name, merge_uda(uda, changes)), seed)
                if runs.setdefault(run_name, run) != run:
                    raise UDAError(f"-vary {setting}: two runs would both be called {run_name}; leave one value out")
                value.runs.append(run_name)
    return sweeps, runs


def _safe(text: str) -> str:
    """Make text fit a file's name: not too long, and without ``_``, since nnU-Net splits names at ``__``."""
    if len(text) > 60:
        text = f"{text[:50]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return re.sub(r"[^A-Za-z0-9.+-]", "-", text)


# --- tables ----------------------------------------------------------------------------------------------------------


def collect_points(values: list[Value], scores: dict[str, Score]) -> list[Point]:
    """A sweep's values with means and deviations over the seeds whose runs have finished."""
    points = []
    for value in values:
        done = [scores[name] for name in value.runs if name in scores]
        dice, assd, undefined = over_runs(done)
        pseudo_dice = spread([score.pseudo_dice for score in done])
        criteria = {name: spread([score.criteria.get(name, math.nan) for score in done]) for name in HIGHER_IS_BETTER}
        points.append(Point(value.value, value.text, dice, assd, pseudo_dice, undefined, criteria))
    return points


def sweep_table(setting: str, values: list[Value], points: list[Point], scores: dict[str, Score]) -> dict[str, Any]:
    """One sweep as a table for ``markdown_table``."""
    shown = [name for name in HIGHER_IS_BETTER if name == "agreement" or any(p.criteria[name].n for p in points)]
    shown.sort(key=lambda name: name != "agreement")
    rows = []
    for value, point in zip(values, points, strict=True):
        n = sum(name in scores for name in value.runs)
        rows.append(
            [
                value.text + (" (as in the plans)" if value.in_plans else ""),
                mean_cell(vars(point.dice), DIGITS["Dice"], n),
                mean_cell(vars(point.assd), DIGITS["ASSD"], n, point.undefined),
                *(mean_cell(vars(point.criteria[name]), DIGITS["Dice"], n) for name in shown),
                mean_cell(vars(point.pseudo_dice), DIGITS["Dice"], n),
                str(n) if n == len(value.runs) else f"{n} of {len(value.runs)}",
            ]
        )
    without_label = [f"{name} {'↑' if HIGHER_IS_BETTER[name] else '↓'}" for name in shown]
    header = ["value", "target Dice", "target ASSD (mm)", *without_label, "validation pseudo Dice", "n"]
    return {"caption": setting, "header": header, "rows": rows}


def write_tables(sweep: Sweep, scores: dict[str, Score], failed: dict[str, str]) -> dict[str, list[Point]]:
    """Write ``sweep.md`` (a table a setting) and ``sweep.csv`` (a row a run); return the points of each setting."""
    out, setup, test, runs = sweep.out, sweep.setup, sweep.test, sweep.runs
    points = {setting: collect_points(values, scores) for setting, values in sweep.values.items()}
    where = test.images if test.fold is None else f"fold {test.fold} of {SPLITS_TARGET}"
    blocks = [
        f"# {setup['trainer']} on {setup['dataset']}: sweep",
        f"Plans {setup['plans']}, configuration {setup['configuration']}, fold {setup['fold']}; {len(test.cases)} "
        f"target test case(s), {where}; structures: {', '.join(test.labels.structures)}.",
        *([TRANSDUCTIVE] if test.transductive else []),
        f"**{WARNING}**",
        CRITERIA,
        *(markdown_table(sweep_table(name, values, points[name], scores)) for name, values in sweep.values.items()),
        CELLS,
    ]
    blocks += missing_runs(runs, scores, failed)
    write_text("\n\n".join(blocks) + "\n", out / "sweep.md")
    write_rows(out / "sweep.csv", [
        {"setting": setting, "value": value.text, "seed": runs[name].seed, "plans": name}
        | (run_record(scores[name], test.labels.structures) if name in scores else {})
        for setting, values in sweep.values.items() for value in values for name in value.runs
    ])  # fmt: skip
    return points


def run_record(score: Score, structures: Iterable[str]) -> dict[str, Any]:
    """A run's figures by column."""
    criteria = {name: score.criteria.get(name) for name in HIGHER_IS_BETTER}
    return criteria | {"validation_pseudo_dice": score.pseudo_dice} | figures_of(score, structures)


def run_sweep(sweep: Sweep, engine: Engine, device: str, num_processes: int) -> dict[str, str]:
    """Run everything, and write tables and plot; return reasons of failures by run.

    Args:
        num_processes: that score predictions.
    """
    out, setup, runs = sweep.out, sweep.setup, sweep.runs
    dataset, trainer, fold = setup["dataset"], setup["trainer"], setup["fold"]
    scores: dict[str, Score] = {}
    failed: dict[str, str] = {}
    with exclusive(out):
        for run in runs.values():
            write_json(run.plans, environment_folder("nnUNet_preprocessed") / dataset / f"{run.name}.json")
        write_json(setup, out / SWEEP)
        images = lay_out_images(find_raw_dataset(dataset), sweep.test, out / "images")
        jobs = [
            Job(run.name, out / "runs" / run.name, dataset, setup["configuration"], fold, trainer, run.name, sweep.test,
                images, device, num_processes)
            for run in runs.values()
        ]  # fmt: skip
        write = partial(write_tables, sweep, scores, failed)
        run_jobs(engine, jobs, scores, failed, write)
        points = write()
        title = f"{trainer} on {dataset}, plans {setup['plans']}, fold {fold}"
        seeds = len(next(iter(sweep.values.values()))[0].runs)
        bars = f" Error bars: sample standard deviation over {seeds} seeds." if seeds > 1 else ""
        draw_sweeps(out / "sweep.png", points, title, WARNING + bars)
    return failed
