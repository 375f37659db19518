"""Splits: SIFA's and the vendors' fixed test sets, CISFA's folds, UUDS's shares of patients who have both scans."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nnunet_uda.data.convention import is_ct
from nnunet_uda.dataset_conversion.case import Case, Group
from nnunet_uda.dataset_conversion.dataset import skip_or_refuse, write_dataset
from nnunet_uda.dataset_conversion.options import channel_names, dataset_options, intensity_request
from nnunet_uda.dataset_conversion.splits import folds_of, source_folds
from nnunet_uda.dataset_conversion.windows import IntensityRequest
from nnunet_uda.errors import UDAError
from nnunet_uda.images.intensities import DEFAULT

FOLDS = 4
HELP = """
  cisfa   4 disjoint, seeded folds of volumes in both domains. All target images go to imagesTu, their labels to
          labelsTs; fold k trains on the rest and tests on splits_target.json[k]["val"].

Target labels are read for labelsTs alone. With --upper_bound they ARE used for training: it writes the supervised upper
bound's dataset, the same target training scans WITH their labels as imagesTr and labelsTr, to be trained with a plain
trainer. With -protocol cisfa its splits_final.json holds the target's folds: test with checkpoint_final.pth, as
nnU-Net's best checkpoint is chosen on the test fold.
"""
"""What a converter's own text ends with, behind its other protocol."""
Parts = tuple[list[Case], list[Case]]
"""For training and for validation."""
Patient = TypeVar("Patient", int, str)


@dataclass(frozen=True)
class Domain:
    """One modality.

    Args:
        name: as in ``dataset.json``, e.g. MR.
        cases: by the vendor's number.
        test: numbers of its fixed test set; empty where nobody fixes one.
        folder: where the cases lie, for messages.
    """

    name: str
    cases: dict[str, Case]
    test: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Arrangement:
    """Groups and folds of a dataset, and a few words on what it is."""

    groups: list[Group]
    source_splits: list[dict[str, list[str]]]
    target_splits: list[dict[str, list[str]]] | None
    description: str


def number(text: str) -> str:
    """argparse type of a case number: ``0009`` and ``9`` are the same."""
    return str(int(text))


def add_structures(
    parser: argparse.ArgumentParser, names: Sequence[str], default: str = "all", chosen: Sequence[str] | None = ()
) -> None:
    """Option -structures: which of ``names`` are the classes 1, 2, ...

    Args:
        default: says what they are without the option.
        chosen: what they are then: all unless given, None where the converter decides.
    """
    parser.add_argument(
        "-structures", nargs="+", choices=tuple(names), metavar="NAME",
        default=list(names) if chosen == () else chosen, help=f"classes 1, 2, ... among {', '.join(names)} [{default}]",
    )  # fmt: skip


def add_arguments(
    parser: argparse.ArgumentParser, example: str, vendor: str | None = None, kind: Callable[[str], str] = number
) -> None:
    """Options that ``arrange`` reads.

    Args:
        example: a case number.
        vendor: whose fixed test set there is, in place of SIFA's.
        kind: argparse type of a case number.
    """
    parser.description = (parser.description or "") + HELP
    names = ("cisfa",) if vendor else ("sifa", "cisfa")
    parser.set_defaults(split=f"the split of {vendor}" if vendor else "-protocol sifa")
    parser.add_argument(
        "-protocol", choices=names, help=f"split, see above; where given, without clipping [{vendor or 'sifa'}'s split]"
    )
    parser.add_argument(
        "-test_ids", nargs="+", type=kind, metavar="NUMBER",
        help=f"target test scans instead of {vendor or 'sifa'}'s, e.g. {example}",
    )  # fmt: skip


