"""Files and folders that appear whole or not at all, and locks that end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from nnunet_uda.errors import UDAError, files_of, system_fault

LOCK = ".lock"
FORMER = "former"
"""In a working folder of ``whole_folder``: what lay at its target before."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed to ``path``, else removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # where nothing can be written there is nothing to remove
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and set(files_of(error)) <= {str(temporary), str(path)}:
            error.filename, error.filename2 = str(path), None  # a full disk names no file
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


def cannot_write(path: Path, error: Exception) -> UDAError:
    """The message for a file that a library could not write, or left short; few libraries say why."""
    said = system_fault(error) or (str(error).strip() or type(error).__name__).splitlines()[-1]
    if isinstance(error, UDAError):  # what reading it again found; its advice is for files that others wrote
        said = "it was left short"
    free = shutil.disk_usage(path.parent).free / 2**30 if path.parent.is_dir() else 0
    return UDAError(
        f"{path}: cannot be written whole ({said}); {free:.1f} GiB are free there. Make room, or check the permissions "
        "of the folder"
    )


def write_text(text: str, path: Path | str) -> None:
    """Write ``text`` as UTF-8, whole or not at all; what is no character is escaped."""
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8", "backslashreplace")


def check_place(path: Path) -> None:
    """Raise ``UDAError`` where no file can be made at ``path``, nor the folders that it lacks: before long work."""
    there = next(folder for folder in Path(os.path.abspath(path)).parents if os.path.lexists(folder))
    if not there.is_dir():
        raise UDAError(f"{path} cannot be written: {there} is no folder. Choose another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UDAError(f"{path} cannot be written: this user may not write into {there}. Choose another path")


def write_json(value: Any, path: Path | str) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(json.dumps(value, indent=4) + "\n", path)


def link(file: Path, place: Path) -> None:
    """Make ``place`` a link to ``file`` where the file system allows, else a copy."""
    try:
        os.symlink(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)


def is_free(folder: Path) -> bool:
    """Whether nothing lies at ``folder``, or a folder that holds nothing but a lock."""
    return not folder.exists() or (folder.is_dir() and all(path.name == LOCK for path in folder.iterdir()))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of ``whole_file``; for a folder that nobody else writes into now."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Return once all files and names below ``folder`` have reached the disk. What links point to is not looked at."""
    for path, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(file := Path(path, name)):
                sync(file)
        sync_folder(Path(path))


@contextmanager
def whole_folder(target: Path, family: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` that takes its place on success, and is removed after an error.

    What lay at ``target`` before is replaced: the caller has looked at it, after ``put_back``. It is set aside and
    removed only when the new one, synced, stands in its place; else it is put back, by this process or by the next.

    Args:
        family: prefix of the hidden working folders' names. Targets of one family put back each other's former.

    Raises:
        UDAError: if the place cannot be written.
    """
    target = Path(os.path.abspath(target))
    family = family or _family(target)
    work = target.with_name(f"{family}_{uuid.uuid4().hex[:8]}")
    former, new = work / FORMER / target.name, work / "new"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        put_back(target, family)
        work.mkdir()
    except OSError as error:
        raise UDAError(_unwritable(target, error)) from error
    try:
        with locked(work / LOCK):
            new.mkdir()
            yield new
            sync_tree(new)
            if target.exists():
                former.parent.mkdir()
                os.replace(target, former)
            os.replace(new, target)
            sync_folder(target.parent)
            _forget(work)
    except OSError as error:
        if system_fault(error) is None or not _concerns(error, target, work):
            raise
        raise UDAError(_unwritable(target, error)) from error
    finally:
        if former.exists() and not target.exists():
            os.replace(former, target)
        shutil.rmtree(work, ignore_errors=True)


def put_back(target: Path, family: str | None = None) -> None:
    """Put back what a killed ``whole_folder`` of the same family had set aside, and remove what else it left.

    What another process is still filling is locked, and stays; so does what another user left.
    """
    target = Path(os.path.abspath(target))
    for work in target.parent.glob(f"{glob.escape(family or _family(target))}_????????"):
        with suppress(BlockingIOError, FileNotFoundError, PermissionError), locked(work / LOCK):
            for former in _set_aside(work):
                if not (place := target.with_name(former.name)).exists():
                    os.replace(former, place)
                    print(f"{place} is back: an interrupted command had set it aside", file=sys.stderr)
            shutil.rmtree(work, ignore_errors=True)


def _set_aside(work: Path) -> list[Path]:
    """Folders that a killed command had set aside; earlier versions kept them in a folder called ``..._replaced``."""
    folder = work if work.name.endswith("_replaced") else work / FORMER
    return [path for path in folder.glob("*") if path.name != LOCK]


def _family(target: Path) -> str:
    return f".{target.name[:200]}.partial"


def _forget(work: Path) -> None:
    """What was set aside is not wanted any more: a half removed folder must never be put back."""
    if (work / FORMER).exists():
        os.replace(work / FORMER, work / "superseded")


def _concerns(error: OSError, target: Path, work: Path) -> bool:
    """Whether the system's refusal is about the place to be written, not about an input."""
    places = [Path(os.path.abspath(file)) for file in files_of(error)]
    return not places or any(place.is_relative_to(top) for place in places for top in (work, target))


def _unwritable(target: Path, error: OSError) -> str:
    return f"{target} cannot be written ({system_fault(error) or error}). Nothing was changed"


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder`` (created if absent), so that two processes do not fill it at once; wait for it.

    Where nothing was put into it, as after a refusal, the lock and the folders that were created are removed again.
    """
    with ExitStack() as stack:
        created = _hold(folder, stack)
        try:
            yield
        finally:
            if os.listdir(folder) == [LOCK]:
                os.unlink(folder / LOCK)
                with suppress(OSError):  # another process has come in
                    for path in created:
                        path.rmdir()


def _hold(folder: Path, stack: ExitStack) -> list[Path]:
    """Let ``stack`` hold the lock on ``folder``; the folders that were created for it, innermost first."""
    while True:
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as attempt:  # the last holder may have removed what it created
            file = attempt.enter_context(locked(folder / LOCK, wait=True))
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                stack.push(attempt.pop_all())
                return created


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[Any]:
    """Hold the file ``path`` (created if absent), yielded open for reading and writing.

    The lock belongs to this process alone: forked workers do not keep it, and the kernel drops it with the process.
    Where the file system knows no locks, as some of clusters do not, a warning is printed.

    Args:
        wait: for another process that holds it.

    Raises:
        BlockingIOError: at once, where another process holds it, unless ``wait``.
    """
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # POSIX leaves systems the choice between EACCES and EAGAIN
            raise BlockingIOError(*error.args) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"WARNING: the file system of {path.parent} knows no locks ({error.strerror}): see to it that no two "
                "commands write there at once",
                file=sys.stderr,
            )
        yield file
