"""What a trainer's data streams are made of: checked folds, augmentation, mirroring, and loaders beside nnU-Net's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunet_uda.data.convention import check_splits, fold_of, read_json
from nnunet_uda.data.sides import paired_names
from nnunet_uda.errors import UDAError


class Unlabelled:
    """The label manager of a loader without labels: nnU-Net's loader asks it only for these two."""

    all_labels: list[int] = []
    has_ignore_label = False


def make_loader(
    dataset: nnUNetBaseDataset,
    batch_size: int,
    sizes: tuple[Sequence[int], Sequence[int]],
    transforms: ComposeTransforms,
    num_processes: int,
    pin_memory: bool,
    label_manager: Any = Unlabelled(),  # noqa: B008 - holds nothing
    oversampling: float = 0.0,
) -> Iterator[dict]:
    """A stream beside nnU-Net's own two, made as these are.

    Args:
        sizes: of the patches that are cut, and of those that are left after augmentation.
        oversampling: the share of patches that are sure to hold foreground.
    """
    loader = nnUNetDataLoader(
        dataset, batch_size, *sizes, label_manager, oversample_foreground_percent=oversampling, transforms=transforms
    )
    if num_processes == 0:
        return SingleThreadedAugmenter(loader, None)
    return NonDetMultiThreadedAugmenter(
        loader, None, num_processes, num_cached=max(6, num_processes // 2), seeds=None, pin_memory=pin_memory,
        wait_time=0.002,
    )  # fmt: skip


def reduced(pipeline: ComposeTransforms, augmentation: str, reproducible: bool) -> ComposeTransforms:
    """nnU-Net's pipeline, less what the setting ``augmentation`` turns off."""
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
    """nnU-Net's blur takes the faster of two algorithms, whose results differ a little: here it always takes one."""
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
    """Of nnU-Net's mirrored axes those that the setting ``mirror`` leaves; None is no mirroring.

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


def check_source_fold(splits_file: Path, fold: int | str, known: Callable[[], set[str]], num_training: int) -> None:
    """Refuse a fold outside of the splits, cases that do not exist, and too few cases for folds.

    Args:
        known: the preprocessed cases.
        num_training: labelled cases in ``dataset.json``.
    """
    if fold == "all":
        return
    if splits_file.exists():
        splits = check_splits(read_json(splits_file), known(), splits_file, disjoint=False)
        if not fold_of(splits, int(fold), splits_file)["val"]:
            raise UDAError(f"{splits_file}: fold {fold} has no validation case")
    elif num_training < 5:
        raise UDAError(
            f"{num_training} labelled source case(s) are too few for 5-fold cross-validation: train the fold 'all', or "
            f"write {splits_file} with fewer folds"
        )


def refuse_empty_labels(dataset: nnUNetBaseDataset, labels: Sequence[int], folder: str, fold: int | str) -> None:
    """Refuse labelled cases of which none holds one of ``labels``."""
    for identifier in dataset.identifiers:
        places = dataset.load_case(identifier)[-1]["class_locations"]
        if any(len(places.get(label, ())) for label in labels):
            return
    raise UDAError(
        f"{folder}: none of the {len(dataset.identifiers)} labelled training cases of fold {fold} holds a foreground "
        "voxel; expected a structure of dataset.json in at least one of them. Check labelsTr and the label values"
    )
