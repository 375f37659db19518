"""A slim decoder from nnU-Net's encoder to an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_convtransp
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn


class ImageDecoder(nn.Module):
    """nnU-Net's U-Net decoder with half the channels and one convolution a stage, and a linear 1x1 head.

    Translation takes about a quarter of a segmentation's operations.

    Args:
        encoder: nnU-Net's, plain or residual, 2D or 3D: its skips' channels, strides, kernels, norm and nonlinearity.
        num_channels: image channels.
    """

    def __init__(self, encoder: Any, num_channels: int) -> None:
        super().__init__()
        transposed = get_matching_convtransp(conv_op=encoder.conv_op)
        stages, upsamples, below = [], [], encoder.output_channels[-1]
        for stage in range(len(encoder.output_channels) - 2, -1, -1):
            skip, stride = encoder.output_channels[stage], encoder.strides[stage + 1]
            own = max(1, round(skip / 2))
            upsamples.append(transposed(below, own, stride, stride, bias=encoder.conv_bias))
            stages.append(StackedConvBlocks(
                1, encoder.conv_op, own + skip, own, encoder.kernel_sizes[stage], 1, encoder.conv_bias,
                encoder.norm_op, encoder.norm_op_kwargs, encoder.dropout_op, encoder.dropout_op_kwargs,
                encoder.nonlin, encoder.nonlin_kwargs,
            ))  # fmt: skip
            below = own
        self.upsamples, self.stages = nn.ModuleList(upsamples), nn.ModuleList(stages)
        self.head = encoder.conv_op(below, num_channels, 1, bias=True)

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        """``(B, num_channels, *S)`` from the encoder's maps, fine to coarse."""
        below = skips[-1]
        for upsample, stage, skip in zip(self.upsamples, self.stages, reversed(skips[:-1]), strict=True):
            below = stage(torch.cat((upsample(below), skip), 1))
        return self.head(below)
