"""What every converter shares: cases in, a whole nnU-Net raw dataset with an unlabelled target out.

A converter lists ``Case`` objects in ``Group`` objects and calls ``write_dataset``. Images keep their voxels, pixel
type and orientation header (``dataset.json`` names nnU-Net's reorienting reader, so that the network sees one
orientation while predictions still lie on the vendor's grid), and their intensities within the bounds of their domain
(``choose_intensities``); labels are mapped to classes and share the image's geometry exactly. An image is written from
the image file and those bounds alone: no label of its own can change it.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_uda.data.convention import (
    LABEL_VALUES,
    OTHER_LABEL_VALUES,
    Domains,
    environment_folder,
    is_ct,
    normalisation_warning,
)
from nnunet_uda.data.geometry import check_against_source, check_same_geometry
from nnunet_uda.data.intensities import (
    DEFAULT,
    FORMS,
    PERCENTILES,
    PRESETS,
    Intensities,
    NoContrastError,
    not_hounsfield,
    parse_intensities,
    structure_bounds,
    window_of_structures,
)
from nnunet_uda.data.listing import entries
from nnunet_uda.data.nifti import GEOMETRIES, nifti_geometry, remarks
from nnunet_uda.data.reading import LabelMap, check_image, check_whole, read_image, read_label
from nnunet_uda.data.slices import AXES, FILE, MIXED, REMEDY, REORIENTED, Grid, SliceOrder, odd_tests, slice_order
from nnunet_uda.dataset_conversion.quicklook import draw_quicklook
from nnunet_uda.errors import UDAError, command, system_fault
from nnunet_uda.files import cannot_write, go_on_without_locks, put_back, whole_folder, write_json
from nnunet_uda.names import check_name
from nnunet_uda.workers import end_with

ENDING = ".nii.gz"
AXIS_PLANES = ("sagittal", "coronal", "axial")
QUICKLOOK = "quicklook.png"
"""Lies beside dataset.json, where nnU-Net does not look."""
DEFAULT_PROCESSES = min(8, os.cpu_count() or 1)
MEASURED_CASES = 10
"""So many labelled CT scans, evenly taken, are looked at for the default window."""
LOST = 0.95
"""A structure of whose voxels this share lies outside of the window cannot be learned."""


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


@dataclass(frozen=True)
class IntensityRequest:
    """What is asked for the intensities of both domains.

    Args:
        source, target: ``DEFAULT`` (chosen by ``choose_intensities``), or what is given, None for the vendor's.
        preset: name in ``PRESETS``: the window of a CT that has no labels to find one from.
    """

    source: Intensities | str | None = DEFAULT
    target: Intensities | str | None = DEFAULT
    preset: str = "soft_tissue"


@dataclass(frozen=True)
class Clipping:
    """What is done to a group's images.

    Args:
        intensities: or None to keep the vendor's.
        hounsfield: refuse scans that do not look like HU.
        given: they were asked for, so that what they would spoil is refused; defaults leave a scan as it is, or warn.
        checked: count the structures' voxels outside of the bounds; only where labels may be looked at.
    """

    intensities: Intensities | None = None
    hounsfield: bool = False
    given: bool = True
    checked: bool = False


@dataclass
class CaseReport:
    """What was seen while one case was written. Sizes and spacings (mm) in the order of ``AXES``.

    ``outside``: of every structure's voxels the share outside of the bounds (of the channel where it is smallest), NaN
    without such voxels; empty where nothing was clipped or labels may not be looked at.
    """

    identifier: str
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    orientation: str
    zero_share: float
    grid: Grid
    volumes_ml: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Repairs."""
    warnings: list[str] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)


# --- one case ---------------------------------------------------------------------------------------------------------


