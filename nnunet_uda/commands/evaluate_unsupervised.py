"""``nnUNetUDA_evaluate --unsupervised``: compare trained checkpoints on target images without a label."""

from __future__ import annotations

import argparse
import math
from itertools import groupby, product
from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import TARGET_FOLDER, check_model_options, dataset_name, environment_folder
from nnunet_uda.devices import open_device
from nnunet_uda.errors import command
from nnunet_uda.evaluation.output import check_output, whole_folder
from nnunet_uda.evaluation.report import jsonable, markdown_table, write_rows
from nnunet_uda.evaluation.runs import find_raw_dataset
from nnunet_uda.evaluation.unsupervised import (
    TrainedModel,
    dataset_of,
    measure,
    preprocessed,
    pseudo_dice,
    require_checkpoint,
    unlabelled_images,
)
from nnunet_uda.files import put_back, write_json
from nnunet_uda.methods import let_find
from nnunet_uda.training.criteria import HIGHER_IS_BETTER

REPORT = "criteria.json"
COLUMNS = {"pseudo_dice": True, **HIGHER_IS_BETTER}
NOTE = (
    "No label was read. ↑: higher is better, ↓: lower is better; bold: the best of a column. pseudo_dice is that of "
    "the checkpoint's last epoch in training, on source validation patches. All others are measured on these images, "
    "without test-time mirroring. agreement: Dice between the segmentations of an image and of the same image darkened "
    "and mirrored. entropy and snd also praise a network that finds nothing; foreground_entropy, mutual_information "
    "and agreement do not. Choose by agreement: it ranked checkpoints best where that could be tested. None of them is "
    "a Dice on the target: label a few scans before you trust a choice."
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name trained models, one for each combination."""
    parser.add_argument("-d", metavar="DATASET", required=True, help="dataset id or name")
    parser.add_argument("-tr", metavar="TRAINER", nargs="+", required=True, help="trainers")
    parser.add_argument("-p", metavar="PLANS", nargs="+", default=["nnUNetPlans"], help="plans (default: nnUNetPlans)")
    parser.add_argument("-c", metavar="CONFIGURATION", default="2d", help="configuration (default: 2d)")
    parser.add_argument("-f", metavar="FOLD", nargs="+", default=["0"], help="folds, each a model of its own "
                        "(default: 0)")  # fmt: skip
    parser.add_argument("-i", metavar="FOLDER", type=Path, help=f"unlabelled target images (default: the dataset's "
                        f"{TARGET_FOLDER})")  # fmt: skip
    parser.add_argument("-device", default="cuda", help="cuda, cpu or mps (default: cuda)")


def model_folders(arguments: argparse.Namespace) -> list[tuple[Path, str]]:
    """nnU-Net's results folder and the fold of each combination of ``-tr``, ``-p`` and ``-f``."""
    check_model_options(arguments)
    let_find()
    results = environment_folder("nnUNet_results") / dataset_name(arguments.d)
    names = product(arguments.tr, arguments.p)
    return [(results / f"{trainer}__{plans}__{arguments.c}", fold) for trainer, plans in names for fold in arguments.f]


def names_of(folder: Path) -> tuple[str, str]:
    """Trainer and plans of nnU-Net's results folder ``TRAINER__PLANS__CONFIGURATION``."""
    trainer, _, rest = folder.name.partition("__")
    return trainer, rest.rpartition("__")[0]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the best value of each criterion in bold, unless what is shown of all is the same."""
    header = ["trainer", "plans", "fold", "checkpoint", "epochs"]
    header += [f"{name} {'↑' if higher else '↓'}" for name, higher in COLUMNS.items()]
    lines = [[str(row[key]) for key in header[:5]] for row in rows]
    for name, higher in COLUMNS.items():
        values = [row[name] for row in rows]
        texts = ["–" if math.isnan(value) else f"{value:.4f}" for value in values]
        best = (max if higher else min)((v for v in values if not math.isnan(v)), default=math.nan)
        differ = len(set(texts)) > 1
        for line, text in zip(lines, texts, strict=True):
            line.append(f"**{text}**" if differ and text == f"{best:.4f}" else text)
    return markdown_table({"caption": f"{len(rows)} checkpoint(s)", "header": header, "rows": lines})


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
                        "model (default: checkpoint_final.pth)")  # fmt: skip
    parser.add_argument("-o", metavar="FOLDER", required=True, help="output folder; a former result is replaced")
    arguments = parser.parse_args(argv)
    put_back(Path(arguments.o))
    check_output(Path(arguments.o), REPORT)
    device = open_device(arguments.device)
    models = [
        TrainedModel(folder, fold, checkpoint)
        for folder, fold in model_folders(arguments)
        for checkpoint in arguments.chk
    ]
    for model in models:
        dataset_of(model)
        require_checkpoint(model)
    images = arguments.i or find_raw_dataset(arguments.d) / TARGET_FOLDER
    cases = unlabelled_images(images, dataset_of(models[0]))

    rows = []
    with whole_folder(Path(arguments.o), REPORT) as output:
        for folder, group in groupby(models, key=lambda model: model.folder):
            same_plans = list(group)
            with preprocessed(same_plans[0], cases, device) as volumes:
                for model in same_plans:
                    values, checkpoint = measure(model, volumes, device)
                    trainer, plans = names_of(folder)
                    row: dict[str, Any] = {"trainer": trainer, "plans": plans, "fold": model.fold}
                    row |= {
                        "checkpoint": model.checkpoint,
                        "epochs": checkpoint["current_epoch"],
                        "pseudo_dice": pseudo_dice(checkpoint),
                        **values,
                    }
                    rows.append(row)
        text = f"{table(rows)}\n\n{len(cases)} image(s) of {images}. {NOTE}\n"
        content = {"dataset": dataset_name(arguments.d), "configuration": arguments.c, "images": str(images),
                   "cases": list(cases), "higher_is_better": COLUMNS, "checkpoints": rows}  # fmt: skip
        write_json(jsonable(content), output / REPORT)
        write_rows(output / "criteria.csv", rows)
        (output / "criteria.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"Written to {arguments.o}: {REPORT}, criteria.csv, criteria.md")
