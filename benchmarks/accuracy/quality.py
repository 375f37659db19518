"""How well ``nnUNetUDA_quality`` estimates the Dice of real models' segmentations, and how well simpler signals do.

THIS READS LABELS of the target's test scans: it measures the estimate, it chooses and fits nothing. For every
checkpoint of every fold of the model folders that are named (``TRAINER__PLANS__CONFIGURATION``), good ones and bad
ones, it estimates each structure of each labelled target scan (``imagesTs`` and ``imagesTu`` with ``labelsTs``) of the
model's dataset and compares with its Dice, on the network's grid. Writes quality.json, quality.md and quality.png: over
all cases and structures, and for each dataset,

* Spearman's rank correlation of the estimate with the Dice, and the mean absolute error;
* the area under the risk-coverage curve: the mean over all shares of cases, the most trusted first, of 1 - Dice; beside
  that of the true order, which is the least there is;
* how many failed ones (Dice < 0.5) are called good, and how many good ones (Dice of 0.7 or more) failed;
* the share of true Dice values within the range.

Baselines: agreement of the views, entropy inside, and the volume's distance from the source's median, alone. Over
models, the rank correlation with the mean Dice of the mean estimate, and of agreement.

``-prior`` prints the weights that fit the calibration pairs of all these models together (source scans in random
styles, no target label): what ``PRIOR`` in ``quality/calibration.py`` is made of. A second start goes on where the
first one stopped.

    python -m benchmarks.accuracy.quality -m nnUNet_results/Dataset541_Heart/* -o quality_benchmark/
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr

from nnunet_uda.data.case import preprocess_case
from nnunet_uda.data.convention import TARGET_FOLDER, environment_folder
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.prediction import dataset_of, unlabelled_images
from nnunet_uda.evaluation.quality import open_asked, preprocessed_source
from nnunet_uda.evaluation.report import jsonable, markdown_table
from nnunet_uda.files import write_json
from nnunet_uda.methods import trainers_folder
from nnunet_uda.quality.asked import Asked, as_label
from nnunet_uda.quality.calibration import KINDS, Calibration, Pair, calibrate, fit_weights
from nnunet_uda.quality.cases import FILE, calibration_pairs, quality_of_volume, read_calibration, structure_names

BASELINES = ("agreement", "entropy", "volume")
FAILED, GOOD = 0.5, 0.7


def measure(
    folder: Path, fold: str, checkpoint: str, device: torch.device, options: dict[str, int] | None
) -> dict[str, Any]:
    """Calibration pairs, and estimates and Dice of every structure of the labelled target scans, of one checkpoint.

    Args:
        options: of ``calibration_pairs``; None takes the calibration that lies beside the checkpoint.
    """
    begin = time.monotonic()
    asked = open_asked(folder, [fold], checkpoint, device)
    predictor = asked.predictor
    names = structure_names(predictor.dataset_json)
    pairs: list[Pair] = []
    if options is None:
        made = read_calibration(folder / f"fold_{fold}" / FILE, names)
    else:
        labelled, held_out, targets, words = preprocessed_source(
            predictor.plans_manager, predictor.configuration_manager, fold
        )
        shapes, scans, pairs, about = calibration_pairs(asked, len(names), labelled, [held_out], targets, **options)
        made = calibrate(names, shapes, scans, pairs, {**about, "calibrated_on": words})
    rows = []
    for case, files, label in labelled_targets(folder, predictor.dataset_json):
        rows += estimate_rows(asked, made, case, files, label)
    return {
        "dataset": folder.parent.name, "model": folder.name, "fold": fold, "checkpoint": checkpoint,
        "seconds": time.monotonic() - begin, "about": made.about, "pairs": [vars(pair) for pair in pairs], "rows": rows,
    }  # fmt: skip


def labelled_targets(folder: Path, dataset_json: dict[str, Any]) -> list[tuple[str, list[Path], Path]]:
    """Target scans of the model's dataset that have a label: id, files and label."""
    raw = environment_folder("nnUNet_raw") / folder.parent.name
    found = []
    for name in ("imagesTs", TARGET_FOLDER):
        if (raw / name).is_dir():
            for case, files in unlabelled_images(raw / name, dataset_json).items():
                label = raw / "labelsTs" / f"{case}{dataset_json['file_ending']}"
                if label.is_file():
                    found.append((case, files, label))
    if not found:
        raise UDAError(f"{raw}: no target scan has a label in labelsTs")
    return found


