"""Shapes of structures in a label volume, and how far they lie from those of the labelled source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

SMALL_COMPONENT = 0.01
"""Components smaller than this share of a structure's largest are not counted: a few voxels say little."""
FLOORS = {"size": 0.15, "roundness": 0.08, "place": 0.08, "contacts": 0.05}
"""Least spreads: of natural logarithms, of shares of the field of view and of shares of the surface."""
MOST = 1e3
"""Of robust units, so that numbers stay finite."""


def contact_areas(label: np.ndarray, spacing: Sequence[float], num_classes: int) -> np.ndarray:
    """``(K, K)`` areas in mm2 over which voxels of two classes share a face; the image's border is no contact.

    Args:
        label: ``(Z, Y, X)`` integers from 0 to K - 1.
        spacing: mm for each axis of ``label``.
        num_classes: K, background included.
    """
    areas = np.zeros((num_classes, num_classes))
    for axis in range(3):
        first, second = neighbours(label, axis)
        differ = first != second
        pairs = first[differ].astype(np.int64) * num_classes + second[differ]
        counts = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
        areas += (counts + counts.T) * (math.prod(spacing) / spacing[axis])
    return areas


def neighbours(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Two views of ``array`` that hold each voxel and its neighbour along the axis."""
    moved = np.moveaxis(array, axis, 0)
    return moved[:-1], moved[1:]


def describe_shapes(label: np.ndarray, spacing: Sequence[float], num_structures: int) -> list[dict[str, Any] | None]:
    """What can be measured of each structure's shape; None where the structure is absent.

    Args:
        label: ``(Z, Y, X)`` integers, 0 is background, structures are 1 .. ``num_structures``.
        spacing: mm for each axis of ``label``.

    Returns:
        For each structure ``volume`` (mm3), ``extent`` (mm, 3 axes), ``touches`` (3 axes: at the image's border),
        ``components`` (number), ``largest_share``, ``roundness`` (surface / volume^(2/3); 4.8 of a ball, 6 of a box),
        ``contacts`` (share of the surface that touches each class, background first) and ``place`` (centroid in shares
        of the field of view).
    """
    areas = contact_areas(label, spacing, num_structures + 1)
    boxes = ndimage.find_objects(label.astype(np.int32), max_label=num_structures)
    described: list[dict[str, Any] | None] = []
    for structure, box in enumerate(boxes, 1):
        if box is None:
            described.append(None)
            continue
        mask = label[box] == structure
        volume = int(mask.sum()) * math.prod(spacing)
        components, number = ndimage.label(mask)
        sizes = np.bincount(components.ravel(), minlength=number + 1)[1:]
        surface = float(areas[structure].sum())
        starts = np.array([part.start for part in box])
        centroid = (starts + ndimage.center_of_mass(mask) + 0.5) / label.shape
        described.append({
            "volume": float(volume),
            "extent": [(part.stop - part.start) * float(step) for part, step in zip(box, spacing, strict=True)],
            "touches": [part.start == 0 or part.stop == size for part, size in zip(box, label.shape, strict=True)],
            "components": int((sizes >= SMALL_COMPONENT * sizes.max()).sum()),
            "largest_share": float(sizes.max() / sizes.sum()),
            "roundness": surface / volume ** (2 / 3),
            "contacts": (areas[structure] / max(surface, 1e-12)).tolist(),
            "place": centroid.tolist(),
        })  # fmt: skip
    return described


def robust(values: Sequence[float], floor: float) -> list[float]:
    """Median and spread (1.4826 MAD, at least ``floor``, more for few values) of ``values``, at least one."""
    array = np.asarray(values, dtype=float)
    median = float(np.median(array))
    spread = max(1.4826 * float(np.median(np.abs(array - median))), floor)
    return [median, spread * (1 + 1 / len(array))]


def source_shapes(cases: Sequence[Sequence[dict[str, Any] | None]], num_structures: int) -> list[dict[str, Any]]:
    """What the source's labels say of each structure, from ``describe_shapes`` of at least one case.

    A structure that most labels show cut off at the image's border along an axis (a spinal cord) has no volume of its
    own: its size is the volume divided by its extent along such ``open`` axes. Sizes and roundness are logarithms.
    """
    known: list[dict[str, Any]] = []
    for structure in range(num_structures):
        shown = [shape for case in cases if (shape := case[structure]) is not None]
        if not shown:
            known.append({"present": 0.0, "cases": len(cases)})
            continue
        is_open = [bool(np.mean([shape["touches"][axis] for shape in shown]) >= 0.5) for axis in range(3)]
        sizes = [_log_size(shape, is_open) for shape in shown]
        contacts = np.array([shape["contacts"] for shape in shown])
        known.append({
            "present": len(shown) / len(cases),
            "cases": len(cases),
            "open": is_open,
            "size": robust(sizes, FLOORS["size"]),
            "size_range": [min(sizes), max(sizes)],
            "volume_range": [f([shape["volume"] for shape in shown]) for f in (min, max)],
            "roundness": robust([math.log(max(shape["roundness"], 1e-3)) for shape in shown], FLOORS["roundness"]),
            "contacts": [robust(column, FLOORS["contacts"]) for column in contacts.T],
            "place": [robust([shape["place"][axis] for shape in shown], FLOORS["place"]) for axis in range(3)],
            "components": max(shape["components"] for shape in shown),
            "largest_share": min(shape["largest_share"] for shape in shown),
        })  # fmt: skip
    return known


def _log_size(shape: dict[str, Any], is_open: Sequence[bool]) -> float:
    lengths = [extent for extent, is_one in zip(shape["extent"], is_open, strict=True) if is_one]
    return math.log(shape["volume"] / math.prod(lengths))


def shape_deviations(shape: dict[str, Any], known: dict[str, Any]) -> dict[str, float]:
    """How far a present structure's shape lies from the source's, in the source's spreads.

    Returns:
        ``size`` (signed), ``size_bound`` (the best Dice that a mask of this size can have with one of a plausible size,
        2 v / (v + V)), ``roundness``, ``place`` (both 0 where the scan cuts the structure off), ``contacts`` (share of
        the surface that lies at other neighbours than the source's spread allows), ``pieces`` (share outside of the
        largest component beyond the source's).
    """
    size = _log_size(shape, known["open"])
    median, spread = known["size"]
    low, high = known["size_range"]
    low, high = min(low, median - 2 * spread) - spread / 2, max(high, median + 2 * spread) + spread / 2
    cut = any(touches and not is_open for touches, is_open in zip(shape["touches"], known["open"], strict=True))
    beyond = max(size - high, 0.0 if cut else low - size, 0.0)
    roundness = 0.0 if cut else _units(math.log(max(shape["roundness"], 1e-3)), known["roundness"])
    place = max(_units(part, of) for part, of in zip(shape["place"], known["place"], strict=True))
    excess = [
        max(0.0, abs(share - middle) - 2 * width)
        for share, (middle, width) in zip(shape["contacts"], known["contacts"], strict=True)
    ]
    return {
        "size": float(np.clip((size - median) / spread, -MOST, MOST)),
        "size_bound": 2 / (1 + math.exp(beyond)),
        "roundness": roundness,
        "place": 0.0 if cut else place,
        "contacts": min(1.0, sum(excess)),
        "pieces": max(0.0, known["largest_share"] - shape["largest_share"]),
    }


def _units(value: float, of: Sequence[float]) -> float:
    return min(MOST, abs(value - of[0]) / of[1])
