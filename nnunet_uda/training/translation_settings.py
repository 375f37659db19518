"""Settings of a translation by a ResNet generator, a PatchGAN discriminator and PatchNCE."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_uda.settings import require


@dataclass(frozen=True)
class TranslationSettings:
    """What the trainers that translate share: sizes of the networks, Adam of both, patches of PatchNCE in a layer."""

    generator_width: int = 64
    generator_blocks: int = 9
    discriminator_width: int = 64
    discriminator_layers: int = 3
    gan_learning_rate: float = 2e-4
    gan_beta1: float = 0.5
    patches: int = 256
    patch_features: int = 128

    def __post_init__(self) -> None:
        for name in ("generator_width", "generator_blocks", "discriminator_width", "discriminator_layers", "patches",
                     "patch_features"):  # fmt: skip
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.gan_learning_rate > 0, "gan_learning_rate", "positive", self.gan_learning_rate)
