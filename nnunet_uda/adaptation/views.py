"""Other views of patches: moved by a random affine map that can be undone, and in random styles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ROTATION, SCALING, SHIFT = 0.35, 0.15, 0.1
"""Largest angle (radians), logarithm of the zoom, and shift as a share of half the patch."""


def random_affine(number: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Maps of ``affine_grid``: each turns and zooms in the plane of the last two axes, and shifts there.

    Args:
        number: B.
        size: of a patch, 2 or 3 axes.

    Returns:
        ``(B, D, D + 1)`` float32, on the CPU.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    angle, zoom = uniform(number) * ROTATION, torch.exp(uniform(number) * SCALING)
    cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    height, width = size[-2:]  # a turn in voxels, in units of half the patch
    maps = torch.eye(len(size), len(size) + 1).repeat(number, 1, 1)
    maps[:, 0, 0], maps[:, 0, 1] = cosine, -sine * height / width
    maps[:, 1, 0], maps[:, 1, 1] = sine * width / height, cosine
    maps[:, :2, -1] = uniform(number, 2) * SHIFT
    return maps


def inverse(maps: Tensor) -> Tensor:
    """What undoes ``maps``."""
    row = torch.zeros_like(maps[:, :1])
    row[..., -1] = 1
    return torch.linalg.inv(torch.cat([maps, row], 1))[:, :-1]


def warp(images: Tensor, maps: Tensor, mode: str = "bilinear") -> Tensor:
    """``(B, C, *S)`` images moved by ``maps``; zeros come in from outside."""
    grid = F.affine_grid(maps.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), mode=mode, padding_mode="zeros", align_corners=False)


def restyled(images: Tensor, styles: Callable[..., dict], masked: Sequence[bool]) -> Tensor:
    """Each image of ``(B, C, *S)`` in a random style of its own.

    Args:
        styles: of ``data.random_style.style_transforms``.
        masked: for each channel whether it is 0 outside of nnU-Net's mask: what is, stays 0.
    """
    changed = []
    for image in images.cpu():
        outside = torch.zeros(image.shape[1:], dtype=torch.int16)
        if any(masked):
            outside[(image[[index for index, one in enumerate(masked) if one]] == 0).all(0)] = -1
        changed.append(styles(image=image, segmentation=outside[None])["image"])
    return torch.stack(changed).to(images.device)
