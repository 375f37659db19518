"""Processes that are stopped at a certain call, and one that holds a lock."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nnunet_uda.files import locked

fork = multiprocessing.get_context("fork")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Another process holds the lock ``path``."""
    holds, free = fork.Event(), fork.Event()

    def hold() -> None:
        with locked(path):
            holds.set()
            free.wait(60)

    process = fork.Process(target=hold)
    process.start()
    assert holds.wait(60)
    try:
        yield
    finally:
        free.set()
        process.join()


def killed(function: Callable[[], object]) -> None:
    """Run ``function`` in a copy of this process, which must end by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(7)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"it was not killed: {status}"


def kill_at(monkeypatch: pytest.MonkeyPatch, module: object, name: str, call: int, after: bool = False) -> None:
    """SIGKILL this process at the given call of ``module.name`` (1 is the first), before or after it is made."""
    original, seen = getattr(module, name), []

    def replacement(*args, **kwargs):
        seen.append(1)
        if len(seen) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(seen) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    monkeypatch.setattr(module, name, replacement)
