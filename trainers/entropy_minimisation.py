"""Direct entropy minimisation (MinEnt of ADVENT, Vu et al. 2019, section 3.1): confident predictions on the target.

The segmenter learns from labelled source images, and to be certain on target images.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nnunet_uda.losses.entropy import entropy_loss
from nnunet_uda.settings import require
from nnunet_uda.training.uda_trainer import UDATrainer


@dataclass(frozen=True)
class EntMinSettings:
    """Settings under ``uda.entropy_minimisation``.

    ``entropy_weight`` is the paper's (lambda_ent), which stands beside a mean cross-entropy. nnU-Net's loss is that
    plus a Dice term of the same order, averaged over the levels of deep supervision, so the entropy weighs here at
    most what it does there. It is small because a network that is certain of nothing but background has no entropy.
    """

    entropy_weight: float = 0.001
    """At least 0. Less where predictions on the target end in background, more where nothing adapts."""

    def __post_init__(self) -> None:
        require(self.entropy_weight >= 0, "entropy_weight", "at least 0", self.entropy_weight)


class EntMinTrainer(UDATrainer[EntMinSettings]):
    """Source loss and entropy of target predictions at full resolution. ``uda.entropy_minimisation`` holds settings."""

    method = "entropy_minimisation"
    method_settings = EntMinSettings

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        assert target is not None
        with self.autocast():
            terms = {"segmentation": self.loss(self.segment(source), label)}
            entropy = entropy_loss(self.finest(self.segment(target)))  # eq. 3
            terms["entropy"] = self.own_settings.entropy_weight * entropy  # eq. 4
        self.update("segmenter", terms, max_norm=12)
