"""What every converter shares: cases in, a whole nnU-Net raw dataset with an unlabelled target out.

A converter lists ``Case`` objects in ``Group`` objects and calls ``write_dataset``. Images keep their voxels, pixel
type, intensities and orientation header (``dataset.json`` names nnU-Net's reorienting reader, so that the network sees
one orientation while predictions still lie on the vendor's grid); labels are mapped to classes and share the image's
geometry exactly. An image is written from the image file alone: no label can change it.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import functools
import multiprocessing
import os
import re
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_uda.data.convention import Domains, environment_folder, normalisation_warning
from nnunet_uda.data.listing import entries
from nnunet_uda.data.reading import (
    LabelMap,
    check_image,
    check_same_geometry,
    check_whole,
    read_image,
    read_label,
)
from nnunet_uda.dataset_conversion.quicklook import draw_quicklook
from nnunet_uda.errors import UDAError, command
from nnunet_uda.files import write_json
from nnunet_uda.workers import end_with

ENDING = ".nii.gz"
AXES = ("left-right", "posterior-anterior", "inferior-superior")
QUICKLOOK = "quicklook.png"
"""Lies beside dataset.json, where nnU-Net does not look."""
DEFAULT_PROCESSES = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Case:
    """One scan.

    Args:
        identifier: id in the dataset, unique over all groups: letters, digits, ``_`` and ``-``.
        images: one path per channel (a file, or a folder that ``read_image`` understands).
        label: its label, or None.
        label_map: vendor values to classes; needed where ``label`` is given.
        read_image: path -> image. Top-level function (it runs in another process).
        read_label: (label path, first channel, its path) -> label on the image's grid, notes on repairs.
    """

    identifier: str
    images: tuple[Path, ...]
    label: Path | None = None
    label_map: LabelMap | None = None
    read_image: Callable[[Path], sitk.Image] = read_image
    read_label: Callable[[Path, sitk.Image, Path], tuple[sitk.Image, list[str]]] = read_label


@dataclass(frozen=True)
class Group:
    """Cases of one domain for one folder: ``imagesTr`` + ``labelsTr``, ``imagesTu``, or ``imagesTs`` + ``labelsTs``.

    ``labels`` may be ``labelsTs`` for ``imagesTu`` too: a fold protocol, where each fold tests on its own part.
    """

    domain: str
    cases: Sequence[Case]
    images: str
    labels: str | None = None


@dataclass
class CaseReport:
    """What was seen while one case was written. Sizes and spacings (mm) in the order of ``AXES``."""

    identifier: str
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    orientation: str
    zero_share: float
    volumes_ml: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# --- one case ---------------------------------------------------------------------------------------------------------


def convert_case(case: Case, images_folder: Path, labels_folder: Path | None, structures: int) -> CaseReport:
    """Check and write one case: images first and from the images alone, then the label."""
    images = []
    for path in case.images:
        image = case.read_image(path)
        check_image(image, path)
        if images:
            check_same_geometry(images[0], case.images[0], image, path)
        images.append(image)
    for channel, image in enumerate(images):
        _write(image, images_folder / f"{case.identifier}_{channel:04d}{ENDING}")
    report = _describe(case.identifier, images[0])
    if labels_folder is not None and case.label is not None and case.label_map is not None:
        label, report.notes = case.read_label(case.label, images[0], case.images[0])
        classes = case.label_map.apply(label, case.label)
        counts = sum(np.bincount(plane.ravel(), minlength=structures + 1)[1:] for plane in classes)  # by plane: memory
        report.volumes_ml = [float(count * np.prod(images[0].GetSpacing()) / 1000) for count in counts]
        converted = sitk.GetImageFromArray(classes)
        converted.CopyInformation(images[0])
        _write(converted, labels_folder / f"{case.identifier}{ENDING}")
    return report


def _write(image: sitk.Image, path: Path) -> None:
    try:
        sitk.WriteImage(image, str(path), True)
        check_whole(path)  # on a full disk SimpleITK leaves a short file without an error
    except RuntimeError as error:
        free = shutil.disk_usage(path.parent).free / 2**30 if path.parent.is_dir() else 0
        raise UDAError(
            f"{path}: cannot be written whole ({str(error).strip().splitlines()[-1]}); {free:.1f} GiB are free there. "
            "Make room, or check the permissions of the folder in nnUNet_raw."
        ) from None


def _describe(identifier: str, image: sitk.Image) -> CaseReport:
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    order = [next(i for i, letter in enumerate(code) if letter in pair) for pair in ("LR", "PA", "IS")]
    return CaseReport(
        identifier,
        tuple(image.GetSize()[i] for i in order),
        tuple(image.GetSpacing()[i] for i in order),
        code,
        float(np.mean(sitk.GetArrayViewFromImage(image) == 0)),
    )


# --- splits -----------------------------------------------------------------------------------------------------------


def folds_of(identifiers: Sequence[str], folds: int, seed: int) -> list[dict[str, list[str]]]:
    """Disjoint validation folds in nnU-Net's form: the sorted ids permuted by ``numpy.random.RandomState(seed)``."""
    ids = sorted(identifiers)
    if not 2 <= folds <= len(ids):
        raise UDAError(
            f"{folds} folds were asked for, with {len(ids)} cases ({', '.join(ids[:5])}"
            f"{' ...' if len(ids) > 5 else ''}); expected at least 2 folds and one case in each. "
            "Ask for fewer folds, or give more cases."
        )
    parts = np.array_split(np.random.RandomState(seed).permutation(ids), folds)
    return [{"train": [i for i in ids if i not in set(part)], "val": sorted(str(i) for i in part)} for part in parts]


