"""Clipping by percentiles, the same for a dataset being converted and for a new scan before prediction.

nnU-Net cannot do this itself: its percentile clip is for CT and uses the training set's percentiles. So a converter
does it when asked to, writes the parameters into ``dataset.json``, and ``nnUNetUDA_clip`` reads them from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_uda.data.reading import check_image, read_image
from nnunet_uda.errors import UDAError, shown


@dataclass(frozen=True)
class Intensities:
    """Percentile clipping of one volume, and its scaling.

    Args:
        percentiles: (low, high), 0 <= low < high <= 100, over the nonzero voxels of each volume: the brain, where the
            skull is stripped. Linear interpolation between voxel values.
        scale: (low, high) that the two percentiles are mapped to, or None to keep the scan's units.

    Raises:
        UDAError: for percentiles or a scale out of order.
    """

    percentiles: tuple[float, float]
    scale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise UDAError(f"percentiles {low:g} {high:g}: expected 0 <= low < high <= 100, as 5 95.")
        if self.scale is not None and not -math.inf < self.scale[0] < self.scale[1] < math.inf:
            raise UDAError(f"range {self.scale[0]:g} {self.scale[1]:g}: expected two numbers, low < high, as -1 1.")

    def apply(self, image: sitk.Image, path: Path) -> sitk.Image:
        """``image`` clipped and scaled, float32, on the same grid.

        Voxels of value 0 are background: they stay 0, or take the low end of ``scale``.

        Raises:
            UDAError: if both percentiles are the same value.
        """
        voxels = sitk.GetArrayFromImage(image).astype(np.float64)
        foreground = voxels != 0
        values = voxels[foreground]
        low, high = np.percentile(values, self.percentiles) if values.size else (0.0, 0.0)
        if low == high:
            raise UDAError(
                f"{path}: percentiles {self.percentiles[0]:g} and {self.percentiles[1]:g} of its {values.size} nonzero "
                f"voxels are both {low:g}; expected an image with contrast. Leave this scan out, or clip less."
            )
        voxels = np.clip(voxels, low, high)
        background = 0.0
        if self.scale is not None:
            background, top = self.scale
            voxels = background + (voxels - low) * ((top - background) / (high - low))
        clipped = sitk.GetImageFromArray(np.where(foreground, voxels, background).astype(np.float32))
        clipped.CopyInformation(image)
        return clipped

    def to_json(self) -> dict[str, Any]:
        """What ``dataset.json`` holds under ``uda``, ``intensities``."""
        return {
            "percentiles": list(self.percentiles),
            "over": "nonzero voxels of each volume",
            "range": None if self.scale is None else list(self.scale),
        }


def read_intensities(dataset_json: Mapping[str, Any], where: Path | str) -> Intensities:
    """The parameters that a converter left in ``dataset.json`` (read from ``where``).

    Raises:
        UDAError: if there are none, or they are not in the form of ``Intensities.to_json``.
    """
    uda = dataset_json.get("uda") if isinstance(dataset_json, dict) else None
    found = uda.get("intensities") if isinstance(uda, dict) else None
    if found is None:
        raise UDAError(
            f"{where} holds no uda.intensities: this dataset keeps the vendor's intensities, so its new scans are "
            "predicted as they are. To clip all the same, give -percentiles instead of -d."
        )
    example = '{"percentiles": [5, 95], "range": [-1, 1]}'
    percentiles, scale = (found.get("percentiles"), found.get("range")) if isinstance(found, dict) else (None, None)
    if not _is_pair(percentiles) or not (scale is None or _is_pair(scale)):
        raise UDAError(
            f"{where}: uda.intensities is {shown(found)}; expected the form {example}. Convert the data again."
        )
    return Intensities(tuple(percentiles), None if scale is None else tuple(scale))


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e30 for v in value)
    )


def read_clipped(path: Path, intensities: Intensities) -> sitk.Image:
    """Read, check and clip one scan: what the converters write and what ``nnUNetUDA_clip`` writes.

    Raises:
        UDAError: for a file that is unreadable, truncated, not 3D, constant, or holds NaN.
    """
    image = read_image(path)
    check_image(image, path)
    return intensities.apply(image, path)
