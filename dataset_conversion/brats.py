"""BraTS (brain tumours, adult glioma), any two of t1, t1ce, t2 and flair.

Expected tree (-i): the training set of ONE of these years, files .nii or .nii.gz, case folders at any depth. The year
is read from the names, and the label values follow from the year.

    2018  {HGG,LGG}/Brats18_2013_10_1/Brats18_2013_10_1_{t1,t1ce,t2,flair,seg}.nii.gz            labels 1, 2, 4
    2019  {HGG,LGG}/BraTS19_2013_10_1/BraTS19_2013_10_1_{t1,t1ce,t2,flair,seg}.nii.gz            labels 1, 2, 4
    2020  MICCAI_BraTS2020_TrainingData/BraTS20_Training_001/BraTS20_Training_001_{t1,...}.nii   labels 1, 2, 4
    2021  BraTS2021_00000/BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz                          labels 1, 2, 4
    2023  BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz                   labels 1, 2, 3
    2024  BraTS-GLI-02060-100/BraTS-GLI-02060-100-{t1n,t1c,t2w,t2f,seg}.nii.gz                   labels 1, 2, 3, 4

1 is the necrotic and non-enhancing core, 2 the oedema; the enhancing tumour is 4 until 2021 and 3 from 2023 on. In 2024
(after treatment: the last number is 100 or more) 4 is the resection cavity, which the challenge counts neither to the
whole tumour nor to its core: it becomes background here. Other BraTS sets (MEN, MET, PED, SSA) are refused.

Data: https://www.med.upenn.edu/cbica/brats2020/data.html (2018 to 2020), https://www.synapse.org/Synapse:syn25829067
(2021), syn51156910 (2023) and syn53708249 (2024). Registration; for research, under the terms stated there, which ask
for citations: Menze et al., IEEE TMI 34(10), 2015; Bakas et al., Scientific Data 4, 2017; Baid et al.,
arXiv:2107.02314.

Repaired, and listed in the summary:
  W39_1998.09.19_Segm.nii    in BraTS20_Training_355 is that case's segmentation

Split (the paper UUDS's, in all protocols), by patient, drawn with -seed from the sorted patients: all scans of a
patient are in one group.
  143 source              imagesTr and labelsTr, "train" of splits_final.json
   21 source validation   imagesTr and labelsTr, "val" of splits_final.json (one fold: train with fold 0)
  143 target              imagesTu, "train" of splits_target.json
   21 target validation   imagesTu, "val" of splits_target.json: not trained on, and their labels are not converted, so
                          nothing is chosen by them. (The paper tuned on them; here the source's validation decides.)
   41 target test          imagesTs and labelsTs
Other numbers of patients are split in these proportions, with a warning. -test_ids names the test patients instead.
A case without -source or -target is left out with a warning before the split, or refused with --strict.

Target labels are read for labelsTs alone. With --upper_bound they ARE used for training: it writes the supervised
upper bound's dataset, target and target validation patients WITH their labels as imagesTr and labelsTr, to be trained
with a plain trainer and tested on the same test patients.

Intensities are clipped at the percentiles 0.5 and 99.5 of the nonzero voxels (the brain) of each scan, and nnU-Net
z-scores them. -source_intensities and -target_intensities change that for one domain; for both at once:
  -protocol uuds      the paper's: clip at the 5th and 95th percentile, scale to [-1, 1], channel noNorm
  -clip 5 95          clip at others; still z-scored
  -clip 5 95 -range 0 1
                      clip and scale; channel noNorm. (nnU-Net pads with 0: the background of [0, 1], grey in [-1, 1].)
The paper does not say over which voxels; here percentiles are of the nonzero voxels (the brain) of each volume, as more
than half of a volume is empty. The empty voxels take the low end of the range, or stay 0. dataset.json records it, and
nnUNetv2_predict treats new scans likewise with a trainer of this package (else: nnUNetUDA_intensities).

-structures regions writes nnU-Net regions (whole tumour, tumour core, enhancing tumour). nnU-Net's own trainers take
them; the trainers and the evaluation of this package refuse them, so use it with --upper_bound or for a plain nnU-Net.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from nnunet_uda.dataset_conversion.case import Case, once
from nnunet_uda.dataset_conversion.dataset import skip_or_refuse
from nnunet_uda.dataset_conversion.options import add_directions, intensity_request, run_alone
from nnunet_uda.dataset_conversion.protocols import Parts, arrange_patients, refuse_unknown, split_patients, write
from nnunet_uda.dataset_conversion.windows import IntensityRequest
from nnunet_uda.errors import UDAError
from nnunet_uda.images import reading
from nnunet_uda.images.intensities import Intensities
from nnunet_uda.images.listing import contents, folders_below, folders_named, nifti_files
from nnunet_uda.images.reading import LabelMap

EXAMPLE = "nnUNetUDA_convert brats -i MICCAI_BraTS2020_TrainingData -d 505 -source flair -target t2"

MODALITIES = {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR"}
SEGMENTATION = "seg"
OEDEMA, CORE, ENHANCING, CAVITY = "oedema", "non-enhancing core", "enhancing tumour", "resection cavity"
WHOLE = "whole tumour"
CLASSES = (OEDEMA, CORE, ENHANCING)
"""Classes 1, 2, 3 of ``-structures regions``; the order in which nnU-Net paints the regions back into labels."""
REGIONS = {WHOLE: [1, 2, 3], "tumour core": [2, 3], ENHANCING: [3]}
PATIENTS = {"source": 143, "target": 143, "source validation": 21, "target validation": 21, "test": 41}
"""UUDS, section 4.1, of the 369 patients of BraTS 2020."""
UUDS_INTENSITIES = Intensities((5, 95), (-1, 1), origin="-protocol uuds")
MISNAMED = {"brats20_training_355": "w39_1998.09.19_segm"}
"""Case folder -> its segmentation's name, both in lower case, without ending."""


