"""Two segmentations of the same patch should be one."""

from __future__ import annotations

from torch import Tensor

SMOOTH = 1e-3


def consistency_loss(first: Tensor, second: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""1 - soft Dice of two softmax maps, mean over the foreground classes; 0 where they agree and are certain.

    .. math:: 1 - \frac{1}{K - 1} \sum_{k > 0} \frac{2 \sum p_k q_k + \epsilon}{\sum p_k^2 + \sum q_k^2 + \epsilon}

    As DG-TTA's (Weihsbach et al. 2023), with gradients through both. Sums run over the batch, so that a class that
    neither map holds costs nothing.

    Args:
        first, second: ``(B, K, *S)`` float probabilities, class 0 is the background.
        valid: ``(B, 1, *S)`` float, 0 where nothing is compared.
    """
    if valid is not None:
        first, second = first * valid, second * valid
    axes = (0, *range(2, first.ndim))
    both = (first * second).sum(axes)[1:]
    total = (first * first).sum(axes)[1:] + (second * second).sum(axes)[1:]
    return 1 - ((2 * both + SMOOTH) / (total + SMOOTH)).mean()
