"""Plans files for runs with their own settings: the ``uda`` object, and changes to a configuration.

Planning again rewrites ``nnUNetPlans.json`` and drops what it does not know, so settings live in a plans file of their
own name. nnU-Net copies that file into the results: a run is described by files alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_uda.data.convention import check_splits, environment_folder, read_json
from nnunet_uda.data.slices import FILE, LEAST, order_of, refuse_mixed_slices
from nnunet_uda.errors import UDAError
from nnunet_uda.files import write_json
from nnunet_uda.foreign_plans import find_in_nnunet, read_plans
from nnunet_uda.methods import check_uda, find_methods
from nnunet_uda.names import check_name
from nnunet_uda.settings import describe_settings
from nnunet_uda.workers import environment, wished_threads

PLANES = {"axial": [0, 1, 2], "coronal": [1, 0, 2], "sagittal": [2, 0, 1]}
"""``transpose_forward`` of images that nnU-Net's reader has reoriented to RAS, whose array axes are (S, A, R)."""


def merge_uda(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` over ``base``, where keys are names of shared settings or ``method.name``."""
    merged = deepcopy(base)
    for key, value in changes.items():
        *method, name = key.split(".", 1)
        place = merged.setdefault(method[0], {}) if method else merged
        if not isinstance(place, dict):
            raise UDAError(f"{key}: {method[0]!r} is a setting, not a method with settings of its own")
        place[name] = value
    return merged


def merge_presets(base: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """``preset`` over ``base``; a method's object key by key."""
    nested = {key: base.get(key, {}) | value for key, value in preset.items() if isinstance(value, dict)}
    return deepcopy(base | preset | nested)


def training_share(folder: Path, fingerprint: dict[str, Any]) -> float:
    """The share of the labelled cases that a fold trains on, the mean over the folds of a preprocessed dataset.

    Without ``splits_final.json`` nnU-Net will draw five folds, where there are five cases.

    Raises:
        UDAError: a splits file without folds.
    """
    path, number = folder / "splits_final.json", len(fingerprint["shapes_after_crop"])
    if not path.exists():
        return 0.8 if number >= 5 else 1.0
    folds = check_splits(read_json(path), None, path, disjoint=False)
    return float(np.mean([len(fold["train"]) for fold in folds])) / number


def cisfa_protocol(
    fingerprint: dict[str, Any], slice_axis: int, share: float = 1.0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Section 4.2 of CISFA: ``(uda settings, options for derive_plans)``.

    Adam 2e-4 with betas (0.5, 0.999), constant; batch 4; 200 epochs over all slices that a fold trains on; no
    augmentation; Dice; a U-Net of "4 resolution stages", in the authors' code four contractions and a bottom of 1024
    channels, which are 5 stages in nnU-Net's words; slices resampled to 160 x 160.

    Args:
        fingerprint: nnU-Net's of the labelled cases.
        slice_axis: the slices' axis in it.
        share: ``training_share``.
    """
    slices = share * sum(shape[slice_axis] for shape in fingerprint["shapes_after_crop"])
    uda = {
        "num_epochs": 200,
        "iterations_per_epoch": max(1, round(slices / 4)),
        "segmenter_optimizer": "adam",
        "segmenter_learning_rate": 2e-4,
        "segmenter_weight_decay": 0.0,
        "segmenter_schedule": "constant",
        "segmentation_loss": "dice",
        "deep_supervision": False,
        "augmentation": "none",
        "mirror": False,
        "foreground_oversampling": 0.0,
        "cisfa": {"segmenter_adversarial_weight": 1.0},
    }
    return uda, {"batch_size": 4, "stages": 5, "base_features": 64, "max_features": 1024, "slice_size": (160, 160)}


def uuds_protocol(
    fingerprint: dict[str, Any], slice_axis: int, share: float = 1.0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Section 4.1 of UUDS: ``(uda settings, options for derive_plans)``.

    Adam 1e-4 with weight decay 0.01 and all weights 1 are the defaults of ``uda.uuds``. Batch, epochs, slice size and
    augmentation, which the paper does not give, are CISFA's; the Dice loss is its L_seg (as eq. 8), without deep
    supervision. Schwannoma data are normalised by mean and deviation, as nnU-Net does it. For BraTS the paper clips
    each image to its 5th to 95th percentile and maps it to [-1, 1]: its converter does so, and prediction to new scans.
    """
    uda, _ = cisfa_protocol(fingerprint, slice_axis, share)
    del uda["cisfa"], uda["segmenter_optimizer"], uda["segmenter_learning_rate"], uda["segmenter_weight_decay"]
    return uda, {"batch_size": 4, "slice_size": (160, 160)}


def similarity_prototypes_protocol(
    fingerprint: dict[str, Any], slice_axis: int, share: float = 1.0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The prototypes' schedule, which the paper leaves open: CISFA's, for both do the same task on the same data.

    CycleGAN's weight of the cycle and its generator without a skip to the output; the paper's loss weights, dictionary
    and temperature are the defaults of ``uda.similarity_prototypes``.
    """
    uda, options = cisfa_protocol(fingerprint, slice_axis, share)
    del uda["cisfa"]
    return uda | {"similarity_prototypes": {"cycle_weight": 10.0, "residual_translation": False}}, options


CPU_SIZES = {2: (128, 4), 3: (64, 2)}
"""By the axes of a patch: its voxels an axis and the batch, at most, that a CPU trains in hours."""
CPU_FEATURES = 16
"""Of the segmenter's first stage there, at most."""


def fits_cpu(configuration: dict[str, Any]) -> bool:
    """Whether a configuration of the plans is no larger than the CPU preset would make it."""
    patch = configuration["patch_size"]
    most, batch = CPU_SIZES[len(patch)]
    features = configuration["architecture"]["arch_kwargs"].get("features_per_stage", [CPU_FEATURES])
    return max(patch) <= most and configuration["batch_size"] <= batch and features[0] <= CPU_FEATURES


def cpu_preset(plans: dict[str, Any], configuration: str, cores: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a CPU can train in hours: ``(uda settings, options for derive_plans)``.

    The patch is that of the plans, but of at most 128 voxels an axis in 2D and 64 in 3D, and no larger than the median
    image; networks are a quarter as wide as the defaults; 100 epochs of 100 steps on 8 cores or more, else 50.

    Args:
        cores: that training will use.
    """
    chosen = _configuration(plans, configuration)
    most, batch = CPU_SIZES[len(chosen["patch_size"])]
    images = chosen.get("median_image_size_in_voxels", chosen["patch_size"])
    patch = tuple(
        max(LEAST, min(most, side, round(size))) for side, size in zip(chosen["patch_size"], images, strict=True)
    )
    uda: dict[str, Any] = {
        "num_epochs": 100 if cores >= 8 else 50,
        "iterations_per_epoch": 100,
        "val_iterations_per_epoch": 10,
        "picture_every": 5,
    }
    narrow = {"generator_width": 16, "generator_blocks": 6, "discriminator_width": 16, "embedding_dim": 64}
    for method in find_methods().methods:
        own = {name for name, _, _ in describe_settings(method.settings)} & narrow.keys()
        if own:
            uda[method.name] = uda.get(method.name, {}) | {name: narrow[name] for name in sorted(own)}
    batch = min(batch, chosen["batch_size"])
    return uda, {
        "patch_size": patch,
        "batch_size": batch,
        "base_features": CPU_FEATURES,
        "max_features": 128,
        "stages": 5,
    }


PROTOCOLS = {"cisfa": cisfa_protocol, "similarity_prototypes": similarity_prototypes_protocol, "uuds": uuds_protocol}


def derive_plans(
    plans: dict[str, Any],
    configuration: str,
    name: str,
    uda: dict[str, Any],
    *,
    patch_size: tuple[int, ...] | None = None,
    batch_size: int | None = None,
    base_features: int | None = None,
    max_features: int | None = None,
    stages: int | None = None,
    slice_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A copy of ``plans`` named ``name`` with the settings ``uda`` and a changed ``configuration``.

    Args:
        patch_size: voxels an axis; strides and kernels follow by nnU-Net's own rule, and the size is padded to fit.
        base_features: channels of the first stage, doubled each stage up to ``max_features``.
        stages: at most so many resolution stages.
        slice_size: 2D only: choose the spacing so that the median slice has this size in voxels, and make it the patch.
    """
    plans = deepcopy(plans)
    plans["plans_name"] = name
    if uda:
        check_uda(uda, f"plans {name!r}, key 'uda'")
        plans["uda"] = uda
    chosen = _configuration(plans, configuration)
    kwargs = chosen["architecture"]["arch_kwargs"]
    dimension = len(chosen["patch_size"])

    if slice_size is not None:
        if dimension != 2:
            raise UDAError(f"a slice size needs a 2D configuration, {configuration!r} is {dimension}D")
        median = plans["original_median_shape_after_transp"][1:]
        spacing = plans["original_median_spacing_after_transp"][1:]
        chosen["spacing"] = [float(s * m / n) for s, m, n in zip(spacing, median, slice_size, strict=True)]
        chosen["median_image_size_in_voxels"] = [float(n) for n in slice_size]
        chosen["data_identifier"] = f"{name}_{configuration}"
        patch_size = tuple(slice_size)
    if patch_size is not None and len(patch_size) != dimension:
        raise UDAError(f"the patch size of {configuration!r} has {dimension} numbers, found {len(patch_size)}")
    if patch_size is not None or stages is not None:
        size = patch_size or chosen["patch_size"]
        max_pool = 999999 if stages is None else stages - 1
        _, strides, kernels, padded, _ = get_pool_and_conv_props(chosen["spacing"], size, 4, max_pool)
        if len(strides) < 2:
            raise UDAError(f"patch size {tuple(size)} is too small for a U-Net: give at least 8 voxels an axis")
        kwargs["strides"] = [list(stride) for stride in strides]
        kwargs["kernel_sizes"] = [list(kernel) for kernel in kernels]
        chosen["patch_size"] = [int(n) for n in padded]
        _resize_stages(kwargs, len(strides))
    if base_features is not None or max_features is not None:
        first = base_features or kwargs["features_per_stage"][0]
        most = max_features or max(kwargs["features_per_stage"])
        kwargs["features_per_stage"] = [min(most, first * 2**stage) for stage in range(kwargs["n_stages"])]
    if batch_size is not None:
        if batch_size < 1:
            raise UDAError(f"the batch size must be at least 1, found {batch_size}")
        chosen["batch_size"] = batch_size
    return plans


def _configuration(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """A configuration that is described by itself.

    Raises:
        UDAError: no such configuration, or one that inherits from another.
    """
    if name not in plans["configurations"]:
        raise UDAError(f"the plans have no configuration {name!r}; they have {list(plans['configurations'])}")
    chosen = plans["configurations"][name]
    if "architecture" not in chosen:
        raise UDAError(f"configuration {name!r} inherits from another one: choose {chosen['inherits_from']!r}")
    return chosen


def _resize_stages(kwargs: dict[str, Any], number: int) -> None:
    for key, length in (
        ("features_per_stage", number),
        ("n_conv_per_stage", number),
        ("n_blocks_per_stage", number),
        ("n_conv_per_stage_decoder", number - 1),
    ):
        if key in kwargs:
            values = list(kwargs[key])
            kwargs[key] = (values + [values[-1]] * length)[:length]
    kwargs["n_stages"] = number


def write_plans(
    dataset: str,
    base_name: str,
    name: str,
    configuration: str,
    settings: dict[str, Any],
    changes: dict[str, Any],
    plane: str | None,
    protocol: str | None,
    preset: str | None,
    overwrite: bool,
) -> tuple[Path, dict[str, Any], bool]:
    """Write a plans file of its own name into the preprocessed dataset's folder.

    Args:
        settings: by names of shared settings or ``method.name``, over those of protocol, preset and base.
        changes: of the configuration: options for ``derive_plans``, over those of protocol and preset.

    Returns:
        The file, the plans, and whether their images are preprocessed otherwise than the base's.

    Raises:
        UDAError: a bad name, setting or change, and plans of that name with other content unless ``overwrite``.
    """
    folder = environment_folder("nnUNet_preprocessed") / dataset
    path = folder / f"{check_name(name, '-p', file=True)}.json"
    if name == base_name:
        raise UDAError(f"-p must be a new name: planning again would drop settings from {base_name}.json")
    if "__" in name:
        raise UDAError(f"-p {name}: nnU-Net tells trainer, plans and configuration apart at '__'. Take another name")
    former = read_json(path) if path.exists() and not overwrite else None
    base = read_plans(folder, base_name)
    uda, options = base.get("uda", {}), dict[str, Any]()
    # planning for another plane takes minutes: what is wrong with the rest is said before
    trial = derive_plans(base, configuration, name, merge_uda(uda, settings), **changes)
    patch_size, where = trial["configurations"][configuration]["patch_size"], folder / "dataset.json"
    refuse_mixed_slices(read_json(where), patch_size, f"{where}, -c {configuration}")
    plans = replan_plane(dataset, base, plane, name) if plane else base
    if protocol:
        fingerprint = read_json(folder / "dataset_fingerprint.json")
        share = training_share(folder, fingerprint)
        papers, options = PROTOCOLS[protocol](fingerprint, plans["transpose_forward"][0], share)
        uda = uda | papers
    if preset:
        fast, options = cpu_preset(plans, configuration, wished_threads())
        uda = merge_presets(uda, fast)
    plans = derive_plans(plans, configuration, name, merge_uda(uda, settings), **options | changes)
    if former not in (None, plans):
        raise UDAError(f"{path} exists, with other content: choose another name, or replace it with --overwrite")
    write_json(plans, path)
    identifiers = [content["configurations"][configuration]["data_identifier"] for content in (base, plans)]
    return path, plans, identifiers[0] != identifiers[1]


def replan_plane(dataset: str, plans: dict[str, Any], plane: str, name: str) -> dict[str, Any]:
    """Plan ``dataset`` again by the planner of ``plans``, with slices along ``plane`` instead of the largest spacing.

    Returns the plans; nothing is written, since plans without their settings would be taken for finished ones.

    Raises:
        UDAError: unless ``dataset.json`` asks for the reader that reorients to RAS: else planes differ between files.
    """
    content = read_json(environment_folder("nnUNet_preprocessed") / dataset / "dataset.json")
    if order_of(content) == FILE:
        raise UDAError(
            f"-plane {plane}: the scans of {dataset} are oblique and lie differently in the body, so their axes are "
            "kept in the files' order and the slices are the scanner's. Leave -plane out, or train 3d_fullres"
        )
    if plans["image_reader_writer"] != "SimpleITKIOWithReorient":
        raise UDAError(
            f"a plane can only be chosen when images are reoriented on reading, but the plans use "
            f'{plans["image_reader_writer"]}. Set "overwrite_image_reader_writer": "SimpleITKIOWithReorient" in '
            f"{dataset}'s raw dataset.json and plan again"
        )
    planner_class = find_in_nnunet("experiment_planner_used", plans["experiment_planner_used"], f"plans of {dataset}")
    forward = PLANES[plane]

    class PlanePlanner(planner_class):  # type: ignore[misc, valid-type] # nnU-Net's, by its name in the plans
        def determine_transpose(self) -> tuple[list[int], list[int]]:
            return forward, [int(np.argwhere(np.array(forward) == axis)[0][0]) for axis in range(3)]

        def save_plans(self, plans: Any) -> None:
            recursive_fix_for_json_export(plans)

    PlanePlanner.__name__ = planner_class.__name__  # recorded in the plans, and looked up in nnU-Net by name
    planner = PlanePlanner(dataset, plans_name=name)
    with planning():
        return planner.plan_experiment()


@contextmanager
def planning() -> Iterator[None]:
    """Let nnU-Net's planner work where ``nnUNet_n_proc_DA`` is 0: it takes that for its number of threads."""
    with environment("nnUNet_n_proc_DA", str(max(1, get_allowed_n_proc_DA()))):
        yield
