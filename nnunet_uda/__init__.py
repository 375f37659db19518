"""Unsupervised domain adaptation (UDA) for nnU-Net v2."""

try:
    import fcntl  # noqa: F401 - locks between processes, which nothing here goes without
    import resource  # noqa: F401
except ModuleNotFoundError:
    raise SystemExit(
        "ERROR: nnunet_uda runs on Linux and macOS. Windows is not supported: use WSL "
        "(https://learn.microsoft.com/windows/wsl/install)"
    ) from None

__version__ = "0.1.0"
