"""The page of ``nnUNetUDA_quality``: cases from worst to best in one file that asks the network for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_uda.evaluation.overlays import draw_overlay, upright
from nnunet_uda.evaluation.page import write_filled
from nnunet_uda.evaluation.report import jsonable
from nnunet_uda.evaluation.stacks import encode
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
    window = tuple(np.percentile(image, (0.5, 99.5)))
    panels = []
    for axis in range(3):
        images, labels = upright(image, axis), upright(label, axis)
        areas = (labels > 0).sum(axis=(1, 2))
        index = int(areas.argmax()) if areas.any() else len(labels) // 2
        row, column = (float(step) for other, step in enumerate(spacing) if other != axis)
        panels.append(
            draw_overlay(images[index], labels[index], label_colours(structures), (row, column), window, size, 1)
        )
    height = max(len(panel) for panel in panels)
    strip = []
    for panel in panels:
        above = (height - len(panel)) // 2
        strip.append(np.pad(panel, ((above, height - len(panel) - above), (0, GAP), (0, 0))))
    return encode(np.concatenate(strip, 1)[:, :-GAP], "JPEG", quality=75, subsampling=0)


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
