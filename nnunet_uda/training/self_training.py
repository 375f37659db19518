"""Self-training: a teacher that is the student's average, its labels of target images, and when to trust them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nnunet_uda.collectives import global_sum
from nnunet_uda.losses.pseudo_label import class_thresholds, confident_labels
from nnunet_uda.training.intensity_posterior import IntensityPosterior

MOMENTUM = 0.95
"""Of the running means of class confidences over batches."""


class Average(nn.Module):
    """The exponential average of a network's weights; remembers how many updates there were.

    Args:
        decay: d in [0, 1); teacher = d * teacher + (1 - d) * student. In the first steps d is less, (1 + n) / (10 + n)
            in step n from 0, so that the random start is soon forgotten.
    """

    steps: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, teacher: nn.Module, student: nn.Module) -> None:
        """Average parameters and floating buffers into ``teacher``; copy other buffers."""
        step = int(self.steps)
        decay = min(self.decay, (1 + step) / (10 + step))
        # not by state_dict: nnU-Net's decoder names the encoder's weights a second time
        pairs: list[tuple[Tensor, Tensor]] = [*zip(teacher.parameters(), student.parameters(), strict=True)]
        for own, new in zip(teacher.buffers(), student.buffers(), strict=True):
            if own.is_floating_point():
                pairs.append((own, new))
            else:
                own.copy_(new)
        average = get_ema_multi_avg_fn(decay)  # all tensors at once
        average([own for own, _ in pairs], [new for _, new in pairs], None)
        self.steps += 1


class SelfTraining(nn.Module):
    """Which of a teacher's labels can be trusted, by how sure it is of each class; a buffer, which a checkpoint holds.

    Args:
        num_classes: K, background included.
        confidence: the threshold of the surest class, see ``class_thresholds``.
    """

    class_confidence: Tensor

    def __init__(self, num_classes: int, confidence: float) -> None:
        super().__init__()
        self.confidence = confidence
        self.register_buffer("class_confidence", torch.ones(num_classes))

    @torch.no_grad()
    def observe(self, probabilities: Tensor) -> None:
        """Remember how sure the teacher is of each class that it finds; ``probabilities`` is ``(B, K, *S)``."""
        confidence, found = probabilities.float().max(1)
        confidence, found = confidence.flatten(), found.flatten()
        counts = global_sum(torch.bincount(found, minlength=probabilities.shape[1]))
        sums = global_sum(torch.zeros_like(self.class_confidence).index_add_(0, found, confidence))
        means = sums / counts.clamp(min=1)
        new = MOMENTUM * self.class_confidence + (1 - MOMENTUM) * means
        self.class_confidence.copy_(torch.where(counts > 0, new, self.class_confidence))

    def label(self, probabilities: Tensor) -> Tensor:
        """Pseudo labels ``(B, *S)`` of softmax outputs ``(B, K, *S)``, see ``confident_labels``."""
        return confident_labels(probabilities, class_thresholds(self.class_confidence, self.confidence))


@torch.no_grad()
def teachers_opinion(
    teacher: Callable[[Tensor], Tensor],
    images: Tensor,
    views: Sequence[Tensor],
    intensities: IntensityPosterior | None,
) -> Tensor:
    """Class probabilities ``(B, K, *patch)`` of images: the teacher's mean over them and their views, corrected.

    Args:
        teacher: ``(B, C, *patch)`` to logits.
        images: ``(B, C, *patch)`` as they are.
        views: the same in other styles.
        intensities: corrects the mean by the images' intensities; None leaves it.
    """
    probabilities = teacher(images).float().softmax(1)
    for view in views:
        probabilities = probabilities + teacher(view).float().softmax(1)
    mean = probabilities / (1 + len(views))
    return mean if intensities is None else intensities(mean, images)


@torch.no_grad()
def trusted_labels(
    opinion: Tensor, images: Tensor, trust: SelfTraining, intensities: IntensityPosterior | None
) -> Tensor:
    """``(B, *patch)`` labels of an opinion where they are sure, else ``IGNORED``; both modules remember what they saw.

    Args:
        opinion: of ``teachers_opinion``; the other arguments are those of it.
    """
    trust.observe(opinion)
    labels = trust.label(opinion)
    if intensities is not None:
        intensities.observe(labels, images)
    return labels
