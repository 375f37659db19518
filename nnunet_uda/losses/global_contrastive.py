"""Global contrastive loss of CISFA (equation 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_uda.collectives import gather_rows
from nnunet_uda.errors import UDAError


class GlobalContrastiveLoss(nn.Module):
    r"""NT-Xent (SimCLR, Chen et al. 2020) over t pairs of a source image and its own translation.

    .. math:: L_{gcl}(t) = -\frac{1}{2t} \sum_i \log
        \frac{\exp(z_i \cdot z_{j(i)} / \tau)}{\sum_{k \neq i} \exp(z_i \cdot z_k / \tau)}

    Args:
        temperature: tau, 0.2 in the paper.
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        if temperature <= 0:
            raise UDAError(
                f"Global contrastive temperature is {temperature}; set it to a number above 0 (0.2 in the paper)."
            )
        self.temperature = temperature

    def forward(self, z_source: Tensor, z_translated: Tensor) -> Tensor:
        """Loss over all 2t vectors, of all processes; row i of both arguments comes from the same image.

        Args:
            z_source: [t, C] float, projected features of the source images; L2-normalised here.
            z_translated: [t, C] float, those of their translations.

        Returns:
            Scalar, float32, also under autocast; 0 with a graph where t is 0, and 0 where t is 1 (no negatives).
        """
        with torch.autocast(z_source.device.type, enabled=False):
            z = torch.cat((gather_rows(z_source.float()), gather_rows(z_translated.float())))
            z = F.normalize(z, dim=1)
            count = z.shape[0]
            if count == 0:
                return z.sum()
            itself = torch.eye(count, dtype=torch.bool, device=z.device)
            similarity = (z @ z.T / self.temperature).masked_fill(itself, float("-inf"))
            pair = torch.arange(count, device=z.device).roll(count // 2)  # j(i) = i + t modulo 2t
            return F.cross_entropy(similarity, pair)  # eq 5
