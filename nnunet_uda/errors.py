"""The one exception whose text is meant for the user."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any


class UDAError(RuntimeError):
    """Bad input, found and explained.

    The message names the file, what was found, what was expected and what to do. Commands print it without a
    traceback and exit with status 1.
    """


def shown(value: Any) -> str:
    """A value from a file for a message, shortened where it is long or nested."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)


def printable(text: str, limit: int = 300) -> str:
    """``text`` of a file or of a library for a message: one line, without what a terminal would obey."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text).strip()
    return line if len(line) <= limit else f"{line[:limit]}..."


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


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Turn a ``main(argv=None)`` into a console entry point: ``UDAError`` becomes one message and exit status 1."""

    @wraps(main)
    def entry_point(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except UDAError as error:
            print(f"ERROR: {error}", file=sys.stderr)
            raise SystemExit(1) from None

    return entry_point


def print_without_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """An ``excepthook`` for programs that are not ours, such as ``nnUNetv2_train``: ``UDAError`` is one message."""
    if isinstance(error, UDAError):
        print(f"ERROR: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
