"""Batches of 2D patches that hold the object in some and lack it in others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from torch import Tensor

ATTEMPTS = 20


def empty_slices(
    dataset: nnUNetBaseDataset, ignore_label: int | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The indices of the slices without foreground of every case that has such; and the cases that have foreground.

    Ignored voxels are no foreground; but a slice with such may hold the object, and is not without it.
    """
    empty, with_foreground = {}, []
    for identifier in dataset.identifiers:
        _, seg, _, _ = dataset.load_case(identifier)
        seg = seg[:]
        ignored = np.zeros(seg.shape, bool) if ignore_label is None else seg == ignore_label
        lacks = (seg <= 0).all((0, 2, 3))
        if lacks.any():
            empty[identifier] = np.flatnonzero(lacks)
        if ((seg > 0) & ~ignored).any():
            with_foreground.append(identifier)
    return empty, with_foreground


class MixedSliceLoader(nnUNetDataLoader):
    """nnU-Net's loader for 2D patches whose every batch holds both kinds, where the data have both.

    The batch's first patch comes from a slice without foreground; where there is no such slice, from a place without.
    The last one holds foreground, even where no oversampling is asked for. The rest is drawn as nnU-Net draws it. What
    counts is the patch that is seen: where augmentation has moved the object out of it, the batch is drawn again, at
    most 20 times. Random numbers come from numpy's global state, as nnU-Net's do.

    Args:
        loader: nnU-Net's loader for the same data, which gives everything else; 2D.
        label_manager: nnU-Net's.
        log: told where the data have no slice without foreground.
    """

    def __init__(self, loader: nnUNetDataLoader, label_manager: Any, log: Callable[[str], None]) -> None:
        super().__init__(
            loader._data, loader.batch_size, loader.patch_size[1:], loader.final_patch_size[1:], label_manager,
            oversample_foreground_percent=loader.oversample_foreground_percent, transforms=loader.transforms,
        )  # fmt: skip
        self.foreground_labels, self.ignore_label = label_manager.foreground_labels, label_manager.ignore_label
        self.empty, self.with_foreground = empty_slices(self._data, self.ignore_label)
        self.get_do_oversample = self._oversample_last
        self.drawing = 0
        if not self.empty:
            log("No slice of the source lacks foreground: only patches beside it serve as slices without the object")
        if self.batch_size < 3:
            log("WARNING: the contrastive loss needs a batch of 3, for two slices of one kind and one of the other")

    def get_indices(self) -> np.ndarray:
        chosen = super().get_indices()
        if self.batch_size > 1:
            chosen[-1] = np.random.choice(self.with_foreground)
            if self.empty:
                chosen[0] = np.random.choice(list(self.empty))
        self.first_case = chosen[0]
        return chosen

    def _oversample_last(self, sample_idx: int) -> bool:
        self.drawing = sample_idx
        if self.batch_size == 1:
            return self._oversample_last_XX_percent(sample_idx)
        return sample_idx == self.batch_size - 1 or (sample_idx > 0 and self._oversample_last_XX_percent(sample_idx))

    def get_bbox(
        self, data_shape: Any, force_fg: bool, class_locations: Any, overwrite_class: Any = None, verbose: bool = False
    ) -> tuple[Any, Any]:
        lower, upper = super().get_bbox(data_shape, force_fg, class_locations, overwrite_class, verbose)
        if self.drawing > 0 or self.batch_size == 1:
            return lower, upper
        if self.empty:
            index = int(np.random.choice(self.empty[self.first_case]))
            return [index, *lower[1:]], [index + 1, *upper[1:]]
        for _ in range(ATTEMPTS):
            if not self._holds_location(lower, upper, class_locations):
                break
            lower, upper = super().get_bbox(data_shape, False, class_locations, overwrite_class, verbose)
        return lower, upper

    def _holds_location(self, lower: Any, upper: Any, class_locations: dict) -> bool:
        found = (class_locations.get(label, ()) for label in self.foreground_labels)
        return any(
            len(places) and ((places[:, 1:] >= lower) & (places[:, 1:] < upper)).all(1).any() for places in found
        )

    def generate_train_batch(self) -> dict:
        for _ in range(ATTEMPTS if self.empty and self.batch_size > 1 else 1):
            batch = super().generate_train_batch()
            label = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
            if is_mixed(label, self.ignore_label):
                break
        return batch


def is_mixed(label: Tensor, ignore_label: int | None = None) -> bool:
    """Whether some labels of ``(B, 1, H, W)`` hold foreground and others none, nor ignored pixels."""
    holds = ((label > 0) & (label != (0 if ignore_label is None else ignore_label))).flatten(1).any(1)
    return bool(holds.any() and (label <= 0).flatten(1).all(1).any())
