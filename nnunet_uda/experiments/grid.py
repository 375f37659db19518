"""What ``nnUNetUDA_sweep`` and ``nnUNetUDA_compare`` share: folder, plans, figures and failures of a grid of runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import environment_folder, mend_results, read_json, results_folder
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation.metrics import METRICS
from nnunet_uda.evaluation.report import jsonable
from nnunet_uda.evaluation.tables import Spread, spread, summarise
from nnunet_uda.experiments.job import Score
from nnunet_uda.files import is_free
from nnunet_uda.images.reading import check_path
from nnunet_uda.names import MEAN
from nnunet_uda.settings import UDASettings, parse_settings, split_settings


def settings_in_force(trainer: Any, uda: dict[str, Any], where: str) -> dict[str, Any]:
    """All settings that ``trainer`` reads, defaults included, by their names in ``-vary``."""
    shared, own = split_settings(uda, trainer.method, where)
    settings = dataclasses.asdict(parse_settings(UDASettings, shared, where))
    if trainer.method_settings is not None:
        where = f"{where}.{trainer.method}"
        parsed = dataclasses.asdict(parse_settings(trainer.method_settings, own | trainer.fixed_settings, where))
        settings |= {f"{trainer.method}.{name}": value for name, value in parsed.items()}
    return settings


def check_output(out: Path, marker: str, setup: dict[str, Any], what: str) -> None:
    """Refuse a folder that is not this grid's.

    Args:
        marker: the file in it that holds ``setup``.
        what: the kind of grid, for messages.

    Raises:
        UDAError: a file, a folder that holds something else, or a path in which no prediction can be written.
    """
    check_path(out)
    if out.exists() and not out.is_dir():
        raise UDAError(f"{out} is a file: give a folder with -o")
    if (out / marker).exists():
        former = read_json(out / marker)
        if former != setup:
            raise UDAError(f"{out} holds a {what} of {former}, this one is of {setup}: give another folder with -o")
    elif not is_free(out):
        raise UDAError(f"{out} is not empty and holds no former {what} ({marker}): give another folder with -o")


def check_run(dataset: str, trainer: str, plans: dict[str, Any], configuration: str, base: str) -> None:
    """Refuse a run whose images are missing or whose plans' name is taken, before anything is written.

    Args:
        plans: of the run, derived from those called ``base``.

    Raises:
        UDAError: images not preprocessed, or other plans of that name, preprocessed or in a training's results.
    """
    preprocessed, name = environment_folder("nnUNet_preprocessed") / dataset, plans["plans_name"]
    images = preprocessed / plans["configurations"][configuration]["data_identifier"]
    if not images.is_dir():
        raise UDAError(f"{images} does not exist. First: nnUNetv2_preprocess -d {dataset} -plans_name {base} -c "
                       f"{configuration}")  # fmt: skip
    results = results_folder(dataset, trainer, name, configuration)
    mend_results(results, plans, read_json(preprocessed / "dataset.json"))
    for path in (preprocessed / f"{name}.json", results / "plans.json"):
        if path.exists() and read_json(path) != plans:
            raise UDAError(
                f"{path} exists, and differs from what {base} now gives: those plans have changed, or the name was "
                "taken. Take plans of another name, or remove that file and the results trained by it"
            )


def figures_of(score: Score, structures: Iterable[str]) -> dict[str, Any]:
    """A run's means over structures and cases, and of each structure, by their columns' names; None where undefined."""
    summary = summarise(score.volumes)
    rows = {"": MEAN} | {f"_{structure}": structure for structure in structures}
    figures = {
        f"{short}{suffix}": summary[row][metric]["mean"]
        for suffix, row in rows.items()
        for short, metric in zip(("dice", "assd_mm", "hd95_mm"), METRICS, strict=True)
    }
    return jsonable(figures) | {"distances_undefined": summary[MEAN]["ASSD"]["n_undefined"]}


def over_runs(scores: Sequence[Score]) -> tuple[Spread, Spread, int]:
    """Dice and ASSD over several runs, and the number of distances that are undefined in them."""
    means = [summarise(score.volumes)[MEAN] for score in scores]
    dice, assd = (spread([mean[metric]["mean"] for mean in means]) for metric in ("Dice", "ASSD"))
    return dice, assd, sum(int(mean["ASSD"]["n_undefined"]) for mean in means)


def dice_of(score: Score) -> float:
    """A run's Dice, as in every table."""
    return summarise(score.volumes)[MEAN]["Dice"]["mean"]


def missing_runs(names: Iterable[str], scores: dict[str, Score], failed: dict[str, str]) -> list[str]:
    """List the runs that have no scores as a block of Markdown; no block if there are none."""
    missing = [f"- {name}: {failed.get(name, 'not finished yet')}" for name in names if name not in scores]
    return ["\n".join(["**Runs that are missing from these tables**", "", *missing])] if missing else []


def refuse_failures(failed: dict[str, str], number: int) -> None:
    """Raise ``UDAError`` where some of ``number`` runs failed."""
    if failed:
        listed = "".join(f"\n  {name}: {text}" for name, text in failed.items())
        raise UDAError(
            f"{len(failed)} of {number} runs failed; the same command tries them again, and only them:{listed}"
        )
