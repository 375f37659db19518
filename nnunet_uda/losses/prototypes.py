"""Class prototypes of an embedding and the class-wise similarity loss, L_sim = L_sc + L_dc.

Similarity-based prototypes (Ye, Ju, Ma and Zhang, arXiv 2510.20596).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_uda.collectives import global_mean

IGNORED = -1
"""The label of a position that belongs to no class."""


def confident_labels(probabilities: Tensor, threshold: float) -> Tensor:
    """Pseudo labels: the most probable class where its probability is over ``threshold``, else ``IGNORED``.

    Args:
        probabilities: ``(B, K, *map)`` float, after softmax.
        threshold: from 0 (every position gets its class) to 1 (every position is ignored).

    Returns:
        ``(B, *map)`` int64, without a graph.
    """
    confidence, label = probabilities.detach().float().max(dim=1)
    return label.masked_fill(~(confidence > threshold), IGNORED)


def labels_at(label: Tensor, size: Sequence[int]) -> Tensor:
    """A ground truth at the size of a feature map, by nearest: position i takes voxel floor(i * patch / map).

    Args:
        label: ``(B, 1, *patch)`` integer; negative values mark what is to be ignored.
        size: spatial shape *size of the feature map.

    Returns:
        ``(B, *size)`` int64; negative values are ``IGNORED``.
    """
    return F.interpolate(label.float(), size=tuple(size), mode="nearest")[:, 0].long().clamp(min=IGNORED)


def class_prototypes(
    embedding: Tensor, labels: Tensor, num_classes: int, min_positions: int = 8
) -> tuple[Tensor, Tensor]:
    """Masked average of the embedding for each image and class, background included, then L2 norm.

    The gradient reaches the embedding through all classes that are present; none goes through the labels.

    Args:
        embedding: ``(B, D, *map)`` float.
        labels: ``(B, *map)`` integer; positions outside 0 .. num_classes - 1 (``IGNORED``) take no part.
        num_classes: K.
        min_positions: a class with fewer positions in an image, or with none, has no prototype there.

    Returns:
        Prototypes ``(B, K, D)`` float32, also under autocast, of unit length, or all 0 where there is none; and
        ``(B, K)`` bool, which there are.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        masks = _class_masks(labels, num_classes)
        counts = masks.sum(dim=2)
        present = counts >= max(min_positions, 1)
        sums = torch.einsum("bkp,bdp->bkd", masks.float(), embedding.float().flatten(2))
        means = sums / counts.clamp(min=1)[..., None]
        return F.normalize(means, dim=2) * present[..., None], present


def intra_class_loss(embedding: Tensor, labels: Tensor, prototypes: Tensor, present: Tensor) -> Tensor:
    """L_sc: mean of 1 - cos(embedding, own prototype), own meaning of the same image and class.

    The mean runs over all labelled positions of the batch, of all processes, whose class has a prototype in their
    image, each with the same share. The gradient reaches both the embedding and the prototypes.

    Args:
        embedding: ``(B, D, *map)`` float.
        labels: ``(B, *map)`` integer, as given to :func:`class_prototypes`.
        prototypes: ``(B, K, D)`` float, of :func:`class_prototypes`.
        present: ``(B, K)`` bool, of :func:`class_prototypes`.

    Returns:
        Scalar, float32, also under autocast; 0 with a graph where no position takes part.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        vectors = embedding.float().flatten(2)
        lengths = vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
        cosines = torch.einsum("bkd,bdp->bkp", prototypes.float(), vectors) / lengths
        own = _class_masks(labels, present.shape[1]) & present[..., None]
        return global_mean(((1 - cosines) * own).sum(), own.sum())


def inter_class_loss(prototypes: Tensor, present: Tensor) -> Tensor:
    """L_dc: mean of relu(cos) over the pairs of different classes present in the same image.

    Prototypes of different images are never compared. All pairs of the batch (of all processes) have the same
    share.

    Args:
        prototypes: ``(B, K, D)`` float, of :func:`class_prototypes`.
        present: ``(B, K)`` bool, of :func:`class_prototypes`.

    Returns:
        Scalar, float32, also under autocast; 0 with a graph where no image has two classes.
    """
    with torch.autocast(prototypes.device.type, enabled=False):
        prototypes = prototypes.float()
        cosines = torch.einsum("bkd,bjd->bkj", prototypes, prototypes)
        pairs = (present[:, :, None] & present[:, None, :]).triu(diagonal=1)
        return global_mean((cosines.relu() * pairs).sum(), pairs.sum())


def _class_masks(labels: Tensor, num_classes: int) -> Tensor:
    """One-hot ``(B, K, P)`` bool of labels ``(B, *map)``; all False where a label is outside the classes."""
    classes = torch.arange(num_classes, device=labels.device)
    return labels.flatten(1)[:, None] == classes[:, None]
