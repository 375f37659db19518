"""What can be said of a network's segmentations of target images without a target label.

Each function gives a scalar on tensors of one pass; :class:`TargetCriteria` gathers them over many images. All of them
can be fooled, since none has seen the truth: see each one's docstring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_uda.data.random_style import change_looks
from nnunet_uda.losses.uncertainty import normalised_entropy

HIGHER_IS_BETTER = {
    "entropy": False,
    "foreground_entropy": False,
    "mutual_information": True,
    "agreement": True,
    "snd": True,
}
"""The criteria that :class:`TargetCriteria` gathers, and which way each of them points."""

SND_PIXELS = 512
SND_TEMPERATURE = 0.05


def entropy(probabilities: Tensor) -> Tensor:
    """Mean over all pixels of the entropy divided by log C; lower is better.

    Most pixels are background, and a network that calls everything background with certainty has the best value.

    Args:
        probabilities: ``(B, C, *S)`` float, sums to 1 over C, C at least 2.

    Returns:
        Scalar in [0, 1].
    """
    return normalised_entropy(probabilities).mean()


def foreground_entropy(probabilities: Tensor) -> Tensor:
    """:func:`entropy` over the pixels that are segmented as foreground; 1, the worst, where there is none.

    Args:
        probabilities: ``(B, C, *S)`` float, class 0 is the background.

    Returns:
        Scalar in [0, 1].
    """
    found = probabilities.max(1, keepdim=True).indices > 0
    if not found.any():
        return probabilities.new_ones(())
    return normalised_entropy(probabilities)[found].mean()


def mutual_information(probabilities: Tensor) -> Tensor:
    """Entropy of the mean prediction minus mean entropy of the predictions, by log C; higher is better.

    High where pixels are certain and more than one class is found; 0 for one and the same prediction everywhere. It
    rewards equal shares of all classes, which no anatomy has.

    Args:
        probabilities: ``(B, C, *S)`` float.

    Returns:
        Scalar in [0, 1].
    """
    mean = probabilities.mean((0, *range(2, probabilities.ndim)))[None, :, None]
    return (normalised_entropy(mean).mean() - entropy(probabilities)).clamp(min=0)


def agreement(first: Tensor, second: Tensor, num_classes: int) -> Tensor:
    """Dice of two segmentations of the same images, mean over all foreground classes; higher is better.

    Sums run over the whole batch. A class that neither holds counts as 0: two segmentations that find nothing do not
    agree on anything, and one that finds fewer classes is not better for it. A class that the images truly lack lowers
    all values alike. Wrong but stable segmentations agree too.

    Args:
        first, second: ``(B, *S)`` integer classes, 0 is the background.
        num_classes: C, background included, at least 2.

    Returns:
        Scalar in [0, 1].
    """
    return dice_of_counts(*overlap_counts(first, second, num_classes))


def overlap_counts(first: Tensor, second: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Per foreground class: pixels that both hold, and the sum of what each holds; two ``(C - 1,)`` int64 tensors."""
    first, second = first.flatten().long(), second.flatten().long()
    both = torch.bincount(first[first == second], minlength=num_classes)
    total = torch.bincount(first, minlength=num_classes) + torch.bincount(second, minlength=num_classes)
    return both[1:num_classes], total[1:num_classes]


def dice_of_counts(both: Tensor, total: Tensor) -> Tensor:
    """Mean over classes of 2 both / total, 0 for a class without a pixel."""
    return (2 * both.double() / total.clamp(min=1)).mean().float()


def snd(vectors: Tensor, temperature: float = SND_TEMPERATURE) -> Tensor:
    r"""Soft neighbourhood density by log(P - 1); higher is better (Saito et al., ICCV 2021, arXiv 2108.10860, eqs 1-3).

    .. math:: P_{ij} = \frac{\exp(S_{ij} / \tau)}{\sum_{k \ne i} \exp(S_{ik} / \tau)}, \quad
              SND = \frac{1}{P} \sum_i - \sum_{j \ne i} P_{ij} \log P_{ij}

    S is the cosine similarity. Each pixel's similarities to the others, read as probabilities, have a high entropy
    where many neighbours are about equally near. Dividing by the largest possible value makes numbers of pixels
    comparable. Its known failure: predictions that have collapsed into one point, such as background everywhere, have
    the best value, 1.

    Args:
        vectors: ``(P, C)`` or ``(B, P, C)`` float, here softmax outputs of P pixels (see :func:`sample_pixels`), P at
            least 3. Pixels of different images are no neighbours; the mean runs over all.
        temperature: tau, 0.05 in the paper.

    Returns:
        Scalar in [0, 1].
    """
    unit = F.normalize(vectors.float(), dim=-1)
    similarity = unit @ unit.transpose(-1, -2)
    itself = torch.eye(unit.shape[-2], dtype=torch.bool, device=unit.device)
    log_p = (similarity / temperature).masked_fill(itself, -torch.inf).log_softmax(-1).masked_fill(itself, 0)
    density = -(log_p.exp().masked_fill(itself, 0) * log_p).sum(-1)
    return density.mean() / math.log(unit.shape[-2] - 1)


