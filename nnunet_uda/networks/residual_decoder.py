"""Decoder of residual blocks and upsampling: the shape both of UUDS' decoders have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualDecoder(nn.Module):
    """One residual block a level; between levels nearest upsampling by 2. Instance norm, LeakyReLU.

    Args:
        in_channels: channels of the coarsest map.
        widths: channels of each level, coarse to fine.
        side_channels: channels of the map that joins at each level, coarse to fine; 0 for none.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], side_channels: Sequence[int]) -> None:
        super().__init__()
        before = [in_channels, *widths[:-1]]
        self.blocks = nn.ModuleList(
            BasicBlockD(
                nn.Conv2d, below + side, width, 3, 1, conv_bias=True, norm_op=nn.InstanceNorm2d,
                norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
            )
            for below, side, width in zip(before, side_channels, widths, strict=True)
        )  # fmt: skip
        self.apply(InitWeights_He(1e-2))

    def forward(self, x: Tensor, sides: Sequence[Tensor | None]) -> list[Tensor]:
        """Decode.

        Args:
            x: ``(B, in_channels, h, w)`` float.
            sides: one map a level, coarse to fine, [B, side_channels[i], h 2^i, w 2^i]; None where there is none.

        Returns:
            The maps of all levels, coarse to fine, [B, widths[i], h 2^i, w 2^i].
        """
        maps = []
        for level, (block, side) in enumerate(zip(self.blocks, sides, strict=True)):
            if level:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(x if side is None else torch.cat([x, side], 1))
            maps.append(x)
        return maps
