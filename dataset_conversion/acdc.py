"""ACDC (Automated Cardiac Diagnosis Challenge), cine MR of hearts: a supervised dataset of one frame of each patient.

Expected tree (-i), as its page distributes it; the 4D files are not used:

    VENDOR_TREE/database/training/patient001/Info.cfg
                                             patient001_frame01.nii.gz   patient001_frame01_gt.nii.gz
                                             patient001_frame12.nii.gz   patient001_frame12_gt.nii.gz
                                             patient001_4d.nii.gz                                      ... 100
    VENDOR_TREE/database/testing/patient101/...                                                        ... 150

Data: https://www.creatis.insa-lyon.fr/Challenge/acdc (CC BY-NC-SA 4.0). Please cite Bernard et al., IEEE Transactions
on Medical Imaging 37(11), 2018.

Label values: 1 RV, 2 myocardium of the left ventricle, 3 LV (cavity). Classes are numbered as given to -structures; the
others become background. -frame ed takes the end of diastole, which Info.cfg names (it is frame 1 in most patients, not
in all), -frame es the end of systole. A frame that was unpacked as a folder of its name with the file in it is read,
too. Intensities are clipped at the percentiles 0.5 and 99.5 unless -source_intensities says otherwise.

Where headers do not say how the heart lies in the body, scans of another origin may be turned or mirrored beside these:
look at quicklook.png.

Patients 101 to 150, the vendor's test set, go to imagesTs and labelsTs, or those of -test_ids instead; the others to
imagesTr and labelsTr, in 5 seeded folds. For adaptation to late enhancement: nnUNetUDA_convert cine_lge.

A patient without the frame, or without Info.cfg (whose first or last frame is then taken), is warned of; a scan
without a label is left out with a warning; --strict refuses all three.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from nnunet_uda.dataset_conversion import protocols
from nnunet_uda.dataset_conversion.case import Case, check_pairs, class_map, once
from nnunet_uda.dataset_conversion.dataset import skip_or_refuse
from nnunet_uda.dataset_conversion.options import run_alone
from nnunet_uda.dataset_conversion.protocols import Domain
from nnunet_uda.errors import UDAError, system_fault
from nnunet_uda.images.listing import contents, files_in, folders_in, folders_named, is_folder, nifti_files

EXAMPLE = "nnUNetUDA_convert acdc -i ACDC -d 513"

VALUES = {"RV": 1, "myocardium": 2, "LV": 3}
FRAMES = ("ed", "es")
FIRST_TEST = 101
RULE = "patient<number>/Info.cfg, patient<number>_frame<number>.nii.gz and patient<number>_frame<number>_gt.nii.gz"
INFORMATION = {"reference": "https://www.creatis.insa-lyon.fr/Challenge/acdc", "licence": "ACDC: CC BY-NC-SA 4.0"}


def patient_folders(tree: Path) -> list[Path]:
    """Folders ``patient001`` in ``tree``, in its ``training`` and ``testing``, or in these in a folder of it."""
    if not tree.is_dir():
        return []
    for base in (tree, *folders_in(tree)):
        inside = [place for place in (base, base / "training", base / "testing") if is_folder(place)]
        if found := [
            folder for place in inside for folder in folders_named(place, r"patient\d+", "patient001", "patient")
        ]:
            return found
    return []


def find_domain(
    tree: Path, frame: str, name: str, prefix: str, structures: Sequence[str], strict: bool, warnings: list[str]
) -> Domain:
    """A case of every patient by number, its label attached where the file exists (it is not opened).

    Args:
        frame: of ``FRAMES``.
        name, prefix: of the domain, and of its case ids.
        structures: classes 1, 2, ...
    """
    folders = patient_folders(tree)
    if not folders:
        raise UDAError(
            f"{tree}: no folder of a patient in it, in training or in testing (found: {contents(tree)}); "
            f"expected {RULE}. Check -i."
        )
    patients: dict[int, Path] = {}
    for folder in folders:
        once(patients, int(folder.name.lower().removeprefix("patient")), folder, "patient")
    label_map = class_map({value: name for name, value in VALUES.items()}, structures)
    cases = {}
    for number, folder in sorted(patients.items()):
        images, labels = _frames(folder)
        chosen = _chosen_frame(folder, frame, sorted(images), strict, warnings)
        if chosen not in images:
            wanted = "frame" if chosen is None else f"frame {chosen:02d}"
            found = ", ".join(f"{n:02d}" for n in sorted(images)) or "none"
            fact = f"{folder}: there is no {wanted} ({frame.upper()}; found: {found})"
            skip_or_refuse(fact, strict, warnings)
            continue
        label = labels.get(chosen)
        cases[str(number)] = Case(
            f"{prefix}_{number:03d}", (_unpacked(images[chosen]),), label and _unpacked(label), label_map
        )
    if not cases:
        raise UDAError(f"{tree} holds no scan of a patient (folders: {len(folders)}); expected {RULE}. Check -i.")
    return Domain(name, cases, tuple(number for number in cases if int(number) >= FIRST_TEST), tree)


def _frames(folder: Path) -> tuple[dict[int, Path], dict[int, Path]]:
    """Images and labels by the frame's number."""
    images: dict[int, Path] = {}
    labels: dict[int, Path] = {}
    for path in files_in(folder):  # folders that are called as an image, too
        if match := re.fullmatch(rf"{folder.name}_frame(\d+)(_gt)?\.nii(\.gz)?", path.name, re.IGNORECASE):
            once(labels if match[2] else images, int(match[1]), path, "frame")
    check_pairs(images, labels, RULE)
    return images, labels


