"""A whole volume for the page: its slices as one JPEG sheet, the structures of every segmentation as PNG sheets."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import zoom

LARGEST_SIDE = 320
SMALLEST_SIDE = 128
"""Pixels of a tile's longer side, between which the volume's own number of voxels decides."""


def make_stack(
    image: np.ndarray,
    labels: dict[str, np.ndarray],
    structures: Sequence[int],
    spacing: tuple[float, float],
    window: tuple[float, float],
    pixels: int,
    kept: Sequence[int] = (),
) -> dict[str, Any]:
    """Make what the page draws of one volume.

    Args:
        image: slices as they are seen, ``(N, rows, columns)``.
        labels: the reference first, then each run, by name; integers of the same shape.
        structures: the labels' foreground values; in the sheets they are 1, 2, ... in this order.
        spacing: mm of a row and of a column; a tile has square pixels.
        window: intensities drawn black and white.
        pixels: at most so many in all: a large volume is shown smaller, then with fewer slices.
        kept: slices that are always there.

    Returns:
        ``slices`` (their numbers), ``width`` and ``height`` of a tile, ``columns`` of a sheet, ``image`` and ``labels``
        as base64, and ``wrong``: by run, voxels of each slice that differ from the reference.
    """
    extent = np.array(image.shape[1:]) * spacing
    side = int(np.clip(max(extent / min(spacing)), SMALLEST_SIDE, LARGEST_SIDE))
    height, width = picture_size(extent, side)
    if height * width * len(image) > pixels:
        side = max(SMALLEST_SIDE, int(side * math.sqrt(pixels / (height * width * len(image)))))
        height, width = picture_size(extent, side)
    number = max(1, min(len(image), pixels // (height * width)))
    shown = sorted({int((i + 0.5) * len(image) / number) for i in range(number)} | set(kept))
    columns = max(1, round(math.sqrt(len(shown) * height / width)))
    low, high = window
    scale = 255 / (high - low) if high > low else 0.0
    factors = (height / image.shape[1], width / image.shape[2])

    grey = np.stack([
        zoom(np.clip((image[i] - low) * scale, 0, 255), factors, order=1, mode="nearest", grid_mode=True) for i in shown
    ])  # fmt: skip
    places = {value: place for place, value in enumerate(structures, 1)}
    sheets = {}
    for name, segmentation in labels.items():
        classes = np.zeros((len(shown), *segmentation.shape[1:]), np.uint8)
        for value, place in places.items():
            classes[segmentation[shown] == value] = place
        tiles = np.stack([zoom(cut, factors, order=0, mode="nearest", grid_mode=True) for cut in classes])
        sheets[name] = encode(_sheet(tiles, columns), "PNG", optimize=True)
    (_, reference), *runs = labels.items()
    wrong = {name: [int((run[i] != reference[i]).sum()) for i in shown] for name, run in runs}
    return {
        "slices": shown,
        "width": width,
        "height": height,
        "columns": columns,
        "image": encode(_sheet(grey.astype(np.uint8), columns), "JPEG", quality=72),
        "labels": sheets,
        "wrong": wrong,
    }


def picture_size(extent: np.ndarray, side: int) -> tuple[int, int]:
    """Height and width of a picture of ``extent`` mm with square pixels, ``side`` of them along its longer side."""
    height, width = np.maximum(np.round(extent * side / extent.max()), 1).astype(int)
    return int(height), int(width)


def encode(picture: np.ndarray, kind: str, **options: Any) -> str:
    """A picture (uint8) as a JPEG or PNG file in base64."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def _sheet(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Tiles ``(N, height, width)`` row by row in one grey picture."""
    rows = -(-len(tiles) // columns)
    height, width = tiles.shape[1:]
    sheet = np.zeros((rows * columns, height, width), np.uint8)
    sheet[: len(tiles)] = tiles
    return sheet.reshape(rows, columns, height, width).transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
