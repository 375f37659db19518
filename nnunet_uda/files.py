"""Files and folders that appear whole or not at all, and locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nnunet_uda.errors import UDAError

LOCK = ".lock"


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed to ``path``, else removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """Return once the file's content has reached the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once the names in ``folder`` have reached the disk, where its file system can promise that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems sync files only
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(value: Any, path: Path | str) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=4) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of ``whole_file``; for a folder that nobody else writes into now."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` that takes its place on success, and is removed after an error.

    What lay at ``target`` before is replaced: the caller has looked at it. Folders that killed processes left of the
    same ``target`` are removed; one that is still being filled is locked, and stays.

    Raises:
        UDAError: if the place cannot be written.
    """
    target = Path(os.path.abspath(target))
    temporary, former = (target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial") for _ in range(2))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.????????.partial"):
            with suppress(BlockingIOError), locked(leftover / LOCK):
                shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        with locked(temporary / LOCK):
            yield temporary
            (temporary / LOCK).unlink()
            if target.exists():
                target.rename(former)
            try:
                temporary.rename(target)
            except OSError:
                if former.exists():
                    former.rename(target)
                raise
    except OSError as error:
        raise UDAError(
            f"{target} cannot be written ({error}). Is the disk full, or the folder read-only? Nothing was changed"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
    sync_folder(target.parent)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder`` (created if absent), so that two processes do not fill it at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def locked(path: Path) -> Iterator[Any]:
    """Hold the file ``path`` (created if absent), yielded open for reading and writing.

    The lock belongs to this process alone: forked workers do not keep it, and the kernel drops it with the process.

    Raises:
        BlockingIOError: at once, where another process holds it.
    """
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # POSIX leaves systems the choice between EACCES and EAGAIN
            raise BlockingIOError(*error.args) from None
        yield file
