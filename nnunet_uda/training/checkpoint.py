"""Checkpoints as files: written whole with the one before kept, read as data, and the state of random generators."""

from __future__ import annotations

import codecs
import os
import random
import shlex
import shutil
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_uda.errors import UDAError, shown, system_fault
from nnunet_uda.files import sync_folder, whole_file

LATEST, BEST, FINAL = "checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"
PREVIOUS = "checkpoint_previous.pth"
"""The latest checkpoint but one. nnU-Net does not look at it: it is for the day when the latest cannot be read."""
FORMER = "checkpoint_former.pth"
"""The furthest checkpoint of a training that was begun anew without ``--c``; those of later ones are numbered."""


def write_checkpoint(checkpoint: dict[str, Any], path: Path | str) -> None:
    """Write a checkpoint whole or not at all; the latest one before it stays as ``checkpoint_previous.pth``.

    Raises:
        UDAError: if it cannot be written; what was there is intact.
    """
    path = Path(path)
    try:
        with whole_file(path) as temporary:
            torch.save(checkpoint, temporary)
            if path.name == LATEST and path.exists():
                _keep(path, path.with_name(PREVIOUS))
    except (OSError, RuntimeError) as error:
        raise UDAError(
            f"{path} could not be written ({system_fault(error) or error}). Is the disk full, or the folder read-only? "
            "The previous checkpoint is intact: make room and continue with --c"
        ) from error


def _keep(path: Path, copy: Path) -> None:
    """Give the file a second name, ``copy``, which at no moment is missing or half a file."""
    with whole_file(copy) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


def set_former_aside(folder: Path) -> Path | None:
    """Take a former training's checkpoints out of ``--c``'s sight; the furthest is kept, under the name returned.

    ``--c`` prefers ``checkpoint_final.pth``: left there, it would be taken for the end of the training begun anew.
    What the setting ``keep_every`` kept becomes ``former_checkpoint_epoch_*.pth``. Nothing that was kept before is
    overwritten: ``checkpoint_former.pth`` is followed by ``checkpoint_former_2.pth``.
    """
    kept = None
    for path in folder.glob("checkpoint_epoch_*.pth"):
        os.replace(path, _free(path.with_name(f"former_{path.name}")))
    for name in (FINAL, LATEST, PREVIOUS):
        path = folder / name
        if path.exists() and kept is None:
            kept = _free(folder / FORMER)
            os.replace(path, kept)
        path.unlink(missing_ok=True)
    sync_folder(folder)
    return kept


