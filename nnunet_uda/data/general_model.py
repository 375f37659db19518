"""Predictions of a general model in the layouts that such tools write, as the classes of a dataset.

For a case ``CASE`` of ``imagesTu`` there may be ``CASE.nii.gz``, all structures in one file, or a folder ``CASE`` with
one file a structure (``liver.nii.gz``), as TotalSegmentator writes with and without ``--ml``. Where it was given
nnU-Net's own files, the names may end in ``_0000``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_uda.errors import UDAError
from nnunet_uda.images.listing import entries, files_in
from nnunet_uda.images.reading import LabelMap, read_label

ENDINGS = (".nii.gz", ".nii")


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
    found: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for text in words:
        name, separator, others = text.partition("=")
        parts = tuple(part.strip() for part in others.split(","))
        if not separator or not all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in parts):
            raise UDAError(f"-labels {text}: expected structure=value or =file, as liver=5, or kidney=left,right.")
        if name not in structures:
            raise UDAError(
                f"-labels {text}: the dataset has no structure {name!r}; expected {', '.join(structures)}, each with "
                "what the predictions call it."
            )
        if name in found:
            raise UDAError(f"-labels {text}: {name} is named twice; give all of it at once, as {name}=2,3.")
        for part in parts:
            if owner.setdefault(part, name) != name or part == "0":
                raise UDAError(
                    f"-labels {text}: {part} is already {owner[part] if part != '0' else 'the background'}; expected "
                    "every value or file in one structure."
                )
        found[name] = parts
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
    folder: Path, cases: Collection[str], optional: Collection[str] = (), file_ending: str = ENDINGS[0]
) -> dict[str, Path]:
    """The file or folder of each case; those in ``optional`` need none. ``file_ending`` is that of the dataset.

    Raises:
        UDAError: none for a case, two for one, or one for no case.
    """
    found: dict[str, Path] = {}
    for path in entries(folder):
        name = path.name
        if not path.is_dir():
            ending = next((ending for ending in (file_ending, *ENDINGS) if name.endswith(ending)), None)
            if ending is None:
                continue  # what tools write beside: statistics, plans
            name = name.removesuffix(ending)
        elif not _masks(path):
            continue
        case = name if name in cases else name.removesuffix("_0000")
        if case not in cases:
            raise UDAError(
                f"{path}: {name} is no case of imagesTu ({', '.join(sorted(cases)[:5])}"
                f"{' ...' if len(cases) > 5 else ''}); expected predictions of these. Rename it, or move it away."
            )
        if case in found:
            raise UDAError(f"{path}: there is also {found[case]} for {case}; expected one. Move one of them away.")
        found[case] = path
    if missing := sorted(set(cases) - set(found) - set(optional)):
        raise UDAError(
            f"{folder / missing[0]}{file_ending} does not exist; expected a prediction of every case in imagesTu, as a "
            f"file or a folder of one file a structure (missing: {', '.join(missing[:10])}"
            f"{' ...' if len(missing) > 10 else ''})."
        )
    return found


def _masks(folder: Path) -> dict[str, Path]:
    """The NIfTI files of a folder by name without ending."""
    return {
        path.name.removesuffix(ending): path
        for path in files_in(folder)
        for ending in ENDINGS
        if path.name.endswith(ending)
    }


def read_prediction(
    place: Path, scan: sitk.Image, image: Path, names: StructureMap | None, structures: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Classes ``(z, y, x)`` uint8 on the scan's grid, and notes on what was decided.

    Args:
        place: a file of all structures, or a folder of one file a structure.
        image: the scan's file, for messages.
        names: what the predictions call the structures; None where they are called as in the dataset: files by name.

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
    wanted = names.values if names is not None else {name: (index,) for index, name in enumerate(structures, 1)}
    values = {value: index for index, name in enumerate(structures, 1) for value in wanted[name]}
    label, _ = read_label(place, scan, image)
    return LabelMap(values, ignore_other=True).apply(label, place), []


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
            f"{folder}: one file a structure ({', '.join(sorted(masks)[:5])} ...); expected names of files in -labels, "
            f"as {structures[0]}={sorted(masks)[0]}."
        )
    files = names.files if names is not None else {name: (name,) for name in structures}
    classes = np.zeros(scan.GetSize()[::-1], np.uint8)
    twice = 0
    for index, name in enumerate(structures, 1):
        for part in files[name]:
            if part not in masks:
                raise UDAError(
                    f"{folder} has no file {part}.nii.gz for the structure {name}; it has "
                    f"{', '.join(sorted(masks)[:10])}{' ...' if len(masks) > 10 else ''}. Say with -labels which "
                    "files are it."
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