def _unpacked(path: Path) -> Path:
    """The file, also where it lies in a folder of its name, as some programs unpack it."""
    if not path.is_dir():
        return path
    inside = nifti_files(path)
    if len(inside) != 1:
        raise UDAError(f"{path}: a folder with {len(inside)} NIfTI files; expected a file of this name, or one in it.")
    return inside[0]


def _chosen_frame(folder: Path, frame: str, frames: list[int], strict: bool, warnings: list[str]) -> int | None:
    """The number that ``Info.cfg`` gives of the frame; without it the first or last of ``frames``."""
    path = folder / "Info.cfg"
    try:
        text = path.read_text(errors="replace") if path.is_file() else ""
    except OSError as error:
        raise UDAError(f"{path}: cannot be read ({system_fault(error) or error}).") from None
    told = set(re.findall(rf"^\s*{frame}\s*[:=]\s*0*(\d{{1,4}})\s*$", text, re.MULTILINE | re.IGNORECASE))
    if len(told) == 1:
        return int(told.pop())
    if not frames:
        return None
    guess = frames[0] if frame == "ed" else frames[-1]
    skip_or_refuse(
        f"{path} is missing, or does not say which frame is {frame.upper()}", strict, warnings,
        f"the {'first' if frame == 'ed' else 'last'} frame of the folder, {guess}, is taken",
    )  # fmt: skip
    return guess


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", type=Path, required=True, metavar="VENDOR_TREE", help="folder with training and testing")
    parser.add_argument("-frame", choices=FRAMES, default="ed", help="end of diastole or of systole [ed]")
    protocols.add_structures(parser, tuple(VALUES))
    protocols.add_supervised_arguments(parser, "7", "101 to 150")


def convert(args: argparse.Namespace, warnings: list[str]) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    domain = find_domain(args.i, args.frame, "cine", "cine", args.structures, args.strict, warnings)
    title = f"ACDC cine MR, {args.frame.upper()}"
    protocols.write_supervised("ACDC", domain, args.structures, INFORMATION, args, warnings, "heart", title)


if __name__ == "__main__":
    run_alone(__doc__, add_arguments, convert)
