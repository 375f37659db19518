"""MM-WHS 2017 (Multi-Modality Whole Heart Segmentation), MR <-> CT.

Expected tree (-i), as the challenge distributes it; ct_test and mr_test are not used:

    VENDOR_TREE/ct_train/ct_train_1001_image.nii.gz   ct_train_1001_label.nii.gz   ... 1020
    VENDOR_TREE/mr_train/mr_train_1001_image.nii.gz   mr_train_1001_label.nii.gz   ... 1020

Data: https://zmiclab.github.io/zxh/0/mmwhs/ (registration; free for research under the terms stated there, not to be
passed on). Please cite Zhuang et al., Medical Image Analysis 58, 2019.

Label values: 205 myocardium of the left ventricle, 420 LA, 500 LV, 550 RA, 600 RV, 820 AA (ascending aorta), 850 PA.
Classes are numbered as given to -structures; the other structures become background. Images are never cropped.

Repaired, and listed in the summary:
  421         means 420 (LA); known in mr_train_1010
  border      a piece of a structure that touches the volume's border and is disconnected from the rest is set to
              background when it lies wholly within the outermost two voxel layers of one face, or has less than 1 % of
              the voxels of the structure's largest other piece; known in mr_train_1002. A structure that lies in those
              layers altogether is kept. The rule sees one label file alone.

Protocols:
  sifa    fixed test set CT 1003 1008 1014 1019, MR 1007 1009 1018 1019. Source: the scans outside the source
          modality's own test set (16 of 20), so that each modality trains on 16, in 4 seeded folds. Target: test scans
          to imagesTs and labelsTs, all others to imagesTu without labels, used in every fold. With -test_ids these
          target scans are the test set instead, and the source is used whole.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_uda.dataset_conversion import protocols
from nnunet_uda.dataset_conversion.case import Case, check_pairs, class_map, matched
from nnunet_uda.dataset_conversion.options import add_directions, run_alone
from nnunet_uda.dataset_conversion.protocols import Domain
from nnunet_uda.errors import UDAError
from nnunet_uda.images.geometry import check_same_geometry, on_grid
from nnunet_uda.images.listing import contents
from nnunet_uda.images.reading import LabelMap, read_image

EXAMPLE = "nnUNetUDA_convert mmwhs -i MM-WHS -d 501 -source mr -target ct"

VALUES = {"myocardium": 205, "LA": 420, "LV": 500, "RA": 550, "RV": 600, "AA": 820, "PA": 850}
USUAL = ["myocardium", "LA", "LV", "AA"]
INFORMATION = {
    "reference": "https://zmiclab.github.io/zxh/0/mmwhs/",
    "licence": "MM-WHS terms: research use after registration, not to be passed on",
}
SIFA_TEST = {"ct": ("1003", "1008", "1014", "1019"), "mr": ("1007", "1009", "1018", "1019")}


def read_label(path: Path, image: sitk.Image, image_path: Path) -> tuple[sitk.Image, list[str]]:
    """The label with both known faults repaired (see above), on the image's grid."""
    label = read_image(path)
    check_same_geometry(image, image_path, label, path)
    voxels = sitk.GetArrayFromImage(label)
    notes = []
    wrong = voxels == 421
    if wrong.any():
        voxels[wrong] = 420
        notes.append(f"{path.name}: {int(wrong.sum())} voxels of value 421 set to 420 (LA)")
    for name, value in VALUES.items():
        spurious = border_pieces(voxels == value)
        if spurious.any():
            voxels[spurious] = 0
            notes.append(f"{path.name}: {int(spurious.sum())} spurious {name} voxels on the border set to background")
    if not notes:
        return label, notes
    return on_grid(voxels, label), notes


def border_pieces(mask: np.ndarray) -> np.ndarray:
    """Spurious pieces on the volume's border, by the rule in the module's text. Bool in, bool out, same 3D shape."""
    spurious = np.zeros_like(mask)
    whole = ndimage.find_objects(mask.view(np.uint8))
    if not whole or not any(s.start == 0 or s.stop == n for s, n in zip(whole[0], mask.shape, strict=True)):
        return spurious
    pieces, count = ndimage.label(mask[whole[0]], np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    ends = [
        [(w.start + s.start, n - w.start - s.stop) for w, s, n in zip(whole[0], box, mask.shape, strict=True)]
        for box in ndimage.find_objects(pieces)
    ]  # voxels between the piece and both faces, per axis
    shape = np.array(mask.shape)[:, None]
    touches = np.array([np.min(gaps) == 0 for gaps in ends])
    flat = np.array([np.max(gaps - shape) >= -2 for gaps in ends])
    if flat.all():
        return spurious
    small = sizes < 0.01 * np.where(flat, 0, sizes).max()
    spurious[whole[0]] = np.isin(pieces, 1 + np.flatnonzero(touches & (flat | small)))
    return spurious


def find_cases(tree: Path, modality: str, label_map: LabelMap) -> dict[str, Case]:
    """Cases of ``<modality>_train`` by number, labels attached where the file exists (it is not opened)."""
    folder = tree / f"{modality}_train"
    rule = f"{modality}_train_<number>_image.nii.gz and {modality}_train_<number>_label.nii.gz"
    if not folder.is_dir():
        raise UDAError(f"{folder} is missing (in {tree}: {contents(tree)}); expected it to hold {rule}. Check -i.")
    files: dict[str, dict[str, Path]] = {"image": {}, "label": {}}
    for match, path in matched(folder, rf"{modality}_train_(\d+)_(image|label)(?i:\.nii\.gz)", rule):
        files[match[2]][match[1]] = path
    if not files["image"]:
        raise UDAError(f"{folder} holds no image (found: {contents(folder)}); expected {rule}. Check -i.")
    images, labels = files["image"], files["label"]
    return {
        number: Case(f"{modality}_{number}", (images[number],), labels.get(number), label_map, read_label=read_label)
        for number in check_pairs(images, labels, rule)
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", type=Path, required=True, metavar="VENDOR_TREE", help="folder with ct_train and mr_train")
    add_directions(parser, ("mr", "ct"))
    protocols.add_structures(parser, tuple(VALUES), " ".join(USUAL), USUAL)
    protocols.add_arguments(parser, "1003")


def convert(args: argparse.Namespace, warnings: list[str]) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    label_map = class_map(
        {value: name for name, value in VALUES.items()}, args.structures,
        hint="Correct the label file: only 421 and pieces on the border are repaired.",
    )  # fmt: skip
    label_map = replace(label_map, files={**label_map.values, 421: label_map.values[420]})
    source, target = (
        Domain(
            modality.upper(), find_cases(args.i, modality, label_map), SIFA_TEST[modality], args.i / f"{modality}_train"
        )
        for modality in (args.source, args.target)
    )
    protocols.write_adaptation(
        "MMWHS", source, target, args.structures, INFORMATION, args, warnings, "heart", "MM-WHS 2017",
        skip_unlabelled=False,
    )  # fmt: skip


if __name__ == "__main__":
    run_alone(__doc__, add_arguments, convert)
