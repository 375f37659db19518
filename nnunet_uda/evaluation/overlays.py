"""Pictures of a slice with the contours of its structures, and the slices of a volume for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import binary_erosion, zoom

from nnunet_uda.evaluation.metrics import parallel, read_reference
from nnunet_uda.evaluation.stacks import make_stack, picture_size
from nnunet_uda.images.geometry import check_same_geometry
from nnunet_uda.images.reading import LabelMap, read_image
from nnunet_uda.palette import label_colours

MAX_PIXELS = 300_000_000
"""Of all volumes in one page (about 40 MB): with more, they are shown smaller, and then with fewer slices."""
PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}
"""Axis of a (z, y, x) array in LPS orientation that is perpendicular to each plane."""


def draw_overlay(
    image2d: np.ndarray,
    seg2d: np.ndarray | None = None,
    colours: dict[int, tuple[int, int, int]] | None = None,
    spacing: tuple[float, float] = (1.0, 1.0),
    window: tuple[float, float] | None = None,
    size: int = 320,
    line_width: int = 2,
) -> np.ndarray:
    """Draw a slice in grey with the contour of every label.

    Args:
        image2d: any real dtype, (rows, columns).
        seg2d: integer labels of the same shape, 0 is background; ``None`` draws the image alone.
        colours: RGB of each label, 0 to 255; by default in the order of the labels' values.
        spacing: mm of a row and of a column; the picture has square pixels.
        window: intensities drawn black and white; by default the 0.5th and 99.5th percentile of the slice.
        size: pixels of the picture's longer side.
        line_width: pixels of a contour, drawn inside the structure's border.

    Returns:
        uint8, (height, width, 3).
    """
    image2d = np.asarray(image2d, dtype=np.float32)
    shape = image2d.shape if seg2d is None else np.shape(seg2d)
    if image2d.ndim != 2 or shape != image2d.shape:
        raise ValueError(f"expected a 2D slice and labels of its shape, got {image2d.shape} and {shape}")
    low, high = np.percentile(image2d, (0.5, 99.5)) if window is None else window
    grey = np.clip((image2d - low) / (high - low), 0, 1) if high > low else np.zeros_like(image2d)
    height, width = picture_size(np.array(image2d.shape) * spacing, size)
    factors = (height / image2d.shape[0], width / image2d.shape[1])
    smooth = zoom(grey, factors, order=1, mode="nearest", grid_mode=True)
    picture = np.repeat((255 * np.clip(smooth, 0, 1)).astype(np.uint8)[..., None], 3, axis=2)
    if seg2d is None:
        return picture
    labels = zoom(np.asarray(seg2d, dtype=np.int32), factors, order=0, mode="nearest", grid_mode=True)
    values = [int(value) for value in np.unique(labels) if value != 0]
    colours = label_colours({str(value): value for value in values}) if colours is None else colours
    for value in values:
        mask = labels == value
        picture[mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=line_width)] = colours[value]
    return picture


@dataclass(frozen=True)
class OverlayTask:
    """Files and settings of one volume's overlays."""

    name: str
    image: Path
    segmentations: dict[str, Path]
    """The reference first, then each run's prediction, by the title of their panel."""
    labels: dict[str, int]
    folder: Path
    n_slices: int
    plane: str | None = None
    label_map: LabelMap | None = None
    """The reference's values to those of ``labels``, where they differ."""


def draw_cases(tasks: dict[str, OverlayTask], num_processes: int) -> list[dict[str, Any]]:
    """Call ``draw_case`` for each volume and add its name, a key of ``tasks``, under ``volume``."""
    share = MAX_PIXELS // max(1, len(tasks))
    drawn = parallel(draw_case, [(task, share) for task in tasks.values()], num_processes, "Overlays")
    return [{"volume": name, **shown} for name, shown in zip(tasks, drawn, strict=True)]


