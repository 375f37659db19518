"""From scores of volumes to the figures of a paper: means, deviations, folds, gap closed, paired tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation.metrics import METRICS
from nnunet_uda.names import MEAN

SMALLEST_N = 6
"""Pairs from which a two-sided signed-rank test can reach p < 0.05: the smallest p of n pairs is 2 / 2**n."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample deviation (n - 1; NaN for fewer than two) of the defined values, and their number."""

    mean: float
    std: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and deviation of the values that are defined (not NaN)."""
    defined = [value for value in values if not math.isnan(value)]
    mean = float(np.mean(defined)) if defined else math.nan
    return Spread(mean, float(np.std(defined, ddof=1)) if len(defined) > 1 else math.nan, len(defined))


@dataclass(frozen=True)
class Volume:
    """Scores of one volume: ``metrics[structure][metric]`` as ``evaluate_case`` returns them; fold or ``None``."""

    case: str
    metrics: dict[str, dict[str, float]]
    fold: int | None = None

    @property
    def key(self) -> tuple[int | None, str]:
        return self.fold, self.case

    def value(self, row: str, metric: str) -> float:
        """Score of a structure, or for ``MEAN`` the mean of the volume's defined scores (NaN where there is none)."""
        if row != MEAN:
            return self.metrics[row][metric]
        return spread([scores[metric] for scores in self.metrics.values()]).mean

    def undefined(self, row: str, metric: str) -> int:
        """Number of the row's scores that are undefined since exactly one of the two masks is empty."""
        rows = self.metrics.values() if row == MEAN else [self.metrics[row]]
        return sum(math.isnan(scores[metric]) and not math.isnan(scores["Dice"]) for scores in rows)


def summarise(volumes: Sequence[Volume]) -> dict[str, dict[str, dict[str, float]]]:
    """``{row: {metric: {"mean", "std", "n", "n_undefined"}}}`` over volumes; rows are the structures and ``MEAN``."""

    def over_volumes(row: str, metric: str) -> dict[str, float]:
        undefined = sum(volume.undefined(row, metric) for volume in volumes)
        return {**vars(spread([volume.value(row, metric) for volume in volumes])), "n_undefined": undefined}

    return {row: {metric: over_volumes(row, metric) for metric in METRICS} for row in (*volumes[0].metrics, MEAN)}


def summarise_folds(volumes: Sequence[Volume]) -> dict[str, Any]:
    """Means of each fold and their mean and sample deviation over folds: ``{"by_fold": ..., "over_folds": ...}``."""
    folds = sorted({volume.fold for volume in volumes if volume.fold is not None})
    by_fold = {fold: summarise([volume for volume in volumes if volume.fold == fold]) for fold in folds}
    over_folds = {
        row: {metric: vars(spread([by_fold[fold][row][metric]["mean"] for fold in folds])) for metric in METRICS}
        for row in (*volumes[0].metrics, MEAN)
    }
    return {"by_fold": {str(fold): summary for fold, summary in by_fold.items()}, "over_folds": over_folds}


def gap_closed(run: float, lower: float, upper: float, metric: str) -> tuple[float, str]:
    """100 (run - lower) / (upper - lower) in percent, and a note where it is undefined (then NaN)."""
    if any(math.isnan(value) for value in (run, lower, upper)):
        return math.nan, f"undefined: no mean {metric} for the run or for a bound"
    if (upper <= lower) if metric == "Dice" else (upper >= lower):
        note = f"undefined: the upper bound's {metric} ({upper:.4g}) is no better than the lower's ({lower:.4g})"
        return math.nan, note
    return 100 * (run - lower) / (upper - lower) + 0.0, ""  # no -0.0


