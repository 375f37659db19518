"""ResNet image generator for unpaired translation, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_uda.errors import UDAError
from nnunet_uda.networks.lean import recomputed


def reflect_pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Pad ``(B, C, *S)`` by ``padding[axis]`` on both sides: reflect, or replicate on an axis that is no longer.

    Returns:
        ``(B, C, *(S + 2 padding))``, dtype of ``x``.
    """
    short = [size <= pad for size, pad in zip(x.shape[2:], padding, strict=True)]
    for mode, chosen in (("replicate", short), ("reflect", [not is_short for is_short in short])):
        if any(chosen):
            widths = [pad * use for pad, use in zip(padding, chosen, strict=True)]
            x = F.pad(x, [width for width in reversed(widths) for _ in range(2)], mode=mode)
    return x


class ReflectConv(nn.Module):
    """Convolution with odd kernel and reflect padding; weights start at normal(0, 0.02), the bias at 0."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        conv = convert_dim_to_conv_op(len(kernel))
        self.conv = conv(in_channels, out_channels, tuple(kernel), tuple(stride or (1,) * len(kernel)), bias=bias)
        self.padding = tuple(size // 2 for size in kernel)
        nn.init.normal_(self.conv.weight, 0.0, 0.02)
        if bias:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(reflect_pad(x, self.padding))


class InstanceNorm(nn.Module):
    """Instance norm without affine that lets a map of one single position pass (torch refuses it)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x) if x.shape[2:].numel() > 1 else x


class Stage(nn.Sequential):
    """Convolution, instance norm, ReLU; the map is first enlarged where a size is given."""

    lean = True

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        def made(x: Tensor) -> Tensor:
            return super(Stage, self).forward(x if size is None else F.interpolate(x, tuple(size), mode="nearest"))

        return recomputed(made, x) if self.lean else made(x)


class ResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), ``(B, C, *S)`` to ``(B, C, *S)``."""

    lean = True

    def __init__(self, channels: int, kernel: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ReflectConv(channels, channels, kernel),
            InstanceNorm(),
            nn.ReLU(inplace=True),
            ReflectConv(channels, channels, kernel),
            InstanceNorm(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + (recomputed(self.layers, x) if self.lean else self.layers(x))


class ResnetGenerator(nn.Module):
    """ResNet generator (CISFA 4.2; Zhu et al. 2017): stem, strided convolutions, residual blocks, upsampling, head.

    Instance norm without affine, ReLU, reflect padding. Each upsampling step is nearest interpolation to the size that
    the map had on its way down, then a convolution: any input size comes back, and no checkerboard arises. The output
    is linear, for z-scored intensities have no bounds.

    Stem and head have kernel 7, but 3 along an axis whose first stride is 1 (a thin axis of anisotropic 3D data); all
    other kernels are 3.

    Args:
        num_channels: image channels, of input and output alike.
        dimension: 2 or 3.
        width: channels of the stem; every strided convolution doubles them.
        num_blocks: residual blocks, at least 1.
        strides: one stride per axis for each strided convolution; None is two of stride 2 on every axis. Anisotropic
            3D, for instance: ((1, 2, 2), (2, 2, 2)).
        lean: keep fewer maps for the gradient, see ``recomputed``.
    """

    def __init__(
        self,
        num_channels: int,
        dimension: int,
        width: int = 64,
        num_blocks: int = 9,
        strides: Sequence[Sequence[int]] | None = None,
        lean: bool = True,
    ) -> None:
        super().__init__()
        if dimension not in (2, 3):
            raise UDAError(f"ResnetGenerator: dimension is {dimension}; it must be 2 or 3.")
        strides = [(2,) * dimension] * 2 if strides is None else [tuple(stride) for stride in strides]
        if not strides or any(len(stride) != dimension or min(stride) < 1 for stride in strides):
            raise UDAError(
                f"ResnetGenerator: strides are {strides}; give groups of {dimension} numbers of at least 1, "
                f"for instance {[(2,) * dimension] * 2}."
            )
        if num_blocks < 1 or width < 1:
            raise UDAError(f"ResnetGenerator: num_blocks is {num_blocks} and width {width}; both must be at least 1.")
        kernel = (3,) * dimension
        outer_kernel = tuple(3 if stride == 1 else 7 for stride in strides[0])
        channels = [width * 2**level for level in range(len(strides) + 1)]
        levels = list(zip(channels[:-1], channels[1:], strides, strict=True))

        self.stem = self._stage(num_channels, width, outer_kernel)
        self.down = nn.ModuleList(self._stage(low, high, kernel, stride) for low, high, stride in levels)
        self.blocks = nn.ModuleList(ResidualBlock(channels[-1], kernel) for _ in range(num_blocks))
        self.up = nn.ModuleList(self._stage(high, low, kernel) for low, high, _ in reversed(levels))
        self.head = ReflectConv(width, num_channels, outer_kernel, bias=True)
        for module in self.modules():
            if isinstance(module, Stage | ResidualBlock):
                module.lean = lean
        self.feature_channels: list[int] = [num_channels, *channels, channels[-1]]

    @staticmethod
    def _stage(
        in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int] | None = None
    ) -> Stage:
        return Stage(ReflectConv(in_channels, out_channels, kernel, stride), InstanceNorm(), nn.ReLU(inplace=True))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features for PatchNCE: the image itself and the encoder layers, nothing beyond the last of them computed.

        Args:
            x: ``(B, num_channels, *S)`` float, z-scored intensities.

        Returns:
            [x, stem, each strided convolution, residual block number num_blocks // 2], each [B, feature_channels[i],
            *s]; with two strides these are the image and 4 encoder layers.
        """
        features = [x, self.stem(x)]
        for stage in self.down:
            features.append(stage(features[-1]))
        hidden = features[-1]
        for block in self.blocks[: len(self.blocks) // 2 + 1]:
            hidden = block(hidden)
        return [*features, hidden]

    def decode(self, features: list[Tensor]) -> Tensor:
        """The translation ``(B, num_channels, *S)`` of the image whose features ``encode`` returned."""
        hidden = features[-1]
        for block in self.blocks[len(self.blocks) // 2 + 1 :]:
            hidden = block(hidden)
        for stage, low in zip(self.up, reversed(features[1:-2]), strict=True):
            hidden = stage(hidden, low.shape[2:])
        return self.head(hidden)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the two halves, which trainers call apart; the arguments are torch.compile's."""
        self.encode = torch.compile(self.encode, *args, **kwargs)  # type: ignore[method-assign] # of this one alone
        self.decode = torch.compile(self.decode, *args, **kwargs)  # type: ignore[method-assign]

    def forward_with_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One pass that gives both ``forward(x)`` and ``encode(x)``."""
        features = self.encode(x)
        return self.decode(features), features

    def forward(self, x: Tensor) -> Tensor:
        """Translate ``(B, num_channels, *S)`` z-scored intensities into an image of the same shape."""
        return self.forward_with_features(x)[0]
