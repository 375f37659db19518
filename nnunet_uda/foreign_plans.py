"""Plans of others are data: what a plans file names is looked up among what nnU-Net's planners write, and nowhere else.

nnU-Net imports and calls whatever a plans file names as its network, its layers, its reader and so on. Here every such
name is checked before: networks and blocks are those of ``dynamic_network_architectures``, layers those of
``torch.nn``, and all else is found in nnU-Net itself. So are the numbers that everything here takes for granted.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from torch import nn
from torch.nn.modules import activation, batchnorm, conv, dropout, instancenorm, normalization, pooling

from nnunet_uda.data.components import KEY
from nnunet_uda.data.convention import check_plans_names, read_json
from nnunet_uda.errors import UDAError, print_without_traceback, shown
from nnunet_uda.names import check_name

ARCHITECTURES = "dynamic_network_architectures.architectures"
BLOCKS = "dynamic_network_architectures.building_blocks"
LAYERS = {
    "conv_op": (conv,),
    "norm_op": (batchnorm, instancenorm, normalization),
    "dropout_op": (dropout,),
    "nonlin": (activation,),
}
"""Arguments of a network that are classes, and the modules of torch that define what they may be."""
_ANY_LAYER = (conv, batchnorm, instancenorm, normalization, dropout, activation, pooling)
_IN_NNUNET = {
    "image_reader_writer": "imageio",
    "label_manager": "utilities.label_handling",
    "preprocessor_name": "preprocessing",
    "normalization_schemes": "preprocessing.normalization",
    "resampling_fn_data": "preprocessing.resampling",
    "resampling_fn_seg": "preprocessing.resampling",
    "resampling_fn_probabilities": "preprocessing.resampling",
    "experiment_planner_used": "experiment_planning",
}
"""Keys of plans, and the part of nnU-Net where their values are to be found."""
MOST_VOXELS = 2**30
"""In a patch: 4 GB for each map of a network's first stage and feature."""
_CT = ("mean", "std", "percentile_00_5", "percentile_99_5")
"""What nnU-Net's CTNormalization takes from the plans."""
_ADVICE = "Plans that nnUNetv2_plan_experiment has not written are not run here: plan again, or correct the file"


def read_plans(folder: Path, name: str) -> dict[str, Any]:
    """The checked plans ``name`` in a dataset's preprocessed folder.

    Raises:
        UDAError: no name, no such file, or plans that ``check_plans`` refuses.
    """
    path = folder / f"{check_name(name, '-p', file=True)}.json"
    if not path.is_file():
        there = sorted(other.stem for other in folder.glob("*lans*.json"))
        raise UDAError(
            f"{path} does not exist. nnUNetv2_plan_and_preprocess makes nnUNetPlans, nnUNetUDA_configure plans of "
            f"another name. There are: {', '.join(there) or 'none'}"
        )
    return check_plans(read_json(path), path)


def check_plans(plans: Any, where: Path | str) -> dict[str, Any]:
    """Check everything that ``plans`` name, without calling any of it, and return ``plans``.

    Raises:
        UDAError: for the first name that does not exist, or names something else than nnU-Net writes there.
    """
    check_plans_names(plans, where)
    for key in ("image_reader_writer", "label_manager"):
        if key in plans:
            find_in_nnunet(key, plans[key], where)
    planner = plans.get("experiment_planner_used", "ExperimentPlanner")
    _require(_is_identifier(planner), where, "experiment_planner_used", planner, "a class's name")
    for name, configuration in plans["configurations"].items():
        check_configuration(configuration, f"{where}, configuration {shown(name)}")
    _check_numbers(plans, where)
    return plans


def check_before_building(plans: dict[str, Any]) -> None:
    """Check plans before a network is built from them: ``nnUNetv2_predict`` starts no trainer that would.

    Raises:
        UDAError: as ``check_plans``; printed without a traceback, whatever program this is.
    """
    sys.excepthook = print_without_traceback
    check_plans(plans, "the plans file")


