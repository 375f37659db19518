"""What intensities say about a network's labels: expectation maximisation with the network as prior."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_uda.collectives import global_sum
from nnunet_uda.losses.prototypes import IGNORED
from nnunet_uda.training.later_buffers import LaterBuffers

BINS = 96
ROUNDS = 5
PERCENTILES = (0.1, 99.9)
SAMPLED = 50_000
"""Voxels of a scan that its percentiles are taken from."""
POSITIONS = 2**17
"""Of a patch, evenly chosen, that histograms are made of."""
SMOOTHING = 1.6
"""Of histograms, in bins."""
FLOOR = 1e-3
"""Share of each class's histogram that is spread over all bins, so that no intensity is impossible."""
SMALLEST_PRIOR = 1e-6
DOMAIN_SHARE = 0.3
"""For each class the domain's histogram counts as much as this share of the image's positions."""
MOMENTUM = 0.99
"""Of the domain's histograms over batches."""
DEGREES = 3.0
"""Of freedom of Student's t: its tails bear what does not belong to a structure and was called so."""
SMALLEST_SCALE = 1.5
"""Of Student's t, in bins."""


class IntensityPosterior(LaterBuffers):
    r"""The class of each position by a network's opinion and by the intensities of the classes, in domain and image.

    A network that was trained on another contrast knows roughly where a structure lies and has the edges wrong. The
    image itself shows them: positions that are called one class mostly have its intensity. So each image is seen as a
    mixture whose prior at each position is the network's p, and whose classes have intensity distributions f, found by
    expectation maximisation:

    .. math:: q_k(x) \propto p_k(x) \, f_k(I(x)), \qquad
              h_k(b) \propto \sum_{x: I(x) = b} q_k(x) + \lambda N \, d_k(b)

    f of the background is the histogram h. A structure has one intensity and a spread: its f is Student's t around the
    median of h. As a histogram it would keep a second mode, of whatever the network takes for the structure, and the
    error with it: on brains, grey matter in the place of cerebrospinal fluid.

    d is the histogram of the class in the domain, a running mean over the labels that were trusted (``observe``), N the
    number of positions. It decides for a class that is small in this image or not in it at all: the image alone would
    make a false label grow over everything of its intensity. The image's own part follows a scan that is brighter or
    darker than others.

    Intensities are binned between two percentiles of the domain (``set_range``); values beyond them are in the outer
    bins. Over several channels the geometric mean of their f is taken, because channels are not independent.

    Sources: mixture models whose prior is a map of tissue probabilities (Van Leemput et al., IEEE TMI 1999; Ashburner
    and Friston, NeuroImage 2005); a network in place of the map, Student's t in place of Gaussians (Peel and McLachlan,
    Statistics and Computing 2000).

    Args:
        num_classes: K, background included.
        num_channels: C.
    """

    low: Tensor
    high: Tensor
    domain: Tensor

    def __init__(self, num_classes: int, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(num_channels))
        self.register_buffer("high", torch.zeros(num_channels))
        self.register_buffer("domain", torch.zeros(num_channels, num_classes, BINS))

    @property
    def has_range(self) -> bool:
        return bool((self.high > self.low).all())

    def set_range(self, volumes: Iterable[np.ndarray]) -> None:
        """Bin between the percentiles of ``volumes``, each ``(C, *S)``, of the domain; forgets what was observed."""
        samples = [volume.reshape(len(volume), -1) for volume in volumes]
        samples = [flat[:, :: max(1, flat.shape[1] // SAMPLED)] for flat in samples]
        low, high = np.percentile(np.concatenate(samples, 1).astype(np.float64), PERCENTILES, axis=1)
        self.low.copy_(torch.from_numpy(low))
        self.high.copy_(torch.from_numpy(np.maximum(high, low + 1e-6)))
        self.domain.zero_()

    @torch.no_grad()
    def forward(self, probabilities: Tensor, images: Tensor) -> Tensor:
        """The posterior q.

        Args:
            probabilities: ``(B, K, *S)`` float, sums over K are 1.
            images: ``(B, C, *S)`` float, on the scale of ``set_range``.

        Returns:
            ``(B, K, *S)`` float32, sums over K are 1, without a graph.
        """
        prior = probabilities.float().flatten(2).clamp(min=SMALLEST_PRIOR)
        prior = prior / prior.sum(1, keepdim=True)
        bins = self._binned(images)
        step = max(1, prior.shape[2] // POSITIONS)
        few, few_bins = prior[..., ::step], [channel[:, ::step] for channel in bins]
        posterior = few
        for _ in range(ROUNDS - 1):
            posterior = _posterior(few, self._log_shares(posterior, few_bins), few_bins)
        return _posterior(prior, self._log_shares(posterior, few_bins), bins).view(probabilities.shape)

    @torch.no_grad()
    def observe(self, labels: Tensor, images: Tensor) -> None:
        """Remember the intensities of trusted labels, ``(B, *S)`` int64, ``IGNORED`` where there is none."""
        known = (labels != IGNORED)[:, None]
        members = F.one_hot(labels.clamp(min=0), self.domain.shape[1]).movedim(-1, 1) * known
        members, bins = members.flatten(2).float(), self._binned(images)
        step = max(1, members.shape[2] // POSITIONS)
        found = _histograms(members[..., ::step], [channel[:, ::step] for channel in bins])
        seen = torch.stack([each.sum(0) for each in found])
        self.domain.mul_(MOMENTUM).add_(global_sum(seen), alpha=1 - MOMENTUM)

    def _log_shares(self, posterior: Tensor, bins: list[Tensor]) -> list[Tensor]:
        """Log f ``(B, K, BINS)`` of each channel by ``posterior`` ``(B, K, N)`` at positions of ``bins`` ``(B, N)``."""
        domain = self.domain / self.domain.sum(2, keepdim=True).clamp(min=1e-6)
        shares = []
        for here, known in zip(_histograms(posterior, bins), domain, strict=True):
            mixed = here + DOMAIN_SHARE * posterior.shape[2] * known
            mixed = mixed + (FLOOR * mixed.sum(2, keepdim=True) + FLOOR) / BINS
            mixed = mixed / mixed.sum(2, keepdim=True)
            shares.append(torch.cat((mixed[:, :1].log(), _log_student_t(mixed[:, 1:])), 1))
        return shares

    def _binned(self, images: Tensor) -> list[Tensor]:
        """The bin of each position of ``images`` ``(B, C, *S)``, for each channel ``(B, N)`` int64."""
        values = images.float().flatten(2)
        low, high = self.low[:, None], self.high[:, None]
        return list(((values - low) / (high - low) * BINS).clamp(0, BINS - 1).long().unbind(1))


def _histograms(members: Tensor, bins: list[Tensor]) -> list[Tensor]:
    """Smoothed histograms ``(B, K, BINS)`` of ``members`` ``(B, K, N)`` for each channel's ``bins`` ``(B, N)``."""
    reach = round(3 * SMOOTHING)
    places = torch.arange(-reach, reach + 1, device=members.device)
    kernel = torch.exp(-0.5 * (places / SMOOTHING) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    found = []
    for channel in bins:
        histogram = members.new_zeros(*members.shape[:2], BINS)
        histogram.scatter_add_(2, channel[:, None].expand_as(members), members)
        padded = F.pad(histogram.flatten(0, 1)[:, None], (reach, reach), mode="replicate")
        found.append(F.conv1d(padded, kernel).view_as(histogram))
    return found


def _log_student_t(histograms: Tensor) -> Tensor:
    """The logarithm of Student's t over the bins of ``histograms`` ``(..., BINS)``, each of which sums to 1.

    Its place is their median, its scale half of the width of their middle 68 %.
    """
    below = histograms.cumsum(-1)
    lower, median, upper = ((below < share).sum(-1, keepdim=True) for share in (0.16, 0.5, 0.84))
    scale = ((upper - lower) / 2).clamp(min=SMALLEST_SCALE)
    distance = (torch.arange(BINS, device=histograms.device) - median) / scale
    return (-(DEGREES + 1) / 2 * torch.log1p(distance**2 / DEGREES)).log_softmax(-1)


def _posterior(prior: Tensor, log_shares: list[Tensor], bins: list[Tensor]) -> Tensor:
    """q, as ``prior`` ``(B, K, N)``, of it and of each channel's log f ``(B, K, BINS)`` and ``bins`` ``(B, N)``."""
    evidence = [
        shares.gather(2, channel[:, None].expand(-1, shares.shape[1], -1))
        for shares, channel in zip(log_shares, bins, strict=True)
    ]
    return (prior.log() + torch.stack(evidence).mean(0)).softmax(1)