def convert_case(
    case: Case,
    images_folder: Path,
    labels_folder: Path | None,
    structures: int,
    clipping: Clipping = Clipping(),
    geometry: str | None = None,
) -> CaseReport:
    """Check and write one case: images first and from the images alone, then the label.

    One volume is in memory at a time. All channels and the label are written with the first channel's geometry.

    Args:
        geometry: see ``nifti_geometry``.
    """
    with nifti_geometry(geometry):
        image = case.read_image(case.images[0])
        report = _describe(case.identifier, image)
        grid = sitk.Image(image.GetSize(), sitk.sitkUInt8)  # of the first channel, which need not be kept for it
        grid.CopyInformation(image)
        beyond = []
        for channel, path in enumerate(case.images):
            image = case.read_image(path) if channel else image
            check_image(image, path)
            check_same_geometry(grid, case.images[0], image, path)
            image.CopyInformation(grid)
            if clipping.checked and clipping.intensities is not None:
                beyond.append(_beyond(image, clipping.intensities))
            image = _clip(image, path, clipping, report.notes)
            _write(image, images_folder / f"{case.identifier}_{channel:04d}{ENDING}")
            _remark(report, path)
            del image
        if labels_folder is not None and case.label is not None and case.label_map is not None:
            label, repairs = case.read_label(case.label, grid, case.images[0])
            report.notes += repairs
            _remark(report, case.label)
            classes = case.label_map.apply(label, case.label)
            del label
            counts = sum(np.bincount(plane.ravel(), minlength=structures + 1)[1:] for plane in classes)  # memory
            report.volumes_ml = [float(count * np.prod(grid.GetSpacing()) / 1000) for count in counts]
            if beyond:
                report.outside = np.min([_outside(mask, classes, structures) for mask in beyond], axis=0).tolist()
            converted = sitk.GetImageFromArray(classes)
            converted.CopyInformation(grid)
            _write(converted, labels_folder / f"{case.identifier}{ENDING}")
    return report


def _clip(image: sitk.Image, path: Path, clipping: Clipping, notes: list[str]) -> sitk.Image:
    if clipping.intensities is None:
        return image
    if clipping.hounsfield and (reason := not_hounsfield(sitk.GetArrayViewFromImage(image))):
        raise UDAError(
            f"{path}: {reason}; expected a CT in Hounsfield units (air -1000, water 0). Convert it to HU, or give "
            "-source_intensities (or -target_intensities): two numbers in the scan's own units, or none to keep them."
        )
    try:
        return clipping.intensities.apply(image, path)
    except NoContrastError as error:
        if clipping.given or clipping.intensities.window is not None:
            raise
        notes.append(f"{str(error).split(';')[0]}: left as it is")
        return image


def _beyond(image: sitk.Image, intensities: Intensities) -> np.ndarray:
    """Bool, (z, y, x): voxels that clipping changes."""
    voxels = sitk.GetArrayViewFromImage(image)
    low, high = intensities.bounds(voxels)
    return np.stack([(plane < low) | (plane > high) for plane in voxels])


def _outside(beyond: np.ndarray, classes: np.ndarray, structures: int) -> list[float]:
    """The share of each structure's voxels that is ``beyond``, NaN without voxels; by planes, for memory."""
    found, whole = (
        sum(np.bincount(part, minlength=structures + 1)[1:] for part in parts)
        for parts in (
            (plane[mask] for plane, mask in zip(classes, beyond, strict=True)),
            (plane.ravel() for plane in classes),
        )
    )
    return [float(b / n) if n else float("nan") for b, n in zip(found, whole, strict=True)]


def _remark(report: CaseReport, path: Path) -> None:
    repairs, warnings = remarks(path)
    report.notes += repairs
    report.warnings += warnings


# --- intensities ------------------------------------------------------------------------------------------------------


def choose_intensities(groups: Sequence[Group], request: IntensityRequest, adaptation: bool) -> dict[str, Clipping]:
    """What is done to the images of each group, by its folder.

    The default is 0.5 and 99.5 percent of the nonzero voxels. For CT (by the domain's name) it is a window: around the
    structures of the labelled source where that is CT, else the request's preset. No label of the target is looked at,
    and an upper bound's dataset has the window of the target that it is the bound of.
    """
    found: Intensities | None = None
    chosen = {}
    for group in groups:
        wanted = request.source if adaptation and group.images == "imagesTr" else request.target
        hounsfield, given = False, wanted != DEFAULT
        if wanted == DEFAULT and not is_ct(group.domain):
            wanted = Intensities(PERCENTILES, origin="default")
        elif wanted == DEFAULT:
            hounsfield = True
            if found is None:
                found = _found_window(groups, request.preset, adaptation)
            wanted = found
        elif wanted is not None:
            hounsfield = wanted.window is not None and wanted.origin != "given"
        chosen[group.images] = Clipping(wanted, hounsfield, given, checked=group.images == "imagesTr")
    return chosen


