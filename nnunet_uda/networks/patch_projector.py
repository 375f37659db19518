"""Sampling and projection of feature vectors for the patch-wise contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchProjector(nn.Module):
    """Vectors at random positions of each layer, through that layer's two-layer MLP, L2-normalised (CISFA 3.2).

    All MLPs exist from the start, so that an optimiser made from ``parameters()`` trains them. Weights and biases start
    at normal(0, 0.02); with zero biases an all-zero vector (masked background) would have no direction and an
    exploding gradient, and a one-channel image would have only its sign.

    Args:
        feature_channels: channels of each layer, the generator's ``feature_channels``.
        dim: width of the hidden layer and length of the projected vectors.
        num_patches: positions per layer; all of them where a layer has fewer.
    """

    def __init__(self, feature_channels: Sequence[int], dim: int = 128, num_patches: int = 256) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, dim), nn.ReLU(inplace=True), nn.Linear(dim, dim))
            for channels in feature_channels
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, 0.02)

    def sample_positions(self, features: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        """Draw positions for each layer, uniform and without replacement; all images of the batch share them.

        Args:
            features: one ``(B, C, *S)`` map per layer; only shape and device are read.
            generator: source of randomness; None is torch's global one (CPU).

        Returns:
            One ``(P,)`` int64 tensor per layer on that layer's device: flat positions in *S, last axis fastest.
        """
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (1,), generator=generator, device=device))
        random = np.random.default_rng(seed)  # draws few of many positions without permuting them all
        positions = []
        for feature in features:
            size = feature.shape[2:].numel()
            drawn = random.choice(size, min(self.num_patches, size), replace=False)
            positions.append(torch.from_numpy(drawn.astype(np.int64)).to(feature.device))
        return positions

    def forward(self, features: Sequence[Tensor], positions: Sequence[Tensor]) -> list[Tensor]:
        """Project the sampled vectors.

        Args:
            features: one ``(B, C, *S)`` float map per layer, 2D or 3D.
            positions: one ``(P,)`` int64 tensor per layer, from :meth:`sample_positions`.

        Returns:
            One ``(B, P, dim)`` float32 tensor per layer, of unit length along the last axis.
        """
        return [
            F.normalize(head(feature.flatten(2).index_select(2, where).transpose(1, 2)).float(), dim=-1)
            for head, feature, where in zip(self.heads, features, positions, strict=True)
        ]
