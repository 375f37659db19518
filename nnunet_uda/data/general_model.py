"""Predictions of a general model in the layouts that such tools write, as the classes of a dataset.

For a case ``CASE`` of ``imagesTu`` there may be ``CASE.nii.gz``, all structures in one file, or a folder ``CASE`` with
one file a structure (``liver.nii.gz``), as TotalSegmentator writes with and without ``--ml``. Where it was given
nnU-Net's own files, the names may end in ``_0000``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_uda.errors import UDAError, some
from nnunet_uda.images.listing import NIFTI, entries, files_in
from nnunet_uda.images.reading import LabelMap, parse_parts, read_label


@dataclass(frozen=True)
class StructureMap:
    """What the general model calls the structures of a dataset.

    Args:
        values: structure -> values in a file of all structures.
        files: structure -> names of files, without ending, in a folder of one file a structure. One of both is empty.
    """

    values: Mapping[str, tuple[int, ...]]
    files: Mapping[str, tuple[str, ...]]


def parse_map(words: Sequence[str], structures: Sequence[str]) -> StructureMap:
    """``liver=5 kidneys=2,3`` or ``liver=liver kidneys=kidney_left,kidney_right``.

    Raises:
        UDAError: a word of another form, a structure that the dataset lacks or that is left out, a value or file for
            two structures, numbers and names at once.
    """
    expected = "structure=value or =file, as liver=5, or kidney=left,right"
    found = parse_parts(words, r"[A-Za-z0-9][\w.-]*", expected, str)
    if other := next((name for name in found if name not in structures), None):
        raise UDAError(
            f"-labels: the dataset has no structure {other!r}; expected {', '.join(structures)}, each with what the "
            "predictions call it."
        )
    if missing := [name for name in structures if name not in found]:
        raise UDAError(
            f"-labels names nothing for {', '.join(missing)}; expected every structure of the dataset: where "
            "predictions lack one, training would take it for background."
        )
    numbers = {part.isdecimal() for parts in found.values() for part in parts}
    if len(numbers) > 1:
        raise UDAError("-labels: expected values for all structures, or names of files for all.")
    if numbers == {True}:
        return StructureMap({name: tuple(map(int, parts)) for name, parts in found.items()}, {})
    return StructureMap({}, found)


def find_predictions(
    folder: Path, cases: Collection[str], optional: Collection[str] = (), file_ending: str = NIFTI[0]
) -> dict[str, Path]:
    """The file or folder of each case; those in ``optional`` need none. ``file_ending`` is that of the dataset.

    Raises:
        UDAError: none for a case, two for one, or one for no case.
    """
    found: dict[str, Path] = {}
    for path in entries(folder):
        name = path.name
        if not path.is_dir():
            ending = next((ending for ending in (file_ending, *NIFTI) if name.endswith(ending)), None)
            if ending is None:
                continue  # what tools write beside: statistics, plans
            name = name.removesuffix(ending)
        elif not _masks(path):
            continue
        case = name if name in cases else name.removesuffix("_0000")
        if case not in cases:
            raise UDAError(
                f"{path}: {name} is no case of imagesTu ({some(sorted(cases))}); expected predictions of these. Rename "
                "it, or move it away."
            )
        if case in found:
            raise UDAError(f"{path}: there is also {found[case]} for {case}; expected one. Move one of them away.")
        found[case] = path
    if missing := sorted(set(cases) - set(found) - set(optional)):
        raise UDAError(
            f"{folder / missing[0]}{file_ending} does not exist; expected a prediction of every case in imagesTu, as a "
            f"file or a folder of one file a structure (missing: {some(missing, 10)})."
        )
    return found


def _masks(folder: Path) -> dict[str, Path]:
    """The NIfTI files of a folder by name without ending."""
    return {
        path.name.removesuffix(ending): path
        for path in files_in(folder)
        for ending in NIFTI
        if path.name.endswith(ending)
    }


def read_prediction(
    place: Path, scan: sitk.Image, image: Path, names: StructureMap | None, structures: Sequence[str], own: LabelMap
) -> tuple[np.ndarray, list[str]]:
    """Classes ``(z, y, x)`` uint8 on the scan's grid, and notes on what was decided.

    Args:
        place: a file of all structures, or a folder of one file a structure.
        image: the scan's file, for messages.
        names: what the predictions call the structures; None where they are called as in the dataset: files by name.
        own: what a file may hold then.

    Raises:
        UDAError: for a file that cannot be read, lies on another grid or is no mask, and a structure without a file.
    """
    if place.is_dir():
        masks = _masks(place)
        if len(masks) == 1 and names is not None and names.values:
            place = next(iter(masks.values()))
        else:
            return _join(place, masks, scan, image, names, structures)
    if names is not None and names.files:
        raise UDAError(f"{place}: one file of all structures; expected values in -labels, as {structures[0]}=5.")
    label_map = own
    if names is not None:
        values = {value: index for index, name in enumerate(structures, 1) for value in names.values[name]}
        label_map = LabelMap(values, ignore_other=True)
    label, _ = read_label(place, scan, image)
    return label_map.apply(label, place), []


def _join(
    folder: Path,
    masks: Mapping[str, Path],
    scan: sitk.Image,
    image: Path,
    names: StructureMap | None,
    structures: Sequence[str],
) -> tuple[np.ndarray, list[str]]:
    if names is not None and names.values:
        raise UDAError(
            f"{folder}: one file a structure ({some(sorted(masks))}); expected names of files in -labels, "
            f"as {structures[0]}={sorted(masks)[0]}."
        )
    files = names.files if names is not None else {name: (name,) for name in structures}
    classes = np.zeros(scan.GetSize()[::-1], np.uint8)
    twice = 0
    for index, name in enumerate(structures, 1):
        for part in files[name]:
            if part not in masks:
                raise UDAError(
                    f"{folder} has no file {part}.nii.gz for the structure {name}; it has {some(sorted(masks), 10)}. "
                    "Say with -labels which files are it."
                )
            label, _ = read_label(masks[part], scan, image)
            array = sitk.GetArrayViewFromImage(label)
            values = np.unique(array)
            if len(values) > 2 or (len(values) == 2 and values[0] != 0) or (values < 0).any():
                raise UDAError(
                    f"{masks[part]} holds the values {', '.join(f'{value:g}' for value in values[:5])}; expected a "
                    "mask: 0, and one value for the structure."
                )
            inside = array > 0
            twice += int((inside & (classes > 0) & (classes != index)).sum())
            classes[inside & (classes == 0)] = index
    return classes, [f"{twice} voxel(s) lie in two structures: given to the first"] if twice else []