def _found_window(groups: Sequence[Group], preset: str, adaptation: bool) -> Intensities:
    """The window around the structures of the source's CT scans; the preset where there are none that can be read."""
    of_preset = Intensities(window=PRESETS[preset], origin=f"preset {preset}, no label was read")
    source = next(group for group in groups if group.images == "imagesTr")
    if not (adaptation and is_ct(source.domain)):
        return of_preset
    cases = [case for case in source.cases if case.label is not None and case.label_map is not None]
    step = max(1.0, len(cases) / MEASURED_CASES)
    bounds: list[tuple[float, float]] = []
    for case in (cases[int(i * step)] for i in range(min(len(cases), MEASURED_CASES))):
        try:
            images = [case.read_image(path) for path in case.images]
            label, _ = case.read_label(case.label, images[0], case.images[0])
            classes = case.label_map.apply(label, case.label)
            for image in images:
                if image.GetSize() == images[0].GetSize() and not not_hounsfield(sitk.GetArrayViewFromImage(image)):
                    bounds += structure_bounds(image, classes)
        except UDAError:
            continue  # what is wrong with it is said when it is converted
    if not bounds:
        return of_preset
    origin = f"found around the structures labelled in {source.domain}"
    return Intensities(window=window_of_structures(bounds), origin=origin)


def _check_outside(
    group: Group, reports: Sequence[CaseReport], structures: Sequence[str], clipping: Clipping, warnings: list[str]
) -> None:
    """Refuse a given window that leaves a structure without voxels; say so of percentiles and of a default."""
    for index, structure in enumerate(structures):
        shares = [r.outside[index] for r in reports if r.outside and not np.isnan(r.outside[index])]
        if not shares or min(shares) < LOST:
            continue
        fact = (
            f"at least {min(shares):.0%} of the voxels of '{structure}' lie outside of the {clipping.intensities} in "
            f"all {len(shares)} labelled {group.domain} case(s) that hold it"
        )
        if clipping.given and clipping.intensities.window is not None:
            raise UDAError(
                f"{group.cases[0].images[0]}: {fact}; expected a window that shows every structure. Give another one "
                "(-source_intensities; with --upper_bound -target_intensities), or none."
            )
        warnings.append(f"{fact}: it is seen as one value. If it is hard to tell apart, give others, or none")


def _write(image: sitk.Image, path: Path) -> None:
    try:
        sitk.WriteImage(image, str(path), True)
        check_whole(path)  # on a full disk SimpleITK leaves a short file without an error
    except RuntimeError as error:
        raise cannot_write(path, error) from None