def sample_pixels(probabilities: Tensor, number: int = SND_PIXELS, seed: int = 0) -> Tensor:
    """The same randomly drawn pixels of every image, without touching torch's own random state.

    Args:
        probabilities: ``(B, C, *S)``.
        number: P; all pixels where there are fewer.

    Returns:
        ``(B, P, C)``.
    """
    flat = probabilities.flatten(2).transpose(1, 2)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(flat.shape[1], generator=generator)[:number]
    return flat[:, order.to(flat.device)]


def look_twice(
    predict: Callable[[Tensor], Tensor], images: Tensor, mirror_axes: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """What :meth:`TargetCriteria.add` takes: softmax of images, and the segmentation of them darkened and mirrored.

    The change is the same at every call, so that checkpoints are asked the same question. It is not two epochs of one
    training that are compared: these agree ever more as the learning rate falls, whatever they have learnt.

    Args:
        predict: maps ``(B, C, *S)`` images to ``(B, K, *S)`` logits.
        images: ``(B, C, *S)`` z-scored.
        mirror_axes: spatial axes, from 0, along which the network was trained to be mirrored; None for no mirroring.
    """
    axes = [axis + 2 for axis in mirror_axes or ()]
    again = predict(change_looks(images).flip(axes)).max(1).indices.flip([axis - 1 for axis in axes])
    return predict(images).float().softmax(1), again


class TargetCriteria:
    """All criteria over images that come one batch after another; every image, or patch, has the same size.

    Entropies, shares of classes and overlaps are sums over all pixels of all images, SND is the mean over images.

    Args:
        num_classes: C, background included.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.images = self.pixels = self.found = 0
        self.entropy = self.found_entropy = self.snd = 0.0
        self.shares = torch.zeros(num_classes, dtype=torch.float64)
        self.both = torch.zeros(num_classes - 1, dtype=torch.int64)
        self.total = torch.zeros(num_classes - 1, dtype=torch.int64)

    @torch.no_grad()
    def add(self, probabilities: Tensor, again: Tensor) -> None:
        """Take in images.

        Args:
            probabilities: ``(B, C, *S)`` float softmax outputs.
            again: ``(B, *S)`` integer, the segmentation of the same images after a change of their looks, in their
                place: its agreement with ``probabilities``' own segmentation is one of the criteria.
        """
        probabilities = probabilities.float()
        segmentation = probabilities.max(1).indices
        uncertainty = normalised_entropy(probabilities)[:, 0]
        found = segmentation > 0
        self.images += len(probabilities)
        self.pixels += segmentation.numel()
        self.found += int(found.sum())
        self.entropy += float(uncertainty.sum(dtype=torch.float64))
        self.found_entropy += float(uncertainty[found].sum(dtype=torch.float64))
        self.shares += probabilities.sum((0, *range(2, probabilities.ndim)), dtype=torch.float64).cpu()
        self.snd += len(probabilities) * float(snd(sample_pixels(probabilities)))
        both, total = overlap_counts(segmentation, again, self.num_classes)
        self.both += both.cpu()
        self.total += total.cpu()

    def values(self) -> dict[str, float]:
        """The criteria by the names in ``HIGHER_IS_BETTER``, each in [0, 1]; at least one image has been added."""
        mean = self.entropy / self.pixels
        of_shares = float(normalised_entropy((self.shares / self.pixels)[None, :, None]))
        return {
            "entropy": mean,
            "foreground_entropy": self.found_entropy / self.found if self.found else 1.0,
            "mutual_information": max(0.0, of_shares - mean),
            "agreement": float(dice_of_counts(self.both, self.total)),
            "snd": self.snd / self.images,
        }
