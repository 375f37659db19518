"""The unlabelled target, preprocessed with the plans' settings into a sibling of nnU-Net's own folder.

nnU-Net deletes and lists its own folders (``nnUNetPlans_2d``), so the target lies in ``nnUNetPlans_2d_target``. Its
``manifest.json`` records what the cases were made from, and their files' sizes: a case counts as present only once it
stands there and its files are whole. Cases are made in a folder of the run's own, so that what a killed run's worker
still writes is never taken for one.

The few target scans that are trained on with their labels (``convention.labelled_target``) lie a second time, with
them, in ``nnUNetPlans_2d_target_labelled``, a folder of the same kind: no label is ever in the first one.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunet_uda.data.case import preprocess_case
from nnunet_uda.data.convention import (
    SPLITS_TARGET,
    check_splits,
    environment_folder,
    fold_of,
    labelled_target_files,
    read_json,
    target_cases,
)
from nnunet_uda.data.slices import plane_warning
from nnunet_uda.errors import UDAError, system_fault
from nnunet_uda.files import LOCK, cannot_write, exclusive, sha256, sync, sync_folder, write_json
from nnunet_uda.names import is_plain_name
from nnunet_uda.workers import as_done

MANIFEST = "manifest.json"
_SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")
_PLANS_KEYS = ("image_reader_writer", "transpose_forward", "foreground_intensity_properties_per_channel")
_CONFIGURATION_KEYS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
)


class TargetDataset(nnUNetDatasetBlosc2):
    """Preprocessed target cases. ``seg`` is nnU-Net's nonzero mask (0 inside, -1 outside): there are no labels."""


class LabelledTargetDataset(nnUNetDatasetBlosc2):
    """Preprocessed target cases with their labels, as source cases are: those that ``dataset.json`` names."""


def target_folder(preprocessed_dataset: Path, configuration: ConfigurationManager, labelled: bool = False) -> Path:
    """``<preprocessed>/<dataset>/<data identifier>_target``, or ``..._target_labelled``."""
    return preprocessed_dataset / f"{configuration.data_identifier}_target{'_labelled' if labelled else ''}"


def preprocess_target(
    plans: PlansManager,
    configuration_name: str,
    dataset_json: dict[str, Any],
    num_processes: int = 8,
    log: Callable[[str], None] = print,
    labelled: bool = False,
) -> Path:
    """Bring the preprocessed target up to date with the raw dataset and the plans; return its folder.

    Cases whose files and settings have not changed are kept. Where ``nnUNet_raw`` does not hold the dataset (training
    on another machine), a complete folder made with the same settings is accepted as it is. Where nothing is
    to be done, nothing is written and no lock is taken: the folder may be read-only.

    Args:
        labelled: the scans that ``dataset_json`` names as labelled, with their labels, instead of all without.

    Raises:
        UDAError: for everything ``target_cases`` refuses, unreadable, non-finite or constant images, or a missing
            folder that cannot be made.
    """
    preprocessed = environment_folder("nnUNet_preprocessed") / plans.dataset_name
    configuration = plans.get_configuration(configuration_name)
    folder = target_folder(preprocessed, configuration, labelled)
    settings = _preprocessing_settings(plans, configuration)
    if labelled:
        settings["labels"] = dataset_json["labels"]
    if warning := plane_warning(plans.plans, configuration_name):
        log(f"WARNING: {warning}")
    raw_dataset = Path(nnUNet_raw.get()) / plans.dataset_name if nnUNet_raw.is_set() else None

    try:
        if raw_dataset is None or not raw_dataset.is_dir():
            return _accept_without_raw(folder, _read_manifest(folder), settings, plans.dataset_name)
        cases = target_cases(raw_dataset, dataset_json)
        splits = None if labelled else _splits_to_copy(raw_dataset, preprocessed, set(cases))
        labels = labelled_target_files(raw_dataset, dataset_json, cases) if labelled else {}
        if labelled:  # a label is one more file that its case is made from, the last one
            cases = {identifier: [*cases[identifier], label] for identifier, label in labels.items()}
        if splits is None and _is_complete(folder, settings, cases):
            return folder
        with exclusive(folder):
            if splits is not None:
                write_json(splits, preprocessed / SPLITS_TARGET)
            kept, sizes = _kept(folder, _read_manifest(folder), settings, cases, log)
            todo = {identifier: files for identifier, files in cases.items() if identifier not in kept}
            for path in _strays(folder, kept):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            _write_manifest(folder, settings, kept, sizes)
            if not todo:
                return folder
            kind = "labelled" if labelled else "unlabelled"
            log(f"Preprocessing {len(todo)} {kind} target case(s) of {plans.dataset_name} into {folder}")
            partial_folder = folder / f".partial_{uuid.uuid4().hex[:8]}"
            partial_folder.mkdir()
            work = partial(
                _preprocess_case, folder=partial_folder, plans=plans.plans, configuration=configuration_name,
                dataset=dataset_json, labelled=labelled,
            )  # fmt: skip
            num_processes = min(num_processes, len(todo))
            results = map(work, todo.items()) if num_processes <= 1 else as_done(work, todo.items(), num_processes)
            try:
                for identifier, made in tqdm(results, total=len(todo), desc="target", unit="case"):
                    for suffix in _SUFFIXES:
                        os.replace(partial_folder / f"{identifier}{suffix}", folder / f"{identifier}{suffix}")
                    sync_folder(folder)
                    kept[identifier], sizes[identifier] = made, _sizes(folder, identifier)
                    _write_manifest(folder, settings, kept, sizes)
            finally:
                shutil.rmtree(partial_folder, ignore_errors=True)
    except OSError as error:
        if (fault := system_fault(error)) is None:
            raise
        raise UDAError(f"{folder}: the target cannot be preprocessed ({fault}). What was finished is kept") from error
    return folder


