"""Atrous spatial pyramid pooling, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op, get_matching_instancenorm
from torch import Tensor, nn

from nnunet_uda.errors import UDAError


def clamped_rates(rates: Sequence[int], map_size: Sequence[int]) -> list[tuple[int, ...]]:
    """One dilation per axis for every rate, below half of the map on that axis and at least 1; equal ones once.

    A 3x3 kernel whose rate reaches half of the map sees mostly padding.
    """
    clamped = [tuple(max(1, min(rate, (length - 1) // 2)) for length in map_size) for rate in rates]
    return list(dict.fromkeys(clamped))


class ASPP(nn.Module):
    """Parallel dilated 3x3 convolutions, concatenated and mixed by a 1x1 convolution (Chen et al. 2018, DeepLab v3).

    Each convolution is followed by instance norm and LeakyReLU, as in nnU-Net's networks. Keeps channels and size.

    Args:
        channels: of the feature map.
        map_size: the feature map's spatial shape at the usual patch size; it limits the rates and gives the dimension.
        rates: dilations before ``clamped_rates``.
    """

    def __init__(self, channels: int, map_size: Sequence[int], rates: Sequence[int] = (1, 6, 12, 18)) -> None:
        super().__init__()
        if len(map_size) not in (2, 3) or not rates or min(rates) < 1:
            raise UDAError(
                f"ASPP: map_size is {tuple(map_size)} and rates {tuple(rates)}; give 2 or 3 lengths, and rates of at "
                "least 1"
            )
        conv = convert_dim_to_conv_op(len(map_size))
        norm = get_matching_instancenorm(conv)
        self.rates = clamped_rates(rates, map_size)

        def layer(in_channels: int, kernel: int, dilation: tuple[int, ...]) -> nn.Sequential:
            padding = tuple(rate * (kernel // 2) for rate in dilation)
            return nn.Sequential(
                conv(in_channels, channels, kernel, padding=padding, dilation=dilation, bias=False),
                norm(channels, affine=True),
                nn.LeakyReLU(inplace=True),
            )

        self.branches = nn.ModuleList(layer(channels, 3, rate) for rate in self.rates)
        self.mix = layer(channels * len(self.rates), 1, (1,) * len(map_size))

    def forward(self, features: Tensor) -> Tensor:
        """``(B, channels, *S)`` to the same shape."""
        return self.mix(torch.cat([branch(features) for branch in self.branches], 1))
