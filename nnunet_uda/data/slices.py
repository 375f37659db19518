"""Find the thick axis of scans. A 2D network's slices must lie across it, in every scan alike.

nnU-Net's reorienting reader turns the axes of a file to the nearest axes of the body. Oblique scans of one kind, as
hearts in short axis, then have their thick slices along left-right in one patient and along front-back in the next. In
the files' own order they agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnunet_uda.errors import UDAError, some
from nnunet_uda.images.geometry import Grid, mm

REORIENTED, FILE, MIXED = "reoriented", "file", "mixed"
SAME_PLANE = 40.0
"""Degrees that a scan's slices may be tilted from the mean of all to count as the same plane."""
REMEDY = (
    "Resample these scans to the slices of the others or leave them out, and convert again; or train 3d_fullres, "
    "which has no slices"
)
LEAST = 8
"""Voxels an axis, below which a slice is no picture."""


def thick_axis(spacing: Sequence[float]) -> int | None:
    """The index of the spacing (mm) that is more than half larger than the middle one, or None."""
    return int(np.argmax(spacing)) if np.max(spacing) > 1.5 * np.median(spacing) else None


@dataclass(frozen=True)
class SliceOrder:
    """What ``slice_order`` finds.

    Args:
        order: ``REORIENTED`` (to the body's axes), ``FILE`` (the files' own), or ``MIXED``: neither agrees.
        odd: ids of the cases that differ from most others, where it is ``MIXED``.
        mirrored: case -> in what its axes run against those of most others, where it is ``FILE``.
    """

    order: str = REORIENTED
    odd: tuple[str, ...] = ()
    mirrored: Mapping[str, str] = field(default_factory=dict)

    @property
    def reader(self) -> str:
        return "SimpleITKIO" if self.order == FILE else "SimpleITKIOWithReorient"

    def to_json(self) -> dict[str, Any]:
        return {"order": self.order, **({"odd": list(self.odd)} if self.odd else {})}


def slice_order(domains: Sequence[Mapping[str, Grid]]) -> SliceOrder:
    """Find the order of axes in which the thick one is the same in all cases.

    Body axes come first. Where they do not agree, the files' order is taken if the thick axis is the same in all, and
    shows about the same plane of the body in all. Where each domain agrees in itself and shows another plane (axial
    here, coronal there), body axes stay: the converter warns of it.
    """
    cases = {name: grid for domain in domains for name, grid in domain.items()}
    thick = {name: axis for name, grid in cases.items() if (axis := thick_axis(grid.spacing)) is not None}
    body = {name: cases[name].body[axis] for name, axis in thick.items()}
    if len(set(body.values())) <= 1:
        return SliceOrder()
    axis = Counter(thick.values()).most_common(1)[0][0]
    normals = {name: grid.axes[:, axis] for name, grid in cases.items()}
    across = np.array([normals[name] for name in thick])
    mean = np.linalg.eigh(across.T @ across)[1][:, -1]  # of lines: a normal and its reverse are the same
    limit = np.cos(np.radians(SAME_PLANE))
    if all(thick.get(name, axis) == axis and abs(normals[name] @ mean) >= limit for name in cases):
        return SliceOrder(FILE, mirrored=_mirrored(cases, axis))
    if all(len({body[name] for name in domain if name in body}) <= 1 for domain in domains):
        return SliceOrder()
    usual = Counter(body.values()).most_common(1)[0][0]
    return SliceOrder(MIXED, tuple(sorted(name for name, found in body.items() if found != usual)))


def _mirrored(cases: Mapping[str, Grid], axis: int) -> dict[str, str]:
    """Cases whose axes run against, or are swapped with, those of most others, as far as directions tell."""
    names = list(cases)
    directions = np.array([cases[name].axes.T for name in names])  # (cases, axes, 3)
    cosines = np.einsum("aix,bjx->abij", directions, directions)
    usual = int(np.argmax((np.einsum("abii->abi", cosines) > 0.5).sum(axis=(1, 2))))
    found = {}
    for name, cosine in zip(names, cosines[usual], strict=True):
        in_plane = [i for i in range(3) if i != axis]
        first, second = in_plane
        notes = [f"reversed along {'xyz'[i]}" for i in range(3) if cosine[i, i] < -0.5]
        if min(abs(cosine[first, second]), abs(cosine[second, first])) > 0.7:
            notes.append(f"{'xyz'[first]} and {'xyz'[second]} swapped")
        if notes:
            found[name] = ", ".join(notes)
    return found


def odd_tests(order: SliceOrder, training: Sequence[Mapping[str, Grid]], tests: Mapping[str, Grid]) -> list[str]:
    """Test cases whose thick axis lies elsewhere than in training, in that order of axes."""

    def place(grid: Grid) -> int | None:
        axis = thick_axis(grid.spacing)
        return axis if axis is None or order.order == FILE else grid.body[axis]

    seen = {place(grid) for domain in training for grid in domain.values()} - {None}
    return sorted(name for name, grid in tests.items() if seen and place(grid) is not None and place(grid) not in seen)


def order_of(dataset_json: Mapping[str, Any]) -> str:
    """The order that a converter recorded; ``REORIENTED`` where it recorded none."""
    uda = dataset_json.get("uda")
    slices = uda.get("slices") if isinstance(uda, Mapping) else None
    return str(slices.get("order", REORIENTED)) if isinstance(slices, Mapping) else REORIENTED


def refuse_mixed_slices(dataset_json: Mapping[str, Any], patch_size: Sequence[int], where: str) -> None:
    """Raise ``UDAError`` where a 2D network would see slices in some scans and cuts across the slices in others.

    Args:
        patch_size: the configuration's; one of three numbers is 3D, which has no slices.
    """
    if len(patch_size) == 2 and order_of(dataset_json) == MIXED:
        odd = dataset_json["uda"]["slices"].get("odd", [])
        raise UDAError(
            f"{where}: the thick slices of {some(odd)} lie along another axis "
            f"than those of the other scans, in the files' order and in the body's: no plane is the slices' in all, so "
            f"nothing can be trained in 2D. {REMEDY}"
        )


def elsewhere(
    spacing: Sequence[float], trained_spacing: Sequence[float], transpose: Sequence[int], slices: bool
) -> str | None:
    """Why a new scan does not lie as those that the model was trained on, or None.

    Args:
        spacing: of the scan's array axes, mm.
        trained_spacing: the plans' median, after ``transpose``.
        slices: whether the network is 2D: it sees slices across the first axis after ``transpose``.
    """
    after = [float(spacing[i]) for i in transpose]
    thick = thick_axis(after)
    expected = 0 if slices else thick_axis(trained_spacing)
    if thick is None or thick == expected:
        return None
    found, usual = mm(after), mm(trained_spacing)
    return f"its spacing is {found}, where the scans in training had about {usual}: its thick slices lie elsewhere"


def plane_warning(plans: dict[str, Any], configuration: str) -> str | None:
    """What is wrong with 2D slices that are rows across the image, as of scans of one slice; None where nothing is."""
    size = plans.get("original_median_shape_after_transp", [])[1:]
    if len(plans["configurations"][configuration].get("patch_size", [])) != 2 or min(size, default=LEAST) >= LEAST:
        return None
    return (
        f"the slices of {configuration} are {' x '.join(f'{n:g}' for n in size)} voxels: the axis of the largest "
        "spacing is not the one across the images, so they are cut wrong. Choose: nnUNetUDA_configure -plane"
    )
