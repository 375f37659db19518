"""A translation generator that a random style code modulates: one image, many translations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_uda.networks.resnet_generator import ResnetGenerator

MAPPING_WIDTH = 64


class StyleResnetGenerator(ResnetGenerator):
    """ResNet generator whose later half scales and shifts its channels as a style code says.

    The code passes two layers; from these each stage after ``encode`` takes a scale and a shift for every channel,
    hidden * (1 + scale) + shift, as in conditional instance normalisation (Dumoulin et al. 2017). ``encode``, and with
    it PatchNCE, knows no style: an image is encoded once for several translations.

    Args:
        num_channels, dimension, width, num_blocks, strides, skips: see :class:`ResnetGenerator`.
        style_dim: length of the code, at least 1; its entries are standard normal.
    """

    def __init__(
        self,
        num_channels: int,
        dimension: int,
        width: int = 64,
        num_blocks: int = 9,
        strides: Sequence[Sequence[int]] | None = None,
        *,
        style_dim: int = 8,
        skips: bool = False,
    ) -> None:
        super().__init__(num_channels, dimension, width, num_blocks, strides, skips)
        self.style_dim = style_dim
        lowest = width * 2 ** len(self.up)
        widths = [lowest] * (num_blocks - num_blocks // 2 - 1) + [lowest // 2 ** (i + 1) for i in range(len(self.up))]
        self.mapping = nn.Sequential(
            nn.Linear(style_dim, MAPPING_WIDTH), nn.LeakyReLU(0.2), nn.Linear(MAPPING_WIDTH, MAPPING_WIDTH),
            nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.modulations = nn.ModuleList(nn.Linear(MAPPING_WIDTH, 2 * channels) for channels in widths)

    def decode(self, features: list[Tensor], code: Tensor | None = None) -> Tensor:
        """The translation of the image whose features ``encode`` returned.

        Args:
            features: of ``encode``.
            code: [B, style_dim] float; None is the code 0, the middle of all styles.

        Returns:
            [B, num_channels, *S].
        """
        hidden = features[-1]
        if code is None:
            code = hidden.new_zeros(len(hidden), self.style_dim)
        style = self.mapping(code)
        for (stage, low), modulation in zip(self.late_stages(features), self.modulations, strict=True):
            hidden = self.late_stage(stage, hidden, low)
            scale, shift = modulation(style)[(..., *[None] * (hidden.ndim - 2))].chunk(2, dim=1)
            hidden = hidden * (1 + scale) + shift
        return self.head(hidden)

    def draw_codes(self, number: int) -> Tensor:
        """[number, style_dim] standard normal codes, of torch's global generator on the CPU."""
        return torch.randn(number, self.style_dim).to(self.head.conv.weight.device)

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        """Translate [B, num_channels, *S] z-scored intensities in the style of ``code``, see ``decode``."""
        return self.decode(self.encode(x), code)
