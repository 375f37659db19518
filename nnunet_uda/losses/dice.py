"""Soft Dice loss, the segmentation loss of CISFA (first term of equation 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_uda.collectives import global_sum


def soft_dice_loss(
    logits: Tensor,
    target: Tensor,
    include_background: bool = False,
    smooth: float = 1e-5,
    ignore_label: int | None = None,
) -> Tensor:
    """1 - Dice, with Dice = (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth) per class, p = softmax of the logits.

    The sums run over the whole batch (of all processes) and all positions, batch Dice; the classes are then averaged
    with equal shares.
    A class that the batch's target lacks counts as every other: loss 0 where its probabilities sum to nothing, up to 1
    (with hardly any gradient) where they sum to far more than ``smooth``; never NaN.

    Args:
        logits: ``(B, C, *S)`` float, before softmax.
        target: ``(B, 1, *S)`` integer, values from 0 (background) to C - 1, and ``ignore_label``.
        include_background: let class 0 take part in the average.
        smooth: above 0.
        ignore_label: positions with this value take no part; None if there are none.

    Returns:
        Scalar, float32, also under autocast.
    """
    if logits.shape[1] < 2 and not include_background:
        raise ValueError(f"soft_dice_loss needs at least one foreground class, logits have shape {tuple(logits.shape)}")
    probabilities = logits.float().softmax(dim=1)
    if ignore_label is not None:
        known = target != ignore_label
        probabilities, target = probabilities * known, target.where(known, 0)
    reference = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, target.long(), True)
    if ignore_label is not None:
        reference = reference & known
    axes = (0, *range(2, logits.ndim))
    overlap = global_sum((probabilities * reference).sum(axes))
    total = global_sum(probabilities.sum(axes) + reference.sum(axes))
    dice = (2 * overlap + smooth) / (total + smooth)
    return 1 - (dice if include_background else dice[1:]).mean()
