"""A network adapted to a folder of scans: CAST's self-training, without a source beside it.

What holds the place of the source's labels is the start and what is known of anatomy: the teacher begins as the model,
and whole scans, labelled at the start, say which of its labels of patches are not to be believed: by the sizes of
structures that the model's validation knows, and by the pieces that they are in.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy import ndimage
from torch import Tensor, nn

from nnunet_uda.adaptation.model import Model, Weights
from nnunet_uda.adaptation.patches import Patches, Scan
from nnunet_uda.adaptation.scan import autocast
from nnunet_uda.data.components import keep_largest_components
from nnunet_uda.data.convention import read_json
from nnunet_uda.data.pseudo_labels import implausible_structures
from nnunet_uda.data.random_style import StyleAugmentationSettings, show_views, style_transforms
from nnunet_uda.errors import UDAError
from nnunet_uda.losses.prototypes import IGNORED
from nnunet_uda.losses.pseudo_label import pseudo_label_loss
from nnunet_uda.quality.asked import network_spacing
from nnunet_uda.settings import require
from nnunet_uda.training.checkpoint import seed_everything
from nnunet_uda.training.contrast_search import EVALUATIONS, PATCHES, ContrastSearch
from nnunet_uda.training.intensity_posterior import IntensityPosterior
from nnunet_uda.training.self_training import Average, SelfTraining, teachers_opinion, trusted_labels
from nnunet_uda.training.streams import without_stopwatch

KNOWS_STYLES = 0.65
"""Least Dice of a network's labels of patches and of the same in random styles, for these to be asked."""
ASKED = 16
"""Patches that say so."""
REVIEWS = 10
"""Times that contrasts are asked whether they are still needed."""
LABELLED_ALONG = 2
"""Contrasts along which whole scans are labelled, at most."""
HELD = 0.5
"""Share of the steps for which a network that does not know styles keeps its contrasts."""
MARGIN = 3
"""Voxels around a piece that is kept in which its structures may lie, too."""
MOMENTUM, WEIGHT_DECAY = 0.99, 3e-5
"""nnU-Net's."""
SIZE_FACTOR = 2.0
"""A structure's volume is plausible from the least known divided by this to the greatest times this."""


@dataclass(frozen=True)
class FolderSettings:
    """``steps`` of the student on ``patches`` patches, with nnU-Net's optimiser, whose rate falls from
    ``learning_rate`` to 0. The teacher's opinion is the mean over the patch as it is and ``teacher_views`` others: in
    contrasts of which the network is surer than of the patches as they are (``ContrastSearch``), and, where there are
    fewer and the network knows styles at all (``knows_styles``), in random styles. With ``intensity_labels`` it is
    corrected by the intensities of the folder and of the patch (``IntensityPosterior``). A pixel is learned where its
    confidence is over ``confidence`` times that of the class (``SelfTraining``). The student sees a share
    ``style_probability`` of its patches in a random style."""

    steps: int = 240
    learning_rate: float = 1e-3
    patches: int = 2
    confidence: float = 0.9
    intensity_labels: bool = True
    teacher_views: int = 3
    style_probability: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("patches", 1), ("teacher_views", 0)):
            require(getattr(self, name) >= least, name, f"at least {least}", getattr(self, name))
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