def source_folds(identifiers: Sequence[str], folds: int, seed: int) -> tuple[list[dict[str, list[str]]], list[str]]:
    """Folds of the labelled cases, fewer where there are too few cases, with warnings that say so."""
    ids = sorted(identifiers)
    if not ids:
        return [], []
    if len(ids) == 1:
        return [{"train": ids, "val": ids}], [
            f"only one labelled case ({ids[0]}): the one fold trains and validates on it, so its validation score "
            "measures nothing"
        ]
    used = min(folds, len(ids))
    warnings = [f"only {len(ids)} labelled cases: {used} folds instead of {folds}"] if used < folds else []
    return folds_of(ids, used, seed), warnings


# --- the dataset ------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> str:
    """The first names in ``folder``, for messages that say what was found."""
    if not folder.is_dir():
        return "no such folder"
    return ", ".join([path.name for path in entries(folder)][:8]) or "nothing"


def skip_or_refuse(fact: str, strict: bool, warnings: list[str], consequence: str = "this case is left out") -> None:
    """What a converter does about a case that lacks a file: a warning, or with ``--strict`` a ``UDAError``.

    Args:
        fact: names the file and what is missing, without a full stop.
        consequence: what happens instead; the caller sees to it when this returns.
    """
    if strict:
        raise UDAError(f"{fact}. Complete the input; without --strict {consequence}.")
    warnings.append(f"{fact}: {consequence}")


