"""Methods x directions x folds x seeds: plan the runs, and write tables, a plot and pages of their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import case_files, environment_folder
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation.compare_page import MethodRuns, write_compare_page
from nnunet_uda.evaluation.compare_plot import Bar, draw_comparison
from nnunet_uda.evaluation.report import DIGITS, jsonable, markdown_table, mean_cell, write_rows
from nnunet_uda.evaluation.runs import find_raw_dataset
from nnunet_uda.evaluation.tables import Spread, gap_closed, spread
from nnunet_uda.experiments.engines import Engine, run_jobs
from nnunet_uda.experiments.grid import (
    check_output,
    check_run,
    dice_of,
    figures_of,
    missing_runs,
    over_runs,
    settings_in_force,
)
from nnunet_uda.experiments.job import TRANSDUCTIVE, Job, Score, find_target_test, find_trainer, lay_out_images
from nnunet_uda.files import exclusive, write_json, write_text
from nnunet_uda.foreign_plans import read_plans
from nnunet_uda.methods import check_uda
from nnunet_uda.names import check_name
from nnunet_uda.plans import derive_plans, merge_uda

SETUP = "setup.json"
LOWER, UPPER = "lower bound", "upper bound"
RULES = (
    "Every run's figure is the mean over structures and then over test cases, as in nnUNetUDA_evaluate; below, mean "
    "± sample standard deviation over runs (folds and seeds). ASSD is undefined, and missing from its mean, where "
    "exactly one of prediction and reference is empty: such distances are counted beside it.",
    "Gap closed: (run - lower) / (upper - lower) of the Dice, with the means of both bounds over all their runs on the "
    "same dataset and fold, so that the deviation is that of the runs and not of the bounds.",
    "Training time is the sum of the epochs' (validation included; without preparation, pictures and the final "
    "validation). Memory is the peak of the training's main process, resident; and allocated on the CUDA device where "
    "there is one. Neither says much where runs shared a machine.",
    "These are test scores: no setting, method or checkpoint is to be chosen by them without saying so.",
)


@dataclass(frozen=True)
class Method:
    """A trainer that is trained on ``dataset`` and tested on the target images of ``test``."""

    label: str
    trainer: str
    dataset: str
    test: str


@dataclass(frozen=True)
class Row:
    """One run: a job, and the row of the table that it belongs to."""

    method: Method
    fold: str
    seed: int | None
    job: Job


@dataclass(frozen=True)
class Cells:
    """A method's figures on one test, over its finished runs, and how many are missing."""

    method: Method
    figures: dict[str, Spread]
    undefined: int
    done: int
    planned: int


@dataclass(frozen=True)
class Comparison:
    """A comparison as it is planned; nothing is written yet.

    Attributes:
        out: its folder.
        setup: names of plans and configuration: what tells one comparison from another.
        plans: by dataset and seed.
    """

    out: Path
    setup: dict[str, Any]
    plans: dict[tuple[str, int | None], dict]
    rows: list[Row]

    @property
    def jobs(self) -> list[Job]:
        """All jobs, each once; a bound may be in several rows."""
        return list({row.job.name: row.job for row in self.rows}.values())


COSTS = ("seconds", "memory", "device_memory")
"""Of ``Score``, each with a column of its own."""


# --- what to train ---------------------------------------------------------------------------------------------------


def find_methods(
    datasets: Sequence[str], trainers: Sequence[str], lower: Sequence[str] = (), upper: Sequence[str] = ()
) -> list[Method]:
    """Bounds and trainers of every test, the lower bound first and the upper last.

    Args:
        datasets: ids or names, one a test.
        lower, upper: bounds, ``TRAINER`` or ``TRAINER:DATASET``: none, one for all tests, or one for each.

    Raises:
        UDAError: no such dataset, or a trainer that does not exist or does not read settings.
    """
    methods = []
    for index, test in enumerate(find_raw_dataset(dataset).name for dataset in datasets):
        lowest, highest = _bound(lower, LOWER, index, test), _bound(upper, UPPER, index, test)
        bounds = [(method.trainer, method.dataset) for method in (*lowest, *highest)]
        if len(set(bounds)) < len(bounds):
            raise UDAError(
                f"-lower and -upper of {test} are the same, {lowest[0].trainer}: no gap lies between. Give two"
            )
        others = [Method(name, name, test, test) for name in trainers if (name, test) not in bounds]
        methods += [*lowest, *others, *highest]
    for trainer in {method.trainer for method in methods}:
        find_trainer(trainer)
    return methods


