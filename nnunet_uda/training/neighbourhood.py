"""Soft neighbourhood density of a network's outputs, a criterion that needs no label."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SND_PIXELS = 512
SND_TEMPERATURE = 0.05


def snd(vectors: Tensor, temperature: float = SND_TEMPERATURE) -> Tensor:
    r"""Soft neighbourhood density by log(P - 1); higher is better (Saito et al., ICCV 2021, arXiv 2108.10860, eqs 1-3).

    .. math:: P_{ij} = \frac{\exp(S_{ij} / \tau)}{\sum_{k \ne i} \exp(S_{ik} / \tau)}, \quad
              SND = \frac{1}{P} \sum_i - \sum_{j \ne i} P_{ij} \log P_{ij}

    S is the cosine similarity. Each pixel's similarities to the others, read as probabilities, have a high entropy
    where many neighbours are about equally near. Dividing by the largest possible value makes numbers of pixels
    comparable. Its known failure: predictions that have collapsed into one point, such as background everywhere, have
    the best value, 1.

    Args:
        vectors: ``(P, C)`` or ``(B, P, C)`` float, here softmax outputs of P pixels (see :func:`sample_pixels`), P at
            least 3. Pixels of different images are no neighbours; the mean runs over all.
        temperature: tau, 0.05 in the paper.

    Returns:
        Scalar in [0, 1].
    """
    unit = F.normalize(vectors.float(), dim=-1)
    similarity = unit @ unit.transpose(-1, -2)
    itself = torch.eye(unit.shape[-2], dtype=torch.bool, device=unit.device)
    log_p = (similarity / temperature).masked_fill(itself, -torch.inf).log_softmax(-1).masked_fill(itself, 0)
    density = -(log_p.exp().masked_fill(itself, 0) * log_p).sum(-1)
    return density.mean() / math.log(unit.shape[-2] - 1)


def sample_pixels(probabilities: Tensor, number: int = SND_PIXELS, seed: int = 0) -> Tensor:
    """The same randomly drawn pixels of every image, without touching torch's own random state.

    Args:
        probabilities: ``(B, C, *S)``.
        number: P; all pixels where there are fewer.

    Returns:
        ``(B, P, C)``.
    """
    flat = probabilities.flatten(2).transpose(1, 2)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(flat.shape[1], generator=generator)[:number]
    return flat[:, order.to(flat.device)]
