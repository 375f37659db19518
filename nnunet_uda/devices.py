"""The devices that torch can use here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunet_uda.errors import UDAError

if TYPE_CHECKING:
    import torch

DEVICE_HELP = "cpu, cuda or mps [cuda where there is one, else cpu]"


def open_device(name: str) -> torch.device:
    """The torch device of ``-device``; ``UDAError`` if it is not there."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, _, index = name.partition(":")
    if index and not (index.isdecimal() and int(index) < (torch.cuda.device_count() if kind == "cuda" else 1)):
        raise UDAError(f"-device {name}: there is no such device; expected {kind}, or {kind}: and its number from 0")
    if not available.get(kind, False):
        raise UDAError(
            f"-device {name} is not available; it may be {', '.join(k for k, v in available.items() if v)}. Add "
            "-device cpu; where there should be a CUDA device, look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    return torch.device(name)


def best_device() -> str:
    """``cuda`` where there is one, else ``cpu``; MPS only where a user asks for it, since nothing was tried there."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(name: str | None, say: bool = True) -> torch.device:
    """``open_device``; where no name is given the best one, and that it is the CPU is printed."""
    if name is None:
        name = best_device()
        if name == "cpu" and say:
            print("No CUDA device is visible: running on the CPU (-device cpu)", flush=True)
    return open_device(name)
