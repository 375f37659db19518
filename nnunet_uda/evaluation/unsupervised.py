"""Trained checkpoints on folders of unlabelled images: the criteria of ``criteria.py`` on whole volumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tqdm import tqdm

from nnunet_uda.data.case import preprocess_case
from nnunet_uda.data.convention import check_dataset_json, image_cases, read_json
from nnunet_uda.errors import UDAError
from nnunet_uda.foreign_plans import check_plans
from nnunet_uda.training.checkpoint import configuration_of, read_model
from nnunet_uda.training.criteria import TargetCriteria, look_twice


@dataclass(frozen=True)
class TrainedModel:
    """One checkpoint of nnU-Net's results: ``folder`` is ``TRAINER__PLANS__CONFIGURATION``, ``fold`` as in ``-f``."""

    folder: Path
    fold: str
    checkpoint: str

    @property
    def path(self) -> Path:
        return self.folder / f"fold_{self.fold}" / self.checkpoint


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


def require_checkpoint(model: TrainedModel) -> None:
    """Raise ``UDAError`` where the file does not exist; the message lists those that do."""
    if not model.path.is_file():
        beside = sorted(path.name for path in model.path.parent.glob("*.pth"))
        there = f"There are {', '.join(beside)}" if beside else "There is no checkpoint in that folder"
        raise UDAError(f"{model.path} does not exist. {there}")


def open_model(model: TrainedModel, device: torch.device) -> tuple[nnUNetPredictor, dict[str, Any]]:
    """A predictor without test-time mirroring, as the criteria are measured in training too, and the checkpoint.

    Raises:
        UDAError: no or no whole checkpoint, a trainer that is not to be found, region-based labels.
    """
    require_checkpoint(model)
    plans = check_plans(read_json(model.folder / "plans.json"), model.folder / "plans.json")
    checkpoint = read_model(model.path)
    configuration_of(checkpoint, model.path, plans)
    on_device = device.type == "cuda"
    predictor = nnUNetPredictor(
        use_mirroring=False, device=device, perform_everything_on_device=on_device, allow_tqdm=False
    )
    try:
        with redirect_stdout(StringIO()):
            predictor.initialize_from_trained_model_folder(str(model.folder), (model.fold,), model.checkpoint)
    except (RuntimeError, KeyError, FileNotFoundError) as error:
        raise UDAError(
            f"{model.path}: nnU-Net cannot open this model ({error}). Was it trained by "
            f"{checkpoint.get('trainer_name')}, and is nnUNet_extTrainer set to the folders of all trainers?"
        ) from error
    if predictor.label_manager.has_regions:
        raise UDAError(f"{model.folder}: the criteria need plain labels, this model was trained on regions")
    return predictor, checkpoint


def measure(model: TrainedModel, volumes: Sequence[Path], device: torch.device) -> tuple[dict[str, float], dict]:
    """The criteria of a checkpoint over preprocessed volumes (``preprocessed``), and the checkpoint."""
    predictor, checkpoint = open_model(model, device)
    slices = len(predictor.configuration_manager.patch_size) == 2
    axes = [axis + slices for axis in predictor.allowed_mirroring_axes or ()]
    gathered = TargetCriteria(predictor.label_manager.num_segmentation_heads)

    def predict(images: torch.Tensor) -> torch.Tensor:
        return predictor.predict_sliding_window_return_logits(images[0])[None].float()

    for path in volumes:
        gathered.add(*look_twice(predict, torch.from_numpy(np.load(path))[None], axes))
    return gathered.values(), checkpoint


@contextmanager
def preprocessed(model: TrainedModel, cases: dict[str, list[Path]], device: torch.device) -> Iterator[list[Path]]:
    """The images as the networks of ``model``'s folder read them, ``(C, Z, Y, X)`` arrays in files of a while."""
    predictor, _ = open_model(model, device)
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    with TemporaryDirectory() as name:
        volumes = []
        for case, paths in tqdm(cases.items(), desc="preprocessing", unit="case"):
            data, _, _ = preprocess_case(paths, plans, configuration, predictor.dataset_json)
            volumes.append(Path(name, f"{case}.npy"))
            np.save(volumes[-1], data.astype(np.float32, copy=False))
        yield volumes


def pseudo_dice(checkpoint: dict[str, Any]) -> float:
    """What the training log says of the checkpoint's last epoch: Dice on source validation patches, or NaN."""
    values = checkpoint.get("logging", {}).get("mean_fg_dice", [])
    return float(values[-1]) if values else float("nan")


def dataset_of(model: TrainedModel) -> dict[str, Any]:
    """The ``dataset.json`` that lies with the model.

    Raises:
        UDAError: if there is no such model, or the file is none.
    """
    if not model.folder.is_dir():
        raise UDAError(f"{model.folder} does not exist: no such model has been trained (see -d, -tr, -p and -c)")
    return check_dataset_json(read_json(model.folder / "dataset.json"), model.folder / "dataset.json")