def _describe(identifier: str, image: sitk.Image) -> CaseReport:
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    grid = Grid.of(image)
    order = [grid.body.index(axis) for axis in range(len(AXES))]
    return CaseReport(
        identifier,
        tuple(image.GetSize()[i] for i in order),
        tuple(image.GetSpacing()[i] for i in order),
        code,
        float(np.mean([np.mean(plane == 0) for plane in sitk.GetArrayViewFromImage(image)])),
        grid,
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
    intensities: IntensityRequest = IntensityRequest(),
    warnings: list[str] | None = None,
    overwrite: bool = False,
    strict: bool = False,
    processes: int = DEFAULT_PROCESSES,
    geometry: str | None = None,
) -> Path:
    """Write ``nnUNet_raw/DatasetXXX_NAME`` whole or not at all, print a summary, return the folder.

    Args:
        structures: names of classes 1, 2, ...
        channels: one name per image channel.
        adaptation: False for a plain supervised dataset: no target group, no ``uda`` key.
        information: further entries of ``dataset.json`` (reference, licence, description). ``uda`` is added to the
            domains' names; ``labels``, where nnU-Net trains regions of ``structures``, replaces those made of them.
        intensities: how the images of both domains are clipped; recorded under ``uda``, ``intensities``, as of the
            source and of the target (without adaptation the dataset's one domain is the target).
        warnings: of the converter; this function's are added, and all are shown with the summary.
        strict: refuse a group with ``labelsTs`` in which a case has no label, instead of a warning.
        geometry: how files with two geometries are read; see ``nifti_geometry``.

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
    values = _label_values(groups, structures)
    if not adaptation:
        dataset_json |= values
    else:
        source, target = by_folder["imagesTr"], by_folder["imagesTu"]
        dataset_json["uda"] = {
            "source_domain": source.domain,
            "target_domain": target.domain,
            "numSource": len(source.cases),
            "numTarget": len(target.cases),
            "numTest": len(by_folder["imagesTs"].cases) if "imagesTs" in by_folder else 0,
            **values,
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
        with nifti_geometry(geometry):
            clippings = choose_intensities(groups, intensities, adaptation)
        reports = _convert_all(groups, temporary, len(structures), processes, clippings, geometry)
        _check_spacings(groups, reports)
        _check_structures(by_folder["imagesTr"], reports["imagesTr"], structures)
        _check_outside(by_folder["imagesTr"], reports["imagesTr"], structures, clippings["imagesTr"], warnings)
        _record(dataset_json, clippings, adaptation)
        order = _choose_order(dataset_json, reports, warnings)
        write_json(dataset_json, temporary / "dataset.json")
        if source_splits is not None:
            write_json(source_splits, temporary / "splits_final.json")
        if target_splits is not None:
            write_json(target_splits, temporary / "splits_target.json")
        rows = [_example(group, reports[group.images], temporary, clippings[group.images]) for group in groups]
        draw_quicklook(rows, structures, temporary / QUICKLOOK)
    _summarise(final, groups, reports, structures, warnings, adaptation, clippings, order)
    return final


def _choose_order(
    dataset_json: dict[str, Any], reports: dict[str, list[CaseReport]], warnings: list[str]
) -> SliceOrder:
    """The order in which nnU-Net is to read the axes, in ``dataset.json``; with warnings of cases that do not agree."""
    grids = {folder: {report.identifier: report.grid for report in seen} for folder, seen in reports.items()}
    training = [grids[folder] for folder in ("imagesTr", "imagesTu") if folder in grids]
    order = slice_order(training)
    dataset_json["overwrite_image_reader_writer"] = order.reader
    if order.order != REORIENTED:
        dataset_json["uda"] = {**dataset_json.get("uda", {}), "slices": order.to_json()}
    if order.order == MIXED:
        warnings.append(
            f"the thick slices of {_some(order.odd)} lie along another axis than those of the other scans, in the "
            f"files' order and in the body's: training in 2D will be refused. {REMEDY}"
        )
    if order.mirrored:
        listed = [f"{name} ({how})" for name, how in order.mirrored.items()]
        warnings.append(
            f"axes of {_some(listed)} do not run as in most other scans: they are seen mirrored or turned beside them. "
            "Flip these files, or train with mirroring"
        )
    if order.order != MIXED and (odd := odd_tests(order, training, grids.get("imagesTs", {}))):
        warnings.append(
            f"the thick slices of the test scans {_some(odd)} lie along another axis than in training: a 2D network "
            "sees cuts across them"
        )
    return order


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _record(dataset_json: dict[str, Any], clippings: dict[str, Clipping], adaptation: bool) -> None:
    """Write under ``uda`` how each domain was clipped; nothing where both keep the vendor's intensities."""
    folders = {"source": "imagesTr", "target": "imagesTu"} if adaptation else {"target": "imagesTr"}
    used = {domain: clippings[folder].intensities for domain, folder in folders.items()}
    if any(used.values()):
        entries = {d: None if intensities is None else intensities.to_json() for d, intensities in used.items()}
        dataset_json["uda"] = {**dataset_json.get("uda", {}), "intensities": entries}


