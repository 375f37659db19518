"""What to expect of a trained model's segmentations, case by case: from its folder and scans, without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_uda.data.case import preprocess_case
from nnunet_uda.data.convention import check_splits, environment_folder, read_json
from nnunet_uda.data.target import TargetDataset, target_folder
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation.prediction import dataset_of, open_model
from nnunet_uda.files import write_json
from nnunet_uda.quality.asked import Asked, as_label
from nnunet_uda.quality.calibration import Calibration
from nnunet_uda.quality.cases import (
    FILE,
    CaseQuality,
    make_calibration,
    quality_of_volume,
    read_calibration,
    structure_names,
    uncalibrated,
)
from nnunet_uda.training.checkpoint import read_checkpoint

KEPT_CHECKPOINTS = 2
"""Of the setting keep_every, the last ones but the one that predicts, that are asked beside it."""


@dataclass(frozen=True)
class Looked:
    """A case on the network's grid: the image ``(C, Z, Y, X)``, the segmentation ``(Z, Y, X)``, mm of each axis."""

    volume: Tensor
    label: np.ndarray
    spacing: list[float]


def open_asked(folder: Path, folds: Sequence[str], checkpoint: str, device: torch.device) -> Asked:
    """The networks of ``TRAINER__PLANS__CONFIGURATION``'s folds, and kept checkpoints of a single fold.

    Raises:
        UDAError: as ``open_model``.
    """
    predictor = open_model(folder, folds, checkpoint, device)
    own = {f"fold_{fold}": weights for fold, weights in zip(folds, predictor.list_of_parameters, strict=True)}
    others = {}
    if len(folds) == 1 and predictor.allowed_mirroring_axes:  # else it would take over three times a prediction's time
        kept = sorted((folder / f"fold_{folds[0]}").glob("checkpoint_epoch_*.pth"))
        done = read_checkpoint(folder / f"fold_{folds[0]}" / checkpoint).get("current_epoch")
        earlier = [path for path in kept if int(path.stem.rpartition("_")[2]) != done]
        others = {path.stem: read_checkpoint(path)["network_weights"] for path in earlier[-KEPT_CHECKPOINTS:]}
    return Asked(predictor, own, others)


def find_calibration(folder: Path, fold: str, asked: Asked, log: Callable[[str], None] = print) -> Calibration:
    """The calibration beside a fold's checkpoints.

    Without one, it is made from the source's preprocessed cases and written there. Without these, it knows no source
    and holds what many other models have in common.
    """
    predictor = asked.predictor
    path, structures = folder / f"fold_{fold}" / FILE, structure_names(predictor.dataset_json)
    if path.exists():
        return read_calibration(path, structures)
    try:
        labelled, held_out, targets, words = preprocessed_source(
            predictor.plans_manager, predictor.configuration_manager, fold
        )
    except UDAError as error:
        log(
            f"WARNING: {path} does not exist (a training of before, or with quality_volumes=0), and it cannot be made: "
            f"{error}. The estimate goes on without the source's shapes, and its ranges are from 0 to 1"
        )
        return uncalibrated(structures)
    log(f"{path} does not exist: calibrating on {words}")
    found = make_calibration(asked, structures, labelled, [held_out], targets, log=log)
    found.about["calibrated_on"] = words
    try:
        write_json(found.to_json(), path)
    except OSError as error:
        log(f"WARNING: {path} cannot be written ({error.strerror}): it is made again the next time")
    return found


