"""What trainers that translate share: a ResNet generator, PatchGAN discriminators, PatchNCE, settings and rates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_uda.networks.patch_discriminator import PatchDiscriminator
from nnunet_uda.networks.patch_projector import PatchProjector
from nnunet_uda.networks.resnet_generator import ResnetGenerator
from nnunet_uda.settings import require
from nnunet_uda.training.uda_trainer import UDATrainer

BETA1 = 0.5
"""Of Adam in a GAN (Radford et al. 2016; CISFA 4.2, CUT, CycleGAN)."""


@dataclass(frozen=True)
class TranslationSettings:
    """What the trainers that translate share: sizes of the networks, their Adam, patches of PatchNCE in a layer."""

    generator_width: int = 64
    """Channels of the generator's first stage, at least 1. 16 on a CPU."""
    generator_blocks: int = 9
    """Residual blocks of the generator, at least 1. Fewer for small patches."""
    discriminator_width: int = 64
    """Channels of the discriminators' first layer, at least 1."""
    gan_learning_rate: float = 2e-4
    """Of generator and discriminators, positive."""
    patches: int = 256
    """Positions of PatchNCE in each layer, at least 1. Fewer save memory."""

    def __post_init__(self) -> None:
        for name in ("generator_width", "generator_blocks", "discriminator_width", "patches"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.gan_learning_rate > 0, "gan_learning_rate", "positive", self.gan_learning_rate)


def patch_discriminator(trainer: UDATrainer, channels: int) -> PatchDiscriminator:
    """For maps of the trainer's patches; ``discriminator_width`` is its own setting."""
    patch_size = trainer.configuration_manager.patch_size
    return PatchDiscriminator(channels, len(patch_size), patch_size, trainer.own_settings.discriminator_width)


def drawn_at_random(trainer: UDATrainer, of_source: Tensor) -> Tensor:
    """The part of a source batch that is drawn as target patches are: at random, not on structures.

    What tells the domains apart must not learn from the rest how often anatomy appears. nnU-Net puts patches on
    structures last. Where every patch is on one, the batch is taken as it is.

    Args:
        of_source: source images, or what became of them, ``(B, ...)`` in the loader's order.
    """
    number = round(len(of_source) * (1 - trainer.oversample_foreground_percent))
    return of_source[: number or None]


def translation_networks(trainer: UDATrainer, patch_features: int) -> dict[str, nn.Module]:
    """The generator, and the projector of its features that PatchNCE compares, vectors of length ``patch_features``."""
    settings, manager = trainer.own_settings, trainer.configuration_manager
    generator = ResnetGenerator(
        trainer.num_input_channels,
        len(manager.patch_size),
        settings.generator_width,
        settings.generator_blocks,
        manager.pool_op_kernel_sizes[1:3],  # the segmenter's own strides: thin axes stay whole
        trainer.settings.lean,
    )
    projector = PatchProjector(generator.feature_channels, patch_features, settings.patches)
    return {"generator": generator, "patch_projector": projector}


def translation_optimizers(trainer: UDATrainer, *discriminators: str) -> dict[str, torch.optim.Optimizer]:
    """Adam of the generator with its projector, and of each discriminator."""
    networks = {"generator": ("generator", "patch_projector"), **{name: (name,) for name in discriminators}}
    rate = trainer.own_settings.gan_learning_rate
    return {name: trainer.adam_for(*of, learning_rate=rate, beta1=BETA1) for name, of in networks.items()}
