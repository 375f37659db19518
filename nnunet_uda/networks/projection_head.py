"""Projection of a whole feature map to one vector."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionHead(nn.Module):
    """Global average pool, two-layer MLP, L2 norm: the head before the global contrastive loss (CISFA 3.3).

    Args:
        in_channels: channels of the feature map, for instance the segmenter's bottleneck.
        hidden: width of the hidden layer; None is ``in_channels``.
        dim: length of the vectors.
    """

    def __init__(self, in_channels: int, hidden: int | None = None, dim: int = 128) -> None:
        super().__init__()
        hidden = in_channels if hidden is None else hidden
        self.mlp = nn.Sequential(nn.Linear(in_channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``(B, in_channels, *S)``, float, 2D or 3D, to ``(B, dim)`` float32 vectors of unit length."""
        return F.normalize(self.mlp(features.flatten(2).mean(dim=2)).float(), dim=1)
