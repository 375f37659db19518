"""A small tree of the schwannomas, as TCIA delivers it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from nnunet_uda.dataset_conversion.protocols import split_patients
from nnunet_uda.dataset_conversion.vs import PATIENTS, TUMOUR
from nnunet_uda.images.rtstruct import Contour
from support.rtstruct import DIRECTIONS, physical, save_rtstruct

NUMBERS = (1, 2, 3, 4, 38, 40)  # 39 does not exist in the vendor's tree
SIZE = (16, 14, 6)
ROLES, _ = split_patients(NUMBERS, PATIENTS, 12345)


def direction(number: int) -> str:
    return list(DIRECTIONS)[number % len(DIRECTIONS)]


def scan(number: int, weighting: str) -> sitk.Image:
    rng = np.random.default_rng(number * 10 + int(weighting[1]))
    array = (2 * rng.integers(-150, 450, SIZE[::-1])).astype(np.int16)  # even: DICOM has a slope of 2 here
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.8, 0.75, 1.5))
    image.SetOrigin((float(number), -20.0, 30.0 + int(weighting[1])))
    image.SetDirection([float(v) for v in DIRECTIONS[direction(number)]])
    return image


def tumour(number: int) -> np.ndarray:
    array = np.zeros(SIZE[::-1], np.uint8)
    array[2:4, 3:7, 4 + number % 3 : 9] = 1
    return array


def outline(image: sitk.Image, mask: np.ndarray, shift: float = 0.0) -> list[Contour]:
    """The box ``mask`` as contours half a voxel outside its outermost centres."""
    (z0, y0, x0), (z1, y1, x1) = np.argwhere(mask).min(axis=0), np.argwhere(mask).max(axis=0)
    corners = [(x0 - 0.5, y0 - 0.5), (x1 + 0.5, y0 - 0.5), (x1 + 0.5, y1 + 0.5), (x0 - 0.5, y1 + 0.5)]
    return [Contour(physical(image, np.array([(x, y, z + shift) for x, y in corners]))) for z in range(z0, z1 + 1)]


def uid(number: int, weighting: str) -> str:
    return f"1.2.826.0.1.{number}.{weighting[1]}"


def save_series(image: sitk.Image, folder: Path, name: str, number: int, weighting: str, **tags) -> None:
    """Slices in files named against their order in space; rescale slope 2 and intercept 100 undone in the pixels."""
    folder.mkdir(parents=True)
    array, axes = sitk.GetArrayFromImage(image), np.array(image.GetDirection()).reshape(3, 3)
    for k in range(len(array)):
        slice_ = Dataset()
        slice_.SOPClassUID, slice_.SOPInstanceUID = MRImageStorage, generate_uid()
        slice_.Modality, slice_.PatientID = "MR", f"VS-SEG-{number:03d}"
        slice_.SeriesInstanceUID, slice_.SeriesDescription = uid(number, weighting), f"{weighting}_mpr_tra"
        slice_.ImagePositionPatient = [f"{v:.6f}" for v in image.TransformIndexToPhysicalPoint((0, 0, k))]
        slice_.ImageOrientationPatient = [f"{v:.9f}" for v in (*axes[:, 0], *axes[:, 1])]
        slice_.PixelSpacing = [image.GetSpacing()[1], image.GetSpacing()[0]]
        slice_.Rows, slice_.Columns = array.shape[1:]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
        slice_.RescaleSlope, slice_.RescaleIntercept = 2, 100
        for tag, value in tags.items():
            setattr(slice_, tag, value)
        slice_.PixelData = ((array[k] - 100) // 2).astype("<i2").tobytes()
        slice_.file_meta = FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_.file_meta.MediaStorageSOPClassUID = MRImageStorage
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
        slice_.save_as(folder / name.format(len(array) - k), enforce_file_format=True)


def names_of(number: int) -> tuple[str, ...]:
    """The tumour is never first, and is named as the vendor does."""
    return ("Brainstem", "cochlea", ("TV", "tv", "AN")[number % 3], "Vol2016")


def structures(number: int, weighting: str) -> list[tuple[str, list[Contour]]]:
    image = scan(number, weighting)
    other = np.zeros_like(tumour(number))
    other[1:5, 1:12, 1:14] = 1
    return [(name, outline(image, tumour(number) if name.lower() in TUMOUR else other)) for name in names_of(number)]


def make_tcia(tree: Path) -> Path:
    for number in NUMBERS:
        study = tree / "Vestibular-Schwannoma-SEG" / f"VS-SEG-{number:03d}" / "08-30-1994-NA-27505"
        for weighting in ("t1", "t2"):
            series = study / f"{weighting}-series"
            save_series(scan(number, weighting), series, "1-{:d}.dcm", number, weighting)
            patient = {"PatientID": f"VS-SEG-{number:03d}"}
            contours = structures(number, weighting)
            save_rtstruct(study / f"{weighting}-rt" / "1-1.dcm", contours, uid(number, weighting), **patient)
        for kind in ("RTPLAN", "RTDOSE"):
            save_rtstruct(study / kind / "1-1.dcm", [], Modality=kind, **patient)
    return tree


def real_crossmoda(tree: Path, files: Path) -> Path:
    """Real scans named as crossMoDA's."""
    for name, file in {
        "source_training/crossmoda_99_ceT1": "vs_gk_99_t1", "source_training/crossmoda_99_Label": "vs_gk_99_t1_seg",
        "target_training/crossmoda_198_hrT2": "vs_gk_98_t2", "target_training/crossmoda_195_hrT2": "vs_gk_95_t2",
        "target_validation/crossmoda_219_hrT2": "vs_gk_9_t2",
        "target_validation/crossmoda_219_Label": "vs_gk_9_t2_seg",
    }.items():  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / f"{name}.nii.gz").symlink_to(files / f"{file}.nii.gz")
    return tree


def real_pairs(tree: Path, files: Path) -> Path:
    """In the converted layout: four pairs of the one ceT1 and three hrT2 scans that there are."""
    for number, second in ((99, 98), (98, 98), (95, 95), (9, 9)):
        folder = tree / f"vs_gk_{number}"
        folder.mkdir(parents=True)
        for kind, end in (("t1", "99_t1"), ("t2", f"{second}_t2")):
            shutil.copy(files / f"vs_gk_{end}.nii.gz", folder / f"vs_gk_{kind}_ref{kind.upper()}.nii.gz")
            shutil.copy(files / f"vs_gk_{end}_seg.nii.gz", folder / f"vs_gk_seg_ref{kind.upper()}.nii.gz")
    return tree
