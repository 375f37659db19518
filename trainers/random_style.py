"""RandomStyle: labelled source images alone, in random styles.

nnU-Net's own augmentation plus cluster contrasts (after SynthSeg), SLAug's global location-scale augmentation (Su et
al. 2023), random convolutions (GIN) and interventional pseudo-correlation (Ouyang et al. 2022): needs no target image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from torch import Tensor

from nnunet_uda.data.random_style import StyleAugmentationSettings, insert_after_spatial, style_transforms
from nnunet_uda.training.uda_trainer import UDATrainer


@dataclass(frozen=True)
class RandomStyleSettings(StyleAugmentationSettings):
    """Settings under ``uda.random_style``: how often an image gets each of the random styles."""


class RandomStyleTrainer(UDATrainer[RandomStyleSettings]):
    """The segmenter learns from restyled source images and never sees a target image."""

    method = "random_style"
    method_settings = RandomStyleSettings
    needs_target = False

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        pipeline = super().get_training_transforms(*args, **kwargs)
        insert_after_spatial(pipeline, style_transforms(self.own_settings))
        return pipeline

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        with self.autocast():
            loss = self.loss(self.segment(source), label)
        self.update("segmenter", {"segmentation": loss}, max_norm=12)
