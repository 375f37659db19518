"""Source volumes in random styles of graded strength, mild to wild, whose labels stay known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_uda.data.cluster_contrast import cluster_contrast, gaussian_blur
from nnunet_uda.data.random_convolution import random_convolution
from nnunet_uda.data.random_style import location_scale, smooth_random_map, with_statistics_of


def degrade(
    volume: Tensor, label: np.ndarray, spacing: Sequence[float], strength: float, seed: int
) -> tuple[Tensor, np.ndarray, list[float]]:
    """Change a volume: another contrast, noise, blur, shading, a lower resolution, another voxel size, or cut off.

    Which of these, and how much of each, is drawn; all grow with ``strength``. The image is z-scored at the end, as a
    scan is at prediction.

    Args:
        volume: ``(C, Z, Y, X)`` z-scored.
        label: ``(Z, Y, X)``.
        spacing: mm for each axis.
        strength: 0 leaves the volume as it is; at 1 few networks find much.
        seed: of what is drawn.

    Returns:
        Image, label and spacing: cut off and resized together.
    """
    if strength == 0:
        return volume, label, list(spacing)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    spacing = list(spacing)
    if rng.random() < 0.4:
        volume, label = _cut_off(volume, label, strength, rng)
    if rng.random() < 0.4:
        volume, label, spacing = _resized(volume, label, spacing, math.exp(strength * rng.uniform(-0.6, 0.6)))
    reference = volume
    image = _restyled(volume, strength, rng, generator)
    if rng.random() < 0.5:
        field = smooth_random_map(image.shape[1:], generator=generator) - 0.5
        image = image * (1 + 2 * strength * rng.uniform(-1, 1) * field) + strength * rng.uniform(-1, 1) * field
    if rng.random() < 0.5:
        image = gaussian_blur(image.flatten(0, 1), strength * rng.uniform(0, 3)).view_as(image)  # each slice
    if rng.random() < 0.3:
        size = [max(4, round(length / (1 + 4 * strength * rng.random()))) for length in image.shape[2:]]
        low = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
        image = F.interpolate(low, image.shape[2:], mode="bilinear", align_corners=False)
    if rng.random() < 0.5:
        noise = torch.randn(image.shape, generator=generator)
        image = image + strength**2 * rng.uniform(0, 2) * noise * image.std()
    return with_statistics_of(reference, image), label, spacing


def _restyled(volume: Tensor, strength: float, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """Blend the volume with one of four other contrasts, the more the stronger."""
    kind = int(rng.integers(4))
    if kind == 0:
        styled = cluster_contrast(volume, generator=generator)
    elif kind == 1:
        styled = location_scale(volume, generator=generator)
    elif kind == 2:
        styled = random_convolution(volume[None], generator=generator)[0]
    else:
        styled = -volume
    styled = with_statistics_of(volume, styled)
    return torch.lerp(volume, styled, min(1.0, 1.3 * strength))


def _cut_off(volume: Tensor, label: np.ndarray, strength: float, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Cut off a part at one end of one axis, at most half of it; at least 4 voxels stay."""
    axis = int(rng.integers(3))
    length = label.shape[axis]
    lost = min(round(length * strength * rng.uniform(0, 0.5)), max(0, length - 4))
    start = lost if rng.random() < 0.5 else 0
    kept = [slice(None)] * 3
    kept[axis] = slice(start, start + length - lost)
    return volume[(slice(None), *kept)], label[tuple(kept)]


def _resized(
    volume: Tensor, label: np.ndarray, spacing: list[float], factor: float
) -> tuple[Tensor, np.ndarray, list[float]]:
    """Resample the slices: the extent in mm stays, so the network sees everything in another size."""
    size = [label.shape[0], *(max(8, round(length * factor)) for length in label.shape[1:])]
    image = F.interpolate(volume[None], size, mode="trilinear", align_corners=False)[0]
    resized = F.interpolate(torch.from_numpy(label.astype(np.float32))[None, None], size, mode="nearest")[0, 0]
    new = [step * old / now for step, old, now in zip(spacing, label.shape, size, strict=True)]
    return image, resized.numpy().astype(label.dtype), new
