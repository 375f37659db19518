"""Typed settings of the methods, read from the ``uda`` object of a plans file.

The object holds the settings shared by all trainers and, under a method's name, that method's own::

    "uda": {"num_epochs": 100, "cisfa": {"generator_width": 32}}
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import sys
import textwrap
import types
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from nnunet_uda.errors import UDAError, did_you_mean, nested_deeper, shown


@dataclass(frozen=True)
class UDASettings:
    """Schedule, data stream and segmenter: shared by every trainer, so that bounds and methods are comparable.

    The segmenter's Adam is the papers' choice; nnU-Net's own SGD (``sgd``, learning rate 0.01) learned too slowly from
    translations that change under it (docs/phantom.md).

    ``checkpoint_best`` follows ``checkpoint_criterion``: pseudo Dice on (translated) source validation patches, or what
    ``nnunet_uda.training.criteria`` measures once an epoch on always the same ``criterion_patches`` unlabelled target
    patches (rounded up to whole batches; 0 measures nothing). Agreement ranked checkpoints best (docs/results.md). A
    trainer that trains without target images opens none for this either: there it is pseudo Dice. Every ``keep_every``
    epochs (0: never) a checkpoint_epoch_XXXX.pth, with the number of finished epochs, is kept.

    ``labelled_target_share`` is, in a step, the share of labelled patches, and of their losses, that is of the target
    scans that ``dataset.json`` names as labelled; 0 leaves these labels alone. Without such scans it does nothing.

    At the end of training ``quality_volumes`` source validation volumes (0: none), each in six random styles, calibrate
    what ``nnUNetUDA_quality`` expects of the network's segmentations.

    ``mirror`` is nnU-Net's mirroring, in training and prediction; with ``auto`` not along the axis from left to right
    where two structures' names differ in the side alone (left_kidney, right_kidney): it would exchange them.
    """

    num_epochs: int = 200
    """At least 1. Fewer where training takes too long; schedules and shares follow."""
    iterations_per_epoch: int = 250
    """Steps of an epoch, at least 1."""
    val_iterations_per_epoch: int = 50
    """Validation batches of an epoch, at least 1. Fewer where validation takes long beside the steps."""
    segmenter_optimizer: Literal["adam", "sgd"] = "adam"
    """Adam is the papers'; SGD, nnU-Net's, wants a learning rate of 0.01."""
    segmenter_learning_rate: float = 1e-3
    """Positive. Lower where a loss becomes NaN."""
    segmenter_weight_decay: float = 3e-5
    """Of the segmenter's optimiser."""
    segmenter_schedule: Literal["poly", "constant"] = "poly"
    """poly: nnU-Net's, to zero over the epochs."""
    segmentation_loss: Literal["dice_ce", "dice"] = "dice_ce"
    """nnU-Net's Dice and cross-entropy, or Dice alone as in CISFA."""
    deep_supervision: bool = True
    """nnU-Net's; false to reproduce a paper."""
    augmentation: Literal["nnunet", "spatial", "none"] = "nnunet"
    """All of nnU-Net's, without its intensity transforms, or none."""
    mirror: bool | Literal["auto"] = "auto"
    """auto: not along left to right where structures have sides. false where mirrored anatomy is wrong (the heart)."""
    foreground_oversampling: float = 0.33
    """0 to 1: share of source patches that hold a structure for certain. More for small structures."""
    labelled_target_share: float = 0.33
    """0 to 0.95: share of labelled patches, and of their losses, that is of target scans named as labelled."""
    save_every: int = 10
    """Epochs between checkpoints that --c goes on from. Less where epochs are long."""
    keep_every: int = 0
    """Epochs between checkpoints that are kept for comparison; 0: none."""
    checkpoint_criterion: Literal[
        "pseudo_dice", "entropy", "foreground_entropy", "mutual_information", "agreement", "snd"
    ] = "agreement"
    """What checkpoint_best follows; none needs a target label."""
    criterion_patches: int = 32
    """Target patches that the criteria look at each epoch; 0: none is opened for them."""
    keep_largest_component: bool = True
    """Predict as one piece what is one in every label of the source. false where the target may have several."""
    picture_every: int = 10
    """Epochs between pictures and plots."""
    quality_volumes: int = 4
    """Source validation volumes that calibrate the quality estimate at the end; 0: none."""
    lean: bool = True
    """Less memory for translation, in a tenth more time (docs/speed.md)."""
    seed: int | None = None
    """For runs that can be repeated; to the last bit with nnUNet_n_proc_DA=0."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "iterations_per_epoch", "val_iterations_per_epoch", "save_every", "picture_every"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("keep_every", "criterion_patches", "quality_volumes"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        if self.checkpoint_criterion not in ("pseudo_dice", UDASettings.checkpoint_criterion):
            require(self.criterion_patches >= 1, "criterion_patches", "at least 1 for this checkpoint_criterion", 0)
        require(0 <= self.foreground_oversampling <= 1, "foreground_oversampling", "between 0 and 1")
        share = self.labelled_target_share
        require(0 <= share <= 0.95, "labelled_target_share", "between 0 and 0.95", share)
        require(self.segmenter_learning_rate > 0, "segmenter_learning_rate", "positive")


def require(condition: bool, name: str, expected: str, found: Any = "another value") -> None:
    """Raise a ``ValueError`` that names the setting where ``condition`` does not hold."""
    if not condition:
        raise ValueError(f"'{name}' must be {expected}, found {found}")


def parse_assignment(text: str) -> tuple[str, Any]:
    """``name=value`` with a JSON value; anything that is no JSON is taken as a string."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UDAError(
            f"-set takes NAME=VALUE, for instance num_epochs=100 or cisfa.generator_width=32, found {text!r}"
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