def arrange(
    source: Domain, target: Domain, args: argparse.Namespace, warnings: list[str], *, skip_unlabelled: bool = False
) -> Arrangement:
    """Cases to groups and folds by ``args.protocol``.

    sifa, or the vendor's split: the target's test set (or ``args.test_ids``, then with the whole source) to imagesTs,
    the rest to imagesTu; source scans outside the source's own test set, in ``FOLDS`` folds. cisfa: ``FOLDS`` folds of
    volumes in both domains, target labels to labelsTs. ``args.upper_bound``: the target's training scans with labels to
    imagesTr.

    Args:
        skip_unlabelled: leave out scans for imagesTr without a label, with a warning (an error with ``args.strict``).
            Otherwise ``write_dataset`` refuses them.
    """
    cisfa = args.protocol == "cisfa"
    if args.test_ids and cisfa:
        raise UDAError(f"-test_ids goes with {args.split}; cisfa tests on every scan once, in folds.")
    test = [] if cisfa else _test_cases(target, args, warnings)
    training = [case for case in target.cases.values() if case not in test]
    if not training:
        raise UDAError(f"{target.folder}: all of its scans are test scans; none is left to train.")
    if cisfa or args.test_ids:
        labelled = list(source.cases.values())
    else:
        labelled = [case for number, case in source.cases.items() if number not in source.test]
    if args.upper_bound:
        labelled = training
    if skip_unlabelled:
        labelled = with_label(labelled, args.strict, warnings)

    target_splits = None
    if cisfa:
        source_splits, target_splits = (folds_of(ids(cases), FOLDS, args.seed) for cases in (labelled, training))
    else:
        source_splits = source_folds(ids(labelled), FOLDS, args.seed, warnings)

    groups, what = make_groups(
        source.name, labelled, target.name, training, test, args.upper_bound, "labelsTs" if cisfa else None
    )
    split = f"protocol {args.protocol}" if args.protocol else args.split.removeprefix("-")
    return Arrangement(groups, source_splits, None if args.upper_bound else target_splits, f"{what}, {split}")


def make_groups(
    source: str,
    labelled: Sequence[Case],
    target: str,
    training: Sequence[Case],
    test: Sequence[Case],
    upper_bound: bool,
    labels: str | None = None,
    test_labels: str | None = "labelsTs",
) -> tuple[list[Group], str]:
    """Labelled source, target for training and for the test; of an upper bound ``labelled`` are the target's.

    Args:
        labels, test_labels: folders for the labels of the target's scans, for training and for the test.

    Returns:
        The groups, and a few words on what they are.
    """
    tests = Group(target, test, "imagesTs", test_labels)
    if upper_bound:
        what = f"supervised upper bound, trained WITH {target} labels"
        return [Group(target, labelled, "imagesTr", "labelsTr"), tests], what
    groups = [Group(source, labelled, "imagesTr", "labelsTr"), Group(target, training, "imagesTu", labels), tests]
    return groups, f"{source} to {target}"


def arrange_patients(
    names: tuple[str, str], labelled: Parts, target: Parts, test: Sequence[Case], upper_bound: bool, split: str
) -> Arrangement:
    """One fold of patients who were divided by ``split_patients``.

    Args:
        names: of the source domain and of the target domain.
        labelled: of the source, or of an upper bound's target.
        split: what divided them, in words.
    """
    groups, what = make_groups(
        names[0], [*labelled[0], *labelled[1]], names[1], [*target[0], *target[1]], test, upper_bound
    )
    folds = [[{"train": ids(training), "val": ids(validation)}] for training, validation in (labelled, target)]
    has_folds = target[1] and not upper_bound
    return Arrangement(groups, folds[0], folds[1] if has_folds else None, f"{what}, {split}")


def ids(cases: Sequence[Case]) -> list[str]:
    return [case.identifier for case in cases]


def with_label(cases: list[Case], strict: bool, warnings: list[str]) -> list[Case]:
    """The cases that have a label; for the others a warning, or a ``UDAError`` when ``strict``."""
    for case in cases:
        if case.label is None:
            skip_or_refuse(f"{case.images[0]}: there is no label for this scan", strict, warnings)
    return [case for case in cases if case.label is not None]


def named_cases(domain: Domain, numbers: Sequence[str]) -> list[Case]:
    """The cases of ``-test_ids``, each once; ``UDAError`` for one that is not there."""
    unknown = [n for n in numbers if n not in domain.cases]
    refuse_unknown(domain.folder, "-test_ids", unknown, f"some of {', '.join(domain.cases)}")
    return [domain.cases[n] for n in dict.fromkeys(numbers)]


