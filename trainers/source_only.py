"""The bounds every method is measured between, on the same schedule, augmentation and network."""

from __future__ import annotations

from torch import Tensor

from nnunet_uda.training.uda_trainer import UDATrainer


class SourceOnlyTrainer(UDATrainer):
    """Lower bound: the segmenter learns from labelled source images and never sees a target image."""

    needs_target = False

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        with self.autocast():
            loss = self.loss(self.segment(source), label)
        self.update("segmenter", {"segmentation": loss}, max_norm=12)


class SupervisedTrainer(SourceOnlyTrainer):
    """Upper bound: the same training on a dataset whose labelled images are the target's (``--upper_bound``)."""
