"""The two generators of the similarity-based prototypes, each on nnU-Net's auto-configured U-Net."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_uda.networks.aspp import ASPP
from nnunet_uda.networks.image_decoder import ImageDecoder


class GeneratorOutput(NamedTuple):
    """What one pass of a generator gives; None where it was not asked for.

    Attributes:
        image: ``(B, C, *patch)`` the translation, z-scored, unbounded.
        segmentation: ``(B, K, *patch)`` logits; a list from fine to coarse with deep supervision.
        embedding: ``(B, D, *patch / 4)`` of unit length along D.
    """

    image: Tensor
    segmentation: list[Tensor] | Tensor
    embedding: Tensor


class SegmentingGenerator(nn.Module):
    """Encoder with skip connections, ASPP, image decoder, segmentation decoder and projection head.

    Encoder and segmentation decoder are ``unet``'s, as the plans configure them (plain or residual, 2D or 3D). ASPP
    stands at the bottleneck, before both decoders. With ``residual`` the image decoder's output is added to the image
    and starts at 0, so that translation starts as the identity and not at a random, perhaps inverted contrast. The
    projection head (1x1 convolution, ReLU, 1x1 convolution, L2 norm) reads the segmentation decoder's map at stride 4,
    or the bottleneck where the network never gets to stride 4.

    Args:
        unet: network from the plans, with ``encoder`` and ``decoder``.
        num_channels: image channels.
        patch_size: usual input size, for the ASPP's rates.
        aspp_rates: dilations, clamped to the bottleneck's size.
        embedding_dim: length D of the embeddings.
        residual: translation = image + image decoder's output.
    """

    def __init__(
        self,
        unet: Any,
        num_channels: int,
        patch_size: Sequence[int],
        aspp_rates: Sequence[int] = (1, 6, 12, 18),
        embedding_dim: int = 256,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.residual = residual
        encoder = unet.encoder
        self.encoder, self.decoder = encoder, unet.decoder
        strides = [stride if isinstance(stride, (list, tuple)) else [stride] * len(patch_size)
                   for stride in encoder.strides]  # fmt: skip
        total = [[math.prod(axis) for axis in zip(*strides[: stage + 1], strict=True)] for stage in range(len(strides))]
        bottleneck = [-(-length // step) for length, step in zip(patch_size, total[-1], strict=True)]
        self.embedding_stage = next((i for i, step in enumerate(total) if max(step) >= 4), len(total) - 1)

        features = encoder.output_channels[self.embedding_stage]
        self.aspp = ASPP(encoder.output_channels[-1], bottleneck, aspp_rates)
        self.image_decoder = ImageDecoder(encoder, num_channels)
        self.projection = nn.Sequential(
            encoder.conv_op(features, embedding_dim, 1),
            nn.ReLU(inplace=True),
            encoder.conv_op(embedding_dim, embedding_dim, 1),
        )
        del self.decoder.encoder  # the decoder only read its shapes; kept, its weights would be listed twice
        for added in (self.aspp, self.image_decoder, self.projection):
            added.apply(InitWeights_He(1e-2))
        if residual:
            nn.init.zeros_(self.image_decoder.head.weight)

    def forward(
        self,
        images: Tensor,
        *,
        image: bool = True,
        segmentation: bool = True,
        embedding: bool = True,
        deep_supervision: bool = False,
    ) -> GeneratorOutput:
        """One encoder pass, then what is asked for.

        Args:
            images: ``(B, C, *patch)`` z-scored.
            deep_supervision: return the segmentation at all resolutions.
        """
        skips = self.encoder(images)
        skips = [*skips[:-1], self.aspp(skips[-1])]
        translated = self.image_decoder(skips) if image else None
        if translated is not None and self.residual:
            translated = images + translated
        maps = decoder_maps(self.decoder, skips) if segmentation or embedding else []
        logits = None
        if segmentation:
            heads = list(self.decoder.seg_layers)
            logits = heads[-1](maps[0])
            if deep_supervision:
                logits = [logits, *(head(m) for head, m in zip(heads[-2::-1], maps[1:], strict=False))]
        embedded = None
        if embedding:
            embedded = F.normalize(self.projection(maps[self.embedding_stage]).float(), dim=1)
        return GeneratorOutput(translated, logits, embedded)  # type: ignore[arg-type] # who reads one has asked for it


def decoder_maps(decoder: UNetDecoder, skips: Sequence[Tensor]) -> list[Tensor]:
    """Feature maps of a U-Net decoder's stages before its heads, from fine to coarse, the bottleneck last."""
    maps = [skips[-1]]
    for upsample, stage, skip in zip(decoder.transpconvs, decoder.stages, reversed(skips[:-1]), strict=True):
        maps.append(stage(torch.cat((upsample(maps[-1]), skip), 1)))
    return maps[::-1]


class PrototypeNetwork(nn.Module):
    """Both generators, and the paper's averaged inference on target images.

    ``source_generator`` (G_S) reads source images and translates them to the target; ``target_generator`` (G_T) reads
    target images and translates them to the source.

    Args:
        source_generator: G_S.
        target_generator: G_T.
        deep_supervision: return logits at all resolutions.
    """

    def __init__(
        self,
        source_generator: SegmentingGenerator,
        target_generator: SegmentingGenerator,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.source_generator, self.target_generator = source_generator, target_generator
        self.deep_supervision = deep_supervision

    def forward(self, target: Tensor) -> list[Tensor] | Tensor:
        """Logits whose softmax is the mean of G_T's softmax on the image and G_S's on its translation.

        Args:
            target: ``(B, C, *patch)`` z-scored target images.

        Returns:
            ``(B, K, *patch)`` log probabilities, float32; a list from fine to coarse with deep supervision.
        """
        deep = self.deep_supervision
        direct = self.target_generator(target, embedding=False, deep_supervision=deep)
        by_source = self.source_generator(direct.image, image=False, embedding=False, deep_supervision=deep)
        if not deep:
            return mean_of_softmax(direct.segmentation, by_source.segmentation)
        return [mean_of_softmax(*pair) for pair in zip(direct.segmentation, by_source.segmentation, strict=True)]


def mean_of_softmax(first: Tensor, second: Tensor) -> Tensor:
    """log((softmax(first) + softmax(second)) / 2) over dimension 1, float32."""
    return torch.logaddexp(first.float().log_softmax(1), second.float().log_softmax(1)) - math.log(2)
