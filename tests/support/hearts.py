"""Small trees of ACDC and EMIDEC."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.btcv import save

SHAPE = (5, 12, 12)
PATIENTS = (1, 2, 3, 101, 150)
CASES = ("N003", "N004", "P001", "P002")
UNLABELLED = "101"
ED = {2: 11}
"""Frames at the end of diastole, where they are not the first; the end of systole is frame 4 then, else 7."""


def scan(*seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 900, SHAPE).astype(np.int16)


def heart(values: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, values + 1, SHAPE).astype(np.uint8)


def frames(patient: int) -> tuple[int, int]:
    """At the end of diastole and of systole."""
    return (ED[patient], 4) if patient in ED else (1, 7)


def make_acdc(tree: Path) -> Path:
    for patient in PATIENTS:
        name = f"patient{patient:03d}"
        folder = tree / "database" / ("training" if patient <= 100 else "testing") / name
        for frame in frames(patient):
            save(scan(patient, frame), folder / f"{name}_frame{frame:02d}.nii.gz", 0)
            save(heart(3, patient, frame), folder / f"{name}_frame{frame:02d}_gt.nii.gz", 0)
        (folder / f"{name}_4d.nii.gz").write_bytes(b"not used")
        ed, es = frames(patient)
        (folder / "Info.cfg").write_text(f"ED: {ed}\nES: {es}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
    return tree


def make_emidec(tree: Path) -> Path:
    for index, case in enumerate((*CASES, UNLABELLED)):
        folder = tree / "emidec-dataset-1.0.1" / f"Case_{case}"
        save(scan(index), folder / "Images" / f"Case_{case}.nii.gz", 0)
        if case != UNLABELLED:
            save(heart(4 if case[0] == "P" else 2, index), folder / "Contours" / f"Case_{case}.nii.gz", 0)
        (folder.parent / f"Case {case}.txt").write_text("age 50")
    return tree
