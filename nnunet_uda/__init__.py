"""Unsupervised domain adaptation (UDA) for nnU-Net v2: ``from nnunet_uda import convert, configure, train, ...``."""

try:
    import fcntl  # noqa: F401 - locks between processes, which nothing here goes without
    import resource  # noqa: F401
except ModuleNotFoundError:
    raise SystemExit(
        "ERROR: nnunet_uda runs on Linux and macOS. Windows is not supported: use WSL "
        "(https://learn.microsoft.com/windows/wsl/install)"
    ) from None

import warnings
from typing import Any

warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)  # what monai says at its import; nothing can be done
__version__ = "0.1.0"
__all__ = ["UDAError", "configure", "convert", "evaluate", "plan", "predict", "train"]


def __getattr__(name: str) -> Any:
    """The functions of ``nnunet_uda.api``, imported when they are asked for: nnU-Net and torch take seconds to load."""
    if name == "UDAError":
        from nnunet_uda.errors import UDAError

        return UDAError
    if name in __all__:
        from nnunet_uda import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
