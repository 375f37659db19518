"""Any data: folders of images, one 3D file per case and channel, in every format that SimpleITK reads.

    -source_images DIR -source_labels DIR    labelled source, all used for training
    -target_images DIR                       unlabelled target, used for training
    [-target_test_images DIR [-target_test_labels DIR]]
                                             held-out target scans; labels for evaluation alone
    [-target_labels DIR [-target_folds N]]   labels of the target training scans, for evaluation alone: with
                                             -target_folds each fold trains without its part and tests on it; without,
                                             the model is tested on scans that it saw (unlabelled) in training

Each option takes folders, single files or quoted patterns ('img/*_t2.nii.gz'). An image and its label have the same
name up to the ending (a.nii.gz, a.nrrd); images may end in a channel number, as nnU-Net's do (a_0000.nii.gz,
a_0001.nii.gz with the label a.nii.gz). Where exactly one image and one label are given they need not match. Case ids
are the names behind the domain's name (CT_a), so that source and target never collide.

    -labels liver=5 spleen=1 kidneys=2,3     classes 1, 2, 3; the label files hold the values behind the =

Values not named are an error, unless --ignore_other_labels sends them to background. Intensities, voxels and
orientation are kept; nothing is cropped. Target labels are read for labelsTs alone. With --upper_bound they ARE used
for training: the same options and -target_labels then write the supervised upper bound's dataset, in which the target's
training scans are the labelled ones; source scans are left out.
"""

from __future__ import annotations

import argparse
import glob
import re
from collections.abc import Sequence
from pathlib import Path

from nnunet_uda.data.reading import ENDINGS, LabelMap, stem
from nnunet_uda.dataset_conversion import common
from nnunet_uda.dataset_conversion.common import Case, Group
from nnunet_uda.errors import UDAError


def list_files(inputs: Sequence[str], option: str) -> list[Path]:
    """Image files of folders, files and patterns, sorted by name."""
    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
            found = [p for p in inside if p.name.lower().endswith(ENDINGS)]
            if not found:
                others = ", ".join(sorted(p.name for p in inside)[:5]) or "nothing"
                raise UDAError(
                    f"{path} ({option}) holds no image (found: {others}); expected files ending in "
                    f"{', '.join(ENDINGS)}. For other formats name the files, or a pattern."
                )
        else:
            found = [path] if path.is_file() else [Path(p) for p in glob.glob(text) if Path(p).is_file()]
            if not found:
                raise UDAError(f"{text} ({option}): no such folder or file; check the path.")
        files += found
    return sorted(dict.fromkeys(files), key=lambda p: (p.name, str(p)))


def group_channels(files: Sequence[Path], single_channel: bool) -> dict[str, tuple[Path, ...]]:
    """Image files by case name. ``a_0000``, ``a_0001`` are channels of ``a`` where there is an ``a_0000``."""
    stems: dict[str, Path] = {}
    for path in files:
        if other := stems.get(stem(path)):
            raise UDAError(
                f"{path}: its case id {stem(path)} is already that of {other}; rename or remove one of them."
            )
        stems[stem(path)] = path
    cases: dict[str, dict[int, Path]] = {}
    for name, path in stems.items():
        match = re.fullmatch(r"(.+)_(\d{4})", name)
        if match and f"{match[1]}_0000" in stems and not single_channel:
            cases.setdefault(match[1], {})[int(match[2])] = path
        else:
            cases.setdefault(name, {})[0] = path
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
    images: dict[str, tuple[Path, ...]], labels: Sequence[Path], prefix: str, label_map: LabelMap
) -> list[Case]:
    """Cases with their labels, matched by name. A label without an image is refused."""
    by_stem: dict[str, Path] = {}
    for path in labels:
        if other := by_stem.get(stem(path)):
            raise UDAError(f"{path}: there is a second label of this name, {other}; expected one. Remove one of them.")
        by_stem[stem(path)] = path
    if len(images) == len(labels) == 1:
        by_stem = {next(iter(images)): labels[0]}
    cases = []
    for name, files in images.items():
        names = (name, f"{name}_0000") if stem(files[0]) != name else (name,)
        label = next((by_stem.pop(n) for n in names if n in by_stem), None)
        cases.append(Case(_identifier(name, prefix), files, label, label_map if label else None))
    if by_stem:
        path = next(iter(by_stem.values()))
        raise UDAError(
            f"{path}: no image belongs to this label (images: {', '.join(list(images)[:5])}"
            f"{' ...' if len(images) > 5 else ''}); expected an image of the same name. Rename it, or remove the label."
        )
    return cases


def _identifier(name: str, prefix: str) -> str:
    clean = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-") or "case"
    return clean if clean.lower().startswith(prefix.lower() + "_") else f"{prefix}_{clean}"


