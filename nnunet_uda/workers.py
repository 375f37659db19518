"""Worker processes that neither outlive the process they work for nor die unnoticed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from nnunet_uda.errors import UDAError


def usable_cores() -> int:
    """Cores that this process may use: SLURM, for one, gives a task some of a machine's. All where none can say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with(parent: int) -> None:
    """End this process within a second of the end of its parent, whose id is ``parent``.

    A worker whose parent was killed would otherwise wait for work forever, or write into what the next start fills.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def as_done(function: Callable[..., Any], tasks: Iterable[Any], num_processes: int) -> Iterator[Any]:
    """``function(task)`` of every task in spawned processes, as they are done.

    Raises:
        UDAError: if a process was killed; whatever ``function`` raises.
    """
    with ProcessPoolExecutor(num_processes, get_context("spawn"), end_with, (os.getpid(),)) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UDAError(
                f"a worker process was killed, most often for lack of memory with {num_processes} processes: use "
                "fewer (-np 1, or nnUNet_def_n_proc=1). What was finished is kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
