"""The bounds every method is measured between, on the same schedule, augmentation and network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnunet_uda.errors import UDAError
from nnunet_uda.training.streams import target_scans
from nnunet_uda.training.uda_trainer import UDATrainer


class SourceOnlyTrainer(UDATrainer[None]):
    """Lower bound: the segmenter learns from labelled source images and never sees a target image, labelled or not."""

    needs_target = False
    uses_labelled_target = False

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        with self.autocast():
            loss = self.loss(self.segment(source), label)
        self.update("segmenter", {"segmentation": loss}, max_norm=12)


class SupervisedTrainer(SourceOnlyTrainer):
    """Upper bound: the same training on a dataset whose labelled images are the target's (``--upper_bound``).

    On a dataset with a few labelled target scans: plain training on these and the source, without adaptation.
    """

    uses_labelled_target = True


class LabelledTargetTrainer(SourceOnlyTrainer):
    """The same training on the labelled target scans that ``dataset.json`` names, alone: what these are worth."""

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        _, validation = super().get_tr_and_val_datasets()
        dataset = target_scans(self).labelled()
        if dataset is None:
            raise UDAError(
                f"{type(self).__name__} trains on labelled target scans, and dataset.json names none for the fold "
                f"{self.fold} ('uda', 'labelled_target'): convert with -few, see docs/few_labels.md"
            )
        self.training_dataset = dataset
        return dataset, validation
