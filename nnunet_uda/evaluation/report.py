"""Write an evaluation: JSON, CSV, Markdown and one self-contained HTML page."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_uda.evaluation.metrics import METRICS
from nnunet_uda.evaluation.page import write_filled
from nnunet_uda.evaluation.tables import Volume
from nnunet_uda.files import whole_file
from nnunet_uda.names import MEAN, spreadsheet_cell
from nnunet_uda.palette import RUNS, name_colours

UNITS = {"Dice": "Dice", "ASSD": "ASSD (mm)", "HD95": "HD95 (mm)"}
DIGITS = {"Dice": 3, "ASSD": 2, "HD95": 2}
RULES = (
    "Cells: mean ± sample standard deviation over volumes. ASSD is the sum of both directed surface distances divided "
    "by the number of surface voxels of both; HD95 is the larger of the two directed 95th percentiles; both in mm.",
    "Empty masks: where reference and prediction are both empty, the volume does not count for the structure (as in "
    "nnUNetv2_evaluate_folder). Where only one is empty, Dice is 0 and the distances are undefined: they are missing "
    "from the mean and counted beside it. n is given where it is not the number of volumes.",
    f"'{MEAN}' takes the mean of each volume's defined structures first, then mean and deviation over volumes; its "
    "undefined count is over volumes and structures.",
)


def jsonable(value: Any) -> Any:
    """``value`` with NaN as ``None`` and paths as strings, all the way down."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_scores(path: Path, setup: dict[str, Any], runs: dict[str, list[Volume]], comparison: dict[str, Any]) -> None:
    """``evaluation.json``: ``setup``, the volumes of every run with all scores, and ``compare_runs``'s result."""
    volumes = {
        name: [
            {"case": volume.case, "fold": volume.fold, "metrics": volume.metrics,
             "mean": {metric: volume.value(MEAN, metric) for metric in METRICS}}
            for volume in run
        ]
        for name, run in runs.items()
    }  # fmt: skip
    write_report(path, {**setup, "rules": RULES, "volumes": volumes, **comparison})


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as JSON for people to read: NaN is null, and names are not escaped."""
    text = json.dumps(jsonable(content), indent=2, allow_nan=False, ensure_ascii=False)
    path.write_text(f"{text}\n", "utf-8", "backslashreplace")


def write_csv(path: Path, runs: dict[str, list[Volume]]) -> None:
    """``evaluation.csv``: one row for each run, volume and structure; undefined values are empty cells."""
    write_rows(path, [
        {
            "run": name, "fold": volume.fold, "case": volume.case, "structure": structure,
            "dice": scores["Dice"], "assd_mm": scores["ASSD"], "hd95_mm": scores["HD95"],
            "voxels_reference": scores["n_reference"], "voxels_prediction": scores["n_prediction"],
        }
        for name, volumes in runs.items()
        for volume in volumes
        for structure, scores in volume.metrics.items()
    ])  # fmt: skip


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file: missing values, None and NaN are empty cells; no text is taken for a formula."""
    cells = [{name: spreadsheet_cell(value) for name, value in row.items()} for row in rows]
    with whole_file(path) as temporary:
        pd.DataFrame(cells, dtype=object).to_csv(temporary, index=False, errors="backslashreplace")


# --- tables: a caption, a header and rows of text, rendered as Markdown or HTML -------------------------------------


