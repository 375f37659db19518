"""Which epoch's weights become ``checkpoint_best``: by a criterion that needs no target label."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from torch import Tensor

from nnunet_uda.settings import UDASettings
from nnunet_uda.training.checkpoint import BEST, plain
from nnunet_uda.training.criteria import HIGHER_IS_BETTER, TargetCriteria, look_twice

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer

NNUNET_MOMENTUM = 0.9
MOMENTUM = 0.5
"""Of the running means on target patches: 0.9 ranks the first epochs by their order alone (docs/results.md)."""

LOW_AGREEMENT = 0.85
"""Trainings that had not adapted ended between 0.3 and 0.8, those that had with over 0.9 (docs/results.md)."""


class ModelChoice:
    """The criteria of each epoch so far, and which epoch is the best by the chosen one.

    Epochs are compared by running means, so that a single lucky epoch does not win. Pseudo Dice has nnU-Net's own mean;
    the criteria on target patches, which are always the same and vary less, have a shorter one. A checkpoint needs
    ``history`` alone: everything else follows from it.

    Args:
        settings: the shared settings ``checkpoint_criterion``, ``criterion_patches`` and ``keep_every``.
    """

    def __init__(self, settings: UDASettings) -> None:
        self.settings = settings
        self.history: dict[str, list[float]] = {}
        self.patches: Tensor | None = None

    def open_target(self, dataset: nnUNetBaseDataset, patch_size: Sequence[int], batch_size: int) -> None:
        """Keep the target patches to measure on. Without this call only pseudo Dice is known."""
        if self.settings.criterion_patches:
            batches = -(-self.settings.criterion_patches // batch_size)
            self.patches = fixed_patches(dataset, patch_size, batches * batch_size)

    def open(self, trainer: UDATrainer) -> None:
        """Look at the trainer's target patches, if it has any, and say what is followed."""
        if trainer.needs_target:
            patch_size = trainer.configuration_manager.patch_size
            self.open_target(trainer.target_dataset, patch_size, trainer.batch_size)
        trainer.print_to_log_file(f"checkpoint_best follows {self.criterion}, without target labels")

    @property
    def criterion(self) -> str:
        """What ``checkpoint_best`` follows."""
        return "pseudo_dice" if self.patches is None else self.settings.checkpoint_criterion

    def measure(self, trainer: UDATrainer) -> dict[str, float]:
        """``add`` the epoch that ``trainer`` has just validated."""
        logged = trainer.logger.get_checkpoint()
        for values in logged.values():
            values[:] = plain(values)  # as a checkpoint has them: float32's running mean would be another after --c
        added = self.add(
            trainer.logger.get_value("mean_fg_dice", -1), trainer._predict, batch_size=trainer.batch_size,
            device=trainer.device, mirror_axes=trainer.inference_allowed_mirroring_axes,
            num_classes=trainer.label_manager.num_segmentation_heads,
        )  # fmt: skip
        self.history = trainer.ranks.on_first(lambda: self.history)  # devices differ in last bits
        return added

    def add(self, pseudo_dice: float, predict: Callable[[Tensor], Tensor], **options: Any) -> dict[str, float]:
        """Measure an epoch that has been validated; returns its criteria. ``options`` are those of ``criteria_on``."""
        values = {"pseudo_dice": float(pseudo_dice)}
        if self.patches is not None:
            values |= criteria_on(self.patches, predict, **options)
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)
        return values

    @property
    def means(self) -> list[float]:
        """Running means of the chosen criterion, one an epoch."""
        return running_means(self.criterion, self.history.get(self.criterion, []))

    @property
    def last_is_best(self) -> bool:
        """Whether the last epoch is better than every one before; not where its mean is undefined."""
        sign = 1 if HIGHER_IS_BETTER.get(self.criterion, True) else -1
        *before, last = [sign * mean for mean in self.means]
        return not math.isnan(last) and all(math.isnan(mean) or last > mean for mean in before)

    @property
    def agreement(self) -> float:
        """Running mean of the agreement on target patches after the last epoch; NaN where it was never measured."""
        return (running_means("agreement", self.history.get("agreement", [])) or [math.nan])[-1]

    def warning(self, translates: bool) -> str | None:
        """What to say at the end of a training whose segmenter disagrees with itself on target images.

        Args:
            translates: whether the trainer translated to the end; else nothing is said of translations.
        """
        if not self.agreement < LOW_AGREEMENT:
            return None
        advice = "Look at pictures/ before you trust the model: a longer schedule may do better, or another trainer"
        if translates:
            advice = (
                "Look at pictures/: if translations keep the source's contrast, a trainer without any may do better "
                "(RandomStyleTrainer, with a longer schedule), and so may a longer schedule of this one"
            )
        return (
            f"WARNING: on target images the segmenter's agreement with itself is only {self.agreement:.2f} (trainings "
            f"that adapted had over 0.9). {advice}"
        )

    def plot(self, path: str) -> None:
        """Write every criterion with the running mean that is compared, as PNG."""
        from nnunet_uda.training.pictures import plot_curves

        titles = {name: f"{name} ({'higher' if HIGHER_IS_BETTER.get(name, True) else 'lower'} is better"
                  f"{'; checkpoint_best follows it' if name == self.criterion else ''})"
                  for name in self.history}  # fmt: skip
        plot_curves(
            path, self.history, {name: running_means(name, values) for name, values in self.history.items()},
            {"agreement": (LOW_AGREEMENT, "below it, nothing had adapted")}, titles,
        )  # fmt: skip

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that are to be written after the last epoch."""
        finished, every = len(self.means), self.settings.keep_every
        names = [BEST] if self.last_is_best else []
        return names + ([f"checkpoint_epoch_{finished:04d}.pth"] if every and finished % every == 0 else [])


def running_means(criterion: str, values: Sequence[float]) -> list[float]:
    """The mean of a criterion after each epoch. A value that is not defined (NaN) leaves the mean alone."""
    kept = NNUNET_MOMENTUM if criterion == "pseudo_dice" else MOMENTUM
    mean, means = math.nan, []
    for value in values:
        mean = value if math.isnan(mean) else mean if math.isnan(value) else kept * mean + (1 - kept) * value
        means.append(mean)
    return means


def fixed_patches(dataset: nnUNetBaseDataset, patch_size: Sequence[int], number: int) -> Tensor:
    """Always the same patches of a dataset, spread evenly over its cases and over the first axis of each.

    Where they lie in the other axes is drawn, without touching any random state. No segmentation is looked at.

    Args:
        dataset: preprocessed cases.
        patch_size: two numbers (a slice along the first axis) or three.
        number: of patches, at least 1.

    Returns:
        ``(number, C, *patch_size)`` float32; zeros outside the images.
    """
    rng = np.random.default_rng(0)
    cases = [dataset.identifiers[i * len(dataset.identifiers) // number] for i in range(number)]
    size = [1, *patch_size][-3:]
    patches = []
    for index, case in enumerate(cases):
        if index == 0 or case != cases[index - 1]:
            data, rank = dataset.load_case(case)[0], 0
        spare = [length - side for length, side in zip(data.shape[1:], size, strict=True)]
        corner = [room // 2 if room < 0 else int(rng.integers(room + 1)) for room in spare]
        if spare[0] > 0:
            corner[0] = int((spare[0] + 1) * (rank + 0.5) / cases.count(case))
        box = [[start, start + side] for start, side in zip(corner, size, strict=True)]
        patches.append(torch.from_numpy(crop_and_pad_nd(data, box, 0)).float())
        rank += 1
    stacked = torch.stack(patches)
    return stacked[:, :, 0] if len(patch_size) == 2 else stacked


@torch.no_grad()
def criteria_on(
    patches: Tensor,
    predict: Callable[[Tensor], Tensor],
    *,
    mirror_axes: Sequence[int] | None,
    num_classes: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """The criteria in ``HIGHER_IS_BETTER`` on ``patches``, two passes of the network over each.

    Args:
        patches: ``(N, C, *patch)`` z-scored.
        predict: maps ``(batch_size, C, *patch)`` on ``device`` to logits ``(batch_size, num_classes, *patch)``.
        mirror_axes: see ``look_twice``.
    """
    gathered = TargetCriteria(num_classes)
    for part in patches.split(batch_size):
        gathered.add(*look_twice(predict, part.to(device), mirror_axes))
    return gathered.values()
