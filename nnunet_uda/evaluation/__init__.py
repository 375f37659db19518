"""Scores of segmentations against references (Dice, ASSD and HD95 in mm), tables, overlays and a report page."""

from __future__ import annotations

from nnunet_uda.evaluation.metrics import evaluate_case, evaluate_folder
from nnunet_uda.evaluation.overlays import draw_overlay
from nnunet_uda.evaluation.tables import Volume, compare_runs

__all__ = ["Volume", "compare_runs", "draw_overlay", "evaluate_case", "evaluate_folder"]