@dataclass(frozen=True)
class Naming:
    """One year's names and label values.

    Args:
        folder: pattern of a case folder, ignoring case; its first group is the patient.
        suffixes: modality (or ``seg``) -> what follows the case's name in a file name.
        labels: label value -> structure.
        page: where the data is to be had.
    """

    folder: str
    suffixes: dict[str, str]
    labels: dict[int, str]
    page: str


_OLD = {name: f"_{name}" for name in (*MODALITIES, SEGMENTATION)}
_NEW = {"t1": "-t1n", "t1ce": "-t1c", "t2": "-t2w", "flair": "-t2f", SEGMENTATION: "-seg"}
_BEFORE_2023 = {1: CORE, 2: OEDEMA, 4: ENHANCING}
_SINCE_2023 = {1: CORE, 2: OEDEMA, 3: ENHANCING}
_CBICA = "https://www.med.upenn.edu/cbica/brats2020/data.html"
_SYNAPSE = "https://www.synapse.org/Synapse:"
NAMINGS = {
    "2018": Naming(r"(brats18_\w+)_\d+", _OLD, _BEFORE_2023, _CBICA),
    "2019": Naming(r"(brats19_\w+)_\d+", _OLD, _BEFORE_2023, _CBICA),
    "2020": Naming(r"(brats20_training_\d+)", _OLD, _BEFORE_2023, _CBICA),
    "2021": Naming(r"(brats2021_\d+)", _OLD, _BEFORE_2023, _SYNAPSE + "syn25829067"),
    "2023": Naming(r"(brats-gli-\d+)-0\d\d", _NEW, _SINCE_2023, _SYNAPSE + "syn51156910"),
    "2024": Naming(r"(brats-gli-\d+)-[1-9]\d\d", _NEW, _SINCE_2023 | {4: CAVITY}, _SYNAPSE + "syn53708249"),
}


@dataclass(frozen=True)
class Visit:
    """One case folder: a patient's scans at one time. ``patient`` in lower case; ``files``: modality or seg -> path."""

    name: str
    patient: str
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)


def read_label(path: Path, image: sitk.Image, image_path: Path) -> tuple[sitk.Image, list[str]]:
    """The label on the image's grid; a note if it is the misnamed one."""
    label, notes = reading.read_label(path, image, image_path)
    if MISNAMED.get(path.parent.name.lower()) == reading.stem(path).lower():
        notes.append(f"{path.name}: misnamed, taken as the segmentation of {path.parent.name}")
    return label, notes


