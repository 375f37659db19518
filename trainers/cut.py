"""CUT, then train: contrastive unpaired translation (Park et al. 2020), then a segmenter on its translations.

In the first part of the schedule a generator learns to translate source images to the target: a least-squares GAN, and
PatchNCE between an image and its translation, with the image itself as the only place of negatives, and on target
images, which should stay as they are. In the rest the generator is fixed and the segmenter learns from translations
with the source's labels. Neither part knows of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import Tensor, nn

from nnunet_uda.errors import UDAError
from nnunet_uda.losses.adversarial import lsgan_loss
from nnunet_uda.losses.patch_nce import PatchNCELoss
from nnunet_uda.settings import require
from nnunet_uda.training.translation import (
    BETA1,
    TranslationSettings,
    patch_discriminator,
    random_patch_weights,
    translation_networks,
    translation_optimizers,
)
from nnunet_uda.training.uda_trainer import UDATrainer, frozen

TEMPERATURE, PATCH_FEATURES = 0.07, 256
"""Of PatchNCE, and the length of a patch's vector: CUT's (section 3 and appendix C)."""


@dataclass(frozen=True)
class CUTSettings(TranslationSettings):
    """Settings under ``uda.cut``. Defaults are CUT's, its code's where the paper leaves it open, but for the split.

    ``translation_share`` is the share of the epochs that train the generator; the rest trains the segmenter.
    ``patch_contrastive_weight`` and ``identity_weight`` are eq. 5's lambda_X and lambda_Y (CUT's code halves both).
    """

    translation_share: float = 0.5
    """Above 0 and below 1: share of the epochs that train the generator. More where translations stay poor."""
    adversarial_weight: float = 1.0
    """At least 0: how strongly a translation has to look like the target."""
    patch_contrastive_weight: float = 1.0
    """At least 0: how strongly it has to keep its image's shapes. More where shapes change."""
    identity_weight: float = 1.0
    """At least 0: a target image should stay as it is. More where tissue changes its kind."""
    removed = {"discriminator_layers": 3, "gan_beta1": BETA1, "gan_schedule": "linear", "patch_layers": "all",
               "patch_features": PATCH_FEATURES, "temperature": TEMPERATURE}  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.translation_share < 1, "translation_share", "above 0 and below 1", self.translation_share)
        for name in ("adversarial_weight", "patch_contrastive_weight", "identity_weight"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))


class LatePolyLRScheduler(PolyLRScheduler):
    """nnU-Net's schedule over the epochs from ``start`` on; before it the rate is the initial one."""

    def __init__(self, optimizer: torch.optim.Optimizer, initial_lr: float, start: int, end: int) -> None:
        self.start = start
        super().__init__(optimizer, initial_lr, end - start)

    def step(self, current_step: int | None = None) -> None:
        super().step(max(0, (current_step or 0) - self.start))


class CUTTrainer(UDATrainer[CUTSettings]):
    """Translate, then train. ``uda.cut`` in the plans holds its settings (``CUTSettings``).

    Until the generator is fixed the segmenter stays at its random start, and so does pseudo Dice.
    """

    method = "cut"
    method_settings = CUTSettings

    @property
    def translation_epochs(self) -> int:
        """The epochs of the generator's part: at least one, and at least one is left for the segmenter."""
        return min(max(1, round(self.own_settings.translation_share * self.num_epochs)), self.num_epochs - 1)

    @property
    def generator_learns(self) -> bool:
        return self.current_epoch < self.translation_epochs

    def initialize(self) -> None:
        if self.num_epochs < 2:
            raise UDAError(
                f"CUTTrainer: num_epochs is {self.num_epochs}; expected at least 2, one for the generator and one for "
                "the segmenter. Set num_epochs (nnUNetUDA_configure -set num_epochs=...)"
            )
        super().initialize()

    def build_networks(self) -> dict[str, nn.Module]:
        self.patch_contrastive = PatchNCELoss(TEMPERATURE, negatives="input")
        return {
            **translation_networks(self, PATCH_FEATURES),
            "discriminator": patch_discriminator(self, self.num_input_channels),
        }

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return translation_optimizers(self, "discriminator")

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer, _ = super().configure_optimizers()
        return optimizer, LatePolyLRScheduler(optimizer, self.initial_lr, self.translation_epochs, self.num_epochs)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        left = 1 - self.current_epoch / self.translation_epochs  # constant, then to zero in the second half (4.)
        rate = self.own_settings.gan_learning_rate * min(1.0, max(0.0, 2 * left))
        self.set_rate(rate, "generator", "discriminator")

    def translate(self, source: Tensor) -> Tensor:
        return self.restore_background(self.networks["generator"](source), source)

    def reads_target(self) -> bool:
        return self.generator_learns

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        if target is not None:  # while the generator learns
            self.update_generator(source, target)
        else:
            self.update_segmenter(source, label)

    def update_generator(self, source: Tensor, target: Tensor) -> None:
        """Eq. 5, the discriminator first, both on one pass of the generator."""
        settings, generator, number = self.own_settings, self.networks["generator"], len(source)
        discriminator = self.networks["discriminator"]
        with self.autocast():
            images = torch.cat([source, target]) if settings.identity_weight > 0 else source
            outputs, features = generator.forward_with_features(images)
            outputs = self.restore_background(outputs, images)
            translated = outputs[:number]
            loss = lsgan_loss(discriminator(target), is_real=True)
            weights = random_patch_weights(self, source)
            loss = loss + lsgan_loss(discriminator(translated.detach()), False, weights)
        self.update("discriminator", {"discriminator": 0.5 * loss})  # eq. 1
        with self.autocast(), frozen(discriminator):
            loss = lsgan_loss(discriminator(translated), is_real=True)
            terms = {"generator_adversarial": settings.adversarial_weight * loss}
            losses = self.patch_contrastive_losses(features, generator.encode(outputs), number)  # eq. 3
            terms["patch_contrastive"] = settings.patch_contrastive_weight * losses[0]
            if settings.identity_weight > 0:
                terms["identity"] = settings.identity_weight * losses[1]
        self.update("generator", terms)

    def update_segmenter(self, source: Tensor, label: Tensor | list[Tensor]) -> None:
        with torch.no_grad(), self.autocast():
            translated = self.translate(source)
        with self.autocast():
            loss = self.loss(self.segment(translated), label)
        self.update("segmenter", {"segmentation": loss}, max_norm=12)

    def patch_contrastive_losses(
        self, features: list[Tensor], of_outputs: list[Tensor], number: int
    ) -> tuple[Tensor, ...]:
        """PatchNCE, mean over the encoder's layers, of the first ``number`` images and of the rest, if there is one."""
        projector = self.networks["patch_projector"]
        positions = projector.sample_positions(features)
        keys, queries = projector(features, positions), projector(of_outputs, positions)
        return tuple(
            torch.stack([self.patch_contrastive(q[part], k[part]) for q, k in zip(queries, keys, strict=True)]).mean()
            for part in (slice(number), slice(number, None))
            if len(queries[0][part])
        )
