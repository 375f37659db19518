"""Settings of a translation by a ResNet generator, a PatchGAN discriminator and PatchNCE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nnunet_uda.settings import require


@dataclass(frozen=True)
class TranslationSettings:
    """What the trainers that translate share: sizes of the networks, Adam of both, patches of PatchNCE in a layer.

    ``gan_schedule``: the rate of generator and discriminator stays as it is, or falls to zero in the second half of
    the epochs that train them (``linear``). ``patch_layers``: PatchNCE compares the image itself and all layers of the
    generator's encoder, as published, or only those behind the stem (``deep``), which leaves a translation's contrast
    freer.
    """

    generator_width: int = 64
    generator_blocks: int = 9
    discriminator_width: int = 64
    discriminator_layers: int = 3
    gan_learning_rate: float = 2e-4
    gan_beta1: float = 0.5
    gan_schedule: Literal["constant", "linear"] = "constant"
    patches: int = 256
    patch_features: int = 128
    patch_layers: Literal["all", "deep"] = "all"

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
