"""What the intensities of an image say about a network's labels: expectation maximisation with the network as prior."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 48
ROUNDS = 5
PERCENTILES = (0.002, 0.998)
SMOOTHING = 1.2
FLOOR = 1e-3
"""Share of each class's histogram that is spread over all bins, so that no intensity is impossible."""
SMALLEST_PRIOR = 1e-6


@torch.no_grad()
def intensity_posterior(probabilities: Tensor, images: Tensor) -> Tensor:
    r"""The class of each position by a network's opinion and by the intensities that its classes have in this image.

    A network that was trained on another contrast knows roughly where a structure lies and has the edges wrong. The
    image itself shows them: positions that are called one class mostly have its intensity. So each image, alone, is
    seen as a mixture whose prior at each position is the network's p, and whose classes have the intensity histograms
    h, found by expectation maximisation:

    .. math:: q_k(x) \propto p_k(x) \, h_k(I(x)), \qquad h_k(b) \propto \sum_{x: I(x) = b} q_k(x)

    h has ``BINS`` bins between two percentiles of the channel and is smoothed by a Gaussian. Over several channels
    the geometric mean of their h is taken, because channels are not independent.

    Sources: mixture models whose prior is a map of tissue probabilities (Van Leemput et al., IEEE TMI 1999; Ashburner
    and Friston, NeuroImage 2005); a network in place of the map, histograms in place of Gaussians.

    Args:
        probabilities: [B, K, *S] float, sums over K are 1.
        images: [B, C, *S] float, any scale.

    Returns:
        [B, K, *S] float32, sums over K are 1, without a graph.
    """
    prior = probabilities.float().flatten(2).clamp(min=SMALLEST_PRIOR)
    prior = prior / prior.sum(1, keepdim=True)
    bins = [_binned(channel) for channel in images.float().flatten(2).unbind(1)]
    posterior = prior
    for _ in range(ROUNDS):
        evidence = sum(_log_likelihood(posterior, channel) for channel in bins) / len(bins)
        posterior = (prior.log() + evidence).softmax(1)
    return posterior.view(probabilities.shape)


def _binned(values: Tensor) -> Tensor:
    """The bin of each of ``values`` [B, N] float, [B, N] int64; each row has its own range."""
    step = max(1, values.shape[1] // 2**16)  # torch.quantile takes 2**24 values
    shares = torch.tensor(PERCENTILES, device=values.device)
    low, high = torch.quantile(values[:, ::step], shares, dim=1)[..., None]
    return ((values - low) / (high - low).clamp(min=1e-6) * BINS).clamp(0, BINS - 1).long()


def _log_likelihood(posterior: Tensor, bins: Tensor) -> Tensor:
    """Log h_k at each position, [B, K, N], of ``posterior`` [B, K, N] and ``bins`` [B, N]."""
    number, classes, _ = posterior.shape
    index = bins[:, None].expand_as(posterior)
    histogram = posterior.new_zeros(number, classes, BINS).scatter_add_(2, index, posterior)
    reach = round(3 * SMOOTHING)
    places = torch.arange(-reach, reach + 1, device=posterior.device)
    kernel = torch.exp(-0.5 * (places / SMOOTHING) ** 2)
    padded = F.pad(histogram.flatten(0, 1)[:, None], (reach, reach), mode="replicate")
    histogram = F.conv1d(padded, (kernel / kernel.sum()).view(1, 1, -1)).view_as(histogram)
    histogram = histogram + (FLOOR * histogram.sum(2, keepdim=True) + FLOOR) / BINS
    return (histogram / histogram.sum(2, keepdim=True)).log().gather(2, index)
