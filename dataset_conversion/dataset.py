"""A whole nnU-Net raw dataset with an unlabelled target, from the cases that a converter lists.

A converter lists ``Case`` objects in ``Group`` objects and calls ``write_dataset``. ``dataset.json`` names nnU-Net's
reorienting reader, so that the network sees one orientation while predictions still lie on the vendor's grid.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_uda.data.convention import (
    LABEL_VALUES,
    LABELLED_TARGET,
    OTHER_LABEL_VALUES,
    Domains,
    environment_folder,
    normalisation_warning,
)
from nnunet_uda.data.slices import MIXED, REMEDY, REORIENTED, SliceOrder, odd_tests, slice_order
from nnunet_uda.dataset_conversion.case import ENDING, Case, CaseReport, Clipping, Group, convert_case
from nnunet_uda.dataset_conversion.quicklook import draw_quicklook
from nnunet_uda.dataset_conversion.splits import choose_labelled, splits_with_labelled
from nnunet_uda.dataset_conversion.summary import QUICKLOOK, intensities_in_words, summarise
from nnunet_uda.dataset_conversion.windows import NOTHING_ASKED, IntensityRequest, check_outside, choose_intensities
from nnunet_uda.errors import UDAError, some, system_fault
from nnunet_uda.files import locked, put_back, whole_folder, write_json
from nnunet_uda.images.geometry import check_against_source
from nnunet_uda.images.nifti import nifti_geometry
from nnunet_uda.names import MEAN, check_name
from nnunet_uda.workers import as_done


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
    intensities: IntensityRequest = NOTHING_ASKED,
    warnings: list[str] | None = None,
    overwrite: bool = False,
    strict: bool = False,
    processes: int = 1,
    geometry: str | None = None,
    few: Sequence[str] | None = None,
    seed: int = 12345,
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
        few: target training scans that are trained on with their labels, see ``choose_labelled``, with ``seed``. An
            upper bound, which is trained on all of them, does not look at it.

    Raises:
        UDAError: for every bad input; all cases are read before the error is raised, so it lists all bad files.
    """
    groups = [group for group in groups if group.cases]
    labelled: frozenset[str] = frozenset()
    if few and adaptation:
        groups = [choose_labelled(group, few, seed) if group.images == "imagesTu" else group for group in groups]
        labelled = frozenset().union(*(group.labelled for group in groups))
        if target_splits is not None:
            target_splits = splits_with_labelled(target_splits, labelled)
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
            **({LABELLED_TARGET: sorted(labelled)} if labelled else {}),
            **values,
            **dataset_json.get("uda", {}),
        }
        if warning := normalisation_warning(dataset_json, Domains(source.domain, target.domain)):
            warnings.append(warning)
    for group in groups:
        unlabelled = [case.identifier for case in group.cases if case.label is None]
        if unlabelled and (group.labels == "labelsTs" or group.images == "imagesTs"):
            skip_or_refuse(
                f"{len(unlabelled)} of {len(group.cases)} cases in {group.images} have no label ({some(unlabelled)})",
                strict and group.labels is not None, warnings, "they cannot be evaluated",
            )  # fmt: skip

    with _whole_folder(dataset_id, f"Dataset{dataset_id:03d}_{name}", overwrite, warnings) as (temporary, final):
        with nifti_geometry(geometry):
            clippings = choose_intensities(groups, intensities, adaptation)
        reports = _convert_all(groups, temporary, len(structures), processes, clippings, geometry)
        _check_spacings(groups, reports)
        _check_structures(by_folder["imagesTr"], reports["imagesTr"], structures)
        check_outside(by_folder["imagesTr"], reports["imagesTr"], structures, clippings["imagesTr"], warnings)
        _record(dataset_json, clippings, adaptation)
        order = _choose_order(dataset_json, reports, warnings)
        write_json(dataset_json, temporary / "dataset.json")
        if source_splits is not None:
            write_json(source_splits, temporary / "splits_final.json")
        if target_splits is not None:
            write_json(target_splits, temporary / "splits_target.json")
        rows = [_example(group, reports[group.images], temporary, clippings[group.images]) for group in groups]
        draw_quicklook(rows, structures, temporary / QUICKLOOK)
    summarise(final, groups, reports, structures, warnings, adaptation, clippings, order)
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
            f"the thick slices of {some(order.odd, 10)} lie along another axis than those of the other scans, in the "
            f"files' order and in the body's: training in 2D will be refused. {REMEDY}"
        )
    if order.mirrored:
        listed = [f"{name} ({how})" for name, how in order.mirrored.items()]
        warnings.append(
            f"axes of {some(listed, 10)} do not run as in most other scans: they are seen mirrored or turned beside "
            "them. Flip these files, or train with mirroring"
        )
    if order.order != MIXED and (odd := odd_tests(order, training, grids.get("imagesTs", {}))):
        warnings.append(
            f"the thick slices of the test scans {some(odd, 10)} lie along another axis than in training: a 2D network "
            "sees cuts across them"
        )
    return order


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


