"""DICOM series as volumes: slices in spatial order, spacing from their positions, and what is no series refused.

Written with pydicom: its headers tell what is wrong with which file, where ITK's series reader spreads the remaining
slices over the gap of a missing one. Every element is read through ``Header``: one that is empty counts as missing,
and one that is no number where a number belongs is refused by its name.
"""

from __future__ import annotations

import math
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element

from nnunet_uda.errors import UDAError, printable, shown
from nnunet_uda.images.geometry import FARTHEST, check_possible, place
from nnunet_uda.images.listing import entries, files_in, folders_below
from nnunet_uda.images.reading import check_file, readable

NOT_SLICES = ("RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SEG", "SR", "PR", "KO", "REG", "DOC", "FID", "RWV", "ANN")
"""Modalities of objects that may lie beside a series' slices; taken from a folder, they are passed over."""
ENDINGS = (".dcm", ".dicom", ".dic", ".ima")
"""Of files that are DICOM by their name; others are if they say so at byte 128."""
WHOLE_FILE = "a whole DICOM file"
MODALITY_OF_CLASS = {
    "1.2.840.10008.5.1.4.1.1.481.3": "RTSTRUCT", "1.2.840.10008.5.1.4.1.1.481.5": "RTPLAN",
    "1.2.840.10008.5.1.4.1.1.481.2": "RTDOSE", "1.2.840.10008.5.1.4.1.1.66.4": "SEG",
    "1.2.840.10008.5.1.4.1.1.2": "CT", "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR", "1.2.840.10008.5.1.4.1.1.4.1": "MR",
}  # fmt: skip
"""By SOPClassUID, where an anonymiser has emptied Modality."""
MOST_PIXELS = 2**26
"""Of a slice, 8192 x 8192: decoders take the memory that a header asks for before they look at its pixels."""
MOST_INFLATED = 2**28
"""Bytes of a deflated file: a slice of ``MOST_PIXELS`` with 32 bits."""
LARGEST_VALUE = 1e10
"""A rescaled intensity beyond this comes from a damaged slope or intercept."""


@dataclass(frozen=True)
class Header:
    """The elements of one file, or of an item of one of its sequences, by keyword. An empty element is a missing one.

    Every method raises ``UDAError`` naming the file and the element where the element is not what it should be.
    """

    path: Path
    dataset: pydicom.Dataset

    def value(self, keyword: str) -> Any:
        """As pydicom gives it, None where it is missing or empty."""
        with _reading(self.path, f"{WHOLE_FILE} with a valid {keyword}"):
            element = self.dataset.get(tag_for_keyword(keyword))
            value = None if element is None else _known(element).value
            if isinstance(value, str):
                value = value.strip(" \0")
            return None if value is None or (hasattr(value, "__len__") and not len(value)) else value

    def text(self, keyword: str) -> str:
        """One text that can be printed, empty where it is missing."""
        value = self.value(keyword)
        return "" if value is None else printable(str(value))

    def numbers(self, keyword: str) -> tuple[float, ...] | None:
        """All finite numbers of an element, None where it is missing."""
        value = self.value(keyword)
        if value is None:
            return None
        parts = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        try:
            numbers = tuple(float(part) for part in parts)
        except (TypeError, ValueError, OverflowError):
            numbers = (math.nan,)
        if not all(map(math.isfinite, numbers)):
            raise UDAError(f"{self.path}: {keyword} is {shown(value)}; expected numbers. Get the file again.")
        return numbers

    def number(self, keyword: str, default: float) -> float:
        """One finite number, ``default`` where it is missing."""
        numbers = self.numbers(keyword)
        if numbers is not None and len(numbers) != 1:
            raise UDAError(f"{self.path}: {keyword} is {shown(numbers)}; expected one number. Get the file again.")
        return float(default) if numbers is None else numbers[0]

    def whole(self, keyword: str, default: int) -> int:
        """One whole number, ``default`` where it is missing."""
        number = self.number(keyword, default)
        if not number.is_integer():
            raise UDAError(f"{self.path}: {keyword} is {number}; expected a whole number. Get the file again.")
        return int(number)

    def items(self, keyword: str) -> list[Header]:
        """Items of a sequence, none where it is missing."""
        value = self.value(keyword)
        if value is not None and not isinstance(value, pydicom.Sequence):
            raise UDAError(f"{self.path}: {keyword} is {shown(value)}; expected a sequence. Get the file again.")
        return [Header(self.path, item) for item in value or ()]

    @property
    def modality(self) -> str:
        """``Modality``, or what the SOP class says; empty where neither does."""
        return self.text("Modality") or MODALITY_OF_CLASS.get(self.text("SOPClassUID"), "")


