"""What is done to a scan's intensities before nnU-Net sees it: in a converter, and again before a prediction.

nnU-Net cannot do this itself: its clip is for CT and uses the training set's percentiles. A z-score of a whole CT in HU
leaves soft tissue almost no range, and single bright voxels of an MR take it from the rest. So every converter clips
what it writes, each domain as it needs it, and records how in ``dataset.json``; ``nnunet_uda.data.new_scans`` does the
same to scans that a trained model predicts, and ``nnUNetUDA_intensities`` to files.

Clipping is idempotent: a scan that went through it can go through it again, and stays the same voxel by voxel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_uda.errors import UDAError, shown
from nnunet_uda.images.geometry import on_grid
from nnunet_uda.images.reading import check_image, read_image

PRESETS = {
    "abdomen": (-125, 275),
    "bone": (-500, 1300),
    "brain": (0, 80),
    "heart": (-150, 650),
    "lung": (-1350, 150),
    "soft_tissue": (-160, 240),
}
"""Windows in HU by name."""
PERCENTILES = (0.5, 99.5)
"""Of a domain that is not CT."""
DEFAULT = "default"
"""Stands for intensities that a converter is to choose by the domain."""
SLAB = 2**20
"""Voxels that are looked at or clipped at a time: a volume may be 1 GiB."""
FORMS = f"two numbers (a window in HU), {', '.join(PRESETS)}, percentiles LOW HIGH, or none"


class NoContrastError(UDAError):
    """Clipping would leave one value."""


@dataclass(frozen=True)
class Intensities:
    """Clipping of one volume, and its scaling: by ``percentiles`` or by a ``window``, one of the two.

    Args:
        percentiles: (low, high), 0 <= low < high <= 100, over the nonzero voxels of each volume: the brain, where the
            skull is stripped. The bounds are values of the scan: the nearest below ``low`` and above ``high``.
        scale: (low, high) that the two bounds are mapped to, or None to keep the scan's units and voxel type.
        window: (low, high) in HU, whole numbers.
        origin: where they come from, in words.

    Raises:
        UDAError: for bounds or a scale out of order.
    """

    percentiles: tuple[float, float] | None = None
    scale: tuple[float, float] | None = None
    window: tuple[float, float] | None = None
    origin: str = field(default="given", compare=False)

    def __post_init__(self) -> None:
        if (self.percentiles is None) == (self.window is None):
            raise UDAError("expected percentiles or a window, one of the two.")
        if self.percentiles is not None:
            low, high = self.percentiles
            if not 0 <= low < high <= 100:
                raise UDAError(f"percentiles {low:g} {high:g}: expected 0 <= low < high <= 100, as 5 95.")
        if self.window is not None:
            low, high = self.window
            if not (-math.inf < low < high < math.inf and low == round(low) and high == round(high)):
                raise UDAError(
                    f"window {low:g} {high:g}: expected two whole numbers in HU, the lower one first, as -125 275."
                )
            object.__setattr__(self, "window", (int(low), int(high)))
        if self.scale is not None and not -math.inf < self.scale[0] < self.scale[1] < math.inf:
            raise UDAError(f"range {self.scale[0]:g} {self.scale[1]:g}: expected two numbers, low < high, as -1 1.")

    @property
    def _shares(self) -> tuple[float, float]:
        """The percentiles, which there are where there is no window."""
        assert self.percentiles is not None
        return self.percentiles

    def __str__(self) -> str:
        if self.window is not None:
            text = f"window {self.window[0]} to {self.window[1]} HU"
        else:
            text = f"percentiles {self._shares[0]:g} to {self._shares[1]:g} of the nonzero voxels"
        return text if self.scale is None else f"{text}, scaled to [{self.scale[0]:g}, {self.scale[1]:g}]"

    def bounds(self, voxels: np.ndarray) -> tuple[float, float]:
        """The values at which ``voxels``, an array of any shape, are clipped; both 0 if all are 0."""
        if self.window is not None:
            return self.window
        count = sum(len(values) for values in _nonzero(voxels))
        if not count:
            return 0.0, 0.0
        # values of the scan: between two of them, they would move each time that a scan is clipped again
        share = (count - 1) / 100
        below, above = math.floor(self._shares[0] * share) + 1, count - math.ceil(self._shares[1] * share)
        lowest = highest = np.empty(0, voxels.dtype)
        for values in _nonzero(voxels):  # the two tails alone are kept
            lowest = np.concatenate((lowest, values))
            highest = np.concatenate((highest, values))
            if len(lowest) > below:
                lowest = np.partition(lowest, below - 1)[:below]
            if len(highest) > above:
                highest = np.partition(highest, len(highest) - above)[-above:]
        return float(lowest.max()), float(highest.min())

    def clip(self, voxels: np.ndarray, where: Path | str) -> np.ndarray:
        """``voxels`` (any shape) clipped: of the same type, or float32 where they are scaled. A new array.

        With percentiles, voxels of value 0 are background: they stay 0, or take the low end of ``scale``.

        Args:
            where: the scan, for messages.

        Raises:
            NoContrastError: if one value would be left.
        """
        if self.scale is not None and self._is_scaled(voxels):
            return voxels.astype(np.float32)
        return self._clipped(voxels, *self._checked_bounds(voxels, where))

    def _checked_bounds(self, voxels: np.ndarray, where: Path | str) -> tuple[float, float]:
        low, high = self.bounds(voxels)
        if self.window is not None:
            bottom, top = (float(end) for end in (voxels.min(), voxels.max()))
            if top <= low or bottom >= high:
                raise NoContrastError(
                    f"{where}: its values are {bottom:g} to {top:g}, all outside of the window {low} to {high} HU; "
                    "expected a window that shows the scan. Give another one, or none."
                )
        elif low == high:
            raise NoContrastError(
                f"{where}: percentiles {self._shares[0]:g} and {self._shares[1]:g} of its "
                f"{np.count_nonzero(voxels)} nonzero voxels are both {low:g}; expected an image with contrast. "
                "Leave this scan out, or clip less."
            )
        return low, high

    def _clipped(self, voxels: np.ndarray, low: float, high: float) -> np.ndarray:
        foreground = None if self.window is not None else voxels != 0
        if self.scale is not None:
            background, top = self.scale
            clipped = background + (np.clip(voxels.astype(np.float64), low, high) - low) * (
                (top - background) / (high - low)
            )
            return (clipped if foreground is None else np.where(foreground, clipped, background)).astype(np.float32)
        if voxels.dtype.kind in "iu":  # a bound outside of the type's range clips nothing
            limits = np.iinfo(voxels.dtype)
            low, high = max(int(low), limits.min), min(int(high), limits.max)
        clipped = np.clip(voxels, voxels.dtype.type(low), voxels.dtype.type(high))
        return clipped if foreground is None else np.where(foreground, clipped, voxels.dtype.type(0))

    def _is_scaled(self, voxels: np.ndarray) -> bool:
        """Whether ``clip`` made these values: both ends are those of ``scale``, and hold the share that clips leave."""
        assert self.scale is not None
        bottom, top = (np.float32(end) for end in self.scale)
        if voxels.dtype.kind != "f" or voxels.min() != bottom or voxels.max() != top:
            return False
        if self.percentiles is None:
            return True
        low, high = (share / 100 for share in self.percentiles)
        at_bottom, at_top = int((voxels == bottom).sum()), int((voxels == top).sum())
        between = voxels.size - at_bottom - at_top
        expected = between / (high - low)  # voxels of the foreground, of which ties may have left more at the ends
        return at_top >= (1 - high) * expected - 2 and at_bottom >= low * expected - 2

    def apply(self, image: sitk.Image, path: Path) -> sitk.Image:
        """``image`` as ``clip`` makes it, on the same grid; a volume that keeps its type is changed in place."""
        voxels = sitk.GetArrayViewFromImage(image)
        if self.scale is not None or voxels.ndim != 3:
            return on_grid(self.clip(voxels, path), image)
        bounds, step = self._checked_bounds(voxels, path), max(1, SLAB // voxels[0].size)
        for first in range(0, len(voxels), step):
            part = self._clipped(sitk.GetArrayViewFromImage(image)[first : first + step], *bounds)
            image[:, :, first : first + len(part)] = sitk.GetImageFromArray(part)
        return image

    def to_json(self) -> dict[str, Any]:
        """What ``dataset.json`` holds of a domain under ``uda``, ``intensities``."""
        scale = None if self.scale is None else list(self.scale)
        if self.window is not None:
            return {"window": list(self.window), "unit": "HU", "range": scale, "from": self.origin}
        return {
            "percentiles": list(self._shares),
            "over": "nonzero voxels of each volume",
            "range": scale,
            "from": self.origin,
        }


def _nonzero(voxels: np.ndarray) -> Iterator[np.ndarray]:
    """The finite values of ``voxels`` other than 0, at most ``SLAB`` at a time."""
    flat = voxels.reshape(-1)
    for first in range(0, len(flat), SLAB):
        part = flat[first : first + SLAB]
        part = part[part != 0]
        yield part[np.isfinite(part)] if part.dtype.kind == "f" else part


# --- command lines ----------------------------------------------------------------------------------------------------


def parse_intensities(words: Sequence[str] | None, option: str) -> Intensities | str | None:
    """The intensities that an option asks for: ``DEFAULT`` if it was not given, None for ``none``.

    Raises:
        UDAError: for anything else than ``FORMS``.
    """
    if words is None:
        return DEFAULT
    text = f"{option} {' '.join(words)}"
    first, *others = (word.strip().lower() for word in words)
    if first == "none" and not others:
        return None
    if first in PRESETS and not others:
        return Intensities(window=PRESETS[first], origin=f"preset {first}")
    kind, numbers = ("percentiles", others) if first == "percentiles" else ("window", [first, *others])
    if kind == "percentiles" and not numbers:
        return Intensities(PERCENTILES)
    if first == "window":
        numbers = others
    try:
        low, high = map(float, numbers)
    except ValueError:
        raise UDAError(f"{text}: expected {FORMS}.") from None
    try:
        return Intensities(percentiles=(low, high)) if kind == "percentiles" else Intensities(window=(low, high))
    except UDAError as error:
        raise UDAError(f"{option}: {error}") from None


# --- Hounsfield units -------------------------------------------------------------------------------------------------


def not_hounsfield(voxels: np.ndarray) -> str | None:
    """Why values do not look like a CT in HU, or None if they may be: told by range, by soft tissue and by density.

    Args:
        voxels: of a whole scan, any shape.
    """
    low, high = float(voxels.min()), float(voxels.max())
    values = f"its values are {low:.6g} to {high:.6g}"
    if high - low < 20:
        return f"{values}, as of a scan that was scaled"
    if low == 0 and high == 255:
        return f"{values}, as of a picture of 8 bits"
    if np.mean((voxels >= -250) & (voxels <= 350)) < 0.005:
        return f"{values}, hardly any of them that of soft tissue (-250 to 350)"
    if low > -200 and (dense := float(np.mean(voxels > 700))) > 0.25:
        return f"{values}, {dense:.0%} of them denser than 700, and none air: perhaps 1024 was added to HU"
    return None


def window_of_structures(bounds: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """A window in HU for structures whose values lie within ``bounds``, rounded outwards to 5 HU.

    It holds them and soft tissue (0 to 60), so that anatomy around bone or lungs stays visible, and half of that range
    (50 to 150 HU) on either side, so that what touches a structure differs from it.
    """
    low, high = min(0, *(low for low, _ in bounds)), max(60, *(high for _, high in bounds))
    margin = min(max(50.0, (high - low) / 2), 150.0)
    return 5 * math.floor((low - margin) / 5), 5 * math.ceil((high + margin) / 5)


def structure_bounds(image: sitk.Image, classes: np.ndarray) -> list[tuple[float, float]]:
    """The 5th and 95th percentile of each structure's voxels.

    They are voxels' values, so that a window around them leaves them as they are.

    Args:
        classes: 0 background, 1, 2, ...; axes (z, y, x) of ``image``.
    """
    voxels = sitk.GetArrayViewFromImage(image)
    bounds = []
    for index in np.unique(classes[classes > 0]):
        values = voxels[classes == index]
        places = math.floor(0.05 * (values.size - 1)), math.ceil(0.95 * (values.size - 1))
        values.partition(places)
        bounds.append((float(values[places[0]]), float(values[places[1]])))
    return bounds


# --- dataset.json -----------------------------------------------------------------------------------------------------


def read_intensities(dataset_json: Mapping[str, Any], where: Path | str, domain: str = "target") -> Intensities | None:
    """The parameters that a converter left in ``dataset.json`` (read from ``where``) for ``source`` or ``target``.

    Returns:
        None where the vendor's intensities were kept.

    Raises:
        UDAError: if they are not in the form of ``Intensities.to_json``.
    """
    uda = dataset_json.get("uda") if isinstance(dataset_json, Mapping) else None
    found = uda.get("intensities") if isinstance(uda, Mapping) else None
    if isinstance(found, Mapping) and not {"percentiles", "window"} & set(found) and set(found) & {"source", "target"}:
        found = found.get(domain)
    if found is None:
        return None
    example = '{"window": [-125, 275]} or {"percentiles": [5, 95], "range": [-1, 1]}'
    wrong = UDAError(
        f"{where}: uda.intensities is {shown(found)}; expected the form {example}. Convert the data again."
    )
    if not isinstance(found, Mapping):
        raise wrong
    percentiles, window, scale = (found.get(key) for key in ("percentiles", "window", "range"))
    if not all(value is None or _is_pair(value) for value in (percentiles, window, scale)):
        raise wrong
    percentiles, scale, window = (None if value is None else tuple(value) for value in (percentiles, scale, window))
    try:
        return Intensities(percentiles, scale, window, origin=str(found.get("from", "given")))
    except UDAError as error:
        raise UDAError(f"{wrong} ({error})") from None


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e30 for v in value)
    )


def read_clipped(path: Path, intensities: Intensities) -> sitk.Image:
    """Read, check and clip one scan: what the converters write and what ``nnUNetUDA_intensities`` writes.

    Raises:
        UDAError: for a file that is unreadable, truncated, not 3D, constant, or holds NaN.
    """
    image = read_image(path)
    check_image(image, path)
    return intensities.apply(image, path)
