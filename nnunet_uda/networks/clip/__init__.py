"""CLIP with a ResNet image encoder (Radford et al. 2021), by open_clip: its shape, its weights, and both encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnunet_uda.errors import UDAError
from nnunet_uda.networks.clip.image_encoder import ClipImageEncoder
from nnunet_uda.networks.clip.prompts import DualPrompts
from nnunet_uda.networks.clip.shape import build_whole


def build_clip(
    shape: dict[str, Any], in_channels: int, num_structures: int, context_vectors: int, frozen_statistics: bool
) -> tuple[ClipImageEncoder, DualPrompts]:
    """Both encoders at random weights."""
    clip = build_whole(shape, DualPrompts.rows(num_structures, shape["text_cfg"]["context_length"]))
    encoder = ClipImageEncoder(clip.visual, in_channels, frozen_statistics)
    return encoder, DualPrompts(clip, num_structures, context_vectors)


@torch.no_grad()
def load_clip(encoder: ClipImageEncoder, prompts: DualPrompts, state: dict[str, Tensor]) -> None:
    """Put what :func:`read_clip_weights` returned into both encoders; the prompts must be set before."""
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    encoder.visual.load_state_dict(visual)
    text = {key: value for key, value in state.items() if not key.startswith("visual.")}
    prompts.load_tokens(text.pop("token_embedding.weight"))
    own = {"context", "tokens", "ends", "vocabulary", "token_embedding.weight"}
    missing, unexpected = prompts.load_state_dict(text, strict=False)
    if set(missing) != own or unexpected:
        raise UDAError(f"CLIP's text encoder does not fit: missing {missing}, not expected {unexpected}")
