"""How well criteria without labels rank checkpoints by their Dice on the target.

THIS READS LABELS of the target's test images: it measures the criteria, it does not choose anything. For every kept
checkpoint (``checkpoint_epoch_*.pth``, written by the setting ``keep_every``, and ``checkpoint_final.pth``) of every
run (each combination of -tr, -p and -f) it takes

* each criterion on the fold's unlabelled target training images, as ``nnUNetUDA_evaluate --unsupervised`` does, without
  those that are the test; with these where there are no others;
* the same as training measured it, and pseudo Dice: the running means that ``checkpoint_best`` follows;
* the mean Dice on the target's test images, predicted without test-time mirroring.

From these: Spearman's rank correlation with that Dice within each run, over all checkpoints, and over the runs' last
checkpoints; and the regret, the Dice of the best kept checkpoint less that of the one the criterion chooses. Writes
criteria.csv, criteria.md and criteria.png; a second start goes on where the first one stopped. ``-with`` puts the rows
of other outputs into the tables: other datasets, or seeds with scans of their own.

    python -m benchmarks.accuracy.criteria -d 501 -tr CISFATrainer -p Seed0 Seed1 Seed2 -device cpu -o criteria/
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from scipy.stats import spearmanr

from nnunet_uda.commands.evaluate_unsupervised import (
    add_model_arguments,
    model_folders,
)
from nnunet_uda.data.convention import TARGET_FOLDER, case_files, read_json
from nnunet_uda.devices import open_device
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.metrics import read_segmentation
from nnunet_uda.evaluation.prediction import TrainedModel, dataset_of, open_model, unlabelled_images
from nnunet_uda.evaluation.report import jsonable, markdown_table
from nnunet_uda.evaluation.runs import find_raw_dataset
from nnunet_uda.evaluation.unsupervised import COLUMNS, measure, names_of, preprocessed
from nnunet_uda.experiments.job import TargetTest, find_target_test
from nnunet_uda.files import write_json
from nnunet_uda.images.geometry import check_same_geometry
from nnunet_uda.names import spreadsheet_cell
from nnunet_uda.training.criteria import HIGHER_IS_BETTER
from nnunet_uda.training.model_choice import running_means

IN_TRAINING = " (training)"
CRITERIA = {**HIGHER_IS_BETTER, **{name + IN_TRAINING: higher for name, higher in COLUMNS.items()}}
"""Every criterion, on volumes and as training measured it, and whether higher is better."""


def kept_checkpoints(folder: Path, fold: str) -> list[TrainedModel]:
    """The kept checkpoints of a run, in the order of epochs, the final one last.

    Raises:
        UDAError: for fewer than two.
    """
    names = sorted(path.name for path in (folder / f"fold_{fold}").glob("checkpoint_epoch_*.pth"))
    if (folder / f"fold_{fold}" / "checkpoint_final.pth").is_file():
        names.append("checkpoint_final.pth")
    if len(names) < 2:
        raise UDAError(f"{folder}/fold_{fold} holds {len(names)} kept checkpoint(s), at least 2 are needed: train with "
                       "the setting keep_every (nnUNetUDA_configure -set keep_every=10)")  # fmt: skip
    return [TrainedModel(folder, fold, name) for name in names]


def true_dice(model: TrainedModel, raw: Path, test: TargetTest, device: torch.device) -> float:
    """Mean over test cases of the mean over structures, with the labels of the target."""
    predictor = open_model(model.folder, [model.fold], model.checkpoint, device)
    files = case_files(raw / test.images, test.labels.file_ending)
    with TemporaryDirectory() as output:
        with redirect_stdout(StringIO()):
            predictor.predict_from_files_sequential(
                [[str(path) for path in files[case]] for case in test.cases],
                [str(Path(output, case)) for case in test.cases],
            )
        volumes = []
        for name in (f"{case}{test.labels.file_ending}" for case in test.cases):
            paths = test.reference / name, Path(output, name)
            images = [read_segmentation(path, test.labels.structures, test.labels.ignore) for path in paths]
            check_same_geometry(images[0], paths[0], images[1], paths[1])
            reference, predicted = (sitk.GetArrayFromImage(image) for image in images)
            known = reference != test.labels.ignore
            volumes.append(mean_dice(reference[known], predicted[known], test.labels.structures.values()))
    return float(np.nanmean(volumes))


def mean_dice(reference: np.ndarray, predicted: np.ndarray, values: Iterable[int]) -> float:
    """Mean over structures; one that neither holds does not count, as in ``nnUNetUDA_evaluate``."""
    sizes = {value: int((reference == value).sum() + (predicted == value).sum()) for value in values}
    both = {value: int(((reference == value) & (predicted == value)).sum()) for value in sizes}
    scores = [2 * both[value] / size for value, size in sizes.items() if size]
    return float(np.mean(scores)) if scores else math.nan


def score(
    model: TrainedModel, volumes: list[Path], raw: Path, test: TargetTest, device: torch.device
) -> dict[str, Any]:
    """One row of the table."""
    values, checkpoint = measure(model, volumes, device)
    history = checkpoint.get("uda", {}).get("criteria", {})
    trainer, plans = names_of(model.folder)
    row = {"trainer": trainer, "plans": plans, "fold": model.fold, "checkpoint": model.checkpoint,
           "epochs": checkpoint["current_epoch"], "dice": true_dice(model, raw, test, device), **values}  # fmt: skip
    for name in COLUMNS:
        row[name + IN_TRAINING] = running_means(name, history[name])[-1] if name in history else math.nan
    return row


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a former call's criteria.csv.

    Raises:
        UDAError: there is none.
    """
    path = folder / "criteria.csv"
    if not path.exists():
        raise UDAError(f"{path} does not exist: give an output folder of this command that is finished")
    numbers = {"dice", *CRITERIA}
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(value) if name in numbers else value for name, value in row.items()}
                for row in csv.DictReader(file)]  # fmt: skip


