"""CISFA: contrastive image synthesis and self-supervised feature adaptation (Hu, Wang and Shi).

A generator translates source slices to the target; the segmenter learns from the translations with the source's labels.
A patch-wise contrastive loss, weighted by the label, keeps shapes (section 3.2); a global contrastive loss between an
image and its translation adapts the segmenter's encoder (section 3.3). Every step updates the generator, then the
segmenter on freshly translated images, then both discriminators on fresh outputs (section 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nnunet_uda.losses.adversarial import lsgan_loss
from nnunet_uda.losses.global_contrastive import GlobalContrastiveLoss
from nnunet_uda.losses.patch_nce import PatchNCELoss, layers_patch_nce
from nnunet_uda.networks.projection_head import ProjectionHead
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

LARGEST_MAP = 16 * 2**20
"""Bytes of the generator's largest map for as many images as go through its update at once on a CPU: a batch of 4 at
160 x 160 goes in two halves, in the same time and half the memory."""
TEMPERATURE, PATCH_FEATURES = 0.2, 128
"""Of both contrastive losses, and the length of a patch's vector (sections 3.2 and 4.2)."""


@dataclass(frozen=True)
class CISFASettings(TranslationSettings):
    """Settings under ``uda.cisfa``. Defaults are the paper's (sections 3.2, 3.3 and 4.2), with one exception.

    ``segmenter_adversarial_weight`` is 1 in eq. 6; ``-protocol cisfa`` writes that. It is lower here because a
    segmenter that starts with nothing but background on the target is otherwise rewarded for staying there
    (docs/phantom.md).
    """

    image_adversarial_weight: float = 1.0
    """How strongly a translation has to look like the target."""
    patch_contrastive_weight: float = 1.0
    """How strongly a translation has to keep its image's shapes. More where shapes change."""
    foreground_weight: float = 2.0
    """At least 1: how much more patches of structures count (eq. 3)."""
    identity_weight: float = 0.0
    """Not in the paper: a target image should stay as it is."""
    global_contrastive_weight: float = 1.0
    """How alike an image and its translation are encoded (eq. 5)."""
    segmenter_adversarial: Literal["translated", "target", "both"] = "translated"
    """Whose segmentations have to fool the discriminator."""
    segmenter_adversarial_weight: float = 0.01
    """The paper's is 1, which holds a segmenter that has found nothing at nothing."""
    removed = {"discriminator_layers": 3, "gan_beta1": BETA1, "gan_schedule": "constant", "patch_layers": "all",
               "patch_features": PATCH_FEATURES, "patch_contrastive_temperature": TEMPERATURE,
               "patch_contrastive_negatives": "both", "global_contrastive_temperature": TEMPERATURE,
               "global_contrastive_update": "sum"}  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.foreground_weight >= 1, "foreground_weight", "at least 1 (eq. 3)", self.foreground_weight)