def estimate_rows(asked: Asked, made: Calibration, case: str, files: list[Path], label: Path) -> list[dict[str, Any]]:
    """A row a structure that is in the segmentation or in the label."""
    predictor = asked.predictor
    data, seg, properties = preprocess_case(
        files, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json, label
    )
    volume, truth = torch.from_numpy(np.asarray(data, dtype=np.float32)), as_label(seg, asked.num_structures)
    quality, found = quality_of_volume(case, asked, made, volume, asked.spacing(properties))
    rows = []
    for value, (name, each) in enumerate(quality.structures.items(), 1):
        one, two = found == value, truth == value
        if not (one.any() or two.any()):
            continue
        signals = quality.signals[name]
        rows.append({
            "case": case, "structure": name, "true": 2 * int((one & two).sum()) / int(one.sum() + two.sum()),
            "dice": each.dice, "low": each.low, "high": each.high, "verdict": each.verdict, **baselines(signals),
        })  # fmt: skip
    return rows


def baselines(signals: dict[str, Any]) -> dict[str, float]:
    """Simpler estimates, more is better; 0, the worst, for what was not found."""
    if not signals["present"]:
        return {"agreement": 0.0, "entropy": -1.0, "volume": -1e3}
    return {
        "agreement": float(np.mean(list(signals["agreement"].values()))),
        "entropy": -signals["entropy_inside"],
        "volume": -abs((signals["deviations"] or {"size": 0.0})["size"]),
    }


