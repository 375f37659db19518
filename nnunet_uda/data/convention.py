"""Where the unlabelled target lies, and what a dataset must look like before a trainer may use it.

Raw dataset: ``imagesTr`` + ``labelsTr`` (labelled source), ``imagesTu`` (unlabelled target for training), optionally
``imagesTs`` + ``labelsTs`` (target test, labels for evaluation alone). ``dataset.json`` names both domains under
``uda``. Nothing in this module, or in training, opens ``labelsTs``.

A few target scans may be labelled for training: ``uda.labelled_target`` lists their ids, and ``labelsTu`` holds exactly
their labels. Their images stay in ``imagesTu``, so that plans, folds and all that nnU-Net does know the source alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_uda.errors import UDAError, nested_deeper, shown, system_fault
from nnunet_uda.files import write_json
from nnunet_uda.images.listing import ENDINGS, entries, files_in
from nnunet_uda.images.reading import check_file
from nnunet_uda.names import check_name, is_name, is_plain_name

TARGET_FOLDER = "imagesTu"
LABELS_TARGET = "labelsTu"
"""Labels of the target scans that ``labelled_target`` names, and of no other."""
LABELLED_TARGET = "labelled_target"
"""In ``dataset.json``, under ``uda`` if it has that: ids of the target scans that are trained on with their labels."""
SPLITS_TARGET = "splits_target.json"
LABEL_VALUES = "label_values"
"""In ``dataset.json``, under ``uda`` if it has that: domain -> structure or ``background`` -> values in the label files
that were converted."""
OTHER_LABEL_VALUES = "other_label_values"
"""Beside it, ``background`` where all values that are not listed became background."""
_VARIABLES = {"nnUNet_raw": nnUNet_raw, "nnUNet_preprocessed": nnUNet_preprocessed, "nnUNet_results": nnUNet_results}


def environment_folder(variable: str) -> Path:
    """The folder in nnU-Net's environment variable ``variable``.

    Raises:
        UDAError: if it is unset; the message holds the line to add.
    """
    value = _VARIABLES[variable].get() or ""
    example = f"export {variable}=/path/to/{variable}"
    if not value.strip():
        raise UDAError(f"the environment variable {variable} is not set. Add: {example}")
    if value.startswith("~") or not value.isprintable():
        raise UDAError(
            f"the environment variable {variable} is {value!r}; expected a folder, without a ~ that the shell left "
            f"(it does so within quotes: take $HOME), line breaks or other signs that cannot be printed, as {example}"
        )
    return Path(value)


def dataset_name(name_or_id: str | int) -> str:
    """``DatasetXXX_NAME`` of an id or a name, as nnU-Net resolves it."""
    if str(name_or_id).startswith("Dataset"):
        return check_name(str(name_or_id), "-d", file=True)
    if not re.fullmatch("[0-9]{1,9}", str(name_or_id)):
        raise UDAError(f"-d takes a dataset's id or its full name (DatasetXXX_NAME), found {name_or_id!r}")
    if not any(path.is_set() for path in _VARIABLES.values()):
        environment_folder("nnUNet_raw")
    number = f"{int(name_or_id):03d}"
    try:
        return maybe_convert_to_dataset_name(int(number))
    except RuntimeError as error:
        folders = ", ".join(f"{name}={os.environ.get(name, '(unset)')}" for name in _VARIABLES)
        there = {path.name for folder in _VARIABLES.values() if folder.is_set()
                 for path in Path(str(folder.get())).glob("Dataset*_*")}  # fmt: skip
        named = sorted(name for name in there if name.startswith(f"Dataset{number}_"))
        what = f"several datasets have the id {number}" if named else f"no dataset has the id {number}"
        listed = ", ".join(named or sorted(there)) or "none"
        raise UDAError(f"{what} in {folders}. There are: {listed}. Give one by its id, or by its full name") from error


def _parsed(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))  # whatever the locale


def read_json(path: Path) -> Any:
    """JSON content of ``path``; a missing, unreadable or broken file is a ``UDAError`` that names it."""
    try:
        return _parsed(Path(path))
    except FileNotFoundError:
        raise UDAError(f"{path} does not exist") from None
    except OSError as error:
        raise UDAError(f"{path} cannot be read ({system_fault(error) or error})") from error
    except ValueError as error:
        raise UDAError(f"{path} is not valid JSON: {error}. Correct it (as UTF-8), or make it again") from error
    except RecursionError:
        raise UDAError(f"{path} is not valid JSON for any purpose here: its brackets are nested too deep") from None


def results_folder(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """nnU-Net's folder of a trained model, ``TRAINER__PLANS__CONFIGURATION``; ``dataset`` is an id or name."""
    return environment_folder("nnUNet_results") / dataset_name(dataset) / f"{trainer}__{plans}__{configuration}"