def _free(path: Path) -> Path:
    """``path``, or with the first number from 2 on that makes it the name of no file."""
    names = (path.with_stem(f"{path.stem}_{number}") for number in count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """A checkpoint's content, on the CPU. Nothing in the file is run: it may hold tensors, numbers and text only.

    Raises:
        UDAError: as ``load``; for a file that is no whole checkpoint, naming one beside it that is, and how to go on
            from that.
    """
    path = Path(path)
    try:
        return load(path)
    except UDAError:
        raise
    except Exception as error:  # a cut pickle raises whatever its last byte makes of it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UDAError(f"{path} cannot be read as a checkpoint (cut short?): {reason}. {_way_out(path)}") from error


def read_model(path: Path | str) -> dict[str, Any]:
    """``read_checkpoint`` of what a network is to be made of.

    Raises:
        UDAError: as ``read_checkpoint`` and ``check_model``.
    """
    return check_model(read_checkpoint(path), path)


def check_model(content: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """``content``, once it holds what every checkpoint of an nnU-Net v2 training does.

    Raises:
        UDAError: naming what it lacks, or what is of another kind; for weights that are no numbers.
    """
    no_checkpoint = f"{path} is no checkpoint of an nnU-Net v2 training"
    remedy = "Choose another file (-chk), or get this one again"
    needed = ("network_weights", "trainer_name", "init_args")  # what nnU-Net predicts with
    if lacking := [key for key in needed if key not in content]:
        found = shown(sorted(map(str, content)))
        raise UDAError(f"{no_checkpoint}: it lacks {', '.join(lacking)}; found {found}. {remedy}")
    weights, trainer, arguments = (content[key] for key in needed)
    axes, uda = content.get("inference_allowed_mirroring_axes") or (), content.get("uda", {})
    right = {
        "network_weights": isinstance(weights, dict) and all(isinstance(w, torch.Tensor) for w in weights.values()),
        "trainer_name": isinstance(trainer, str) and trainer.isidentifier(),
        "init_args": isinstance(arguments, dict) and isinstance(arguments.get("configuration"), str),
        "current_epoch": isinstance(content.get("current_epoch", 0), int),
        "inference_allowed_mirroring_axes": isinstance(axes, list | tuple) and all(a in (0, 1, 2) for a in axes),
        "uda": isinstance(uda, dict) and isinstance(uda.get("settings", {}), dict),
    }
    if wrong := [key for key, is_right in right.items() if not is_right]:
        raise UDAError(f"{no_checkpoint}: its {wrong[0]!r} is {shown(content[wrong[0]])}. {remedy}")
    if not all(weight.isfinite().all() for weight in weights.values() if weight.is_floating_point()):
        raise UDAError(f"{path}: its weights hold NaN or infinite numbers. Choose an earlier checkpoint (-chk)")
    return content


def configuration_of(content: dict[str, Any], path: Path | str, plans: dict[str, Any]) -> str:
    """The name of the configuration that a model (``check_model``) was trained with.

    Raises:
        UDAError: where its plans lack it, or its patches lack an axis along which the model is mirrored.
    """
    configuration = content["init_args"]["configuration"]
    if configuration not in plans["configurations"]:
        raise UDAError(
            f"{path} is of the configuration {shown(configuration)}, which the plans.json beside its fold lacks; it "
            f"has {', '.join(plans['configurations'])}. They are of different trainings: get the model's folder again"
        )
    axes = content.get("inference_allowed_mirroring_axes") or ()
    dimensions = len(PlansManager(plans).get_configuration(configuration).patch_size)
    if any(axis >= dimensions for axis in axes):
        raise UDAError(
            f"{path}: its 'inference_allowed_mirroring_axes' are {shown(axes)}, but patches of {configuration} have "
            f"{dimensions} axes. They are of different trainings: get the model's folder again"
        )
    return configuration


def load(path: Path, trusted: bool = False) -> dict[str, Any]:
    """A checkpoint's content, on the CPU, with torch's own errors; code pickled in it is run only if ``trusted``.

    Raises:
        UDAError: for a file that is there and that the system does not let be read.
    """
    try:
        with _numpy_allowed():
            checkpoint = torch.load(path, map_location="cpu", weights_only=not trusted)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or (fault := system_fault(error)) is None:
            raise
        raise UDAError(f"{path} cannot be read ({fault})") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it holds a {type(checkpoint).__name__}")
    return checkpoint


def _numpy_allowed() -> AbstractContextManager[None]:
    """nnU-Net's log, and the random state in checkpoints of before, hold numpy's numbers and arrays."""
    core = np._core if hasattr(np, "_core") else np.core
    numbers = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "uint32")]
    return torch.serialization.safe_globals(
        [core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype, *numbers, codecs.encode]
    )


def _way_out(path: Path) -> str:
    latest = path.with_name(LATEST)
    for other in (path.with_name(name) for name in (LATEST, PREVIOUS, BEST)):
        if other == path or not other.exists():
            continue
        try:
            epoch = load(other)["current_epoch"]
        except Exception:  # damaged too
            continue
        words = [] if path == latest else [shlex.join(["rm", str(path)])]
        words += [] if other == latest else [shlex.join(["cp", str(other), str(latest)])]
        return (
            f"{other} is whole and stands at epoch {epoch}. To go on from it: {' && '.join(words)} and then the same "
            "command with --c (left to you, since what damaged one file may have damaged more)"
        )
    return "No other checkpoint beside it can be read: start anew, without --c"


def plain(value: Any) -> Any:
    """``value`` with numpy's numbers as Python's, in lists and dictionaries too."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def random_state() -> dict[str, Any]:
    """State of every random generator that training draws from (Python, numpy, torch on CPU and on its CUDA device)."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` returned."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.asarray(keys).astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
