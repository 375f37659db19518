"""Pictures a trainer writes: loss curves, and panels of images and segmentations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_uda.figures import plt, save_figure

Panel = tuple[str, np.ndarray, np.ndarray | None]
"""Title, image ``(H, W)`` and, where it is drawn, an integer segmentation ``(H, W)``."""


def write_panels(path: Path | str, rows: list[list[Panel]], num_classes: int) -> None:
    """Write rows of panels as one PNG; segmentations lie over their image, one colour a class."""
    colours = plt.get_cmap("tab10" if num_classes <= 10 else "turbo", max(num_classes, 10))
    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(2.6 * columns, 2.8 * len(rows)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, row_axes in zip(rows, axes, strict=True):
        for (title, image, segmentation), axis in zip(row, row_axes, strict=False):
            low, high = np.percentile(image, (0.5, 99.5))
            axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
            if segmentation is not None:
                shown = np.ma.masked_less_equal(segmentation, 0) - 1
                axis.imshow(shown, cmap=colours, vmin=0, vmax=max(num_classes, 10), alpha=0.5, interpolation="nearest")
            axis.set_title(title, fontsize=9)
    figure.tight_layout()
    save_figure(figure, path)


def plot_losses(path: Path | str, history: dict[str, list[float]]) -> None:
    """One small plot a loss term, value over epochs (means over each epoch)."""
    columns = min(3, len(history))
    rows = -(-len(history) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.4 * rows), squeeze=False)
    for axis in axes.flat[len(history) :]:
        axis.axis("off")
    for (name, values), axis in zip(history.items(), axes.flat, strict=False):
        axis.plot(range(len(values)), values)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("epoch", fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
