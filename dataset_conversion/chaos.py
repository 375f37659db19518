"""CHAOS (Combined Healthy Abdominal Organ Segmentation), any two of MR T2-SPIR, MR T1-DUAL in and out of phase, CT.

Expected tree (-i), as the challenge distributes it; Test_Sets has no labels and is not used:

    VENDOR_TREE/Train_Sets/MR/1/T2SPIR/DICOM_anon/IMG-0002-00001.dcm ...
                                       Ground/IMG-0002-00001.png ...
    VENDOR_TREE/Train_Sets/MR/1/T1DUAL/DICOM_anon/InPhase/*.dcm, DICOM_anon/OutPhase/*.dcm
                                       Ground/*.png                 (one set for both phases)
    VENDOR_TREE/Train_Sets/CT/2/DICOM_anon/*.dcm, Ground/*.png      (the liver alone)

Data: https://chaos.grand-challenge.org and https://doi.org/10.5281/zenodo.3431873 (CC BY-SA 4.0). Please cite Kavur et
al., Medical Image Analysis 69, 2021.

-source, -target: t2spir, t1in, t1out, ct. Grey values of the masks: 55 to 70 liver, 110 to 135 right kidney, 175 to 200
left kidney, 240 to 255 spleen; in CT 1, 255 or 55 to 70 is liver. Classes are numbered as given to -structures.

Taken care of: the n-th mask by name belongs to the n-th slice by name (their numbers do not agree); slices are then put
in order by ImagePositionPatient, which also gives the spacing (SliceThickness is wrong in some scans). Rescale slope
and intercept are applied (CT in HU). Repaired, and listed in the summary: grey values beside a structure's usual one.

Two MR sequences show the same patients: they are divided at random (-seed), so that no patient is in source and target.
A patient without the sequence, and a scan for imagesTr without masks, is left out with a warning; --strict refuses it.

Protocols:
  sifa    fixed test set MR 1 13 32 38. Source: MR scans outside it, or all of CT, in 4 seeded folds. Target: test scans
          to imagesTs and labelsTs, all others to imagesTu without labels, used in every fold. CT has no fixed test set:
          name the test scans with -test_ids, which replaces the fixed set.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from PIL import Image

from nnunet_uda.dataset_conversion import protocols
from nnunet_uda.dataset_conversion.case import Case, class_map, once
from nnunet_uda.dataset_conversion.dataset import skip_or_refuse
from nnunet_uda.dataset_conversion.options import add_directions, run_alone
from nnunet_uda.dataset_conversion.protocols import Domain
from nnunet_uda.errors import UDAError
from nnunet_uda.images.dicom import MOST_PIXELS, by_name, dicom_files, order_series, read_header, read_series
from nnunet_uda.images.geometry import on_grid
from nnunet_uda.images.listing import contents, entries, files_in, folders_in, folders_named, is_folder
from nnunet_uda.images.reading import readable

EXAMPLE = "nnUNetUDA_convert chaos -i CHAOS -d 510 -source t1in -target t2spir"

STRUCTURES = ("liver", "right_kidney", "left_kidney", "spleen")
MR_GREYS = {range(55, 71): 1, range(110, 136): 2, range(175, 201): 3, range(240, 256): 4}
CT_GREYS = {range(1, 2): 1, range(55, 71): 1, range(255, 256): 1}
USUAL_GREYS = (0, 1, 63, 126, 189, 252, 255)
SEQUENCES = {
    "t2spir": ("MR", "T2SPIR/DICOM_anon", "T2SPIR/Ground"),
    "t1in": ("MR", "T1DUAL/DICOM_anon/InPhase", "T1DUAL/Ground"),
    "t1out": ("MR", "T1DUAL/DICOM_anon/OutPhase", "T1DUAL/Ground"),
    "ct": ("CT", "DICOM_anon", "Ground"),
}
"""Modality folder, and folders of slices and masks of a patient."""
SIFA_TEST = ("1", "13", "32", "38")
INFORMATION = {"reference": "https://doi.org/10.5281/zenodo.3431873", "licence": "CHAOS: CC BY-SA 4.0"}


def read_label(
    folder: Path, image: sitk.Image, slices: Path, greys: Mapping[range, int]
) -> tuple[sitk.Image, list[str]]:
    """Masks as 1, 2, ... (``STRUCTURES``) on the image's grid, and a note on unusual grey values.

    Args:
        folder: of PNG masks, the n-th by name for the n-th DICOM file by name.
        slices: folder of the image's DICOM files.
        greys: grey values -> index in ``STRUCTURES``, from 1.
    """
    files = dicom_files(slices)
    masks = _png_files(folder)
    if len(masks) != len(files):
        raise UDAError(
            f"{folder}: {len(masks)} PNG masks ({masks[0].name} to {masks[-1].name}) for {len(files)} DICOM slices "
            f"({files[0].name} to {files[-1].name}) in {slices}; expected one mask per slice. Get the case again."
        )
    mask_of = dict(zip(files, masks, strict=True))
    table = np.full(256, 255, np.uint8)
    table[0] = 0
    for values, index in greys.items():
        table[list(values)] = index
    planes, unusual = [], {}
    for slice_ in order_series(files).slices:
        path = mask_of[slice_.path]
        grey = read_png(path)
        if grey.shape != slice_.size[::-1]:
            raise UDAError(
                f"{path}: {grey.shape[1]} x {grey.shape[0]} pixels; expected {slice_.size[0]} x {slice_.size[1]}, as "
                f"its slice {slice_.path}. The mask is of another scan, or was resized: get the case again."
            )
        plane = table[grey]
        if (plane == 255).any():
            found = ", ".join(map(str, np.unique(grey[plane == 255])[:20]))
            known = ", ".join(f"{v[0]}-{v[-1]} ({STRUCTURES[i - 1]})" for v, i in greys.items())
            raise UDAError(f"{path}: grey values {found}; expected 0, {known}. Correct the mask.")
        for value in np.setdiff1d(grey, USUAL_GREYS):
            unusual[int(value)] = STRUCTURES[table[value] - 1]
        planes.append(plane)
    named = ", ".join(f"{value} ({name})" for value, name in sorted(unusual.items()))
    notes = [f"{folder}: unusual grey values read as {named}"] if unusual else []
    return on_grid(np.stack(planes), image), notes


def read_scan(folder: Path, modality: str) -> sitk.Image:
    """The volume in a folder of slices, which must be of this modality where they say of which they are."""
    for path in dicom_files(folder):
        if (found := read_header(path, "Modality", "SOPClassUID").modality) not in (modality, ""):
            raise UDAError(
                f"{path}: its Modality is {found}; expected {modality} in this folder. The slices are of another scan: "
                "get the case again."
            )
    return read_series(folder)


def _png_files(folder: Path) -> list[Path]:
    return by_name([path for path in files_in(folder) if path.suffix.lower() == ".png"])


def read_png(path: Path) -> np.ndarray:
    """uint8 (rows, columns); a 1-bit mask gives 0 and 1."""
    with readable(path, "a whole PNG"), Image.open(path, formats=["PNG"]) as image:
        mode = image.mode
        if image.width * image.height > MOST_PIXELS:
            raise UDAError(f"{path}: a PNG of {image.width} x {image.height} pixels; expected a mask. Get it again.")
        grey = np.array(image.convert("L") if mode == "P" else image)
    if mode not in ("1", "L", "P"):
        raise UDAError(f"{path}: a PNG of mode {mode}; expected grey values of 1 or 8 bits. Save it as greyscale.")
    return grey.astype(np.uint8)


def train_folder(tree: Path) -> Path | None:
    """``Train_Sets`` in ``tree`` (or ``tree`` itself), None where there is no such tree."""
    return next((f for f in (tree / "Train_Sets", tree) if (f / "MR").is_dir() or (f / "CT").is_dir()), None)


def find_domain(
    tree: Path, sequence: str, name: str, prefix: str, structures: Sequence[str], strict: bool, warnings: list[str]
) -> Domain:
    """Cases of a sequence by patient number, masks attached where there are any (they are not opened)."""
    modality, slices, ground = SEQUENCES[sequence]
    expected = f"{modality}/<number>/{slices}/*.dcm"
    train = train_folder(tree)
    if train is None or not (train / modality).is_dir():
        folder = train or tree
        raise UDAError(
            f"{folder}: no {modality} folder (found: {contents(folder)}); expected Train_Sets/{expected}. Check -i."
        )
    patients: dict[int, Path] = {}
    folders_named(train / modality, r"\d+", "13")  # what is no folder
    for patient in by_name(folders_in(train / modality)):
        if not patient.name.isdecimal():
            raise UDAError(f"{patient}: unexpected folder; expected only {expected}. Rename or remove it.")
        once(patients, int(patient.name), patient, "patient number")
    greys = CT_GREYS if sequence == "ct" else MR_GREYS
    label_map = class_map(dict(enumerate(STRUCTURES, 1)), structures)
    in_files = {grey: label_map.values[index] for values, index in greys.items() for grey in values}
    label_map = replace(label_map, files=in_files)
    cases = {}
    for number, patient in sorted(patients.items()):
        if not (is_folder(patient / slices) and entries(patient / slices)):
            skip_or_refuse(f"{patient}: {slices} is missing or empty", strict, warnings)
            continue
        cases[str(number)] = Case(
            f"{prefix}_{number:02d}", (patient / slices,),
            patient / ground if is_folder(patient / ground) and _png_files(patient / ground) else None,
            label_map, partial(read_scan, modality=modality), partial(read_label, greys=greys),
        )  # fmt: skip
    if not cases:
        folder = train / modality
        raise UDAError(f"{folder} holds no scan (found: {contents(folder)}); expected {expected}. Check -i.")
    return Domain(name, cases, SIFA_TEST if modality == "MR" else (), train / modality)


def divide_patients(source: Domain, target: Domain, test: list[str], seed: int) -> tuple[Domain, Domain]:
    """Two sequences of the same patients without a patient in both: test patients and half of the rest to the target.

    A patient who has one sequence alone counts for it.
    """
    shared = [number for number in source.cases if number in target.cases and number not in test]
    to_source = set(np.random.RandomState(seed).permutation(shared)[: (len(shared) + 1) // 2])
    kept = {n: case for n, case in source.cases.items() if n in to_source or n not in target.cases}
    rest = {n: case for n, case in target.cases.items() if n not in to_source}
    return replace(source, cases=kept), replace(target, cases=rest)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", type=Path, required=True, metavar="VENDOR_TREE", help="folder with Train_Sets")
    add_directions(parser, SEQUENCES, "sequence")
    protocols.add_structures(parser, STRUCTURES, "all; with ct liver, its only one", None)
    protocols.add_arguments(parser, "13")


def convert(args: argparse.Namespace, warnings: list[str]) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    with_ct = "ct" in (args.source, args.target)
    structures = args.structures or (["liver"] if with_ct else list(STRUCTURES))
    if with_ct and structures != ["liver"]:
        raise UDAError(
            f"-structures {' '.join(structures)}: CHAOS's CT masks hold the liver alone. Use -structures liver, or "
            "BTCV's CT: nnUNetUDA_convert abdomen."
        )
    source, target = (
        find_domain(args.i, sequence, sequence.upper(), sequence, structures, args.strict, warnings)
        for sequence in (args.source, args.target)
    )
    if not with_ct:
        test = [] if args.protocol == "cisfa" else list(args.test_ids or target.test)
        source, target = divide_patients(source, target, test, args.seed)
    title = "CHAOS" if with_ct else "CHAOS, patients divided between the sequences"
    protocols.write_adaptation("CHAOS", source, target, structures, INFORMATION, args, warnings, "abdomen", title)


if __name__ == "__main__":
    run_alone(__doc__, add_arguments, convert)
