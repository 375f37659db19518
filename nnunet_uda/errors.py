"""The one exception whose text is meant for the user."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import re
import reprlib
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any


class UDAError(RuntimeError):
    """Bad input, found and explained.

    The message names the file, what was found, what was expected and what to do. Commands print it without a
    traceback and exit with status 1.
    """


_ROOM = "Make room there, or choose another folder"
_RIGHT = "Give this user the right to it, or choose another folder"
_NETWORK = "Look whether the disk or the network storage is well, then start again"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "Files of that size are not allowed there (ulimit -f, or the file system's own limit)",
    errno.EROFS: "Mount it for writing, or choose another folder",
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.ENAMETOOLONG: "Choose a shorter name or folder",
    errno.ENOENT: "Give a path that exists",
    errno.ENOTDIR: "A file lies where a folder is expected: choose another path",
    errno.EISDIR: "A folder lies where a file is expected: choose another path",
    errno.EEXIST: "Remove it, or choose another path",
    errno.ENOTEMPTY: "Remove it, or choose another path",
    errno.ELOOP: "Mend the links, or choose another path",
    errno.EBUSY: "It is in use or a mount point: choose a folder inside it",
    errno.EXDEV: "Choose a path on one file system",
    errno.EMFILE: "Allow more open files (ulimit -n), or use fewer processes",
    errno.ENFILE: "Close other programs, or use fewer processes",
    errno.EAGAIN: "Allow more processes (ulimit -u), or use fewer",
    errno.ENOMEM: "Free memory, or use fewer processes",
    errno.EIO: _NETWORK,
    errno.ESTALE: _NETWORK,
    errno.ENOTCONN: _NETWORK,
    errno.ETIMEDOUT: _NETWORK,
    errno.EHOSTDOWN: _NETWORK,
    errno.EHOSTUNREACH: _NETWORK,
    errno.ENODEV: _NETWORK,
    errno.ENXIO: _NETWORK,
}


def system_fault(error: BaseException) -> str | None:
    """What the system refused, on which file, and what to do; None for an error that is not the system's.

    The one place where permissions, read-only and full disks, quotas, names too long, lost network storage and lack of
    memory are put into words.
    """
    if isinstance(error, MemoryError):
        return f"memory ran out ({str(error) or 'no size is known'}). Free memory, or use fewer processes (-np 1)"
    if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        return f"a file was left short ({error}). {_ROOM}"  # numpy's words for a full disk
    if not isinstance(error, OSError) or error.errno not in _REMEDIES:
        return None
    where = " -> ".join(repr(file) for file in files_of(error))
    return f"{error.strerror or os.strerror(error.errno)}{where and ': '}{where}. {_REMEDIES[error.errno]}"


def files_of(error: OSError) -> list[str]:
    """The files that an error names: none, one, or old and new name."""
    return [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes, Path))]


def shown(value: Any) -> str:
    """A value from a file for a message, shortened where it is long or nested."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)


def printable(text: str, limit: int = 300) -> str:
    """``text`` of a file or of a library for a message: one line, without what a terminal would obey."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text).strip()
    return line if len(line) <= limit else f"{line[:limit]}..."


def some(values: Iterable[object], most: int = 5) -> str:
    """``a, b and 3 more``: the first ``most`` of some values for a message."""
    listed = list(map(str, values))
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def nested_deeper(value: Any, limit: int) -> bool:
    """Whether lists and dictionaries lie inside each other more than ``limit`` deep."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            item
            for part in level
            if isinstance(part, (dict, list))
            for item in (part.values() if isinstance(part, dict) else part)
            if isinstance(item, (dict, list))
        ]
    return bool(level)


def escaped(text: str) -> str:
    """``text`` with everything but line breaks that a terminal does not print, or obeys, as an escape sequence."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Turn a ``main(argv=None)`` into a console entry point: what users can mend ends in one message.

    ``UDAError`` and what the system refuses become that message and exit status 1. Ctrl-C ends with status 130, and a
    reader of the output that has gone (``| head``) with 141, as shells have it for programs that a signal ended.
    What the terminal's encoding lacks is printed as an escape sequence, and ends no command.
    """

    @wraps(main)
    def entry_point(argv: list[str] | None = None) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            main(argv)
            print(end="", flush=True)
        except KeyboardInterrupt:
            print("\nInterrupted", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            raise SystemExit(128 + signal.SIGPIPE) from None
        except (UDAError, OSError, MemoryError) as error:
            if (text := message_of(error)) is None:
                raise
            # what its frames hold ends here: a bar of progress its line, before the message begins one
            error.__traceback__ = error.__cause__ = error.__context__ = None
            print(f"ERROR: {escaped(text)}", file=sys.stderr)
            raise SystemExit(1) from None

    return entry_point


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean A or B?`` of the names that are nearest, or nothing."""
    near = get_close_matches(name, list(known), 3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def message_of(error: BaseException) -> str | None:
    """The text of ``UDAError`` and of what the system refused; None for everything else, which is a fault of ours."""
    return str(error) if isinstance(error, UDAError) else system_fault(error)


def _reader_is_gone() -> bool:
    """Whether standard output leads nowhere any more; then nothing is left to be written there at the process's end."""
    output = select.poll()
    output.register(1, 0)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


@contextmanager
def worker_ends_by_message() -> Iterator[None]:
    """End a worker process of a program that is not ours by one message, not a traceback, if a ``UDAError`` is raised.

    Its starter finds it dead. In the starter itself, which has an ``excepthook``, the error goes on.
    """
    try:
        yield
    except UDAError as error:
        if multiprocessing.parent_process() is None:
            raise
        print(f"ERROR: {escaped(str(error))}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def print_without_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """An ``excepthook`` for programs that are not ours, such as ``nnUNetv2_train``: as ``command``, one message.

    What nnU-Net says of its worker processes' death is one: their own message (``worker_ends_by_message``) is above it.
    """
    text = message_of(error)
    if text is None and isinstance(error, RuntimeError) and str(error).startswith("Background workers died"):
        text = str(error)
    if text is not None:
        print(f"ERROR: {escaped(text)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
