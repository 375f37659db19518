"""The devices that torch can use here."""

from __future__ import annotations

import torch

from nnunet_uda.errors import UDAError


def open_device(name: str) -> torch.device:
    """The torch device of ``-device``.

    Raises:
        UDAError: if it is not there.
    """
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
    return "cuda" if torch.cuda.is_available() else "cpu"
