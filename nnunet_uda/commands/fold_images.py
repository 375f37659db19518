"""``nnUNetUDA_fold_images``: lay out one fold's target test images for ``nnUNetv2_predict``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_uda.data.convention import SPLITS_TARGET, dataset_name, environment_folder
from nnunet_uda.data.fold_images import lay_out_fold
from nnunet_uda.errors import command


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_fold_images",
        description=f"Put the target images that fold K never trained on ('val' of {SPLITS_TARGET}) into a folder of "
        "their own, as links where the file system allows. Predict them with nnUNetv2_predict -f K.",
        epilog="Example: nnUNetUDA_fold_images -d 502 -f 0 -o images_fold0",
    )
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-f", required=True, type=int, help="fold")
    parser.add_argument("-o", required=True, type=Path, help="output folder, new or empty")
    args = parser.parse_args(argv)
    cases = lay_out_fold(environment_folder("nnUNet_raw") / dataset_name(args.d), args.f, args.o)
    print(f"{len(cases)} target test case(s) of fold {args.f} in {args.o}")


if __name__ == "__main__":
    main()
