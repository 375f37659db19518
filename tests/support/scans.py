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


def load(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def names(folder: Path) -> list[str]:
    return sorted(p.name.removesuffix(".nii.gz").removesuffix("_0000") for p in folder.iterdir())