def _label_values(groups: Sequence[Group], structures: Sequence[str]) -> dict[str, Any]:
    """What the values in the label files of each domain mean, so that evaluation can read these files too."""
    names = ("background", *structures)
    by_domain: dict[str, dict[str, list[int]]] = {}
    others = False
    for group in groups:
        for label_map in (case.label_map for case in group.cases if case.label and case.label_map):
            others = others or label_map.ignore_other
            by_name = by_domain.setdefault(group.domain, {})
            for value, index in (label_map.values if label_map.files is None else label_map.files).items():
                listed = by_name.setdefault(names[index], [])
                if value not in listed:
                    listed.append(value)
    return {LABEL_VALUES: by_domain} | ({OTHER_LABEL_VALUES: "background"} if others else {})


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ``UDAError`` for what ``add_common_arguments`` let through, before any file is listed or read."""
    _check_options(args.d, args.name, args.channel or (), args.np)
    if not 0 <= args.seed < 2**32:
        raise UDAError(f"-seed {args.seed}: expected a number from 0 to {2**32 - 1}.")
    environment_folder("nnUNet_raw")


def _check_options(dataset_id: int, name: str | None, channels: Sequence[str], processes: int) -> None:
    if not 1 <= dataset_id <= 999:
        raise UDAError(f"-d {dataset_id}: expected a dataset id from 1 to 999.")
    if name is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise UDAError(f"-name {name!r}: expected letters, digits, _ and - only. Choose such a name.")
        check_name(name, "-name", file=True)
    for channel in channels:
        check_name(channel, "-channel")
    if processes < 1:
        raise UDAError(f"-np {processes}: expected at least one process.")


def _check_request(
    dataset_id: int,
    name: str,
    groups: Sequence[Group],
    structures: Sequence[str],
    channels: Sequence[str],
    adaptation: bool,
    processes: int,
) -> None:
    _check_options(dataset_id, name, channels, processes)
    for what, names in (("a structure", structures), ("a domain", [group.domain for group in groups])):
        for one in names:
            check_name(one, what)
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
            check_name(case.identifier, f"{case.images[0]}: the case id")
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


def recover(dataset_id: int) -> None:
    """Put back a dataset of this id that a killed conversion had set aside, whatever becomes of the present one."""
    raw = environment_folder("nnUNet_raw")
    if raw.is_dir():
        put_back(raw / f"Dataset{dataset_id:03d}", _prefix(dataset_id))


def _prefix(dataset_id: int) -> str:
    return f".converting_Dataset{dataset_id:03d}"


@contextmanager
def _locked(raw: Path, prefix: str) -> Iterator[None]:
    with open(raw / f"{prefix}.lock", "w") as lock:
        try:
            with go_on_without_locks(raw):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UDAError(f"{lock.name}: another conversion to this dataset id is running. Wait for it.") from None
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)


@contextmanager
def _whole_folder(dataset_id: int, folder: str, overwrite: bool, warnings: list[str]) -> Iterator[tuple[Path, Path]]:
    """Yield (temporary folder, final folder); the first becomes the second when the block succeeds, else it goes."""
    raw = environment_folder("nnUNet_raw")
    final = raw / folder
    prefix = _prefix(dataset_id)
    with ExitStack() as stack:
        try:
            raw.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(raw, prefix))
            put_back(final, prefix)
        except OSError as error:
            raise UDAError(f"nnUNet_raw is {raw}, which cannot be written ({system_fault(error) or error})") from error
        _check_free(dataset_id, final, overwrite, warnings)
        with whole_folder(final, prefix) as temporary:
            yield temporary, final


def _check_free(dataset_id: int, final: Path, overwrite: bool, warnings: list[str]) -> None:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        root = os.environ.get(variable)
        others = sorted(Path(root).iterdir()) if root and Path(root).is_dir() else []
        for other in (path for path in others if path.name.startswith(f"Dataset{dataset_id:03d}")):
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


def _convert_all(
    groups: Sequence[Group],
    folder: Path,
    structures: int,
    processes: int,
    clippings: dict[str, Clipping],
    geometry: str | None,
) -> dict[str, list[CaseReport]]:
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
                done[group_name][case.identifier] = convert_case(
                    case, images, labels, structures, clippings[group_name], geometry
                )
            except UDAError as error:
                errors[case.identifier] = str(error)
            progress.update()
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(jobs)), spawn, end_with, (os.getpid(),)) as pool:
            futures = {
                pool.submit(convert_case, case, images, labels, structures, clippings[group_name], geometry): (
                    group_name,
                    case,
                )
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
    _refuse([errors[key] for key in sorted(errors)])
    return {group: [reports[key] for key in sorted(reports)] for group, reports in done.items()}


def _refuse(messages: Sequence[str]) -> None:
    """Raise one error for all bad cases, if there are any."""
    if len(messages) == 1:
        raise UDAError(messages[0])
    if messages:
        raise UDAError(
            f"{len(messages)} cases cannot be converted; nothing was written:\n  - " + "\n  - ".join(messages)
        )


def _check_spacings(groups: Sequence[Group], reports: dict[str, list[CaseReport]]) -> None:
    """Refuse scans whose voxels are of another order than the labelled ones' median, to which nnU-Net resamples."""
    source = np.median([report.spacing for report in reports["imagesTr"]], axis=0)
    messages = []
    for group in groups:
        paths = {case.identifier: case.images[0] for case in group.cases}
        for report in reports[group.images]:
            new_size = np.maximum(1, np.multiply(report.size, report.spacing) / source)
            try:
                check_against_source(paths[report.identifier], report.size, report.spacing, source, new_size)
            except UDAError as error:
                messages.append(str(error))
    _refuse(messages)


