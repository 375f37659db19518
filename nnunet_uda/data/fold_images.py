"""One fold's target test images in a folder of their own, for ``nnUNetv2_predict``."""

from __future__ import annotations

from pathlib import Path

from nnunet_uda.data.convention import (
    SPLITS_TARGET,
    TARGET_FOLDER,
    check_dataset_json,
    check_splits,
    fold_of,
    read_json,
    target_cases,
)
from nnunet_uda.errors import UDAError
from nnunet_uda.files import is_free, link, whole_folder


def lay_out_fold(raw: Path, fold: int, output: Path) -> list[str]:
    """Put the target images that ``fold`` never trained on into ``output``, as links where the file system allows.

    Args:
        raw: the raw dataset.
        output: a new or empty folder.

    Returns:
        The cases.

    Raises:
        UDAError: no folds of target images, a fold without test images, or an ``output`` that holds something.
    """
    dataset_json = read_json(raw / "dataset.json")
    check_dataset_json(dataset_json, raw / "dataset.json")
    cases = target_cases(raw, dataset_json)
    splits_file = raw / SPLITS_TARGET
    if not splits_file.exists():
        raise UDAError(f"{splits_file} does not exist: this dataset has no folds of target images. Predict imagesTs")
    identifiers = fold_of(check_splits(read_json(splits_file), set(cases), splits_file), fold, splits_file)["val"]
    if not identifiers:
        raise UDAError(f"{splits_file}: fold {fold} has an empty 'val', so there is nothing to test on")
    if not is_free(output):
        raise UDAError(f"{output} is not empty, or no folder: give a new folder")
    with whole_folder(output) as folder:
        for path in (raw / TARGET_FOLDER / file.name for identifier in identifiers for file in cases[identifier]):
            link(path, folder / path.name)
    return identifiers
