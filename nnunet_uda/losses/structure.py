"""A measure of whether a translation has kept its image's structure. Not a loss: it is only watched."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def structure_correlation(image: Tensor, translated: Tensor) -> Tensor:
    """Pearson correlation between the gradient magnitudes of an image and of its translation, the batch's mean.

    Edges that lie in the same places correlate, whichever side is the brighter one: 1 for an image, its negative or
    any other linear map of it; near 0 for an unrelated or a constant translation. Both are first averaged over 2 x 2
    pixels, so that noise counts less.

    Args:
        image: [B, C, H, W] float, H and W at least 6.
        translated: [B, C, H, W] float.

    Returns:
        Scalar in [-1, 1], float32.
    """
    edges = []
    for x in (image, translated):
        small = F.avg_pool2d(x.float(), 2)
        down = small[:, :, 2:, 1:-1] - small[:, :, :-2, 1:-1]
        right = small[:, :, 1:-1, 2:] - small[:, :, 1:-1, :-2]
        magnitude = (down.square() + right.square()).sqrt().flatten(1)
        centred = magnitude - magnitude.mean(1, keepdim=True)
        edges.append(centred)
    norms = [edge.norm(dim=1) for edge in edges]
    product = (edges[0] * edges[1]).sum(1)
    enough = (norms[0] > 1e-6) & (norms[1] > 1e-6)
    return torch.where(enough, product / (norms[0] * norms[1]).clamp(min=1e-12), 0.0).mean()
