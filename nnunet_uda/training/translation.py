"""What trainers that translate share: a ResNet generator, PatchGAN discriminators, PatchNCE, settings and rates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_uda.collectives import global_sum
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


def random_patch_weights(trainer: UDATrainer, source: Tensor) -> Tensor:
    """For losses of what tells the domains apart: weights of source patches, by which only those drawn at random count.

    nnU-Net puts the last patches of a batch on structures, and target patches cannot be put there: from these a
    discriminator would learn how often anatomy appears. They weigh 0, the others so much that the mean over the batches
    of all processes is the mean over them. Where all are on structures, all weigh 1.

    Args:
        source: images in the loader's order, or what became of them, ``(B, ...)``.

    Returns:
        ``(B,)`` float32 on the same device.
    """
    size = len(source)
    drawn = torch.zeros(size, device=source.device)
    drawn[: round(size * (1 - trainer.oversample_foreground_percent))] = 1
    counts = global_sum(torch.stack((drawn.sum(), torch.full_like(drawn[0], size))))
    return drawn * counts[1] / counts[0] if counts[0] > 0 else torch.ones_like(drawn)


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
