"""ADVENT: adversarial entropy minimisation (AdvEnt of Vu et al. 2019, section 3.2).

A discriminator tells the weighted self-information maps of source predictions from those of target predictions; the
segmenter learns from labelled source images and to give target maps that are taken for source maps. So target
predictions become as certain as source predictions, and in the same places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_uda.losses.entropy import domain_cross_entropy, weighted_self_information
from nnunet_uda.settings import require
from nnunet_uda.training.translation import patch_discriminator, random_patch_weights
from nnunet_uda.training.uda_trainer import UDATrainer, frozen

LEARNING_RATE = 1e-4
"""Of the discriminator (section 4.2 of the paper)."""


@dataclass(frozen=True)
class ADVENTSettings:
    """Settings under ``uda.advent``. Both are the paper's.

    ``adversarial_weight`` (lambda_adv) stands beside a mean cross-entropy in the paper. nnU-Net's loss is that plus a
    Dice term of the same order, averaged over the levels of deep supervision, so the discriminator weighs here at most
    what it does there: its term is 0.0007 where it can tell nothing.
    """

    discriminator_width: int = 64
    """Channels of the discriminator's first layer, at least 1. 16 on a CPU."""
    adversarial_weight: float = 0.001
    """At least 0. Less where structures vanish on the target, more where nothing adapts."""
    removed = {"discriminator_layers": 3, "discriminator_learning_rate": LEARNING_RATE}

    def __post_init__(self) -> None:
        require(self.discriminator_width >= 1, "discriminator_width", "at least 1", self.discriminator_width)
        require(self.adversarial_weight >= 0, "adversarial_weight", "at least 0", self.adversarial_weight)


class ADVENTTrainer(UDATrainer[ADVENTSettings]):
    """The paper's AdvEnt at one level, the full resolution. ``uda.advent`` in the plans holds its settings."""

    method = "advent"
    method_settings = ADVENTSettings

    def build_networks(self) -> dict[str, nn.Module]:
        return {"discriminator": patch_discriminator(self, self.label_manager.num_segmentation_heads)}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"discriminator": self.adam_for("discriminator", learning_rate=LEARNING_RATE, beta1=0.9, beta2=0.99)}

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        share = self.optimizer.param_groups[0]["lr"] / self.initial_lr
        self.set_rate(share * LEARNING_RATE, "discriminator")  # polynomial in the paper, as the segmenter's

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        assert target is not None
        discriminator = self.networks["discriminator"]
        with self.autocast(), frozen(discriminator):
            of_source = self.segment(source)
            terms = {"segmentation": self.loss(of_source, label)}
            source_maps = weighted_self_information(self.finest(of_source).detach())
            target_maps = weighted_self_information(self.finest(self.segment(target)))
            loss = domain_cross_entropy(discriminator(target_maps), is_source=True)  # eq. 6
            terms["segmenter_adversarial"] = self.own_settings.adversarial_weight * loss
        self.update("segmenter", terms, max_norm=12)
        with self.autocast():
            weights = random_patch_weights(self, source)
            loss = domain_cross_entropy(discriminator(source_maps), True, weights)  # eq. 5, on the maps seen above
            loss = loss + domain_cross_entropy(discriminator(target_maps.detach()), is_source=False)
        self.update("discriminator", {"discriminator": 0.5 * loss})