def risk_coverage(trust: Sequence[float], dice: Sequence[float]) -> float:
    """Area under the curve of 1 - mean Dice of the most trusted cases over their share; ties share their risk."""
    order = rankdata([-value for value in trust], method="average")
    risk = 1 - np.asarray(dice, dtype=float)
    mean_of_tie = {rank: float(risk[order == rank].mean()) for rank in np.unique(order)}
    ordered = np.array([mean_of_tie[rank] for rank in np.sort(order)])
    return float(np.mean(np.cumsum(ordered) / np.arange(1, len(ordered) + 1)))


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is measured over rows."""
    rows = [row for row in rows if row["dice"] is not None and math.isfinite(row["dice"])]
    true, estimate = ([row[key] for row in rows] for key in ("true", "dice"))
    failed, fine = [row for row in rows if row["true"] < FAILED], [row for row in rows if row["true"] >= GOOD]
    return {
        "n": len(rows),
        "spearman": {key: rank(true, [row[key] for row in rows]) for key in ("dice", *BASELINES)},
        "mae": float(np.mean(np.abs(np.subtract(true, estimate)))),
        "bias": float(np.mean(np.subtract(estimate, true))),
        "mae_agreement": float(np.mean([abs(row["agreement"] - row["true"]) for row in rows])),
        "aurc": {key: risk_coverage([row[key] for row in rows], true) for key in ("dice", *BASELINES, "true")},
        "failed": len(failed),
        "failed_called_good": sum(row["verdict"] == "good" for row in failed),
        "good": len(fine),
        "good_called_failed": sum(row["verdict"] == "failed" for row in fine),
        "within": float(np.mean([row["low"] <= row["true"] <= row["high"] for row in rows])),
    }


def rank(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where one of them is constant or too short."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(spearmanr(first, second).statistic)


def text_of(records: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The tables, and the figures that they show."""
    rows = [row for record in records for row in record["rows"]]
    groups = {"all": rows}
    for record in records:
        groups.setdefault(record["dataset"], []).extend(record["rows"])
    found = {name: figures(group) for name, group in groups.items()}
    header = ["scans of", "n", "correlation", "error", "bias", "risk-coverage (least)", "failed called good",
              "good called failed", "in range"]  # fmt: skip
    lines = [
        [name, str(f["n"]), number(f["spearman"]["dice"]), number(f["mae"]), f"{f['bias']:+.2f}",
         f"{number(f['aurc']['dice'])} ({number(f['aurc']['true'])})", f"{f['failed_called_good']} of {f['failed']}",
         f"{f['good_called_failed']} of {f['good']}", f"{f['within']:.0%}"]
        for name, f in found.items()
    ]  # fmt: skip
    first = markdown_table({"caption": "The estimate", "header": header, "rows": lines})
    header = ["scans of", *(f"{key}: correlation, risk-coverage" for key in ("estimate", *BASELINES))]
    lines = [
        [name, *(f"{number(f['spearman'][key])}, {number(f['aurc'][key])}" for key in ("dice", *BASELINES))]
        for name, f in found.items()
    ]
    second = markdown_table({"caption": "Beside one signal alone", "header": header, "rows": lines})
    models = [
        {key: float(np.mean([row[key] for row in record["rows"] if row["dice"] is not None])) for key in
         ("true", "dice", "agreement")} | {"dataset": record["dataset"]}
        for record in records
    ]  # fmt: skip
    lines = []
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        own = [model for model in models if model["dataset"] == dataset]
        values = [number(rank([m["true"] for m in own], [m[key] for m in own])) for key in ("dice", "agreement")]
        lines.append([dataset, str(len(own)), *values])
    third = markdown_table({"caption": "Which model is better: rank correlation over models", "rows": lines,
                            "header": ["dataset", "models", "estimate", "agreement"]})  # fmt: skip
    return "\n\n".join((first, second, third)) + "\n", {"figures": found, "models": models}


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Estimate over true Dice, a colour a dataset, with the lines of the verdicts."""
    from nnunet_uda.figures import new_figure

    figure = new_figure(620, 560)
    axes = figure.add_axes((0.12, 0.11, 0.84, 0.84))
    marks, colours = "osD^vP", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
    for index, dataset in enumerate(dict.fromkeys(record["dataset"] for record in records)):
        rows = [row for record in records if record["dataset"] == dataset for row in record["rows"]]
        points = [(row["true"], row["dice"]) for row in rows if row["dice"] is not None]
        style = {"marker": marks[index % 6], "color": colours[index % 6], "alpha": 0.6, "s": 22, "linewidths": 0}
        axes.scatter(*zip(*points, strict=True), label=f"{dataset.partition('_')[2]} ({len(points)})", **style)
    axes.plot((0, 1), (0, 1), color="#555", linewidth=1)
    axes.axvline(FAILED, color="#999", linewidth=0.8, linestyle=":")
    axes.axhline(FAILED, color="#999", linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="true Dice", ylabel="Dice estimated without labels")
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", metavar="FOLDER", nargs="+", type=Path, required=True, help="model folders")
    parser.add_argument("-chk", metavar="PATTERN", nargs="+", default=["checkpoint_final.pth"], help="checkpoints")
    parser.add_argument("-o", metavar="FOLDER", type=Path, required=True)
    parser.add_argument("-volumes", type=int, default=4)
    parser.add_argument("-styles", type=int, default=6)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-beside", action="store_true", help="take quality.json beside the checkpoints, make none")
    parser.add_argument("-prior", action="store_true", help="print the weights that fit all models' pairs together")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("nnUNet_extTrainer", str(trainers_folder()))
    arguments.o.mkdir(parents=True, exist_ok=True)
    records = []
    for folder in arguments.m:
        paths = sorted({path for pattern in arguments.chk for path in folder.glob(f"fold_*/{pattern}")})
        for path in paths:
            fold = path.parent.name.removeprefix("fold_")
            kept = arguments.o / f"{folder.parent.name}.{folder.name}.{fold}.{path.stem}.json"
            if not kept.exists():
                dataset_of(folder)
                options = None if arguments.beside else {"volumes": arguments.volumes, "styles": arguments.styles}
                record = measure(folder, fold, path.name, torch.device(arguments.device), options)
                write_json(jsonable(record), kept)
                print(f"{kept.name}: {record['seconds']:.0f} s", flush=True)
            records.append(json.loads(kept.read_text()))
    if not records:
        raise UDAError("no checkpoint was found in the folders of -m")
    if arguments.prior:
        pairs = [Pair(**pair) for record in records for pair in record["pairs"]]
        for kind in KINDS:
            start = {"constant": 0.0, **dict.fromkeys(KINDS[kind], 0.2)}
            print(kind, json.dumps(fit_weights(pairs, kind, start)))
    text, found = text_of(records)
    write_json(jsonable(found), arguments.o / "quality.json")
    (arguments.o / "quality.md").write_text(text, encoding="utf-8")
    draw(records, arguments.o / "quality.png")
    print(text)


if __name__ == "__main__":
    main()
