"""Functions that stop a process at a certain call."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest


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