def check_options(dataset_id: int, name: str | None, channels: Sequence[str], processes: int) -> None:
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
    check_options(dataset_id, name, channels, processes)
    for what, names in (("a structure", structures), ("a domain", [group.domain for group in groups])):
        for one in names:
            check_name(one, what)
    taken = ("background", "ignore", MEAN)  # nnU-Net's own, and a row of every table
    wrong = [s for s, n in Counter(structures).items() if n > 1 or not s or s.lower() in taken]
    if wrong or not structures:
        raise UDAError(
            f"structures {', '.join(structures) or '(none)'}: expected at least one name, each once, and none of them "
            f"{', '.join(map(repr, taken))}."
        )
    present = {group.images for group in groups}
    for folder, what in (("imagesTr", "labelled"), ("imagesTu", "unlabelled target")):
        if folder not in present and (adaptation or folder == "imagesTr"):
            raise UDAError(f"no {what} case for {folder}; expected at least one. Check the input folders.")
    seen_ids: dict[str, Case] = {}
    seen_files: dict[str, Case] = {}
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
                if other := seen_files.get(os.path.realpath(path)):
                    raise UDAError(
                        f"{path}: the same file is used for {other.identifier} and for {case.identifier}; expected "
                        "every scan in one group only (a test scan must not be trained on). Remove one of them."
                    )
                seen_files[os.path.realpath(path)] = case
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
def _whole_folder(dataset_id: int, folder: str, overwrite: bool, warnings: list[str]) -> Iterator[tuple[Path, Path]]:
    """Yield (temporary folder, final folder); the first becomes the second when the block succeeds, else it goes."""
    raw = environment_folder("nnUNet_raw")
    final = raw / folder
    prefix = _prefix(dataset_id)
    lock = raw / f"{prefix}.lock"
    with ExitStack() as stack:
        try:
            raw.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(lock))
            stack.callback(lock.unlink, missing_ok=True)
            put_back(final, prefix)
        except BlockingIOError:
            raise UDAError(f"{lock}: another conversion to this dataset id is running. Wait for it.") from None
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
        for case in group.cases:
            name = group.labels_of(case.identifier)
            labels = folder / name if name and case.label else None
            if labels is not None:
                labels.mkdir(exist_ok=True)
            jobs.append((group.images, case, folder / group.images, labels))
    work = partial(_attempt, structures=structures, clippings=clippings, geometry=geometry)
    processes = min(processes, len(jobs))
    results = map(work, jobs) if processes <= 1 else as_done(work, jobs, processes)
    done: dict[str, dict[str, CaseReport]] = {group.images: {} for group in groups}
    errors: dict[str, str] = {}
    for group_name, identifier, made in tqdm(results, total=len(jobs), desc="Converting", unit="case"):
        if isinstance(made, str):
            errors[identifier] = made
        else:
            done[group_name][identifier] = made
    _refuse([errors[key] for key in sorted(errors)])
    return {group: [reports[key] for key in sorted(reports)] for group, reports in done.items()}


def _attempt(
    job: tuple[str, Case, Path, Path | None], structures: int, clippings: dict[str, Clipping], geometry: str | None
) -> tuple[str, str, CaseReport | str]:
    """A case's group and name with its report, or what is wrong with it."""
    group_name, case, images, labels = job
    try:
        made: CaseReport | str = convert_case(case, images, labels, structures, clippings[group_name], geometry)
    except UDAError as error:
        made = str(error)
    return group_name, case.identifier, made


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
    source = np.median([report.spacing for report in reports["imagesTr"]], axis=0).tolist()
    messages = []
    for group in groups:
        paths = {case.identifier: case.images[0] for case in group.cases}
        for report in reports[group.images]:
            new_size = np.maximum(1, np.multiply(report.size, report.spacing) / source).tolist()
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
    name = group.labels_of(report.identifier)
    label = folder / name / f"{report.identifier}{ENDING}" if name else None
    title = f"{group.images}: {group.domain}, {report.identifier}, {intensities_in_words(clipping)}"
    image = folder / group.images / f"{report.identifier}_0000{ENDING}"
    return title, image, label if label is not None and label.exists() else None


def _check_structures(group: Group, reports: Sequence[CaseReport], structures: Sequence[str]) -> None:
    for index, structure in enumerate(structures):
        if not any(report.volumes_ml[index] for report in reports):
            raise UDAError(
                f"{group.cases[0].label}: neither this label nor any other of the {len(reports)} labelled cases holds "
                f"the structure '{structure}'; expected it in at least one. Check the values given for it."
            )
