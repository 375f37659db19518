"""Trained checkpoints on folders of unlabelled images: the criteria of ``criteria.py`` on whole volumes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nnunet_uda.data.case import preprocess_case
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation.prediction import TrainedModel, open_model
from nnunet_uda.evaluation.report import markdown_table, number
from nnunet_uda.training.checkpoint import read_model
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


def measure(model: TrainedModel, volumes: Sequence[Path], device: torch.device) -> tuple[dict[str, float], dict]:
    """Measure the criteria of a checkpoint on ``preprocessed`` volumes; return them and the checkpoint."""
    predictor = open_model(model.folder, [model.fold], model.checkpoint, device)
    slices = len(predictor.configuration_manager.patch_size) == 2
    axes = [axis + slices for axis in predictor.allowed_mirroring_axes or ()]
    gathered = TargetCriteria(predictor.label_manager.num_segmentation_heads)

    def predict(images: torch.Tensor) -> torch.Tensor:
        return predictor.predict_sliding_window_return_logits(images[0])[None].float()

    for path in volumes:
        gathered.add(*look_twice(predict, torch.from_numpy(np.load(path))[None], axes))
    return gathered.values(), read_model(model.path)


@contextmanager
def preprocessed(model: TrainedModel, cases: dict[str, list[Path]], device: torch.device) -> Iterator[list[Path]]:
    """Preprocess images for this model; yield temporary ``.npy`` files of ``(C, Z, Y, X)`` arrays.

    Raises:
        UDAError: as ``open_model``, and for region-based labels.
    """
    predictor = open_model(model.folder, [model.fold], model.checkpoint, device)
    if predictor.label_manager.has_regions:
        raise UDAError(f"{model.folder}: the criteria need plain labels, this model was trained on regions")
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    with TemporaryDirectory() as name:
        volumes = []
        for case, paths in tqdm(cases.items(), desc="preprocessing", unit="case"):
            data, _, _ = preprocess_case(paths, plans, configuration, predictor.dataset_json)
            volumes.append(Path(name, f"{case}.npy"))
            np.save(volumes[-1], data.astype(np.float32, copy=False))
        yield volumes


def pseudo_dice(checkpoint: dict[str, Any]) -> float:
    """Dice on source validation patches in the checkpoint's last epoch, from the training log; NaN without one."""
    values = checkpoint.get("logging", {}).get("mean_fg_dice", [])
    return float(values[-1]) if values else float("nan")


def compare_checkpoints(
    models: Sequence[TrainedModel], cases: dict[str, list[Path]], device: torch.device
) -> list[dict[str, Any]]:
    """Measure each checkpoint on the same images, one row each; images are preprocessed once for each plans.

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
    """A Markdown table with the best value of each criterion in bold, unless all values look the same."""
    header = ["trainer", "plans", "fold", "checkpoint", "epochs"]
    header += [f"{name} {'↑' if higher else '↓'}" for name, higher in COLUMNS.items()]
    lines = [[str(row[key]) for key in header[:5]] for row in rows]
    for name, higher in COLUMNS.items():
        values = [row[name] for row in rows]
        texts = [number(value, ".4f") for value in values]
        best = (max if higher else min)((v for v in values if not math.isnan(v)), default=math.nan)
        differ = len(set(texts)) > 1
        for line, text in zip(lines, texts, strict=True):
            line.append(f"**{text}**" if differ and text == f"{best:.4f}" else text)
    return markdown_table({"caption": f"{len(rows)} checkpoint(s)", "header": header, "rows": lines})
