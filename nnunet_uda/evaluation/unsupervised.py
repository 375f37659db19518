"""Trained checkpoints on folders of unlabelled images: the criteria of ``criteria.py`` on whole volumes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tqdm import tqdm

from nnunet_uda.data.case import preprocess_case
from nnunet_uda.data.convention import check_dataset_json, check_results_folder, image_cases, read_json
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation.report import markdown_table
from nnunet_uda.foreign_plans import check_plans
from nnunet_uda.training.checkpoint import configuration_of, read_model
from nnunet_uda.training.criteria import HIGHER_IS_BETTER, TargetCriteria, look_twice

COLUMNS = {"pseudo_dice": True, **HIGHER_IS_BETTER}
NOTE = (
    "No label was read. ↑: higher is better, ↓: lower is better; bold: the best of a column. pseudo_dice is that of "
    "the checkpoint's last epoch in training, on source validation patches. All others are measured on these images, "
    "without test-time mirroring. agreement: Dice between the segmentations of an image and of the same image darkened "
    "and mirrored. entropy and snd also praise a network that finds nothing; foreground_entropy, mutual_information "
    "and agreement do not. Choose by agreement: it ranked checkpoints best where that could be tested. None of them is "
    "a Dice on the target: label a few scans before you trust a choice."
)


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
        folds = sorted(path.parent.name for path in model.folder.glob(f"fold_*/{model.checkpoint}"))
        there = f"There are {', '.join(beside)}" if beside else "There is no checkpoint in that folder"
        there += f", but in {', '.join(folds)}: choose with -f" if folds else ""
        raise UDAError(f"{model.path} does not exist. {there}")


def open_model(model: TrainedModel, device: torch.device) -> tuple[nnUNetPredictor, dict[str, Any]]:
    """A predictor without test-time mirroring (training measures the criteria without it, too), and the checkpoint.

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
    """The images as this model's networks read them: ``(C, Z, Y, X)`` arrays in temporary files."""
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
    check_results_folder(model.folder)
    return check_dataset_json(read_json(model.folder / "dataset.json"), model.folder / "dataset.json")


def compare_checkpoints(
    models: Sequence[TrainedModel], cases: dict[str, list[Path]], device: torch.device
) -> list[dict[str, Any]]:
    """The criteria of each checkpoint on the same images, a row each, which are preprocessed once for each plans.

    Args:
        models: those of one folder side by side.
        cases: ``unlabelled_images``'s.
    """
    rows = []
    for folder, group in groupby(models, key=lambda model: model.folder):
        same_plans = list(group)
        trainer, plans = names_of(folder)
        with preprocessed(same_plans[0], cases, device) as volumes:
            for model in same_plans:
                values, checkpoint = measure(model, volumes, device)
                rows.append({
                    "trainer": trainer, "plans": plans, "fold": model.fold, "checkpoint": model.checkpoint,
                    "epochs": checkpoint.get("current_epoch"), "pseudo_dice": pseudo_dice(checkpoint), **values,
                })  # fmt: skip
    return rows


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
