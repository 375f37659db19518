"""``nnUNetUDA_quality``: whether to trust each segmentation of a model, estimated without a label of its domain."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_uda import files
from nnunet_uda.commands.trainers import trainers_folder
from nnunet_uda.data.convention import TARGET_FOLDER, check_model_options, dataset_name, environment_folder
from nnunet_uda.devices import open_device
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.output import check_output, whole_folder
from nnunet_uda.evaluation.quality import Judge, Looked, judge_all
from nnunet_uda.evaluation.quality_page import thumbnail, write_page
from nnunet_uda.evaluation.quality_report import REPORT
from nnunet_uda.evaluation.report import jsonable, markdown_table, write_rows
from nnunet_uda.evaluation.runs import find_raw_dataset
from nnunet_uda.evaluation.unsupervised import TrainedModel, dataset_of, unlabelled_images
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


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name one trained model, and the device."""
    parser.add_argument("-d", metavar="DATASET", help="dataset id or name (or -m)")
    parser.add_argument("-tr", metavar="TRAINER", help="trainer (or -m)")
    parser.add_argument("-p", metavar="PLANS", help="plans (default: nnUNetPlans)")
    parser.add_argument("-plans", default="nnUNetPlans", help=argparse.SUPPRESS)  # a former name
    parser.add_argument("-c", metavar="CONFIGURATION", default="2d", help="configuration (default: 2d)")
    parser.add_argument("-m", metavar="FOLDER", type=Path, help="the model's folder, TRAINER__PLANS__CONFIGURATION, "
                        "in place of -d, -tr, -p and -c")  # fmt: skip
    parser.add_argument("-f", metavar="FOLD", nargs="+", default=["0"], help="folds that predict together (default: "
                        "0); of several it counts, too, how far they agree")  # fmt: skip
    parser.add_argument("-chk", metavar="FILE", default="checkpoint_final.pth", help="checkpoint (default: "
                        "checkpoint_final.pth)")  # fmt: skip
    parser.add_argument("-device", default="cuda", help="cuda, cpu or mps (default: cuda)")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_quality",
        description="For each scan and structure an estimate of Dice with a range, a verdict (good, look at it, "
        f"failed) and the reasons in words: {REPORT}, quality.csv and quality.html. {BLIND}",
        epilog="Example: nnUNetUDA_quality -d 510 -tr CASTTrainer -c 2d -f 0 -i scans/ -pred predictions/ -o quality/",
    )
    add_model(parser)
    parser.add_argument("-i", metavar="FOLDER", type=Path, help=f"scans (default: the dataset's {TARGET_FOLDER})")
    parser.add_argument("-pred", metavar="FOLDER", type=Path, help="their predictions, by nnUNetv2_predict; without, "
                        "the network is asked, less carefully than nnUNetv2_predict does")  # fmt: skip
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder; a former report is replaced")
    parser.add_argument("--no_pictures", action="store_true", help="draw no thumbnails")
    arguments = parser.parse_args(argv)
    if arguments.p is not None and Path(arguments.p).is_dir():
        print("-p means plans in every command: the predictions of nnUNetUDA_quality are now -pred", file=sys.stderr)
        arguments.pred, arguments.p = arguments.pred or Path(arguments.p), None
    if arguments.i is None and arguments.d is None:
        raise UDAError("without -d, -i is needed too: the folder of the scans")
    return arguments


def model_folder(arguments: argparse.Namespace) -> Path:
    """The model's folder of ``-m``, or of ``-d``, ``-tr``, ``-p`` and ``-c``.

    Raises:
        UDAError: where neither is given, or a name is none.
    """
    check_model_options(arguments)
    if arguments.m is not None:
        return Path(os.path.abspath(arguments.m))
    if arguments.d is None or arguments.tr is None:
        raise UDAError("-d and -tr are needed, or the model's folder: -m .../TRAINER__PLANS__CONFIGURATION")
    results = environment_folder("nnUNet_results") / dataset_name(arguments.d)
    return results / f"{arguments.tr}__{arguments.p or arguments.plans}__{arguments.c}"


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


