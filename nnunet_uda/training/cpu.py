"""What training on a CPU asks of its process."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 2**30


def keep_freed_memory() -> None:
    """Make steps on a CPU faster, for the rest of the process: memory that is freed is kept.

    glibc gives large blocks back to the system as soon as they are freed, so that every step of a U-Net finds new pages
    in front of it, which the system must clear first: a tenth of a step of UUDS with an opponent (docs/speed.md). The
    most memory that a process ever held rose by 1.5 %. Blocks of more than 1 GiB, whole volumes and not a step's, go
    back as ever. Without glibc memory stays as it is.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


@contextmanager
def without_denormals() -> Iterator[None]:
    """Denormal numbers are 0 inside: they made a step with a discriminator ten times slower on a CPU.

    Not for longer than a training: scipy's KDTree, by which distances are measured, crashes in such a process.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
