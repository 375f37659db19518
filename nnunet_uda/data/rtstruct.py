"""Contours of structures (DICOM RTSTRUCT, or the same as JSON) drawn on the voxels of the image they belong to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from skimage.draw import polygon

from nnunet_uda.errors import UDAError


@dataclass(frozen=True)
class Contour:
    """A closed planar polygon: (points, 3) in mm, DICOM's patient coordinates (LPS). ``xor``: it may cut a hole."""

    points: np.ndarray
    xor: bool = False


@dataclass(frozen=True)
class Structures:
    """What one file outlines: (name, contours) in the file's order, the series it was drawn on, its patient.

    ``series`` and ``patient`` are empty where the file does not say (JSON never does).
    """

    path: Path
    named: tuple[tuple[str, tuple[Contour, ...]], ...]
    series: tuple[str, ...] = ()
    patient: str = ""


def read_header(path: Path, *tags: str) -> pydicom.Dataset:
    """The DICOM elements of these names alone, as far as the file has them. Raises ``UDAError`` when unreadable."""
    try:
        return pydicom.dcmread(path, specific_tags=list(tags), stop_before_pixels=True)
    except Exception as error:  # pydicom's parser has no error class of its own
        raise UDAError(
            f"{path}: cannot be read ({error}); expected a whole DICOM file. It is corrupt: get it again."
        ) from None


def referenced_series(dataset: pydicom.Dataset) -> tuple[str, ...]:
    """SeriesInstanceUIDs that an RTSTRUCT says it was drawn on."""
    return tuple(
        str(series.SeriesInstanceUID)
        for frame in dataset.get("ReferencedFrameOfReferenceSequence") or []
        for study in frame.get("RTReferencedStudySequence") or []
        for series in study.get("RTReferencedSeriesSequence") or []
    )


def read_rtstruct(path: Path) -> Structures:
    """All structures of an RTSTRUCT file. Contours that enclose no area (points, open lines) are left out."""
    dataset = read_header(
        path, "Modality", "PatientID", "StructureSetROISequence", "ROIContourSequence",
        "ReferencedFrameOfReferenceSequence",
    )  # fmt: skip
    modality = dataset.get("Modality", "unknown")
    if modality != "RTSTRUCT":
        raise UDAError(f"{path}: a DICOM file of modality {modality}; expected an RTSTRUCT. Get the right file.")
    try:
        contours: dict[int, tuple[Contour, ...]] = {}
        for roi in dataset.get("ROIContourSequence") or []:
            closed = [
                Contour(np.array(c.ContourData, float).reshape(-1, 3), c.ContourGeometricType == "CLOSEDPLANAR_XOR")
                for c in roi.get("ContourSequence") or []
                if c.ContourGeometricType in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
            ]
            contours[int(roi.ReferencedROINumber)] = tuple(closed)
        named = tuple(
            (str(roi.get("ROIName", "")), contours.get(int(roi.ROINumber), ()))
            for roi in dataset.get("StructureSetROISequence") or []
        )
        series = referenced_series(dataset)
    except (AttributeError, TypeError, ValueError) as error:
        raise UDAError(f"{path}: no valid RTSTRUCT ({error}). It is corrupt: get it again.") from None
    return Structures(path, named, series, str(dataset.get("PatientID", "")))


def read_contours_json(path: Path) -> Structures:
    """A list of ``{"structure_name": ..., "LPS_contour_points": [[[x, y, z], ...], ...]}``, in mm."""
    try:
        named = tuple(
            (
                str(structure["structure_name"]),
                tuple(Contour(np.array(points, float).reshape(-1, 3)) for points in structure["LPS_contour_points"]),
            )
            for structure in json.loads(path.read_text())
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UDAError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); expected a list of structures with "
            "structure_name and LPS_contour_points. Get the file again."
        ) from None
    return Structures(path, named)


def rasterise(contours: Sequence[Contour], image: sitk.Image, path: Path) -> tuple[np.ndarray, float]:
    """Voxels of ``image`` whose centre lies inside the contours of their slice.

    Contours of a slice are united, except ``xor`` ones, which are combined by exclusive or (DICOM PS3.3 C.8.8.6.3).
    Slices between contours are not filled in.

    Args:
        contours: of one structure, drawn in the slice planes of ``image``, whose axes may be oblique.
        path: file of the contours, for messages.

    Returns:
        uint8 mask, axes (z, y, x); the largest distance in mm from a contour to the slice that it was drawn on.

    Raises:
        UDAError: when a contour crosses slices or leaves the image: it was drawn on another one.
    """
    size, spacing = np.array(image.GetSize()), np.array(image.GetSpacing())
    to_index = np.linalg.inv(np.array(image.GetDirection()).reshape(3, 3) * spacing)
    mask = np.zeros(size[::-1], np.uint8)
    off = 0.0
    for contour in contours:
        index = (contour.points - image.GetOrigin()) @ to_index.T
        if not np.isfinite(index).all():
            raise UDAError(f"{path}: a contour has points that are not finite. The file is corrupt: get it again.")
        if len(index) < 3:
            continue
        x, y, z = index.T
        if np.ptp(z) > 0.5:
            raise UDAError(
                f"{path}: a contour runs through {np.ptp(z):.1f} slices of the image; expected contours in its slice "
                "planes. They were drawn on another series: find the image that they belong to."
            )
        if index.min() < -1 or (index > size).any() or not 0 <= round(z.mean()) < size[2]:
            place, box = (", ".join(f"{v:.0f}" for v in values) for values in (index.mean(axis=0), size))
            raise UDAError(
                f"{path}: a contour lies outside the image, around voxel ({place}) of ({box}); expected it inside. It "
                "belongs to another scan: find the image that it was drawn on."
            )
        plane = mask[round(z.mean())]
        off = max(off, abs(z.mean() - round(z.mean())) * spacing[2])
        inside = polygon(y, x, plane.shape)
        if contour.xor:
            plane[inside] ^= 1
        else:
            plane[inside] = 1
    return mask, off
