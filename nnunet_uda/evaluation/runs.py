"""What is to be scored: the dataset's labels and folders, the runs' folders, the volumes of the chosen folds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import (
    SPLITS_TARGET,
    TARGET_FOLDER,
    case_files,
    dataset_name,
    environment_folder,
    fold_of,
    read_json,
)
from nnunet_uda.errors import UDAError, shown
from nnunet_uda.evaluation.metrics import check_cases
from nnunet_uda.names import MEAN, check_name, is_plain_name

FOLD = "{fold}"


@dataclass(frozen=True)
class Labels:
    """Structures of a dataset, in the order of its ``dataset.json``, background left out."""

    structures: dict[str, int]
    ignore: int | None
    file_ending: str


@dataclass(frozen=True)
class Run:
    """A folder of predictions and its name in the tables; ``{fold}`` in the folder stands for the fold's number."""

    name: str
    folder: str

    def folder_of(self, fold: int | None) -> Path:
        return Path(self.folder if fold is None else self.folder.replace(FOLD, str(fold)))


def find_raw_dataset(name_or_id: str) -> Path:
    """The raw folder of a dataset.

    Raises:
        UDAError: ``nnUNet_raw`` is unset, or the dataset does not exist there.
    """
    raw = environment_folder("nnUNet_raw")
    folder = raw / dataset_name(name_or_id)
    if not folder.is_dir():
        raise UDAError(f"{folder} does not exist: -d takes a dataset in nnUNet_raw ({raw})")
    return folder


def read_labels(dataset_json: Path) -> Labels:
    """Structures, ignore label and file ending of a ``dataset.json``.

    Raises:
        UDAError: for a missing key, regions, or a label that is no integer.
    """
    content: Any = read_json(dataset_json)
    for key, kind in (("labels", dict), ("file_ending", str)):
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UDAError(f"{dataset_json} has no '{key}' as every nnU-Net dataset.json must have")
    labels = content["labels"]
    if not is_plain_name(content["file_ending"]) or not content["file_ending"].startswith("."):
        raise UDAError(f"{dataset_json}: 'file_ending' must be like .nii.gz, found {shown(content['file_ending'])}")
    for name, value in labels.items():
        check_name(name, f"{dataset_json}, 'labels'")
        if name == MEAN:
            raise UDAError(f"{dataset_json}: a label is called '{MEAN}', as a row of every table is. Rename it")
        if isinstance(value, list):
            raise UDAError(
                f"{dataset_json}: label '{name}' is a region ({shown(value)}); only plain labels are supported"
            )
        if not isinstance(value, int) or isinstance(value, bool):
            raise UDAError(f"{dataset_json}: label '{name}' must be an integer, found {shown(value)}")
        if not 0 <= value <= 65535:
            raise UDAError(f"{dataset_json}: label '{name}' must be from 0 to 65535, found {shown(value)}")
    if labels.get("background", 0) != 0 or any(value == 0 and name != "background" for name, value in labels.items()):
        raise UDAError(f"{dataset_json}: the value 0 must be the background's and no other's, found {shown(labels)}")
    if len(set(labels.values())) < len(labels):
        raise UDAError(f"{dataset_json}: 'labels' has one value for two structures, found {shown(labels)}")
    structures = {name: value for name, value in labels.items() if value != 0 and name != "ignore"}
    if not structures:
        raise UDAError(f"{dataset_json}: 'labels' has no structure besides the background")
    return Labels(structures, labels.get("ignore"), content["file_ending"])


def parse_runs(arguments: Sequence[str]) -> list[Run]:
    """Runs from ``NAME=FOLDER`` or ``FOLDER`` (then named as the folder).

    Raises:
        UDAError: for an empty or a repeated name, or ``{fold}`` in the name of a bare folder.
    """
    runs: list[Run] = []
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        if not separator or Path(argument).is_dir():
            name, folder = os.path.basename(os.path.realpath(argument)), argument
            if FOLD in name:
                raise UDAError(f"-pred {argument}: give the run a name, NAME={argument}")
        if not name or not folder:
            raise UDAError(f"-pred takes NAME=FOLDER or FOLDER, found {argument!r}")
        check_name(name, "-pred, the run's name (NAME=FOLDER)")
        if name in [run.name for run in runs]:
            raise UDAError(f"-pred: two runs are called {name}; give them different names, NAME=FOLDER")
        runs.append(Run(name, folder))
    return runs