def _bound(words: Sequence[str], label: str, index: int, test: str) -> list[Method]:
    """The bound of the ``index``-th test, if there is one."""
    if not words:
        return []
    trainer, _, trained = words[index if len(words) > 1 else 0].partition(":")
    return [Method(label, trainer, find_raw_dataset(trained).name if trained else test, test)]


def plan_plans(
    methods: Sequence[Method], plans_name: str, configuration: str, seeds: Sequence[int] | None
) -> dict[tuple[str, int | None], dict]:
    """Derive the plans of every training dataset, by dataset and seed; without seeds take the plans that are there.

    Raises:
        UDAError: no such plans, no such configuration, images not preprocessed, settings that a trainer refuses, or
            plans of a run's name with other content.
    """
    chosen: Sequence[int | None] = seeds or [None]
    found: dict[tuple[str, int | None], dict] = {}
    for method in methods:
        folder = environment_folder("nnUNet_preprocessed") / method.dataset
        base, where = read_plans(folder, plans_name), f"{folder / plans_name}.json, key 'uda'"
        uda = base.get("uda", {})
        check_uda(uda, where)
        settings_in_force(find_trainer(method.trainer), uda, where)
        for seed in chosen:
            name = plans_name if seed is None else f"{plans_name}_seed_{seed}"
            plans = derive_plans(base, configuration, name, uda if seed is None else merge_uda(uda, {"seed": seed}))
            check_run(method.dataset, method.trainer, plans, configuration, plans_name)
            found[method.dataset, seed] = plans
    return found


def job_name(method: Method, plans_name: str, fold: str) -> str:
    """Name a run's folder.

    Raises:
        UDAError: if no folder can have so long a name.
    """
    trained = "" if method.dataset == method.test else f"_on_{method.dataset}"
    name = f"{method.test}__{method.trainer}{trained}__{plans_name}__fold_{fold}"
    return check_name(name, "the name of a run, made of dataset, trainer, plans and fold", file=True)


def plan_rows(
    methods: Sequence[Method],
    plans: dict[tuple[str, int | None], dict],
    configuration: str,
    folds: Sequence[str],
    out: Path,
    device: str,
    num_processes: int,
) -> list[Row]:
    """List every run, ordered by seed, then fold, so that a stop leaves a few seeds complete."""
    rows = []
    for seed in dict.fromkeys(seed for _, seed in plans):
        for fold in folds:
            for method in methods:
                raw = find_raw_dataset(method.test)
                test = find_target_test(raw, fold)
                images = raw / test.images if test.fold is None else out / f"images_{method.test}_fold_{fold}"
                name = plans[method.dataset, seed]["plans_name"]
                job = job_name(method, name, fold)
                rows.append(Row(method, fold, seed, Job(
                    job, out / "runs" / job, method.dataset, configuration, fold, method.trainer, name, test,
                    images, device, num_processes,
                )))  # fmt: skip
    return rows


def plan_comparison(
    out: Path,
    methods: Sequence[Method],
    plans_name: str,
    configuration: str,
    folds: Sequence[str],
    seeds: Sequence[int] | None,
    device: str,
    num_processes: int,
) -> Comparison:
    """Plan and check every run of ``methods`` x ``folds`` x ``seeds``.

    Args:
        seeds: each has plans of its own; None: the plans as they are.
        num_processes: that score predictions and draw pages.

    Raises:
        UDAError: for a folder, plans or results that were made otherwise, and what a trainer refuses.
    """
    environment_folder("nnUNet_results")
    setup = {"plans": plans_name, "configuration": configuration}
    check_output(out, SETUP, setup, "comparison")
    plans = plan_plans(methods, plans_name, configuration, seeds)
    rows = plan_rows(methods, plans, configuration, folds, out, device, num_processes)
    return Comparison(out, setup, plans, rows)


