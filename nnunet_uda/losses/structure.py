"""A measure of whether a translation has kept its image's structure. Not a loss: it is only watched."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_BINS = 16


@torch.no_grad()
def shared_information(image: Tensor, translated: Tensor) -> Tensor:
    r"""Normalised mutual information of an image's and its translation's intensities, the mean over batch and channels.

    .. math:: I(X; Y) / \sqrt{H(X) H(Y)}

    1 where either image can be told from the other pixel by pixel, whatever the contrast: for an image, its negative,
    any one-to-one map of intensities. Near 0 for a constant or an unrelated translation; unrelated slices of one body
    part share a little, since both are dark at the rim. Images are averaged over 2 x 2 pixels, so that noise counts
    less, and cut into bins of equally many pixels, 16 for 32 x 32 averages and fewer for smaller ones: few pixels in
    many bins would share information by chance.

    Args:
        image: ``(B, C, H, W)`` float, H and W at least 8.
        translated: ``(B, C, H, W)`` float.

    Returns:
        Scalar in [0, 1], float32.
    """
    binned = []
    for x in (image, translated):
        small = F.avg_pool2d(x.float(), 2).flatten(2).flatten(0, 1)  # [B C, pixels]
        number = min(MOST_BINS, math.isqrt(small.shape[1]) // 2)
        edges = small.quantile(torch.linspace(0, 1, number + 1, device=x.device)[1:-1], dim=1).T.contiguous()
        binned.append(torch.searchsorted(edges, small))
    pairs = binned[0] * number + binned[1]
    counts = pairs.new_zeros(len(pairs), number**2).scatter_add_(1, pairs, torch.ones_like(pairs))
    joint = (counts / pairs.shape[1]).unflatten(1, (number, number))
    first, second = _entropy(joint.sum(2)), _entropy(joint.sum(1))
    shared = first + second - _entropy(joint.flatten(1))
    both = (first * second).sqrt()
    return torch.where(both > 1e-6, shared / both.clamp(min=1e-6), 0.0).clamp(0, 1).mean()


def _entropy(probabilities: Tensor) -> Tensor:
    """Of distributions ``(N, K)``, ``(N,)``."""
    return torch.special.entr(probabilities).sum(1)