Settings = TypeVar("Settings")


def parse_settings(settings_class: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """Build ``settings_class`` from JSON values.

    Raises:
        UDAError: for an unknown key, a wrong type or a value out of range; it names the key and lists what exists.
    """
    if not isinstance(values, dict):
        raise UDAError(f"{where} must be a JSON object, found {type(values).__name__}")
    values = without_removed(settings_class, values, where)
    hints = _hints(settings_class)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        meant = did_you_mean(unknown[0], hints)
        raise UDAError(
            f"{where}: unknown setting {', '.join(map(repr, unknown))}.{meant} Existing ones: {', '.join(hints)}"
        )
    checked = {}
    for name, value in values.items():
        if not _has_type(value, hints[name]):
            raise UDAError(f"{where}: '{name}' must be {_describe(hints[name])}, found {shown(value)}")
        checked[name] = _in_place(value, hints[name])
    try:
        return settings_class(**checked)
    except ValueError as error:
        raise UDAError(f"{where}: {error}") from error


def without_removed(settings_class: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """``values`` without what is no setting any more: ``settings_class.removed``, names and what they are fixed at.

    Raises:
        UDAError: for another value than that.
    """
    removed = getattr(settings_class, "removed", {})
    for name in values.keys() & removed.keys():
        if values[name] != removed[name]:
            raise UDAError(
                f"{where}: '{name}' is no setting any more, it is fixed at {removed[name]!r}; found "
                f"{shown(values[name])}. Take it out of the plans"
            )
    return {name: value for name, value in values.items() if name not in removed}


def split_settings(uda: Any, method: str | None, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a ``uda`` object into the shared settings and those of ``method``; objects of other methods are left out.

    Raises:
        UDAError: where ``uda`` or what it holds of ``method`` is no object.
    """
    if not isinstance(uda, dict):
        raise UDAError(f"{where}: 'uda' must be a JSON object, found {type(uda).__name__}")
    if nested_deeper(uda, 20):
        raise UDAError(f"{where}: 'uda' is nested too deep: it holds settings, and objects of settings by method")
    objects = [*method_objects(uda), method]
    shared = {key: value for key, value in uda.items() if key not in objects}
    own = uda.get(method, {}) if method else {}
    if not isinstance(own, dict):
        raise UDAError(f"{where}.{method} must be a JSON object, found {shown(own)}")
    return shared, own


def method_objects(uda: dict[str, Any]) -> list[str]:
    """The keys of ``uda`` under which lie the settings of a method, by their looks."""
    shared = {field.name for field in dataclasses.fields(UDASettings)}
    return [key for key, value in uda.items() if isinstance(value, dict) and key not in shared]


def describe_settings(settings_class: type) -> list[tuple[str, str, Any]]:
    """``(name, type, default)`` of every setting, for help texts."""
    hints = _hints(settings_class)
    described = []
    for field in dataclasses.fields(settings_class):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        described.append((field.name, _describe(hints[field.name]), default))
    return described


def setting_notes(settings_class: type) -> dict[str, str]:
    """What is written under each setting in its class: meaning, range, when to change it. Not all have such a text."""
    notes: dict[str, str] = {}
    for one in reversed(settings_class.__mro__):
        if not dataclasses.is_dataclass(one):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
        except (OSError, TypeError, SyntaxError):  # a class without a file, or one that has changed since
            continue
        for field, text in itertools.pairwise(tree.body if isinstance(tree, ast.ClassDef) else []):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
                    notes[field.target.id] = " ".join(text.value.value.split())
    return notes


def _hints(settings_class: type) -> dict[str, Any]:
    # Each class by the names of its own module. nnU-Net's finder drops a trainer's module from sys.modules, where
    # get_type_hints would look; the class's own __init__ knows it.
    hints: dict[str, Any] = {}
    for one in reversed(settings_class.__mro__):
        if dataclasses.is_dataclass(one):
            hints |= inspect.get_annotations(one, globals=one.__init__.__globals__, eval_str=True)
    return hints


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _in_place(value: Any, hint: Any) -> Any:
    """1 as 1.0 where a number is asked for that need not be whole."""
    options = _options(hint)
    return float(value) if float in options and int not in options and type(value) is int else value


def _has_type(value: Any, hint: Any) -> bool:
    return any(_fits(value, option) for option in _options(hint))


def _fits(value: Any, option: Any) -> bool:
    if get_origin(option) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(option))
    if get_origin(option) is list:
        return isinstance(value, list) and all(_has_type(item, get_args(option)[0]) for item in value)
    if option is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if option is int:
        return type(value) is int and abs(value) < 2**63
    return value is None if option is type(None) else isinstance(value, option)


NAMES = {
    int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "a JSON object", list: "a list",
    type(None): "null",
}  # fmt: skip


def _describe(hint: Any) -> str:
    words = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            words.append("one of " + ", ".join(repr(value) for value in get_args(option)))
        elif get_origin(option) is list:
            words.append(f"a list, each item {_describe(get_args(option)[0])}")
        elif option in NAMES:
            words.append(NAMES[option])
        else:
            raise TypeError(
                f"{option} is no type that a plans file can hold; use int, float, bool, str, None, Literal, dict, list "
                "or list[...]"
            )
    return " or ".join(words)