def wilcoxon(a: Sequence[Volume], b: Sequence[Volume]) -> dict[str, Any]:
    """Paired two-sided Wilcoxon signed-rank test of the volumes' mean Dice.

    Returns ``n`` (volumes where both are defined), ``n_nonzero`` (pairs that differ: those the test uses),
    ``mean_difference`` (a - b), ``statistic``, ``p`` (NaN where no pair differs) and ``note``.
    """
    from scipy.stats import wilcoxon as signed_rank

    scores_b = {volume.key: volume.value(MEAN, "Dice") for volume in b}
    differences = np.array([volume.value(MEAN, "Dice") - scores_b[volume.key] for volume in a])
    differences = differences[~np.isnan(differences)]
    nonzero = differences[differences != 0]
    result = {
        "n": len(differences),
        "n_nonzero": len(nonzero),
        "mean_difference": float(differences.mean()) if len(differences) else math.nan,
        "statistic": math.nan,
        "p": math.nan,
        "note": "",
    }
    if not len(nonzero):
        return result | {"note": "no volume differs, so there is nothing to test"}
    test = signed_rank(nonzero, alternative="two-sided")
    result |= {"statistic": float(test.statistic), "p": float(test.pvalue)}
    if len(nonzero) < SMALLEST_N:
        smallest = f"the smallest possible p is {min(1.0, 2 / 2 ** len(nonzero)):.3g}"
        result["note"] = f"too few pairs: {len(nonzero)} cannot reach p < 0.05 ({smallest})"
    return result


def check_bounds(names: Sequence[str], lower: str | None, upper: str | None) -> None:
    """Raise ``UDAError`` for an unknown bound, only one bound, or the same run for both."""
    for option, name in (("lower", lower), ("upper", upper)):
        if name is not None and name not in names:
            raise UDAError(
                f"-{option} {name} is not among the runs: {', '.join(names)}. It takes a run's name, or NAME=FOLDER"
            )
    if (lower is None) != (upper is None) or (lower is not None and lower == upper):
        raise UDAError("the gap closed needs two bounds: give -lower and -upper, each the name of another run")


def compare_runs(
    runs: Mapping[str, Sequence[Volume]], lower: str | None = None, upper: str | None = None
) -> dict[str, Any]:
    """Everything that the tables show, for one or several runs over the same volumes.

    Args:
        runs: volumes of each run, by the run's name.
        lower: name of the run that is the lower bound (with ``upper``: the gap closed is computed).
        upper: name of the run that is the upper bound.

    Returns:
        ``{"summary": {run: summarise()}, "folds": {run: summarise_folds()} or None with fewer than two folds,
        "gap_closed": {run: {row: {"Dice": {"percent", "note"}, "ASSD": ...}}} or None, "bounds": {"lower", "upper"},
        "wilcoxon": [{"run_a", "run_b", ...}]}``.

    Raises:
        UDAError: for an unknown bound, only one bound, or runs over different volumes.
    """
    check_bounds(list(runs), lower, upper)
    keys = {name: {volume.key for volume in volumes} for name, volumes in runs.items()}
    first = next(iter(runs))
    for name in runs:
        if keys[name] != keys[first] or not keys[name]:
            raise UDAError(f"the runs {first} and {name} must cover the same volumes, at least one")

    summary = {name: summarise(volumes) for name, volumes in runs.items()}
    folds = {fold for fold, _ in keys[first] if fold is not None}
    gap = None
    if lower is not None and upper is not None:
        gap = {
            name: _gaps(summary[name], summary[lower], summary[upper]) for name in runs if name not in (lower, upper)
        }
    return {
        "summary": summary,
        "folds": {name: summarise_folds(volumes) for name, volumes in runs.items()} if len(folds) > 1 else None,
        "gap_closed": gap,
        "bounds": {"lower": lower, "upper": upper},
        "wilcoxon": [{"run_a": a, "run_b": b} | wilcoxon(runs[a], runs[b]) for a, b in combinations(runs, 2)],
    }


def _gaps(run: dict, lower: dict, upper: dict) -> dict[str, dict[str, dict[str, Any]]]:
    gaps: dict[str, dict[str, dict[str, Any]]] = {}
    for row in run:
        gaps[row] = {}
        for metric in ("Dice", "ASSD"):
            cells = [table[row][metric] for table in (run, lower, upper)]
            means = [cell["mean"] for cell in cells]
            percent, note = gap_closed(means[0], means[1], means[2], metric)
            if not note and any(cell["n_undefined"] for cell in cells):
                note = "volumes with an undefined distance are missing from these means"
            gaps[row][metric] = {"percent": percent, "note": note}
    return gaps
