"""The plot of ``nnUNetUDA_sweep``: scores on the target, and what training sees of them, against a setting's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_uda.evaluation.tables import Spread, spread

LOG_FROM = 30
"""Largest by smallest value from which the values' axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """One value of a setting.

    Attributes:
        value: the setting's value, any JSON value.
        label: the value as text.
        dice: on the target's test cases.
        assd: likewise, in mm.
        pseudo_dice: on source validation images, as training sees it.
        undefined: number of distances, over seeds, cases and structures, that are missing from ``assd``.
        criteria: what needs no label (``nnunet_uda.training.criteria``), by name, on target patches.
    """

    value: Any
    label: str
    dice: Spread
    assd: Spread
    pseudo_dice: Spread
    undefined: int
    criteria: dict[str, Spread] = field(default_factory=dict)


def draw_sweeps(path: Path, sweeps: dict[str, list[Point]], title: str, note: str) -> None:
    """Write ``path`` (PNG): one column per sweep, Dice (0 to 1) above ASSD (mm), with error bars over seeds.

    Args:
        sweeps: points by the setting's name.
        note: printed under the panels.
    """
    from nnunet_uda.figures import own_style, plt, save_figure

    with own_style():
        width = max(4.4 * len(sweeps), 7)
        figure, axes = plt.subplots(2, len(sweeps), figsize=(width, 7.2), sharex="col", sharey="row", squeeze=False)
        for (setting, points), (upper, lower) in zip(sweeps.items(), axes.T, strict=True):
            _draw_sweep(upper, lower, points)
            lower.set_xlabel(setting)
        axes[0, 0].set_ylim(0, 1)
        axes[1, 0].set_ylim(bottom=0)
        axes[0, 0].set_ylabel("Dice")
        axes[1, 0].set_ylabel("ASSD in mm")
        figure.suptitle(title, fontsize=10)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.965), ncols=3, fontsize=8, frameon=False
        )
        figure.text(0.5, 0.01, note, ha="center", va="bottom", fontsize=8, wrap=True)
        figure.tight_layout(rect=(0, 0.07, 1, 0.96))
        save_figure(figure, path)


def _draw_sweep(upper: Any, lower: Any, unsorted: Sequence[Point]) -> None:
    """Draw one sweep: numbers at their places on the axis, joined by lines; other values side by side."""
    numbers = all(isinstance(p.value, (int, float)) and not isinstance(p.value, bool) for p in unsorted)
    points = sorted(unsorted, key=lambda point: point.value) if numbers else unsorted
    x = np.array([point.value for point in points] if numbers else range(len(points)), dtype=float)
    logarithmic = numbers and x[0] > 0 and x[-1] / x[0] >= LOG_FROM
    scale = np.log10(x) if logarithmic else x
    room = 0.08 * (scale[-1] - scale[0]) or 0.5
    limits = np.array([scale[0] - room, scale[-1] + room])
    lower.set_xscale("log" if logarithmic else "linear")
    lower.set_xlim(*(10**limits if logarithmic else limits))
    lower.set_xticks(x, [point.label for point in points], rotation=45 if len(points) > 5 else 0)
    lower.minorticks_off()
    agreement = [point.criteria.get("agreement", spread([])) for point in points]
    solid, dashed = ("-", "--") if numbers else ("", "")
    for axis, cells, style, label in (
        (upper, [point.dice for point in points], f"C0o{solid}", "target test (needs target labels)"),
        (upper, agreement, f"C2^{solid}", "agreement (needs none)"),
        (upper, [point.pseudo_dice for point in points], f"C1s{dashed}", "validation pseudo Dice (misleads)"),
        (lower, [point.assd for point in points], f"C0o{solid}", None),
    ):
        bars = np.nan_to_num([cell.std for cell in cells])
        means = [cell.mean for cell in cells]
        axis.errorbar(x, means, yerr=bars, fmt=style, capsize=3, markersize=5, label=label)
        axis.grid(alpha=0.3)
