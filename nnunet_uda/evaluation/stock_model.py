"""A trained model as one of nnU-Net's own, for people who have neither this package nor its environment variables."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing_to_folder
from nnunetv2.postprocessing.remove_connected_components import (
    remove_all_but_largest_component_from_segmentation as keep_largest,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_uda.data.components import KEY as COMPONENTS
from nnunet_uda.data.convention import TARGET_FOLDER, environment_folder, read_json
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation.model_card import POSTPROCESSING, TRAINER, model_card
from nnunet_uda.evaluation.prediction import TrainedModel, predict_folder, require_checkpoint, unlabelled_images
from nnunet_uda.files import whole_file, write_json, write_text
from nnunet_uda.foreign_plans import check_plans
from nnunet_uda.images.intensities import Intensities, read_clipped
from nnunet_uda.images.listing import entries
from nnunet_uda.images.reading import write_image
from nnunet_uda.quality.cases import FILE as QUALITY
from nnunet_uda.training.checkpoint import FINAL, configuration_of, read_model, write_checkpoint

CARD = "MODEL_CARD.md"
CHECKED = 2
"""Scans that are predicted with both models, by default."""
KEPT_KEYS = (
    "network_weights",
    "init_args",
    "inference_allowed_mirroring_axes",
    "current_epoch",
    "_best_ema",
    "logging",
)


def stock_plans(plans: dict[str, Any]) -> dict[str, Any]:
    """Plans without the settings of this package."""
    return {key: value for key, value in plans.items() if key not in ("uda", "continue_training", COMPONENTS)}


def stock_dataset(dataset_json: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in dataset_json.items() if key != "uda"}


def check_plain(folder: Path, checkpoint: dict[str, Any], where: Path) -> None:
    """Check that nnU-Net's own network takes the weights.

    Raises:
        UDAError: if it does not; it says what a receiver of the model needs.
    """
    plans = PlansManager(stock_plans(read_json(folder / "plans.json")))
    dataset_json = read_json(folder / "dataset.json")
    configuration = plans.get_configuration(checkpoint["init_args"]["configuration"])
    channels = determine_num_input_channels(plans, configuration, dataset_json)
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    with torch.device("meta"), redirect_stdout(StringIO()):
        network = nnUNetTrainer.build_network_architecture(plans, configuration, channels, heads, False)
    expected = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in checkpoint["network_weights"].items()}
    if expected != found:
        trainer = checkpoint.get("trainer_name")
        raise UDAError(
            f"{where}: the network of {trainer} is not nnU-Net's plain one, so nnU-Net alone cannot predict with it. "
            "Hand over the model as it is (nnUNetv2_export_model_to_zip): the receiver needs nnunet_uda "
            '(pip install) and nnUNet_extTrainer="$(nnUNetUDA_trainers)"'
        )


def write_stock_model(folder: Path, folds: Sequence[str], checkpoint: str, results: Path) -> Path:
    """Write the model below ``results`` as nnU-Net's own trainer would have; returns its folder.

    Raises:
        UDAError: no such checkpoint, or a network that is not nnU-Net's.
    """
    plans = read_json(folder / "plans.json")
    check_plans(plans, folder / "plans.json")
    dataset_json = read_json(folder / "dataset.json")
    for fold in folds:
        require_checkpoint(model := TrainedModel(folder, fold, checkpoint))
        content = read_model(path := model.path)
        configuration = configuration_of(content, path, plans)
        check_plain(folder, content, path)
        place = results / plans["dataset_name"] / f"{TRAINER}__{plans['plans_name']}__{configuration}"
        kept = {key: content[key] for key in KEPT_KEYS if key in content}
        arguments = {**content["init_args"], "plans": stock_plans(plans), "dataset_json": stock_dataset(dataset_json)}
        kept |= {"trainer_name": TRAINER, "init_args": arguments, "optimizer_state": {}, "grad_scaler_state": None}
        (place / f"fold_{fold}").mkdir(parents=True)
        write_checkpoint(kept, place / f"fold_{fold}" / FINAL)
        if (quality := folder / f"fold_{fold}" / QUALITY).is_file():
            shutil.copyfile(quality, place / f"fold_{fold}" / QUALITY)
    write_json(stock_plans(plans), place / "plans.json")
    write_json(stock_dataset(dataset_json), place / "dataset.json")
    if plans.get(COMPONENTS):
        save_pickle(largest_components(plans), str(place / POSTPROCESSING))
    if (fingerprint := folder / "dataset_fingerprint.json").is_file():
        shutil.copyfile(fingerprint, place / fingerprint.name)
    return place


def largest_components(plans: dict[str, Any]) -> tuple[list[Callable], list[dict[str, Any]]]:
    """What this package's trainers do to predictions (``data.components``), as nnU-Net's postprocessing."""
    groups = plans.get(COMPONENTS, [])
    return [keep_largest] * len(groups), [{"labels_or_regions": group, "background_label": 0} for group in groups]


def export(
    folder: Path,
    folds: Sequence[str],
    checkpoint: str,
    scans: Sequence[Sequence[Path]],
    quality: dict[str, Any] | None,
    clip: Intensities | None,
    device: torch.device,
    archive: Path,
) -> tuple[str, Path]:
    """Write the model and its card into ``archive``, and the card beside it.

    Args:
        scans: files of each scan that both models predict.
        quality: content of a quality report, for the card.
        clip: what the receiver does to every scan.

    Returns:
        What was compared, in words, and the card's path.

    Raises:
        UDAError: no such checkpoint, a network that is not nnU-Net's, or predictions that differ.
    """
    with TemporaryDirectory() as name:
        work = Path(name)
        place = write_stock_model(folder, folds, checkpoint, work / "results")
        card_with = partial(model_card, folder, place, folds, checkpoint, quality=quality)
        card_with("not compared yet")  # what it reads, and may refuse, is read before the predictions
        lay_out(scans, work / "scans", clip)
        with redirect_stdout(StringIO()):
            predict_folder(folder, folds, work / "scans", work / "here", device, checkpoint)
        predict_as_a_receiver(work / "results", place, folds, work / "scans", work / "there", device)
        plans, dataset_json = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
        there = work / "there"
        if plans.get(COMPONENTS):
            there = work / "postprocessed"
            postprocess_as_a_receiver(plans, dataset_json, work / "there", there)
        number, voxels, differ = compare_segmentations(work / "here", there, dataset_json["file_ending"])
        if differ:
            raise UDAError(
                f"nnU-Net alone predicts {differ} of {voxels} voxels of {number} scan(s) otherwise than the trained "
                "model: nothing was exported"
            )
        check = f"predictions of {number} scan(s), {voxels} voxels, equal those of the trained model voxel for voxel"
        card = card_with(check)
        write_text(card, place / CARD)
        archive.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(archive) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as content:
            for path in sorted((work / "results").rglob("*")):
                if path.is_file():
                    content.write(path, path.relative_to(work / "results"))
    beside = archive.with_suffix(".md")
    write_text(card, beside)
    return check, beside


# -- the check ---------------------------------------------------------------------------------------------------------


def predict_as_a_receiver(results: Path, place: Path, folds: Sequence[str], scans: Path, output: Path,
                          device: Any) -> None:  # fmt: skip
    """Run ``nnUNetv2_predict`` in a process that knows nothing of this package.

    Raises:
        UDAError: with nnU-Net's last words, if it fails.
    """
    plans_name, configuration = place.name.split("__")[1:]
    environment = {key: value for key, value in os.environ.items() if key not in ("nnUNet_extTrainer",)
                   and not key.startswith("NNUNET_UDA")}  # fmt: skip
    environment |= {"nnUNet_results": str(results), "nnUNet_raw": str(results), "nnUNet_preprocessed": str(results)}
    words = [
        sys.executable, "-c", "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as go; go()",
        "-d", place.parent.name, "-tr", TRAINER, "-p", plans_name, "-c", configuration, "-f", *folds,
        "-i", str(scans), "-o", str(output), "-device", device.type, "-npp", "0", "-nps", "0",
        "--disable_progress_bar",
    ]  # fmt: skip
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise UDAError(f"nnUNetv2_predict alone fails with the exported model: {last[0]}. Nothing was exported")


def postprocess_as_a_receiver(plans: dict[str, Any], dataset_json: dict[str, Any], raw: Path, output: Path) -> None:
    """Run ``nnUNetv2_apply_postprocessing`` with what was exported beside the model."""
    with redirect_stdout(StringIO()):
        apply_postprocessing_to_folder(
            str(raw), str(output), *largest_components(plans), stock_plans(plans), stock_dataset(dataset_json), 1
        )


def compare_segmentations(first: Path, second: Path, ending: str) -> tuple[int, int, int]:
    """Compare two folders of predictions of the same scans: numbers of scans, of voxels, and of voxels that differ."""
    files = sorted(path.name for path in first.iterdir() if path.name.endswith(ending))
    voxels = differ = 0
    for name in files:
        one, two = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name))) for folder in (first, second))
        if one.shape != two.shape:
            raise UDAError(f"{name} has another shape when nnU-Net predicts it alone: {two.shape}, not {one.shape}")
        voxels += one.size
        differ += int(np.count_nonzero(one != two))
    return len(files), voxels, differ


def scans_to_check(given: Path | None, folder: Path, dataset_json: dict[str, Any]) -> list[list[Path]]:
    """Files of the scans that are predicted twice: those in ``given``, else some of the dataset's.

    Raises:
        UDAError: if there is none.
    """
    if given is not None:
        return list(unlabelled_images(given, dataset_json).values())
    raw = environment_folder("nnUNet_raw") / folder.parent.name
    for name in ("imagesTs", TARGET_FOLDER, "imagesTr"):
        if (raw / name).is_dir() and entries(raw / name):
            return list(unlabelled_images(raw / name, dataset_json).values())[:CHECKED]
    raise UDAError(f"{raw} holds no scan to compare the predictions on: give some with -i FOLDER")


def lay_out(scans: Sequence[Sequence[Path]], folder: Path, clip: Intensities | None) -> None:
    """Copy the scans into ``folder``, clipped if the receiver has to clip them."""
    folder.mkdir()
    for files in scans:
        for file in files:
            if clip is None:
                shutil.copyfile(file, folder / file.name)
            else:
                write_image(read_clipped(file, clip), folder / file.name)
