"""Where voxels lie: one way to write a grid down, and one tolerance with which every command compares two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_uda.errors import UDAError

TOLERANCE = 0.1
"""Voxels that the corners of two grids may lie apart: headers round, and a tenth of a voxel changes no label."""

MOST_SPACING, LEAST_REACH, MOST_REACH = 100.0, 1.0, 5000.0
"""mm: a voxel, and the longest side of a scan (whole bodies; a cochlea)."""
MOST_RATIO = 20.0
"""Of the finest spacings of a scan and of the source, either way: 0.1 mm for a cochlea, 2 mm for a body."""
MOST_VOXELS = 1e9
"""Voxels that a case may have when it is resampled: 4 GB for each of the arrays that this needs."""
FARTHEST = 1e6
"""In mm: no spacing and no position is beyond it."""
BODY_AXES = ("left-right", "posterior-anterior", "inferior-superior")


@dataclass(frozen=True)
class Grid:
    """Voxels an axis, and ``affine``: index (and 1) -> position in mm in LPS, as ITK and DICOM have it."""

    size: tuple[int, ...]
    affine: np.ndarray

    @classmethod
    def of(cls, image: Any) -> Grid:
        """The grid of a SimpleITK image, or of a reader that has read a header."""
        size = tuple(image.GetSize())
        dimension = len(size)
        affine = np.eye(dimension + 1)
        affine[:-1, :-1] = np.reshape(image.GetDirection(), (dimension, dimension)) * np.asarray(image.GetSpacing())
        affine[:-1, -1] = image.GetOrigin()
        return cls(size, affine)

    @property
    def spacing(self) -> tuple[float, ...]:
        return tuple(np.linalg.norm(self.affine[:-1, :-1], axis=0).tolist())

    @property
    def origin(self) -> tuple[float, ...]:
        return tuple(self.affine[:-1, -1].tolist())

    @property
    def axes(self) -> np.ndarray:
        """Unit vectors along the axes, in columns."""
        return self.affine[:-1, :-1] / self.spacing

    @property
    def direction(self) -> tuple[float, ...]:
        """``axes`` row by row, as ITK gives them."""
        return tuple(self.axes.ravel().tolist())

    @property
    def is_orthogonal(self) -> bool:
        return np.allclose(self.axes.T @ self.axes, np.eye(len(self.size)), atol=1e-3)

    @property
    def code(self) -> str:
        """Letters of the directions in which the axes run (of a 3D grid), nearest ones where oblique: ``RAS``."""
        return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(self.direction)

    @property
    def body(self) -> tuple[int, ...]:
        """Index in ``BODY_AXES`` of each axis (of a 3D grid), the nearest one where oblique."""
        return tuple(next(i for i, pair in enumerate(("LR", "PA", "IS")) if letter in pair) for letter in self.code)


def place(image: sitk.Image, spacing: Sequence[float], origin: Sequence[float], direction: Sequence[float]) -> None:
    """Put the voxels of an image there."""
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)


def on_grid(array: np.ndarray, image: sitk.Image) -> sitk.Image:
    """An array ``(z, y, x)`` as an image on the grid of another one, number for number."""
    made = sitk.GetImageFromArray(array)
    made.CopyInformation(image)
    return made


def differences(grid: Grid, other: Grid, rotation: float = 0.0) -> list[str]:
    """What tells two grids apart, as ``spacing (1, 1, 3) and (1, 1, 5)``; nothing within the tolerance.

    Args:
        rotation: in radians, allowed besides, for an orientation that is held less precisely than the rest.
    """
    parts = {name: (getattr(grid, name), getattr(other, name)) for name in ("size", "spacing", "origin", "direction")}
    if grid.size == other.size:
        corners = np.array([[*corner, 1.0] for corner in product(*[(0, n - 1) for n in grid.size])])
        gaps = np.linalg.norm(corners @ (grid.affine - other.affine).T, axis=1)
        reach = np.linalg.norm((corners @ grid.affine.T)[:, :-1] - grid.origin, axis=1)
        same_spacing = np.allclose(grid.spacing, other.spacing, rtol=1e-3)
        if same_spacing and (gaps <= TOLERANCE * min(grid.spacing) + rotation * reach).all():
            return []
    apart = [
        f"{name} {short(a)} and {short(b)}"
        for name, (a, b) in parts.items()
        if len(a) != len(b) or not np.allclose(a, b, rtol=1e-3, atol=1e-3)
    ]
    return apart or [f"corners {gaps.max():.3g} mm apart"]


def check_same_geometry(image: Any, path: Path, other: Any, other_path: Path) -> None:
    """Raise ``UDAError`` unless both grids have the same size and their corners lie within ``TOLERANCE`` of each other.

    Args:
        image, other: SimpleITK images, readers that have read a header, or grids.
    """
    grid, other_grid = (part if isinstance(part, Grid) else Grid.of(part) for part in (image, other))
    if apart := differences(grid, other_grid):
        raise UDAError(
            f"{other_path}: its geometry differs from that of {path}: {'; '.join(apart)} (here the second). Expected "
            f"the same grid: resample {Path(other_path).name} onto {Path(path).name} (labels by nearest neighbour), or "
            "find the file that belongs to it."
        )


def check_possible(path: Path, size: Sequence[int], spacing: Sequence[float], origin: Sequence[float] = ()) -> None:
    """Raise ``UDAError`` for voxels (mm) that no scan of a body has: metres or micrometres in place of mm, 0, NaN.

    Of an axis with one slice the spacing says nothing, and may be anything but NaN. ``origin`` (mm) is the first
    voxel's place.
    """
    if not all(abs(place) <= FARTHEST for place in origin):
        raise UDAError(
            f"{path}: its first voxel lies at {mm(origin)}; expected a place within {FARTHEST:g} mm. The header is "
            "corrupt: repair it, or get the file again."
        )
    steps = [step for n, step in zip(size, spacing, strict=True) if n > 1]
    reach = [n * step for n, step in zip(size, spacing, strict=True) if n > 1]
    if (
        all(math.isfinite(step) and step > 0 for step in spacing)
        and max(steps, default=1.0) <= MOST_SPACING
        and LEAST_REACH <= max(reach, default=LEAST_REACH) <= MOST_REACH
    ):
        return
    raise UDAError(
        f"{path}: its voxels are {mm(spacing)}, {' x '.join(map(str, size))} of them; expected mm, and a scan of "
        f"{LEAST_REACH:g} mm to {MOST_REACH / 1000:g} m with voxels below {MOST_SPACING:g} mm. The spacing is wrong or "
        "in another unit: find out the real one and repair the header."
    )


def check_against_source(
    path: Path, size: Sequence[int], spacing: Sequence[float], source: Sequence[float], new_size: Sequence[float]
) -> None:
    """Raise ``UDAError`` for a scan whose voxels are of another order than the source's, before it is resampled.

    Args:
        size, spacing: of the scan, in mm.
        source: median spacing of the labelled cases, axes in any order.
        new_size: what resampling to the source's spacing would make of ``size``.
    """
    steps = [step for n, step in zip(size, spacing, strict=True) if n > 1] or spacing
    ratio = min(steps) / min(source)
    fault = ""
    if not all(math.isfinite(step) and step > 0 for step in spacing):
        fault = "these are no lengths"
    elif not 1 / MOST_RATIO <= ratio <= MOST_RATIO:
        fault = f"{ratio if ratio > 1 else 1 / ratio:.3g} times {'larger' if ratio > 1 else 'finer'}"
    elif math.prod(new_size) > MOST_VOXELS:
        fault = f"resampled to them it would have {math.prod(new_size):.2g} voxels, more than {MOST_VOXELS:.0e}"
    elif min(new_size) < 0.5:
        fault = "resampled to them nothing would be left of it"
    if fault:
        raise UDAError(
            f"{path}: its voxels are {mm(spacing)}, {' x '.join(map(str, size))} of them, those of the source "
            f"{mm(source)}: {fault}. Expected scans of the same order in mm. If the unit is wrong (metres, "
            "micrometres, cm) repair the header; if not, resample the scan, or leave it out."
        )


def mm(values: Sequence[float]) -> str:
    """Spacings for a message."""
    return " x ".join(f"{v:.4g}" for v in values) + " mm"


def short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v + 0.0:.5g}" for v in values) + ")"  # + 0.0: no minus zero