def read_header(path: Path, *keywords: str) -> Header:
    """Header of one file, or the elements of these names alone. Raises ``UDAError`` when it is no DICOM file."""
    return Header(path, _dataset(path, stop_before_pixels=True, specific_tags=list(keywords) or None))


def _dataset(path: Path, **options: Any) -> pydicom.Dataset:
    """``pydicom.dcmread``, which inflates a deflated file whole, however large it becomes: that is bounded here."""
    with _reading(path):
        with open(path, "rb") as file:
            start = file.read(2048)
            if b"1.2.840.10008.1.2.1.99" in start:
                file.seek(pydicom.filereader.read_file_meta_info(path).FileMetaInformationGroupLength + 144)
                inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), MOST_INFLATED)
                if len(inflated) == MOST_INFLATED:
                    raise ValueError(f"inflated it has more than {MOST_INFLATED} bytes")
        return pydicom.dcmread(path, **options)


@contextmanager
def _reading(path: Path, expected: str = WHOLE_FILE) -> Iterator[None]:
    """``readable``, without pydicom's own warnings: what it repairs is read, and what it cannot read is refused."""
    with readable(path, expected), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _known(element: DataElement) -> DataElement:
    """``element``, decoded where its VR is UN though the standard knows the element.

    With explicit VRs a value of 64 kB or more cannot be written as what it is: the standard has it written as UN,
    encoded as in implicit VR little endian (PS3.5, 6.2.2).
    """
    if element.VR != "UN" or not isinstance(element.value, bytes) or element.tag.is_private:
        return element
    raw = RawDataElement(
        element.tag, dictionary_VR(element.tag), len(element.value), element.value, 0,
        is_implicit_VR=True, is_little_endian=True,
    )  # fmt: skip
    return convert_raw_data_element(raw)


@dataclass(frozen=True)
class Slice:
    """Header of one file: vectors in mm in DICOM's (LPS) coordinates, ``size`` and ``spacing`` as (columns, rows)."""

    path: Path
    series: str
    description: str
    position: np.ndarray
    right: np.ndarray
    down: np.ndarray
    size: tuple[int, int]
    spacing: tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Slices in order along ``direction``'s third column, which is the normal (right x down), and their grid."""

    slices: tuple[Slice, ...]
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]

    @property
    def files(self) -> list[Path]:
        return [slice_.path for slice_ in self.slices]

    def image(self, array: np.ndarray) -> sitk.Image:
        """``array`` (slices, rows, columns) on this grid."""
        image = sitk.GetImageFromArray(array)
        place(image, self.spacing, self.origin, self.direction)
        return image


# --- listing ----------------------------------------------------------------------------------------------------------


