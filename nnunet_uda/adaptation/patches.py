"""Patches of preprocessed scans, around what a network finds there or anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor

FOUND_SHARE = 0.67
"""Of the patches, those whose middle lies in a structure as the network finds it."""
MOST_PLACES = 5000
"""Places that are remembered of a structure."""


@dataclass(frozen=True)
class Scan:
    """A preprocessed scan: ``(C, Z, Y, X)`` volume, ``(Z, Y, X)`` mask (-1 outside), nnU-Net's properties."""

    case: str
    volume: np.ndarray
    mask: np.ndarray
    properties: dict[str, Any]


class Patches:
    """Draws patches of some scans.

    Args:
        volumes: ``(C, Z, Y, X)`` arrays, in memory or mapped.
        masks: ``(Z, Y, X)`` int16, -1 outside of nnU-Net's nonzero mask, else from 0.
        segmentations: ``(Z, Y, X)`` integer classes, what the network finds there.
        patch_size: 2 or 3 numbers; two are a slice along the first axis.
    """

    def __init__(
        self,
        volumes: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        segmentations: Sequence[np.ndarray],
        patch_size: Sequence[int],
        seed: int,
    ) -> None:
        self.volumes, self.masks, self.size = volumes, masks, [1, *patch_size][-3:]
        self.flat = len(patch_size) == 2
        self.rng = np.random.default_rng(seed)
        self.places = [self._places(segmentation) for segmentation in segmentations]

    def _places(self, segmentation: np.ndarray) -> list[np.ndarray]:
        found = []
        for value in np.unique(segmentation[segmentation > 0]):
            places = np.argwhere(segmentation == value)
            found.append(places[:: max(1, len(places) // MOST_PLACES)])
        return found

    def draw(self, number: int) -> list[tuple[Tensor, Tensor, int]]:
        """``number`` times ``(C, *patch)`` float32, its mask ``(1, *patch)`` int16, and which scan it is of.

        Outside of a scan the image is 0 and the mask -1, as nnU-Net pads.
        """
        return [self._one() for _ in range(number)]

    def _one(self) -> tuple[Tensor, Tensor, int]:
        scan = int(self.rng.integers(len(self.volumes)))
        volume, places = self.volumes[scan], self.places[scan]
        if places and self.rng.random() < FOUND_SHARE:
            of_one = places[self.rng.integers(len(places))]
            middle = of_one[self.rng.integers(len(of_one))]
        else:
            middle = [self.rng.integers(length) for length in volume.shape[1:]]
        box = [[int(m) - side // 2, int(m) - side // 2 + side] for m, side in zip(middle, self.size, strict=True)]
        image, mask = (
            torch.from_numpy(np.ascontiguousarray(crop_and_pad_nd(array, box, outside)))
            for array, outside in ((volume, 0), (self.masks[scan][None], -1))
        )
        return (image[:, 0].float(), mask[:, 0], scan) if self.flat else (image.float(), mask, scan)