def preprocessed_source(plans: PlansManager, configuration: Any, fold: str) -> tuple[Any, Any, Any | None, str]:
    """Labelled cases, those held out in the fold (all, in the fold ``all``), target cases, and words for the second.

    Raises:
        UDAError: if they are not there.
    """
    base = environment_folder("nnUNet_preprocessed") / plans.dataset_name
    folder = base / configuration.data_identifier
    if not folder.is_dir():
        raise UDAError(f"{folder}, the source's preprocessed cases, does not exist")
    dataset_class = infer_dataset_class(str(folder))
    labelled = dataset_class(str(folder))
    if not labelled.identifiers:
        raise UDAError(f"{folder} holds no preprocessed case")
    held_out, words = labelled, f"{len(labelled.identifiers)} labelled cases that it has trained on"
    splits = base / "splits_final.json"
    if fold != "all" and splits.exists() and int(fold) < len(content := check_splits(read_json(splits), None, splits)):
        cases = [case for case in content[int(fold)]["val"] if case in set(labelled.identifiers)]
        if cases:
            held_out = dataset_class(str(folder), cases)
            words = f"{len(cases)} labelled cases that it has not trained on"
    of_target = target_folder(base, configuration)
    targets = None
    if of_target.is_dir() and any(of_target.glob("*.pkl")):
        targets = TargetDataset(str(of_target))
    return labelled, held_out, targets, words


class Judge:
    """A trained model that estimates how good its segmentations are.

    Args:
        folder: nnU-Net's results folder ``TRAINER__PLANS__CONFIGURATION``.
        folds: that predict together, as in ``nnUNetv2_predict -f``.
        checkpoint: file name.

    Raises:
        UDAError: no such model.
    """

    def __init__(
        self,
        folder: Path,
        folds: Sequence[str] = ("0",),
        checkpoint: str = "checkpoint_final.pth",
        device: torch.device | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        dataset_of(folder)
        self.asked = open_asked(folder, folds, checkpoint, device or torch.device("cpu"))
        self.calibration = find_calibration(folder, folds[0], self.asked, log)

    @property
    def structures(self) -> dict[str, int]:
        """Values of the structures by name."""
        return {name: value for value, name in enumerate(self.calibration.structures, 1)}

    def judge(self, case: str, files: Sequence[Path], prediction: Path | None = None) -> tuple[CaseQuality, Looked]:
        """Judge a scan (one file per channel) and its segmentation: the given file, or else the networks' own.

        Raises:
            UDAError: as ``preprocess_case``.
        """
        predictor = self.asked.predictor
        data, seg, properties = preprocess_case(
            files, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json, prediction
        )
        volume, spacing = torch.from_numpy(np.asarray(data, dtype=np.float32)), self.asked.spacing(properties)
        label = None
        if prediction is not None:
            known = set(range(-1, self.asked.num_structures + 1))
            if strange := sorted({int(value) for value in np.unique(seg)} - known):
                raise UDAError(
                    f"{prediction} holds the label {strange[0]}, expected 0 to {self.asked.num_structures} "
                    f"({', '.join(self.calibration.structures)}): it is no prediction of this model's dataset"
                )
            label = as_label(seg, self.asked.num_structures)
        quality, label = quality_of_volume(case, self.asked, self.calibration, volume, spacing, label)
        return quality, Looked(volume, label, spacing)


def estimate_quality(
    folder: Path,
    images: dict[str, list[Path]],
    predictions: dict[str, Path] | None = None,
    *,
    folds: Sequence[str] = ("0",),
    checkpoint: str = "checkpoint_final.pth",
    device: torch.device | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, CaseQuality]:
    """Estimate the quality of every case, by its id; no label of these cases is read.

    Args:
        folder: nnU-Net's results folder ``TRAINER__PLANS__CONFIGURATION``.
        images: files of each case, one a channel, as ``unlabelled_images`` returns them.
        predictions: the segmentation files that are judged; without one, or without that of a case, it is what the
            networks themselves find (without nnU-Net's full test-time mirroring).
        folds: as in ``nnUNetv2_predict -f``.
        checkpoint: file name of the checkpoints.
        device: the CPU by default.

    Raises:
        UDAError: no such model, or a scan that cannot be read or has other channels.

    ::

        cases = unlabelled_images(Path("scans"), dataset_of(folder))
        for case, quality in estimate_quality(folder, cases).items():
            print(case, quality.overall.dice, quality.overall.verdict, quality.reasons)
    """
    judge, judged = Judge(folder, folds, checkpoint, device, log=log), predictions or {}
    return {case: judge.judge(case, files, judged.get(case))[0] for case, files in images.items()}
