"""``nnUNetUDA_checkpoints``: compare trained checkpoints on target images without a label."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from nnunet_uda.commands.model_options import check_model_options
from nnunet_uda.data.convention import TARGET_FOLDER, dataset_name, results_folder
from nnunet_uda.devices import DEVICE_HELP, choose_device
from nnunet_uda.errors import command
from nnunet_uda.evaluation.output import check_output, whole_folder
from nnunet_uda.evaluation.prediction import TrainedModel, dataset_of, require_checkpoint, unlabelled_images
from nnunet_uda.evaluation.report import jsonable, write_rows
from nnunet_uda.evaluation.runs import find_raw_dataset
from nnunet_uda.evaluation.unsupervised import COLUMNS, NOTE, compare_checkpoints, table
from nnunet_uda.files import write_json, write_text
from nnunet_uda.methods import let_find

REPORT = "criteria.json"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name trained models, one for each combination."""
    parser.add_argument("-d", metavar="DATASET", required=True, help="dataset id or name")
    parser.add_argument("-tr", metavar="TRAINER", nargs="+", required=True, help="trainers")
    parser.add_argument("-p", metavar="PLANS", nargs="+", default=["nnUNetPlans"], help="plans [nnUNetPlans]")
    parser.add_argument("-c", metavar="CONFIGURATION", default="2d", help="configuration [2d]")
    parser.add_argument("-f", metavar="FOLD", nargs="+", default=["0"], help="folds, each a model of its own "
                        "[0]")  # fmt: skip
    parser.add_argument("-i", metavar="FOLDER", type=Path, help=f"unlabelled target images [the dataset's "
                        f"{TARGET_FOLDER}]")  # fmt: skip
    parser.add_argument("-device", help=DEVICE_HELP)


def model_folders(arguments: argparse.Namespace) -> list[tuple[Path, str]]:
    """nnU-Net's results folder and the fold of each combination of ``-tr``, ``-p`` and ``-f``."""
    check_model_options(arguments)
    let_find()
    names = product(arguments.tr, arguments.p)
    folders = [results_folder(arguments.d, trainer, plans, arguments.c) for trainer, plans in names]
    return [(folder, fold) for folder in folders for fold in arguments.f]


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_checkpoints",
        description="Compare trained checkpoints on unlabelled target images: criteria.json, .csv and .md, and the "
        f"table on the screen. {NOTE}",
        epilog="Example: nnUNetUDA_checkpoints -d 501 -tr CISFATrainer SourceOnlyTrainer -chk "
        "checkpoint_best.pth checkpoint_final.pth -o criteria",
    )
    add_model_arguments(parser)
    parser.add_argument("-chk", metavar="FILE", nargs="+", default=["checkpoint_final.pth"], help="checkpoints of each "
                        "model [checkpoint_final.pth]")  # fmt: skip
    parser.add_argument(
        "-o", metavar="FOLDER", type=Path, required=True, help="output folder; a former result is replaced"
    )
    arguments = parser.parse_args(argv)
    check_output(arguments.o, REPORT)
    device = choose_device(arguments.device)
    models = [
        TrainedModel(folder, fold, checkpoint)
        for folder, fold in model_folders(arguments)
        for checkpoint in arguments.chk
    ]
    for model in models:
        dataset_of(model.folder)
        require_checkpoint(model)
    images = arguments.i or find_raw_dataset(arguments.d) / TARGET_FOLDER
    cases = unlabelled_images(images, dataset_of(models[0].folder))

    with whole_folder(arguments.o, REPORT) as output:
        rows = compare_checkpoints(models, cases, device)
        text = f"{table(rows)}\n\n{len(cases)} image(s) of {images}. {NOTE}\n"
        content = {"dataset": dataset_name(arguments.d), "configuration": arguments.c, "images": str(images),
                   "cases": list(cases), "higher_is_better": COLUMNS, "checkpoints": rows}  # fmt: skip
        write_json(jsonable(content), output / REPORT)
        write_rows(output / "criteria.csv", rows)
        write_text(text, output / "criteria.md")
    print(text)
    print(f"Written to {arguments.o}: {REPORT}, criteria.csv, criteria.md")
