"""The parts of a trainer's data streams: checked folds, augmentation, mirroring, and loaders beside nnU-Net's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor

from nnunet_uda.data.convention import check_splits, fold_of, read_json
from nnunet_uda.data.damage import refuse_damaged
from nnunet_uda.data.sides import paired_names
from nnunet_uda.data.target import LabelledTargetDataset, TargetDataset
from nnunet_uda.errors import UDAError
from nnunet_uda.training.target_scans import TARGET_REMEDY, TargetScans
from nnunet_uda.workers import environment

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer


class Unlabelled:
    """The label manager of a loader without labels. nnU-Net's loader reads only these two attributes."""

    all_labels: list[int] = []
    has_ignore_label = False


def target_scans(trainer: UDATrainer) -> TargetScans:
    """The target of this fold."""
    return TargetScans(
        trainer.plans_manager, trainer.configuration_name, trainer.dataset_json, trainer.fold, trainer.ranks,
        trainer.print_to_log_file,
    )  # fmt: skip


def open_streams(trainer: UDATrainer, open_source: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The loaders of ``open_source``, nnU-Net's; opens the trainer's target streams beside them where it has any.

    All streams share one budget of processes; each gets one at least, unless there are none at all.
    """
    scans, workers = target_scans(trainer), get_allowed_n_proc_DA()
    learns_labelled = trainer.uses_labelled_target and trainer.settings.labelled_target_share > 0
    labelled = scans.labelled() if learns_labelled else None
    of_target = max(1, workers // 2) if workers and trainer.needs_target else 0
    of_labelled = max(1, workers // 4) if workers and labelled is not None else 0
    with environment("nnUNet_n_proc_DA", str(max(1, workers - of_target - of_labelled) if workers else 0)):
        loaders = open_source()
    if trainer.needs_target:
        trainer.target_dataset = scans.unlabelled()
        trainer.dataloader_target = target_loader(trainer, trainer.target_dataset, of_target)
    if labelled is not None:
        trainer.labelled_target_dataset = labelled
        trainer.dataloader_labelled = labelled_target_loader(trainer, labelled, of_labelled)
    return loaders


def checked_source(trainer: UDATrainer, datasets: tuple[Any, Any]) -> tuple[Any, Any]:
    """nnU-Net's training and validation cases, unless a file is damaged or no case holds a structure."""
    refuse_damaged(datasets, source_remedy(trainer))
    labels, folder = trainer.label_manager.foreground_labels, trainer.preprocessed_dataset_folder
    refuse_empty_labels(datasets[0], labels, folder, trainer.fold)
    return datasets


def target_batch_size(trainer: UDATrainer) -> int:
    """Unlabelled target patches in a step."""
    return math.ceil(trainer.target_share * trainer.batch_size)


def target_loader(trainer: UDATrainer, dataset: TargetDataset, num_processes: int) -> Iterator[dict]:
    """Unlabelled target patches."""
    return _further_loader(
        trainer,
        dataset,
        target_batch_size(trainer),
        Unlabelled(),
        0.0,
        trainer.get_target_transforms,
        None,
        num_processes,
    )


def labelled_target_loader(trainer: UDATrainer, dataset: LabelledTargetDataset, num_processes: int) -> Iterator[dict]:
    """Labelled target patches, as many as their share of a step's labelled patches asks for.

    They are augmented as nnU-Net does it, without a method's changes of style.
    """
    share = trainer.settings.labelled_target_share
    return _further_loader(
        trainer, dataset, max(1, round(trainer.batch_size * share / (1 - share))), trainer.label_manager,
        trainer.oversample_foreground_percent, partial(plain_transforms, trainer),
        trainer._get_deep_supervision_scales(), num_processes,
    )  # fmt: skip


def _further_loader(
    trainer: UDATrainer,
    dataset: nnUNetBaseDataset,
    batch_size: int,
    label_manager: Any,
    oversampling: float,
    get_transforms: Callable[..., ComposeTransforms],
    scales: list | None,
    num_processes: int,
) -> Iterator[dict]:
    """A stream beside nnU-Net's own two, made the same way.

    Args:
        oversampling: the share of patches that are sure to hold foreground.
        scales: of labels for deep supervision.
    """
    configuration = trainer.configuration_manager
    rotation, dummy_2d, initial_patch_size, mirror_axes = (
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    )
    transforms = get_transforms(
        configuration.patch_size, rotation, scales, mirror_axes, dummy_2d,
        use_mask_for_norm=configuration.use_mask_for_norm,
    )  # fmt: skip
    loader = nnUNetDataLoader(
        dataset, batch_size, initial_patch_size, configuration.patch_size, label_manager,
        oversample_foreground_percent=oversampling, transforms=transforms,
    )  # fmt: skip
    if num_processes == 0:
        return SingleThreadedAugmenter(loader, None)
    return NonDetMultiThreadedAugmenter(
        loader, None, num_processes, num_cached=max(6, num_processes // 2), seeds=None,
        pin_memory=trainer.device.type == "cuda", wait_time=0.002,
    )  # fmt: skip


def to_device(data: Any, device: torch.device) -> Any:
    """A tensor, or a list of tensors, on ``device``."""
    if isinstance(data, list):
        return [item.to(device, non_blocking=True) for item in data]
    return data.to(device, non_blocking=True)


def next_target(trainer: UDATrainer) -> Tensor:
    """The unlabelled images of the next step, ``(B, C, *patch)``."""
    assert trainer.dataloader_target is not None
    return to_device(next(trainer.dataloader_target)["data"], trainer.device)


def end_loaders(trainer: UDATrainer) -> None:
    """End the processes of all streams."""
    further = (trainer.dataloader_target, trainer.dataloader_labelled)
    for loader in (trainer.dataloader_train, trainer.dataloader_val, *further):
        if isinstance(loader, NonDetMultiThreadedAugmenter):
            loader._finish()


def source_remedy(trainer: UDATrainer) -> str:
    """What to do about damaged source cases."""
    plans = trainer.plans_manager
    return (
        f"Preprocess the source again: nnUNetv2_preprocess -d {plans.dataset_name} -plans_name {plans.plans_name} "
        f"-c {trainer.configuration_name}, then the same command with --c"
    )


def refuse_damaged_cases(trainer: UDATrainer) -> None:
    """Read every voxel of the cases in use; raise ``UDAError`` naming those that cannot be read."""
    refuse_damaged((trainer.training_dataset, trainer.validation_dataset), source_remedy(trainer), voxels=True)
    if trainer.needs_target:
        refuse_damaged((trainer.target_dataset,), TARGET_REMEDY, voxels=True)
    if trainer.dataloader_labelled is not None:
        refuse_damaged((trainer.labelled_target_dataset,), TARGET_REMEDY, voxels=True)


def plain_transforms(trainer: UDATrainer, *args: Any, **kwargs: Any) -> ComposeTransforms:
    """nnU-Net's pipeline without what the setting ``augmentation`` turns off; reproducible where a seed is set."""
    pipeline = nnUNetTrainer.get_training_transforms(*args, **kwargs)
    return reduced(pipeline, trainer.settings.augmentation, trainer.settings.seed is not None)


def reduced(pipeline: ComposeTransforms, augmentation: str, reproducible: bool) -> ComposeTransforms:
    """nnU-Net's pipeline without what the setting ``augmentation`` turns off."""
    if augmentation == "none":
        pipeline.transforms = [t for t in pipeline.transforms if not isinstance(t, MirrorTransform)]
    if augmentation != "nnunet":
        # RandomTransform wraps exactly nnU-Net's intensity transforms (cascades, which it also serves, are refused)
        pipeline.transforms = [t for t in pipeline.transforms if not isinstance(t, RandomTransform)]
    if augmentation == "none":
        for transform in pipeline.transforms:
            if isinstance(transform, SpatialTransform):
                transform.p_rotation = transform.p_scaling = 0
    return without_stopwatch(pipeline) if reproducible else pipeline


def without_stopwatch(pipeline: ComposeTransforms) -> ComposeTransforms:
    """Make nnU-Net's blur always take the same algorithm. It takes the faster of two, whose results differ a little."""
    for transform in pipeline.transforms:
        inner = transform.transform if isinstance(transform, RandomTransform) else transform
        if isinstance(inner, GaussianBlurTransform):
            inner.benchmark = False
    return pipeline


def allowed_mirroring(
    setting: bool | str,
    axes: Sequence[int] | None,
    structures: Sequence[str],
    plans: dict[str, Any],
    dimension: int,
    log: Callable[[str], None],
) -> tuple[int, ...] | None:
    """The axes that nnU-Net mirrors and the setting ``mirror`` leaves; None: no mirroring.

    Args:
        axes: of the patch.
        dimension: of the patch, 2 or 3.
    """
    if not setting or axes is None:
        return None
    pairs = paired_names(structures)
    if setting is True or not pairs:
        return tuple(axes)
    left: tuple[int, ...] = ()
    if plans["image_reader_writer"] == "SimpleITKIOWithReorient":
        in_patch = plans["transpose_forward"].index(2) - (3 - dimension)  # arrays' last axis goes from left to right
        left = tuple(axis for axis in axes if axis != in_patch)
    log(
        f"Mirroring along the axes {list(left)} of {list(axes)} alone: it would exchange {' and '.join(pairs[0])} "
        "(setting mirror=auto)"
    )
    return left or None


def moved(trainer: UDATrainer, nnunets: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Change nnU-Net's rotation, dummy 2D augmentation, initial patch size and mirrored axes as the settings ask."""
    rotation, dummy_2d, initial_patch_size, mirror_axes = nnunets
    patch_size, plans = trainer.configuration_manager.patch_size, trainer.plans_manager.plans
    trainer.inference_allowed_mirroring_axes = allowed_mirroring(
        trainer.settings.mirror, mirror_axes, trainer.structures, plans, len(patch_size), trainer.print_to_log_file
    )
    if trainer.settings.augmentation == "none":
        initial_patch_size = np.array(patch_size)
    return rotation, dummy_2d, initial_patch_size, trainer.inference_allowed_mirroring_axes


def check_source_fold(trainer: UDATrainer) -> None:
    """Refuse a fold outside of the splits, cases that do not exist, and too few cases for folds."""
    splits_file, fold = Path(trainer.preprocessed_dataset_folder_base, "splits_final.json"), trainer.fold
    num_training = trainer.dataset_json["numTraining"]
    if fold == "all":
        return
    if splits_file.exists():
        known = set(trainer.dataset_class.get_identifiers(trainer.preprocessed_dataset_folder))
        splits = check_splits(read_json(splits_file), known, splits_file, disjoint=False)
        if not fold_of(splits, int(fold), splits_file)["val"]:
            raise UDAError(f"{splits_file}: fold {fold} has no validation case")
    elif num_training < 5:
        raise UDAError(
            f"{num_training} labelled source case(s) are too few for 5-fold cross-validation: train the fold 'all', or "
            f"write {splits_file} with fewer folds"
        )


def refuse_empty_labels(dataset: nnUNetBaseDataset, labels: Sequence[int], folder: str, fold: int | str) -> None:
    """Refuse labelled cases of which none holds one of ``labels``, or that were preprocessed with others."""
    for identifier in dataset.identifiers:
        places = dataset.load_case(identifier)[-1]["class_locations"]
        if others := sorted({value for value in places if isinstance(value, int) and value > 0} - set(labels)):
            raise UDAError(
                f"{folder}: its cases were preprocessed with the label(s) {', '.join(map(str, others))}, which "
                f"dataset.json does not have (it has {', '.join(map(str, labels))}). Put the dataset.json back that "
                "they were made with, or preprocess them again: nnUNetv2_plan_and_preprocess"
            )
        if any(len(places.get(label, ())) for label in labels):
            return
    raise UDAError(
        f"{folder}: none of the {len(dataset.identifiers)} labelled training cases of fold {fold} holds a foreground "
        "voxel; expected a structure of dataset.json in at least one of them. Check labelsTr and the label values"
    )
