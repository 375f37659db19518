"""DICOM series as volumes: slices in spatial order, spacing from their positions, and what is no series refused.

Written with pydicom: its headers tell what is wrong with which file, where ITK's series reader spreads the remaining
slices over the gap of a missing one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk

from nnunet_uda.errors import UDAError

NOT_SLICES = ("RTSTRUCT", "RTPLAN", "RTDOSE", "SEG", "SR", "PR", "KO", "REG")
"""Modalities of objects that may lie beside a series' slices; taken from a folder, they are passed over."""


@dataclass(frozen=True)
class Slice:
    """Header of one file: vectors in mm in DICOM's (LPS) coordinates, ``size`` and ``spacing`` as (columns, rows)."""

    path: Path
    series: str
    instance: str
    modality: str
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
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image


def by_name(paths: Sequence[Path]) -> list[Path]:
    """Sorted by name with numbers as numbers: ``IMG2`` before ``IMG10``."""
    return sorted(paths, key=lambda p: [(int(w), "") if w.isdecimal() else (-1, w) for w in re.split(r"(\d+)", p.name)])


def dicom_files(folder: Path) -> list[Path]:
    """Files ending in .dcm or .ima, or without an ending, by name; RTSTRUCT and other non-images are passed over."""
    if not folder.is_dir():
        raise UDAError(f"{folder}: there is no such folder; expected DICOM slices in it.")
    named = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.name != "DICOMDIR"]
    named = [p for p in named if p.suffix.lower() in (".dcm", ".ima") or re.fullmatch(r"|\.[\d,]+", p.suffix)]
    files = [p for p in by_name(named) if str(_header(p).get("Modality", "")) not in NOT_SLICES]
    if not files:
        raise UDAError(f"{folder}: there is no DICOM slice in it; expected files ending in .dcm.")
    return files


def order_series(source: Path | Sequence[Path]) -> Series:
    """The slices of one series (a folder, or its files) and their grid, from the headers alone.

    Raises:
        UDAError: naming the file: unreadable, no single-frame greyscale slice, of another series, size, orientation or
            pixel spacing than the others, at another slice's position, shifted in plane, or unevenly spaced.
    """
    files = dicom_files(source) if isinstance(source, Path) else list(source)
    if len(files) < 2:
        raise UDAError(f"{files[0] if files else 'no file'}: a series of {len(files)} slice(s); expected at least two.")
    slices = [_slice(path) for path in files]
    _check_one_series(slices)
    first = slices[0]
    right = first.right / np.linalg.norm(first.right)
    down = first.down - right * (right @ first.down)
    down /= np.linalg.norm(down)
    normal = np.cross(right, down)
    slices.sort(key=lambda s: float(normal @ s.position))
    step = _check_positions(slices, normal, min(first.spacing))
    return Series(
        tuple(slices),
        (*first.size, len(slices)),
        (*first.spacing, step),
        tuple(float(v) for v in slices[0].position),
        tuple(float(v) for v in np.stack([right, down, normal], axis=1).ravel()),
    )


def read_series(source: Path | Sequence[Path]) -> tuple[sitk.Image, Series]:
    """The volume of one series (a folder, or its files), and its slices in the volume's order.

    Rescale slope and intercept of each slice are applied. Pixel type: the smallest signed one that holds all values
    where slopes and intercepts are whole numbers, else float32.

    Raises:
        UDAError: as ``order_series``; also when pixels are missing, corrupt, or compressed and cannot be decoded.
    """
    series = order_series(source)
    planes = [_pixels(slice_) for slice_ in series.slices]
    kinds = {plane.dtype for plane in planes}
    dtype = np.float32 if np.dtype(np.float32) in kinds else np.result_type(*kinds)
    return series.image(np.stack(planes, dtype=dtype)), series


# --- one file ---------------------------------------------------------------------------------------------------------


def _header(path: Path) -> pydicom.Dataset:
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
    except Exception as error:  # pydicom's parser has no error class of its own
        raise _corrupt(path, error) from None


def _corrupt(path: Path, error: Exception) -> UDAError:
    return UDAError(f"{path}: cannot be read ({error}); expected a whole DICOM file. It is corrupt: get it again.")


