"""What a network's own predictions say of their quality: no label of the scan is needed.

A case is looked at on the grid that the network sees. Its signals come from the predictions of several *views* of it
(mirrored where the network was trained so, darkened, restyled and made smaller), from the certainty of their mean, from
each structure's shape beside the source's labels (``shapes``), from the edges of the image under the contours, and from
how far intensities and field of view lie from training's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from nnunet_uda.data.random_convolution import random_convolution
from nnunet_uda.data.random_style import change_looks, quantiles, with_statistics_of
from nnunet_uda.losses.uncertainty import normalised_entropy
from nnunet_uda.quality.shapes import describe_shapes, neighbours, robust, shape_deviations

SMALLER = 0.8
"""Of the view in another size."""
LEVELS = tuple(round(0.025 + 0.05 * step, 3) for step in range(20))
"""Of the quantiles by which intensities are compared."""
BAND = 3
"""Voxels around a structure whose edges are compared with those under its contour."""

Predict = Callable[[Tensor], Tensor]


def views(volume: Tensor, predict: Predict, mirror_axes: Sequence[int] | None, slices: bool) -> dict[str, Tensor]:
    """Softmax of a volume as it is (``plain``) and of changed views of it, put back into place.

    One pass of the network each: five, or without mirroring, where nnU-Net predicts with one, three (none is restyled).

    Args:
        volume: ``(C, Z, Y, X)`` z-scored.
        predict: maps it to ``(K, Z, Y, X)`` logits, for any size.
        mirror_axes: spatial axes of the volume, from 0, along which the network was trained to be mirrored.
        slices: whether the network is 2D; then the first axis is never resized.
    """

    def softmax(image: Tensor) -> Tensor:
        return predict(image).float().softmax(0)

    seen = {"plain": softmax(volume)}
    if mirror_axes:
        axes = [axis + 1 for axis in mirror_axes]
        seen["mirrored"] = softmax(volume.flip(axes)).flip(axes)
    seen["darkened"] = softmax(change_looks(volume[None])[0])
    if mirror_axes:
        seen["restyled"] = softmax(_restyled(volume))
    size = [max(1, round(length * SMALLER)) for length in volume.shape[1:]]
    if slices:
        size[0] = volume.shape[1]
    small = F.interpolate(volume[None], size, mode="trilinear", align_corners=False)[0]
    grown = F.interpolate(softmax(small)[None], volume.shape[1:], mode="trilinear", align_corners=False)
    seen["smaller"] = grown[0]
    return seen


def _restyled(volume: Tensor) -> Tensor:
    """Pass the volume through a small random network, always the same one; mean and deviation are kept."""
    generator = torch.Generator().manual_seed(1)
    return with_statistics_of(volume, random_convolution(volume[None], generator=generator)[0])


def case_signals(
    label: np.ndarray,
    spacing: Sequence[float],
    known: Sequence[dict[str, Any]],
    seen: dict[str, Tensor] | None = None,
    volume: Tensor | None = None,
    others: dict[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """The signals of each structure of one segmented case.

    Args:
        label: ``(Z, Y, X)`` the segmentation that is judged, structures 1 .. S.
        spacing: mm for each axis of ``label``.
        known: ``source_shapes``.
        seen: softmax of ``views``; None where there is a segmentation alone.
        volume: ``(C, Z, Y, X)`` the image that the network saw.
        others: segmentations of the same case by other folds (``fold_...``) or checkpoints (``checkpoint_...``).

    Returns:
        For each structure ``present`` and, where present, ``volume`` (mm3), ``components``, ``largest_share``,
        ``deviations`` (``shape_deviations``), and what the arguments allow of ``agreement`` (Dice with each view's
        segmentation), ``others`` (Dice with each of ``others``), ``expected_dice`` (of the views' mean
        probabilities, were they true), ``entropy_inside``, ``entropy_border`` (both from 0 to 1) and ``edges``.
    """
    number = len(known)
    shapes = describe_shapes(label, spacing, number)
    overlaps = {name: _dices(label, seen_view.argmax(0), number) for name, seen_view in (seen or {}).items()}
    beside = {name: _dices(label, torch.from_numpy(other), number) for name, other in (others or {}).items()}
    mean = torch.stack(list(seen.values())).mean(0) if seen else None
    entropy = None if mean is None else normalised_entropy(mean[None])[0, 0].cpu().numpy()
    signals = []
    for structure, (shape, of_source) in enumerate(zip(shapes, known, strict=True), 1):
        found: dict[str, Any] = {"present": shape is not None}
        found["agreement"] = {name: values[structure - 1] for name, values in overlaps.items() if name != "plain"}
        found["others"] = {name: values[structure - 1] for name, values in beside.items()}
        if shape is not None:
            found |= {key: shape[key] for key in ("volume", "components", "largest_share")}
            found["deviations"] = shape_deviations(shape, of_source) if of_source["present"] else None
            box = _box(label == structure, BAND + 1)
            inside = label[box] == structure
            if mean is not None and entropy is not None:
                found |= _certainty(inside, label == structure, mean[structure], entropy[box])
            if volume is not None:
                found["edges"] = _edges(inside, volume[(slice(None), *box)].cpu().numpy(), spacing)
        signals.append(found)
    return signals


def _dices(label: np.ndarray, other: Tensor, number: int) -> list[float]:
    """Dice of each structure in two segmentations; 0 where neither has it."""
    first, second = label.ravel().astype(np.int64), other.cpu().numpy().ravel().astype(np.int64)
    both, one, two = (np.bincount(values, minlength=number + 1) for values in (first[first == second], first, second))
    return (2 * both / np.maximum(one + two, 1))[1:].tolist()


def _box(mask: np.ndarray, margin: int) -> tuple[slice, ...]:
    (box,) = ndimage.find_objects(mask.astype(np.int8))
    return tuple(
        slice(max(0, part.start - margin), min(size, part.stop + margin))
        for part, size in zip(box, mask.shape, strict=True)
    )


def _certainty(inside: np.ndarray, mask: np.ndarray, probability: Tensor, entropy: np.ndarray) -> dict[str, float]:
    on_mask = float(probability[torch.from_numpy(mask).to(probability.device)].sum())
    border = _grown(inside, 1) & ~ndimage.binary_erosion(inside, np.ones((1, 3, 3)), border_value=1)
    core = inside & ~border if (inside & ~border).any() else inside
    return {
        "expected_dice": 2 * on_mask / (float(probability.sum()) + int(mask.sum())),
        "entropy_inside": float(entropy[core].mean()),
        "entropy_border": float(entropy[border].mean()) if border.any() else 0.0,
    }


def _grown(mask: np.ndarray, voxels: int) -> np.ndarray:
    """Dilate within each slice of the first axis, along which the spacing may differ."""
    return ndimage.binary_dilation(mask, np.ones((1, 3, 3)), iterations=voxels)


def _edges(mask: np.ndarray, image: np.ndarray, spacing: Sequence[float]) -> float:
    """Mean step of the image across the contour / mean step in the band around it; 1 where no edge lies there.

    Axes whose spacing is over 1.5 times the least are left out.
    """
    band = _grown(mask, BAND)
    at_border, around = [], []
    for axis in range(3):
        if spacing[axis] > 1.5 * min(spacing) or mask.shape[axis] < 2:
            continue
        steps = np.moveaxis(np.abs(np.diff(image, axis=axis + 1)).mean(0), axis, 0)
        (first, second), (near, far) = neighbours(mask, axis), neighbours(band, axis)
        at_border.append(steps[first != second])
        around.append(steps[near & far])
    border, all_of_band = (np.concatenate(parts) if parts else np.zeros(0) for parts in (at_border, around))
    if not border.size or not all_of_band.size or all_of_band.mean() <= 0:
        return 1.0
    return float(border.mean() / all_of_band.mean())


def known_scans(scans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What training's scans say of intensities and fields of view, from ``describe_scan`` of at least one."""
    levels = np.array([scan["quantiles"] for scan in scans])  # (N, C, L)
    fields = np.array([scan["field"] for scan in scans])
    return {
        "scans": len(scans),
        "quantiles": [[robust(values, 0.1) for values in channel.T] for channel in levels.transpose(1, 0, 2)],
        "field": [robust(np.log(axis), 0.15) for axis in fields.T],
    }


def describe_scan(volume: Tensor, spacing: Sequence[float]) -> dict[str, Any]:
    """``LEVELS``' ``quantiles`` of each channel and ``field`` of view (mm, 3 axes) of a volume ``(C, Z, Y, X)``."""
    field = [size * float(step) for size, step in zip(volume.shape[1:], spacing, strict=True)]
    return {"quantiles": [quantiles(channel, LEVELS) for channel in volume], "field": field}


def scan_deviations(scan: dict[str, Any], known: dict[str, Any]) -> dict[str, float]:
    """How far a scan's intensities (mean over quantiles, worst channel) and field of view lie off, in spreads."""
    channels = [
        float(np.mean([abs(value - middle) / width for value, (middle, width) in zip(values, of, strict=True)]))
        for values, of in zip(scan["quantiles"], known["quantiles"], strict=True)
    ]
    axes = [
        abs(math.log(length) - middle) / width
        for length, (middle, width) in zip(scan["field"], known["field"], strict=True)
    ]
    return {"intensities": max(channels), "field": max(axes)}
