"""The plot of ``nnUNetUDA_compare``: every method's scores on the target, test by test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_uda.evaluation.tables import Spread

PER_ROW = 4
"""Tests in a row of the plot."""


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
    dice: Spread
    assd: Spread
    runs: list[float]


def draw_comparison(path: Path, bars: Sequence[Bar], title: str) -> None:
    """Write ``path`` (PNG): one column per test, Dice (0 to 1) above ASSD, with deviations and each run as a point.

    More than four tests go on in further rows.
    """
    from nnunet_uda.figures import own_style, plt, save_figure

    with own_style():
        of_test: dict[str, list[Bar]] = {}
        for bar in bars:
            of_test.setdefault(bar.test, []).append(bar)
        columns = list(of_test.items())
        rows = [columns[start : start + PER_ROW] for start in range(0, len(columns), PER_ROW)]
        widths = [[max(2.2 + 0.45 * len(shown), 3) for _, shown in row] for row in rows]
        whole = max(5, *map(sum, widths))
        figure = plt.figure(figsize=(whole, 7.0 * len(rows)), layout="constrained")
        blocks = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for row, width, block in zip(rows, widths, blocks, strict=True):
            spare = [whole - sum(width)] if sum(width) < whole else []  # bars of all rows are equally wide
            axes = block.subplots(
                2, len(row) + len(spare), sharex="col", sharey="row", squeeze=False, width_ratios=width + spare
            )
            for axis in axes[:, len(row) :].flat:
                axis.axis("off")
            for (test, shown), (upper, lower) in zip(row, axes.T, strict=False):
                x = np.arange(len(shown))
                for axis, cells in ((upper, [bar.dice for bar in shown]), (lower, [bar.assd for bar in shown])):
                    heights = [0 if math.isnan(cell.mean) else cell.mean for cell in cells]
                    deviations = np.nan_to_num([cell.std for cell in cells])
                    axis.bar(x, heights, yerr=deviations, capsize=3, color="C0", alpha=0.6)
                    axis.grid(axis="y", alpha=0.3)
                for place, bar in zip(x, shown, strict=True):
                    upper.plot([place] * len(bar.runs), bar.runs, "k.", markersize=4)
                upper.set_title(test, fontsize=9)
                labels = [bar.label.removesuffix("Trainer") for bar in shown]
                lower.set_xticks(x, labels, rotation=60, ha="right", fontsize=8)
                lower.set_xlim(-0.7, max(len(shown), 3) - 0.3)
            axes[0, 0].set_ylim(0, 1)
            axes[1, 0].set_ylim(bottom=0)
            axes[0, 0].set_ylabel("Dice on the target")
            axes[1, 0].set_ylabel("ASSD on the target (mm)")
        figure.suptitle(title, fontsize=10)
        save_figure(figure, path)
