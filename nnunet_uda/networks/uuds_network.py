"""The network of UUDS: everything that prediction needs, in one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_uda.networks.clip import build_clip, load_clip
from nnunet_uda.networks.clip.image_encoder import Encoded, running_statistics_kept
from nnunet_uda.networks.prompt_attention import PromptAttention
from nnunet_uda.networks.residual_decoder import ResidualDecoder
from nnunet_uda.networks.resnet_generator import InstanceNorm

NUM_LEVELS = 6
"""Resolutions of the decoders: from 1/32, that of CLIP's last map, to the image's own."""


class Generated(NamedTuple):
    """The generator's output.

    Attributes:
        image: ``(B, C, H, W)``, the reconstructed x^s of a source image, x^{t->s} of a target image; None where not
            asked for.
        maps: the image decoder's maps, coarse to fine, at the padded size.
        attention: ``(B, 1, h, w)``, that of the domain prompt.
    """

    image: Tensor | None
    maps: list[Tensor]
    attention: Tensor

    def part(self, which: slice) -> Generated:
        """Some of the batch's images."""
        image = None if self.image is None else self.image[which]
        return Generated(image, [level[which] for level in self.maps], self.attention[which])


class Segmented(NamedTuple):
    """The segmenter's output.

    Attributes:
        logits: ``(B, classes, H, W)``, or a list of them from fine to coarse with deep supervision.
        pooled: ``(B, K, c)``, the content that each class's prompt attends to.
        attention: ``(B, K, h, w)``, that of the segmentation prompts.
    """

    logits: list[Tensor] | Tensor
    pooled: Tensor
    attention: Tensor