class WholeScans:
    """Scans as a network labels them whole, and what follows from that for patches of them.

    Args:
        known: of ``known_volumes``.
        size: of the patches that are drawn.

    Attributes (of the last ``label``):
        patches: draws them.
        left_out: for each scan the classes whose labels are not learned there (``distrusted``).
    """

    def __init__(
        self, model: Model, scans: Sequence[Scan], known: np.ndarray | None, size: Sequence[int], seed: int
    ) -> None:
        self.model, self.scans, self.known, self.size, self.seed = model, scans, known, size, seed
        self.spacings = [network_spacing(model.predictor, scan.properties) for scan in scans]
        self.pieces = sorted({value for group in model.single_components for value in group})

    def label(self, weights: Weights, contrasts: ContrastSearch) -> None:
        """Label the scans by the mean over them as they are and along ``contrasts``; draw patches around these labels.

        In the patches' masks is 1 what is far from the one piece that a structure is.
        """
        found = [self._labels(scan, weights, contrasts) for scan in self.scans]
        self.left_out = distrusted(found, self.spacings, self.known, len(self.model.structures))
        masks = [scan.mask if classes else off_limits(scan.mask, labels, self.pieces)
                 for scan, labels, classes in zip(self.scans, found, self.left_out, strict=True)]  # fmt: skip
        self.patches = Patches([scan.volume for scan in self.scans], masks, found, self.size, self.seed)
        self.seed += 1

    def say_what_is_left_out(self) -> None:
        for scan, classes in zip(self.scans, self.left_out, strict=True):
            if classes:
                names = ", ".join(self.model.structures[value - 1] for value in classes)
                print(f"{scan.case}: labels of {names} are not learned there: not the size of any labelled scan's")

    def _labels(self, scan: Scan, weights: Weights, contrasts: ContrastSearch) -> np.ndarray:
        model = self.model
        volume = torch.from_numpy(np.array(scan.volume)).to(model.predictor.device)
        views = [volume, *(view[0] for view in contrasts(volume[None])[:LABELLED_ALONG])]
        scores = sum(model.logits(view, [weights], mirror=False).softmax(0) for view in views)
        return keep_largest_components(scores, model.single_components).argmax(0).numpy().astype(np.int16)

    def believable(self, opinion: Tensor, masks: Tensor) -> Tensor:
        """``opinion`` ``(B, K, *patch)`` without structures where ``masks`` ``(B, *patch)`` of patches are 1."""
        far = (masks == 1)[:, None]
        index = torch.tensor(self.pieces, dtype=torch.long, device=opinion.device)
        moved = opinion.index_select(1, index) * far
        opinion = opinion.index_add(1, index, moved, alpha=-1)
        opinion[:, :1] += moved.sum(1, keepdim=True)
        return opinion


def off_limits(mask: np.ndarray, labels: np.ndarray, pieces: Sequence[int]) -> np.ndarray:
    """``mask`` ``(Z, Y, X)``, with 1 inside of it where none of ``pieces`` is near; unchanged where there are none."""
    kept = np.isin(labels, pieces)
    if not kept.any():
        return mask
    return np.where(mask < 0, mask, ~ndimage.binary_dilation(kept, iterations=MARGIN)).astype(mask.dtype)


