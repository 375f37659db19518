"""A small tree of AMOS."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.btcv import save

SHAPE = (6, 8, 10)
PARTS = {"Tr": (1, 4, 21, 507, 510, 600), "Va": (8, 499, 508)}
"""Below 500 are CT."""


def scan(number: int) -> np.ndarray:
    low = -1000 if number < 500 else 0
    return np.random.default_rng(number).integers(low, 1500, SHAPE).astype(np.int16)


def organs(number: int) -> np.ndarray:
    """Values 1 to 15 for CT; of MR, 14 and 15 lie below the field, and 13 too in 510."""
    values = np.arange(1, 16 if number < 500 else 13 if number == 510 else 14)
    label = np.zeros(SHAPE, np.uint8)
    label[1:5].reshape(-1)[number % 7 :: 11][: len(values)] = values
    return label


def make_amos(tree: Path) -> Path:
    for part, numbers in PARTS.items():
        for number in numbers:
            save(scan(number), tree / f"images{part}" / f"amos_{number:04d}.nii.gz", number)
            save(organs(number), tree / f"labels{part}" / f"amos_{number:04d}.nii.gz", number)
    save(scan(2), tree / "imagesTs" / "amos_0002.nii.gz", 2)
    (tree / "dataset.json").write_text("{}")
    return tree