def by_name(paths: Sequence[Path]) -> list[Path]:
    """Sorted by name with numbers as numbers: ``IMG2`` before ``IMG10``."""
    return sorted(paths, key=lambda p: [(int(w), "") if w.isdecimal() else (-1, w) for w in re.split(r"(\d+)", p.name)])


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its ending, or by what it says at byte 128."""
    return path.suffix.lower() in ENDINGS or _start(path)[128:] == b"DICM"


def _start(path: Path) -> bytes:
    with readable(path, WHOLE_FILE), open(path, "rb") as file:
        return file.read(132)


def dicom_in(folder: Path) -> list[Path]:
    """DICOM files of a folder by name, whatever they hold.

    Where files without an ending are among them, another one without is taken too unless it is text: a slice that was
    cut short must be refused, not missed. So must a folder or a pipe that is called as a slice and lies beside others.
    """
    files = [p for p in files_in(folder) if p.name.upper() != "DICOMDIR" and (p.is_file() or not p.exists())]
    found = [path for path in files if is_dicom(path)]
    for path in entries(folder) if found else ():
        if path.suffix.lower() in ENDINGS and path not in found:
            check_file(path)
    nameless = [path for path in files if re.fullmatch(r"|\.[\d,]+", path.suffix)]
    if set(found) & set(nameless):
        found += [path for path in nameless if path not in found and (b"\0" in _start(path) or not _start(path))]
    return by_name(found)


def dicom_files(folder: Path) -> list[Path]:
    """Slices in a folder, by name; RTSTRUCT and other non-images are passed over."""
    if not folder.is_dir():
        raise UDAError(f"{folder}: there is no such folder; expected DICOM slices in it.")
    files = [path for path in dicom_in(folder) if _is_slice(path)]
    if not files:
        others = ", ".join(path.name for path in files_in(folder)[:5]) or "nothing"
        raise UDAError(
            f"{folder}: there is no DICOM slice in it (found: {others}); expected files ending in .dcm, or DICOM files "
            "without an ending."
        )
    return files


def series_folders(tree: Path) -> list[Path]:
    """``tree`` and the folders below it that hold slices themselves."""
    return [folder for folder in folders_below(tree) if any(_is_slice(path) for path in dicom_in(folder))]


def _is_slice(path: Path) -> bool:
    return read_header(path, "Modality", "SOPClassUID").modality not in NOT_SLICES


# --- a series ---------------------------------------------------------------------------------------------------------


def order_series(source: Path | Sequence[Path]) -> Series:
    """The slices of one series (a folder, or its files) and their grid, from the headers alone.

    Raises:
        UDAError: naming the file: unreadable, no single-frame greyscale slice, of another series, size, orientation or
            pixel spacing than the others, at another slice's position, shifted in plane, unevenly spaced, or of a
            spacing that no scan has.
    """
    files = dicom_files(source) if isinstance(source, Path) else list(source)
    slices = [_slice(path) for path in files]
    if len(slices) < 2:
        raise UDAError(f"{files[0] if files else 'no file'}: a series of {len(files)} slice(s); expected at least two.")
    _check_one_series(slices)
    first = slices[0]
    right = first.right / np.linalg.norm(first.right)
    down = first.down - right * (right @ first.down)
    down /= np.linalg.norm(down)
    normal = np.cross(right, down)
    slices.sort(key=lambda s: float(normal @ s.position))
    widest = float(np.diff([normal @ slice_.position for slice_ in slices]).max())
    check_possible(slices[0].path, (*first.size, len(slices)), (*first.spacing, widest or 1.0))  # 0: said below
    step = _check_positions(slices, normal, min(first.spacing))
    x, y, z = map(float, slices[0].position)
    size, spacing = (*first.size, len(slices)), (*first.spacing, step)
    return Series(
        tuple(slices),
        size,
        spacing,
        (x, y, z),
        tuple(float(v) for v in np.stack([right, down, normal], axis=1).ravel()),
    )


def read_series(source: Path | Sequence[Path]) -> sitk.Image:
    """The volume of one series (a folder, or its files).

    Rescale slope and intercept of each slice are applied. Pixel type: the smallest signed one that holds all values
    where slopes and intercepts are whole numbers, else float32.

    Raises:
        UDAError: as ``order_series``; also when pixels are missing, corrupt, or compressed and cannot be decoded.
    """
    series = order_series(source)
    planes = [_pixels(slice_) for slice_ in series.slices]
    kinds = {plane.dtype for plane in planes}
    dtype = np.float32 if np.dtype(np.float32) in kinds else np.result_type(*kinds)
    return series.image(np.stack(planes, dtype=dtype))


def series_remarks(folder: Path) -> list[str]:
    """Warnings about the intensities of a series that was read; none where the folder holds something else."""
    first = next((path for path in dicom_in(folder) if _is_slice(path)), None)
    if first is None:
        return []
    header = read_header(first, "PhotometricInterpretation", "PixelPaddingValue")
    warnings: list[str] = []
    if header.text("PhotometricInterpretation") == "MONOCHROME1":
        warnings.append(f"{folder.name}: its slices are to be shown inverted (MONOCHROME1), and are taken as stored")
    if padding := header.text("PixelPaddingValue"):
        warnings.append(f"{folder.name}: voxels of {padding} lie outside of the scan, and are taken as stored")
    return [f"{warning}: compare the picture with the scan" for warning in warnings]


# --- one file ---------------------------------------------------------------------------------------------------------


def _slice(path: Path) -> Slice:
    header = read_header(path)
    frames = header.whole("NumberOfFrames", 1)
    if frames > 1 or header.items("PerFrameFunctionalGroupsSequence"):
        raise UDAError(
            f"{path}: a multi-frame DICOM of {frames} frames; expected one slice per file. Split it "
            "into single frames (emf2sf of dcm4che), or convert it to NIfTI (dcm2niix)."
        )
    lengths = {"Rows": 1, "Columns": 1, "PixelSpacing": 2, "ImagePositionPatient": 3, "ImageOrientationPatient": 6}
    missing = [keyword for keyword in lengths if header.value(keyword) is None]
    if missing:
        raise UDAError(
            f"{path}: without {', '.join(missing)}; expected a slice of a CT or MR series. Remove the file; where all "
            "slices are so, convert the series with a program that knows its scanner (dcm2niix)."
        )
    samples = header.whole("SamplesPerPixel", 1)
    colours = header.text("PhotometricInterpretation")
    if samples != 1 or not re.fullmatch(r"(MONOCHROME[12])?", colours):
        raise UDAError(
            f"{path}: {samples} samples per pixel, {colours or 'no known kind'}; expected greyscale. Remove the file."
        )
    values = {keyword: header.numbers(keyword) or () for keyword in lengths}
    for keyword, numbers in values.items():
        if len(numbers) != lengths[keyword]:
            raise UDAError(
                f"{path}: {keyword} is {shown(numbers)}; expected {lengths[keyword]} number(s). Get the file again."
            )
    position, axes = np.array(values["ImagePositionPatient"]), np.array(values["ImageOrientationPatient"]).reshape(2, 3)
    row_step, column_step = values["PixelSpacing"]
    size = header.whole("Columns", 0), header.whole("Rows", 0)
    if not np.allclose(np.linalg.norm(axes, axis=1), 1, atol=1e-2) or abs(axes[0] @ axes[1]) > 1e-2:
        raise UDAError(
            f"{path}: ImageOrientationPatient {shown(values['ImageOrientationPatient'])}; expected two unit vectors at "
            "right angles. Get it again."
        )
    if not (min(size) > 0 and row_step > 0 and column_step > 0):
        raise UDAError(f"{path}: size {size}, PixelSpacing {values['PixelSpacing']}; expected positive numbers.")
    if size[0] * size[1] > MOST_PIXELS or max(row_step, column_step, *np.abs(position)) > FARTHEST:
        raise UDAError(
            f"{path}: size {size}, PixelSpacing {values['PixelSpacing']}, ImagePositionPatient "
            f"{shown(position.tolist())}; expected a slice of a scan of a body. The file is corrupt: get it again."
        )
    names = header.text("SeriesInstanceUID"), header.text("SeriesDescription")
    return Slice(path, *names, position, axes[0], axes[1], size, (column_step, row_step))


def _pixels(slice_: Slice) -> np.ndarray:
    """(rows, columns), rescaled: the smallest signed type for a whole slope and intercept, else float32."""
    path = slice_.path
    dataset = _dataset(path)
    with _reading(path):
        syntax = dataset.file_meta.TransferSyntaxUID
        compressed = syntax.is_encapsulated
    header = Header(path, dataset)
    slope, intercept = header.number("RescaleSlope", 1), header.number("RescaleIntercept", 0)
    if header.items("ModalityLUTSequence"):
        raise UDAError(f"{path}: its intensities need a ModalityLUTSequence; expected RescaleSlope and -Intercept.")
    try:
        with _reading(path):
            stored = dataset.pixel_array
    except UDAError as error:
        if not compressed:
            raise
        raise UDAError(
            f"{path}: its pixels are compressed ({syntax.name}, transfer syntax {syntax}) and cannot be decoded here; "
            "expected uncompressed pixels. Decompress the series with `gdcmconv --raw IN OUT` (or dcmdjpeg, dcmdjpls "
            "of DCMTK), or `pip install pylibjpeg[all]`."
        ) from error
    if stored.shape != slice_.size[::-1]:
        raise UDAError(f"{path}: {stored.shape} pixels; expected {slice_.size[::-1]} (rows, columns). Get it again.")
    ends = [float(v) * slope + intercept for v in (stored.min(), stored.max())]
    if slope == 0 or not all(abs(value) <= LARGEST_VALUE for value in ends):
        raise UDAError(
            f"{path}: RescaleSlope {slope:g} and RescaleIntercept {intercept:g} give intensities from {ends[0]:g} to "
            f"{ends[1]:g}; expected those of a scan. The file is corrupt: get it again."
        )
    if stored.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        rescaled = stored.astype(np.int64) * int(slope) + int(intercept)
        low, high = rescaled.min(), rescaled.max()
        fits = (t for t in (np.int16, np.int32, np.int64) if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
        return rescaled.astype(next(fits))
    return (stored * slope + intercept).astype(np.float32)


# --- all files of a series --------------------------------------------------------------------------------------------


def _check_one_series(slices: Sequence[Slice]) -> None:
    counts = Counter(slice_.series for slice_ in slices)
    # dicomanon of MATLAB and some scanners give every slice a series of its own, other anonymisers none: then the grid
    # alone decides
    if 1 < len(counts) < len(slices):
        rare = min(counts, key=lambda series: counts[series])
        odd = next(slice_ for slice_ in slices if slice_.series == rare)
        sizes = ", ".join(map(str, sorted(counts.values(), reverse=True)))
        names = sorted({slice_.description or "(none)" for slice_ in slices})
        raise UDAError(
            f"{odd.path}: {len(counts)} series in one folder, of {sizes} slices; expected one. This file's "
            f"SeriesInstanceUID is {rare or 'empty'}. Descriptions: {shown(names)}. Move the slices of each series to "
            "a folder of its own (dcm2niix and dicomsort do so by themselves)."
        )

    def grid(slice_: Slice) -> str:
        axes = " ".join(f"{v + 0:.3f}" for v in np.round([*slice_.right, *slice_.down], 3))
        columns, rows = slice_.size
        return f"{columns} x {rows} of {slice_.spacing[0]:.4g} x {slice_.spacing[1]:.4g} mm along {axes}"

    common = next(s for s in slices if grid(s) == Counter(map(grid, slices)).most_common(1)[0][0])
    for slice_ in slices:
        axes: list[tuple[Any, Any]] = [
            (slice_.right, common.right), (slice_.down, common.down), (slice_.spacing, common.spacing)
        ]  # fmt: skip
        if slice_.size != common.size or not all(np.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in axes):
            raise UDAError(
                f"{slice_.path}: the slice is {grid(slice_)}; the others are {grid(common)}, as {common.path.name}. "
                "Expected one size, pixel spacing and orientation in a series: remove what does not belong to it."
            )


def _check_positions(slices: Sequence[Slice], normal: np.ndarray, pixel: float) -> float:
    """Distance of neighbouring slices in mm; raises unless it is the same everywhere and along the normal."""
    positions = np.array([slice_.position for slice_ in slices])
    along = positions @ normal
    gaps = np.diff(along)
    step = float(np.median(gaps))
    if repeated := [i for i, gap in enumerate(gaps) if gap < 0.01 * max(step, pixel)]:
        i = repeated[0]
        remedy = "Remove the extra slice."
        if len(repeated) > 1:
            remedy = (
                f"So it is with {len(repeated)} of {len(slices)} slices: where the series holds several volumes "
                "(times, echoes, phases), move the slices of each to a folder of its own (dcm2niix splits them); else "
                "remove the copies."
            )
        raise UDAError(
            f"{slices[i + 1].path}: at the same position as {slices[i].path.name}, {along[i]:.2f} mm along the "
            f"slice normal; expected every slice once. {remedy}"
        )
    for i, gap in enumerate(gaps):
        if abs(gap - step) > max(0.05 * step, 0.11):  # some vendors round positions to 0.1 mm
            what = f"about {round(gap / step) - 1} missing" if gap > 1.5 * step else "extra or misplaced slices"
            raise UDAError(
                f"{slices[i].path}: {gap:.3f} mm to the next slice {slices[i + 1].path.name}, {step:.3f} mm between "
                f"the others; expected even distances ({what}). Get the whole series again."
            )
    drift = positions - along[:, None] * normal
    if (far := np.linalg.norm(drift - drift[0], axis=1)).max() > 0.5 * pixel:
        worst = int(far.argmax())
        raise UDAError(
            f"{slices[worst].path}: shifted by {far[worst]:.2f} mm within the slice plane against "
            f"{slices[0].path.name}; expected slices one above the other (a tilted gantry gives sheared volumes). "
            "Resample the series to a rectangular grid, e.g. with dcm2niix."
        )
    return float((along[-1] - along[0]) / (len(slices) - 1))
