"""Boundary loss: overlap of the soft boundaries of prediction and label."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_uda.collectives import global_sum


def boundary_loss(probabilities: Tensor, label: Tensor, width: int = 1) -> Tensor:
    """1 - Dice between the soft boundaries of prediction and label, averaged over the foreground classes.

    Boundaries come from pooling, so that they are differentiable, as in Bokhovkin and Burnaev 2019 (Boundary Loss for
    Remote Sensing Imagery Semantic Segmentation). Theirs is the inner rim and their score the boundary F1 with a
    tolerance; here it is the morphological gradient, maximum minus minimum of a window, whose thickness is the
    tolerance, and the score is Dice, summed over the batch of all processes. The edge of the patch is no boundary, nor
    is the edge of what is labelled: windows that reach a negative label take no part.

    A class without a boundary in the batch's labels takes no part: its Dice would be 0 however little is predicted.

    Args:
        probabilities: ``(B, K, *patch)`` float, after softmax, 2D or 3D.
        label: ``(B, 1, *patch)`` integer; negative where nothing is known. Values above K - 1 belong to no class.
        width: how far the boundary reaches to either side, in pixels, at least 1.

    Returns:
        Scalar, float32, also under autocast; 0 with a graph where no class has a boundary.
    """
    classes = torch.arange(1, probabilities.shape[1], device=label.device).view(-1, *[1] * (label.ndim - 2))
    known = _largest((label < 0).float(), width) == 0
    predicted = _soft_boundary(probabilities[:, 1:].float(), width) * known
    expected = _soft_boundary((label == classes).float(), width) * known
    axes = (0, *range(2, label.ndim))
    length = global_sum(expected.sum(axes))
    takes_part = length > 0
    total = global_sum(predicted.sum(axes)) + length
    dice = 2 * global_sum((predicted * expected).sum(axes)) / torch.where(takes_part, total, 1)
    return ((1 - dice) * takes_part).sum() / takes_part.sum().clamp(min=1)


def _soft_boundary(maps: Tensor, width: int) -> Tensor:
    """Morphological gradient of ``(B, C, *S)``: maximum minus minimum of the windows."""
    return _largest(maps, width) + _largest(-maps, width)


def _largest(maps: Tensor, width: int) -> Tensor:
    """Maximum of ``(B, C, *S)`` in windows of 2 * width + 1; padding is never the extremum."""
    pool = F.max_pool2d if maps.ndim == 4 else F.max_pool3d
    return pool(maps, kernel_size=2 * width + 1, stride=1, padding=width)
