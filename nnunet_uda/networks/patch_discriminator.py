"""PatchGAN discriminator, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op, get_matching_instancenorm
from torch import Tensor, nn

from nnunet_uda.errors import UDAError

SHORT_AXIS = 16


class PatchDiscriminator(nn.Module):
    """PatchGAN (pix2pix, Isola et al. 2017; CISFA 4.2): each logit judges one patch, 70x70 with 3 layers.

    ``num_layers`` convolutions of kernel 4 and stride 2, one of stride 1, then one to a single channel; LeakyReLU 0.2,
    instance norm without affine except in the first and the last layer. Fully convolutional. An axis that is shorter
    than 16 when it reaches a layer has kernel 3 and stride 1 there, so that thin 3D axes and small patches work.

    Args:
        in_channels: image channels, or classes where it judges softmax probabilities.
        dimension: 2 or 3.
        patch_size: spatial shape of the usual input; decides which axes are short. Other input sizes are accepted.
        width: channels of the first layer; each layer doubles them, up to 8 times.
        num_layers: strided convolutions, at least 1.
    """

    def __init__(
        self, in_channels: int, dimension: int, patch_size: Sequence[int], width: int = 64, num_layers: int = 3
    ) -> None:
        super().__init__()
        if dimension not in (2, 3) or len(patch_size) != dimension or min(patch_size) < 1:
            raise UDAError(
                f"PatchDiscriminator: dimension is {dimension} and patch_size {tuple(patch_size)}; "
                "give 2 or 3, and as many lengths of at least 1."
            )
        if num_layers < 1 or width < 1:
            raise UDAError(f"PatchDiscriminator: num_layers is {num_layers}, width {width}; both must be at least 1.")
        conv = convert_dim_to_conv_op(dimension)
        norm = get_matching_instancenorm(conv)
        lengths = list(patch_size)
        channels = [in_channels, *(width * min(2**level, 8) for level in range(num_layers + 1)), 1]
        layers: list[nn.Module] = []
        for level in range(num_layers + 2):
            first, last = level == 0, level == num_layers + 1
            stride = 2 if level < num_layers else 1
            kernels = [3 if length < SHORT_AXIS else 4 for length in lengths]
            strides = [1 if length < SHORT_AXIS else stride for length in lengths]
            lengths = [(n + 2 - k) // s + 1 for n, k, s in zip(lengths, kernels, strides, strict=True)]
            layer = conv(channels[level], channels[level + 1], kernels, strides, padding=1, bias=first or last)
            nn.init.normal_(layer.weight, 0.0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            layers.append(layer)
            if not first and not last:
                layers.append(norm(channels[level + 1]))
            if not last:
                layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Judge patches.

        Args:
            x: ``(B, in_channels, *S)`` float: z-scored intensities, or probabilities in [0, 1].

        Returns:
            ``(B, 1, *s)`` logits (no final activation), high = real.
        """
        return self.layers(x)