# --- tables ----------------------------------------------------------------------------------------------------------


def gaps(rows: Sequence[Row], scores: dict[str, Score]) -> dict[str, float]:
    """Percent of the gap closed, by job; NaN where a bound of the same test and fold has no finished run."""

    def bound(row: Row, label: str) -> float:
        same = [other for other in rows if (other.method.test, other.fold) == (row.method.test, row.fold)]
        return spread(
            [dice_of(scores[r.job.name]) for r in same if r.method.label == label and r.job.name in scores]
        ).mean

    return {
        row.job.name: gap_closed(dice_of(scores[row.job.name]), bound(row, LOWER), bound(row, UPPER), "Dice")[0]
        for row in rows
        if row.job.name in scores and row.method.label not in (LOWER, UPPER)
    }


def summarise_methods(rows: Sequence[Row], scores: dict[str, Score]) -> list[Cells]:
    """Summarise each method on each test, in the order of ``rows``."""
    closed = gaps(rows, scores)
    cells = []
    for method in dict.fromkeys(row.method for row in rows):
        names = [row.job.name for row in rows if row.method == method]
        done = [name for name in names if name in scores]
        dice, assd, undefined = over_runs([scores[name] for name in done])
        figures = {"Dice": dice, "ASSD": assd, "gap": spread([closed.get(name, math.nan) for name in done])}
        figures |= {name: spread([getattr(scores[run], name) for run in done]) for name in COSTS}
        cells.append(Cells(method, figures, undefined, len(done), len(names)))
    return cells


def method_table(test: str, cells: Sequence[Cells]) -> dict[str, Any]:
    """One test's methods as a table for ``markdown_table``."""
    rows = []
    for entry in cells:
        figures, label = {name: vars(cell) for name, cell in entry.figures.items()}, entry.method.label
        trained = "" if entry.method.dataset == test else f" on {entry.method.dataset}"
        rows.append([
            label if label == entry.method.trainer else f"{label}: {entry.method.trainer}{trained}",
            mean_cell(figures["Dice"], DIGITS["Dice"]),
            mean_cell(figures["ASSD"], DIGITS["ASSD"], undefined=entry.undefined if figures["ASSD"]["n"] else 0),
            mean_cell(figures["gap"], 1),
            mean_cell(figures["seconds"], 1, unit=60),
            mean_cell(figures["memory"], 1),
            mean_cell(figures["device_memory"], 1),
            str(entry.done) if entry.done == entry.planned else f"{entry.done} of {entry.planned}",
        ])  # fmt: skip
    header = ["trainer", "Dice", "ASSD (mm)", "gap closed (%)", "training (min)", "memory (GiB)", "CUDA memory (GiB)",
              "runs"]  # fmt: skip
    return {"caption": test, "header": header, "rows": rows}


def write_tables(
    out: Path, setup: dict[str, Any], rows: Sequence[Row], scores: dict[str, Score], failed: dict[str, str]
) -> list[Cells]:
    """Write ``compare.md``, ``compare.csv`` (a row a run) and ``compare.json`` (both, unrounded)."""
    cells = summarise_methods(rows, scores)
    blocks = [f"# Comparison: plans {setup['plans']}, configuration {setup['configuration']}"]
    for test, entries in groupby(cells, key=lambda entry: entry.method.test):
        transductive = any(row.job.test.transductive for row in rows if row.method.test == test)
        notes = {"notes": [TRANSDUCTIVE] if transductive else []}
        blocks.append(markdown_table(method_table(test, list(entries)) | notes))
    blocks += missing_runs([row.job.name for row in rows], scores, failed)
    write_text("\n\n".join([*blocks, *RULES]) + "\n", out / "compare.md")

    closed = gaps(rows, scores)
    records = [run_record(row, scores, failed, closed) for row in rows]
    write_rows(out / "compare.csv", records)
    means = [{"test": entry.method.test, "label": entry.method.label, "trainer": entry.method.trainer,
              "dataset": entry.method.dataset, "runs": entry.done, "planned": entry.planned,
              "distances_undefined": entry.undefined, **{name: vars(cell) for name, cell in entry.figures.items()}}
             for entry in cells]  # fmt: skip
    write_json(jsonable({**setup, "rules": RULES, "runs": records, "means": means}), out / "compare.json")
    return cells


