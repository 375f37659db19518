"""The methods that there are. Each trainer brings its settings (``UDATrainer.method_settings``); no list names them."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import pkgutil
import re
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from nnunetv2.utilities.find_class_by_name import temporarily_cleanup_imports_from_path, temporarily_extend_syspath

from nnunet_uda.errors import UDAError, did_you_mean
from nnunet_uda.settings import (
    UDASettings,
    describe_settings,
    method_objects,
    parse_settings,
    setting_notes,
    split_settings,
)

EXTERNAL = "nnUNet_extTrainer"
TRAINERS = "nnunet_uda.trainers"


@dataclass(frozen=True)
class Method:
    """Settings under ``uda.NAME``, and the trainers that read them as they are in ``settings``."""

    name: str
    settings: type
    trainers: list[str]


@dataclass(frozen=True)
class Found:
    """What this package and the folders of ``nnUNet_extTrainer`` hold.

    Attributes:
        methods: by name; several have the same one where trainers share it and not its defaults. This package's first.
        unreadable: what went wrong, by the file that could not be imported.
    """

    methods: list[Method]
    unreadable: dict[str, str]

    def names(self) -> list[str]:
        """Of the methods, each once."""
        return list(dict.fromkeys(method.name for method in self.methods))


def find_methods() -> Found:
    """Every method with settings of its own, of the trainers that ``nnUNetv2_train -tr`` finds beside nnU-Net's.

    Raises:
        UDAError: for a trainer whose settings cannot be read from a plans file.
    """
    found: dict[tuple[str, type], Method] = {}
    unreadable: dict[str, str] = {}
    for module in _modules(unreadable):
        for name, trainer in vars(module).items():
            if isinstance(trainer, type) and getattr(trainer, "method_settings", None) is not None:
                method = _method_of(trainer)
                trainers = found.setdefault((method.name, method.settings), method).trainers
                if name not in trainers:
                    trainers.append(name)
    return Found(sorted(found.values(), key=lambda method: method.name), unreadable)


def default_settings() -> dict[str, Any]:
    """The default of every setting as the plans' ``uda`` holds them: shared ones, and an object for each method.

    Where trainers share a method's name and not its defaults, the first one's.
    """
    methods = {method.name: dataclasses.asdict(method.settings()) for method in reversed(find_methods().methods)}
    return dataclasses.asdict(UDASettings()) | methods


def list_settings() -> str:
    """All settings with type, default and meaning, as text: shared ones, then those of every method that is found."""

    def line(name: str, kind: str, default: Any, notes: dict[str, str]) -> str:
        note = notes.get(name.rpartition(".")[2])
        return f"  {name} = {json.dumps(default)}  ({kind})" + (f"\n      {note}" if note else "")

    found = find_methods()
    notes = setting_notes(UDASettings)
    lines = ["Shared by all trainers:", *(line(*setting, notes) for setting in describe_settings(UDASettings))]
    first: dict[str, list[tuple[str, str, Any]]] = {}
    for method in found.methods:
        settings, before = describe_settings(method.settings), first.get(method.name, [])
        heading = f" as {', '.join(method.trainers)} has them, where they differ" if before else ""
        first.setdefault(method.name, settings)
        notes = setting_notes(method.settings)
        own = [line(f"{method.name}.{each[0]}", *each[1:], notes) for each in settings if each not in before]
        lines += [f"Settings of {method.name}{heading}:", *own] if own else []
    lines += [f"Could not be imported: {path}: {error}" for path, error in found.unreadable.items()]
    return "\n".join(lines)


def _method_of(trainer: type[Any]) -> Method:
    check_trainer(trainer)
    return Method(trainer.method, trainer.method_settings, [])


def _modules(unreadable: dict[str, str]) -> Iterator[ModuleType]:
    """This package's trainers, then what nnU-Net would search, imported as nnU-Net imports it."""
    own = trainers_folder().resolve()
    for _, name, _ in pkgutil.iter_modules([str(own)]):
        yield importlib.import_module(f"{TRAINERS}.{name}")
    for folder in external_folders():
        if folder.resolve() == own:
            continue
        with temporarily_extend_syspath(str(folder)), temporarily_cleanup_imports_from_path(str(folder)):
            for name in _names(folder, ""):
                try:
                    yield importlib.import_module(name)
                except (Exception, SystemExit) as error:  # anybody's file, which may fail in any way
                    place = folder.joinpath(*name.split("."))
                    unreadable[str(place)] = f"{type(error).__name__}: {error}"


