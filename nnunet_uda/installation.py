"""Check that everything is there that training and prediction need."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import NamedTuple

from nnunet_uda.data.convention import environment_folder
from nnunet_uda.errors import UDAError
from nnunet_uda.methods import EXTERNAL, external_folders, find_any_trainer, find_methods, trainers_folder
from nnunet_uda.workers import usable_cores, wished_threads

OK, NOTE, WRONG = "ok", "note", "WRONG"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
LEAST_GIB = 1
SCARCE_GIB = 20


class Finding(NamedTuple):
    """One line: how it is, what was looked at, and what was found or is to be done."""

    state: str
    what: str
    text: str


def packages() -> Iterator[Finding]:
    """Python and every package that this one needs, in the versions that it needs."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wanted = SpecifierSet(distribution("nnunet_uda").metadata["Requires-Python"])
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding(OK if wanted.contains(python) else WRONG, "Python", f"{python}, needed: {wanted}")
    wrong: list[str] = []
    right: list[str] = []
    for requirement in map(Requirement, requires("nnunet_uda") or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        (right if fits else wrong).append(f"{requirement.name} {found}{'' if fits else f' ({requirement.specifier})'}")
    if wrong:
        yield Finding(WRONG, "packages", f"{', '.join(wrong)}. Install again: pip install .")
    else:
        main = [text for text in right if text.split()[0] in ("nnunetv2", "torch")]
        yield Finding(OK, "packages", f"{', '.join(main)}, and {len(right) - len(main)} others in needed versions")


def folders() -> Iterator[Finding]:
    """nnU-Net's three folders: set, there, readable, and (but for the first) writable, with room."""
    for name in FOLDERS:
        try:
            path = environment_folder(name)
        except UDAError as error:
            yield Finding(WRONG, name, str(error).removeprefix(f"the environment variable {name} is "))
            continue
        if not path.is_dir():
            yield Finding(WRONG, name, f"{path} is no folder. Make it: mkdir -p {path}")
        elif not os.access(path, os.R_OK | os.X_OK):
            yield Finding(WRONG, name, f"{path} cannot be read by this user")
        elif not os.access(path, os.W_OK):
            text = f"{path} cannot be written by this user"
            read_only = name != "nnUNet_results"
            yield Finding(
                NOTE if read_only else WRONG, name, f"{text}{': nothing can be converted or preprocessed' * read_only}"
            )
        else:
            free = shutil.disk_usage(path).free / 2**30
            state = WRONG if free < LEAST_GIB else NOTE if free < SCARCE_GIB else OK
            yield Finding(state, name, f"{path}, {free:.1f} GiB free{'' if state == OK else ': make room there'}")


def devices() -> Iterator[Finding]:
    """What can train here."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(OK, "device", f"cuda:{index}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        other = "Apple's mps and the CPU" if torch.backends.mps.is_available() else "the CPU alone"
        yield Finding(NOTE, "device", f"no CUDA device: {other} (-device cpu; nnUNetUDA_configure -preset cpu)")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding(OK, "cores", f"{usable_cores()} usable, OMP_NUM_THREADS {threads}: {wished_threads()} thread(s)")
    if os.environ.get("nnUNet_n_proc_DA") == "0":
        text = "0: nnUNetv2_plan_and_preprocess fails with it. Set it for training alone"
        yield Finding(NOTE, "nnUNet_n_proc_DA", text)


def finder() -> Iterator[Finding]:
    """Whether nnU-Net finds the trainers here, and can import what lies beside them."""
    ours = trainers_folder()
    value = os.environ.get(EXTERNAL, "")
    line = f'export {EXTERNAL}="$(nnUNetUDA_trainers)"'
    if ours.resolve() not in [folder.resolve() for folder in external_folders()]:
        found = f"is {value!r}, without {ours}" if value else "is not set"
        yield Finding(
            WRONG, EXTERNAL, f"{found}: nnUNetUDA_train finds the trainers, nnUNetv2_predict does not. Add: {line}"
        )
        return
    missing = [path for path in value.split(os.pathsep) if path.strip() and not Path(path).is_dir()]
    if missing:
        yield Finding(WRONG, EXTERNAL, f"{', '.join(missing)} is no folder")
    methods = find_methods()
    for path, error in methods.unreadable.items():
        yield Finding(WRONG, "trainers", f"{path} cannot be imported: {error}")
    if methods.unreadable:  # where nnU-Net's search may end
        return
    find_any_trainer("CASTTrainer")
    number = sum(len(method.trainers) for method in methods.methods)
    yield Finding(OK, "trainers", f"found, {number} with settings of {len(methods.names())} methods")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (packages, folders, devices, finder)


def examine(checks: tuple[Callable[[], Iterator[Finding]], ...] = CHECKS) -> Iterator[Finding]:
    """All findings; a check that fails is one too."""
    for check in checks:
        try:
            yield from check()
        except (UDAError, ImportError, OSError) as error:
            yield Finding(WRONG, check.__name__, f"{type(error).__name__}: {error}")