def find_visits(tree: Path) -> tuple[str, list[Visit]]:
    """The year of the tree's naming, and all of its cases sorted by name. No image is opened."""
    tree = Path(os.path.abspath(tree))
    rule = "one year's training set, case folders like BraTS20_Training_001 or BraTS-GLI-00000-000 (see -h)"
    visits: list[Visit] = []
    folders: dict[str, Path] = {}
    found_year = ""
    for folder in folders_below(tree) if tree.is_dir() else ():
        folders_named(folder, "|".join(naming.folder for naming in NAMINGS.values()), "BraTS20_Training_001")
        images = nifti_files(folder)
        year, match = next(
            ((y, m) for y, naming in NAMINGS.items() if (m := re.fullmatch(naming.folder, folder.name, re.I))),
            ("", None),
        )
        if match is None:
            if images:
                raise UDAError(
                    f"{images[0]}: its folder is not named as a case of BraTS {', '.join(NAMINGS)}; expected {rule}. "
                    "Other BraTS sets number their labels differently. Rename or remove the file, or correct -i."
                )
            continue
        if found_year and year != found_year:
            raise UDAError(
                f"{folder} is named as BraTS {year}, {visits[0].folder} as BraTS {found_year}; expected {rule}, as the "
                "label values differ and a patient may be in both years. Convert one year at a time."
            )
        found_year = year
        once(folders, folder.name.lower(), folder, "case")
        files = _files(images, folder, NAMINGS[year])
        visits.append(Visit(folder.name, match[1].lower(), folder, files))
    if not visits:
        raise UDAError(f"{tree} holds no BraTS case (found: {contents(tree)}); expected {rule}. Check -i.")
    return found_year, sorted(visits, key=lambda visit: visit.name.lower())


