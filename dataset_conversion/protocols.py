"""Splits: SIFA's and the vendors' fixed test sets, CISFA's folds, UUDS's shares of patients who have both scans."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from nnunet_uda.data.convention import is_ct
from nnunet_uda.dataset_conversion.case import Case, Group
from nnunet_uda.dataset_conversion.dataset import skip_or_refuse, write_dataset
from nnunet_uda.dataset_conversion.options import channel_names, dataset_options, intensity_request
from nnunet_uda.dataset_conversion.splits import folds_of, source_folds
from nnunet_uda.errors import UDAError
from nnunet_uda.images.intensities import DEFAULT

FOLDS = 4
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
    """Arguments of ``write_dataset``, and a few words on what the dataset is."""

    groups: list[Group]
    source_splits: list[dict[str, list[str]]]
    target_splits: list[dict[str, list[str]]] | None
    description: str


def number(text: str) -> str:
    """argparse type of a case number: ``0009`` and ``9`` are the same."""
    return str(int(text))


def add_structures(parser: argparse.ArgumentParser, names: Sequence[str], default: str = "all") -> None:
    """Option -structures: which of ``names``, all by default, are the classes 1, 2, ...; ``default`` says so."""
    parser.add_argument(
        "-structures", nargs="+", choices=tuple(names), default=list(names), metavar="NAME",
        help=f"classes 1, 2, ... among {', '.join(names)} [{default}]",
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
        source_splits = folds_of([case.identifier for case in labelled], FOLDS, args.seed)
        target_splits = folds_of([case.identifier for case in training], FOLDS, args.seed)
    else:
        source_splits, few = source_folds([case.identifier for case in labelled], FOLDS, args.seed)
        warnings += few

    groups = [Group(source.name, labelled, "imagesTr", "labelsTr")]
    if args.upper_bound:
        groups = [Group(target.name, labelled, "imagesTr", "labelsTr")]
        what, target_splits = f"supervised upper bound, trained WITH {target.name} labels", None
    else:
        groups.append(Group(target.name, training, "imagesTu", "labelsTs" if cisfa else None))
        what = f"{source.name} to {target.name}"
    groups.append(Group(target.name, test, "imagesTs", "labelsTs"))
    split = f"protocol {args.protocol}" if args.protocol else args.split.removeprefix("-")
    return Arrangement(groups, source_splits, target_splits, f"{what}, {split}, seed {args.seed}")


def with_label(cases: list[Case], strict: bool, warnings: list[str]) -> list[Case]:
    """The cases that have a label; for the others a warning, or a ``UDAError`` when ``strict``."""
    for case in cases:
        if case.label is None:
            skip_or_refuse(f"{case.images[0]}: there is no label for this scan", strict, warnings)
    return [case for case in cases if case.label is not None]


def named_cases(domain: Domain, numbers: Sequence[str]) -> list[Case]:
    """The cases of ``-test_ids``, each once; ``UDAError`` for one that is not there."""
    if missing := [n for n in numbers if n not in domain.cases]:
        raise UDAError(
            f"{domain.folder}: -test_ids names {', '.join(missing)}, which is not there; expected some of "
            f"{', '.join(domain.cases)}."
        )
    return [domain.cases[n] for n in dict.fromkeys(numbers)]


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
    default_name = f"{target.name}_upper_bound" if args.upper_bound else f"{source.name}2{target.name}"
    write_dataset(
        args.d, args.name or f"{prefix}_{default_name}", plan.groups, structures, channel_names(args.channel, 1),
        adaptation=not args.upper_bound, source_splits=plan.source_splits, target_splits=plan.target_splits,
        information={"description": f"{title}, {plan.description}", **information},
        intensities=intensity_request(args, preset, None if args.protocol else DEFAULT),
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
    splits, few = source_folds([case.identifier for case in training], 5, args.seed)
    warnings += few
    request = intensity_request(args, preset)
    if request.target == DEFAULT:  # both options are of the one domain that there is
        request = replace(request, target=request.source)
    channels = args.channel or (["CT"] if is_ct(domain.name) else None)
    write_dataset(
        args.d, args.name or name,
        [Group(domain.name, training, "imagesTr", "labelsTr"), Group(domain.name, test, "imagesTs", "labelsTs")],
        structures, channel_names(channels, 1), adaptation=False, source_splits=splits,
        information={"description": f"{title}, supervised, seed {args.seed}", **information}, intensities=request,
        warnings=warnings, **dataset_options(args),
    )  # fmt: skip


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
