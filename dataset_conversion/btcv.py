"""BTCV (Multi-Atlas Labeling Beyond the Cranial Vault, abdomen), CT: a supervised dataset of its 13 organs.

Expected tree (-i), as Synapse distributes it; Testing has no labels and is not used:

    VENDOR_TREE/RawData/Training/img/img0001.nii.gz       ... 0010, 0021 ... 0040
    VENDOR_TREE/RawData/Training/label/label0001.nii.gz   ... 0010, 0021 ... 0040

Data: https://www.synapse.org/Synapse:syn3193805 (free for research after registration with Synapse, under the terms
stated there, not to be passed on). Please cite Landman et al., MICCAI Multi-Atlas Labeling Beyond the Cranial Vault,
2015.

A copy renumbered 1 to 30 circulates. It is refused: from 11 on its numbers are other patients, so that the test sets of
papers (1, 9, 30, 32, 33, 39) would be other scans. Nothing is repaired; voxels and orientation are kept. Intensities
(HU) are clipped at a window, the preset abdomen unless -source_intensities says otherwise.

Classes are numbered as given to -structures; the other organs become background. The channel is called CT, so nnU-Net
clips and scales HU (-channel intensity: z-score per image). Scans of -test_ids go to imagesTs and labelsTs; the others
to imagesTr and labelsTr, in 5 seeded folds. For adaptation between BTCV and CHAOS's MR: nnUNetUDA_convert abdomen.

A scan without a label is left out with a warning; --strict refuses it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_uda.dataset_conversion import protocols
from nnunet_uda.dataset_conversion.case import Case, check_pairs, class_map, numbered
from nnunet_uda.dataset_conversion.options import run_alone
from nnunet_uda.dataset_conversion.protocols import Domain
from nnunet_uda.errors import UDAError
from nnunet_uda.images.listing import contents

EXAMPLE = "nnUNetUDA_convert btcv -i BTCV -d 520"

VALUES = {
    "spleen": 1, "right_kidney": 2, "left_kidney": 3, "gallbladder": 4, "oesophagus": 5, "liver": 6, "stomach": 7,
    "aorta": 8, "inferior_vena_cava": 9, "portal_and_splenic_veins": 10, "pancreas": 11, "right_adrenal_gland": 12,
    "left_adrenal_gland": 13,
}  # fmt: skip
NUMBERS = (*range(1, 11), *range(21, 41))
SIFA_TEST = ("1", "9", "30", "32", "33", "39")
INFORMATION = {
    "reference": "https://www.synapse.org/Synapse:syn3193805",
    "licence": "BTCV: Synapse's terms, research use after registration, not to be passed on",
}


def training_folder(tree: Path) -> Path | None:
    """The folder of ``img`` and ``label`` in ``tree``, None where there is no such tree."""
    folders = (tree / "RawData" / "Training", tree / "Training", tree)
    return next((f for f in folders if (f / "img").is_dir() and (f / "label").is_dir()), None)


def find_domain(tree: Path, structures: Sequence[str]) -> Domain:
    """Cases by number, classed in the order of ``structures``; a label is attached where its file exists, unopened."""
    training = training_folder(tree)
    rule = "img/img<number>.nii.gz and label/label<number>.nii.gz, numbers 0001-0010 and 0021-0040"
    if training is None:
        raise UDAError(
            f"{tree}: no img and label folder (found: {contents(tree)}); expected RawData/Training/{rule}. Check -i."
        )
    images, labels = (numbered(training / kind, rf"{kind}(\d+)", rule) for kind in ("img", "label"))
    if not images:
        folder = training / "img"
        raise UDAError(f"{folder} holds no image (found: {contents(folder)}); expected {rule}. Check -i.")
    for number, path in sorted({**labels, **images}.items()):
        if 11 <= number <= 20:
            raise UDAError(
                f"{path}: BTCV has no training scan {number}; expected numbers 1-10 and 21-40. This is a copy "
                "renumbered 1-30, in which the numbers from 11 on are other patients: the fixed test set "
                f"({', '.join(SIFA_TEST)}) would name other scans, and no result could be compared. Get the original "
                "from Synapse, or give the files their original numbers."
            )
        if number not in NUMBERS:
            raise UDAError(f"{path}: BTCV has no training scan {number}; expected {rule}. Remove or rename the file.")
    label_map = class_map({value: name for name, value in VALUES.items()}, structures)
    cases = {
        str(number): Case(f"ct_{number:04d}", (images[number],), labels.get(number), label_map)
        for number in check_pairs(images, labels, rule)
    }
    return Domain("CT", cases, SIFA_TEST, training)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", type=Path, required=True, metavar="VENDOR_TREE", help="folder with RawData/Training")
    protocols.add_structures(parser, tuple(VALUES))
    protocols.add_supervised_arguments(parser, "9", "none")


def convert(args: argparse.Namespace, warnings: list[str]) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    domain = replace(find_domain(args.i, args.structures), test=())
    protocols.write_supervised("BTCV", domain, args.structures, INFORMATION, args, warnings, "abdomen", "BTCV abdomen")


if __name__ == "__main__":
    run_alone(__doc__, add_arguments, convert)
