"""Pseudo labels that are confident enough, and the loss on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_uda.collectives import global_mean, global_sum
from nnunet_uda.losses.prototypes import IGNORED

SMOOTH = 1e-5
MAJORITY = 0.5


def class_thresholds(class_confidence: Tensor, confidence: float) -> Tensor:
    """A threshold for each class, lower where the network is less sure, so that no class is left out.

    tau_k = tau * c_k / max_j c_j with c the mean confidence of the pixels called k (as FreeMatch scales its own,
    Wang et al., ICLR 2023; tau is fixed here), and at least 0.5 where tau is: a label is more probable than all others
    together.

    Args:
        class_confidence: ``(K,)`` float in (0, 1].
        confidence: tau in [0, 1], the threshold of the surest class.

    Returns:
        ``(K,)`` float.
    """
    return (confidence * class_confidence / class_confidence.max()).clamp(min=min(MAJORITY, confidence))


def confident_labels(probabilities: Tensor, thresholds: Tensor) -> Tensor:
    """Pseudo labels where the confidence is over the class's threshold, else ``IGNORED``.

    Args:
        probabilities: ``(B, K, *S)`` float.
        thresholds: ``(K,)`` float.

    Returns:
        ``(B, *S)`` int64, without a graph.
    """
    confidence, label = probabilities.detach().float().max(dim=1)
    return label.masked_fill(confidence <= thresholds[label], IGNORED)


def pseudo_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus 1 - Dice over the labelled positions, each class with the same share in the Dice.

    Sums run over the batch, of all processes, and all labelled positions; Dice is the mean over the foreground classes
    that the labels hold. Half of the sum, so that its size is that of one loss.

    Args:
        logits: ``(B, K, *S)`` float, before softmax; class 0 is the background.
        labels: ``(B, *S)`` int64, ``IGNORED`` where there is no label. They get no gradient.

    Returns:
        Scalar, float32, also under autocast; 0 with a graph where nothing is labelled.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, labels = logits.float(), labels.detach()
        known = labels != IGNORED
        entropy = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        axes = (0, *range(2, logits.ndim))
        probabilities = logits.softmax(1) * known[:, None]
        reference = F.one_hot(labels.clamp(min=0), logits.shape[1]).movedim(-1, 1) * known[:, None]
        size = global_sum(reference.sum(axes)[1:])
        overlap = global_sum((probabilities * reference).sum(axes)[1:])
        dice = (2 * overlap + SMOOTH) / (size + global_sum(probabilities.sum(axes)[1:]) + SMOOTH)
        present = (size > 0).float()
        return 0.5 * (global_mean(entropy, known.sum()) + ((1 - dice) * present).sum() / present.sum().clamp(min=1))
