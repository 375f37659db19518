"""What ``nnUNetUDA_quality`` writes and prints: a report, tables, and a page with thumbnails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation.quality import Judge, Looked
from nnunet_uda.evaluation.quality_page import thumbnail, write_page
from nnunet_uda.evaluation.quality_report import REPORT
from nnunet_uda.evaluation.report import markdown_table, number, write_report, write_rows
from nnunet_uda.quality.calibration import COVERAGE, FAILED, GOOD
from nnunet_uda.quality.cases import CaseQuality

SHOWN = 20
"""Cases in the table on the screen."""
MANY = 200
"""Cases from which thumbnails are smaller."""
BLIND = (
    "An estimate, not a measurement: no label of these scans was read. It cannot see a wrong structure of plausible "
    "size, shape and neighbours that the network finds with certainty in every view, nor labels that are drawn by "
    "another rule than the source's."
)


def find_predictions(folder: Path | None, cases: Sequence[str], ending: str) -> dict[str, Path]:
    """The segmentation of each case; none without a folder.

    Raises:
        UDAError: naming a case without one.
    """
    if folder is None:
        return {}
    found = {case: folder / f"{case}{ending}" for case in cases}
    missing = [path.name for path in found.values() if not path.is_file()]
    if missing:
        raise UDAError(
            f"{folder} holds no {missing[0]}, expected a prediction of every scan ({len(missing)} of {len(cases)} are "
            "missing). Predict them with nnUNetv2_predict, or leave -pred out"
        )
    return found


def picture(judge: Judge, looked: Looked, size: int) -> str:
    """Draw the ``thumbnail`` of a case, with its axes back in the scan's order."""
    plans = judge.asked.predictor.plans_manager
    backward = list(plans.transpose_backward)
    image, label = looked.volume[0].numpy().transpose(backward), looked.label.transpose(backward)
    if plans.plans["image_reader_writer"] == "SimpleITKIOWithReorient":
        image, label = image[:, ::-1, ::-1], label[:, ::-1, ::-1]  # it reads in RAS
    return thumbnail(image, label, [looked.spacing[axis] for axis in backward], judge.structures, size)


def write_csv(path: Path, cases: Sequence[CaseQuality]) -> None:
    """Write one line for each case as a whole, and one for each of its structures."""
    rows = []
    for case in cases:
        lines: list[tuple[str, Any, dict[str, Any], list[str]]] = [("all", case.overall, {}, case.reasons)]
        lines += [(name, each, case.signals[name], each.reasons) for name, each in case.structures.items()]
        for name, each, signals, reasons in lines:
            agreement = list(signals.get("agreement", {}).values())
            rows.append({
                "case": case.case, "structure": name, "dice": _rounded(each.dice), "low": _rounded(each.low),
                "high": _rounded(each.high), "verdict": each.verdict,
                "volume_ml": _rounded(signals.get("volume", math.nan) / 1000), "components": signals.get("components"),
                "agreement": _rounded(np.mean(agreement)) if agreement else None, "reasons": "; ".join(reasons),
            })  # fmt: skip
    write_rows(path, rows)


def _rounded(value: float) -> str | None:
    return f"{value:.3f}" if math.isfinite(value) else None


def table(cases: Sequence[CaseQuality]) -> str:
    """The worst cases as Markdown."""
    rows = []
    for case in cases[:SHOWN]:
        each = case.overall
        reason = case.reasons[0] if case.reasons else "nothing unusual"
        rows.append([case.case, number(each.dice, ".2f"), f"{each.low:.2f} to {each.high:.2f}", each.verdict, reason])
    caption = f"The {len(rows)} worst of {len(cases)} case(s)" if len(cases) > SHOWN else f"{len(cases)} case(s)"
    return markdown_table({"caption": caption, "header": ["case", "Dice", "range", "verdict", "why"], "rows": rows})


def judge_and_draw(
    judge: Judge, images: dict[str, list[Path]], predictions: dict[str, Path], draw: bool
) -> tuple[list[CaseQuality], dict[str, str]]:
    """Judge all cases; return them, worst first, and thumbnails by case (none unless ``draw``)."""
    found, pictures = [], {}
    size = 150 if len(images) <= MANY else 110
    for case, files in tqdm(images.items(), desc="Quality", unit="case"):
        quality, looked = judge.judge(case, files, predictions.get(case))
        found.append(quality)
        if draw:
            pictures[case] = picture(judge, looked, size)
    found.sort(key=lambda case: (-1.0 if math.isnan(case.overall.dice) else case.overall.dice, case.case))
    return found, pictures


def write_quality(
    output: Path,
    judge: Judge,
    about: dict[str, Any],
    judged: str,
    found: Sequence[CaseQuality],
    pictures: dict[str, str],
) -> str:
    """Write report, CSV and page into ``output``; return what the estimates are calibrated on, in words.

    Args:
        about: the report's first entries: model, scans and predictions.
        judged: whose segmentations these are, in words.
    """
    made = judge.calibration.about
    calibrated = (
        f"Calibrated on {made.get('calibrated_on', 'labelled cases')} in random styles ({made['pairs']} pairs)."
        if made["pairs"]
        else "Not calibrated on this model: neither quality.json nor the source's preprocessed cases were there."
    )
    notes = [
        f"Judged: {judged}, {len(found)} case(s). Dice from 0 to 1, with a range that holds {COVERAGE:.0%} of "
        f"calibration's cases. good: {GOOD} or more and a range from {FAILED} on; failed: below {FAILED}. A case's "
        "verdict is that of its worst structure.",
        calibrated,
        BLIND,
    ]
    cases = [case.to_json() for case in found]
    write_report(output / REPORT, {**about, "calibration": made, "notes": notes, "cases": cases})
    write_csv(output / "quality.csv", found)
    title = f"Quality of {Path(about['model']).name} on {len(found)} scan(s)"
    write_page(output / "quality.html", title, notes, cases, judge.structures, pictures)
    return calibrated