def runs_and_bound(words: Sequence[str], bound: str | None) -> tuple[list[str], str | None]:
    """Add the bound to ``parse_runs``'s ``words``, unless it is there; return them and the name of the bound's run.

    Args:
        bound: name of one of the runs, or one more run: ``NAME=FOLDER`` or ``FOLDER``.
    """
    if bound is None or bound in [run.name for run in parse_runs(words)]:
        return list(words), bound
    if "=" not in bound and not Path(bound).is_dir():
        return list(words), bound  # no run, which ``check_bounds`` says
    words = [*(word for word in words if word != bound), bound]
    return words, parse_runs(words)[-1].name


def cases_of_folds(splits_file: Path, folds: Sequence[int]) -> dict[int, list[str]]:
    """The test cases (``val``) of each fold in a splits file.

    Raises:
        UDAError: no such file, a fold outside it, or one without test cases.
    """
    if not splits_file.is_file():
        raise UDAError(f"{splits_file} does not exist: -f scores the 'val' cases of a fold of {SPLITS_TARGET}")
    splits = read_json(splits_file)
    if not isinstance(splits, list) or not all(isinstance(s, dict) and isinstance(s.get("val"), list) for s in splits):
        raise UDAError(f"{splits_file} must hold a list of folds, each with 'train' and 'val'")
    bad = [name for split in splits for name in split["val"] if not is_plain_name(name)]
    if bad:
        raise UDAError(f"{splits_file}: case ids must be names without a path, found {shown(bad[0])}")
    cases = {fold: sorted(fold_of(splits, fold, splits_file)["val"]) for fold in sorted(set(folds))}
    for fold, names in cases.items():
        if not names:
            raise UDAError(f"{splits_file}: fold {fold} has no case under 'val', so there is nothing to score")
    return cases


def choose_volumes(
    runs: Sequence[Run], reference: Path, file_ending: str, fold_cases: dict[int, list[str]] | None
) -> list[tuple[int | None, str]]:
    """``(fold, case)`` of every volume, after checking that each run's folder holds exactly the predictions due.

    Raises:
        UDAError: naming a case without a reference, a missing or an extra prediction; ``{fold}`` without folds.
    """
    volumes: list[tuple[int | None, str]] = []
    for run in runs:
        if fold_cases is None:
            if FOLD in run.folder:
                raise UDAError(
                    f"-pred {run.name}={run.folder} holds {FOLD}, but no fold is given: add -f, as in -f 0 1 2 3"
                )
            volumes = [(None, case) for case in check_cases(reference, run.folder_of(None), file_ending)]
            continue
        if FOLD in run.folder:
            for fold, cases in fold_cases.items():
                check_cases(reference, run.folder_of(fold), file_ending, cases)
        else:
            union = sorted({case for cases in fold_cases.values() for case in cases})
            check_cases(reference, run.folder_of(None), file_ending, union)
        volumes = [(fold, case) for fold, cases in fold_cases.items() for case in cases]
    return volumes


def find_images(cases: Sequence[str], folders: Sequence[Path], file_ending: str) -> dict[str, Path]:
    """The first channel's image of each case, from the first of ``folders`` that has it.

    Raises:
        UDAError: naming a case without an image.
    """
    found: dict[str, Path] = {}
    for folder in reversed(folders):
        found.update({case: paths[0] for case, paths in case_files(folder, file_ending).items()})
    missing = sorted(set(cases) - set(found))
    if missing:
        looked = " or ".join(str(folder) for folder in folders)
        raise UDAError(
            f"no image {missing[0]}_0000{file_ending} in {looked} for the overlays. "
            "Give the images' folder (-i), or leave the overlays out (--no_overlays)"
        )
    return {case: found[case] for case in cases}


def image_folders(raw_dataset: Path, with_folds: bool) -> list[Path]:
    """Where the target test images lie: ``imagesTs``, or ``imagesTu`` in a fold protocol."""
    names = (TARGET_FOLDER, "imagesTs") if with_folds else ("imagesTs", TARGET_FOLDER)
    return [raw_dataset / name for name in names]
