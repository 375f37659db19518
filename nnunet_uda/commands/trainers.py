"""``nnUNetUDA_trainers``: print the folder that nnU-Net must search for this package's trainers."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from nnunet_uda.errors import UDAError, command


def trainers_folder() -> Path:
    """The folder for ``nnUNet_extTrainer``, in a clone, an editable install or a wheel alike."""
    spec = find_spec("nnunet_uda.trainers")
    if spec is None or spec.origin is None:
        raise UDAError("the package nnunet_uda is not installed: run `pip install .` in its folder")
    return Path(spec.origin).parent


@command
def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="nnUNetUDA_trainers",
        description="Print the folder of this package's trainers. "
        'Use it as: export nnUNet_extTrainer="$(nnUNetUDA_trainers)"',
    ).parse_args(argv)
    print(trainers_folder())


if __name__ == "__main__":
    main()
