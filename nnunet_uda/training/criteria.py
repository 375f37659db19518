"""What can be said of a network's segmentations of target images without a target label.

:class:`TargetCriteria` gathers it over many images. All of it can be fooled, since none has seen the truth: see
``TargetCriteria.values``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nnunet_uda.data.random_style import change_looks
from nnunet_uda.losses.uncertainty import normalised_entropy
from nnunet_uda.training.neighbourhood import sample_pixels, snd

HIGHER_IS_BETTER = {
    "entropy": False,
    "foreground_entropy": False,
    "mutual_information": True,
    "agreement": True,
    "snd": True,
}
"""The criteria that :class:`TargetCriteria` gathers, and which way each of them points."""


def overlap_counts(first: Tensor, second: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Per foreground class: pixels that both hold, and the sum of what each holds; two ``(C - 1,)`` int64 tensors."""
    first, second = first.flatten().long(), second.flatten().long()
    both = torch.bincount(first[first == second], minlength=num_classes)
    total = torch.bincount(first, minlength=num_classes) + torch.bincount(second, minlength=num_classes)
    return both[1:num_classes], total[1:num_classes]


def dice_of_counts(both: Tensor, total: Tensor) -> Tensor:
    """Mean over classes of 2 both / total, 0 for a class without a pixel."""
    return (2 * both.double() / total.clamp(min=1)).mean().float()


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
        """The criteria by the names in ``HIGHER_IS_BETTER``, each in [0, 1]; at least one image has been added.

        entropy: mean over all pixels, divided by log C. Most pixels are background: a network that calls everything
        background with certainty has the best value.

        foreground_entropy: the same over the pixels segmented as foreground; 1, the worst, where there is none.

        mutual_information: entropy of the mean prediction minus mean entropy, by log C. High where pixels are certain
        and more than one class is found. It rewards equal shares of all classes, which no anatomy has.

        agreement: Dice of both segmentations over all images, mean over the foreground classes. A class that neither
        holds counts as 0: two segmentations that find nothing agree on nothing. A class that the images truly lack
        lowers all values alike. Wrong but stable segmentations agree too.

        snd: see :func:`snd`.
        """
        mean = self.entropy / self.pixels
        of_shares = float(normalised_entropy((self.shares / self.pixels)[None, :, None]))
        return {
            "entropy": mean,
            "foreground_entropy": self.found_entropy / self.found if self.found else 1.0,
            "mutual_information": max(0.0, of_shares - mean),
            "agreement": float(dice_of_counts(self.both, self.total)),
            "snd": self.snd / self.images,
        }
