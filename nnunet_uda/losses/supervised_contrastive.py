"""In-batch supervised contrastive loss of UUDS (equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_uda.collectives import gather_rows


def supervised_contrastive_loss(vectors: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    r"""L_BSCL (SupCon, Khosla et al. 2020) over slices that hold the object and slices that do not.

    .. math:: \sum_i \frac{-1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{\exp(z_i \cdot z_p / \tau)}{\sum_{a \in A(i)} \exp(z_i \cdot z_a / \tau)}

    i runs over the batch, of all processes. P(i) are the others with i's label, A(i) all others. An i without any P(i)
    is skipped; the mean over those that count, which does not depend on the batch's size, stands for the printed sum.

    Args:
        vectors: ``(B, C)`` float; L2-normalised here.
        labels: ``(B,)`` bool, whether the slice holds the object.
        temperature: tau, above 0; the paper gives none.

    Returns:
        Scalar, float32, also under autocast; 0 with a graph where no i counts.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors, labels = gather_rows(vectors.float()), gather_rows(labels)
        z = F.normalize(vectors, dim=1)
        same = labels[:, None] == labels[None]
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = same & ~itself
        counts = positive.any(1)
        if not counts.any():
            return vectors.sum() * 0
        similarity = z @ z.T / temperature
        total = similarity.masked_fill(itself, float("-inf"))[counts].logsumexp(1)
        of_positives = (similarity * positive)[counts].sum(1) / positive[counts].sum(1)
        return (total - of_positives).mean()  # eq. 4