def _example(
    group: Group, reports: Sequence[CaseReport], folder: Path, clipping: Clipping
) -> tuple[str, Path, Path | None]:
    """Title, image and label for the quick look: the first case, of those that hold the most structures."""
    report = max(reports, key=lambda r: sum(volume > 0 for volume in r.volumes_ml))
    label = folder / group.labels / f"{report.identifier}{ENDING}" if group.labels else None
    title = f"{group.images}: {group.domain}, {report.identifier}, {_intensities_in_words(clipping)}"
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
    clippings: dict[str, Clipping],
    order: SliceOrder,
) -> None:
    print(f"\n{folder}\n  look at {folder / QUICKLOOK}: letters on its edges must agree with the anatomy")
    for group in groups:
        seen = reports[group.images]
        labelled = sum(case.label is not None for case in group.cases) if group.labels else 0
        print(f"  {group.images}: {len(seen)} {group.domain} case(s), {labelled} with labels in {group.labels}"
              if group.labels else f"  {group.images}: {len(seen)} {group.domain} case(s), no labels")  # fmt: skip
        print(f"    size (LR x PA x IS): {_ranges([r.size for r in seen], '.0f')}")
        print(f"    spacing in mm:       {_ranges([r.spacing for r in seen], '.3g')}")
        print(f"    intensities:         {_intensities_in_words(clippings[group.images], origin=True)}")
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
        warnings += _single_slices(group, seen)
    repairs = [f"{r.identifier}: {note}" for seen in reports.values() for r in seen for note in r.notes]
    warnings += [f"{r.identifier}: {warning}" for seen in reports.values() for r in seen for warning in r.warnings]
    if order.order == FILE:
        print("  axes: kept in the files' order (SimpleITKIO in dataset.json), as these scans are oblique: after "
              "reorientation their thick slices would lie along different axes of the body")  # fmt: skip
    print("  repaired: " + ("\n    ".join(["", *repairs]) if repairs else "nothing"))
    if adaptation:
        source, target = reports["imagesTr"], reports["imagesTu"] + reports.get("imagesTs", [])
        warnings += _domain_warnings(source, target, order)
    for warning in warnings:
        print(f"WARNING: {warning}")


def _intensities_in_words(clipping: Clipping, origin: bool = False) -> str:
    if clipping.intensities is None:
        return "the vendor's intensities"
    return f"{clipping.intensities}{f' ({clipping.intensities.origin})' if origin else ''}"


