"""Small hearts as MM-WHS has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_uda.dataset_conversion.mmwhs import VALUES

SHAPE = (8, 10, 12)
IDS = {"mr": (1001, 1002, 1007, 1009, 1010, 1011), "ct": (1001, 1002, 1003, 1008, 1009, 1011)}
DIRECTIONS = [(1, 0, 0, 0, 1, 0, 0, 0, 1), (-1, 0, 0, 0, -1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 0, 1, 0)]


def heart(shift: int = 0) -> np.ndarray:
    array = np.zeros(SHAPE, np.int16)
    for i, value in enumerate(VALUES.values()):
        array[3:5, 3:6, 2 + i + shift % 2] = value
    return array


def save(array: np.ndarray, path: Path, direction=DIRECTIONS[0]) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.25, 1.5))
    image.SetDirection([float(d) for d in direction])
    sitk.WriteImage(image, str(path), True)