def adapt_to_folder(
    model: Model,
    weights: Weights,
    scans: Sequence[Scan],
    known: np.ndarray | None,
    settings: FolderSettings,
    said: Callable[[int, float], None] = lambda step, loss: None,
) -> Weights:
    """The teacher's weights after all steps, from ``weights``.

    Args:
        known: of ``known_volumes``.
        said: called with the step and its loss.
    """
    seed_everything(settings.seed)
    device, channels = model.predictor.device, scans[0].volume.shape[0]
    transforms, size = moving_transforms(model, settings)
    teacher = copy.deepcopy(model.network).to(device).eval().requires_grad_(False)
    teacher.load_state_dict(weights)
    student = copy.deepcopy(teacher).requires_grad_(True)
    contrasts = ContrastSearch(settings.teacher_views, [True] * channels).to(device)  # 0: padded, or outside of a mask
    whole = WholeScans(model, scans, known, size, settings.seed)
    whole.label(weights, contrasts)

    def views(number: int) -> tuple[list[Tensor], Tensor, list[int]]:
        """The views of ``show_views``, ``(number, C, *patch)`` each, their masks and which scan each patch is of."""
        images, masks, of = zip(*whole.patches.draw(number), strict=True)
        moved = [transforms(image=image, segmentation=mask) for image, mask in zip(images, masks, strict=True)]
        seen, where = (torch.stack([each[key] for each in moved]).to(device) for key in ("image", "segmentation"))
        return list(seen.split(channels, dim=1)), where[:, 0], list(of)

    held, asked = 0, []
    if settings.teacher_views:
        if not knows_styles(teacher, [views(1)[0] for _ in range(ASKED)]):
            transforms, _ = moving_transforms(model, replace(settings, teacher_views=0))
            held = round(HELD * settings.steps)
        asked = [views(1)[0][0] for _ in range(PATCHES)]
        search_contrasts(contrasts, teacher, asked)
        if contrasts.number > 0:
            whole.label(weights, contrasts)
    whole.say_what_is_left_out()
    average = Average(max(0.9, 1 - 10 / settings.steps)).to(device)
    average.steps += 10_000  # the teacher begins as the model, not as noise: its start is not to be forgotten
    trust = SelfTraining(model.num_classes, settings.confidence).to(device)
    intensities = None
    if settings.intensity_labels:
        intensities = IntensityPosterior(model.num_classes, channels).to(device)
        intensities.set_range([scan.volume for scan in scans])
    optimizer = torch.optim.SGD(
        student.parameters(), settings.learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.steps) ** 0.9
        if contrasts.number > 0 and step >= held and step % max(1, settings.steps // REVIEWS) == 0:
            contrasts.review(teacher, asked)
        (plain, seen, *restyled), masks, of = views(min(settings.patches, model.batch_size))
        with autocast(device):
            found = contrasts(plain)
            opinion = teachers_opinion(teacher, plain, [*found, *restyled[len(found) :]], None)
        opinion = whole.believable(opinion, masks)
        if intensities is not None:
            opinion = intensities(opinion, plain)
        labels = trusted_labels(opinion, plain, trust, intensities)
        for index, scan in enumerate(of):
            for value in whole.left_out[scan]:
                labels[index][labels[index] == value] = IGNORED
        with autocast(device):
            logits = student(seen)
        loss = pseudo_label_loss(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 12)
        optimizer.step()
        average.update(teacher, student)
        said(step, loss.item())
    return {name: value.detach().cpu().clone() for name, value in teacher.state_dict().items()}


def search_contrasts(contrasts: ContrastSearch, network: nn.Module, patches: Sequence[Tensor]) -> None:
    """Find and tell the contrasts in which the network is surer of ``patches``, ``(1, C, *patch)`` each."""
    own, *better = contrasts.search(network, patches, EVALUATIONS[1])
    print(f"The network expects a Dice of {own:.3f} of the scans as they are; other contrasts that it is surer of: "
          f"{len(better)}" + (f", the best with {better[0]:.3f}" if better else ""))  # fmt: skip


@torch.no_grad()
def knows_styles(network: nn.Module, batches: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the network labels restyled patches much as it labels them plain.

    One that has never seen random styles does not: as teachers its labels of them are worse than of the plain patch.

    Args:
        batches: views of ``show_views``, ``(B, C, *patch)`` each: plain, the student's, restyled ones.
    """
    same = size = 0.0
    for plain, _, *restyled in batches:
        first = network(plain).argmax(1)
        for view in restyled:
            second = network(view).argmax(1)
            same += 2 * int(((first == second) & (first > 0)).sum())
            size += int((first > 0).sum() + (second > 0).sum())
    agreement = same / max(size, 1.0)
    print(f"Labels of patches and of the same in random styles agree by a Dice of {agreement:.2f}: the teacher sees "
          f"{'both' if agreement >= KNOWS_STYLES else 'no random styles'}")  # fmt: skip
    return agreement >= KNOWS_STYLES


def moving_transforms(model: Model, settings: FolderSettings) -> tuple[ComposeTransforms, tuple[int, ...]]:
    """nnU-Net's augmentation that makes self-training's views (``show_views``), and the size of the patches it takes.

    A patch is mirrored where the model is at prediction.
    """
    trainer: Any = SimpleNamespace(configuration_manager=model.predictor.configuration_manager, print_to_log_file=str)
    rotation, flat, size, _ = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(trainer)
    axes = model.predictor.allowed_mirroring_axes
    pipeline = nnUNetTrainer.get_training_transforms(
        model.patch_size, rotation, None, axes, flat, use_mask_for_norm=model.masked
    )
    show_views(
        without_stopwatch(pipeline),
        style_transforms(StyleAugmentationSettings()),
        settings.style_probability,
        settings.teacher_views,
    )
    return pipeline, tuple(int(length) for length in size)
