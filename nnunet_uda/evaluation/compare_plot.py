"""The plot of ``nnUNetUDA_compare``: every method's scores on the target, test by test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_uda.evaluation.sweep_plot import OverSeeds


@dataclass(frozen=True)
class Bar:
    """A method on one test.

    Attributes:
        test: the test's name, a column of the plot.
        label: the method's.
        dice: over its finished runs.
        assd: likewise, in mm.
        runs: the Dice of each run.
    """

    test: str
    label: str
    dice: OverSeeds
    assd: OverSeeds
    runs: list[float]


def draw_comparison(path: Path, bars: Sequence[Bar], title: str) -> None:
    """Write ``path`` (PNG): a column a test, Dice above and ASSD below, deviations over runs, each run as a point."""
    from nnunet_uda.training.pictures import plt, save_figure

    tests = list(dict.fromkeys(bar.test for bar in bars))
    most = max(sum(bar.test == test for bar in bars) for test in tests)
    size = (max(2.2 + 0.75 * most, 5) * len(tests), 8.0)
    figure, axes = plt.subplots(2, len(tests), figsize=size, sharex="col", sharey="row", squeeze=False)
    for test, (upper, lower) in zip(tests, axes.T, strict=True):
        shown = [bar for bar in bars if bar.test == test]
        x = np.arange(len(shown))
        for axis, cells in ((upper, [bar.dice for bar in shown]), (lower, [bar.assd for bar in shown])):
            heights = [0 if math.isnan(cell.mean) else cell.mean for cell in cells]
            deviations = np.nan_to_num([cell.std for cell in cells])
            axis.bar(x, heights, yerr=deviations, capsize=3, color="C0", alpha=0.6)
            axis.grid(axis="y", alpha=0.3)
        for place, bar in zip(x, shown, strict=True):
            upper.plot([place] * len(bar.runs), bar.runs, "k.", markersize=4)
        upper.set_title(test, fontsize=9)
        lower.set_xticks(x, [bar.label.removesuffix("Trainer") for bar in shown], rotation=60, ha="right", fontsize=8)
    axes[0, 0].set_ylabel("Dice on the target")
    axes[1, 0].set_ylabel("ASSD on the target (mm)")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)