def correlation(values: np.ndarray, dice: np.ndarray, higher_is_better: bool) -> float:
    """Spearman's, 1 where the criterion orders as Dice does; NaN for fewer than 3 defined pairs or equal values."""
    defined = ~(np.isnan(values) | np.isnan(dice))
    values, dice = values[defined] * (1 if higher_is_better else -1), dice[defined]
    if len(values) < 3 or np.ptp(values) == 0 or np.ptp(dice) == 0:
        return math.nan
    return float(spearmanr(values, dice).statistic)


def regret(values: np.ndarray, dice: np.ndarray, higher_is_better: bool) -> float:
    """The best Dice less that of the checkpoint with the best value (of equal ones the latest); NaN without a value."""
    if np.isnan(values).all():
        return math.nan
    signed = np.where(np.isnan(values), -np.inf, values if higher_is_better else -values)
    chosen = len(signed) - 1 - int(signed[::-1].argmax())
    return float(np.nanmax(dice) - dice[chosen])


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The Markdown table's content: a row a criterion, and one for simply taking the last checkpoint."""
    runs: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["output"], row["trainer"], row["plans"], row["fold"]), []).append(row)
    last = [run[-1] for run in runs.values()]

    def column(some: list[dict[str, Any]], name: str) -> np.ndarray:
        return np.array([row[name] for row in some], dtype=float)

    def mean(values: list[float]) -> str:
        defined = [value for value in values if not math.isnan(value)]
        if not defined:
            return "–"
        deviation = f" ± {np.std(defined, ddof=1):.3f}" if len(defined) > 1 else ""
        return f"{np.mean(defined):.3f}{deviation}" + (f" (n = {len(defined)})" if len(defined) != len(values) else "")

    def largest(values: list[float]) -> str:
        return mean([max((value for value in values if not math.isnan(value)), default=math.nan)])

    lines = []
    for name, higher in CRITERIA.items():
        within = [correlation(column(run, name), column(run, "dice"), higher) for run in runs.values()]
        lost = [regret(column(run, name), column(run, "dice"), higher) for run in runs.values()]
        pooled, over_runs = (correlation(column(some, name), column(some, "dice"), higher) for some in (rows, last))
        lines.append([name, mean(within), mean([pooled]), mean([over_runs]), mean(lost), largest(lost)])
    lost = [float(np.nanmax(column(run, "dice")) - run[-1]["dice"]) for run in runs.values()]
    lines.append(["the last checkpoint", "–", "–", "–", mean(lost), largest(lost)])
    return {
        "caption": f"{len(rows)} checkpoints of {len(runs)} run(s)",
        "header": ["criterion", "rho within runs", "rho, all checkpoints", "rho, last checkpoints", "regret",
                   "largest regret"],
        "rows": lines,
        "notes": ["rho: Spearman's rank correlation with the mean Dice on the target's test images, whose labels were "
                  "read for this; 1 is a perfect criterion.",
                  "regret: Dice of the best kept checkpoint less that of the chosen one; mean ± sample standard "
                  "deviation over runs.",
                  "(training): the running means that checkpoint_best follows, on fixed target patches; pseudo_dice on "
                  "source validation patches. The others: on the whole target training images."],
    }  # fmt: skip


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Dice against each criterion, a colour a trainer."""
    from nnunet_uda.figures import plt, save_figure

    figure, axes = plt.subplots(3, 4, figsize=(15, 10), sharey=True, squeeze=False)
    for axis, (name, higher) in zip(axes.flat, CRITERIA.items(), strict=False):
        for index, trainer in enumerate(dict.fromkeys(row["trainer"] for row in rows)):
            points = [(row[name], row["dice"]) for row in rows if row["trainer"] == trainer]
            axis.plot(*zip(*points, strict=True), "o", color=f"C{index}", markersize=4, alpha=0.7, label=trainer)
        axis.set_xlabel(f"{name} ({'higher' if higher else 'lower'} is better)", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("Dice on the target's test images")
    for axis in axes.flat[len(CRITERIA) :]:
        axis.axis("off")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower right", fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("-n", type=int, help="measure on so many of the target's training images (default: all)")
    parser.add_argument("-o", type=Path, required=True, help="output folder")
    parser.add_argument("-with", dest="others", nargs="+", type=Path, default=[], metavar="FOLDER",
                        help="outputs of former calls, whose rows join these in the tables")  # fmt: skip
    arguments = parser.parse_args(argv)
    others = [row for folder in arguments.others for row in read_rows(folder)]
    device = open_device(arguments.device)
    raw = find_raw_dataset(arguments.d)
    images = arguments.i or raw / TARGET_FOLDER
    done = arguments.o / "checkpoints"
    done.mkdir(parents=True, exist_ok=True)

    rows = []
    for folder, fold in model_folders(arguments):
        models = kept_checkpoints(folder, fold)
        test = find_target_test(raw, fold)
        unlabelled = unlabelled_images(images, dataset_of(models[0].folder))
        cases = {case: paths for case, paths in unlabelled.items() if case not in test.cases} or unlabelled
        number = min(arguments.n or len(cases), len(cases))
        cases = {case: cases[case] for case in list(cases)[:: max(1, len(cases) // max(1, number))][:number]}
        todo = []
        for model in models:
            file, stat = done / f"{folder.name}__fold_{fold}__{model.path.stem}.json", model.path.stat()
            key = {"checkpoint": [stat.st_size, stat.st_mtime_ns], "images": [str(images), *cases], "test": test.cases}
            if not file.exists() or read_json(file)["key"] != key:
                todo.append((model, file, key))
        if todo:
            with preprocessed(models[0], cases, device) as volumes:
                for model, file, key in todo:
                    row = score(model, volumes, raw, test, device)
                    write_json(jsonable({"key": key, "row": row}), file)
                    print(f"{folder.name} fold {fold} {model.checkpoint}: Dice {row['dice']:.3f}", flush=True)
        for model in models:
            row = read_json(done / f"{folder.name}__fold_{fold}__{model.path.stem}.json")["row"]
            row = {name: math.nan if value is None else value for name, value in row.items()}
            rows.append({"output": arguments.o.resolve().name, **row})

    with open(arguments.o / "criteria.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: spreadsheet_cell(value) for name, value in row.items()} for row in rows)
    rows += others
    text = markdown_table(summarise(rows)) + "\n"
    (arguments.o / "criteria.md").write_text(text, encoding="utf-8")
    draw(arguments.o / "criteria.png", rows)
    print(text)


if __name__ == "__main__":
    main()