def number(value: float, form: str, unit: str = "") -> str:
    """A number in a table's cell, by its format; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:{form}}{unit}"


def mean_cell(
    cell: Mapping[str, float], digits: int, n_expected: int | None = None, undefined: int = 0, unit: float = 1.0
) -> str:
    """``mean ± std``, with n where it is not ``n_expected`` and the number of undefined values where there are any.

    Args:
        cell: "mean", "std" and "n".
        unit: what mean and deviation are divided by.
    """
    mean, std = (cell[name] / unit for name in ("mean", "std"))
    text = number(mean, f".{digits}f") + ("" if math.isnan(std) else f" ± {std:.{digits}f}")
    remarks = [f"n = {cell['n']}"] if n_expected not in (None, cell["n"]) else []
    remarks += [f"{undefined} undefined"] if undefined else []
    return text + (f" ({', '.join(remarks)})" if remarks else "")


def _cell(cell: Mapping[str, float], metric: str, n_expected: int) -> str:
    return mean_cell(cell, DIGITS[metric], n_expected, int(cell.get("n_undefined", 0)))


def summary_tables(runs: dict[str, list[Volume]], comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables of a paper: all runs, over folds, gap closed, paired tests; each ``{"caption", "header", "rows"}``."""
    n = len(next(iter(runs.values())))
    summary, folds, gaps, bounds = (comparison[key] for key in ("summary", "folds", "gap_closed", "bounds"))
    rows_of = list(next(iter(summary.values())))

    def lines(cells: Callable[[str, str], Iterable[str]]) -> list[list[str]]:
        return [[UNITS[metric], run, *cells(metric, run)] for metric in METRICS for run in runs]

    tables = [{
        "caption": f"Scores over {n} volume{'s' if n > 1 else ''}",
        "header": ["metric", "run", *rows_of, "n"],
        "rows": lines(lambda metric, run: [*(_cell(summary[run][row][metric], metric, n) for row in rows_of), str(n)]),
    }]  # fmt: skip
    if folds is not None:
        sizes = {run: Counter(str(volume.fold) for volume in volumes) for run, volumes in runs.items()}
        names = list(next(iter(folds.values()))["by_fold"])
        tables.append({
            "caption": f"Mean ± sample standard deviation over the means of {len(names)} folds",
            "header": ["metric", "run", *rows_of],
            "rows": lines(lambda metric, run: (
                _cell(folds[run]["over_folds"][row][metric], metric, len(names)) for row in rows_of)),
        })  # fmt: skip
        tables.append({
            "caption": f"Each fold ({MEAN}, mean ± sample standard deviation over its volumes)",
            "header": ["metric", "run", *(f"fold {name}" for name in names)],
            "rows": lines(lambda metric, run: (
                _cell(folds[run]["by_fold"][name][MEAN][metric], metric, sizes[run][name]) for name in names)),
        })  # fmt: skip
    if gaps:
        closed = [(metric, run, [gap[row][metric] for row in rows_of])
                  for metric in ("Dice", "ASSD") for run, gap in gaps.items()]  # fmt: skip
        tables.append({
            "caption": "Gap closed: (run − lower) / (upper − lower) of the means over volumes; "
            f"lower bound: {bounds['lower']}, upper bound: {bounds['upper']}",
            "header": ["of", "run", *rows_of],
            "rows": [[metric, run, *(number(cell["percent"], ".1f", " %") for cell in cells)]
                     for metric, run, cells in closed],
            "notes": [f"{run}, {row}, {metric}: {cell['note']}." for metric, run, cells in closed
                      for row, cell in zip(rows_of, cells, strict=True) if cell["note"]],
        })  # fmt: skip
    if comparison["wilcoxon"]:
        tables.append({
            "caption": "Paired two-sided Wilcoxon signed-rank test over volumes, on each volume's mean Dice",
            "header": ["runs", "difference of the means", "n", "p", "note"],
            "rows": [
                [f"{test['run_a']} − {test['run_b']}", number(test["mean_difference"], "+.3f"), str(test["n"]),
                 number(test["p"], ".3g"), test["note"]]
                for test in comparison["wilcoxon"]
            ],
        })  # fmt: skip
    return tables


