"""nnU-Net's weights of deep supervision, for any loss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper


def deeply_supervised(loss: Callable, levels: int) -> DeepSupervisionWrapper:
    """``loss`` over ``levels`` maps from fine to coarse: each weighs half of the one before, the coarsest nothing."""
    weights = np.array([1 / 2**level for level in range(levels)])
    weights[-1] = 0
    return DeepSupervisionWrapper(loss, weights / weights.sum())