def write_dataset(
    dataset_id: int,
    name: str,
    groups: Sequence[Group],
    structures: Sequence[str],
    channels: Sequence[str],
    *,
    adaptation: bool = True,
    source_splits: list[dict[str, list[str]]] | None = None,
    target_splits: list[dict[str, list[str]]] | None = None,
    information: dict[str, Any] | None = None,
    warnings: list[str] | None = None,
    overwrite: bool = False,
    strict: bool = False,
    processes: int = DEFAULT_PROCESSES,
) -> Path:
    """Write ``nnUNet_raw/DatasetXXX_NAME`` whole or not at all, print a summary, return the folder.

    Args:
        structures: names of classes 1, 2, ...
        channels: one name per image channel.
        adaptation: False for a plain supervised dataset: no target group, no ``uda`` key.
        information: further entries of ``dataset.json`` (reference, licence, description). ``uda`` is added to the
            domains' names; ``labels``, where nnU-Net trains regions of ``structures``, replaces those made of them.
        warnings: of the converter; this function's are added, and all are shown with the summary.
        strict: refuse a group with ``labelsTs`` in which a case has no label, instead of a warning.

    Raises:
        UDAError: for every bad input; all cases are read before the error is raised, so it lists all bad files.
    """
    groups = [group for group in groups if group.cases]
    _check_request(dataset_id, name, groups, structures, channels, adaptation, processes)
    by_folder = {group.images: group for group in groups}
    dataset_json: dict = {
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
        "labels": {"background": 0, **{structure: i for i, structure in enumerate(structures, 1)}},
        "numTraining": len(by_folder["imagesTr"].cases),
        "file_ending": ENDING,
        "overwrite_image_reader_writer": "SimpleITKIOWithReorient",
        "name": name,
        **(information or {}),
    }
    warnings = [] if warnings is None else warnings
    if adaptation:
        source, target = by_folder["imagesTr"], by_folder["imagesTu"]
        dataset_json["uda"] = {
            "source_domain": source.domain,
            "target_domain": target.domain,
            "numSource": len(source.cases),
            "numTarget": len(target.cases),
            "numTest": len(by_folder["imagesTs"].cases) if "imagesTs" in by_folder else 0,
            **dataset_json.get("uda", {}),
        }
        if warning := normalisation_warning(dataset_json, Domains(source.domain, target.domain)):
            warnings.append(warning)
    for group in groups:
        unlabelled = [case.identifier for case in group.cases if case.label is None]
        if unlabelled and (group.labels == "labelsTs" or group.images == "imagesTs"):
            skip_or_refuse(
                f"{len(unlabelled)} of {len(group.cases)} cases in {group.images} have no label "
                f"({', '.join(unlabelled[:5])}{' ...' if len(unlabelled) > 5 else ''})",
                strict and group.labels is not None, warnings, "they cannot be evaluated",
            )  # fmt: skip

    with _whole_folder(dataset_id, f"Dataset{dataset_id:03d}_{name}", overwrite, warnings) as (temporary, final):
        reports = _convert_all(groups, temporary, len(structures), processes)
        _check_structures(by_folder["imagesTr"], reports["imagesTr"], structures)
        write_json(dataset_json, temporary / "dataset.json")
        if source_splits is not None:
            write_json(source_splits, temporary / "splits_final.json")
        if target_splits is not None:
            write_json(target_splits, temporary / "splits_target.json")
        rows = [_example(group, reports[group.images], temporary) for group in groups]
        draw_quicklook(rows, structures, temporary / QUICKLOOK)
    _summarise(final, groups, reports, structures, warnings, adaptation)
    return final


