"""A network adapted to a folder of scans: an averaged teacher labels them, the student learns that on moved patches.

As CAST does it beside its source, here without one: the teacher's opinion is corrected by intensities.
What holds the place of the source's labels is the start: the teacher begins as the model, and the sizes of structures
that the model's validation knows say which of its labels are not to be believed.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nnunet_uda.adaptation.model import Model, Weights
from nnunet_uda.adaptation.patches import Patches
from nnunet_uda.adaptation.scan import autocast
from nnunet_uda.adaptation.views import random_affine, restyled, warp
from nnunet_uda.data.convention import read_json
from nnunet_uda.data.pseudo_labels import implausible_structures
from nnunet_uda.data.random_style import StyleAugmentationSettings, style_transforms
from nnunet_uda.errors import UDAError
from nnunet_uda.losses.prototypes import IGNORED
from nnunet_uda.losses.pseudo_label import pseudo_label_loss
from nnunet_uda.settings import require
from nnunet_uda.training.checkpoint import seed_everything
from nnunet_uda.training.intensity_posterior import IntensityPosterior
from nnunet_uda.training.self_training import Average, SelfTraining

SIZE_FACTOR = 2.0
"""A structure's volume is plausible from the least known divided by this to the greatest times this."""


@dataclass(frozen=True)
class FolderSettings:
    """``steps`` of the student with Adam, whose rate falls from ``learning_rate`` to 0; the teacher's label of a pixel
    is learned where its confidence is over ``confidence`` times that of the class (``SelfTraining``). With
    ``intensity_labels`` its opinion is corrected by the intensities of the folder and of the patch before
    (``IntensityPosterior``). The student sees a share ``style_probability`` of its patches in a random style; the
    others as they are, but moved."""

    steps: int = 400
    learning_rate: float = 3e-4
    confidence: float = 0.9
    intensity_labels: bool = True
    style_probability: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "at least 1", self.steps)
        require(0 < self.learning_rate < 1, "learning_rate", "over 0 and under 1", self.learning_rate)
        for name in ("confidence", "style_probability"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))
        require(0 <= self.seed < 2**32, "seed", f"from 0 to {2**32 - 1}", self.seed)


def known_volumes(model: Model) -> np.ndarray | None:
    """``(N, S)`` volumes in cubic mm of the structures in N scans that the model was validated on, by their labels.

    They stand in nnU-Net's own ``validation/summary.json`` as numbers of voxels; how large a voxel is, is the median of
    ``dataset_fingerprint.json``. None where there is no such file.
    """
    counts: list[list[float]] = []
    for fold in model.folds:
        path = model.folder / f"fold_{fold}" / "validation" / "summary.json"
        if path.is_file():
            counts += _reference_counts(read_json(path), path, len(model.structures))
    fingerprint = model.folder / "dataset_fingerprint.json"
    if not counts or not fingerprint.is_file():
        return None
    try:
        voxels = [math.prod(float(step) for step in spacing) for spacing in read_json(fingerprint)["spacings"]]
        return np.array(counts) * float(np.median(voxels)) if voxels else None
    except (KeyError, TypeError, ValueError) as error:
        raise UDAError(
            f"{fingerprint}: 'spacings' must be those of the training's scans ({type(error).__name__}: {error}). "
            "Copy it again from nnUNet_preprocessed, or remove it: sizes are not looked at then"
        ) from error


def _reference_counts(content: Any, where: object, number: int) -> list[list[float]]:
    try:
        counts = []
        for case in content["metric_per_case"]:
            of_label = {int(re.sub(r"\D", "", str(key))): value["n_ref"] for key, value in case["metrics"].items()}
            counts.append([float(of_label[index]) for index in range(1, number + 1)])
        return counts
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UDAError(
            f"{where} is no summary of an nnU-Net validation of these {number} structures ({type(error).__name__}: "
            f"{error}). Validate again (nnUNetv2_train --val), or remove it: sizes are not looked at then"
        ) from error


def distrusted(
    segmentations: Sequence[np.ndarray], spacings: Sequence[Sequence[float]], known: np.ndarray | None, number: int
) -> list[list[int]]:
    """For each scan the classes whose volume no labelled scan makes plausible; none where no volume is known.

    Args:
        segmentations: ``(Z, Y, X)`` on the network's grid.
        spacings: mm of that grid, for each scan.
    """
    if known is None:
        return [[] for _ in segmentations]
    found = []
    for segmentation, spacing in zip(segmentations, spacings, strict=True):
        counts = np.bincount(segmentation.ravel().astype(np.int64), minlength=number + 1)[1 : number + 1]
        found.append(implausible_structures(counts * float(np.prod(spacing)), known, SIZE_FACTOR))
    return found


def adapt_to_folder(
    model: Model,
    weights: Weights,
    volumes: Sequence[np.ndarray],
    segmentations: Sequence[np.ndarray],
    left_out: Sequence[Sequence[int]],
    settings: FolderSettings,
    said: Callable[[int, float], None] = lambda step, loss: None,
) -> Weights:
    """The teacher's weights after all steps, from ``weights``.

    Args:
        volumes: ``(C, Z, Y, X)`` preprocessed scans.
        segmentations: ``(Z, Y, X)``, the model's own.
        left_out: for each scan the classes whose labels are not learned there (``distrusted``).
        said: called with the step and its loss.
    """
    seed_everything(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    device, styles = model.predictor.device, style_transforms(StyleAugmentationSettings())
    patches = Patches(volumes, segmentations, model.patch_size, settings.seed)
    teacher = copy.deepcopy(model.network).to(device).eval().requires_grad_(False)
    teacher.load_state_dict(weights)
    student = copy.deepcopy(teacher).requires_grad_(True)
    average = Average(max(0.9, 1 - 10 / settings.steps)).to(device)
    average.steps += 10_000  # the teacher begins as the model, not as noise: its start is not to be forgotten
    trust = SelfTraining(model.num_classes, settings.confidence).to(device)
    intensities = IntensityPosterior(model.num_classes, volumes[0].shape[0]).to(device)
    if settings.intensity_labels:
        intensities.set_range(volumes)
    optimizer = torch.optim.Adam(student.parameters(), settings.learning_rate)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.steps) ** 0.9
        images, scans = patches.draw(model.batch_size)
        images = images.to(device)
        with torch.no_grad(), autocast(device):
            probabilities = teacher(images).float().softmax(1)
        if settings.intensity_labels:
            probabilities = intensities(probabilities, images)
        trust.observe(probabilities)
        labels = trust.label(probabilities)
        if settings.intensity_labels:
            intensities.observe(labels, images)
        for index, scan in enumerate(scans):
            for value in left_out[scan]:
                labels[index][labels[index] == value] = IGNORED
        maps = random_affine(len(images), model.patch_size, generator)
        moved = (labels - IGNORED).float()[:, None]  # 0 is what comes in from outside: ignored
        moved = warp(moved, maps, "nearest")[:, 0].round().long() + IGNORED
        view = warp(images, maps)
        chosen = (torch.rand(len(view), generator=generator) < settings.style_probability).to(device)
        if chosen.any():
            view[chosen] = restyled(view[chosen], styles, model.masked)
        with autocast(device):
            logits = student(view)
        loss = pseudo_label_loss(logits, moved)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 12)
        optimizer.step()
        average.update(teacher, student)
        said(step, loss.item())
    return {name: value.detach().cpu().clone() for name, value in teacher.state_dict().items()}
