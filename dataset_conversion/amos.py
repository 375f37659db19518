"""AMOS22 (Multi-Modality Abdominal Multi-Organ Segmentation), CT <-> MR, 15 organs or a choice.

Expected tree (-i), as Zenodo distributes it; imagesTs has no labels and is not used:

    VENDOR_TREE/imagesTr/amos_0001.nii.gz ...   labelsTr/amos_0001.nii.gz ...    200 CT, 40 MR
    VENDOR_TREE/imagesVa/amos_0008.nii.gz ...   labelsVa/amos_0008.nii.gz ...    100 CT, 20 MR
    VENDOR_TREE/dataset.json

Numbers below 500 are CT, the others MR. The two are of other patients.

Data: https://zenodo.org/records/7262581 and https://amos22.grand-challenge.org (under the terms stated there). Please
cite Ji et al., AMOS, NeurIPS Datasets and Benchmarks, 2022.

Classes are numbered as given to -structures; the other organs become background. Without it they are the 13 organs
that both modalities show: few MR scans reach down to bladder and prostate or uterus (-structures all takes them, too).
Organs that lie outside of a scan's field are missing in its label, which is no fault. Images are never cropped; oblique
and flipped headers are kept, and followed by nnU-Net's reader. Nothing is repaired. A scan for imagesTr without a label
is left out with a warning; --strict refuses it.

Protocols:
  (none)  the vendor's split. Source: its scans in imagesTr, in 4 seeded folds. Target: its scans in imagesVa are the
          test set, to imagesTs and labelsTs; those in imagesTr go to imagesTu without labels, used in every fold. With
          -test_ids these target scans are the test set instead, and the source is used whole, imagesVa included;
          -protocol cisfa takes both folders together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunet_uda.dataset_conversion import protocols
from nnunet_uda.dataset_conversion.case import Case, check_pairs, class_map, numbered, once
from nnunet_uda.dataset_conversion.options import add_directions, run_alone
from nnunet_uda.dataset_conversion.protocols import Domain
from nnunet_uda.errors import UDAError
from nnunet_uda.images.listing import contents, folders_in

EXAMPLE = "nnUNetUDA_convert amos -i amos22 -d 511 -source ct -target mr"

STRUCTURES = (
    "spleen", "right_kidney", "left_kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
    "inferior_vena_cava", "pancreas", "right_adrenal_gland", "left_adrenal_gland", "duodenum", "bladder",
    "prostate_or_uterus",
)  # fmt: skip
"""Values 1 to 15."""
IN_BOTH = STRUCTURES[:13]
FIRST_MR = 500
PARTS = ("Tr", "Va")
INFORMATION = {"reference": "https://zenodo.org/records/7262581", "licence": "AMOS22: the terms stated on its page"}


def dataset_folder(tree: Path) -> Path | None:
    """The folder of ``imagesTr`` and ``labelsTr``: ``tree`` or one in it, None where there is no such tree."""
    folders = (tree, *folders_in(tree)) if tree.is_dir() else ()
    return next((f for f in folders if (f / "imagesTr").is_dir() and (f / "labelsTr").is_dir()), None)


def find_domain(tree: Path, modality: str, structures: Sequence[str]) -> Domain:
    """A modality's cases by number, labels attached where the file exists (it is not opened); imagesVa are the test."""
    rule = "imagesTr/amos_<number>.nii.gz and labelsTr/amos_<number>.nii.gz, and the same in imagesVa and labelsVa"
    folder = dataset_folder(tree)
    if folder is None:
        raise UDAError(f"{tree}: no imagesTr and labelsTr folder (found: {contents(tree)}); expected {rule}. Check -i.")
    label_map = class_map(dict(enumerate(STRUCTURES, 1)), structures)
    images: dict[int, Path] = {}
    cases: dict[str, Case] = {}
    test: list[str] = []
    for part in PARTS:
        here, labels = (numbered(folder / f"{kind}{part}", r"amos_(\d+)", rule) for kind in ("images", "labels"))
        for number in check_pairs(here, labels, rule):
            once(images, number, here[number], "number")
            if (number < FIRST_MR) == (modality == "ct"):
                cases[str(number)] = Case(f"{modality}_{number:04d}", (here[number],), labels.get(number), label_map)
                test += [str(number)] if part == "Va" else []
    if not cases:
        raise UDAError(
            f"{folder} holds no {modality.upper()} scan among {len(images)} (found in imagesTr: "
            f"{contents(folder / 'imagesTr')}); expected {rule}, of which numbers below {FIRST_MR} are CT and "
            "the others MR. Check -i."
        )
    return Domain(modality.upper(), dict(sorted(cases.items(), key=lambda item: int(item[0]))), tuple(test), folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", type=Path, required=True, metavar="VENDOR_TREE", help="folder with imagesTr and labelsTr")
    add_directions(parser, ("ct", "mr"))
    parser.add_argument(
        "-structures", nargs="+", choices=(*STRUCTURES, "all"), default=list(IN_BOTH), metavar="NAME",
        help=f"classes 1, 2, ... among {', '.join(STRUCTURES)}, or all [all but the last two]",
    )  # fmt: skip
    protocols.add_arguments(parser, "8", vendor="AMOS22")


def convert(args: argparse.Namespace, warnings: list[str]) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    structures = list(STRUCTURES) if args.structures == ["all"] else args.structures
    if "all" in structures:
        raise UDAError(f"-structures {' '.join(structures)}: expected all, or names, not both.")
    source, target = (find_domain(args.i, modality, structures) for modality in (args.source, args.target))
    protocols.write_adaptation("AMOS", source, target, structures, INFORMATION, args, warnings, "abdomen", "AMOS22")


if __name__ == "__main__":
    run_alone(__doc__, add_arguments, convert)
