"""Random contrasts between the tissues of an image, its anatomy kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SAMPLED = 2048
ROUNDS = 5
"""Of Lloyd's algorithm: clusters need not be the best ones, only tissues of similar intensity."""
BACKGROUND_SHARE = 0.05
BACKGROUND_WIDTH = 0.02
BLUR_BEFORE = (0.0, 0.8)
BLUR_OF_EDGES = (0.3, 0.8)
SPAN = 3.0
KEPT_TEXTURE = (-1.0, 1.0)
BLENDED_SHARE = (0.3, 1.0)


@torch.no_grad()
def cluster_contrast(image: Tensor, clusters: tuple[int, int] = (3, 6), *, generator: torch.Generator) -> Tensor:
    r"""The intensity clusters of an image in random intensities, as SynthSeg draws those of labels.

    Monotone curves and small random networks seldom change the order of three tissues, which differs between T1, T2 and
    FLAIR. Here each channel is split into K intensity clusters by k-means, and

    .. math:: y = a \, G(\mu_{k(x)} + t_{k(x)} (x - c_{k(x)})) + (1 - a) \, x

    k(x) is the cluster of a slightly blurred x and c its centre; its new mean mu ~ U(0, 3 s), s the channel's standard
    deviation, and the share of its texture t ~ U(-1, 1) are drawn for each cluster, a ~ U(0.3, 1) for the channel. G is
    a Gaussian blur of the maps of mu, t and c, so that clusters have soft edges.

    Where at least a twentieth of the image has its lowest value (air that was set to a constant, the outside of a skull
    that was stripped), these positions are no cluster: they get a value below all others, as in any other scan of that
    kind.

    Sources: SynthSeg (Billot et al., Medical Image Analysis 2023) for random intensities by region; clusters in place
    of labels as in FetalSynthSeg (Zalevskyi et al., 2024).

    Args:
        image: ``(C, *S)`` float, 2D or 3D, any scale.
        clusters: least and greatest K, both included, at least 2.
        generator: source of randomness, on the CPU.

    Returns:
        ``(C, *S)``, of the type of ``image``.
    """

    def uniform(low: float, high: float, number: int = 1) -> Tensor:
        return (low + (high - low) * torch.rand(number, generator=generator)).to(image.device)

    result = image.float().clone()
    for channel in result:
        deviation = channel.std(correction=0)
        if deviation == 0:
            continue
        background = lowest_positions(channel)
        inside = ~background
        number = int(torch.randint(clusters[0], clusters[1] + 1, (1,), generator=generator))
        smooth = gaussian_blur(channel[None], uniform(*BLUR_BEFORE).item())[0]
        centres = cluster_centres(smooth[inside], number, generator)
        nearest = torch.bucketize(smooth, (centres[1:] + centres[:-1]) / 2)
        means, texture = uniform(0, SPAN, number) * deviation, uniform(*KEPT_TEXTURE, number)
        maps = torch.stack([values[nearest] for values in (means, texture, centres)])
        mean, kept, centre = gaussian_blur(maps, uniform(*BLUR_OF_EDGES).item())
        drawn, share = mean + kept * (channel - centre), uniform(*BLENDED_SHARE)
        blended = share * (drawn - drawn[inside].mean()) + (1 - share) * (channel - channel[inside].mean())
        lowest = blended[inside].min() - uniform(0, 0.3) * deviation
        channel.copy_(torch.where(background, lowest, blended))
    return result.to(image.dtype)


def lowest_positions(channel: Tensor) -> Tensor:
    """Where an image has its lowest value, if that is at least a twentieth of it and not all: air, the outside of a
    skull that was stripped. ``(*S)`` to bool of the same shape.
    """
    lowest = channel <= channel.min() + BACKGROUND_WIDTH * channel.std(correction=0)
    return lowest & (BACKGROUND_SHARE <= lowest.float().mean()) & ~lowest.all()


def cluster_centres(values: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Centres ``(number,)`` of ``values`` ``(N,)`` by k-means from a random start, rising; of a random sample."""
    sample = values[torch.randint(len(values), (SAMPLED,), generator=generator).to(values.device)]
    centres = sample[:number].sort().values
    for _ in range(ROUNDS):
        nearest = torch.bucketize(sample, (centres[1:] + centres[:-1]) / 2)
        counts = torch.bincount(nearest, minlength=number)
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres).sort().values
    return centres


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Each of the maps ``(N, *S)``, 2D or 3D, blurred by ``sigma`` voxels; edges go on beyond the border."""
    reach = round(2.5 * sigma)
    if reach == 0:
        return maps
    places = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    dims = maps.ndim - 1
    convolve = F.conv2d if dims == 2 else F.conv3d
    blurred = maps[:, None]
    for axis in range(dims):
        size = [len(kernel) if axis == other else 1 for other in range(dims)]
        padding = [reach if axis == other else 0 for other in reversed(range(dims)) for _ in range(2)]
        blurred = convolve(F.pad(blurred, padding, mode="replicate"), (kernel / kernel.sum()).view(1, 1, *size))
    return blurred[:, 0]