def refuse_unknown(where: Path, option: str, unknown: Collection[object], expected: str) -> None:
    """Raise ``UDAError`` where an option names cases or patients that the tree ``where`` does not hold."""
    if unknown:
        raise UDAError(
            f"{where}: {option} names {', '.join(map(str, unknown))}, which is not there (or lacks a scan); expected "
            f"{expected}."
        )


def _test_cases(target: Domain, args: argparse.Namespace, warnings: list[str]) -> list[Case]:
    if args.test_ids:
        return named_cases(target, args.test_ids)
    folder, has, wanted = target.folder, ", ".join(target.cases), ", ".join(target.test)
    if not wanted:
        raise UDAError(
            f"{folder} holds {has}; {args.split} fixes no test set for {target.name}. Name the test scans with "
            "-test_ids, or use -protocol cisfa."
        )
    present = [number for number in target.test if number in target.cases]
    if not present:
        raise UDAError(
            f"{folder} holds {has}, none of which is in the fixed test set of {args.split} ({wanted}). Name the test "
            "scans with -test_ids."
        )
    if len(present) < len(target.test):
        skip_or_refuse(
            f"{folder} holds only {', '.join(present)} of the fixed test set {wanted}",
            args.strict, warnings, "the others are left out",
        )  # fmt: skip
    return [target.cases[number] for number in present]


def write_adaptation(
    prefix: str,
    source: Domain,
    target: Domain,
    structures: Sequence[str],
    information: Mapping[str, str],
    args: argparse.Namespace,
    warnings: list[str],
    preset: str,
    title: str,
    *,
    skip_unlabelled: bool = True,
) -> None:
    """``write_dataset`` for what ``arrange`` makes; named by ``prefix`` and direction unless ``-name`` is given.

    With ``-protocol`` the vendor's intensities are kept, as the papers' z-score is nnU-Net's; ``preset`` is the window
    of a CT without labels else.

    Args:
        title: whose data it is, for the dataset's description.
        skip_unlabelled: see ``arrange``.
    """
    plan = arrange(source, target, args, warnings, skip_unlabelled=skip_unlabelled)
    plan = replace(plan, description=f"{title}, {plan.description}")
    request = intensity_request(args, preset, None if args.protocol else DEFAULT)
    name = f"{target.name}_upper_bound" if args.upper_bound else f"{source.name}2{target.name}"
    write(f"{prefix}_{name}", plan, structures, information, request, args, warnings)


def write(
    name: str,
    plan: Arrangement,
    structures: Sequence[str],
    information: Mapping[str, Any],
    request: IntensityRequest,
    args: argparse.Namespace,
    warnings: list[str],
    channels: Sequence[str] | None = None,
) -> None:
    """``write_dataset`` of one channel, as ``args`` ask for it.

    Args:
        name: of the dataset, unless ``-name`` is given.
        channels: names of the channels, unless ``-channel`` is given.
    """
    write_dataset(
        args.d, args.name or name, plan.groups, structures, channel_names(args.channel or channels, 1),
        adaptation=any(group.images == "imagesTu" for group in plan.groups),
        source_splits=plan.source_splits, target_splits=plan.target_splits,
        information={"description": f"{plan.description}, seed {args.seed}", **information}, intensities=request,
        warnings=warnings, **dataset_options(args),
    )  # fmt: skip


def add_supervised_arguments(
    parser: argparse.ArgumentParser, example: str, otherwise: str, kind: Callable[[str], str] = number
) -> None:
    """The option that ``write_supervised`` reads; ``otherwise``: which scans are the test scans without it."""
    parser.add_argument(
        "-test_ids", nargs="+", type=kind, metavar="NUMBER", help=f"test scans, e.g. {example} [{otherwise}]"
    )


