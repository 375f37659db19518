"""Another contrast of a domain's images, under which a network is surer of them than as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nnunet_uda.collectives import global_mean, global_sum
from nnunet_uda.data.cluster_contrast import lowest_positions
from nnunet_uda.data.random_style import quantiles, with_statistics_of
from nnunet_uda.training.later_buffers import LaterBuffers

SHARES = (0.005, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95, 0.995)
"""Of the intensities: where a curve's nodes lie."""
PATCHES = 16
"""That curves are tried on."""
EVALUATIONS = (8, 60)
"""Curves that are tried, at least and at most."""
STEPS_FOR_ONE = 25
"""A curve more for so many steps of the schedule, so that the search takes a twentieth of a short training."""
PARENTS = 6
KNOTS_OF_FIRST = (3, 6)
CHANGE = 0.25
"""Deviation of a mutation, in units of a curve's range."""
CROSSED = 0.3
"""Share of the new curves that are the mean of two."""
MARGIN_OF_LOWEST = 0.1
"""What stays the lowest lies so far under the rest, in units of a curve's range."""


class ContrastSearch(LaterBuffers):
    r"""Curves of intensity that make a domain's contrast one that a network knows, found without a label.

    A network that learned T1 and random contrasts knows some contrasts better than others, and says so: along a curve
    that makes fluid dark and white matter bright, it is surer of a T2 image than of the image itself, and right more
    often. So curves are drawn, tried on patches of the domain and bred: each channel's curve is piecewise linear
    between ``SHARES`` of the domain's intensities, rising or not. What a curve is worth is the Dice that the network
    expects of its own segmentation,

    .. math:: \frac{1}{K-1} \sum_{k=1}^{K-1}
              \frac{2 \sum_{x: \hat{y}(x) = k} p_k(x)}{\sum_x p_k(x) + |\{x: \hat{y}(x) = k\}|}

    Only curves that are worth more than the image as it is are kept. Each patch keeps its mean and deviation, and what
    is the lowest in at least a twentieth of it (air, the outside of a skull that was stripped) stays the lowest.

    Sources: a change of intensities alone that is adapted to a test domain (Karani et al., Medical Image Analysis
    2021), by the certainty of the network (Wang et al., Tent, ICLR 2021); a search in place of gradients, as the
    network's certainty has many maxima over curves.

    Args:
        kept: curves to keep, at most; where it is 0 there is nothing to search.
        masked: for each of the C channels whether it is 0 outside of nnU-Net's mask, ``use_mask_for_norm`` in the
            plans: that stays 0 and does not count.
    """

    places: Tensor
    curves: Tensor
    number: Tensor

    def __init__(self, kept: int, masked: Sequence[bool]) -> None:
        super().__init__()
        self.masked = list(masked)
        self.register_buffer("places", torch.zeros(len(masked), len(SHARES)))
        self.register_buffer("curves", torch.zeros(kept, len(masked), len(SHARES)))
        self.register_buffer("number", torch.tensor(-1))

    @property
    def searched(self) -> bool:
        return int(self.number) >= 0

    @torch.no_grad()
    def search(self, network: Callable[[Tensor], Tensor], batches: Sequence[Tensor], evaluations: int) -> list[float]:
        """Find curves for the domain that ``batches`` come from.

        Args:
            network: images ``(B, C, *S)`` to logits ``(B, K, *S)``.
            batches: of images ``(B, C, *S)``.
            evaluations: curves to try, those without a change included, at least 2.

        Returns:
            The expected Dice of the images as they are, then of each curve that is kept, falling.
        """
        self._set_places(batches)
        generator = torch.Generator().manual_seed(0)  # the same on every process
        unchanged = (self.places - self.places[:, :1]) / (self.places[:, -1:] - self.places[:, :1]).clamp(min=1e-6)
        own = expected_dice(network, batches)
        tried = [(own, unchanged)]
        while len(tried) < evaluations:
            tried.sort(key=lambda each: -each[0])
            if len(tried) == 1:
                curve = 1 - unchanged
            elif len(tried) <= evaluations // 3:
                curve = random_curves(len(unchanged), generator)
            else:
                curve = bred([parent for _, parent in tried[:PARENTS]], generator)
            changed = [self._along(curve, images) for images in batches]
            tried.append((expected_dice(network, changed), curve.to(unchanged)))
        tried.sort(key=lambda each: -each[0])
        better = [each for each in tried if each[0] > own][: len(self.curves)]
        for index, (_, curve) in enumerate(better):
            self.curves[index] = curve
        self.number.fill_(len(better))
        return [own, *(worth for worth, _ in better)]

    @torch.no_grad()
    def review(self, network: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> None:
        """Let go of the curves that are worth no more than the images as they are, now; arguments as for ``search``."""
        own = expected_dice(network, batches)
        curves = self.curves[: int(self.number)].clone()
        worth = [expected_dice(network, [self._along(curve, images) for images in batches]) for curve in curves]
        better = curves[torch.tensor(worth, device=curves.device) > own]
        self.curves[: len(better)] = better
        self.number.fill_(len(better))

    @torch.compiler.disable  # loops over patches of small tensors
    def forward(self, images: Tensor) -> list[Tensor]:
        """``images`` ``(B, C, *S)`` along each of the curves that were kept."""
        return [self._along(curve, images) for curve in self.curves[: max(0, int(self.number))]]

    def _set_places(self, batches: Sequence[Tensor]) -> None:
        for index, places in enumerate(self.places):
            channels = [image[index] for batch in batches for image in batch]
            values = [channel[self._inside(channel, index)] for channel in channels]
            values = [value[~lowest_positions(value)] for value in values if len(value) > 0]
            found = torch.tensor(quantiles(torch.cat(values or channels), SHARES), device=places.device)
            places.copy_(global_mean(found, torch.ones_like(found)))

    def _inside(self, channel: Tensor, index: int) -> Tensor:
        """Where a channel is not outside of the mask, ``(*S)`` bool."""
        return channel != 0 if self.masked[index] else torch.ones_like(channel, dtype=torch.bool)

    def _along(self, curve: Tensor, images: Tensor) -> Tensor:
        """``images`` ``(B, C, *S)`` along ``curve`` ``(C, NODES)``."""
        results = images.float().clone()
        curve, places = curve.to(images.device), self.places.to(images.device)
        for image in results:
            for index, channel in enumerate(image):
                inside = self._inside(channel, index)
                if inside.any():
                    channel[inside] = _changed(channel[inside], curve[index], places[index])
        return results.to(images.dtype)


def _changed(values: Tensor, nodes: Tensor, places: Tensor) -> Tensor:
    """Values ``(N,)`` along a curve, with their mean and deviation; those that are the lowest stay so."""
    changed, lowest = look_up_between(nodes, places, values), lowest_positions(values)
    floor = changed[~lowest].min() - MARGIN_OF_LOWEST * (nodes.max() - nodes.min())
    return with_statistics_of(values[None], torch.where(lowest, floor, changed)[None])[0]


def number_of_evaluations(steps: int) -> int:
    """Curves that a schedule of ``steps`` can afford to try."""
    least, most = EVALUATIONS
    return min(most, max(least, steps // STEPS_FOR_ONE))


def expected_dice(network: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> float:
    """The mean over the structures of the Dice that a network expects of its segmentation, see ``ContrastSearch``.

    A structure that it finds nowhere counts 0. Sums run over the batches of all processes.
    """
    sums: Tensor | None = None
    for images in batches:
        probabilities = network(images).float().softmax(1)
        num_classes = probabilities.shape[1]
        flat = probabilities.movedim(1, -1).reshape(-1, num_classes)
        sure, found = flat.max(1)
        overlap = torch.zeros(num_classes, device=flat.device).index_add(0, found, sure)
        here = torch.stack((overlap, flat.sum(0), torch.bincount(found, minlength=num_classes).float()))
        sums = here if sums is None else sums + here
    assert sums is not None
    overlap, expected, size = global_sum(sums)[:, 1:]
    return float((2 * overlap / (expected + size).clamp(min=1e-6)).mean())


def look_up_between(nodes: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of ``nodes`` ``(N,)``, given at rising ``places`` ``(N,)``, at ``values`` of any shape."""
    values = values.clamp(places[0], places[-1]).contiguous()
    right = torch.searchsorted(places.contiguous(), values).clamp(1, len(places) - 1)
    left = right - 1
    share = (values - places[left]) / (places[right] - places[left]).clamp(min=1e-6)
    return torch.lerp(nodes[left], nodes[right], share.clamp(0, 1))


def random_curves(channels: int, generator: torch.Generator) -> Tensor:
    """``(C, NODES)`` in [0, 1]: for each channel some uniform values at even nodes, linear between them."""
    least, most = KNOTS_OF_FIRST
    knots = int(torch.randint(least, most + 1, (1,), generator=generator))
    return stretched(torch.rand(channels, knots, generator=generator))


def bred(parents: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A curve ``(C, NODES)`` of those of ``parents``, changed, each channel from 0 to 1."""
    one, other = torch.randint(len(parents), (2,), generator=generator).tolist()
    curve = parents[one].cpu()
    if torch.rand(1, generator=generator) < CROSSED:
        curve = (curve + parents[other].cpu()) / 2
    knots = int(torch.randint(KNOTS_OF_FIRST[0], len(SHARES) + 1, (1,), generator=generator))
    curve = curve + CHANGE * stretched(torch.randn(len(curve), knots, generator=generator))
    low, high = curve.amin(1, keepdim=True), curve.amax(1, keepdim=True)
    return (curve - low) / (high - low).clamp(min=1e-6)


def stretched(knots: Tensor) -> Tensor:
    """``(C, n)`` values at even nodes to ``(C, NODES)``, linear between them."""
    return nn.functional.interpolate(knots[None], size=len(SHARES), mode="linear", align_corners=True)[0]
