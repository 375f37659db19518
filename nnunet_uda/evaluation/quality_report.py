"""The report of ``nnUNetUDA_quality`` as a file that other commands read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import read_json
from nnunet_uda.errors import UDAError

REPORT = "quality_report.json"


def read_report(path: Path) -> dict[str, Any]:
    """A report of ``nnUNetUDA_quality``.

    Raises:
        UDAError: for another file.
    """
    content = read_json(path)
    cases = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(cases, list) or not cases or not all(map(_is_case, cases)):
        raise UDAError(f"{path} is no report of nnUNetUDA_quality, expected its {REPORT}")
    return content


def _is_case(case: Any) -> bool:
    if not isinstance(case, dict) or not {"case", "overall", "structures"} <= set(case):
        return False
    overall = case["overall"]
    if not isinstance(case["case"], str) or not isinstance(overall, dict):
        return False
    return all(isinstance(overall.get(key), int | float | None) for key in ("dice", "low", "high"))


def read_estimates(path: Path) -> dict[str, float]:
    """The estimated Dice of each case of a report; NaN where it has none.

    Raises:
        UDAError: as ``read_report``.
    """
    values = {case["case"]: case["overall"].get("dice") for case in read_report(path)["cases"]}
    return {case: float("nan") if value is None else float(value) for case, value in values.items()}