def parse_labels(arguments: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``["liver=5", "kidneys=2,3"]`` -> values by name, in order."""
    structures: dict[str, tuple[int, ...]] = {}
    owner: dict[int, str] = {}
    for text in arguments:
        match = re.fullmatch(r"([^=]+)=(-?\d{1,6}(?:,-?\d{1,6})*)", text)
        if not match:
            raise UDAError(f"-labels {text}: expected name=value or name=value,value with whole numbers, as liver=5.")
        name, values = match[1].strip(), tuple(int(v) for v in match[2].split(","))
        if name in structures:
            raise UDAError(f"-labels {text}: {name} is named twice; give all its values at once, as {name}=2,3.")
        for value in values:
            if value == 0 or owner.setdefault(value, name) != name:
                raise UDAError(
                    f"-labels {text}: value {value} is already {owner.get(value, 'the background')}; expected every "
                    "value in one structure, and 0 in none."
                )
        structures[name] = values
    if len(structures) > 254:
        raise UDAError(f"-labels: {len(structures)} structures; expected at most 254.")
    return structures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for option, required, text in (
        ("-source_images", True, "labelled source images"),
        ("-source_labels", True, "their labels"),
        ("-target_images", True, "unlabelled target images"),
        ("-target_labels", False, "labels of the target images, for evaluation alone"),
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
    parser.add_argument(
        "--upper_bound", action="store_true", help="write the supervised dataset of the target, WITH target labels"
    )
    common.add_common_arguments(parser)


def convert(args: argparse.Namespace) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    structures = parse_labels(args.labels)
    label_map = LabelMap(
        {value: index for index, values in enumerate(structures.values(), 1) for value in values},
        ignore_other=args.ignore_other_labels,
        names={value: name for name, values in structures.items() for value in values},
        hint="Add them to -labels, or use --ignore_other_labels to make them background.",
    )
    for domain in (args.source, args.target):
        if not re.search(r"[A-Za-z0-9]", domain):
            raise UDAError(f"domain name {domain!r}: expected a name like CT.")
    prefixes = [re.sub(r"[^A-Za-z0-9]+", "_", domain).strip("_") for domain in (args.source, args.target)]
    if prefixes[0].lower() == prefixes[1].lower():
        prefixes = ["source", "target"]
    if args.target_test_labels and not args.target_test_images:
        raise UDAError("-target_test_labels was given without -target_test_images; expected both.")
    if args.target_folds and not args.target_labels:
        raise UDAError("-target_folds was given without -target_labels; expected labels to test each fold with.")
    if args.upper_bound and (not args.target_labels or args.target_folds):
        raise UDAError("--upper_bound: expected -target_labels to train on, and no -target_folds.")

    def cases(option: str, labels: str, prefix: str) -> list[Case]:
        images = list_files(getattr(args, option), f"-{option}")
        label_files = list_files(getattr(args, labels), f"-{labels}") if getattr(args, labels) else []
        return make_cases(group_channels(images, args.single_channel), label_files, prefix, label_map)

    source = cases("source_images", "source_labels", prefixes[0])
    target = cases("target_images", "target_labels", prefixes[1])
    test = cases("target_test_images", "target_test_labels", prefixes[1]) if args.target_test_images else []
    labelled = target if args.upper_bound else source
    ids = [case.identifier for case in labelled]
    if args.folds is not None:
        splits, few = common.folds_of(ids, args.folds, args.seed), []
    else:
        splits, few = common.source_folds(ids, 5, args.seed)
    target_splits = None
    if args.target_folds:
        target_splits = common.folds_of([case.identifier for case in target], args.target_folds, args.seed)
    held_out = Group(args.target, test, "imagesTs", "labelsTs" if args.target_test_labels else None)
    if args.upper_bound:
        name, groups = f"{prefixes[1]}_upper_bound", [Group(args.target, target, "imagesTr", "labelsTr"), held_out]
    else:
        unlabelled = Group(args.target, target, "imagesTu", "labelsTs" if args.target_labels else None)
        name = f"{prefixes[0]}2{prefixes[1]}"
        groups = [Group(args.source, source, "imagesTr", "labelsTr"), unlabelled, held_out]
    common.write_dataset(
        args.d, args.name or name, groups, list(structures),
        common.channel_names(args.channel, len(labelled[0].images)), adaptation=not args.upper_bound,
        source_splits=splits, target_splits=target_splits, warnings=few, overwrite=args.overwrite, strict=args.strict,
        processes=args.np,
    )  # fmt: skip


main = common.script(__doc__, add_arguments, convert)

if __name__ == "__main__":
    main()
