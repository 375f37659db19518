"""Least-squares adversarial loss."""

from __future__ import annotations

from torch import Tensor


def lsgan_loss(logits: Tensor, is_real: bool, weights: Tensor | None = None) -> Tensor:
    """LSGAN (Mao et al. 2017): mean of (logits - 1)^2 where ``is_real``, else mean of logits^2.

    It takes the place of the logarithms printed in CISFA's equations; their roles, for D_g and D_s:

    - eq 1, D_g: ``lsgan_loss(D_g(x_b), True) + lsgan_loss(D_g(G(x_a)), False)``, the second on a detached image
    - eq 4, generator: ``lsgan_loss(D_g(G(x_a)), True)``
    - eq 6, segmenter: ``lsgan_loss(D_s(Seg(G(x_a))), True)``, which opposes eq 7
    - eq 7, D_s: ``lsgan_loss(D_s(Seg(x_b)), True) + lsgan_loss(D_s(Seg(G(x_a))), False)``, both on detached masks

    Args:
        logits: output of a discriminator without a final activation, any shape, floating point.
        is_real: the label that the discriminator is asked to give, or that its opponent wants from it.
        weights: of the images, ``(B,)``, which the mean is multiplied by; None: 1 each.

    Returns:
        Scalar, float32.
    """
    return mean_of_images((logits.float() - float(is_real)).square(), weights)


def mean_of_images(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of ``values`` ``(B, ...)``, those of each image times its weight in ``weights`` ``(B,)``."""
    return values.mean() if weights is None else (weights * values.reshape(len(values), -1).mean(1)).mean()