def volume_table(runs: dict[str, list[Volume]]) -> dict[str, Any]:
    """One row for each volume and run: the scores as ``Dice / ASSD / HD95`` of each structure and of their mean."""
    first = next(iter(runs))
    rows_of = [*runs[first][0].metrics, MEAN]
    rows = []
    for i, volume in enumerate(runs[first]):
        for run, volumes in runs.items():
            scores = ([number(volumes[i].value(row, m), f".{DIGITS[m]}f") for m in METRICS] for row in rows_of)
            rows.append([volume_name(volume), run, *map(" / ".join, scores)])
    caption = "Each volume: Dice / ASSD (mm) / HD95 (mm)"
    return {"caption": caption, "header": ["volume", "run", *rows_of], "rows": rows}


def volume_name(volume: Volume) -> str:
    return volume.case if volume.fold is None else f"{volume.case} (fold {volume.fold})"


def markdown_table(table: dict[str, Any]) -> str:
    """A table as Markdown, columns padded so that it also reads well in a terminal."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (table["header"], *table["rows"])]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [f"- {note}" for note in table.get("notes", [])]
    return "\n".join([f"**{table['caption']}**", "", *text, *(["", *notes] if notes else [])])


def summary_markdown(setup: dict[str, Any], tables: Sequence[dict[str, Any]]) -> str:
    """Title, what was scored, the summary tables and the rules."""
    notes = [f"**{note}**" for note in setup["notes"]]
    blocks = [f"# {_title(setup)}", _description(setup), *notes, *(markdown_table(table) for table in tables)]
    return "\n\n".join([*blocks, *RULES]) + "\n"


def _title(setup: dict[str, Any]) -> str:
    return f"Evaluation of {setup['dataset']}" if setup["dataset"] else "Evaluation"


def _description(setup: dict[str, Any]) -> str:
    folds = f" Folds: {', '.join(map(str, setup['scored_folds']))}." if setup["scored_folds"] else ""
    return f"References: {setup['reference']}. Runs: {', '.join(setup['runs'])}.{folds}"


# --- the page --------------------------------------------------------------------------------------------------------


def write_html(
    path: Path,
    setup: dict[str, Any],
    runs: dict[str, list[Volume]],
    tables: Sequence[dict[str, Any]],
    overlays: Sequence[dict[str, Any]],
    structures: dict[str, int],
    overlay_note: str,
) -> None:
    """``evaluation.html``: tables, a plot of every volume and overlays, in one file that asks the network for nothing.

    Args:
        path: the file to write.
        setup: what was scored: ``dataset``, ``reference``, ``runs``, ``folds``, and ``notes`` to be shown with it.
        runs: volumes of each run.
        tables: ``summary_tables``'s result.
        overlays: for each volume its name under ``volume`` and what ``draw_case`` returns.
        structures: their values by name.
        overlay_note: how the slices were chosen, or why there are none.
    """
    first, colours = next(iter(runs)), name_colours(structures)
    rows_of = [*runs[first][0].metrics, MEAN]

    def of_all(figure: Callable[[Volume, str, str], float]) -> dict[str, dict[str, list[list[float]]]]:
        """``{metric: {row: [[figure of each volume] of each run]}}``."""
        return {
            metric: {row: [[figure(volume, row, metric) for volume in run] for run in runs.values()] for row in rows_of}
            for metric in METRICS
        }

    data = {
        "metrics": [{"key": metric, "label": UNITS[metric], "digits": DIGITS[metric]} for metric in METRICS],
        "rows": rows_of,
        "runs": list(runs),
        "volumes": [volume_name(volume) for volume in runs[first]],
        "values": of_all(Volume.value),
        "undefined": of_all(Volume.undefined),
        "overlays": overlays,
        "colours": {"runs": RUNS, "structures": list(colours.values())},
    }
    content = {
        "description": [_description(setup), *setup["notes"]],
        "tables": tables,
        "volumes": volume_table(runs),
        "rules": RULES,
        "overlay_note": overlay_note,
    }
    write_filled(path, "evaluation", _title(setup), colours, jsonable(data), content)