def external_folders() -> list[Path]:
    """The folders of ``nnUNet_extTrainer`` that exist."""
    paths = os.environ.get(EXTERNAL, "").split(os.pathsep)
    return [Path(path).absolute() for path in paths if path.strip() and Path(path).is_dir()]


def trainer_names() -> list[str]:
    """The classes whose names end like a trainer's in every file that ``-tr`` is looked for in; nothing is imported."""
    import nnunetv2

    nnunet = Path(nnunetv2.__file__).parent / "training" / "nnUNetTrainer"
    names: set[str] = set()
    for folder in (trainers_folder(), *external_folders(), nnunet):
        for path in folder.rglob("*.py"):
            names.update(re.findall(r"^class (\w*Trainer\w*)\b", path.read_text("utf-8", "replace"), re.MULTILINE))
    return sorted(names)


def find_any_trainer(name: str) -> type[Any]:
    """The trainer class, nnU-Net's own or another.

    Raises:
        UDAError: as ``look_for_trainer``, and where there is no such trainer.
    """
    if (trainer := look_for_trainer(name)) is not None:
        return trainer
    names = trainer_names()
    by_small = {known.lower().removesuffix("trainer"): known for known in names}
    near = [by_small[word] for word in get_close_matches(name.lower().removesuffix("trainer"), by_small, 3)]
    meant = f" Did you mean {' or '.join(near)}?" if near else f" These would be found: {', '.join(names)}"
    raise UDAError(f"-tr {name}: no trainer of that name.{meant}")


def look_for_trainer(name: str) -> type[Any] | None:
    """The trainer class where nnU-Net finds it, None where there is none of that name.

    Raises:
        UDAError: for a class that is no trainer, and for a file of anybody's that fails as nnU-Net imports it.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    let_find()
    try:
        with redirect_stdout(io.StringIO()):  # nnU-Net says which files it looks into
            return recursive_find_trainer_class_by_name(name)
    except (Exception, SystemExit) as error:
        if place := _place_of(error):
            raise UDAError(
                f"{place} cannot be imported ({type(error).__name__}: {error}). nnU-Net imports the files in the "
                f"folders of {EXTERNAL} until it finds a trainer: mend this one, or move it elsewhere"
            ) from error
        if isinstance(error, AssertionError | TypeError):  # what nnU-Net makes of another class, or of what is no class
            raise UDAError(f"-tr {name} is no trainer ({error})") from error
        if not isinstance(error, RuntimeError):
            raise
        return None


def _place_of(error: BaseException) -> str | None:
    """File and line in a folder of ``nnUNet_extTrainer`` where ``error`` came about, None if it was not there."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    folders = external_folders()
    blamed = [place for place in places if any(Path(place[0]).absolute().is_relative_to(f) for f in folders)]
    return f"{blamed[-1][0]}, line {blamed[-1][1]}," if blamed else None


def _names(folder: Path, package: str) -> Iterator[str]:
    entries = list(pkgutil.iter_modules([str(folder)]))
    yield from (package + name for _, name, is_package in entries if not is_package)
    for _, name, is_package in entries:
        if is_package:
            yield from _names(folder / name, f"{package}{name}.")