def _check_request(
    dataset_id: int,
    name: str,
    groups: Sequence[Group],
    structures: Sequence[str],
    channels: Sequence[str],
    adaptation: bool,
    processes: int,
) -> None:
    if not 1 <= dataset_id <= 999:
        raise UDAError(f"-d {dataset_id}: expected a dataset id from 1 to 999.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UDAError(f"-name {name!r}: expected letters, digits, _ and - only. Choose such a name.")
    if processes < 1:
        raise UDAError(f"-np {processes}: expected at least one process.")
    wrong = [s for s, n in Counter(structures).items() if n > 1 or not s or s.lower() in ("background", "ignore")]
    if wrong or not structures:
        raise UDAError(
            f"structures {', '.join(structures) or '(none)'}: expected at least one name, each once, and none of them "
            "'background' or 'ignore', which nnU-Net uses itself."
        )
    present = {group.images for group in groups}
    for folder, what in (("imagesTr", "labelled"), ("imagesTu", "unlabelled target")):
        if folder not in present and (adaptation or folder == "imagesTr"):
            raise UDAError(f"no {what} case for {folder}; expected at least one. Check the input folders.")
    seen_ids: dict[str, Case] = {}
    seen_files: dict[Path, Case] = {}
    for group in groups:
        for case in group.cases:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", case.identifier):
                raise UDAError(
                    f"{case.images[0]}: case id {case.identifier!r}; expected letters, digits, _ and - only."
                )
            if other := seen_ids.get(case.identifier.lower()):
                raise UDAError(
                    f"{case.images[0]}: its case id {case.identifier} is already that of {other.images[0]}; expected "
                    "every scan once, and every id in one group only. Rename or remove one of them."
                )
            seen_ids[case.identifier.lower()] = case
            for path in case.images:
                if other := seen_files.get(path.resolve()):
                    raise UDAError(
                        f"{path}: the same file is used for {other.identifier} and for {case.identifier}; expected "
                        "every scan in one group only (a test scan must not be trained on). Remove one of them."
                    )
                seen_files[path.resolve()] = case
            if len(case.images) != len(channels):
                raise UDAError(
                    f"{case.images[0]}: case {case.identifier} ({group.domain}, {group.images}) has {len(case.images)} "
                    f"channel(s), the dataset has {len(channels)} ({', '.join(channels)}); expected the same channels "
                    "in source and target. Name channels case_0000, case_0001, ... in both domains."
                )
            if group.labels == "labelsTr" and case.label is None:
                raise UDAError(
                    f"{case.images[0]}: there is no label for this {group.domain} case; expected one for every "
                    "labelled case. Add the label, or remove the image."
                )


@contextmanager
def _locked(raw: Path, prefix: str, warnings: list[str]) -> Iterator[None]:
    with open(raw / f"{prefix}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UDAError(f"{lock.name}: another conversion to this dataset id is running. Wait for it.") from None
            warnings.append(f"{raw} cannot be locked ({error}): do not run two conversions of one dataset at once")
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)


@contextmanager
def _whole_folder(dataset_id: int, folder: str, overwrite: bool, warnings: list[str]) -> Iterator[tuple[Path, Path]]:
    """Yield (temporary folder, final folder); the first becomes the second when the block succeeds, else it goes."""
    raw = environment_folder("nnUNet_raw")
    try:
        raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UDAError(f"nnUNet_raw is {raw}, which cannot be made: {error}. Set it to a folder you own.") from None
    final = raw / folder
    prefix = f".converting_Dataset{dataset_id:03d}"
    with _locked(raw, prefix, warnings):
        replaced = raw / f"{prefix}_replaced"
        if not final.exists() and (replaced / folder).is_dir():
            os.replace(replaced / folder, final)  # killed between the two renames below
        for leftover in raw.glob(f"{prefix}_*"):
            print(f"Removing {leftover}, left by an interrupted conversion")
            shutil.rmtree(leftover, ignore_errors=True)  # a killed run's process may write on for a moment
        _check_free(dataset_id, final, overwrite, warnings)
        temporary = raw / f"{prefix}_{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        try:
            yield temporary, final
            if final.exists():
                replaced.mkdir()
                os.replace(final, replaced / folder)
            os.replace(temporary, final)
        except BaseException:
            if (replaced / folder).is_dir() and not final.exists():
                os.replace(replaced / folder, final)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)


def _check_free(dataset_id: int, final: Path, overwrite: bool, warnings: list[str]) -> None:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        root = os.environ.get(variable)
        for other in sorted(Path(root).glob(f"Dataset{dataset_id:03d}*")) if root else []:
            if other.name != final.name:
                raise UDAError(
                    f"{other}: dataset id {dataset_id} is already taken in {variable}; nnU-Net needs ids to be unique, "
                    f"so {final.name} cannot be made. Choose another -d, give -name the same name, or remove it."
                )
            if variable == "nnUNet_raw" and not overwrite:
                raise UDAError(f"{other}: this dataset exists already. Use --overwrite to replace it, or another -d.")
            if variable != "nnUNet_raw":
                warnings.append(
                    f"{other} was made from an earlier dataset of this name: plan, preprocess and train again"
                )


