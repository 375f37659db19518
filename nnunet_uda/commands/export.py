"""``nnUNetUDA_export``: a trained model as a stock model of nnU-Net, checked, with a model card."""

from __future__ import annotations

import argparse
import os
import shutil
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import SimpleITK as sitk

from nnunet_uda.commands.quality import add_model, model_folder
from nnunet_uda.commands.trainers import trainers_folder
from nnunet_uda.data.components import KEY as COMPONENTS
from nnunet_uda.data.convention import TARGET_FOLDER, environment_folder, read_json
from nnunet_uda.devices import open_device
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.quality_report import read_report
from nnunet_uda.evaluation.stock_model import (
    CARD,
    compare_segmentations,
    model_card,
    postprocess_as_a_receiver,
    predict_as_a_receiver,
    predict_here,
    what_to_clip,
    write_stock_model,
)
from nnunet_uda.evaluation.unsupervised import TrainedModel, dataset_of, unlabelled_images
from nnunet_uda.files import check_place, whole_file
from nnunet_uda.images.intensities import Intensities, read_clipped
from nnunet_uda.images.listing import entries

CHECKED = 2
"""Scans that are predicted with both models, by default."""


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
    parser.add_argument("-i", metavar="FOLDER", type=Path, help="scans to compare predictions on (default: "
                        f"{CHECKED} of the dataset's imagesTs or {TARGET_FOLDER})")  # fmt: skip
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


def scans_to_check(arguments: argparse.Namespace, folder: Path, dataset_json: dict) -> list[list[Path]]:
    """Files of the scans that are predicted twice.

    Raises:
        UDAError: if there is none.
    """
    if arguments.i is not None:
        return list(unlabelled_images(arguments.i, dataset_json).values())
    raw = environment_folder("nnUNet_raw") / folder.parent.name
    for name in ("imagesTs", TARGET_FOLDER, "imagesTr"):
        if (raw / name).is_dir() and entries(raw / name):
            return list(unlabelled_images(raw / name, dataset_json).values())[:CHECKED]
    raise UDAError(f"{raw} holds no scan to compare the predictions on: give some with -i FOLDER")


def lay_out(scans: Sequence[Sequence[Path]], folder: Path, clip: Intensities | None) -> None:
    """Copies of the scans in ``folder``, clipped where that is what the receiver has to do."""
    folder.mkdir()
    for files in scans:
        for file in files:
            if clip is None:
                shutil.copyfile(file, folder / file.name)
            else:
                sitk.WriteImage(read_clipped(file, clip), str(folder / file.name))


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    os.environ.setdefault("nnUNet_extTrainer", str(trainers_folder()))
    folder = model_folder(arguments)
    dataset_json = dataset_of(TrainedModel(folder, arguments.f[0], arguments.chk))
    quality = read_report(arguments.q) if arguments.q else None
    device = open_device(arguments.device)
    clip = what_to_clip(dataset_json)
    if clip is not None and not arguments.receiver_clips:
        raise UDAError(
            f"{folder}: scans are clipped before this model predicts them ({clip}), which nnU-Net alone does not do. "
            "With --receiver_clips the model is exported, and its card says what the receiver must do to every scan"
        )
    scans = scans_to_check(arguments, folder, dataset_json)
    with TemporaryDirectory() as name:
        work = Path(name)
        place = write_stock_model(folder, arguments.f, arguments.chk, work / "results")
        card_with = partial(model_card, folder, place, arguments.f, arguments.chk, quality=quality)
        card_with("not compared yet")  # what it reads, and may refuse, is read before the predictions
        lay_out(scans, work / "scans", clip)
        print(f"Predicting {len(scans)} scan(s) with the trained model, then as the receiver of the exported one")
        predict_here(folder, arguments.f, arguments.chk, work / "scans", work / "here", device)
        predict_as_a_receiver(work / "results", place, arguments.f, work / "scans", work / "there", device)
        plans = read_json(folder / "plans.json")
        if plans.get(COMPONENTS):
            postprocess_as_a_receiver(plans, dataset_json, work / "there", work / "postprocessed")
        there = work / ("postprocessed" if plans.get(COMPONENTS) else "there")
        number, voxels, differ = compare_segmentations(work / "here", there, dataset_json["file_ending"])
        if differ:
            raise UDAError(
                f"nnU-Net alone predicts {differ} of {voxels} voxels of {number} scan(s) otherwise than the trained "
                "model: nothing was exported"
            )
        check = f"predictions of {number} scan(s), {voxels} voxels, equal those of the trained model voxel for voxel"
        card = card_with(check)
        (place / CARD).write_text(card, "utf-8", "backslashreplace")
        arguments.o.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(arguments.o) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((work / "results").rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(work / "results"))
    beside = arguments.o.with_suffix(".md")
    with whole_file(beside) as temporary:
        temporary.write_text(card, "utf-8", "backslashreplace")
    print(f"{arguments.o}: {check}")
    print(f"Model card: {beside}, and in the zip file. Fill in its last lines (licence, patients, contact)")
    if plans.get(COMPONENTS):
        print("The receiver postprocesses predictions with nnUNetv2_apply_postprocessing: the card says how")
    if clip is not None:
        print(f"The receiver must clip every scan ({clip}): the card says how")


if __name__ == "__main__":
    main()
