"""Pictures a trainer writes: curves over epochs, and panels of images and segmentations."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nnunet_uda.figures import legend_label, own_style, plt, save_figure
from nnunet_uda.palette import RUNS, structure_colour

Panel = tuple[str, np.ndarray, np.ndarray | None]
"""Title, image ``(H, W)`` and, where it is drawn, an integer segmentation ``(H, W)``."""

SMOOTHING = 0.8
"""Share of the running mean that an epoch keeps, in plots of losses."""
ALPHA = 0.45
"""Of a segmentation over its image."""
LETTERS = 28
"""Of a title that have room over a panel."""


def class_map(number: int) -> ListedColormap:
    """The palette's colours of ``number`` structures, the first for the value 0."""
    return ListedColormap([[part / 255 for part in structure_colour(index)] for index in range(number)])


@own_style()
def write_panels(
    path: Path | str, rows: list[list[Panel]], structures: Sequence[str], title: str = "", aspect: float = 1.0
) -> None:
    """Write rows of panels as one PNG; segmentations lie over their image, in the palette's colours.

    Args:
        rows: panels, all with pixels of the same shape.
        structures: names of the classes 1, 2, ... for the legend.
        title: over all; lines that are too long for the panels are wrapped.
        aspect: height of a pixel, its width being 1.
    """
    columns = max(len(row) for row in rows)
    shapes = [np.array(row[0][1].shape) for row in rows]
    width = 2.4
    heights = [max(0.6, width * aspect * shape[0] / shape[1]) + 0.3 for shape in shapes]
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, LETTERS * columns)]
    top, bottom = 0.25 * len(lines) + 0.1, 0.35
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(width * columns, sum(heights) + top + bottom), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    for row, row_axes in zip(rows, axes, strict=True):
        for (name, image, segmentation), axis in zip(row, row_axes, strict=False):
            low, high = np.percentile(image, (0.5, 99.5))
            axis.imshow(
                image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest", aspect=aspect
            )
            if segmentation is not None:
                shown = np.ma.masked_less_equal(segmentation, 0) - 1
                limits = {"vmin": -0.5, "vmax": len(structures) - 0.5}
                axis.imshow(
                    shown,
                    cmap=class_map(len(structures)),
                    **limits,
                    alpha=ALPHA,
                    interpolation="nearest",
                    aspect=aspect,
                )
            axis.set_title(name, fontsize=8)
    if lines:
        figure.suptitle("\n".join(lines), fontsize=10)
    patches = [
        Patch(color=class_map(len(structures))(index), label=legend_label(name))
        for index, name in enumerate(structures)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 2 * columns), frameon=False)
    save_figure(figure, path)


@own_style()
def plot_curves(
    path: Path | str,
    history: dict[str, list[float]],
    smooth: dict[str, Sequence[float]] | None = None,
    thresholds: dict[str, tuple[float, str]] | None = None,
    titles: dict[str, str] | None = None,
) -> None:
    """A plot for each name: every epoch as a dot, its running mean as a line.

    Args:
        history: a value an epoch (its mean), NaN where there is none.
        smooth: running means that are known; of all others one is made here.
        thresholds: a value to draw, and what it means.
        titles: instead of the name.
    """
    columns = min(3, len(history))
    rows = -(-len(history) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.7 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(history) :]:
        axis.axis("off")
    for (name, values), axis in zip(history.items(), axes.flat, strict=False):
        epochs = range(len(values))
        axis.plot(epochs, values, color=RUNS[5], marker="o", markersize=3, linewidth=0.6, alpha=0.7, label="epoch")
        means = (smooth or {}).get(name) or running_mean(values)
        axis.plot(epochs, means, color=RUNS[0], linewidth=1.8, label="running mean")
        if thresholds and name in thresholds:
            value, meaning = thresholds[name]
            axis.axhline(value, color=RUNS[3], linestyle="--", linewidth=1.2, label=f"{value:g}: {meaning}")
        axis.set_title((titles or {}).get(name, name))
        axis.set_xlabel("epoch")
        axis.set_ylabel("mean over the epoch" if not titles else "value")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axis.set_xlim(-0.5, max(len(values) - 0.5, 0.5))
        axis.grid(True)
        axis.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential, without the bias of its start; an undefined value (NaN) leaves it as it is."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        if not math.isnan(value):
            total, weight = SMOOTHING * total + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        means.append(total / weight if weight else math.nan)
    return means
