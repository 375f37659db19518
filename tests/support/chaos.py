"""A small tree of CHAOS."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from PIL import Image

from nnunet_uda.images.dicom import by_name
from support.dicom import DIRECTIONS, write_series

DATA = os.environ.get("NNUNET_UDA_TEST_DATA")
REAL = Path(DATA or "", "CHAOS", "Train_Sets", "CT", "3")
SHAPE = (5, 7, 9)
GREYS = np.array([0, 63, 126, 189, 252], np.uint8)
MR, CT = (1, 2, 3, 13, 20, 21), (2, 5, 13)
ORIENTATIONS = tuple(DIRECTIONS)


def stored(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 900, SHAPE).astype(np.uint16)


def organs(number: int) -> np.ndarray:
    """Classes in slice order: different in every slice, so that a wrong order or flip shows."""
    mask = np.zeros(SHAPE, np.uint8)
    for z in range(4):
        for structure in range(1, 5):
            mask[z, 1 + (z + number) % 3 : 5, 2 * structure - 2 : 2 * structure] = structure
    return mask


def orientation(number: int) -> np.ndarray:
    return DIRECTIONS[ORIENTATIONS[number % len(ORIENTATIONS)]]


def write_masks(folder: Path, planes: np.ndarray, pattern: str, first: int) -> None:
    """PNG masks in name order; a boolean array gives 1-bit files."""
    folder.mkdir(parents=True)
    for i, plane in enumerate(planes):
        Image.fromarray(plane).save(folder / pattern.format(first + i))


def make_patient(patient: Path, sequences: dict[str, int], number: int, ct: bool = False) -> None:
    """Slices of each sequence (folder: seed); in CT, and for even numbers, names run against the slice order."""
    against = ct or number % 2 == 0
    mask = organs(number)
    grey = mask == 1 if ct and number % 2 else (mask == 1).astype(np.uint8) * 255 if ct else GREYS[mask]
    pattern = "i{:04d},0000b.dcm" if ct else "IMG-0004-{:05d}.dcm"
    names = [pattern.format(3 * i + 1) for i in range(SHAPE[0])]
    for folder, seed in sequences.items():

        def rescaled(ds: pydicom.Dataset, z: int) -> None:
            ds.RescaleIntercept, ds.RescaleSlope = ("-1000", "1") if ct else ("0", "1")

        write_series(
            patient / folder, stored(seed), direction=orientation(number), modality="CT" if ct else "MR",
            names=names[::-1] if against else names, change=rescaled,
        )  # fmt: skip
    pattern, first = ("liver_GT_{:03d}.png", 0) if ct else ("IMG-0002-{:05d}.png", 7)
    for ground in {folder.split("DICOM_anon")[0] + "Ground" for folder in sequences}:
        write_masks(patient / ground, grey[::-1] if against else grey, pattern, first)


def make_chaos(tree: Path, mr: tuple[int, ...] = MR, ct: tuple[int, ...] = CT) -> Path:
    for number in mr:
        patient = tree / "Train_Sets" / "MR" / str(number)
        make_patient(patient, {"T2SPIR/DICOM_anon": number}, number)
        phases = {f"T1DUAL/DICOM_anon/{name}": 100 * i + number for i, name in enumerate(("InPhase", "OutPhase"), 1)}
        make_patient(patient, phases, number)
    for number in ct:
        make_patient(tree / "Train_Sets" / "CT" / str(number), {"DICOM_anon": 500 + number}, number, ct=True)
    return tree


def assert_image(path: Path, array: np.ndarray, direction: np.ndarray) -> None:
    image = sitk.ReadImage(str(path))
    assert image.GetPixelID() == sitk.sitkInt16 and (sitk.GetArrayFromImage(image) == array).all()
    assert np.allclose(image.GetSpacing(), (0.75, 0.5, 2.0), atol=1e-5)
    assert np.allclose(image.GetOrigin(), (-10.5, 20.25, -30), atol=1e-4)
    assert np.allclose(np.reshape(image.GetDirection(), (3, 3)), direction, atol=1e-5)


def nth(folder: Path, n: int) -> Path:
    return by_name(list(folder.iterdir()))[n]