def check_results_folder(folder: Path) -> None:
    """Raise ``UDAError`` where ``folder`` is no ``TRAINER__PLANS__CONFIGURATION``; the message names those nearby."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist: no such model has been trained"
        raise UDAError(f"{folder} {what} (see -m, or -d, -tr, -p and -c); expected TRAINER__PLANS__CONFIGURATION")
    missing = _missing_in_results(folder)
    if missing:
        near = [other for other in (folder.parent, *sorted(folder.iterdir())) if not _missing_in_results(other)]
        raise UDAError(
            f"{folder} holds no {missing[0]}; expected a trained model's folder, TRAINER__PLANS__CONFIGURATION, in "
            "which nnU-Net leaves plans.json and dataset.json beside fold_0, fold_1, ..."
            + (f". Give {', or '.join(map(str, near[:3]))}" if near else "")
        )


def _missing_in_results(folder: Path) -> list[str]:
    return [name for name in ("plans.json", "dataset.json") if not (folder / name).is_file()]


def mend_results(folder: Path, plans: dict[str, Any], dataset_json: dict[str, Any]) -> list[Path]:
    """Write ``plans.json`` and ``dataset.json`` of a results folder again if a kill or a full disk cut them short.

    Args:
        plans, dataset_json: what nnU-Net copied there: the preprocessed folder's.

    Returns:
        The files that were mended.
    """
    mended = []
    for name, content in (("plans.json", plans), ("dataset.json", dataset_json)):
        path = folder / name
        if path.exists() and not isinstance(json_or_none(path), dict):
            write_json(content, path)
            mended.append(path)
    return mended


def json_or_none(path: Path) -> Any:
    """``read_json`` of a file that can be made again: None if it is missing or was cut short."""
    try:
        return _parsed(path)
    except (ValueError, RecursionError, FileNotFoundError):
        return None


def check_dataset_json(content: Any, where: Path | str) -> dict[str, Any]:
    """Check a ``dataset.json`` as nnU-Net reads it, and return it; ``read_domains`` checks the key ``uda``.

    Raises:
        UDAError: for the first fault.
    """
    if not isinstance(content, dict) or nested_deeper(content, 20):
        raise UDAError(f"{where} must hold a JSON object with 'channel_names', 'labels', 'numTraining', 'file_ending'")

    def require(fits: object, what: str, found: Any) -> None:
        if not fits:
            raise UDAError(f"{where}: {what}, found {shown(found)}")

    fields: list[Any] = [content.get(key) for key in ("file_ending", "channel_names", "labels", "numTraining")]
    ending, channels, labels, number = fields
    require(is_plain_name(ending) and ending.startswith("."), "'file_ending' must be like .nii.gz", ending)
    counted = isinstance(channels, dict) and channels and set(channels) == {str(i) for i in range(len(channels))}
    require(counted, '\'channel_names\' must be like {"0": "intensity"}', channels)
    start = labels.get("background") if isinstance(labels, dict) else None
    require(type(start) is int and start == 0, '\'labels\' must be like {"background": 0, "liver": 1}', labels)
    for key, names in (("channel_names", channels.values()), ("labels", labels)):
        for name in names:
            check_name(name, f"{where}, '{key}'")
    values = [value for value in labels.values() if not isinstance(value, list)]  # lists are nnU-Net's regions
    require(all(type(value) is int for value in values), "the values of 'labels' must be integers", labels)
    gapless = len(values) < len(labels) or sorted(values) == list(range(len(values)))
    require(gapless, "the values of 'labels' must be 0, 1, 2, ... without gaps", labels)
    if "dataset" in content:
        _check_listed(content["dataset"], where)
    require(type(number) is int and number >= 0, "'numTraining' must be the number of labelled cases", number)
    return content


def source_cases(raw_dataset: Path, dataset_json: dict[str, Any]) -> dict[str, tuple[list[Path], Path]]:
    """Images and label of each labelled case, by id, as nnU-Net finds them: by the key ``dataset`` of
    ``dataset.json``, where there is one, else in ``imagesTr`` and ``labelsTr``.

    Raises:
        UDAError: a file that does not exist.
    """
    ending = dataset_json["file_ending"]
    if "dataset" in dataset_json:
        cases = {
            identifier: ([_listed(raw_dataset, file) for file in files["images"]], _listed(raw_dataset, files["label"]))
            for identifier, files in _check_listed(dataset_json["dataset"], raw_dataset / "dataset.json").items()
        }
    else:
        cases = {
            identifier: (images, raw_dataset / "labelsTr" / f"{identifier}{ending}")
            for identifier, images in case_files(raw_dataset / "imagesTr", ending).items()
        }
    for images, label in cases.values():
        for path in (*images, label):
            if not path.is_file():
                raise UDAError(f"{path} does not exist; expected an image and a label of every labelled case")
    return cases


def _listed(raw_dataset: Path, file: str) -> Path:
    """A file of the key ``dataset``: relative to the raw dataset, and with variables, as nnU-Net reads it."""
    return Path(os.path.abspath(raw_dataset / os.path.expandvars(file)))


def _check_listed(listed: Any, where: Path | str) -> dict[str, dict[str, Any]]:
    """Check that the key ``dataset`` of a ``dataset.json`` has nnU-Net's form, and return it."""
    example = '{"CASE": {"images": ["imagesTr/CASE_0000.nii.gz"], "label": "labelsTr/CASE.nii.gz"}}'
    if not isinstance(listed, dict) or not listed:
        raise UDAError(f"{where}: 'dataset' must be like {example}, found {shown(listed)}")
    for identifier, files in listed.items():
        check_name(identifier, f"{where}, 'dataset'", file=True)
        images = files.get("images") if isinstance(files, dict) else None
        listed_files = [*images, files.get("label")] if isinstance(images, list) and images else [None]
        if not all(isinstance(file, str) and file.isprintable() for file in listed_files):
            raise UDAError(f"{where}: 'dataset' must be like {example}, found {shown({identifier: files})}")
    return listed