def target_identifiers(folder: Path, fold: int | str) -> list[str]:
    """Ids of the target cases that fold ``fold`` trains on: ``train`` of ``splits_target.json``, else all cases."""
    known = set(read_json(folder / MANIFEST)["cases"])
    splits_file = folder.parent / SPLITS_TARGET
    if fold == "all" or not splits_file.exists():
        return sorted(known)
    splits = check_splits(read_json(splits_file), known, splits_file)
    return sorted(fold_of(splits, int(fold), splits_file)["train"])


def labelled_identifiers(folder: Path, fold: int | str, listed: Collection[str]) -> list[str]:
    """The labelled target cases in ``listed`` that fold ``fold`` trains on; ``folder`` must hold them.

    Raises:
        UDAError: the folder lacks one.
    """
    known = set(read_json(folder / MANIFEST)["cases"])
    if missing := sorted(set(listed) - known):
        raise UDAError(
            f"{folder} lacks the labelled target case(s) {', '.join(missing[:5])} that dataset.json names: set "
            "nnUNet_raw (export nnUNet_raw=/path/to/nnUNet_raw) so that they can be preprocessed"
        )
    splits_file = folder.parent / SPLITS_TARGET
    if fold == "all" or not splits_file.exists():
        return sorted(listed)
    splits = check_splits(read_json(splits_file), None, splits_file)
    return sorted(set(fold_of(splits, int(fold), splits_file)["train"]) & set(listed))


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest; None if there is none of the right form, so that every case is made again."""
    try:
        manifest = read_json(folder / MANIFEST)
    except UDAError:
        return None
    if not isinstance(manifest, dict) or "settings" not in manifest:
        return None
    parts = (manifest.get("cases"), manifest.setdefault("sizes", {}))
    return manifest if all(isinstance(part, dict) for part in parts) else None


def _kept(
    folder: Path, manifest: dict | None, settings: dict, cases: dict[str, list[Path]], log: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """What the manifest says of the cases that need not be made again, and the sizes of their files."""
    if manifest is None:
        return {}, {}
    if manifest["settings"] != settings:
        log(f"{folder} was made with other settings: preprocessing the target again")
        return {}, {}
    current = {i: made for i, made in manifest["cases"].items() if i in cases and _unchanged(made, cases[i])}
    kept = {i: made for i, made in current.items() if _is_whole(folder, i, manifest)}
    damaged = sorted(set(current) - set(kept))
    if damaged:
        log(f"{folder}: files of {', '.join(damaged)} are missing or cut short: preprocessing them again")
    return kept, {i: _sizes(folder, i) for i in kept}


def _strays(folder: Path, kept: Collection[str]) -> list[Path]:
    """Files that belong to no case in ``kept``: remains of removed cases, of cut ones, and of killed runs."""
    complete = {f"{identifier}{suffix}" for identifier in kept for suffix in _SUFFIXES}
    return [path for path in folder.iterdir() if path.name not in complete | {LOCK, MANIFEST}]


def _is_complete(folder: Path, settings: dict, cases: dict[str, list[Path]]) -> bool:
    """Whether there is nothing to make, and nothing to remove that can be removed."""
    manifest = _read_manifest(folder)
    if manifest is None or manifest["cases"].keys() != cases.keys():
        return False
    kept, _ = _kept(folder, manifest, settings, cases, lambda _: None)
    return len(kept) == len(cases) and not (os.access(folder, os.W_OK) and _strays(folder, kept))


def _sizes(folder: Path, identifier: str) -> list[int]:
    return [(folder / f"{identifier}{suffix}").stat().st_size for suffix in _SUFFIXES]


def _is_whole(folder: Path, identifier: str, manifest: dict[str, Any]) -> bool:
    """Whether the case's files are there, with the sizes that were noted when they were made."""
    try:
        sizes = _sizes(folder, identifier)
    except OSError:
        return False
    return manifest["sizes"].get(identifier, sizes) == sizes


