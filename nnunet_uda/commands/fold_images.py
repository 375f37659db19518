"""``nnUNetUDA_fold_images``: lay out one fold's target test images for ``nnUNetv2_predict``."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from nnunet_uda.data.convention import (
    SPLITS_TARGET,
    TARGET_FOLDER,
    check_dataset_json,
    check_splits,
    dataset_name,
    environment_folder,
    fold_of,
    read_json,
    target_cases,
)
from nnunet_uda.errors import UDAError, command
from nnunet_uda.files import whole_folder


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_fold_images",
        description=f"Put the target images that fold K never trained on ('val' of {SPLITS_TARGET}) into a folder of "
        "their own, as links where the file system allows. Predict them with nnUNetv2_predict -f K.",
    )
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-f", required=True, type=int, help="fold")
    parser.add_argument("-o", required=True, type=Path, help="output folder, new or empty")
    args = parser.parse_args(argv)
    raw = environment_folder("nnUNet_raw") / dataset_name(args.d)
    dataset_json = read_json(raw / "dataset.json")
    check_dataset_json(dataset_json, raw / "dataset.json")
    cases = target_cases(raw, dataset_json)
    splits_file = raw / SPLITS_TARGET
    if not splits_file.exists():
        raise UDAError(f"{splits_file} does not exist: this dataset has no folds of target images. Predict imagesTs")
    identifiers = fold_of(check_splits(read_json(splits_file), set(cases), splits_file), args.f, splits_file)["val"]
    if not identifiers:
        raise UDAError(f"{splits_file}: fold {args.f} has an empty 'val', so there is nothing to test on")
    if args.o.exists() and (not args.o.is_dir() or any(args.o.iterdir())):
        raise UDAError(f"{args.o} is not empty, or no folder: give a new folder")
    with whole_folder(args.o) as folder:
        for path in (raw / TARGET_FOLDER / file.name for identifier in identifiers for file in cases[identifier]):
            try:
                os.symlink(path.resolve(), folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)
    print(f"{len(identifiers)} target test case(s) of fold {args.f} in {args.o}")


if __name__ == "__main__":
    main()
