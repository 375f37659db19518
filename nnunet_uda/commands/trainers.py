"""``nnUNetUDA_trainers``: print the folder that nnU-Net must search for this package's trainers."""

from __future__ import annotations

import argparse

from nnunet_uda.errors import command
from nnunet_uda.methods import trainers_folder


@command
def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="nnUNetUDA_trainers",
        description="Print the folder of this package's trainers. "
        "nnUNetUDA_train needs no such line, nnUNetv2_train and nnUNetv2_predict do.",
        epilog='Example: export nnUNet_extTrainer="$(nnUNetUDA_trainers)"',
    ).parse_args(argv)
    print(trainers_folder())


if __name__ == "__main__":
    main()
