"""Self-training: a teacher that is the student's average, its labels of target images, and when to trust them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nnunet_uda.losses.pseudo_label import agreed_labels, class_thresholds
from nnunet_uda.training.distributed import global_sum

MOMENTUM = 0.95
"""Of the running means over batches: class shares and class confidences."""


class Average(nn.Module):
    """The exponential average of a network's weights; remembers how many updates there were.

    Args:
        decay: d in [0, 1); teacher = d * teacher + (1 - d) * student. In the first steps d is less, (1 + n) / (10 + n)
            in step n from 0, so that the random start is soon forgotten.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, teacher: nn.Module, student: nn.Module) -> None:
        """Average parameters and floating buffers into ``teacher``; copy other buffers."""
        step = self.steps.item()
        decay = min(self.decay, (1 + step) / (10 + step))
        # not by state_dict: nnU-Net's decoder names the encoder's weights a second time
        pairs = [*zip(teacher.parameters(), student.parameters(), strict=True)]
        for own, new in zip(teacher.buffers(), student.buffers(), strict=True):
            if own.is_floating_point():
                pairs.append((own, new))
            else:
                own.copy_(new)
        average = get_ema_multi_avg_fn(decay)  # all tensors at once
        average([own for own, _ in pairs], [new for _, new in pairs], None)
        self.steps += 1


class SelfTraining(nn.Module):
    """All that self-training remembers; buffers only, so that a checkpoint holds it.

    Self-training starts when the teacher deserves it: its score, a quality times the share of the structures that it
    finds in plausible amounts, reaches ``start`` in the mean over epochs. From then on the weight rises by
    ``1 / ramp_epochs`` each epoch, and falls by as much when the score falls below.

    Args:
        num_classes: K, background included.
        confidence: the threshold of the surest class, see ``class_thresholds``.
        start: the score to reach, in [0, 1].
        ramp_epochs: epochs from weight 0 to 1, at least 1.
    """

    def __init__(self, num_classes: int, confidence: float, start: float, ramp_epochs: int) -> None:
        super().__init__()
        self.confidence, self.start, self.ramp_epochs = confidence, start, ramp_epochs
        self.register_buffer("score", torch.zeros(()))
        self.register_buffer("ramp", torch.zeros((), dtype=torch.int64))
        self.register_buffer("source_shares", torch.full((num_classes,), -1.0))
        self.register_buffer("class_confidence", torch.ones(num_classes))

    @property
    def weight(self) -> float:
        """From 0, not started, to 1."""
        return self.ramp.item() / self.ramp_epochs

    def thresholds(self) -> Tensor:
        """[K], see ``class_thresholds``."""
        return class_thresholds(self.class_confidence, self.confidence)

    @torch.no_grad()
    def observe_source(self, label: Tensor) -> None:
        """Remember how much of the labelled patches each class fills.

        Args:
            label: [B, 1, *S] integer, negative where nothing is known.
        """
        known = label[label >= 0].long()
        counts = global_sum(torch.bincount(known, minlength=len(self.source_shares)))
        if not counts.any():
            return
        shares = counts / counts.sum()
        new = MOMENTUM * self.source_shares + (1 - MOMENTUM) * shares
        self.source_shares.copy_(torch.where(self.source_shares < 0, shares, new))

    @torch.no_grad()
    def observe_target(self, probabilities: Tensor) -> None:
        """Remember how sure the teacher is of each class that it finds; ``probabilities`` is [B, K, *S]."""
        confidence, found = probabilities.float().max(1)
        confidence, found = confidence.flatten(), found.flatten()
        counts = global_sum(torch.bincount(found, minlength=probabilities.shape[1]))
        sums = global_sum(torch.zeros_like(self.class_confidence).index_add_(0, found, confidence))
        means = sums / counts.clamp(min=1)
        new = MOMENTUM * self.class_confidence + (1 - MOMENTUM) * means
        self.class_confidence.copy_(torch.where(counts > 0, new, self.class_confidence))

    def label(self, probabilities: Tensor, agreed: Tensor) -> Tensor:
        """Pseudo labels [B, *S] of ``seen_in_views``' result, see ``agreed_labels``."""
        return agreed_labels(probabilities, agreed, self.thresholds())

    def judge(self, quality: float, target_shares: Tensor, factor: float) -> float:
        """The score of an epoch, its mean over epochs, and the ramp; returns the score of this epoch.

        Args:
            quality: how well the teacher segments, as far as can be told without a target label, in [0, 1].
            target_shares: [K], how much of the target each class fills, counting only what the teacher is sure of.
            factor: shares within 1 / factor and factor times the source's are plausible.
        """
        expected, found = self.source_shares[1:], target_shares[1:].to(self.source_shares.device)
        plausible = (found * factor >= expected) & (found <= factor * expected) & (found > 0)
        score = quality * plausible.float().mean().item()
        self.score.copy_(0.5 * self.score + 0.5 * score)
        step = 1 if self.score >= self.start else -1
        self.ramp.add_(step).clamp_(0, self.ramp_epochs)
        return score


def class_shares(classes: Tensor, num_classes: int) -> Tensor:
    """[K] float, the share of each class among ``classes``, any shape; values outside 0 .. K - 1 belong to none."""
    flat = classes.flatten().long()
    counts = torch.bincount(flat[(flat >= 0) & (flat < num_classes)], minlength=num_classes)
    return counts / max(1, len(flat))


@torch.no_grad()
def seen_in_views(
    predict: Callable[[Tensor], Tensor], images: Tensor, views: int, mirror_axes: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """What a network makes of images and of ``views - 1`` changed versions, mirrored back.

    A version is mirrored along random axes and has another contrast (times 0.8 to 1.25), brightness (plus -0.2 to 0.2)
    and noise (deviation up to 0.1), one of each for an image. Random numbers are of torch's global generator.

    Args:
        predict: maps [B, C, *S] images to [B, K, *S] logits.
        images: [B, C, *S], z-scored.
        views: at least 1.
        mirror_axes: spatial axes, from 0, along which the network was trained to be mirrored; None for no mirroring.

    Returns:
        [B, K, *S] mean softmax, and [B, *S] bool, where all views have the same class.
    """
    total, classes, agreed = 0.0, None, None
    for view in range(views):
        axes = [axis + 2 for axis in mirror_axes or () if view > 0 and torch.rand(1).item() < 0.5]
        seen = images if view == 0 else _changed(images)
        probabilities = predict(seen.flip(axes)).float().softmax(1).flip(axes)
        total = total + probabilities / views
        found = probabilities.max(1).indices
        agreed = torch.ones_like(found, dtype=torch.bool) if classes is None else agreed & (found == classes)
        classes = found if classes is None else classes
    return total, agreed


def _changed(images: Tensor) -> Tensor:
    shape = (len(images), *[1] * (images.ndim - 1))
    contrast = 0.8 * (1.25 / 0.8) ** torch.rand(shape)
    brightness = 0.4 * torch.rand(shape) - 0.2
    noise = 0.1 * torch.rand(shape) * torch.randn(images.shape)
    return images * contrast.to(images) + (brightness + noise).to(images)
