"""Signals that ask training to end, and the lock that keeps two trainings off one fold."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from types import FrameType

from nnunet_uda.errors import UDAError
from nnunet_uda.files import locked
from nnunet_uda.workers import POLL_SECONDS, end_with

TRAINING_LOCK = ".training.lock"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """SIGTERM (a cluster's warning) and SIGINT (Ctrl-C) inside a ``with`` block.

    While ``at_once`` is true either one ends the program there and then, with status 128 + its number and without a
    traceback. While it is false it is kept in ``received`` for the program to ask for; repetitions change nothing, as
    clusters send some signals twice. Processes forked meanwhile leave SIGINT to this one, which Ctrl-C reaches too,
    end by SIGTERM, and end when this process does. Off the main thread, where Python allows no handlers, nothing
    changes.

    Args:
        goes_on: said when a signal ends the program at once: what to do to go on.
    """

    _active: StopSignals | None = None

    def __init__(self, goes_on: str) -> None:
        self.goes_on = goes_on
        self.at_once = True
        self.received: signal.Signals | None = None
        self.pid = os.getpid()

    def __enter__(self) -> StopSignals:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        _tame_forked_processes()
        self._outer, StopSignals._active = StopSignals._active, self
        return self

    def __exit__(self, *_: object) -> None:
        StopSignals._active = self._outer
        if self._is_main:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.at_once:
            _say(f"{name}: ended. {self.goes_on}")
            raise SystemExit(128 + number)
        if self.received is None:
            _say(f"{name}: training ends after this step, with a checkpoint")
        self.received = signal.Signals(number)


def _say(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())  # a handler may have interrupted print itself


@cache
def _tame_forked_processes() -> None:
    os.register_at_fork(after_in_child=_in_forked_process)


def _in_forked_process() -> None:
    if StopSignals._active is None:
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(StopSignals._active.pid)
    StopSignals._active = None


def wait_for_fold(folder: Path) -> None:
    """Return once no training holds this fold's folder; one that is ending takes as long as its step.

    For those who start trainings by themselves: a person is told by ``fold_lock`` instead.
    """
    for attempt in count():
        try:
            with locked(folder / TRAINING_LOCK):
                return
        except BlockingIOError:
            if attempt == 0:
                print(f"waiting for the training that holds {folder} ({_holder(folder)})", flush=True)
            time.sleep(POLL_SECONDS)


def _holder(folder: Path) -> str:
    return (folder / TRAINING_LOCK).read_text().strip() or "another process"


@contextmanager
def fold_lock(folder: Path) -> Iterator[None]:
    """Hold a fold's output folder for one training; the kernel lets go when the process ends, however it does.

    Raises:
        UDAError: if another training holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(locked(folder / TRAINING_LOCK))
        except BlockingIOError:
            raise UDAError(
                f"{folder}: another training runs on this fold ({_holder(folder)}). Wait for it, or stop it and start "
                "this one with --c; another fold, trainer or plans name has a folder of its own"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
