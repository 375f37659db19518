"""Random appearance with the anatomy kept: images through random convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def random_convolution(
    images: Tensor,
    *,
    kernel_sizes: Sequence[int] = (1, 3),
    layers: int = 4,
    hidden_channels: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Global intensity non-linear augmentation, GIN (Ouyang et al. 2022, Causality-inspired Single-source Domain
    Generalization for Medical Image Segmentation).

    Each image of the batch passes a random network of its own, ``layers`` convolutions with leaky ReLU between them,
    is blended with itself by a random share, alpha * net(x) + (1 - alpha) * x, and is scaled to the Frobenius norm
    that it had. Weights, biases ~ N(0, 1) and alpha ~ U[0, 1] differ by image; a layer's kernel size does not.

    Random numbers are drawn where ``generator`` lives, or by the global generator of the CPU, so that a seed gives the
    same networks on every device.

    Args:
        images: ``(B, C, *patch)`` float, B at least 1, z-scored, 2D or 3D.
        kernel_sizes: odd numbers, one of which is drawn for each layer.
        layers: number of convolutions, at least 1.
        hidden_channels: channels between them; 2 in the authors' work.
        generator: source of randomness.

    Returns:
        ``(B, C, *patch)``, of the type of ``images``, without a graph.
    """
    if layers < 1 or not kernel_sizes or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
        raise ValueError(f"random_convolution needs layers and odd kernel sizes, not {layers} and {kernel_sizes}")
    batch, channels = images.shape[:2]
    dims = images.ndim - 2
    convolve = F.conv2d if dims == 2 else F.conv3d
    where = torch.device("cpu") if generator is None else generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=where).to(images.device)

    widths = [channels, *[hidden_channels] * (layers - 1), channels]
    chosen = torch.randint(len(kernel_sizes), (layers,), generator=generator, device=where).tolist()
    with torch.autocast(images.device.type, enabled=False):
        inputs = images.float()
        maps = inputs.flatten(0, 1)[None]  # one group of the convolution for each image
        for layer in range(layers):
            width_in, width_out, size = widths[layer], widths[layer + 1], kernel_sizes[chosen[layer]]
            if layer > 0:
                maps = F.leaky_relu(maps)
            kernel = normal(batch * width_out, width_in, *[size] * dims)
            maps = convolve(maps, kernel, normal(batch * width_out), padding=size // 2, groups=batch)
        share = torch.rand((batch, *[1] * (dims + 1)), generator=generator, device=where).to(images.device)
        blended = share * maps.view_as(inputs) + (1 - share) * inputs
        return (blended * (_norm(inputs) / _norm(blended).clamp(min=1e-12))).to(images.dtype)


def _norm(images: Tensor) -> Tensor:
    """Frobenius norm of each image over channels and positions, ``(B, 1, *1)``."""
    return torch.linalg.vector_norm(images, dim=tuple(range(1, images.ndim)), keepdim=True)
