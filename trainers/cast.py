"""CAST: contrast augmentation and self-training, in one plain nnU-Net network.

The student learns labelled source images in random contrasts and styles (``RandomStyleTrainer``'s). The teacher is the
student's exponential average (Tarvainen and Valpola 2017) and what predicts: ``network``. From a part of the schedule
on it labels unlabelled target images, seen as they are and in other contrasts, which are searched for
(``ContrastSearch``), and corrected by the intensities that the classes have in the domain and the image
(``IntensityPosterior``). The student learns these labels, where they are sure, on the same images, some restyled. A
step then takes half a batch of each domain, so that it costs little more than before. No generator, no discriminator:
on real scans translation did not earn its time (docs/results.md).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from torch import Tensor, nn

from nnunet_uda.data.random_style import (
    StyleAugmentationSettings,
    insert_after_spatial,
    show_views,
    style_transforms,
)
from nnunet_uda.losses.pseudo_label import pseudo_label_loss
from nnunet_uda.settings import require
from nnunet_uda.training.contrast_search import PATCHES, ContrastSearch, number_of_evaluations
from nnunet_uda.training.intensity_posterior import IntensityPosterior
from nnunet_uda.training.preview import middle_slice, whole_patch, write_trainers_panels
from nnunet_uda.training.self_training import Average, SelfTraining, teachers_opinion, trusted_labels
from nnunet_uda.training.streams import next_target
from nnunet_uda.training.uda_trainer import UDATrainer

RANGE_OF = 16
"""Target cases that say which intensities there are."""
RAMP_SHARE = 0.1
"""Of the schedule: over so many epochs the weight of pseudo labels rises to its value."""


@dataclass(frozen=True)
class CASTSettings(StyleAugmentationSettings):
    """Settings under ``uda.cast``; those of random styles are RandomStyleTrainer's.

    Self-training begins after ``start_share`` of the epochs: late, because a teacher that has not learned enough
    teaches its errors. Its loss has the weight ``self_training_weight``. The teacher's opinion of an image is the mean
    over the image as it is, ``teacher_views`` of it in random styles, and at most as many in contrasts of which it is
    surer (``ContrastSearch``, when self-training begins) until it needs them no more: a structure that is found in one
    contrast alone is not sure.
    With ``intensity_labels`` it is then corrected by the image's intensities. A pixel is learned where the confidence
    is over ``confidence`` times how sure it is of that class, relative to the surest class
    (``losses.pseudo_label.class_thresholds``). ``target_style_probability`` is the share of target images that the
    student sees in a random style; it must see most as they are, or it never learns the target's own contrast.
    ``teacher_horizon`` is the share of the schedule's steps over which the teacher averages the student, so that short
    and long schedules behave alike.
    """

    self_training: bool = True
    """false: random styles alone."""
    start_share: float = 0.7
    """0 to 1: share of the schedule before self-training. 0 from pretrained weights."""
    self_training_weight: float = 1.0
    """At least 0. Less where structures vanish on the target once self-training has begun."""
    teacher_views: int = 2
    """At least 0: random styles that the teacher sees, and searched contrasts at most. Each is a pass more."""
    intensity_labels: bool = True
    """Correct the teacher by the target's intensities. false where structures share an intensity."""
    confidence: float = 0.9
    """0 to 1: how sure the teacher has to be. Lower where few pixels are learned."""
    target_style_probability: float = 0.25
    """0 to 1: share of target images in a random style."""
    teacher_horizon: float = 0.02
    """Over 0, at most 1: share of the steps that the teacher averages. More for a steadier teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start_share", "confidence", "target_style_probability"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))
        require(0 < self.teacher_horizon <= 1, "teacher_horizon", "over 0 and at most 1", self.teacher_horizon)
        require(self.teacher_views >= 0, "teacher_views", "at least 0", self.teacher_views)
        require(self.self_training_weight >= 0, "self_training_weight", "at least 0", self.self_training_weight)


class CASTTrainer(UDATrainer[CASTSettings]):
    """The whole method. ``uda.cast`` in the plans holds its settings (``CASTSettings``).

    ``network`` is the teacher: validation, checkpoints and prediction are its. The student that gradients reach is
    ``networks["student"]``.
    """

    method = "cast"
    method_settings = CASTSettings
    target_share = 0.5  # a step takes half a batch of each domain
    student: Any  # a copy of the network, whose class is the plans' business

    # -- networks ------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """nnU-Net's optimiser and schedule, for the student: a copy of the network, which becomes the teacher."""
        teacher, self.network = self.network, copy.deepcopy(self.plain_network)
        try:
            self.student = self.network
            return super().configure_optimizers()
        finally:
            self.network = teacher.requires_grad_(False)

    def build_networks(self) -> dict[str, nn.Module]:
        settings = self.own_settings
        steps = self.num_epochs * self.num_iterations_per_epoch
        num_classes = self.label_manager.num_segmentation_heads
        return {
            "student": self.student,
            "average": Average(1 - 1 / max(2.0, settings.teacher_horizon * steps)),
            "self_training": SelfTraining(num_classes, settings.confidence),
            "contrasts": ContrastSearch(settings.teacher_views, self.configuration_manager.use_mask_for_norm),
            "intensities": IntensityPosterior(num_classes, self.num_input_channels),
        }

    def prepare_network(self) -> None:
        super().prepare_network()
        self.student_encoder, self.student_decoder = self.student.encoder, self.student.decoder
        if self._do_i_compile():
            self.student_encoder, self.student_decoder = map(
                torch.compile, (self.student_encoder, self.student_decoder)
            )

    # -- data ----------------------------------------------------------------------------------------------------

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        pipeline = super().get_training_transforms(*args, **kwargs)
        insert_after_spatial(pipeline, style_transforms(self.own_settings))
        return pipeline

    def get_target_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """Target patches moved alone; augmented, some restyled, for the student; and restyled for the teacher."""
        pipeline = super().get_training_transforms(*args, **kwargs)
        settings = self.own_settings
        show_views(pipeline, style_transforms(settings), settings.target_style_probability, settings.teacher_views)
        return pipeline

    # -- schedule ------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.networks["average"].steps == 0:
            self.student.load_state_dict(self.plain_network.state_dict())  # -pretrained_weights reach the network alone
        if self.corrects and not self.networks["intensities"].has_range:
            self.networks["intensities"].set_range(self._some_target_volumes())

    @property
    def corrects(self) -> bool:
        """Whether the teacher's labels are ever corrected by intensities."""
        return self.own_settings.self_training and self.own_settings.intensity_labels

    def _some_target_volumes(self) -> Iterator[np.ndarray]:
        """Evenly chosen target training cases, ``(C, Z, Y, X)``, at most ``RANGE_OF``."""
        cases = self.target_dataset.identifiers
        for case in cases[:: -(-len(cases) // RANGE_OF)]:
            yield np.asarray(self.target_dataset.load_case(case)[0][:])

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.network.eval()  # the teacher is never trained
        if self.self_training_weight > 0 and self.own_settings.teacher_views > 0 and not self.record.steps:
            self.choose_contrasts()

    def choose_contrasts(self) -> None:
        """Find contrasts for the teacher when self-training begins; later let go of those that it needs no more."""
        contrasts = self.networks["contrasts"]
        if contrasts.searched and not contrasts.number:
            return
        batches: list[Tensor] = []
        while sum(map(len, batches)) < PATCHES:
            batches.append(next_target(self)[:, : self.num_input_channels])
        if contrasts.searched:
            contrasts.review(self._predict, batches)
            return
        number = number_of_evaluations(self.num_epochs * self.num_iterations_per_epoch)
        own, *better = contrasts.search(self._predict, batches, number)
        self.print_to_log_file(
            f"The teacher expects a Dice of {own:.3f} of target images as they are; {len(better)} other contrasts of "
            f"{number} are kept" + (f", the best with {better[0]:.3f}" if better else "")
        )

    @property
    def self_training_weight(self) -> float:
        """Of pseudo labels in this epoch: 0 before ``start_share`` of the schedule, then rising."""
        if not self.own_settings.self_training:
            return 0.0
        start = round(self.own_settings.start_share * self.num_epochs)
        ramp = max(1, round(RAMP_SHARE * self.num_epochs))
        share = min(1.0, max(0, self.current_epoch + 1 - start) / ramp)
        return self.own_settings.self_training_weight * share

    # -- a step --------------------------------------------------------------------------------------------------

    def reads_target(self) -> bool:
        return self.self_training_weight > 0

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        if target is not None:
            source = every_other(source)
            label = [every_other(scale) for scale in label] if isinstance(label, list) else every_other(label)
        with self.updating("segmenter", max_norm=12) as add:
            with self.autocast():
                add({"segmentation": self.loss(self.study(source), label)})
            if target is not None:
                plain, styled, *views = target.split(self.num_input_channels, dim=1)
                pseudo_label = self.pseudo_label(plain, *views)
                with self.autocast():
                    loss = pseudo_label_loss(self.finest(self.study(styled)), pseudo_label)
                    add({"self_training": self.self_training_weight * loss})
        self.networks["average"].update(self.plain_network, self.student)

    def study(self, images: Tensor) -> list[Tensor] | Tensor:
        """The student's logits, a list from fine to coarse with deep supervision."""
        return self.student_decoder(self.student_encoder(images))

    def labelled_target_loss(self, images: Tensor, label: Tensor | list[Tensor]) -> Tensor:
        return self.loss(self.study(images), label)

    @torch.no_grad()
    def pseudo_label(self, target: Tensor, *views: Tensor) -> Tensor:
        """The labels of target images, ``(B, *patch)``, where they are sure; arguments are those of ``opinion``."""
        return trusted_labels(self.opinion(target, *views), target, self.networks["self_training"], self._intensities)

    def opinion(self, target: Tensor, *views: Tensor) -> Tensor:
        """The teacher's class probabilities of target images, ``(B, K, *patch)``, corrected by their intensities.

        Args:
            target: ``(B, C, *patch)`` as they are.
            views: the same in random styles.
        """
        found = self.networks["contrasts"](target)
        return teachers_opinion(self._predict, target, [*found, *views], self._intensities)

    @property
    def _intensities(self) -> IntensityPosterior | None:
        """What corrects the teacher, if anything does."""
        return self.networks["intensities"] if self.corrects else None

    # -- pictures ------------------------------------------------------------------------------------------------

    def draw_pictures(self, path: Path) -> None:
        super().draw_pictures(path)
        if self.self_training_weight > 0:
            self.draw_trusted(path.with_name(f"trusted_{path.name}"))

    @torch.no_grad()
    def draw_trusted(self, path: Path) -> None:
        """Which of the teacher's labels of a target slice the student learns."""
        target, _ = whole_patch(self, self.target_dataset, by_label=False)
        trusted = self.networks["self_training"].label(self.opinion(target))
        shown = middle_slice(target)
        rows = [[("target", shown, None), ("trusted labels", shown, middle_slice(trusted[:, None]))]]
        write_trainers_panels(self, path, rows)


def every_other(batch: Tensor) -> Tensor:
    """Every other patch of a batch: the last, the last but two, and so on.

    nnU-Net puts patches on structures last, so they have the same share in the half as in the whole.
    """
    return batch[(len(batch) - 1) % 2 :: 2]


class CASTNoSelfTrainingTrainer(CASTTrainer):
    """Without pseudo labels; no target image is opened but to choose a checkpoint."""

    fixed_settings = {"self_training": False}
