"""The page of ``nnUNetUDA_quality``: cases from worst to best in one file that asks the network for nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_uda.evaluation.overlays import draw_overlay
from nnunet_uda.evaluation.page import write_filled
from nnunet_uda.evaluation.report import jsonable
from nnunet_uda.palette import label_colours, name_colours

GAP = 4
"""Pixels between the planes of a thumbnail."""


def thumbnail(
    image: np.ndarray, label: np.ndarray, spacing: Sequence[float], structures: dict[str, int], size: int = 150
) -> str:
    """A strip of three planes through the middle of what was segmented, with contours: JPEG as base64.

    Args:
        image: ``(Z, Y, X)`` one channel, axes from inferior to superior, anterior to posterior and right to left (LPS).
        label: ``(Z, Y, X)``.
        spacing: mm for each axis.
        structures: their values by name.
        size: pixels of the longer side of a plane.
    """
    from matplotlib.image import imsave

    window = tuple(np.percentile(image, (0.5, 99.5)))
    panels = []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        areas = (label > 0).sum(axis=tuple(others))
        index = int(areas.argmax()) if areas.any() else label.shape[axis] // 2
        cut, cut_label = (np.take(array, index, axis=axis) for array in (image, label))
        if axis:
            cut, cut_label = cut[::-1], cut_label[::-1]  # the head up
        in_plane = (float(spacing[others[0]]), float(spacing[others[1]]))
        panels.append(draw_overlay(cut, cut_label, label_colours(structures), in_plane, window, size, 1))
    height = max(panel.shape[0] for panel in panels)
    width = sum(panel.shape[1] for panel in panels) + GAP * (len(panels) - 1)
    strip, start = np.zeros((height, width, 3), np.uint8), 0
    for panel in panels:
        top = (height - panel.shape[0]) // 2
        strip[top : top + panel.shape[0], start : start + panel.shape[1]] = panel
        start += panel.shape[1] + GAP
    buffer = io.BytesIO()
    imsave(buffer, strip, format="jpeg", pil_kwargs={"quality": 75, "subsampling": 0})
    return base64.b64encode(buffer.getvalue()).decode()


def write_page(
    path: Path,
    title: str,
    notes: Sequence[str],
    cases: Sequence[dict[str, Any]],
    structures: dict[str, int],
    thumbnails: dict[str, str],
) -> None:
    """Write the page.

    Args:
        path: the file to write.
        title: its heading.
        notes: sentences under it.
        cases: ``CaseQuality.to_json`` of each.
        structures: values by name, in their order.
        thumbnails: base64 JPEG by case.
    """
    keep = ("dice", "low", "high", "verdict", "reasons")
    data = {
        "structures": list(structures),
        "cases": [
            {
                "case": case["case"],
                "overall": {key: case["overall"][key] for key in keep[:4]},
                "structures": {
                    name: {key: each[key] for key in keep} | {"ml": case["signals"][name].get("volume", 0.0) / 1000}
                    for name, each in case["structures"].items()
                },
                "picture": thumbnails.get(case["case"]),
            }
            for case in cases
        ],
    }
    write_filled(path, "quality", title, name_colours(structures), jsonable(data), {"notes": notes})
