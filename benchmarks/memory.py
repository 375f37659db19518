"""Resident memory of processes and of everything they started, as Linux's ``/proc`` tells it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections import defaultdict
from pathlib import Path

from nnunet_uda.errors import UDAError

PROC = Path("/proc")


def peak_resident(process: int | None = None) -> int:
    """Most bytes that this process, or another one, has had in memory so far.

    Raises:
        UDAError: on a system without Linux's ``/proc``.
    """
    try:
        text = (PROC / str(process or os.getpid()) / "status").read_text()
    except OSError as error:
        raise UDAError(f"resident memory is read from {PROC}, which only Linux has ({error})") from error
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", text)[1])


def family(process: int) -> list[int]:
    """The process and all that it, or one of these, started, as far as they are alive."""
    children = defaultdict(list)
    for path in PROC.glob("[0-9]*/stat"):
        text = _read(path)
        if text:
            parent = int(text.rpartition(")")[2].split()[1])  # what stands before it is the program's name
            children[parent].append(int(path.parent.name))
    found = [process]
    for one in found:
        found += children[one]
    return found


def resident(process: int) -> int:
    """Bytes of a process's family in memory; what several of them share counts once."""
    texts = (_read(PROC / str(one) / "smaps_rollup") for one in family(process))
    return sum(1024 * int(found[1]) for text in texts if (found := re.search(r"\nPss:\s+(\d+) kB", text)))


def watched(command: list[str], environment: dict[str, str], interval: float = 0.1) -> tuple[float, int]:
    """Run a command: the seconds it takes, and the most bytes of its family in memory, looked at every ``interval``.

    Raises:
        UDAError: with the command's output, where it fails.
    """
    start, most = time.perf_counter(), 0
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=interval)
                break
            except subprocess.TimeoutExpired:
                most = max(most, resident(process.pid))
    if process.returncode != 0:
        raise UDAError(f"{' '.join(command)} ended with status {process.returncode}:\n{output}")
    return time.perf_counter() - start, most


def _read(path: Path) -> str:
    """A file's text; nothing where the process has ended meanwhile."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
