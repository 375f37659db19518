"""Scans made up of numbers, and what a conversion wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk


def body(seed: int = 0) -> np.ndarray:
    """A CT in HU: air, fat, soft tissue, bone."""
    rng = np.random.default_rng(seed)
    array = np.full((8, 20, 20), -1000.0)
    array[:, 3:17, 3:17], array[:, 5:15, 5:15], array[:, 9:11, 9:11] = -100, 50, 900
    return (array + rng.normal(0, 10, array.shape)).round().astype(np.int16)


VENDORS = ("-source_intensities", "none", "-target_intensities", "none")
"""Options by which a conversion keeps the voxels."""


def image_of(
    array: np.ndarray, spacing=(1.0, 1.5, 2.0), origin=(3.0, -4.0, 5.0), direction=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    return image


def save(image: sitk.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), path.name.endswith("gz"))
    return path


def load(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def names(folder: Path) -> list[str]:
    return sorted(p.name.removesuffix(".nii.gz").removesuffix("_0000") for p in folder.iterdir())