class CISFATrainer(UDATrainer[CISFASettings]):
    """The paper's method. ``uda.cisfa`` in the plans holds its settings (``CISFASettings``)."""

    method = "cisfa"
    method_settings = CISFASettings
    sequential_contrast = False
    """Whether the global contrastive loss updates the encoder before the segmenter's other losses (Table 3)."""

    def build_networks(self) -> dict[str, nn.Module]:
        self.global_contrastive = GlobalContrastiveLoss(TEMPERATURE)
        self.patch_contrastive = PatchNCELoss(TEMPERATURE)
        return {
            **translation_networks(self, PATCH_FEATURES),
            "projection_head": ProjectionHead(self.plain_network.encoder.output_channels[-1]),
            "image_discriminator": patch_discriminator(self, self.num_input_channels),
            "segmentation_discriminator": patch_discriminator(self, self.label_manager.num_segmentation_heads),
        }

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        self.optimizer.add_param_group({"params": list(self.networks["projection_head"].parameters())})
        return translation_optimizers(self, "image_discriminator", "segmentation_discriminator")

    def translate(self, source: Tensor) -> Tensor:
        return self.restore_background(self.networks["generator"](source), source)

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        assert target is not None
        self.update_generator(source, self.known(label), target)
        with torch.no_grad(), self.autocast():
            translated = self.translate(source)  # with the new weights (section 3.4)
        self.update_segmenter(source, translated, label, target)
        self.update_discriminators(translated, target)

    def update_generator(self, source: Tensor, label: Tensor, target: Tensor) -> None:
        """Eq. 4, of which every image has its own part: on a CPU large ones are taken a few at a time."""
        with self.updating("generator") as add:
            for part in self.parts(source):
                terms = self.generator_terms(source[part], label[part], target[part])
                share = len(source[part]) / len(source)
                add({name: share * value for name, value in terms.items()})

    def parts(self, images: Tensor) -> list[slice]:
        """The batch as it goes through the generator's update: whole, or on a CPU so many that maps stay small."""
        number = len(images)
        if images.device.type == "cpu" and self.settings.lean:
            largest = self.own_settings.generator_width * images[0, 0].numel() * images.element_size()
            number = max(1, min(number, LARGEST_MAP // largest))
        return [slice(start, start + number) for start in range(0, len(images), number)]

    def generator_terms(self, source: Tensor, label: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Eq. 4: fool D_g, keep the shapes."""
        settings, generator = self.own_settings, self.networks["generator"]
        terms = {}
        with self.autocast(), frozen(self.networks["image_discriminator"]):
            if settings.patch_contrastive_weight > 0:
                translated, features = generator.forward_with_features(source)
                translated = self.restore_background(translated, source)
                loss = self.patch_contrastive_loss(features, generator.encode(translated), label)  # eqs 2 and 3
                terms["patch_contrastive"] = settings.patch_contrastive_weight * loss
            else:
                translated = self.translate(source)
            if settings.identity_weight > 0:  # not in the paper: a target image should stay as it is
                same, features = generator.forward_with_features(target)
                terms["identity"] = settings.identity_weight * self.patch_contrastive_loss(
                    features, generator.encode(same), torch.zeros_like(target[:, :1])
                )
            logits = self.networks["image_discriminator"](translated)
            terms["generator_adversarial"] = settings.image_adversarial_weight * lsgan_loss(logits, is_real=True)
        return terms

    def update_segmenter(
        self, source: Tensor, translated: Tensor, label: Tensor | list[Tensor], target: Tensor
    ) -> None:
        """Eq. 6: segment the translation, fool D_s, and encode an image and its translation alike (eq. 5)."""
        settings = self.own_settings
        contrast = settings.global_contrastive_weight > 0
        if contrast and self.sequential_contrast:
            with self.autocast():
                loss = self.global_contrastive_loss(source, self.encoder(translated)[-1])
            self.update("segmenter", {"global_contrastive": settings.global_contrastive_weight * loss}, max_norm=12)
        with self.updating("segmenter", max_norm=12) as add:
            with self.autocast(), frozen(self.networks["segmentation_discriminator"]):
                skips = self.encoder(translated)
                leaves = [skip.detach().requires_grad_() for skip in skips]  # where the parts' gradients meet
                outputs = self.decoder(leaves)
                terms = {"segmentation": self.loss(outputs, label)}
                if settings.segmenter_adversarial_weight > 0:
                    loss = self.segmenter_adversarial_loss(outputs, target)
                    terms["segmenter_adversarial"] = settings.segmenter_adversarial_weight * loss
            add(terms)  # what the decoder keeps is free before the source is encoded
            if contrast and not self.sequential_contrast:
                with self.autocast():
                    loss = self.global_contrastive_loss(source, leaves[-1])
                add({"global_contrastive": settings.global_contrastive_weight * loss})
            torch.autograd.backward(skips, [leaf.grad for leaf in leaves])

    def update_discriminators(self, translated: Tensor, target: Tensor) -> None:
        """Eqs 1 and 7, on outputs of the new weights. D_s takes segmentations of real target images for real."""
        weights = random_patch_weights(self, translated)
        with self.autocast():
            image = self.networks["image_discriminator"]
            loss = lsgan_loss(image(target), is_real=True) + lsgan_loss(image(translated), False, weights)
        self.update("image_discriminator", {"image_discriminator": 0.5 * loss})
        if self.own_settings.segmenter_adversarial_weight > 0:
            with torch.no_grad(), self.autocast():
                of_target, of_translated = (self.segmentation_maps(self.segment(x)) for x in (target, translated))
            with self.autocast():
                maps = self.networks["segmentation_discriminator"]
                loss = lsgan_loss(maps(of_target), is_real=True) + lsgan_loss(maps(of_translated), False, weights)
            self.update("segmentation_discriminator", {"segmentation_discriminator": 0.5 * loss})

    def patch_contrastive_loss(self, features: list[Tensor], of_translated: list[Tensor], label: Tensor) -> Tensor:
        """Mean over the encoder's layers of the weighted PatchNCE loss (eqs 2 to 4)."""
        weight = self.own_settings.foreground_weight
        projector = self.networks["patch_projector"]
        return layers_patch_nce(self.patch_contrastive, projector, features, of_translated, label, weight)

    def global_contrastive_loss(self, source: Tensor, bottleneck_of_translated: Tensor) -> Tensor:
        """Eq. 5 over the batch's pairs of a source slice and its own translation."""
        head = self.networks["projection_head"]
        return self.global_contrastive(head(self.encoder(source)[-1]), head(bottleneck_of_translated))

    def segmenter_adversarial_loss(self, outputs: Tensor | list[Tensor], target: Tensor) -> Tensor:
        """The segmenter against D_s: make Seg(G(x_a)) look real (eq. 6), or Seg(x_b) look translated, or both."""
        maps, kind = self.networks["segmentation_discriminator"], self.own_settings.segmenter_adversarial
        losses = []
        if kind in ("translated", "both"):
            losses.append(lsgan_loss(maps(self.segmentation_maps(outputs)), is_real=True))
        if kind in ("target", "both"):
            losses.append(lsgan_loss(maps(self.segmentation_maps(self.segment(target))), is_real=False))
        return torch.stack(losses).sum()

    def segmentation_maps(self, outputs: Tensor | list[Tensor]) -> Tensor:
        """Full-resolution class probabilities, ``(B, classes, *patch)``."""
        return self.finest(outputs).float().softmax(1)


class CISFANoWeightTrainer(CISFATrainer):
    """Tables 1 and 2, "no weight": every patch counts the same."""

    fixed_settings = {"foreground_weight": 1.0}


class CISFANoPCLTrainer(CISFATrainer):
    """Table 3: without the patch-wise contrastive loss."""

    fixed_settings = {"patch_contrastive_weight": 0.0}


class CISFANoGCLTrainer(CISFATrainer):
    """Table 3: without the global contrastive loss."""

    fixed_settings = {"global_contrastive_weight": 0.0}


class CISFANoPCLNoGCLTrainer(CISFATrainer):
    """Table 3: without both contrastive losses."""

    fixed_settings = {"patch_contrastive_weight": 0.0, "global_contrastive_weight": 0.0}


class CISFASequentialGCLTrainer(CISFATrainer):
    """Table 3, "sequential": the global contrastive loss updates the encoder before the segmenter's other losses."""

    sequential_contrast = True