def run_record(row: Row, scores: dict[str, Score], failed: dict[str, str], closed: dict[str, float]) -> dict[str, Any]:
    """One run, with None for what is undefined or not there yet."""
    name, method = row.job.name, row.method
    record: dict[str, Any] = {"test": method.test, "label": method.label, "trainer": method.trainer,
                              "dataset": method.dataset, "fold": row.fold, "seed": row.seed, "plans": row.job.plans,
                              "state": "finished" if name in scores else "failed" if name in failed else "missing",
                              "log": str(row.job.log)}  # fmt: skip
    if name in scores:
        score = scores[name]
        own = {"gap_closed_percent": closed.get(name, math.nan), "training_seconds": score.seconds,
               "peak_memory_gib": score.memory, "peak_device_memory_gib": score.device_memory,
               "validation_pseudo_dice": score.pseudo_dice}  # fmt: skip
        record |= jsonable(own) | figures_of(score, row.job.test.labels.structures)
    return record


def write_pages(out: Path, rows: Sequence[Row], scores: dict[str, Score], num_processes: int) -> list[str]:
    """Write a page for each test that has scores, ``compare_DATASET.html``; returns their names."""
    pages = []
    for test in dict.fromkeys(row.method.test for row in rows):
        done = [row for row in rows if row.method.test == test and row.job.name in scores]
        if not done:
            continue
        labels, reference = done[0].job.test.labels, done[0].job.test.reference
        images = {
            case: paths[0] for row in done for case, paths in case_files(row.job.images, labels.file_ending).items()
        }
        methods = {}
        for label in dict.fromkeys(row.method.label for row in done):
            of_method = [row.job for row in done if row.method.label == label]
            predictions = {
                case: job.folder / "predictions" / f"{case}{labels.file_ending}"
                for job in reversed(of_method)
                for case in job.test.cases
            }
            methods[label] = MethodRuns([scores[job.name].volumes for job in of_method], predictions)
        page = out / f"compare_{test}.html"
        if write_compare_page(page, test, methods, (LOWER, UPPER), images, reference, labels, num_processes):
            pages.append(page.name)
    return pages


def bars(rows: Sequence[Row], cells: Sequence[Cells], scores: dict[str, Score]) -> list[Bar]:
    """What the plot shows of every method."""
    return [
        Bar(
            entry.method.test,
            entry.method.label,
            entry.figures["Dice"],
            entry.figures["ASSD"],
            [dice_of(scores[row.job.name]) for row in rows if row.method == entry.method and row.job.name in scores],
        )
        for entry in cells
    ]


def run_comparison(comparison: Comparison, engine: Engine) -> tuple[list[str], dict[str, str]]:
    """Run everything, and write tables, plot and pages.

    Returns:
        Names of the pages, and reasons of failures by run.
    """
    out, setup, rows, jobs = comparison.out, comparison.setup, comparison.rows, comparison.jobs
    scores: dict[str, Score] = {}
    failed: dict[str, str] = {}
    with exclusive(out):
        for (dataset, seed), content in comparison.plans.items():
            if seed is not None:
                path = environment_folder("nnUNet_preprocessed") / dataset / f"{content['plans_name']}.json"
                write_json(content, path)
        write_json(setup, out / SETUP)
        for row in rows:
            lay_out_images(find_raw_dataset(row.method.test), row.job.test, row.job.images)
        write = partial(write_tables, out, setup, rows, scores, failed)
        run_jobs(engine, jobs, scores, failed, write)
        cells = write()
        title = f"plans {setup['plans']}, {setup['configuration']}"
        draw_comparison(out / "compare.png", bars(rows, cells, scores), title)
        pages = write_pages(out, rows, scores, jobs[0].num_processes)
    return pages, failed
