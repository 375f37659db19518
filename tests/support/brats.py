"""A small tree of BraTS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHAPE = (6, 9, 10)
LPS = (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
KINDS = ("t1", "t1ce", "t2", "flair", "seg")
FOLDERS = {
    "2018": ("{grade}/Brats18_TCIA02_{i}_1", "_"),
    "2019": ("MICCAI_BraTS_2019_Data_Training/{grade}/BraTS19_CBICA_AA{i}_1", "_"),
    "2020": ("MICCAI_BraTS2020_TrainingData/BraTS20_Training_{i:03d}", "_"),
    "2021": ("BraTS2021_{i:05d}", "_"),
    "2023": ("BraTS-GLI-{i:05d}-000", "-"),
    "2024": ("BraTS-GLI-{i:05d}-100", "-"),
}
NEW_KINDS = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "seg": "seg"}


def save(array: np.ndarray, path: Path, direction=LPS, spacing=(1.0, 1.0, 1.0)) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetOrigin((0.0, 239.0, 5.0))
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), path.name.endswith("gz"))


def brain(seed: int) -> np.ndarray:
    array = np.random.default_rng(seed).integers(100, 2000, SHAPE).astype(np.int16)
    array[:, :2] = 0
    return array


def tumour(year: str) -> np.ndarray:
    """Core 1, oedema 2, and the year's value of the enhancing tumour; in 2024 a resection cavity too."""
    array = np.zeros(SHAPE, np.uint8)
    array[2:4, 4, 2:4], array[2:4, 5, 2:6], array[3, 6, 2:5] = 1, 2, 3 if year >= "2023" else 4
    if year == "2024":
        array[4, 7, 7:9] = 4
    return array


def case_folder(tree: Path, year: str, i: int) -> Path:
    return tree / FOLDERS[year][0].format(i=i, grade="HGG" if i % 2 else "LGG")


def file(folder: Path, kind: str, ending: str = ".nii.gz") -> Path:
    new = folder.name.startswith("BraTS-GLI")
    return folder / f"{folder.name}{'-' if new else '_'}{NEW_KINDS[kind] if new else kind}{ending}"


def make_case(folder: Path, year: str, seed: int, ending: str = ".nii.gz", direction=LPS, kinds=KINDS) -> None:
    for k, kind in enumerate(kinds):
        save(tumour(year) if kind == "seg" else brain(10 * seed + k), file(folder, kind, ending), direction)


def make_tree(tree: Path, year: str = "2020", patients: int = 8, **options) -> Path:
    for i in range(1, patients + 1):
        make_case(case_folder(tree, year, i), year, i, **options)
    return tree
