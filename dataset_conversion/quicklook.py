"""One picture of a converted dataset, so that a wrong orientation or a label on the wrong side is seen at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_uda.evaluation.overlays import PLANES, draw_overlay
from nnunet_uda.images.geometry import Grid
from nnunet_uda.images.reading import read_image
from nnunet_uda.palette import label_colours

EDGES = {"axial": "APRL", "coronal": "SIRL", "sagittal": "SIAP"}
"""Letters at the top, bottom, left and right edge of each plane's picture."""
PANEL = 300
"""Pixels of a panel's longer side."""


def slices(image: sitk.Image, label: sitk.Image | None) -> dict[str, tuple[np.ndarray, np.ndarray | None, tuple]]:
    """One slice a plane, drawn as ``EDGES`` says by the header: with the most structures, else the middle one.

    Args:
        image: 3D, any orientation; an oblique grid is not resampled, its axes take the nearest anatomical names.
        label: classes on the same grid, or None.

    Returns:
        For each plane: intensities (rows, columns), classes of the same shape or None, mm of a row and of a column.
    """
    voxels, spacing = oriented(image)
    classes = None if label is None else oriented(label)[0]
    cuts = {}
    for plane, axis in PLANES.items():
        others = tuple(i for i in range(3) if i != axis)
        index = voxels.shape[axis] // 2
        if classes is not None:
            counts = np.array([np.bincount(cut.ravel(), minlength=256)[1:] for cut in np.moveaxis(classes, axis, 0)])
            if counts.any():
                index = int(np.argmax((counts > 0).sum(axis=1) + counts.sum(axis=1) / (counts.sum() + 1)))
        up = slice(None, None, 1 if plane == "axial" else -1)  # z grows towards the head, rows grow downwards
        cut = np.take(voxels, index, axis=axis)[up]
        mask = None if classes is None else np.take(classes, index, axis=axis)[up]
        cuts[plane] = (cut, mask, (spacing[others[0]], spacing[others[1]]))
    return cuts


def oriented(image: sitk.Image) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A view of the voxels as ``DICOMOrient`` to LPS would put them, (z, y, x), and mm an axis; nothing is copied."""
    code = Grid.of(image).code
    axes = [next(i for i, letter in enumerate(code) if letter in pair) for pair in ("IS", "AP", "RL")]
    view = sitk.GetArrayViewFromImage(image).transpose([2 - axis for axis in axes])
    flipped = view[tuple(slice(None, None, -1 if code[axis] in "IAR" else 1) for axis in axes)]
    return flipped, tuple(image.GetSpacing()[axis] for axis in axes)


def window(image: sitk.Image) -> tuple[float, float]:
    """0.5th and 99.5th percentile of about a million voxels, regularly taken."""
    voxels = sitk.GetArrayViewFromImage(image)
    step = max(1, round((voxels.size / 1e6) ** (1 / 3)))
    low, high = np.percentile(voxels[::step, ::step, ::step], (0.5, 99.5))
    return (float(low), float(high)) if high > low else (float(voxels.min()), float(voxels.max()))


def obliquity(image: sitk.Image) -> float:
    """Largest angle in degrees between an axis of the grid and the nearest axis of the patient."""
    cosines = np.abs(np.array(image.GetDirection()).reshape(3, 3)).max(axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines, 0, 1))).max())


def _picture(
    title: str, image_path: Path, label_path: Path | None, colours: dict[int, tuple[int, int, int]]
) -> tuple[str, dict[str, np.ndarray]]:
    """Title with the grid's facts, and a panel for each plane. No volume is kept."""
    image = read_image(image_path)
    size = " x ".join(map(str, image.GetSize()))
    spacing = " x ".join(f"{v:.3g}" for v in image.GetSpacing())
    angle = obliquity(image)
    notes = f", {angle:.0f}° oblique: nearest axes named" if angle >= 1 else ""
    without = "" if label_path else ", without labels"
    shown = window(image)
    panels = {
        plane: draw_overlay(cut, mask, colours, mm, shown, PANEL)
        for plane, (cut, mask, mm) in slices(image, read_image(label_path) if label_path else None).items()
    }
    return f"{title}\n{size} voxels, {spacing} mm, {Grid.of(image).code}{notes}{without}", panels


def draw_quicklook(rows: Sequence[tuple[str, Path, Path | None]], structures: Sequence[str], path: Path) -> None:
    """Write a PNG: a row for each ``(title, image file, label file or None)``, a column for each plane.

    One volume is in memory at a time. Label files hold 1, 2, ... in the order of ``structures``.
    """
    from matplotlib.patches import Patch

    from nnunet_uda.figures import legend_label, new_figure, own_style

    labels = {structure: i for i, structure in enumerate(structures, 1)}
    with own_style():
        colours = label_colours(labels)
        pictures = [_picture(*row, colours) for row in rows]
        gap, top, bottom = 28, 66, 30
        heights = [top + max(panel.shape[0] for panel in panels.values()) + gap for _, panels in pictures]
        width, height = 3 * (PANEL + gap) + gap, sum(heights) + bottom
        figure = new_figure(width, height)
        y = height
        for (title, panels), row in zip(pictures, heights, strict=True):
            figure.text(gap / width, (y - 8) / height, title, fontsize=9, va="top", linespacing=1.4)
            for column, (plane, panel) in enumerate(panels.items()):
                rows_px, columns_px = panel.shape[:2]
                left = gap + column * (PANEL + gap) + (PANEL - columns_px) // 2
                box = (left / width, (y - top - rows_px) / height, columns_px / width, rows_px / height)
                axes = figure.add_axes(box)
                axes.imshow(panel, interpolation="nearest", aspect="auto")
                axes.axis("off")
                in_pixels: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset pixels"}
                for letter, (x, v, dx, dy) in zip(
                    EDGES[plane], ((0.5, 1, 0, 7), (0.5, 0, 0, -8), (0, 0.5, -8, 0), (1, 0.5, 8, 0)), strict=True
                ):
                    axes.annotate(
                        letter, (x, v), (dx, dy), ha="center", va="center", fontsize=9, fontweight="bold",
                        color="#c01818", annotation_clip=False, **in_pixels,
                    )  # fmt: skip
                axes.annotate(plane, (0, 1), (0, 4), fontsize=8, color="#444", **in_pixels)
            y -= row
        patches = [
            Patch(color=[part / 255 for part in colours[value]], label=legend_label(name))
            for name, value in labels.items()
        ]
        figure.legend(handles=patches, loc="lower center", ncols=min(len(patches), 8), frameon=False, fontsize=8)
        figure.savefig(path)
