"""Uncertainty of predictions, and the loss on those that are certain (UUDS, equations 5 to 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnunet_uda.collectives import global_sum

EPSILON = 1e-9
SMOOTH = 1e-5


def normalised_entropy(probabilities: Tensor) -> Tensor:
    """Predictive entropy over classes divided by log C: 0 where one class has all, 1 where all have the same.

    Args:
        probabilities: ``(B, C, *S)`` float in [0, 1], summing to 1 over C, C at least 2.

    Returns:
        ``(B, 1, *S)`` in [0, 1].
    """
    entropy = -(probabilities * (probabilities + EPSILON).log()).sum(1, keepdim=True)
    return (entropy / math.log(probabilities.shape[1])).clamp(0, 1)


def certain_pseudo_label(probabilities: Tensor, threshold: float, form: str = "entropy") -> tuple[Tensor, Tensor]:
    """The pseudo label and where it holds, both without gradient (eqs 5 to 7).

    Args:
        probabilities: ``(B, C, *S)`` float.
        threshold: chi. A position is certain where its uncertainty is below it.
        form: ``"entropy"``: u is the normalised entropy, the same for all classes, and the label is hard (one-hot).
            ``"printed"``: u = -Y log(Y + 1e-9) for each class alone, which is also small where Y is, and the label is
            Y itself.

    Returns:
        The label, ``(B, C, *S)`` float32, and the mask, ``(B, C, *S)`` bool.
    """
    probabilities = probabilities.detach().float()
    if form == "printed":
        uncertainty = -probabilities * (probabilities + EPSILON).log()  # eq. 5
        return probabilities, uncertainty < threshold  # eqs 6 and 7
    label = probabilities.max(1, keepdim=True).indices  # argmax takes 8 times as long across channels on a CPU
    hard = torch.zeros_like(probabilities).scatter_(1, label, 1)
    return hard, (normalised_entropy(probabilities) < threshold).expand_as(hard)


def uncertain_segmentation_loss(logits: Tensor, threshold: float = 0.2, form: str = "entropy") -> Tensor:
    """L_useg (eq. 8): Dice of the prediction with its own pseudo label, inside the certain mask only.

    Sums run over the batch of all processes and all certain positions; classes without certain foreground are left out.

    Args:
        logits: ``(B, C, *S)`` float, before softmax; class 0 is the background, which takes no part.
        threshold: chi, 0.2 by default; 0 trusts nothing.
        form: see :func:`certain_pseudo_label`.

    Returns:
        Scalar, float32, also under autocast; 0 with a graph where no foreground is certain.
    """
    with torch.autocast(logits.device.type, enabled=False):
        probabilities = logits.float().softmax(1)
        label, mask = certain_pseudo_label(probabilities, threshold, form)
        axes = (0, *range(2, logits.ndim))
        label, predicted = (label * mask)[:, 1:], (probabilities * mask)[:, 1:]
        size, overlap = global_sum(label.sum(axes)), global_sum((label * predicted).sum(axes))
        dice = (2 * overlap + SMOOTH) / (size + global_sum(predicted.sum(axes)) + SMOOTH)
        present = (size > 0).float()
        return ((1 - dice) * present).sum() / present.sum().clamp(min=1)