def _slice(path: Path) -> Slice:
    header = _header(path)
    needed = ("SeriesInstanceUID", "Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient")
    missing = [tag for tag in needed if header.get(tag) in (None, "")]
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise UDAError(
            f"{path}: a multi-frame DICOM of {header.NumberOfFrames} frames; expected one slice per file. Split it "
            "into single frames (emf2sf of dcm4che), or convert it to NIfTI (dcm2niix)."
        )
    if missing:
        raise UDAError(f"{path}: without {', '.join(missing)}; expected a slice of a CT or MR series. Remove the file.")
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise UDAError(f"{path}: {header.SamplesPerPixel} samples per pixel; expected greyscale. Remove the file.")
    try:
        position = np.array(header.ImagePositionPatient, float)
        axes = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
        row_step, column_step = (float(v) for v in header.PixelSpacing)
        size = int(header.Columns), int(header.Rows)
    except (TypeError, ValueError) as error:
        raise _corrupt(path, error) from None
    lengths = np.linalg.norm(axes, axis=1)
    if not (position.shape == (3,) and np.allclose(lengths, 1, atol=1e-2) and abs(axes[0] @ axes[1]) < 1e-2):
        raise UDAError(
            f"{path}: ImagePositionPatient {header.ImagePositionPatient} and ImageOrientationPatient "
            f"{header.ImageOrientationPatient}; expected a point and two unit vectors at right angles. Get it again."
        )
    if not (min(size) > 0 and row_step > 0 and column_step > 0):
        raise UDAError(f"{path}: size {size}, PixelSpacing {header.PixelSpacing}; expected positive numbers.")
    names = (str(header.get(tag, "")) for tag in ("SeriesInstanceUID", "SOPInstanceUID", "Modality"))
    return Slice(path, *names, position, axes[0], axes[1], size, (column_step, row_step))


def _pixels(slice_: Slice) -> np.ndarray:
    """(rows, columns), rescaled: the smallest signed type for a whole slope and intercept, else float32."""
    path = slice_.path
    try:
        dataset = pydicom.dcmread(path)
        syntax = dataset.file_meta.TransferSyntaxUID
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    except Exception as error:
        raise _corrupt(path, error) from None
    if "ModalityLUTSequence" in dataset:
        raise UDAError(f"{path}: its intensities need a ModalityLUTSequence; expected RescaleSlope and -Intercept.")
    try:
        stored = dataset.pixel_array
    except Exception as error:
        if not syntax.is_encapsulated:
            raise _corrupt(path, error) from None
        raise UDAError(
            f"{path}: its pixels are compressed ({syntax.name}, transfer syntax {syntax}) and cannot be decoded here; "
            "expected uncompressed pixels. Decompress the series with `gdcmconv --raw IN OUT` (or dcmdjpeg, dcmdjpls "
            "of DCMTK), or `pip install pylibjpeg[all]`."
        ) from error
    if stored.shape != slice_.size[::-1]:
        raise UDAError(f"{path}: {stored.shape} pixels; expected {slice_.size[::-1]} (rows, columns). Get it again.")
    if slope.is_integer() and intercept.is_integer():
        rescaled = stored.astype(np.int64) * int(slope) + int(intercept)
        low, high = rescaled.min(), rescaled.max()
        fits = (t for t in (np.int16, np.int32, np.int64) if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
        return rescaled.astype(next(fits))
    return (stored * slope + intercept).astype(np.float32)


# --- all files of a series --------------------------------------------------------------------------------------------


def _check_one_series(slices: Sequence[Slice]) -> None:
    counts = Counter(slice_.series for slice_ in slices)
    # dicomanon of MATLAB and some scanners give every slice a series of its own: then the grid alone decides
    if 1 < len(counts) < len(slices):
        rare = min(counts, key=lambda series: counts[series])
        odd = next(slice_ for slice_ in slices if slice_.series == rare)
        sizes = ", ".join(map(str, sorted(counts.values(), reverse=True)))
        raise UDAError(
            f"{odd.path}: {len(counts)} series in one folder, of {sizes} slices; expected one. This file's "
            f"SeriesInstanceUID is {rare}. Move the slices of each series to a folder of its own."
        )

    def grid(slice_: Slice) -> str:
        axes = " ".join(f"{v + 0:.3f}" for v in np.round([*slice_.right, *slice_.down], 3))
        columns, rows = slice_.size
        return f"{columns} x {rows} of {slice_.spacing[0]:.4g} x {slice_.spacing[1]:.4g} mm along {axes}"

    common = next(s for s in slices if grid(s) == Counter(map(grid, slices)).most_common(1)[0][0])
    for slice_ in slices:
        axes = [(slice_.right, common.right), (slice_.down, common.down), (slice_.spacing, common.spacing)]
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
    for i, gap in enumerate(gaps):
        if gap < 0.01 * max(step, pixel):
            raise UDAError(
                f"{slices[i + 1].path}: at the same position as {slices[i].path.name}, {along[i]:.2f} mm along the "
                "slice normal; expected every slice once. Remove the extra slice."
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
