"""Worker processes that end with the process they work for, and do not die unnoticed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from nnunet_uda.errors import UDAError

STARTER = "NNUNET_UDA_STARTER"
POLL_SECONDS = 0.5


def usable_cores() -> int:
    """Cores that this process may use: SLURM, for one, gives a task some of a machine's. All where none can say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usual_processes() -> int:
    """Worker processes where nobody says how many: nnU-Net's ``nnUNet_def_n_proc``, else 8, or the cores if fewer."""
    given = os.environ.get("nnUNet_def_n_proc", "")
    return int(given) if given.isdecimal() and int(given) else min(8, usable_cores())


def wished_threads() -> int:
    """Threads for work on the CPU: OMP_NUM_THREADS where that is a number, else this process's cores."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdigit() and int(threads) else usable_cores()


def check_numbers() -> None:
    """Raise ``UDAError`` where a variable that nnU-Net takes for a number of processes holds something else."""
    for variable, least in (("nnUNet_def_n_proc", 1), ("nnUNet_n_proc_DA", 0)):
        value = os.environ.get(variable)
        if value is not None and not (value.strip().isdecimal() and int(value) >= least):
            raise UDAError(
                f"the environment variable {variable} is {value!r}; expected a number of processes from {least} on. "
                f"Correct it, or: unset {variable}"
            )


@contextmanager
def environment(variable: str, value: str) -> Iterator[None]:
    """Set an environment variable to this value inside."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def end_with(parent: int) -> None:
    """End this process within a second of the end of its parent, whose id is ``parent``.

    A worker whose parent was killed would otherwise wait for work forever, or write into what the next start fills.
    """

    _after(lambda: os.getppid() != parent, lambda: os._exit(1))


def tied(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` for a command that is to end with this process, however this one ends: ``end_with_starter``."""
    return {**environment, STARTER: str(os.getpid())}


def end_with_starter() -> None:
    """Where another process started this one with ``tied``: get SIGTERM within a second of its end.

    A killed process can pass no signal on. Its training would run on, beside that of the next start.
    """
    starter = int(os.environ.pop(STARTER, "0"))
    if starter and os.getppid() == starter:
        _after(lambda: os.getppid() != starter, lambda: os.kill(os.getpid(), signal.SIGTERM))
    elif starter:  # it has ended already, or something stands between
        _after(lambda: not _lives(starter), lambda: os.kill(os.getpid(), signal.SIGTERM))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _after(happened: Callable[[], bool], act: Callable[[], object]) -> None:
    def watch() -> None:
        while not happened():
            time.sleep(POLL_SECONDS)
        act()

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def as_done(
    function: Callable[..., Any], tasks: Iterable[Any], num_processes: int, set_up: Callable[[], object] | None = None
) -> Iterator[Any]:
    """``function(task)`` of every task in spawned processes, as they are done.

    Args:
        set_up: what each process does first.

    Raises:
        UDAError: if a process was killed; whatever ``function`` raises.
    """
    with ProcessPoolExecutor(num_processes, get_context("spawn"), _begin, (os.getpid(), set_up)) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UDAError(
                f"a worker process was killed, most often for lack of memory with {num_processes} processes: use a "
                "smaller -np (nnUNet_def_n_proc where there is none)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(parent: int, set_up: Callable[[], object] | None) -> None:
    end_with(parent)
    if set_up is not None:
        set_up()
