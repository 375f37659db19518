"""RTSTRUCT files with contours of known shapes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from nnunet_uda.images.rtstruct import Contour

RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
C, S = math.cos(0.4), math.sin(0.4)
DIRECTIONS = {
    "straight": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "flipped": (-1, 0, 0, 0, -1, 0, 0, 0, 1),
    "downwards": (1, 0, 0, 0, -1, 0, 0, 0, -1),
    "sagittal": (0, 0, -1, 1, 0, 0, 0, -1, 0),
    "oblique": (C, 0, S, S * S, C, -S * C, -S * C, S, C * C),
}


def grid(direction: str = "straight", size=(60, 64, 40), spacing=(0.8, 0.7, 1.5)) -> sitk.Image:
    image = sitk.Image(size, sitk.sitkInt16)
    image.SetSpacing(spacing)
    image.SetOrigin((-13.0, 21.0, -7.5))
    image.SetDirection([float(v) for v in DIRECTIONS[direction]])
    return image


def physical(image: sitk.Image, index: np.ndarray) -> np.ndarray:
    """mm of continuous indices (points, 3), one at a time by ITK."""
    return np.array([image.TransformContinuousIndexToPhysicalPoint([float(v) for v in row]) for row in index])


def rings(image: sitk.Image, radius_mm, corners: int = 90, shift: float = 0.0, **options) -> list[Contour]:
    """Circles about the middle of the slices; ``radius_mm(distance in mm to the middle slice)``, None for no circle."""
    size, spacing = np.array(image.GetSize()), np.array(image.GetSpacing())
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    contours = []
    for k in range(size[2]):
        if radius := radius_mm((k - size[2] // 2) * spacing[2]):
            x = size[0] / 2 + radius * np.cos(angles) / spacing[0]
            y = size[1] / 2 + radius * np.sin(angles) / spacing[1]
            points = physical(image, np.stack([x, y, np.full(corners, k + shift)], axis=1))
            contours.append(Contour(points, **options))
    return contours


def save_rtstruct(
    path: Path, named: list[tuple[str, list[Contour]]], series: str = "1.2.3", implicit: bool = False, **tags
) -> Path:
    """An RTSTRUCT with the elements that readers need."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTSTRUCT, generate_uid()
    dataset.Modality, dataset.PatientID = "RTSTRUCT", "VS-SEG-001"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(named, 1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for contour in contours:
            item = Dataset()
            item.ContourGeometricType = "CLOSEDPLANAR_XOR" if contour.xor else "CLOSED_PLANAR"
            item.NumberOfContourPoints = len(contour.points)
            item.ContourData = [f"{v:.4f}" for v in contour.points.ravel()]
            drawn.ContourSequence.append(item)
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(drawn)
    frame, study, referenced = Dataset(), Dataset(), Dataset()
    referenced.SeriesInstanceUID = series
    study.RTReferencedSeriesSequence = [referenced]
    frame.RTReferencedStudySequence = [study]
    dataset.ReferencedFrameOfReferenceSequence = [frame] if series else []
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = (
        RTSTRUCT, dataset.SOPInstanceUID,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def ring(image: sitk.Image, radius: float, **options) -> Contour:
    """A circle of this radius in mm in the middle slice."""
    return rings(image, lambda d: radius if d == 0 else None, **options)[0]
