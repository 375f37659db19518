"""One case of a dataset: read, checked, written.

Images keep their voxels, pixel type and orientation header, and their intensities within the bounds of their domain;
labels are mapped to classes and share the image's geometry exactly. An image is written from the image file and those
bounds alone: no label of its own can change it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import SimpleITK as sitk

from nnunet_uda.data.convention import LABELS_TARGET
from nnunet_uda.errors import UDAError
from nnunet_uda.images.dicom import series_remarks
from nnunet_uda.images.geometry import Grid, check_same_geometry, on_grid, place
from nnunet_uda.images.intensities import Intensities, NoContrastError, not_hounsfield
from nnunet_uda.images.listing import nifti_files
from nnunet_uda.images.nifti import nifti_geometry
from nnunet_uda.images.reading import LabelMap, check_image, read_image, read_label, remarks, write_image

ENDING = ".nii.gz"
Key = TypeVar("Key", int, str)


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


def class_map(names: Mapping[int, str], structures: Sequence[str], **more: Any) -> LabelMap:
    """A vendor's values, by their names, to the classes 1, 2, ... of ``structures``; others become background."""
    classes = {name: index for index, name in enumerate(structures, 1)}
    return LabelMap({value: classes.get(name, 0) for value, name in names.items()}, names=names, **more)


def numbered(folder: Path, pattern: str, rule: str) -> dict[int, Path]:
    """NIfTI files of a folder, where there is one, by their number.

    Args:
        pattern: of a name without its ending; its group is the number.
        rule: see ``matched``.

    Raises:
        UDAError: as ``matched``, and for a number twice.
    """
    found: dict[int, Path] = {}
    for match, path in matched(folder, rf"{pattern}(?i:\.nii(\.gz)?)", rule) if folder.is_dir() else ():
        once(found, int(match[1]), path, "number")
    return found


def matched(folder: Path, pattern: str, rule: str) -> list[tuple[re.Match[str], Path]]:
    """The NIfTI files of a folder, and how their names match ``pattern``.

    Args:
        rule: what is expected, for messages.

    Raises:
        UDAError: for a NIfTI file of another name.
    """
    files = []
    for path in nifti_files(folder):
        match = re.fullmatch(pattern, path.name)
        if match is None:
            raise UDAError(f"{path}: unexpected file; expected only {rule}. Rename or remove it.")
        files.append((match, path))
    return files


def once(found: dict[Key, Path], key: Key, path: Path, what: str) -> None:
    """``found[key] = path``, or a ``UDAError`` where there is another one already; ``what`` is the key."""
    if other := found.get(key):
        shown = other.name if other.parent == path.parent else other
        raise UDAError(f"{path}: the same {what} as {shown}; expected each once. Remove one of them.")
    found[key] = path


def check_pairs(images: Mapping[Key, Path], labels: Mapping[Key, Path], rule: str) -> list[Key]:
    """The keys of ``images``, sorted; ``UDAError`` for a label without an image."""
    for key in sorted(set(labels) - set(images)):
        raise UDAError(
            f"{labels[key]}: its image is missing; expected {rule}. Add it, or remove the label; a label of another "
            "patient must not be used."
        )
    return sorted(images)


@dataclass(frozen=True)
class Group:
    """Cases of one domain for one folder: ``imagesTr`` + ``labelsTr``, ``imagesTu``, or ``imagesTs`` + ``labelsTs``.

    ``labels`` may be ``labelsTs`` for ``imagesTu`` too: a fold protocol, where each fold tests on its own part.
    ``labelled`` are the ids of the target training scans that are trained on with their labels (``labelsTu``).
    """

    domain: str
    cases: Sequence[Case]
    images: str
    labels: str | None = None
    labelled: frozenset[str] = frozenset()

    def labels_of(self, identifier: str) -> str | None:
        """The folder for the label of a case."""
        return LABELS_TARGET if identifier in self.labelled else self.labels


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
    """What was seen while one case was written.

    ``zero_share``: of the first channel's voxels. ``outside``: of every structure's voxels the share outside of the
    bounds (of the channel where it is smallest), NaN without such voxels; empty where nothing was clipped or labels may
    not be looked at.
    """

    identifier: str
    grid: Grid
    zero_share: float
    volumes_ml: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Repairs."""
    warnings: list[str] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, ...]:
        """In the order of ``BODY_AXES``, as ``spacing``."""
        return tuple(self.grid.size[i] for i in np.argsort(self.grid.body))

    @property
    def spacing(self) -> tuple[float, ...]:
        """In mm."""
        return tuple(self.grid.spacing[i] for i in np.argsort(self.grid.body))


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
        zero_share = float(np.mean([np.mean(plane == 0) for plane in sitk.GetArrayViewFromImage(image)]))
        report = CaseReport(case.identifier, Grid.of(image), zero_share)
        size, placing = image.GetSize(), (image.GetSpacing(), image.GetOrigin(), image.GetDirection())
        beyond = []
        for channel, path in enumerate(case.images):
            image = case.read_image(path) if channel else image
            check_image(image, path)
            check_same_geometry(report.grid, case.images[0], image, path)
            place(image, *placing)
            if clipping.checked and clipping.intensities is not None:
                beyond.append(_beyond(image, clipping.intensities))
            image = _clip(image, path, clipping, report.notes)
            write_image(image, images_folder / f"{case.identifier}_{channel:04d}{ENDING}")
            _remark(report, path)
            del image
        if labels_folder is not None and case.label is not None and case.label_map is not None:
            grid = sitk.Image(size, sitk.sitkUInt8)  # of the first channel, which need not be kept for it
            place(grid, *placing)
            label, repairs = case.read_label(case.label, grid, case.images[0])
            report.notes += repairs
            _remark(report, case.label)
            classes = case.label_map.apply(label, case.label)
            del label
            counts = _counts((plane.ravel() for plane in classes), structures)
            report.volumes_ml = [float(count * np.prod(grid.GetSpacing()) / 1000) for count in counts]
            if beyond:
                report.outside = np.min([_outside(mask, classes, structures) for mask in beyond], axis=0).tolist()
            write_image(on_grid(classes, grid), labels_folder / f"{case.identifier}{ENDING}")
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


def _counts(parts: Iterable[np.ndarray], structures: int) -> np.ndarray:
    """How many voxels of ``parts`` each structure has; part by part, for memory."""
    return np.sum([np.bincount(part, minlength=structures + 1)[1:] for part in parts], axis=0)


def _outside(beyond: np.ndarray, classes: np.ndarray, structures: int) -> list[float]:
    """The share of each structure's voxels that is ``beyond``, NaN without voxels; by planes, for memory."""
    found = _counts((plane[mask] for plane, mask in zip(classes, beyond, strict=True)), structures)
    whole = _counts((plane.ravel() for plane in classes), structures)
    return [float(b / n) if n else float("nan") for b, n in zip(found, whole, strict=True)]


def _remark(report: CaseReport, path: Path) -> None:
    repairs, warnings = ([], series_remarks(path)) if path.is_dir() else remarks(path)
    report.notes += repairs
    report.warnings += warnings
