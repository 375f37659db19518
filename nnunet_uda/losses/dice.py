"""Soft Dice loss, the segmentation loss of CISFA (first term of equation 6), by nnU-Net."""

from __future__ import annotations

from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1
from torch import Tensor

from nnunet_uda.collectives import world_size


def soft_dice_loss(logits: Tensor, target: Tensor, ignore_label: int | None = None) -> Tensor:
    """1 - Dice, with Dice = (2 sum(p y) + s) / (sum(p) + sum(y) + s) of each structure, p the softmax, s = 1e-5.

    The sums run over the whole batch (of all processes) and all positions; the mean runs over the structures. One that
    the batch's target lacks counts as every other: loss 0 where its probabilities sum to nothing, up to 1 (with hardly
    any gradient) where they sum to far more than s; never NaN.

    Args:
        logits: ``(B, C, *S)`` float, before softmax, C at least 2.
        target: ``(B, 1, *S)`` integer, values from 0 (background) to C - 1, and ``ignore_label``.
        ignore_label: positions with this value take no part; None if there are none.

    Returns:
        Scalar, float32, also under autocast.
    """
    loss = MemoryEfficientSoftDiceLoss(softmax_helper_dim1, True, do_bg=False, smooth=1e-5, ddp=world_size() > 1)
    known = None if ignore_label is None else target != ignore_label
    return 1 + loss(logits.float(), target if known is None else target.where(known, 0), known)
