"""A small tree of BTCV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_uda.dataset_conversion.btcv import VALUES
from support.dicom import DIRECTIONS

SHAPE = (5, 7, 9)
MADE = (1, 2, 9, 21, 30, 40)


def scan(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(-1000, 1500, SHAPE).astype(np.int16)


def organs(number: int) -> np.ndarray:
    """All 13 values, elsewhere in every slice."""
    label = np.zeros(SHAPE, np.uint8)
    for value in VALUES.values():
        label[1 + (value + number) % 3, 1 + value % 4 : 6, value % 8 : value % 8 + 1] = value
        label[value % 5, 0, value % 9] = value
    return label


def save(array: np.ndarray, path: Path, number: int) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.75, 0.5, 3.0))
    image.SetOrigin((5.0, -7.0, 11.0))
    image.SetDirection(DIRECTIONS[tuple(DIRECTIONS)[number % len(DIRECTIONS)]].ravel())
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), True)


def make_btcv(tree: Path, numbers: tuple[int, ...] = MADE) -> Path:
    for number in numbers:
        save(scan(number), tree / f"RawData/Training/img/img{number:04d}.nii.gz", number)
        save(organs(number), tree / f"RawData/Training/label/label{number:04d}.nii.gz", number)
    return tree


def renumbered(training: Path) -> None:
    for old, new in ((21, 11), (30, 20), (40, 30)):
        for kind in ("img", "label"):
            folder = training / kind
            (folder / f"{kind}{old:04d}.nii.gz").replace(folder / f"{kind}{new:04d}.nii.gz")