def check_trainer(trainer: type[Any]) -> None:
    """Refuse a trainer whose settings cannot lie under ``uda.METHOD`` in a plans file, which holds JSON.

    Raises:
        UDAError: naming the trainer, and what its author has to change.
    """
    method, settings, name = trainer.method, trainer.method_settings, trainer.__name__
    if not isinstance(method, str) or not method.isidentifier():
        raise UDAError(
            f"{name}: its class attribute 'method' is {method!r}; expected the name under which its settings lie in "
            "the plans, of letters, digits and _"
        )
    if method in {field.name for field in dataclasses.fields(UDASettings)}:
        raise UDAError(f"{name}: its 'method' is {method!r}, which is the name of a shared setting: give another one")
    if not (isinstance(settings, type) and dataclasses.is_dataclass(settings)):
        raise UDAError(f"{name}: 'method_settings' must be a dataclass, found {settings!r}")
    try:
        described = describe_settings(settings)
    except (NameError, TypeError) as error:
        raise UDAError(f"{name}: the settings of {settings.__name__} cannot be read: {error}") from error
    without = [setting for setting, _, default in described if default is dataclasses.MISSING]
    if without:
        raise UDAError(f"{name}: {settings.__name__} has no default for {', '.join(without)}: every setting needs one")


def settings_of(trainer: type[Any], plans: dict[str, Any]) -> tuple[UDASettings, Any]:
    """The shared settings in ``plans``, and the trainer's own, or None where it has none.

    Raises:
        UDAError: for settings of an unknown method, and for whatever ``parse_settings`` refuses.
    """
    where, uda, method = f"plans {plans['plans_name']!r}, key 'uda'", plans.get("uda", {}), trainer.method
    shared, own = split_settings(uda, method, where)
    refuse_unknown_methods(uda, method, where)
    settings = parse_settings(UDASettings, shared, where)
    if trainer.method_settings is None:
        return settings, None
    check_trainer(trainer)
    clash = sorted(key for key, value in trainer.fixed_settings.items() if own.get(key, value) != value)
    if clash:
        raise UDAError(f"{where}: {trainer.__name__} fixes {clash}; train another variant, or remove them")
    return settings, parse_settings(trainer.method_settings, own | trainer.fixed_settings, f"{where}.{method}")


def refuse_unknown_methods(uda: dict[str, Any], method: str | None, where: str) -> None:
    """Raise ``UDAError`` where an object in ``uda`` is neither of ``method`` nor of any method that is found."""
    nested = [key for key in method_objects(uda) if key != method]
    if not nested:  # then nothing has to be searched
        return
    found = find_methods()
    known = sorted({*found.names(), *([method] if method else [])})
    for name in nested:
        if name not in known:
            failed = "".join(f". {path} could not be imported ({error})" for path, error in found.unreadable.items())
            searched = os.pathsep.join(map(str, external_folders())) or "not set"
            meant = did_you_mean(name, known)
            raise UDAError(
                f"{where}: 'uda' holds settings for an unknown method {name!r}.{meant} Known methods: "
                f"{', '.join(known)}. A trainer of your own is found in the folders of {EXTERNAL} (now {searched})"
                f"{failed}"
            )


def check_uda(uda: dict[str, Any], where: str) -> None:
    """Validate a ``uda`` object with every method's own settings in it; raise ``UDAError`` for the first fault.

    Where several methods have a name, it is enough that one of them takes what is there.
    """
    shared, _ = split_settings(uda, None, where)
    refuse_unknown_methods(uda, None, where)
    found = find_methods()
    parse_settings(UDASettings, {key: value for key, value in shared.items() if key not in found.names()}, where)
    for name in found.names():
        errors = []
        for method in (method for method in found.methods if method.name == name):
            try:
                parse_settings(method.settings, uda.get(name, {}), f"{where}.{name}")
                break
            except UDAError as error:
                errors.append(error)
        else:
            raise errors[0]


def trainers_folder() -> Path:
    """The folder for ``nnUNet_extTrainer``, in a clone, an editable install or a wheel alike."""
    spec = find_spec(TRAINERS)
    if spec is None or spec.origin is None:
        raise UDAError("the package nnunet_uda is not installed: run `pip install .` in its folder")
    return Path(spec.origin).parent


def let_find() -> None:
    """Let nnU-Net find this package's trainers in this process and what it starts, behind those the user has named."""
    folders = [path for path in os.environ.get(EXTERNAL, "").split(os.pathsep) if path.strip()]
    ours = trainers_folder()
    if ours.resolve() not in [Path(path).resolve() for path in folders]:
        os.environ[EXTERNAL] = os.pathsep.join([*folders, str(ours)])