def check_plans_names(plans: Any, where: Path | str) -> dict[str, Any]:
    """Check that names in ``plans`` that become folders' names lead out of no folder of nnU-Net, and return ``plans``.

    Raises:
        UDAError: for a bad name, or plans without configurations.
    """
    if not isinstance(plans, dict) or not isinstance(plans.get("configurations"), dict):
        raise UDAError(f"{where} must hold plans as nnU-Net writes them: a JSON object with 'configurations'")
    names = {key: plans.get(key) for key in ("dataset_name", "plans_name")}
    for configuration, content in plans["configurations"].items():
        if not isinstance(content, dict):
            raise UDAError(f"{where}: configuration {shown(configuration)} must be a JSON object")
        names[f"{configuration}'s data_identifier"] = content.get("data_identifier", "inherited")
    for key, name in names.items():
        if not is_plain_name(name):
            raise UDAError(f"{where}: {shown(key)} must be a name without a path, found {shown(name)}")
    return plans


@dataclass(frozen=True)
class Domains:
    """The two domains' names, from ``dataset.json``'s ``uda`` key."""

    source: str
    target: str


def read_domains(dataset_json: dict[str, Any], where: str = "dataset.json") -> Domains:
    """The names of both domains; ``UDAError`` if the ``uda`` key is missing or lacks a name."""
    uda = dataset_json.get("uda")
    example = '"uda": {"source_domain": "MR", "target_domain": "CT"}'
    if not isinstance(uda, dict) or not {"source_domain", "target_domain"} & set(uda):
        raise UDAError(
            f"{where} has no 'uda' key with two domains, so this is no dataset with an unlabelled target. "
            f"Make it with nnUNetUDA_convert, or add {example} and the folder {TARGET_FOLDER}"
        )
    for key in ("source_domain", "target_domain"):
        if not is_name(uda.get(key)):
            raise UDAError(
                f"{where}: 'uda' needs the name of the domain '{key}', that can be printed, for instance {example}; "
                f"found {shown(uda.get(key))}"
            )
    return Domains(uda["source_domain"], uda["target_domain"])


def is_ct(domain: str) -> bool:
    """Whether a domain's name says CT: ``CT``, ``ct_late``, ``CTA``, ``NCCT``."""
    words = re.split(r"[^a-z]+", domain.lower())
    return any(word in ("ct", "cta", "ctpa", "ncct", "cect", "hrct") for word in words)


