"""Any data: folders of images, one 3D file (or folder of DICOM slices) per case and channel.

    -source_images DIR -source_labels DIR    labelled source, all used for training
    -target_images DIR                       unlabelled target, used for training
    [-target_test_images DIR [-target_test_labels DIR]]
                                             held-out target scans; labels for evaluation alone
    [-target_labels DIR [-target_folds N]]   labels of the target training scans, for evaluation alone: with
                                             -target_folds each fold trains without its part and tests on it; without,
                                             the model is tested on scans that it saw (unlabelled) in training
    [-target_few_labels DIR]                 labels of a few of the target training scans, which ARE trained on; or
                                             -few N, which takes them from -target_labels

Each option takes folders, single files or quoted patterns ('img/*_t2.nii.gz'). A scan may also be a folder of DICOM
slices: one such folder, or one of folders, each with the one series of a case at any depth, which is called as its
folder (ct/P1/<study>/<series>/*.dcm is P1; 'ct/*/*/t2*' chooses among several series). An image and its label have the
same name up to the ending (a.nii.gz, a.nrrd); images may end in a channel number, as nnU-Net's do (a_0000.nii.gz,
a_0001.nii.gz with the label a.nii.gz). Where exactly one image and one label are given they need not match. Case ids
are the names behind the domain's name (CT_a), so that source and target never collide.

    -labels liver=5 spleen=1 kidneys=2,3     classes 1, 2, 3; the label files hold the values behind the =

Values not named are an error, unless --ignore_other_labels sends them to background. Voxels and orientation stay, and
nothing is cropped. Intensities are clipped, each domain by itself: one called CT (CTA, CT_late, ...) at a window in HU,
found around the labelled structures where the source is CT, else that of soft tissue (-160 240); any other at the
percentiles 0.5 and 99.5 of every scan. -source_intensities and -target_intensities change it; nnUNetv2_predict does the
same to new scans of the target. Target labels are read for labelsTs alone, but for the few that are asked for. With
--upper_bound they ARE used for training: the same options and -target_labels then write the supervised upper bound's
dataset, in which the target's training scans are the labelled ones; source scans are left out.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

import SimpleITK as sitk

from nnunet_uda.dataset_conversion.case import Case
from nnunet_uda.dataset_conversion.dataset import write_dataset
from nnunet_uda.dataset_conversion.options import (
    add_upper_bound,
    channel_names,
    dataset_options,
    intensity_request,
    run_alone,
)
from nnunet_uda.dataset_conversion.protocols import ids, make_groups
from nnunet_uda.dataset_conversion.splits import folds_of, source_folds
from nnunet_uda.errors import UDAError, some
from nnunet_uda.images.dicom import (
    NOT_SLICES,
    dicom_files,
    dicom_in,
    is_dicom,
    read_header,
    read_series,
    series_folders,
)
from nnunet_uda.images.geometry import Grid
from nnunet_uda.images.listing import contents, files_in, folders_below, folders_in, passed_over
from nnunet_uda.images.reading import ENDINGS, LabelMap, check_same_geometry, parse_labels, read_image, read_label, stem
from nnunet_uda.names import check_name

EXAMPLE = (
    "nnUNetUDA_convert folders -d 521 -name Heart -source cine -target LGE -source_images cine/ -source_labels "
    "cine_labels/ -target_images lge/ -labels LV=1 myocardium=2"
)


def read_scan(path: Path) -> sitk.Image:
    """The volume of an image file, or of a folder of DICOM slices."""
    return read_series(path) if _is_series(path) else read_image(path)


def read_scan_label(path: Path, image: sitk.Image, image_path: Path) -> tuple[sitk.Image, list[str]]:
    """``reading.read_label``; a folder of DICOM slices may hold labels too, and an image file those of one.

    Converters from DICOM to NIfTI turn axes round, so a label of DICOM slices is turned back, voxel for voxel.
    """
    if not _is_series(path) and not _is_series(image_path):
        return read_label(path, image, image_path)
    label = read_scan(path)
    turned = sitk.DICOMOrient(label, Grid.of(image).code)
    check_same_geometry(image, image_path, turned, path)
    notes = (
        [] if turned.GetDirection() == label.GetDirection() else [f"{path.name}: axes turned to those of the slices"]
    )
    return turned, notes


def list_scans(inputs: Sequence[str], option: str, warnings: list[str]) -> dict[str, Path]:
    """Image files and folders of DICOM slices by their names, of folders, files and patterns.

    Raises:
        UDAError: for an input that holds neither, a DICOM file by itself, several series where one is expected, and two
            of one name.
    """
    files: list[Path] = []
    series: list[tuple[Path, Path]] = []  # what was given, as far as it is the same for all cases, and a folder in it
    for text in inputs:
        path = Path(text)
        base = path if path.exists() else Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(text))]
        found = [p for p in found if not any(map(passed_over, p.relative_to(base).parts))]
        folders = [p for p in found if p.is_dir()]
        named = [p for p in found if p not in folders and not passed_over(p.name)]
        if not found:
            raise UDAError(f"{text} ({option}): no such folder or file; check the path.")
        for file in named:
            if not _is_image(file) and is_dicom(file):
                raise UDAError(_single_dicom(file, option))
        if not named:
            for folder in folders:
                images, below = _in_folder(folder, option, warnings)
                files += images
                series += [(base, inside) for inside in below]
        files += named
    scans: dict[str, Path] = {}
    for name, path in [*((stem(p), p) for p in dict.fromkeys(files)), *_series_names(series, option)]:
        if other := scans.get(name):
            raise UDAError(f"{path}: its case id {name} is already that of {other}; rename or remove one of them.")
        scans[name] = path
    _warn_of_one_study(dict.fromkeys(folder for _, folder in series), option, warnings)
    return dict(sorted(scans.items()))


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS)


def _is_series(path: Path) -> bool:
    return path.is_dir() and not _is_image(path)


def _in_folder(folder: Path, option: str, warnings: list[str]) -> tuple[list[Path], list[Path]]:
    """Image files in a folder, or else the folders of DICOM slices in it: itself, or any below."""
    inside = files_in(folder)
    images = [path for path in inside if _is_image(path)]
    if images:
        if slices := [path for path in inside if path not in images and is_dicom(path)]:
            raise UDAError(
                f"{folder} ({option}) holds images, as {images[0].name}, and DICOM files, as {slices[0].name}; "
                "expected one kind. Move one of them to a folder of its own."
            )
        deeper = [path for below in folders_in(folder) for inner in folders_below(below) for path in files_in(inner)]
        if left := next((path for path in deeper if _is_image(path) or is_dicom(path)), None):
            warnings.append(
                f"{folder} ({option}) holds images, as {images[0].name}, which are taken, and folders with others, as "
                f"{left.relative_to(folder)}, which are not"
            )
        return images, []
    series = series_folders(folder)
    if len(series) > 1 and series[0] == folder:
        raise UDAError(
            f"{folder} ({option}) holds DICOM slices, and so does {series[1]} below it; expected a folder of slices, "
            "or one of folders. Move the slices of each series to a folder of its own."
        )
    if not series:
        others = [path for below in folders_below(folder) for path in dicom_in(below)]
        if others:
            raise UDAError(_single_dicom(others[0], option))
        raise UDAError(
            f"{folder} ({option}) holds no image (found: {contents(folder)}); expected files ending in "
            f"{', '.join(ENDINGS)}, or folders of DICOM slices. For other formats name the files, or a pattern."
        )
    return [], series


def _single_dicom(path: Path, option: str) -> str:
    modality = read_header(path, "Modality", "SOPClassUID").modality
    if modality in NOT_SLICES:
        return (
            f"{path} ({option}): a DICOM file of modality {modality}; expected "
            + ("label files" if option.endswith("labels") else "the slices of a scan")
            + ", or folders of DICOM slices. Convert it to NIfTI (dcmrtstruct2nii for RTSTRUCT, segimage2itkimage of "
            "dcmqi for SEG)."
        )
    return (
        f"{path} ({option}): a DICOM file, which is one slice of a series; expected the folder of the whole series. "
        f"Give {path.parent}, or the folder that holds such folders, one for each case; or convert to NIfTI (dcm2niix)."
    )


def _series_names(series: Sequence[tuple[Path, Path]], option: str) -> list[tuple[str, Path]]:
    """Cases are called as the folder below the given one that holds their slices at any depth, or as that itself."""
    series = list(dict.fromkeys(series))

    def name(base: Path, folder: Path) -> str:
        parts = folder.relative_to(base).parts
        return parts[0] if parts else os.path.basename(os.path.realpath(folder))

    by_case: dict[tuple[Path, str], list[Path]] = {}
    for base, folder in series:
        by_case.setdefault((base, name(base, folder)), []).append(folder)
    for (base, case), folders in by_case.items():
        if len(folders) > 1:
            inside = [folder.relative_to(base / case) for folder in folders]
            raise UDAError(
                f"{base / case} ({option}): {len(folders)} series in the folder of one case ({some(inside)}); expected "
                f"one. Name those wanted with a quoted pattern, as '{base / '*' / inside[0]}'."
            )
    names = [case for _, case in by_case]
    folders = [folder for _, folder in series]
    if len(set(names)) < len(names):  # P1/t1 and P2/t1, each given by itself
        common_base = Path(os.path.commonpath(folders))
        names = [name(common_base, folder) for folder in folders]
    return list(zip(names, folders, strict=True))


def _warn_of_one_study(folders: Iterable[Path], option: str, warnings: list[str]) -> None:
    studies: dict[str, Path] = {}
    for folder in folders:
        study = read_header(dicom_files(folder)[0], "StudyInstanceUID").text("StudyInstanceUID")
        if study and (other := studies.setdefault(study, folder)) != folder:
            warnings.append(f"{other} and {folder} ({option}) are series of one study: each is taken as a case")


def group_channels(scans: Mapping[str, Path], single_channel: bool) -> dict[str, tuple[Path, ...]]:
    """Scans by case name. ``a_0000``, ``a_0001`` are channels of ``a`` where there is an ``a_0000``."""
    cases: dict[str, dict[int, Path]] = {}
    for name, path in scans.items():
        match = re.fullmatch(r"(.+)_(\d{4})", name)
        case, number = name, 0
        if match and f"{match[1]}_0000" in scans and not single_channel:
            case, number = match[1], int(match[2])
        if other := cases.setdefault(case, {}).get(number):
            raise UDAError(f"{path}: its case id {case} is already that of {other}; rename or remove one of them.")
        cases[case][number] = path
    for name, channels in cases.items():
        if sorted(channels) != list(range(len(channels))):
            raise UDAError(
                f"{channels[max(channels)]}: case {name} has the channels "
                f"{', '.join(f'{c:04d}' for c in sorted(channels))}; expected 0000, 0001, ... without a gap. "
                "Add the missing file, or use --single_channel if these "
                "numbers are not channels."
            )
    return {name: tuple(channels[c] for c in sorted(channels)) for name, channels in cases.items()}


def make_cases(
    images: Mapping[str, tuple[Path, ...]], labels: Mapping[str, Path], prefix: str, label_map: LabelMap
) -> list[Case]:
    """Cases with their labels, matched by name. A label without an image is refused."""
    left = dict(labels)
    if len(images) == len(labels) == 1:
        left = dict(zip(images, labels.values(), strict=True))
    cases = []
    for name, files in images.items():
        label = left.pop(name, None) or left.pop(f"{name}_0000", None)
        cases.append(
            Case(_identifier(name, prefix), files, label, label_map if label else None, read_scan, read_scan_label)
        )
    if left:
        name, path = next(iter(left.items()))
        for case, files in images.items():
            if name in map(stem, files):
                raise UDAError(
                    f"{path}: its image of the same name was read as a channel of the case {case}, as names that end "
                    "in _0000, _0001, ... are; expected one label for all channels of a case. Use --single_channel if "
                    "these numbers count cases."
                )
        raise UDAError(
            f"{path}: no image belongs to this label (images: {some(images)}); expected an image of the same name. "
            "Rename it, or remove the label."
        )
    return cases


def check_channels(cases: Sequence[Case]) -> None:
    """Raise ``UDAError`` where cases have different numbers of channels: mostly numbers in names that count cases."""
    fewest, most = (choose(cases, key=lambda case: len(case.images)) for choose in (min, max))
    if len(fewest.images) < len(most.images):
        raise UDAError(
            f"{fewest.images[0]}: this case has {len(fewest.images)} channel(s), that of {most.images[0]} has "
            f"{len(most.images)}, since names that end in _0000, _0001, ... are channels of one case; expected equal "
            "channels in source and target. Use --single_channel if these numbers count cases; else name the channels "
            "of every case so."
        )


def _identifier(name: str, prefix: str) -> str:
    clean = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-") or "case"
    return clean if clean.lower().startswith(prefix.lower() + "_") else f"{prefix}_{clean}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for option, required, text in (
        ("-source_images", True, "labelled source images"),
        ("-source_labels", True, "their labels"),
        ("-target_images", True, "unlabelled target images"),
        ("-target_labels", False, "labels of the target images, for evaluation alone"),
        ("-target_few_labels", False, "labels of a few of the target images, for training"),
        ("-target_test_images", False, "held-out target images"),
        ("-target_test_labels", False, "their labels, for evaluation alone"),
    ):
        parser.add_argument(option, nargs="+", required=required, metavar="PATH", help=text)
    parser.add_argument("-labels", nargs="+", required=True, metavar="NAME=VALUE", help="structures, see above")
    parser.add_argument("-source", required=True, metavar="DOMAIN", help="name of the source domain, as CT")
    parser.add_argument("-target", required=True, metavar="DOMAIN", help="name of the target domain, as MR")
    parser.add_argument("-folds", type=int, metavar="N", help="folds of the source cases [5, or one per case if fewer]")
    parser.add_argument("-target_folds", type=int, metavar="N", help="folds of the target cases, see above [none]")
    parser.add_argument("--ignore_other_labels", action="store_true", help="values not in -labels become background")
    parser.add_argument(
        "--single_channel", action="store_true", help="numbers like _0000 are part of the name, not channels"
    )
    add_upper_bound(parser)


def convert(args: argparse.Namespace, warnings: list[str]) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    structures = parse_labels(args.labels)
    label_map = LabelMap(
        {value: index for index, values in enumerate(structures.values(), 1) for value in values},
        ignore_other=args.ignore_other_labels,
        names={value: name for name, values in structures.items() for value in values},
        hint="Add them to -labels, or use --ignore_other_labels to make them background.",
    )
    for option, domain in (("-source", args.source), ("-target", args.target)):
        check_name(domain, option)
        if not re.search(r"[A-Za-z0-9]", domain):
            raise UDAError(f"domain name {domain!r}: expected a name like CT.")
    prefixes = [re.sub(r"[^A-Za-z0-9]+", "_", domain).strip("_") for domain in (args.source, args.target)]
    if prefixes[0].lower() == prefixes[1].lower():
        prefixes = ["source", "target"]
    if args.target_test_labels and not args.target_test_images:
        raise UDAError("-target_test_labels was given without -target_test_images; expected both.")
    if args.target_folds and not args.target_labels:
        raise UDAError("-target_folds was given without -target_labels; expected labels to test each fold with.")
    if args.few and args.target_few_labels:
        raise UDAError("-few was given with -target_few_labels, which says itself which scans these are; expected one.")
    if args.few and not args.target_labels:
        raise UDAError(
            "-few was given without -target_labels; expected labels to take them from. Labels of a few scans alone are "
            "given as -target_few_labels."
        )
    if args.upper_bound and (not args.target_labels or args.target_folds):
        raise UDAError("--upper_bound: expected -target_labels to train on, and no -target_folds.")

    def cases(option: str, labels: str, prefix: str) -> list[Case]:
        images = list_scans(getattr(args, option), f"-{option}", warnings)
        label_files = list_scans(getattr(args, labels), f"-{labels}", warnings) if getattr(args, labels) else {}
        return make_cases(group_channels(images, args.single_channel), label_files, prefix, label_map)

    source = cases("source_images", "source_labels", prefixes[0])
    target = cases("target_images", "target_labels", prefixes[1])
    trained_on = args.few
    if args.target_few_labels:
        with_label = {
            case.identifier: case for case in cases("target_images", "target_few_labels", prefixes[1]) if case.label
        }
        target = [with_label.get(case.identifier, case) for case in target]
        trained_on = list(with_label)
    test = cases("target_test_images", "target_test_labels", prefixes[1]) if args.target_test_images else []
    check_channels([*([] if args.upper_bound else source), *target, *test])
    labelled = target if args.upper_bound else source
    if args.folds is None:
        splits = source_folds(ids(labelled), 5, args.seed, warnings)
    else:
        splits = folds_of(ids(labelled), args.folds, args.seed)
    target_splits = folds_of(ids(target), args.target_folds, args.seed) if args.target_folds else None
    of_target, of_test = ("labelsTs" if given else None for given in (args.target_labels, args.target_test_labels))
    groups, _ = make_groups(args.source, labelled, args.target, target, test, args.upper_bound, of_target, of_test)
    name = f"{prefixes[1]}_upper_bound" if args.upper_bound else f"{prefixes[0]}2{prefixes[1]}"
    write_dataset(
        args.d, args.name or name, groups, list(structures),
        channel_names(args.channel, len(labelled[0].images)), adaptation=not args.upper_bound,
        intensities=intensity_request(args), source_splits=splits, target_splits=target_splits,
        warnings=warnings, **dataset_options(args) | {"few": trained_on},
    )  # fmt: skip


if __name__ == "__main__":
    run_alone(__doc__, add_arguments, convert)