class UUDSNetwork(nn.Module):
    """CLIP's encoders, DAM and image decoder (the generator), SAM and segmentation decoder.

    Source and target images take one road: encode, :meth:`generate` (DAM on X_c with X_d and T^d, image decoder),
    :meth:`segment` (SAM on X_c with T^s, segmentation decoder on that and on the image decoder's map of each level).
    Nothing else of the raw image's encoder reaches the segmentation decoder.

    ``forward`` is the road for prediction. It reads the prompts' embeddings from buffers, so that no text encoder
    runs for a patch: call :meth:`refresh_prompts` after training and before saving. They are part of ``state_dict``
    and so belong to the weights they come with.

    Args:
        shape: see ``clip_shape``.
        in_channels: image channels.
        num_classes: channels of the logits, background included.
        widths: channels of both decoders, fine to coarse (nnU-Net's ``features_per_stage``); the last one is repeated
            where there are fewer than six.
        num_outputs: resolutions with logits, from the finest on, 1 to 5.
        context_vectors: M.
        frozen_statistics: see ``ClipImageEncoder``.
        domain_prompt, segmentation_prompt: False for the ablations, whose DAM or SAM attends to all alike.
        normalised_skips: give the image decoder the encoder's maps of layer1 to layer3, through a 1 x 1 convolution
            and instance norm; not in the paper, whose decoder sees the DAM's map alone.
    """

    domain_embedding: Tensor
    class_embeddings: Tensor

    def __init__(
        self,
        shape: dict[str, Any],
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        num_outputs: int = 1,
        context_vectors: int = 16,
        frozen_statistics: bool = False,
        domain_prompt: bool = True,
        segmentation_prompt: bool = True,
        normalised_skips: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.domain_prompt, self.segmentation_prompt = domain_prompt, segmentation_prompt
        self.encoder, self.prompts = build_clip(shape, in_channels, num_classes - 1, context_vectors, frozen_statistics)
        embed_dim, content = self.encoder.embed_dim, self.encoder.channels[-1]
        self.channels = embed_dim
        self.domain_attention = PromptAttention(embed_dim, embed_dim, content, self.channels)
        self.segmentation_attention = PromptAttention(embed_dim, content, content, self.channels)

        widths = [*widths, *[widths[-1]] * NUM_LEVELS][:NUM_LEVELS][::-1]
        joining = [0, *widths[1:4], 0, 0] if normalised_skips else [0] * NUM_LEVELS
        self.skips = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1), InstanceNorm())
            for channels, width in zip(self.encoder.channels[3:0:-1], joining[1:4], strict=True)
            if width
        )
        self.image_decoder = ResidualDecoder(self.channels, widths, joining)
        self.image_head = nn.Conv2d(widths[-1], in_channels, 3, padding=1)
        self.segmentation_decoder = ResidualDecoder(self.channels, widths, widths)
        self.seg_layers = nn.ModuleList(nn.Conv2d(widths[-1 - i], num_classes, 1) for i in range(num_outputs))
        self.register_buffer("domain_embedding", torch.zeros(embed_dim))
        self.register_buffer("class_embeddings", torch.zeros(num_classes - 1, embed_dim))

    def set_prompts(self, domain_prompt: str, class_names: Sequence[str], clip_state: dict[str, Tensor] | None) -> None:
        """Set the prompts' words, and load CLIP's weights (None leaves them random)."""
        self.prompts.set_prompts(domain_prompt, class_names)
        if clip_state is not None:
            load_clip(self.encoder, self.prompts, clip_state)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what trainers call apart; the arguments are torch.compile's.

        Each is a function of its own: modules of one class share their compiled forms, and past Dynamo's limit of
        those (8) nothing more is compiled.
        """
        levels = torch.compile(self.encoder.find_levels, *args, **kwargs)
        self.encoder.find_levels = levels  # type: ignore[method-assign] # of this network alone
        self.generate = torch.compile(self.generate, *args, **kwargs)  # type: ignore[method-assign]
        self.segment = torch.compile(self.segment, *args, **kwargs)  # type: ignore[method-assign]

    @torch.no_grad()
    def refresh_prompts(self) -> None:
        """Bring the buffers that ``forward`` reads up to date with the text encoder."""
        domain, classes = self.prompts()
        self.domain_embedding.copy_(domain)
        self.class_embeddings.copy_(classes)

    def encode(self, images: Tensor, keep_statistics: bool = False) -> Encoded:
        """X_c, X_d and x_g of ``(B, C, H, W)`` images.

        Args:
            keep_statistics: leave batch norm's running statistics alone: prediction never encodes such images.
        """
        if not keep_statistics:
            return self.encoder(images, pool=self.domain_prompt)
        with running_statistics_kept(self.encoder):
            return self.encoder(images, pool=self.domain_prompt)

    def generate(self, encoded: Encoded, domain: Tensor, image: bool = True) -> Generated:
        """DAM (eq. 3) and image decoder; ``domain`` is T^d, ``(E,)``."""
        prompt = domain[None] if self.domain_prompt else None
        attended, attention, _ = self.domain_attention(prompt, encoded.tokens, encoded.levels[-1])
        skips = [skip(level) for skip, level in zip(self.skips, encoded.levels[3:0:-1], strict=False)]
        sides = [None, *skips, *[None] * (NUM_LEVELS - 1 - len(skips))]
        maps = self.image_decoder(attended, sides)
        made = self.image_head(maps[-1])[:, :, : encoded.size[0], : encoded.size[1]] if image else None
        return Generated(made, maps, attention)

    def segment(self, encoded: Encoded, generated: Generated, classes: Tensor) -> Segmented:
        """SAM and segmentation decoder; ``classes`` is T^s, ``(K, E)``."""
        content = encoded.levels[-1]
        prompts = classes if self.segmentation_prompt else None
        attended, attention, pooled = self.segmentation_attention(prompts, content, content)
        maps = self.segmentation_decoder(attended, generated.maps)
        height, width = encoded.size
        logits = [
            layer(features)[:, :, : height >> level, : width >> level]
            for level, (layer, features) in enumerate(zip(self.seg_layers, reversed(maps), strict=False))
            if level == 0 or self.deep_supervision
        ]
        return Segmented(logits if self.deep_supervision else logits[0], pooled, attention)

    def forward(self, images: Tensor) -> list[Tensor] | Tensor:
        """Segment ``(B, C, H, W)`` images of either domain by the road for target images."""
        encoded = self.encode(images)
        generated = self.generate(encoded, self.domain_embedding, image=False)
        return self.segment(encoded, generated, self.class_embeddings).logits
