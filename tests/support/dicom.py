"""DICOM series as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    generate_uid,
)

ANGLE = np.deg2rad(25)
TILT = np.array([[1, 0, 0], [0, np.cos(0.4), -np.sin(0.4)], [0, np.sin(0.4), np.cos(0.4)]])
DIRECTIONS = {
    "axial": np.eye(3),
    "feet first": np.diag([-1.0, 1, -1]),
    "prone": np.diag([-1.0, -1, 1]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "sagittal": np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]),
    "oblique": np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]]) @ TILT,
}
"""Columns: along a row, down a column, the normal."""


def write_series(
    folder: Path,
    array: np.ndarray,
    *,
    direction: np.ndarray = DIRECTIONS["axial"],
    spacing: Sequence[float] = (0.75, 0.5, 2.0),
    origin: Sequence[float] = (-10.5, 20.25, -30.0),
    names: Sequence[str] | None = None,
    modality: str = "MR",
    change: Callable[[pydicom.Dataset, int], None] | None = None,
) -> list[Path]:
    """One file per slice of the stored values ``array`` (slices, rows, columns), slice z called ``names[z]``."""
    folder.mkdir(parents=True, exist_ok=True)
    series, files = generate_uid(), []
    for z, plane in enumerate(array):
        ds = pydicom.Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2" if modality == "CT" else "1.2.840.10008.5.1.4.1.1.4"
        ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), "1.2.3", series
        ds.Modality, ds.InstanceNumber, ds.SliceThickness = modality, z + 1, 9.5
        ds.Rows, ds.Columns = plane.shape
        ds.PixelSpacing = [spacing[1], spacing[0]]
        ds.ImagePositionPatient = [round(float(v), 6) for v in np.array(origin) + z * spacing[2] * direction[:, 2]]
        ds.ImageOrientationPatient = [round(float(v), 6) for v in direction[:, :2].T.ravel()]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, int(array.dtype.kind == "i")
        ds.PixelData = plane.astype(array.dtype.newbyteorder("<")).tobytes()
        if change is not None:
            change(ds, z)
        files.append(folder / (names[z] if names else f"IMG-{z + 1:04d}.dcm"))
        ds.save_as(files[-1], enforce_file_format=True)
    return files


def edit(path: Path, **tags: object) -> None:
    ds = pydicom.dcmread(path)
    for tag, value in tags.items():
        setattr(ds, tag, value)
    ds.save_as(path)


def shorter(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
