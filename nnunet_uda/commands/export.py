"""``nnUNetUDA_export``: a trained model as a stock model of nnU-Net, checked, with a model card."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_uda.commands.model_options import add_model, model_folder
from nnunet_uda.data.components import KEY as COMPONENTS
from nnunet_uda.data.convention import TARGET_FOLDER, read_json
from nnunet_uda.devices import choose_device
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.model_card import what_to_clip
from nnunet_uda.evaluation.prediction import dataset_of
from nnunet_uda.evaluation.quality_report import read_report
from nnunet_uda.evaluation.stock_model import CHECKED, export, scans_to_check
from nnunet_uda.files import check_place
from nnunet_uda.methods import let_find


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_export",
        description="Write a trained model as a stock model of nnU-Net in a zip file: "
        "nnUNetv2_install_pretrained_model_from_zip and nnUNetv2_predict need nothing of this package. Its predictions "
        "are compared voxel for voxel with the trained model's, and a model card is written into it and beside it. "
        "Networks that are not nnU-Net's plain one (prototypes, UUDS) are refused.",
        epilog="Example: nnUNetUDA_export -d 510 -tr CASTTrainer -c 2d -f 0 -o Dataset510_Liver.zip",
    )
    add_model(parser)
    parser.add_argument("-i", metavar="FOLDER", type=Path, help="scans to compare predictions on ["
                        f"{CHECKED} of the dataset's imagesTs or {TARGET_FOLDER}]")  # fmt: skip
    parser.add_argument("-q", metavar="FILE", type=Path, help="quality_report.json of nnUNetUDA_quality, for the card")
    parser.add_argument("-o", metavar="FILE.zip", type=Path, required=True, help="the zip file to write")
    parser.add_argument("--receiver_clips", action="store_true", help="export although scans must be clipped before "
                        "nnU-Net predicts them: the model card says how")  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.o.suffix != ".zip":
        raise UDAError(f"-o takes a file that ends in .zip, found {arguments.o}")
    for place in (arguments.o, arguments.o.with_suffix(".md")):
        if place.exists():
            raise UDAError(f"{place} exists: choose another name with -o, or remove it. Nothing was written")
    check_place(arguments.o)
    return arguments


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    let_find()
    folder = model_folder(arguments)
    dataset_json = dataset_of(folder)
    quality = read_report(arguments.q) if arguments.q else None
    device = choose_device(arguments.device)
    clip = what_to_clip(dataset_json)
    if clip is not None and not arguments.receiver_clips:
        raise UDAError(
            f"{folder}: scans are clipped before this model predicts them ({clip}), which nnU-Net alone does not do. "
            "With --receiver_clips the model is exported, and its card says what the receiver must do to every scan"
        )
    scans = scans_to_check(arguments.i, folder, dataset_json)
    print(f"Predicting {len(scans)} scan(s) with the trained model, then as the receiver of the exported one")
    check, card = export(folder, arguments.f, arguments.chk, scans, quality, clip, device, arguments.o)
    print(f"{arguments.o}: {check}")
    print(f"Model card: {card}, and in the zip file. Fill in its last lines (licence, patients, contact)")
    if read_json(folder / "plans.json").get(COMPONENTS):
        print("The receiver postprocesses predictions with nnUNetv2_apply_postprocessing: the card says how")
    if clip is not None:
        print(f"The receiver must clip every scan ({clip}): the card says how")


if __name__ == "__main__":
    main()