def _files(images: Sequence[Path], folder: Path, naming: Naming) -> dict[str, Path]:
    names = {f"{folder.name}{suffix}".lower(): kind for kind, suffix in naming.suffixes.items()}
    if folder.name.lower() in MISNAMED:
        names[MISNAMED[folder.name.lower()]] = SEGMENTATION
    files: dict[str, Path] = {}
    for path in images:
        kind = names.get(reading.stem(path).lower())
        if kind is None:
            raise UDAError(
                f"{path}: unexpected file; expected only {folder.name}{{{','.join(naming.suffixes.values())}}} in this "
                "folder. If it belongs to another patient move it there, else rename or remove it."
            )
        if kind in files:
            raise UDAError(f"{path}: {files[kind].name} is this case's {kind} too; expected one. Remove one of them.")
        files[kind] = path
    return files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", type=Path, required=True, metavar="VENDOR_TREE", help="folder of one year's training set")
    add_directions(parser, MODALITIES)
    parser.add_argument(
        "-structures", choices=("whole", "regions"), default="whole", help="one class, or nnU-Net regions [whole]"
    )
    parser.add_argument("-protocol", choices=("uuds",), help="also clip and scale as the paper does [split only]")
    text = "clip both domains at these percentiles of the brain"
    parser.add_argument("-clip", nargs=2, type=float, metavar=("LOW", "HIGH"), help=text)
    parser.add_argument("-range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="with -clip: scale to this range")
    parser.add_argument("-test_ids", nargs="+", metavar="ID", help="test cases or patients instead of drawn ones")


def convert(args: argparse.Namespace, warnings: list[str]) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    request = _intensities(args)
    year, visits = find_visits(args.i)
    visits = _complete(visits, args, NAMINGS[year], warnings)
    if not visits:
        scans = " and ".join(f"CASE{NAMINGS[year].suffixes[m]}.nii[.gz]" for m in (args.source, args.target))
        raise UDAError(
            f"{args.i}: none of its cases of BraTS {year} has both scans; expected {scans} in each case's folder. "
            "Check -source, -target and -i."
        )
    patients = {visit.patient for visit in visits}
    groups, few = split_patients(sorted(patients), PATIENTS, args.seed, _test_patients(visits, args), args.i)
    warnings += few
    print(f"Patients: {', '.join(f'{len(members)} {group}' for group, members in groups.items())}")

    classes = CLASSES if args.structures == "regions" else (WHOLE,)
    label_map = _label_map(year, classes)

    def parts(domain: str, modality: str, labelled: bool) -> Parts:
        training, validation = (cases(group, modality, labelled) for group in (domain, f"{domain} validation"))
        return training, validation

    def cases(group: str, modality: str, labelled: bool = True) -> list[Case]:
        return [
            Case(
                f"{visit.name}_{modality}", (visit.files[modality],),
                visit.files.get(SEGMENTATION) if labelled else None, label_map, read_label=read_label,
            )
            for visit in visits
            if visit.patient in groups[group]
        ]  # fmt: skip

    names = MODALITIES[args.source], MODALITIES[args.target]
    target = parts("target", args.target, args.upper_bound or bool(args.few))
    labelled = target if args.upper_bound else parts("source", args.source, True)
    test, split = cases("test", args.target), "split of UUDS"
    plan = arrange_patients(names, labelled, target, test, args.upper_bound, split)
    plan = replace(plan, description=f"BraTS {year}, {plan.description}")
    information: dict[str, Any] = {
        "reference": NAMINGS[year].page,
        "licence": "BraTS terms: research use after registration, with citation",
    }
    if args.structures == "regions":
        information["labels"] = {"background": 0, **REGIONS}
        information["regions_class_order"] = [1, 2, 3]
        if not args.upper_bound:
            warnings.append(
                "-structures regions: nnU-Net's own trainers take regions, but the trainers of this package refuse "
                "them. To adapt, convert with -structures whole"
            )
    scaled = isinstance(request.target, Intensities) and request.target.scale is not None
    if scaled and args.channel and args.channel[0].lower() != "nonorm":
        warnings.append(
            f"-channel {args.channel[0]}: nnU-Net normalises the scaled intensities again; noNorm keeps them"
        )
    name = f"BraTS_{names[1]}_upper_bound" if args.upper_bound else f"BraTS_{names[0]}2{names[1]}"
    write(name, plan, classes, information, request, args, warnings, ["noNorm"] if scaled else None)


def _intensities(args: argparse.Namespace) -> IntensityRequest:
    of_domains = [f"-{d}_intensities" for d in ("source", "target") if getattr(args, f"{d}_intensities")]
    if of_domains and (args.protocol or args.clip or args.range):
        other = "-protocol uuds" if args.protocol else "-clip" if args.clip else "-range"
        raise UDAError(f"{other} is for both domains: leave it out, or {' and '.join(of_domains)}.")
    if args.protocol and (args.clip or args.range):
        raise UDAError("-protocol uuds clips at 5 95 and scales to -1 1: leave out -clip and -range, or -protocol.")
    if args.range and not args.clip:
        raise UDAError("-range scales what -clip leaves; give -clip LOW HIGH too, as -clip 5 95.")
    if not (args.protocol or args.clip):
        return intensity_request(args)
    both = UUDS_INTENSITIES
    if args.clip:
        both = Intensities(tuple(args.clip), tuple(args.range) if args.range else None, origin="-clip")
    return IntensityRequest(both, both)


def _label_map(year: str, classes: Sequence[str]) -> LabelMap:
    labels = NAMINGS[year].labels
    index = {structure: classes.index(structure) + 1 if structure in classes else 1 for structure in CLASSES}
    return LabelMap(
        {value: index.get(structure, 0) for value, structure in labels.items()},
        names=labels,
        hint=f"These are the labels of BraTS {year}, which the file's name announces. Correct the file or its name.",
    )


def _complete(visits: Sequence[Visit], args: argparse.Namespace, naming: Naming, warnings: list[str]) -> list[Visit]:
    complete = []
    for visit in visits:
        missing = [modality for modality in (args.source, args.target) if modality not in visit.files]
        if missing:
            files = " and ".join(f"{visit.name}{naming.suffixes[modality]}.nii[.gz]" for modality in missing)
            skip_or_refuse(f"{visit.folder}: there is no {files}", args.strict, warnings)
        else:
            complete.append(visit)
    return complete


def _test_patients(visits: Sequence[Visit], args: argparse.Namespace) -> list[str]:
    by_id = {name: visit.patient for visit in visits for name in (visit.name.lower(), visit.patient)}
    unknown = [name for name in args.test_ids or () if name.lower() not in by_id]
    refuse_unknown(args.i, "-test_ids", unknown, f"cases or patients like {visits[0].name}")
    return sorted({by_id[name.lower()] for name in args.test_ids or ()})


if __name__ == "__main__":
    run_alone(__doc__, add_arguments, convert)
