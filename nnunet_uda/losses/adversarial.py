"""Least-squares adversarial loss."""

from __future__ import annotations

from torch import Tensor


def lsgan_loss(logits: Tensor, is_real: bool) -> Tensor:
    """LSGAN (Mao et al. 2017): mean of (logits - 1)^2 where ``is_real``, else mean of logits^2.

    It takes the place of the logarithms printed in CISFA's equations; their roles, for D_g and D_s:

    - eq 1, D_g: ``lsgan_loss(D_g(x_b), True) + lsgan_loss(D_g(G(x_a)), False)``, the second on a detached image
    - eq 4, generator: ``lsgan_loss(D_g(G(x_a)), True)``
    - eq 6, segmenter: ``lsgan_loss(D_s(Seg(G(x_a))), True)``, which opposes eq 7
    - eq 7, D_s: ``lsgan_loss(D_s(Seg(x_b)), True) + lsgan_loss(D_s(Seg(G(x_a))), False)``, both on detached masks

    Args:
        logits: output of a discriminator without a final activation, any shape, floating point.
        is_real: the label that the discriminator is asked to give, or that its opponent wants from it.

    Returns:
        Scalar, float32.
    """
    logits = logits.float()
    return (logits - 1).square().mean() if is_real else logits.square().mean()
