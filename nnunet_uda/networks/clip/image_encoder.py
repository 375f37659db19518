"""CLIP's image encoder with all its maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLE, LEAST = 32, 64


class Encoded(NamedTuple):
    """What the image encoder makes of images whose padded size is (H, W).

    Attributes:
        levels: maps of the stem (H/4), layer1 (H/4), layer2 (H/8), layer3 (H/16) and layer4 (H/32), each
            ``[B, channels[i], h, w]``; the last is X_c.
        tokens: ``(B, E, H/32, W/32)``, X_d: the attention pool's spatial tokens; None where not asked for.
        summary: ``(B, E)``, x_g: its token 0; None likewise.
        size: (H, W) of the images before padding.
    """

    levels: list[Tensor]
    tokens: Tensor | None
    summary: Tensor | None
    size: tuple[int, int]

    def part(self, which: slice) -> Encoded:
        """Some of the batch's images."""
        tokens, summary = (None if item is None else item[which] for item in (self.tokens, self.summary))
        return Encoded([level[which] for level in self.levels], tokens, summary, self.size)


class ClipImageEncoder(nn.Module):
    """CLIP's ModifiedResNet with all its maps, for images of any size and number of channels.

    Images are padded at the end of each axis (replicate) to a multiple of 32, at least 64. The attention pool's
    position embedding is interpolated bicubically from its own grid (7 x 7 in RN50); at that grid it is unchanged.

    CLIP wants three channels, (rgb - mean) / std. A z-scored grey image is taken for a grey picture with CLIP's mean
    and standard deviation: repeated to r = g = b, then normalised. Several channels go through a learned 1 x 1 map
    that starts at their mean as that grey picture.

    Args:
        visual: open_clip's ModifiedResNet.
        in_channels: image channels.
        frozen_statistics: batch norm always uses its running statistics (its weights are trained all the same).
    """

    def __init__(self, visual: Any, in_channels: int, frozen_statistics: bool = False) -> None:
        super().__init__()
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        self.visual = visual
        self.frozen_statistics = frozen_statistics
        self.to_rgb = nn.Conv2d(in_channels, 3, 1)
        mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
        assert self.to_rgb.bias is not None
        with torch.no_grad():
            self.to_rgb.weight.copy_((std.mean() / std / in_channels)[:, None, None, None])
            self.to_rgb.bias.copy_((mean.mean() - mean) / std)
        self.to_rgb.requires_grad_(in_channels > 1)
        width = visual.conv3.out_channels
        self.channels = [width, width * 4, width * 8, width * 16, width * 32]
        self.embed_dim = visual.attnpool.c_proj.out_features

    def train(self, mode: bool = True) -> ClipImageEncoder:
        super().train(mode)
        if self.frozen_statistics:
            for module in self.visual.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor, pool: bool = True) -> Encoded:
        """Encode ``(B, C, H, W)`` z-scored images; without ``pool`` X_d and x_g are not computed."""
        levels = self.find_levels(images)
        size = (images.shape[2], images.shape[3])
        if not pool:
            return Encoded(levels, None, None, size)
        tokens = self.attention_pool(levels[-1])
        height, width = levels[-1].shape[2:]
        return Encoded(levels, tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width)), tokens[:, 0], size)

    def find_levels(self, images: Tensor) -> list[Tensor]:
        """The maps of the stem and of the four layers, fine to coarse."""
        levels = [self.visual.stem(self.to_rgb(pad(images)))]
        for layer in (self.visual.layer1, self.visual.layer2, self.visual.layer3, self.visual.layer4):
            levels.append(layer(levels[-1]))
        return levels

    def attention_pool(self, features: Tensor) -> Tensor:
        """All output tokens of CLIP's attention pool, the pooled one first: ``(B, C, h, w)`` to ``(B, 1 + hw, E)``."""
        pool = self.visual.attnpool
        tokens = features.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positions(features.shape[2:])
        heads = (pool.num_heads, -1)
        query, key, value = (
            projection(tokens).unflatten(2, heads).transpose(1, 2)
            for projection in (pool.q_proj, pool.k_proj, pool.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return pool.c_proj(attended.transpose(1, 2).flatten(2))

    def positions(self, size: Sequence[int]) -> Tensor:
        """The position embedding for an ``h x w`` map, ``(1 + hw, C)``, the pooled token's first."""
        embedding = self.visual.attnpool.positional_embedding
        side = round((embedding.shape[0] - 1) ** 0.5)
        if tuple(size) == (side, side):
            return embedding
        grid = embedding[1:].T.reshape(1, -1, side, side).float()
        grid = F.interpolate(grid, tuple(size), mode="bicubic", align_corners=False)
        return torch.cat([embedding[:1], grid[0].flatten(1).T.to(embedding.dtype)])


def pad(images: Tensor) -> Tensor:
    """Pad the end of both axes (replicate) to a multiple of 32, at least 64."""
    extra = [max(LEAST, -(-size // MULTIPLE) * MULTIPLE) - size for size in images.shape[2:]]
    return F.pad(images, (0, extra[1], 0, extra[0]), mode="replicate") if any(extra) else images


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norm inside uses the batch's statistics in training as ever, but leaves the running ones alone."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