def picture(judge: Judge, looked: Looked, structures: dict[str, int], size: int) -> str:
    """``thumbnail`` of a case, its axes put back from the network's order."""
    backward = list(judge.asked.predictor.plans_manager.transpose_backward)
    image = looked.volume[0].numpy().transpose(backward)
    label = looked.label.transpose(backward)
    if judge.asked.predictor.plans_manager.plans["image_reader_writer"] == "SimpleITKIOWithReorient":
        image, label = image[:, ::-1, ::-1], label[:, ::-1, ::-1]  # it reads in RAS
    return thumbnail(image, label, [looked.spacing[axis] for axis in backward], structures, size)


def write_csv(path: Path, cases: Sequence[CaseQuality]) -> None:
    """A line a case and structure, and one of the case as a whole."""
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
        dice = "–" if math.isnan(each.dice) else f"{each.dice:.2f}"
        reason = case.reasons[0] if case.reasons else "nothing unusual"
        rows.append([case.case, dice, f"{each.low:.2f} to {each.high:.2f}", each.verdict, reason])
    caption = f"The {len(rows)} worst of {len(cases)} case(s)" if len(cases) > SHOWN else f"{len(cases)} case(s)"
    return markdown_table({"caption": caption, "header": ["case", "Dice", "range", "verdict", "why"], "rows": rows})


def worst_first(cases: Sequence[CaseQuality]) -> list[CaseQuality]:
    return sorted(cases, key=lambda case: (-1.0 if math.isnan(case.overall.dice) else case.overall.dice, case.case))


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    os.environ.setdefault("nnUNet_extTrainer", str(trainers_folder()))
    files.put_back(Path(arguments.o))
    check_output(Path(arguments.o), REPORT)
    folder = model_folder(arguments)
    dataset_json = dataset_of(TrainedModel(folder, arguments.f[0], arguments.chk))
    device = open_device(arguments.device)
    scans = arguments.i or find_raw_dataset(arguments.d) / TARGET_FOLDER
    images = unlabelled_images(scans, dataset_json)
    predictions = find_predictions(arguments.pred, list(images), dataset_json["file_ending"])
    judge = Judge(folder, arguments.f, arguments.chk, device)
    structures = {name: value for value, name in enumerate(judge.calibration.structures, 1)}

    found, pictures = [], {}
    size = 150 if len(images) <= MANY else 110
    with whole_folder(Path(arguments.o), REPORT) as output:
        cases = tqdm(judge_all(judge, images, predictions), total=len(images), desc="Quality", unit="case")
        for case, quality, looked in cases:
            found.append(quality)
            if not arguments.no_pictures:
                pictures[case] = picture(judge, looked, structures, size)
        found = worst_first(found)
        about = judge.calibration.about
        calibrated = (
            f"Calibrated on {about.get('calibrated_on', 'labelled cases')} in random styles ({about['pairs']} pairs)."
            if about["pairs"]
            else "Not calibrated on this model: neither quality.json nor the source's preprocessed cases were there."
        )
        judged = f"the predictions in {arguments.pred}" if arguments.pred else "the network's own segmentations"
        notes = [
            f"Judged: {judged}, {len(found)} case(s). Dice from 0 to 1, with a range that holds {COVERAGE:.0%} of "
            f"calibration's cases. good: {GOOD} or more and a range from {FAILED} on; failed: below {FAILED}. A case's "
            "verdict is that of its worst structure.",
            calibrated,
            BLIND,
        ]
        content = {
            "model": str(folder), "folds": arguments.f, "checkpoint": arguments.chk, "scans": str(scans),
            "predictions": str(arguments.pred) if arguments.pred else None, "calibration": about, "notes": notes,
            "cases": [case.to_json() for case in found],
        }  # fmt: skip
        text = json.dumps(jsonable(content), indent=2, allow_nan=False, ensure_ascii=False)
        (output / REPORT).write_text(f"{text}\n", "utf-8", "backslashreplace")
        write_csv(output / "quality.csv", found)
        title = f"Quality of {folder.name} on {len(found)} scan(s)"
        write_page(output / "quality.html", title, notes, [case.to_json() for case in found], structures, pictures)
    print(f"\n{table(found)}\n")
    count = Counter(case.overall.verdict for case in found)
    print(", ".join(f"{count[verdict]} {verdict}" for verdict in ("failed", "look at it", "good")))
    print(f"{calibrated} {BLIND}")
    print(f"Written to {arguments.o}: {REPORT}, quality.csv, quality.html (open it in a browser)")


if __name__ == "__main__":
    main()