def normalisation_warning(dataset_json: dict[str, Any], domains: Domains) -> str | None:
    """What nnU-Net will do where a channel is called CT although a domain is not CT, or ``None``."""
    is_ct = [domain.strip().lower() == "ct" for domain in (domains.source, domains.target)]
    for index, channel in dataset_json["channel_names"].items():
        if str(channel).lower() == "ct" and not all(is_ct):
            return (
                f"channel {index} is called CT, but the domains are {domains.source} and {domains.target}: nnU-Net "
                "will clip and normalise every image, the other modality's too, with the source's statistics. "
                "Rename the channel (for instance to 'intensity') to have each image z-scored"
            )
    return None


def case_files(folder: Path, file_ending: str) -> dict[str, list[Path]]:
    """Image files of each case in ``folder``, by id, channels in order (``ID_0000.nii.gz``, ``ID_0001.nii.gz``).

    Raises:
        UDAError: for an id that is no name.
    """
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(file_ending)}", re.DOTALL)
    cases: dict[str, list[Path]] = {}
    for path in entries(folder) if folder.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match:
            cases.setdefault(check_name(match.group(1), f"{folder}: a case"), []).append(path)
    return cases


def image_cases(folder: Path, file_ending: str) -> dict[str, list[Path]]:
    """``case_files`` of a folder of images that are all to be read.

    Raises:
        UDAError: no image, one whose name nnU-Net would not read, or something that is no file.
    """
    cases = case_files(folder, file_ending)
    if not cases:
        found = "holds no image" if folder.is_dir() else "is no folder"
        raise UDAError(f"{folder} {found}: expected files named like CASE_0000{file_ending}")
    taken = {path for paths in cases.values() for path in paths}
    images = [path for path in files_in(folder) if path.name.lower().endswith((file_ending.lower(), *ENDINGS))]
    if left_out := [path for path in images if path not in taken]:
        raise UDAError(
            f"{left_out[0]}: its name is not like CASE_0000{file_ending}, so that nothing would read it. Rename it "
            "(0000 is the channel), or move it elsewhere"
        )
    for path in taken:
        check_file(path)
    return cases


def labelled_target(dataset_json: dict[str, Any], where: Path | str = "dataset.json") -> list[str]:
    """Ids of the target scans that are trained on with their labels, sorted; mostly none.

    Raises:
        UDAError: where ``uda.labelled_target`` is no list of different names.
    """
    uda = dataset_json.get("uda")
    listed = uda.get(LABELLED_TARGET, []) if isinstance(uda, dict) else []
    if not isinstance(listed, list) or not all(is_plain_name(name) for name in listed):
        raise UDAError(
            f"{where}: '{LABELLED_TARGET}' under 'uda' must be a list of case ids in {TARGET_FOLDER}, found "
            f"{shown(listed)}"
        )
    if len(set(listed)) < len(listed):
        twice = next(name for name in listed if listed.count(name) > 1)
        raise UDAError(f"{where}: '{LABELLED_TARGET}' under 'uda' names {twice} twice; name every scan once")
    return sorted(listed)


def labelled_target_files(raw_dataset: Path, dataset_json: dict[str, Any], known: Collection[str]) -> dict[str, Path]:
    """The labels in ``labelsTu`` by id: of the scans that ``uda.labelled_target`` names, and of no other.

    Args:
        known: ids of the cases in ``imagesTu``.

    Raises:
        UDAError: a label of a scan that is not named, and a named scan without an image or a label.
    """
    listed, ending = labelled_target(dataset_json, raw_dataset / "dataset.json"), dataset_json["file_ending"]
    folder = raw_dataset / LABELS_TARGET
    found = [path.name.removesuffix(ending) for path in entries(folder)] if folder.is_dir() else []
    if folder.is_dir() and (not listed or set(found) - set(listed)):
        others = sorted(set(found) - set(listed))
        raise UDAError(
            f"{folder} exists and holds {', '.join(others[:5]) or 'nothing'}, but dataset.json names "
            f"{', '.join(listed[:5]) or 'no scan'} under 'uda', '{LABELLED_TARGET}': no other target label may lie "
            "where training looks. Add these ids to that list, in nnUNet_raw and in nnUNet_preprocessed, if they are "
            "to be trained on with their labels; else move the labels to labelsTs, where only evaluation reads them"
        )
    for identifier in listed:
        if identifier not in known:
            raise UDAError(
                f"{raw_dataset / 'dataset.json'}: '{LABELLED_TARGET}' under 'uda' names {identifier}, which is not in "
                f"{raw_dataset / TARGET_FOLDER}; expected scans that lie there. Correct the list, or add the scan"
            )
        if identifier not in found:
            raise UDAError(
                f"{folder / (identifier + ending)} does not exist; expected the label of a scan that dataset.json "
                f"names under 'uda', '{LABELLED_TARGET}'. Add it, or take the scan out of the list"
            )
    return {identifier: folder / f"{identifier}{ending}" for identifier in listed}


