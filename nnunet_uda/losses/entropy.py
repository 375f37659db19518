"""Entropy of predictions, as a loss and as maps for a discriminator (ADVENT, Vu et al. 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnunet_uda.losses.adversarial import mean_of_images


def weighted_self_information(logits: Tensor) -> Tensor:
    r"""Weighted self-information maps (section 3.2), divided by log C.

    .. math:: I^{(h,w,c)} = -P^{(h,w,c)} \log P^{(h,w,c)} / \log C

    Their sum over classes is the normalised entropy (eq. 2): 0 where one class has all the probability, 1 where all
    have the same. The printed maps lack the divisor; with it they have the same range for any number of classes.

    Args:
        logits: ``(B, C, *S)`` float, before softmax; C at least 2.

    Returns:
        ``(B, C, *S)`` float32, at least 0, also under autocast.
    """
    logarithm = logits.float().log_softmax(1)  # finite where a probability is 0, and so is its gradient
    return -logarithm.exp() * logarithm / math.log(logits.shape[1])


def entropy_loss(logits: Tensor) -> Tensor:
    """L_ent (eq. 3): the normalised entropy of the predictions, here the mean over positions instead of their sum.

    Args:
        logits: ``(B, C, *S)`` float, before softmax; C at least 2.

    Returns:
        Scalar in [0, 1], float32, also under autocast.
    """
    return weighted_self_information(logits).sum(1).mean()


def domain_cross_entropy(logits: Tensor, is_source: bool, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of a domain classifier (eqs 5 and 6), whose high logits mean the source.

    - discriminator: ``domain_cross_entropy(D(I_s), True) + domain_cross_entropy(D(I_t), False)``, on detached maps
    - segmenter: ``domain_cross_entropy(D(I_t), True)``

    Args:
        logits: output of a discriminator without a final activation, any shape, floating point.
        is_source: the domain that the discriminator is asked to give, or that its opponent wants from it.
        weights: of the images, ``(B,)``, which the mean is multiplied by; None: 1 each.

    Returns:
        Scalar, float32; log 2 at logits of 0.
    """
    return mean_of_images(torch.nn.functional.softplus(-logits.float() if is_source else logits.float()), weights)