def _convert_all(groups: Sequence[Group], folder: Path, structures: int, processes: int) -> dict[str, list[CaseReport]]:
    jobs = []
    for group in groups:
        (folder / group.images).mkdir()
        labels = folder / group.labels if group.labels and any(case.label for case in group.cases) else None
        if labels is not None:
            labels.mkdir(exist_ok=True)
        jobs += [(group.images, case, folder / group.images, labels) for case in group.cases]
    done: dict[str, dict[str, CaseReport]] = {group.images: {} for group in groups}
    errors: dict[str, str] = {}
    progress = tqdm(total=len(jobs), desc="Converting", unit="case")
    if processes == 1 or len(jobs) == 1:
        for group_name, case, images, labels in jobs:
            try:
                done[group_name][case.identifier] = convert_case(case, images, labels, structures)
            except UDAError as error:
                errors[case.identifier] = str(error)
            progress.update()
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(jobs)), spawn, end_with, (os.getpid(),)) as pool:
            futures = {
                pool.submit(convert_case, case, images, labels, structures): (group_name, case)
                for group_name, case, images, labels in jobs
            }
            try:
                for future in as_completed(futures):
                    group_name, case = futures[future]
                    try:
                        done[group_name][case.identifier] = future.result()
                    except BrokenProcessPool:
                        raise UDAError(
                            f"{case.images[0]}: a worker process was killed, probably because memory ran out with "
                            f"{processes} processes. Use a smaller -np."
                        ) from None
                    except UDAError as error:
                        errors[case.identifier] = str(error)
                    progress.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    progress.close()
    if errors:
        messages = [errors[key] for key in sorted(errors)]
        if len(messages) == 1:
            raise UDAError(messages[0])
        raise UDAError(
            f"{len(messages)} cases cannot be converted; nothing was written:\n  - " + "\n  - ".join(messages)
        )
    return {group: [reports[key] for key in sorted(reports)] for group, reports in done.items()}


def _example(group: Group, reports: Sequence[CaseReport], folder: Path) -> tuple[str, Path, Path | None]:
    """Title, image and label for the quick look: the first case, of those that hold the most structures."""
    report = max(reports, key=lambda r: sum(volume > 0 for volume in r.volumes_ml))
    label = folder / group.labels / f"{report.identifier}{ENDING}" if group.labels else None
    title = f"{group.images}: {group.domain}, {report.identifier}"
    image = folder / group.images / f"{report.identifier}_0000{ENDING}"
    return title, image, label if label is not None and label.exists() else None


def _check_structures(group: Group, reports: Sequence[CaseReport], structures: Sequence[str]) -> None:
    for index, structure in enumerate(structures):
        if not any(report.volumes_ml[index] for report in reports):
            raise UDAError(
                f"{group.cases[0].label}: neither this label nor any other of the {len(reports)} labelled cases holds "
                f"the structure '{structure}'; expected it in at least one. Check the values given for it."
            )


# --- summary ----------------------------------------------------------------------------------------------------------


def _summarise(
    folder: Path,
    groups: Sequence[Group],
    reports: dict[str, list[CaseReport]],
    structures: Sequence[str],
    warnings: list[str],
    adaptation: bool,
) -> None:
    print(f"\n{folder}\n  look at {folder / QUICKLOOK}: letters on its edges must agree with the anatomy")
    for group in groups:
        seen = reports[group.images]
        labelled = sum(case.label is not None for case in group.cases) if group.labels else 0
        print(f"  {group.images}: {len(seen)} {group.domain} case(s), {labelled} with labels in {group.labels}"
              if group.labels else f"  {group.images}: {len(seen)} {group.domain} case(s), no labels")  # fmt: skip
        print(f"    size (LR x PA x IS): {_ranges([r.size for r in seen], '.0f')}")
        print(f"    spacing in mm:       {_ranges([r.spacing for r in seen], '.3g')}")
        codes = Counter(r.orientation for r in seen)
        print(f"    orientation:         {', '.join(f'{code} ({n})' for code, n in codes.most_common())}")
        measured = [report for report in seen if report.volumes_ml]
        for index, structure in enumerate(structures if measured else ()):
            volumes = [r.volumes_ml[index] for r in measured]
            print(
                f"    {index + 1} {structure}: mean {np.mean(volumes):.3g} ml, {min(volumes):.3g} to "
                f"{max(volumes):.3g}, in {sum(v > 0 for v in volumes)} of {len(volumes)} cases"
            )
        for report in measured:
            if not any(report.volumes_ml):
                warnings.append(f"{report.identifier}: its label is all background")
    repairs = [f"{r.identifier}: {note}" for seen in reports.values() for r in seen for note in r.notes]
    print("  repaired: " + ("\n    ".join(["", *repairs]) if repairs else "nothing"))
    if adaptation:
        source, target = reports["imagesTr"], reports["imagesTu"] + reports.get("imagesTs", [])
        warnings += _domain_warnings(source, target)
    for warning in warnings:
        print(f"WARNING: {warning}")