def _write_manifest(folder: Path, settings: dict, cases: dict, sizes: dict) -> None:
    content = {"settings": settings, "cases": {i: cases[i] for i in sorted(cases)}, "sizes": sizes}
    write_json(content, folder / MANIFEST)


def _accept_without_raw(folder: Path, manifest: dict | None, settings: dict, name: str) -> Path:
    if manifest is None or not manifest["cases"]:
        raise UDAError(
            f"{folder} holds no preprocessed target, and the raw dataset {name} is not to be found: set nnUNet_raw "
            "(export nnUNet_raw=/path/to/nnUNet_raw) or copy the preprocessed folder here"
        )
    if manifest["settings"] != settings:
        raise UDAError(
            f"{folder} is stale: it was made with other plans. It cannot be made again because the raw dataset {name} "
            "is not to be found: set nnUNet_raw (export nnUNet_raw=/path/to/nnUNet_raw)"
        )
    damaged = sorted(i for i in manifest["cases"] if not is_plain_name(i) or not _is_whole(folder, i, manifest))
    if damaged:
        raise UDAError(
            f"{folder}: the files of {damaged[:5]} are missing or cut short. Copy the folder again, or set nnUNet_raw "
            f"(export nnUNet_raw=/path/to/nnUNet_raw) so that they can be made again from {name}"
        )
    return folder


def _preprocessing_settings(plans: PlansManager, configuration: ConfigurationManager) -> dict[str, Any]:
    """All settings on which a preprocessed case depends. JSON values, so that they compare equal after a round trip."""
    chosen = {key: plans.plans.get(key) for key in _PLANS_KEYS}
    if not any(scheme == "CTNormalization" for scheme in configuration.normalization_schemes):
        chosen.pop("foreground_intensity_properties_per_channel")
    return chosen | {key: configuration.configuration.get(key) for key in _CONFIGURATION_KEYS}


def _fingerprint(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256(path)}


def _unchanged(case: list[dict[str, Any]], files: list[Path]) -> bool:
    if [old["name"] for old in case] != [path.name for path in files]:
        return False
    for old, path in zip(case, files, strict=True):
        stat = path.stat()
        if stat.st_size != old["size"] or (stat.st_mtime_ns != old["mtime_ns"] and sha256(path) != old["sha256"]):
            return False
    return True


def _splits_to_copy(raw_dataset: Path, preprocessed: Path, known: set[str]) -> list[dict[str, list[str]]] | None:
    """The raw dataset's ``splits_target.json`` where it is to be taken over, as nnU-Net's planner does with
    ``splits_final.json``; None where there is none, or the same already."""
    if not (raw_dataset / SPLITS_TARGET).exists():
        return None
    splits = check_splits(read_json(raw_dataset / SPLITS_TARGET), known, raw_dataset / SPLITS_TARGET)
    try:
        return None if read_json(preprocessed / SPLITS_TARGET) == splits else splits
    except UDAError:
        return splits


def _preprocess_case(
    item: tuple[str, list[Path]], folder: Path, plans: dict, configuration: str, dataset: dict, labelled: bool
) -> tuple[str, list[dict[str, Any]]]:
    identifier, files = item
    plans_manager = PlansManager(plans)
    manager = plans_manager.get_configuration(configuration)
    fingerprint = [_fingerprint(path) for path in files]
    images, label = (files[:-1], files[-1]) if labelled else (files, None)
    data, seg, properties = preprocess_case(images, plans_manager, manager, dataset, label)
    if not labelled:
        properties["class_locations"] = {}
    data, seg = data.astype(np.float32, copy=False), seg.astype(np.int16, copy=False)
    blocks, chunks = comp_blosc2_params(data.shape, tuple(manager.patch_size), data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, tuple(manager.patch_size), seg.itemsize)
    try:
        TargetDataset.save_case(
            data, seg, properties, str(folder / identifier), chunks=chunks, blocks=blocks, chunks_seg=chunks_seg,
            blocks_seg=blocks_seg,
        )  # fmt: skip
    except RuntimeError as error:  # blosc2 does not say why
        raise cannot_write(folder / f"{identifier}.b2nd", error) from error
    for suffix in _SUFFIXES:
        sync(folder / f"{identifier}{suffix}")
    return identifier, fingerprint
