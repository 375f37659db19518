"""``nnUNetUDA_quality``: whether to trust each segmentation of a model, estimated without a label of its domain."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from nnunet_uda.commands.model_options import add_model, model_folder
from nnunet_uda.data.convention import TARGET_FOLDER
from nnunet_uda.devices import choose_device
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.output import check_output, whole_folder
from nnunet_uda.evaluation.prediction import dataset_of, unlabelled_images
from nnunet_uda.evaluation.quality import Judge
from nnunet_uda.evaluation.quality_output import BLIND, find_predictions, judge_and_draw, table, write_quality
from nnunet_uda.evaluation.quality_report import REPORT
from nnunet_uda.evaluation.runs import find_raw_dataset
from nnunet_uda.methods import let_find


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_quality",
        description="For each scan and structure an estimate of Dice with a range, a verdict (good, look at it, "
        f"failed) and the reasons in words: {REPORT}, quality.csv and quality.html. {BLIND}",
        epilog="Example: nnUNetUDA_quality -d 510 -tr CASTTrainer -c 2d -f 0 -i scans/ -pred predictions/ -o quality/",
    )
    add_model(parser)
    parser.add_argument("-i", metavar="FOLDER", type=Path, help=f"scans [the dataset's {TARGET_FOLDER}]")
    parser.add_argument("-pred", metavar="FOLDER", type=Path, help="their predictions, by nnUNetv2_predict; without, "
                        "the network is asked, less carefully than nnUNetv2_predict does")  # fmt: skip
    parser.add_argument(
        "-o", metavar="FOLDER", type=Path, required=True, help="output folder; a former report is replaced"
    )
    parser.add_argument("--no_pictures", action="store_true", help="draw no thumbnails")
    arguments = parser.parse_args(argv)
    if arguments.p is not None and Path(arguments.p).is_dir():
        print("-p means plans in every command: the predictions of nnUNetUDA_quality are now -pred", file=sys.stderr)
        arguments.pred, arguments.p = arguments.pred or Path(arguments.p), None
    if arguments.i is None and arguments.d is None:
        raise UDAError("without -d, -i is needed too: the folder of the scans")
    return arguments


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    let_find()
    check_output(arguments.o, REPORT)
    folder = model_folder(arguments)
    dataset_json = dataset_of(folder)
    device = choose_device(arguments.device)
    scans = arguments.i or find_raw_dataset(arguments.d) / TARGET_FOLDER
    images = unlabelled_images(scans, dataset_json)
    predictions = find_predictions(arguments.pred, list(images), dataset_json["file_ending"])
    judge = Judge(folder, arguments.f, arguments.chk, device)

    judged = f"the predictions in {arguments.pred}" if arguments.pred else "the network's own segmentations"
    about = {
        "model": str(folder), "folds": arguments.f, "checkpoint": arguments.chk, "scans": str(scans),
        "predictions": str(arguments.pred) if arguments.pred else None,
    }  # fmt: skip
    with whole_folder(arguments.o, REPORT) as output:
        found, pictures = judge_and_draw(judge, images, predictions, not arguments.no_pictures)
        calibrated = write_quality(output, judge, about, judged, found, pictures)
    print(f"\n{table(found)}\n")
    count = Counter(case.overall.verdict for case in found)
    print(", ".join(f"{count[verdict]} {verdict}" for verdict in ("failed", "look at it", "good")))
    print(f"{calibrated} {BLIND}")
    print(f"Written to {arguments.o}: {REPORT}, quality.csv, quality.html (open it in a browser)")


if __name__ == "__main__":
    main()
