"""EMIDEC (Evaluation of Myocardial Infarction), late-enhancement MR of hearts: a supervised dataset.

Expected tree (-i), as its page distributes it:

    VENDOR_TREE/Case_P001/Images/Case_P001.nii.gz   Contours/Case_P001.nii.gz    P: with infarction, N: without
    VENDOR_TREE/Case_N006/...

Cases without Contours (the challenge's test set) have no labels; they are left out here with a warning (--strict
refuses them), and are unlabelled target scans of nnUNetUDA_convert cine_lge.

Data: https://emidec.com/dataset (CC BY-NC-SA 4.0, after registration). Please cite Lalande et al., Data 5(4), 2020.

Label values: 1 LV (cavity), 2 normal myocardium, 3 infarct, 4 no_reflow. Classes are numbered as given to -structures.
No-reflow is part of the infarct, and that of the myocardium: where one is not named, its voxels count as the larger
one, so that -structures LV myocardium has the whole myocardium. Intensities are clipped at the percentiles 0.5 and 99.5
unless -source_intensities says otherwise. Nothing is repaired.

A third of the labelled cases, drawn with -seed, goes to imagesTs and labelsTs, or the cases of -test_ids instead; the
others to imagesTr and labelsTr, in 5 seeded folds.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

from nnunet_uda.dataset_conversion import protocols
from nnunet_uda.dataset_conversion.case import Case, once
from nnunet_uda.dataset_conversion.dataset import skip_or_refuse
from nnunet_uda.dataset_conversion.options import run_alone
from nnunet_uda.dataset_conversion.protocols import Domain
from nnunet_uda.errors import UDAError
from nnunet_uda.images.listing import contents, folders_in, folders_named, is_folder, nifti_files
from nnunet_uda.images.reading import LabelMap

EXAMPLE = "nnUNetUDA_convert emidec -i EMIDEC -d 514"

VALUES = {"LV": 1, "myocardium": 2, "infarct": 3, "no_reflow": 4}
PART_OF = {"no_reflow": "infarct", "infarct": "myocardium"}
TEST_SHARE = 1 / 3
RULE = "Case_<P or N><number>/Images/Case_<P or N><number>.nii.gz, and Contours with a file of the same name"
INFORMATION = {"reference": "https://emidec.com/dataset", "licence": "EMIDEC: CC BY-NC-SA 4.0"}


def number(text: str) -> str:
    """argparse type of a case number: ``P7``, ``P007`` and ``Case_P007`` are the same."""
    match = re.fullmatch(r"(?:case[_ ])?([pn]?)(\d+)", text, re.IGNORECASE)
    if not match:
        raise ValueError(text)
    return f"{match[1].upper()}{int(match[2]):03d}" if match[1] else str(int(match[2]))


def case_folders(tree: Path) -> list[Path]:
    """Folders ``Case_P001`` in ``tree`` or in a folder of it."""
    for base in (tree, *folders_in(tree)) if tree.is_dir() else ():
        if found := folders_named(base, r"Case_[PN]?\d+", "Case_P001", "case_"):
            return found
    return []


def classes(structures: list[str]) -> LabelMap:
    """EMIDEC's values to classes in the order of ``structures``; a part that is not named is what it is part of."""

    def index(name: str | None) -> int:
        if name is None:
            return 0
        return structures.index(name) + 1 if name in structures else index(PART_OF.get(name))

    return LabelMap({v: index(name) for name, v in VALUES.items()}, names={v: name for name, v in VALUES.items()})


def find_domain(tree: Path, name: str, prefix: str, label_map: LabelMap, strict: bool, warnings: list[str]) -> Domain:
    """Cases by number, labels attached where the file exists (it is not opened); no test set.

    Args:
        name, prefix: of the domain, and of its case ids.
    """
    folders = case_folders(tree)
    if not folders:
        raise UDAError(f"{tree}: no folder of a case in it (found: {contents(tree)}); expected {RULE}. Check -i.")
    found: dict[str, Path] = {}
    cases = {}
    for folder in folders:
        case = number(folder.name)
        once(found, case, folder, "case")
        image, label = (_file(folder / kind) for kind in ("Images", "Contours"))
        if image is None:
            if label is not None:
                raise UDAError(f"{label}: its image is missing; expected {RULE}. Add it, or remove the label.")
            skip_or_refuse(f"{folder}: there is no image in Images", strict, warnings)
            continue
        cases[case] = Case(f"{prefix}_{case}", (image,), label, label_map)
    if not cases:
        raise UDAError(f"{tree} holds no scan (folders of cases: {len(folders)}); expected {RULE}. Check -i.")
    return Domain(name, dict(sorted(cases.items())), (), tree)


def _file(folder: Path) -> Path | None:
    """The NIfTI file called as the case, None without one; ``UDAError`` for another one."""
    case = folder.parent.name
    files = nifti_files(folder) if is_folder(folder) else []
    own = [file for file in files if re.fullmatch(rf"{re.escape(case)}\.nii(\.gz)?", file.name, re.IGNORECASE)]
    if len(own) != len(files) or len(files) > 1:
        other = next((file for file in files if file not in own), files[-1])
        raise UDAError(f"{other}: unexpected file; expected {case}.nii.gz alone. Rename or remove it.")
    return files[0] if files else None


def with_drawn_test(domain: Domain, seed: int) -> Domain:
    """The domain with a third of its labelled cases as test set."""
    labelled = [key for key, case in domain.cases.items() if case.label is not None]
    test = protocols.draw_test(labelled, TEST_SHARE, seed) if labelled else ()
    return replace(domain, test=test)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", type=Path, required=True, metavar="VENDOR_TREE", help="folder with Case_P001, ...")
    protocols.add_structures(parser, tuple(VALUES))
    protocols.add_supervised_arguments(parser, "P007 N012", "a third, drawn", number)


def convert(args: argparse.Namespace, warnings: list[str]) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    domain = find_domain(args.i, "LGE", "lge", classes(args.structures), args.strict, warnings)
    domain = with_drawn_test(domain, args.seed)
    title = "EMIDEC late-enhancement MR"
    protocols.write_supervised("EMIDEC", domain, args.structures, INFORMATION, args, warnings, "heart", title)


if __name__ == "__main__":
    run_alone(__doc__, add_arguments, convert)
