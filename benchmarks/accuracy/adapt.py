"""What ``nnUNetUDA_adapt`` makes of trained models: Dice before and after, and the share of scans that it made worse.

    python -m benchmarks.accuracy.adapt -o FOLDER -task heart -i imagesTs/ -r labelsTs/ -device cpu \\
        -models source_only=.../SourceOnlyTrainer__PLANS__2d random_style=.../RandomStyleTrainer__PLANS__2d

A task and some models a call; FOLDER/adapt.md and adapt.json hold all calls. Options behind ``--`` are the command's,
as ``-- -steps 100``. Predictions that are there are not made again: the same command goes on where it stopped.
``-first 4`` takes the first scans alone, where a CPU is all that there is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_uda.adaptation.model import open_model
from nnunet_uda.commands import adapt
from nnunet_uda.data.convention import read_json
from nnunet_uda.devices import open_device
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.metrics import evaluate_folder
from nnunet_uda.evaluation.prediction import unlabelled_images
from nnunet_uda.evaluation.report import markdown_table
from nnunet_uda.evaluation.runs import parse_runs, read_labels
from nnunet_uda.files import write_json

WORSE = 0.01
"""A scan whose mean Dice fell by more than this was made worse."""


def predict(model_folder: Path, images: Path, out: Path, device: str) -> None:
    """The unadapted predictions."""
    model = open_model(model_folder, None, "checkpoint_final.pth", open_device(device))
    out.mkdir(parents=True, exist_ok=True)
    for case, files in unlabelled_images(images, model.dataset_json).items():
        path = out / f"{case}{model.dataset_json['file_ending']}"
        if not path.exists():
            volume, _, properties = model.preprocess(files)
            model.write_prediction(model.logits(volume, model.weights), properties, path)


def dice(reference: Path, prediction: Path, model_folder: Path, cases: list[str]) -> dict[str, float]:
    """Mean Dice over structures, by case."""
    labels = read_labels(model_folder / "dataset.json")
    for extra in prediction.glob("*.nii.gz"):
        if extra.name.removesuffix(".nii.gz") not in cases:
            raise UDAError(f"{extra}: no scan of this call; give another folder (-o)")
    scores = evaluate_folder(reference, prediction, labels.structures, labels.file_ending, cases, labels.ignore)
    return {case: float(np.nanmean([row["Dice"] for row in of.values()])) for case, of in scores.items()}


def measure(name: str, folder: Path, args: argparse.Namespace, images: Path, options: list[str]) -> dict[str, Any]:
    """A record: Dice of each scan before and after, in both modes."""
    place = args.o / args.task / name
    cases = sorted(unlabelled_images(images, read_json(folder / "dataset.json")))
    predict(folder, images, place / "unadapted", args.device)
    found = {"before": dice(args.r, place / "unadapted", folder, cases)}
    for mode in args.modes:
        words = ["-m", str(folder), "-i", str(images), "-o", str(place / mode), "-mode", mode, "-device", args.device]
        adapt.main([*words, *options])
        found[mode] = dice(args.r, place / mode, folder, cases)
    return {"task": args.task, "model": name, "options": options, "dice": found}


def table(records: list[dict[str, Any]]) -> str:
    """A line a task and model."""
    rows = []
    for record in records:
        before, row = record["dice"]["before"], [record["task"], record["model"], str(len(record["dice"]["before"]))]
        row.append(f"{np.mean(list(before.values())):.3f}")
        for mode in ("scan", "folder"):
            after = record["dice"].get(mode)
            if after is None:
                row += ["–", "–"]
                continue
            worse = np.mean([after[case] < before[case] - WORSE for case in before])
            row += [f"{np.mean(list(after.values())):.3f}", f"{worse:.0%}"]
        rows.append(row)
    header = ["task", "model", "scans", "before", "scan", "made worse", "folder", "made worse"]
    return markdown_table({"caption": "Dice before and after adapting", "header": header, "rows": rows}) + "\n"


@command
def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="for everything")
    parser.add_argument("-task", required=True, help="its name in the table")
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="scans")
    parser.add_argument("-r", type=Path, required=True, metavar="FOLDER", help="their labels")
    parser.add_argument("-models", nargs="+", required=True, metavar="NAME=FOLDER", help="trained model folders")
    parser.add_argument("-modes", nargs="+", choices=("scan", "folder"), default=["scan", "folder"], help="[both]")
    parser.add_argument("-first", type=int, metavar="N", help="the first scans alone [all]")
    parser.add_argument("-device", default="cuda", help="cpu, cuda or mps [cuda]")
    args = parser.parse_args(own)
    path = args.o / "adapt.json"
    records = read_json(path)["runs"] if path.exists() else []
    images = args.i
    if args.first:
        images = args.o / args.task / f"first_{args.first}"
        images.mkdir(parents=True, exist_ok=True)
        for scan in sorted(args.i.glob("*_0000.nii.gz"))[: args.first]:
            if not (images / scan.name).exists():
                (images / scan.name).symlink_to(scan.resolve())
    for run in parse_runs(args.models):
        record = measure(run.name, Path(run.folder), args, images, options)
        same = ("task", "model", "options")
        records = [one for one in records if any(one[key] != record[key] for key in same)] + [record]
        write_json({"runs": records}, path)
        (args.o / "adapt.md").write_text(table(records), encoding="utf-8")
    print(table(records))


if __name__ == "__main__":
    main()
