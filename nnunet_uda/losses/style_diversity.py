"""A term that keeps a generator from ignoring its style code."""

from __future__ import annotations

import torch
from torch import Tensor


def style_diversity_loss(
    first: Tensor, second: Tensor, first_code: Tensor, second_code: Tensor, margin: float
) -> Tensor:
    r"""Mean over images of max(0, 1 - r / margin), r being how much an image changes for a change of its code.

    .. math:: r = \frac{mean |G(x, z_1) - G(x, z_2)|}{mean |z_1 - z_2|}

    Diversity-sensitive GAN (Yang et al., ICLR 2019) with its upper limit as a hinge. What the change looks like
    is left to the discriminator. The gradient reaches both translations.

    Args:
        first, second: [B, C, *S] float, translations of the same images, z-scored.
        first_code, second_code: [B, D] float, their codes.
        margin: r from which nothing more is asked for, above 0.

    Returns:
        Scalar, float32, also under autocast, in [0, 1].
    """
    with torch.autocast(first.device.type, enabled=False):
        change = (first.float() - second.float()).abs().flatten(1).mean(1)
        distance = (first_code - second_code).abs().float().mean(1).clamp(min=1e-6)
        return (1 - change / distance / margin).relu().mean()