def _ranges(rows: Sequence[Sequence[float]], form: str) -> str:
    low, high = np.min(rows, axis=0), np.max(rows, axis=0)
    return " x ".join(
        f"{a:{form}}" if f"{a:{form}}" == f"{b:{form}}" else f"{a:{form}}-{b:{form}}"
        for a, b in zip(low, high, strict=True)
    )


def _single_slices(group: Group, reports: Sequence[CaseReport]) -> list[str]:
    """A warning for each axis along which cases have one slice."""
    warnings = []
    for axis, plane in enumerate(AXIS_PLANES):
        flat = [report.identifier for report in reports if report.size[axis] == 1]
        if flat:
            warnings.append(
                f"{len(flat)} of {len(reports)} cases in {group.images} have one slice {AXES[axis]} "
                f"({', '.join(flat[:5])}{' ...' if len(flat) > 5 else ''}): 3D configurations learn nothing from it, "
                "and nnU-Net takes the axis of the largest spacing for the slices' normal, so that 2D patches may be "
                f"rows across the image. Choose the plane: nnUNetUDA_configure -plane {plane}"
            )
    return warnings


def _domain_warnings(source: Sequence[CaseReport], target: Sequence[CaseReport], order: SliceOrder) -> list[str]:
    warnings = []
    spacings = [np.median([r.spacing for r in reports], axis=0) for reports in (source, target)]
    thick = [int(np.argmax(s)) if np.max(s) > 1.2 * np.median(s) else None for s in spacings]
    if order.order == REORIENTED and None not in thick and thick[0] != thick[1]:
        warnings.append(
            f"the thick slices lie along {AXES[thick[0]]} in the source and along {AXES[thick[1]]} in the target "
            f"(median spacings {_short(spacings[0])} and {_short(spacings[1])} mm): a 2D network trained in the "
            "source's plane sees the target's coarse axis in plane. Consider choosing the slice plane, or 3d_fullres"
        )
    finest, reach = (
        np.divide(*(np.median([function(report) for report in reports]) for reports in (target, source)))
        for function in (lambda r: min(r.spacing), lambda r: max(np.multiply(r.size, r.spacing)))
    )
    if max(finest, 1 / finest) > 5 and max(reach, 1 / reach) > 5 and (finest > 1) == (reach > 1):
        warnings.append(
            f"the target's voxels are {finest:.3g} times the source's ({_short(spacings[1])} and {_short(spacings[0])} "
            f"mm), and its scans {reach:.3g} times as large: check that both are in mm, none in cm"
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
    for domain in ("source", "target"):
        parser.add_argument(
            f"-{domain}_intensities", nargs="+", metavar="WORD",
            help=f"what the {domain}'s images are clipped at: {FORMS} [CT: a window, else percentiles 0.5 99.5]",
        )  # fmt: skip
    parser.add_argument("-seed", type=int, default=12345, help="seed of the folds [12345]")
    parser.add_argument(
        "-np", type=int, default=DEFAULT_PROCESSES, metavar="N", help=f"processes [{DEFAULT_PROCESSES} here]"
    )
    parser.add_argument(
        "-nifti_geometry", choices=GEOMETRIES,
        help="read NIfTI files whose qform and sform disagree by this one [such files are refused]",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset of this id and name")
    parser.add_argument(
        "--strict", action="store_true", help="refuse what is otherwise a warning: a case that lacks a needed file"
    )


def intensity_request(
    args: argparse.Namespace, preset: str = "soft_tissue", otherwise: Intensities | str | None = DEFAULT
) -> IntensityRequest:
    """What ``-source_intensities`` and ``-target_intensities`` ask for.

    Args:
        preset: see ``IntensityRequest``.
        otherwise: of a domain whose option is not given; a paper's protocol has its own.
    """
    asked = [
        parse_intensities(getattr(args, f"{domain}_intensities"), f"-{domain}_intensities")
        for domain in ("source", "target")
    ]
    return IntensityRequest(*(otherwise if wanted == DEFAULT else wanted for wanted in asked), preset)


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
        args = parser.parse_args(argv)
        check_arguments(args)
        recover(args.d)
        convert(args)

    return main