def check_configuration(configuration: dict[str, Any], where: Path | str) -> None:
    """What ``check_plans`` asks of one configuration.

    Raises:
        UDAError: see there.
    """
    for key in ("preprocessor_name", "resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
        if key in configuration:
            find_in_nnunet(key, configuration[key], where)
    schemes = configuration.get("normalization_schemes", [])
    _require(isinstance(schemes, (list, tuple)), where, "normalization_schemes", schemes, "a list")
    for scheme in schemes:
        find_in_nnunet("normalization_schemes", scheme, where)
    if "architecture" not in configuration:  # inherited, or of an old nnU-Net, which names one of two networks
        old = configuration.get("UNet_class_name", "PlainConvUNet")
        known = ("PlainConvUNet", "ResidualEncoderUNet")
        _require(old in known, where, "UNet_class_name", old, f"{' or '.join(known)}, which nnU-Net wrote")
        return
    architecture = configuration["architecture"]
    parts = ("network_class_name", "arch_kwargs", "_kw_requires_import")
    complete = isinstance(architecture, dict) and set(parts) <= set(architecture)
    _require(complete, where, "architecture", architecture, f"an object with {', '.join(parts)}")
    network, arguments, imported = (architecture[part] for part in parts)
    expected = f"one of {ARCHITECTURES}, as {ARCHITECTURES}.unet.PlainConvUNet"
    _require(_class_of(network, ARCHITECTURES), where, "network_class_name", network, expected)
    _require(isinstance(arguments, dict), where, "arch_kwargs", arguments, "an object")
    _require(isinstance(imported, (list, tuple)), where, "_kw_requires_import", imported, "a list")
    for key in imported:
        known_key = isinstance(key, str) and key in arguments
        _require(known_key, where, "_kw_requires_import", imported, "keys of 'arch_kwargs'")
        value = arguments[key]
        expected = "a layer of torch.nn" + ("" if key in LAYERS else f" or a class of {BLOCKS}") + " of that kind"
        _require(value is None or _is_layer(value, LAYERS.get(key)), where, key, value, expected)


def _require(fits: object, where: Path | str, key: str, found: Any, expected: str) -> None:
    if not fits:
        raise UDAError(f"{where}: {key!r} is {shown(found)}; expected {expected}. {_ADVICE}")


def _check_numbers(plans: dict[str, Any], where: Path | str) -> None:
    """Raise ``UDAError`` for numbers that nnU-Net's planner never writes, or that are missing."""

    def require(fits: object, key: str, found: Any, expected: str, place: str = "") -> None:
        _require(fits, f"{where}{place}", key, found, expected)

    require(isinstance(plans.get("uda", {}), dict), "uda", plans.get("uda"), "an object of settings")
    groups = plans.get(KEY, [])
    whole = isinstance(groups, list) and all(
        isinstance(group, list) and all(type(value) is int for value in group) for group in groups
    )
    require(whole, KEY, groups, "lists of labels")
    require("image_reader_writer" in plans, "image_reader_writer", None, "nnU-Net's name of a reader")
    forward: Any = plans.get("transpose_forward")
    backward: Any = plans.get("transpose_backward")
    for key, axes in (("transpose_forward", forward), ("transpose_backward", backward)):
        require(
            _numbers(axes, 3, whole=True) and sorted(axes) == [0, 1, 2], key, axes, "the axes 0, 1, 2 in some order"
        )
    require([forward[axis] for axis in backward] == [0, 1, 2], "transpose_backward", backward, "what undoes the other")
    spacing = plans.get("original_median_spacing_after_transp")
    require(_numbers(spacing, 3, least=1e-9), "original_median_spacing_after_transp", spacing, "three lengths in mm")
    intensities: Any = plans.get("foreground_intensity_properties_per_channel")
    require(isinstance(intensities, dict), "foreground_intensity_properties_per_channel", intensities, "an object")
    for name in plans["configurations"]:
        place = f", configuration {shown(name)}"
        content: Any = _resolved(plans["configurations"], name, f"{where}{place}")
        require({"architecture", "UNet_class_name"} & set(content), "architecture", None, "a network", place)
        patch, batch, own_spacing, schemes, masks = (
            content.get(key)
            for key in ("patch_size", "batch_size", "spacing", "normalization_schemes", "use_mask_for_norm")
        )
        sides = len(patch) if isinstance(patch, list) and len(patch) in (2, 3) else 3
        fits = _numbers(patch, sides, least=1, whole=True) and math.prod(patch) <= MOST_VOXELS
        require(fits, "patch_size", patch, "two or three numbers of voxels", place)
        require(_numbers([batch], 1, least=1, whole=True), "batch_size", batch, "a number of patches", place)
        require(_numbers(own_spacing, sides, least=1e-9), "spacing", own_spacing, f"{sides} lengths in mm", place)
        require(isinstance(schemes, list) and schemes != [], "normalization_schemes", schemes, "one a channel", place)
        fits = isinstance(masks, list) and len(masks) == len(schemes) and all(isinstance(mask, bool) for mask in masks)
        require(fits, "use_mask_for_norm", masks, "true or false for each of the 'normalization_schemes'", place)
        for channel, scheme in enumerate(schemes):
            known = intensities.get(str(channel)) if scheme == "CTNormalization" else dict.fromkeys(_CT, 0)
            fits = isinstance(known, dict) and _numbers([known.get(key) for key in _CT], len(_CT))
            key = "foreground_intensity_properties_per_channel"
            require(fits, key, known, f"{', '.join(_CT)} of channel {channel}, which is normalised as CT")


def _numbers(values: Any, count: int, least: float = -math.inf, whole: bool = False) -> bool:
    """Whether ``values`` is a list of ``count`` finite numbers from ``least`` on."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
        and all(v >= least and (isinstance(v, int) or not whole) for v in values)
    )


def _resolved(configurations: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """A configuration with what it inherits."""
    content: dict[str, Any] = {}
    seen: list[Any] = []
    while name is not None:
        if name in seen or name not in configurations:
            found = "which leads back to itself" if name in seen else "which there is not"
            raise UDAError(f"{where}: it inherits from {shown(name)}, {found}; expected another one. {_ADVICE}")
        seen.append(name)
        content = configurations[name] | content
        name = configurations[name].get("inherits_from")
    return content


@cache
def _found(part: str, name: str) -> Any:
    folder = Path(nnunetv2.__path__[0], *part.split("."))
    return recursive_find_python_class(str(folder), name, current_module=f"nnunetv2.{part}")


def find_in_nnunet(key: str, name: Any, where: Path | str) -> Any:
    """The class or function of nnU-Net that the plans' ``key`` names.

    Raises:
        UDAError: nothing of that name is defined in nnU-Net's part for it.
    """
    found = _found(_IN_NNUNET[key], name) if _is_identifier(name) else None
    fits = inspect.isfunction(found) if key.startswith("resampling_fn") else inspect.isclass(found)
    fits = fits and found.__module__.startswith("nnunetv2.")
    _require(fits, where, key, name, f"a name in nnunetv2.{_IN_NNUNET[key]}, which has no such one")
    return found


def _is_identifier(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w{0,99}", name, re.ASCII) is not None


def _class_of(path: Any, package: str) -> type[nn.Module] | None:
    """The network class at ``package.module.Class``, None where there is none."""
    match = re.fullmatch(rf"({re.escape(package)}\.\w+)\.(\w+)", path, re.ASCII) if isinstance(path, str) else None
    if match is None:
        return None
    # the module's former name, which nnU-Net itself still puts into the plans that it takes over from old versions
    module = match[1].replace(".residual_unet", ".unet")
    try:
        found = getattr(importlib.import_module(module), match[2], None)
    except ImportError:
        return None
    ours = inspect.isclass(found) and issubclass(found, nn.Module)
    return found if ours and found.__module__.startswith("dynamic_network_architectures.") else None


def _is_layer(path: Any, modules: tuple | None) -> bool:
    """Whether ``path`` names a layer of torch that ``modules`` define; for None any layer or a block."""
    match = re.fullmatch(r"torch\.nn(\.modules\.\w+)?\.(\w+)", path, re.ASCII) if isinstance(path, str) else None
    if match is None:
        return modules is None and _class_of(path, BLOCKS) is not None
    layer = getattr(nn, match[2], None)
    return (
        inspect.isclass(layer)
        and layer.__module__ in [module.__name__ for module in modules or _ANY_LAYER]
        and match[1] in (None, layer.__module__.removeprefix("torch.nn"))
    )