def write_supervised(
    name: str,
    domain: Domain,
    structures: Sequence[str],
    information: Mapping[str, str],
    args: argparse.Namespace,
    warnings: list[str],
    preset: str,
    title: str,
) -> None:
    """``write_dataset`` for one domain with its labels: no target, no ``uda``; 5 folds of the training scans.

    Args:
        name: of the dataset, unless ``-name`` is given.
        preset: see ``IntensityRequest``.
        title: what the dataset is, for its description.
    """
    if args.few:
        raise UDAError(f"-few is for datasets with an unlabelled target, and this is one of labelled {domain.name}.")
    test = named_cases(domain, args.test_ids or [n for n in domain.test if n in domain.cases])
    training = with_label([case for case in domain.cases.values() if case not in test], args.strict, warnings)
    groups = [Group(domain.name, training, "imagesTr", "labelsTr"), Group(domain.name, test, "imagesTs", "labelsTs")]
    plan = Arrangement(groups, source_folds(ids(training), 5, args.seed, warnings), None, f"{title}, supervised")
    request = intensity_request(args, preset)
    if request.target == DEFAULT:  # both options are of the one domain that there is
        request = replace(request, target=request.source)
    write(name, plan, structures, information, request, args, warnings, ["CT"] if is_ct(domain.name) else None)


def tell_apart(trees: Sequence[Path], holds: Mapping[str, Callable[[Path], object]], expected: str) -> list[Path]:
    """Vendors' trees that were given in any order, in that of ``holds``.

    Args:
        holds: by the vendor's name, whether a folder is its tree.
        expected: one of each, in words.
    """
    found = {vendor: [tree for tree in trees if is_its(tree)] for vendor, is_its in holds.items()}
    if any(len(of_vendor) != 1 for of_vendor in found.values()):
        held = [
            f"{tree} ({' and '.join(v for v, of_vendor in found.items() if tree in of_vendor) or 'neither'})"
            for tree in trees
        ]
        raise UDAError(f"-i {', '.join(held)}: expected {expected}.")
    return [of_vendor[0] for of_vendor in found.values()]


def draw_test(numbers: Sequence[str], share: float, seed: int) -> tuple[str, ...]:
    """A test set where nobody fixes one: a share of the cases, at least one, drawn with ``seed``."""
    ids = sorted(numbers)
    return tuple(sorted(np.random.RandomState(seed).permutation(ids)[: max(1, round(share * len(ids)))].tolist()))


def split_patients(
    patients: Sequence[Patient],
    shares: dict[str, int],
    seed: int,
    test: Sequence[Patient] = (),
    where: Path | str = "-i",
) -> tuple[dict[str, list[Patient]], list[str]]:
    """Patients of each group of ``shares``, in its proportions, at least one each, drawn with ``seed``; and warnings.

    Args:
        patients: names or numbers, in any order.
        shares: the paper's number of patients by group; one group is "test".
        test: the test patients, where they are given; only the others are drawn.
        where: the tree that they are in, for messages.
    """
    ids = sorted(set(patients) - set(test))
    drawn_shares = {group: n for group, n in shares.items() if group != "test" or not test}
    if len(ids) < len(drawn_shares):
        raise UDAError(
            f"{where}: {len(ids)} patients ({', '.join(map(str, ids)) or 'none'}) for {', '.join(drawn_shares)}; "
            "expected at least one in each. Give more patients."
        )
    total = sum(drawn_shares.values())
    counts = dict.fromkeys(drawn_shares, 1)
    for _ in range(len(ids) - len(counts)):
        counts[max(counts, key=lambda group: drawn_shares[group] * len(ids) / total - counts[group])] += 1
    drawn = iter(np.random.RandomState(seed).permutation(ids).tolist())
    groups = {group: sorted(next(drawn) for _ in range(count)) for group, count in counts.items()}
    if test:
        groups["test"] = sorted(set(test))
    wanted = sum(shares.values())
    if len(patients) == wanted and counts.items() <= shares.items():
        return groups, []
    return groups, [
        f"{len(patients)} patients, {len(groups['test'])} of them for testing, where the paper has {wanted} and "
        f"{shares['test']}: split in its proportions"
    ]
