"""A trained network as the quality estimate asks it: whole volumes on its own grid, one pass at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_uda.data.components import KEY, keep_largest_components
from nnunet_uda.quality.signals import views

TILE_STEP = 0.75
"""Of the sliding window. nnU-Net predicts with 0.5: in 2D a pass takes up to 0.44 of the time of one of its passes."""


@dataclass
class Asked:
    """An nnU-Net predictor, with the weights of folds (or of other checkpoints) to ask.

    Attributes:
        predictor: its ``network`` has the weights of ``own``.
        own: weights of the folds that predict, the first of which is asked for the views.
        others: weights of other checkpoints, by name.
    """

    predictor: nnUNetPredictor
    own: dict[str, dict[str, Tensor]]
    others: dict[str, dict[str, Tensor]]

    def __post_init__(self) -> None:
        self.predictor.tile_step_size, self.predictor.use_mirroring = TILE_STEP, False

    @property
    def slices(self) -> bool:
        """Whether the network is 2D."""
        return len(self.predictor.configuration_manager.patch_size) == 2

    @property
    def mirror_axes(self) -> list[int]:
        """Spatial axes of a volume, from 0, along which the network may be mirrored."""
        return [axis + self.slices for axis in self.predictor.allowed_mirroring_axes or ()]

    @property
    def num_structures(self) -> int:
        return self.predictor.label_manager.num_segmentation_heads - 1

    def spacing(self, properties: dict[str, Any]) -> list[float]:
        """``network_spacing`` of a case."""
        return network_spacing(self.predictor, properties)

    def logits(self, volume: Tensor) -> Tensor:
        """``(C, Z, Y, X)`` to ``(K, Z, Y, X)``, without mirroring."""
        with torch.no_grad(), redirect_stdout(StringIO()):
            return self.predictor.predict_sliding_window_return_logits(volume).float()

    @torch.no_grad()
    def look(self, volume: Tensor) -> tuple[dict[str, Tensor], np.ndarray, dict[str, np.ndarray]]:
        """Predict the ``views`` of a volume ``(C, Z, Y, X)``: their softmax, the segmentation, those by other weights.

        The segmentation is that of the mean over folds and over the view that is mirrored, where there is one. All keep
        what the model's predictions keep (``data.components``).
        """
        names, single = list(self.own), self.predictor.plans_manager.plans.get(KEY, ())
        seen = views(volume, self.logits, self.mirror_axes, self.slices)
        seen = {name: keep_largest_components(softmax, single) for name, softmax in seen.items()}
        mean = torch.stack([seen[name] for name in ("plain", "mirrored") if name in seen]).mean(0)
        beside = {names[0]: seen["plain"]} if len(names) > 1 else {}
        for name, weights in {**{name: self.own[name] for name in names[1:]}, **self.others}.items():
            with self._with(weights):
                beside[name] = keep_largest_components(self.logits(volume).softmax(0), single)
        folds = [mean, *(beside[name] for name in names[1:])]
        label = keep_largest_components(torch.stack(folds).mean(0), single).argmax(0)
        others = {name: to_array(softmax.argmax(0)) for name, softmax in beside.items()}
        return seen, to_array(label), others

    @contextmanager
    def _with(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Use other weights inside."""
        self.predictor.network.load_state_dict(weights)
        try:
            yield
        finally:
            self.predictor.network.load_state_dict(next(iter(self.own.values())))


def network_spacing(predictor: nnUNetPredictor, properties: dict[str, Any]) -> list[float]:
    """mm for each axis of a preprocessed volume; in 2D slices keep their distance."""
    own = [float(properties["spacing"][axis]) for axis in predictor.plans_manager.transpose_forward]
    network = [float(step) for step in predictor.configuration_manager.spacing]
    return [*own[: 3 - len(network)], *network]


def to_array(label: Tensor) -> np.ndarray:
    """int16 on the CPU."""
    return label.cpu().numpy().astype(np.int16)


def as_label(segmentation: Sequence[Any] | np.ndarray, num_structures: int) -> np.ndarray:
    """nnU-Net's ``(1, Z, Y, X)`` segmentation as ``(Z, Y, X)`` from 0 to ``num_structures``: what lies outside of its
    mask (-1) or is to be ignored is background."""
    label = np.asarray(segmentation[0])
    return np.where((label < 0) | (label > num_structures), 0, label).astype(np.int16)
