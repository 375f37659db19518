"""Trained models as nnU-Net leaves them: found, opened, and asked to segment a folder of scans."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_uda.data.convention import check_dataset_json, check_results_folder, image_cases, read_json
from nnunet_uda.errors import UDAError
from nnunet_uda.foreign_plans import check_plans
from nnunet_uda.methods import let_find
from nnunet_uda.training.checkpoint import FINAL, configuration_of, read_model


@dataclass(frozen=True)
class TrainedModel:
    """One checkpoint of nnU-Net's results: ``folder`` is ``TRAINER__PLANS__CONFIGURATION``, ``fold`` as in ``-f``."""

    folder: Path
    fold: str
    checkpoint: str

    @property
    def path(self) -> Path:
        return self.folder / f"fold_{self.fold}" / self.checkpoint


def require_checkpoint(model: TrainedModel) -> None:
    """Raise ``UDAError`` where the file does not exist; the message lists those that do."""
    if not model.path.is_file():
        beside = sorted(path.name for path in model.path.parent.glob("*.pth"))
        folds = sorted(path.parent.name for path in model.folder.glob(f"fold_*/{model.checkpoint}"))
        there = f"There are {', '.join(beside)}" if beside else "There is no checkpoint in that folder"
        there += f", but in {', '.join(folds)}: choose with -f" if folds else ""
        raise UDAError(f"{model.path} does not exist. {there}")


def dataset_of(folder: Path) -> dict[str, Any]:
    """The ``dataset.json`` that lies with a model.

    Raises:
        UDAError: if there is no such model, or the file is none.
    """
    check_results_folder(folder)
    return check_dataset_json(read_json(folder / "dataset.json"), folder / "dataset.json")


def unlabelled_images(folder: Path, dataset_json: dict[str, Any]) -> dict[str, list[Path]]:
    """Image files by case, channels in order.

    Raises:
        UDAError: as ``image_cases``, and for another number of channels than the dataset has.
    """
    ending, channels = dataset_json["file_ending"], len(dataset_json["channel_names"])
    cases = image_cases(folder, ending)
    for case, paths in cases.items():
        if [path.name for path in paths] != [f"{case}_{channel:04d}{ending}" for channel in range(channels)]:
            found = ", ".join(path.name for path in paths)
            raise UDAError(
                f"{folder}: case {case} has the file(s) {found}, but the network reads {channels} channel(s)"
            )
    return cases


def open_model(
    folder: Path, folds: Sequence[int | str], checkpoint: str, device: torch.device, *, mirroring: bool = False
) -> nnUNetPredictor:
    """Open a predictor with the weights of all ``folds``; its network holds the first fold's.

    Args:
        folder: nnU-Net's folder of a trainer, plans and configuration.
        mirroring: test-time mirroring, as ``nnUNetv2_predict`` has it.

    Raises:
        UDAError: no or no whole checkpoint, a trainer that is not to be found.
    """
    plans = check_plans(read_json(folder / "plans.json"), folder / "plans.json")
    for model in (TrainedModel(folder, str(fold), checkpoint) for fold in folds):
        require_checkpoint(model)
        content = read_model(model.path)
        configuration_of(content, model.path, plans)
    try:
        with redirect_stdout(StringIO()):
            on_device = device.type == "cuda"
            predictor = nnUNetPredictor(
                use_mirroring=mirroring, device=device, perform_everything_on_device=on_device, allow_tqdm=False
            )
            predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), checkpoint)
    except (RuntimeError, KeyError, FileNotFoundError) as error:
        raise UDAError(
            f"{model.path}: nnU-Net cannot open this model ({error}). Was it trained by "
            f"{content.get('trainer_name')}, and is nnUNet_extTrainer set to the folders of all trainers?"
        ) from error
    return predictor


def predict_folder(
    trained: Path, folds: Sequence[int | str], images: Path, output: Path, device: torch.device, checkpoint: str = FINAL
) -> None:
    """Segment every case of a folder as ``nnUNetv2_predict`` does, one after the other in this process.

    Args:
        trained: nnU-Net's folder of a trainer, plans and configuration.
        output: gets ``CASE.nii.gz``.

    Raises:
        UDAError: as ``open_model``, or no folder of images.
    """
    let_find()
    predictor = open_model(trained, folds, checkpoint, device, mirroring=True)
    if not images.is_dir():
        raise UDAError(f"{images} is no folder of images (CASE_0000.nii.gz)")
    output.mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files_sequential(str(images), str(output))