def target_cases(raw_dataset: Path, dataset_json: dict[str, Any]) -> dict[str, list[Path]]:
    """The target's training images by id, after checking everything that can be checked without reading them.

    Raises:
        UDAError: no ``imagesTu`` or an empty one, an image in it that is not called so, a target label in a training
            folder that ``dataset.json`` does not name, a wrong number of channels.
    """
    folder = raw_dataset / TARGET_FOLDER
    if not folder.is_dir():
        raise UDAError(f"{folder} does not exist: it must hold the unlabelled target images for training")
    ending = dataset_json["file_ending"]
    cases = image_cases(folder, ending)
    labelled_target_files(raw_dataset, dataset_json, cases)
    for forbidden in ("labelsTr", "imagesTr"):
        suffix = ending if forbidden == "labelsTr" else f"_0000{ending}"
        for identifier in cases:
            path = raw_dataset / forbidden / f"{identifier}{suffix}"
            if path.exists():
                raise UDAError(
                    f"{path} belongs to a target case ({identifier} lies in {TARGET_FOLDER}): "
                    "training must not see a target label. Remove it, or rename the case if it is a source case"
                )
    listed = _check_listed(dataset_json["dataset"], "dataset.json") if "dataset" in dataset_json else {}
    for identifier, files in listed.items():
        inside = [file for file in files["images"] if _listed(raw_dataset, file).parent == folder.absolute()]
        if identifier in cases or inside:
            raise UDAError(
                f"{raw_dataset / 'dataset.json'}: its key 'dataset' lists {identifier} with a label for training, but "
                f"{inside[0] if inside else identifier} lies in {TARGET_FOLDER}: training must not see a target label. "
                "Take it out of the list, or rename the case if it is a source case"
            )
    channels = len(dataset_json["channel_names"])
    for identifier, paths in cases.items():
        expected = [f"{identifier}_{channel:04d}{ending}" for channel in range(channels)]
        if [path.name for path in paths] != expected:
            raise UDAError(
                f"{folder}: case {identifier} has {len(paths)} channel file(s) {[path.name for path in paths]}, but "
                f"dataset.json lists {channels} channel(s), as the source has: expected {expected}. "
                "Names that end in _0000, _0001, ... are channels of one case"
            )
    return cases


def check_splits(
    splits: Any, known: set[str] | None, where: Path | str, disjoint: bool = True
) -> list[dict[str, list[str]]]:
    """Check the form of a splits file, that its ids exist in ``known`` if that is given, and unless told otherwise that
    folds' two lists have no case in common."""
    if not isinstance(splits, list) or not splits:
        raise UDAError(f"{where} must hold a list of folds, each with 'train' and 'val'")
    for fold, split in enumerate(splits):
        if not isinstance(split, dict) or not all(
            isinstance(split.get(key), list) and all(isinstance(i, str) for i in split[key]) for key in ("train", "val")
        ):
            raise UDAError(f"{where}: fold {fold} must hold two lists of case ids, 'train' and 'val'")
        missing = set() if known is None else (set(split["train"]) | set(split["val"])) - known
        if missing:
            raise UDAError(f"{where}: fold {fold} names cases that do not exist: {sorted(missing)[:5]}")
        both = sorted(set(split["train"]) & set(split["val"]))
        if both and disjoint:
            raise UDAError(f"{where}: fold {fold} has cases in both 'train' and 'val': {both[:5]}")
        if not split["train"]:
            raise UDAError(f"{where}: fold {fold} has no training case")
    return splits


def is_fold(text: str) -> bool:
    """Whether ``text`` is a fold's number or ``all``."""
    return text == "all" or re.fullmatch("[0-9]{1,6}", text) is not None


def fold_of(splits: list[dict[str, list[str]]], fold: int, where: Path | str) -> dict[str, list[str]]:
    """Fold ``fold`` of ``splits``; a fold outside is refused (stock nnU-Net would draw a random split)."""
    if not 0 <= fold < len(splits):
        raise UDAError(f"fold {fold} does not exist: {where} holds {len(splits)} fold(s), 0 to {len(splits) - 1}")
    return splits[fold]
