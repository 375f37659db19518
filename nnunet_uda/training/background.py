"""Where images lie outside of nnU-Net's nonzero mask: the brain, where the skull is stripped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def outside_mask(reference: Tensor, masked: Sequence[bool]) -> Tensor | None:
    """Where ``reference`` lies outside of the mask.

    Args:
        reference: ``(B, C, *patch)`` images as training gets them, before anything is done to them. nnU-Net sets voxels
            outside of the mask to exactly 0.
        masked: the channels that it does this to, ``use_mask_for_norm`` in the plans.

    Returns:
        Bool of the same shape, or None where no channel is masked: nothing is to be done then.
    """
    if not any(masked):
        return None
    channels = torch.tensor(masked, device=reference.device).view(1, -1, *[1] * (reference.ndim - 2))
    return (reference == 0) & channels


def restore_background(images: Tensor, reference: Tensor, masked: Sequence[bool]) -> Tensor:
    """``images``, made of ``reference`` by a restyling or translation, with 0 where that lies outside of the mask.

    At prediction these voxels are 0, in source and target alike, so a segmenter must see them so in training. Call it
    last: on what a generator or ``RandomStyle`` returns, and behind every shift, scale and clip of it, before the image
    is segmented or discriminated, and in ``translate``. Gradients flow through the other voxels.

    Args:
        images: ``(B, C, *patch)``.
        reference, masked: see ``outside_mask``; ``reference`` is of the same grid.
    """
    outside = outside_mask(reference, masked)
    return images if outside is None else images.masked_fill(outside, 0)