def _ranges(rows: Sequence[Sequence[float]], form: str) -> str:
    low, high = np.min(rows, axis=0), np.max(rows, axis=0)
    return " x ".join(
        f"{a:{form}}" if f"{a:{form}}" == f"{b:{form}}" else f"{a:{form}}-{b:{form}}"
        for a, b in zip(low, high, strict=True)
    )


def _domain_warnings(source: Sequence[CaseReport], target: Sequence[CaseReport]) -> list[str]:
    warnings = []
    spacings = [np.median([r.spacing for r in reports], axis=0) for reports in (source, target)]
    thick = [int(np.argmax(s)) if np.max(s) > 1.2 * np.median(s) else None for s in spacings]
    if None not in thick and thick[0] != thick[1]:
        warnings.append(
            f"the thick slices lie along {AXES[thick[0]]} in the source and along {AXES[thick[1]]} in the target "
            f"(median spacings {_short(spacings[0])} and {_short(spacings[1])} mm): a 2D network trained in the "
            "source's plane sees the target's coarse axis in plane. Consider choosing the slice plane, or 3d_fullres"
        )
    shares = [float(np.mean([r.zero_share for r in reports])) for reports in (source, target)]
    if abs(shares[0] - shares[1]) > 0.25:
        warnings.append(
            f"{shares[0]:.0%} of the source's voxels are exactly 0, {shares[1]:.0%} of the target's: nnU-Net decides "
            "on the source alone whether z-scoring uses the nonzero voxels only. Give both domains the same background"
        )
    return warnings


def _short(values: Sequence[float]) -> str:
    return " x ".join(f"{v:.3g}" for v in values)


# --- command line -----------------------------------------------------------------------------------------------------


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every converter has."""
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="dataset id, 1 to 999")
    parser.add_argument("-name", help="dataset name: DatasetXXX_NAME")
    parser.add_argument(
        "-channel",
        nargs="+",
        metavar="NAME",
        help="channel name(s) [intensity, which nnU-Net z-scores per image]; CT only if both domains are CT in HU",
    )
    parser.add_argument("-seed", type=int, default=12345, help="seed of the folds [12345]")
    parser.add_argument(
        "-np", type=int, default=DEFAULT_PROCESSES, metavar="N", help=f"processes [{DEFAULT_PROCESSES} here]"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset of this id and name")
    parser.add_argument(
        "--strict", action="store_true", help="refuse what is otherwise a warning: a case that lacks a needed file"
    )


def channel_names(given: Sequence[str] | None, count: int) -> list[str]:
    """``-channel``, or its default for ``count`` channels."""
    if given and len(given) != count:
        raise UDAError(f"-channel {' '.join(given)}: {len(given)} name(s), but the source has {count} channel(s).")
    return list(given) if given else ["intensity"] if count == 1 else [f"intensity_{i}" for i in range(count)]


def telling(convert: Callable[[argparse.Namespace, list[str]], None]) -> Callable[[argparse.Namespace], None]:
    """``convert(args, warnings)`` as ``convert(args)``; the warnings collected are printed where an error stops it."""

    @functools.wraps(convert)
    def with_warnings(args: argparse.Namespace) -> None:
        warnings: list[str] = []
        try:
            convert(args, warnings)
        except UDAError:
            for warning in warnings:
                print(f"WARNING: {warning}", file=sys.stderr)
            raise

    return with_warnings


def script(
    description: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    convert: Callable[[argparse.Namespace], None],
) -> Callable[..., None]:
    """``main(argv=None)`` of a converter that is run by itself."""

    @command
    def main(argv: list[str] | None = None) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        add_arguments(parser)
        convert(parser.parse_args(argv))

    return main
