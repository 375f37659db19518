"""What trainers that translate share: a ResNet generator, PatchGAN discriminators, PatchNCE, settings and rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from nnunet_uda.networks.patch_discriminator import PatchDiscriminator
from nnunet_uda.networks.patch_projector import PatchProjector
from nnunet_uda.networks.resnet_generator import ResnetGenerator
from nnunet_uda.settings import require
from nnunet_uda.training.uda_trainer import UDATrainer


@dataclass(frozen=True)
class TranslationSettings:
    """What the trainers that translate share: sizes of the networks, Adam of both, patches of PatchNCE in a layer.

    ``gan_schedule``: the rate of generator and discriminator stays as it is, or falls to zero in the second half of
    the epochs that train them (``linear``). ``patch_layers``: PatchNCE compares the image itself and all layers of the
    generator's encoder, as published, or only those behind the stem (``deep``), which leaves a translation's contrast
    freer.
    """

    generator_width: int = 64
    """Channels of the generator's first stage, at least 1. 16 on a CPU."""
    generator_blocks: int = 9
    """Residual blocks of the generator, at least 1. Fewer for small patches."""
    discriminator_width: int = 64
    """Channels of the discriminators' first layer, at least 1."""
    discriminator_layers: int = 3
    """Strided layers, at least 1: each doubles what a discriminator sees at once."""
    gan_learning_rate: float = 2e-4
    """Of generator and discriminators, positive."""
    gan_beta1: float = 0.5
    """Of their Adam."""
    gan_schedule: Literal["constant", "linear"] = "constant"
    """linear: to zero in the second half."""
    patches: int = 256
    """Positions of PatchNCE in each layer, at least 1. Fewer save memory."""
    patch_features: int = 128
    """Length of a patch's vector, at least 1."""
    patch_layers: Literal["all", "deep"] = "all"
    """deep leaves the image and the stem out: a translation's contrast is freer."""

    def __post_init__(self) -> None:
        for name in ("generator_width", "generator_blocks", "discriminator_width", "discriminator_layers", "patches",
                     "patch_features"):  # fmt: skip
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.gan_learning_rate > 0, "gan_learning_rate", "positive", self.gan_learning_rate)

    @property
    def first_patch_layer(self) -> int:
        """Of ``ResnetGenerator.encode``'s maps the first that PatchNCE compares."""
        return 2 if self.patch_layers == "deep" else 0

    def gan_rate(self, progress: float) -> float:
        """The learning rate when the share ``progress`` of the epochs is over."""
        return self.gan_learning_rate * (min(1.0, max(0.0, 2 * (1 - progress))) if self.gan_schedule == "linear" else 1)


def patch_discriminator(trainer: UDATrainer, channels: int) -> PatchDiscriminator:
    """For maps of the trainer's patches; ``discriminator_width`` and ``discriminator_layers`` are its own settings."""
    patch_size, settings = trainer.configuration_manager.patch_size, trainer.own_settings
    width, layers = settings.discriminator_width, settings.discriminator_layers
    return PatchDiscriminator(channels, len(patch_size), patch_size, width, layers)


def translation_networks(trainer: UDATrainer) -> dict[str, nn.Module]:
    """The generator, and the projector of its features that PatchNCE compares."""
    settings, manager = trainer.own_settings, trainer.configuration_manager
    generator = ResnetGenerator(
        trainer.num_input_channels,
        len(manager.patch_size),
        settings.generator_width,
        settings.generator_blocks,
        manager.pool_op_kernel_sizes[1:3],  # the segmenter's own strides: thin axes stay whole
    )
    projector = PatchProjector(
        generator.feature_channels, settings.patch_features, settings.patches, settings.first_patch_layer
    )
    return {"generator": generator, "patch_projector": projector}


def translation_optimizers(trainer: UDATrainer, *discriminators: str) -> dict[str, torch.optim.Optimizer]:
    """Adam of the generator with its projector, and of each discriminator."""
    networks = {"generator": ("generator", "patch_projector"), **{name: (name,) for name in discriminators}}
    rate, beta1 = trainer.own_settings.gan_learning_rate, trainer.own_settings.gan_beta1
    return {name: trainer.adam_for(*of, learning_rate=rate, beta1=beta1) for name, of in networks.items()}


def set_translation_rate(trainer: UDATrainer, progress: float) -> None:
    """See ``TranslationSettings.gan_rate``; of all optimisers but the segmenter's."""
    others = (name for name in trainer.optimizers if name != trainer.network_update)
    trainer.set_rate(trainer.own_settings.gan_rate(progress), *others)