def draw_case(task: OverlayTask, pixels: int = 10**7) -> dict[str, Any]:
    """Write ``NAME_PLANE_INDEX.png`` for the chosen slices of one volume, and make its sheets for the page.

    Args:
        pixels: of the volume on the page, at most.

    Returns:
        ``plane``, ``depth`` (number of slices), ``chosen``: ``{"index", "title", "file"}`` of each chosen slice, and
        ``stack`` as ``make_stack`` returns it.

    Raises:
        UDAError: if the image lies on another grid than the reference.
    """
    image = read_image(task.image, (2, 3))
    (first, reference_path), *_ = task.segmentations.items()
    segmentations = {
        title: read_reference(path, task.label_map if title == first else None)
        for title, path in task.segmentations.items()
    }
    check_same_geometry(segmentations[first], reference_path, image, task.image)
    if image.GetDimension() == 3:
        image = sitk.DICOMOrient(image, "LPS")
        segmentations = {title: sitk.DICOMOrient(segmentation, "LPS") for title, segmentation in segmentations.items()}
    spacing = np.array(image.GetSpacing()[::-1])
    array = sitk.GetArrayFromImage(image).astype(np.float32)
    arrays = {title: sitk.GetArrayFromImage(segmentation) for title, segmentation in segmentations.items()}
    if array.ndim == 2:
        array, arrays = array[None], {title: labels[None] for title, labels in arrays.items()}
        spacing = np.array([1.0, *spacing])
    plane = task.plane or _thick_plane(spacing)
    axis = PLANES[plane]
    in_plane = tuple(spacing[[i for i in range(3) if i != axis]])
    window = tuple(np.percentile(array, (0.5, 99.5)))
    colours = label_colours(task.labels)
    images, cuts = upright(array, axis), {title: upright(labels, axis) for title, labels in arrays.items()}

    chosen: list[dict[str, Any]] = []
    reference, *others = cuts.values()
    for index, reason in choose_slices(reference, others, task.n_slices):
        panels = {"image": draw_overlay(images[index], None, colours, in_plane, window)}
        for title, labels in cuts.items():
            panels[title] = draw_overlay(images[index], labels[index], colours, in_plane, window)
        title = f"{plane} slice {index + 1} of {len(images)}{reason}"
        file = f"{task.name}_{plane}_{index:03d}.png"
        _save_figure(task.folder / file, f"{task.name}, {title}", panels, task.labels, colours)
        chosen.append({"index": index, "title": title, "file": file})
    kept = [part["index"] for part in chosen]
    stack = make_stack(images, cuts, list(colours), in_plane, window, pixels, kept)
    return {"plane": plane, "depth": len(images), "chosen": chosen, "stack": stack}


def _thick_plane(spacing: np.ndarray) -> str:
    """The acquisition plane where one spacing is clearly the largest, else axial."""
    order = np.argsort(spacing)
    thick = spacing[order[2]] > 1.2 * spacing[order[1]]
    return list(PLANES)[order[2]] if thick else "axial"


def upright(array: np.ndarray, axis: int) -> np.ndarray:
    """All slices of an LPS array ``(Z, Y, X)`` along ``axis``, which comes first; anterior or superior side up."""
    cuts = np.moveaxis(array, axis, 0)
    return cuts if axis == 0 else cuts[:, ::-1]


def choose_slices(reference: np.ndarray, predictions: Sequence[np.ndarray], n_slices: int) -> list[tuple[int, str]]:
    """Choose at most ``n_slices`` slices, evenly over the reference's extent; one is where the runs err most.

    Args:
        reference: labels, ``(N, rows, columns)``; where it is empty the predictions' extent is used.
        predictions: labels of each run, same shape.
        n_slices: at least 1.

    Returns:
        ``(index, reason)`` in order; the reason is empty or says that this slice holds the most wrong voxels.
    """
    errors = sum(((prediction != reference).sum(axis=(1, 2)) for prediction in predictions), np.zeros(1, dtype=int))
    occupied = np.flatnonzero((reference != 0).any(axis=(1, 2)))
    if not len(occupied):
        occupied = np.flatnonzero(errors)
    if not len(occupied):
        return [(len(reference) // 2, "")]
    worst = int(np.argmax(errors)) if errors.any() else None
    even = n_slices - (worst is not None)
    chosen = {int(occupied[int((i + 0.5) / even * len(occupied))]) for i in range(even)}
    chosen |= {worst} if worst is not None else set()
    return [(index, ", most wrong voxels" if index == worst else "") for index in sorted(chosen)]


def _save_figure(
    path: Path,
    title: str,
    panels: dict[str, np.ndarray],
    labels: dict[str, int],
    colours: dict[int, tuple[int, int, int]],
) -> None:
    """Save all panels side by side with titles and a legend; one picture pixel is one figure pixel."""
    from matplotlib.patches import Patch

    from nnunet_uda.figures import legend_label, new_figure, own_style

    with own_style():
        height, width, _ = next(iter(panels.values())).shape
        structures = [(name, value) for name, value in labels.items() if value != 0]
        gap, top = 8, 52
        total = len(panels) * (width + gap) + gap
        columns = max(1, min(len(structures), total // 130))
        bottom = 22 * -(-len(structures) // columns) + 10
        figure_height = top + height + bottom
        figure = new_figure(total, figure_height)
        figure.text(gap / total, 1 - 16 / figure_height, title, fontsize=9, color="#333", va="center")
        for i, (name, panel) in enumerate(panels.items()):
            box = ((gap + i * (width + gap)) / total, bottom / figure_height, width / total, height / figure_height)
            axes = figure.add_axes(box)
            axes.imshow(panel, interpolation="nearest", aspect="auto")
            axes.set_title(name, fontsize=9, pad=4)
            axes.axis("off")
        patches = [
            Patch(color=[part / 255 for part in colours[value]], label=legend_label(name)) for name, value in structures
        ]
        figure.legend(handles=patches, loc="lower center", ncols=columns, frameon=False, fontsize=8, borderaxespad=0.2)
        figure.savefig(path)
