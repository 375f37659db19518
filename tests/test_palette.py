"""Colours that everybody can tell apart."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from skimage.color import rgb2lab

from nnunet_uda.palette import COLOURS, label_colours

SIGHT = {  # of linear RGB; Machado, Oliveira and Fernandes 2009, severity 1
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen(colours, matrix) -> np.ndarray:
    """CIELAB of colours as somebody sees them, ``(N, 3)``."""
    rgb = np.asarray(colours) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    shown = np.clip(linear @ np.array(matrix).T, 0, 1)
    return rgb2lab(np.where(shown <= 0.0031308, 12.92 * shown, 1.055 * shown ** (1 / 2.4) - 0.055)[None])[0]


@pytest.mark.parametrize("sight", SIGHT)
def test_the_first_eight_structures_differ_for_every_sight(sight):
    lab = seen(COLOURS[:8], SIGHT[sight])
    nearest = min(np.linalg.norm(lab[i] - lab[j]) for i, j in combinations(range(8), 2))
    assert nearest >= (24 if sight != "tritanopia" else 19), f"{sight}: {nearest:.1f}"


def test_structures_stand_out_from_black_and_from_grey():
    lab = seen(COLOURS, SIGHT["normal"])
    assert lab[:, 0].min() > 45 and np.linalg.norm(lab[:, 1:], axis=1).min() > 40


def test_a_structure_has_its_colour_by_its_place_and_none_twice():
    assert label_colours({"background": 0, "b": 7, "a": 2}) == {7: COLOURS[0], 2: COLOURS[1]}
    many = label_colours({f"s{i}": i for i in range(1, 31)})
    assert len(set(many.values())) == 30
