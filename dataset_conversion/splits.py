"""Folds in nnU-Net's form, and which target training scans are trained on with their labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from nnunet_uda.dataset_conversion.case import Group
from nnunet_uda.errors import UDAError, some


def folds_of(identifiers: Sequence[str], folds: int, seed: int) -> list[dict[str, list[str]]]:
    """Disjoint validation folds in nnU-Net's form: the sorted ids permuted by ``numpy.random.RandomState(seed)``."""
    ids = sorted(identifiers)
    if not 2 <= folds <= len(ids):
        raise UDAError(
            f"{folds} folds were asked for, with {len(ids)} cases ({some(ids)}); expected at least 2 folds and one "
            "case in each. Ask for fewer folds, or give more cases."
        )
    parts = np.array_split(np.random.RandomState(seed).permutation(ids), folds)
    return [{"train": [i for i in ids if i not in set(part)], "val": sorted(str(i) for i in part)} for part in parts]


def source_folds(identifiers: Sequence[str], folds: int, seed: int, warnings: list[str]) -> list[dict[str, list[str]]]:
    """Folds of the labelled cases, fewer where there are too few cases, which is added to the warnings."""
    ids = sorted(identifiers)
    if len(ids) == 1:
        warnings.append(
            f"only one labelled case ({ids[0]}): the one fold trains and validates on it, so its validation score "
            "measures nothing"
        )
        return [{"train": ids, "val": ids}]
    used = min(folds, len(ids))
    if 0 < used < folds:
        warnings.append(f"only {len(ids)} labelled cases: {used} folds instead of {folds}")
    return folds_of(ids, used, seed) if ids else []


def choose_labelled(target: Group, asked: Sequence[str], seed: int) -> Group:
    """``target`` with the scans that are trained on with their labels.

    Args:
        asked: what ``-few`` was given: a number, or ids of scans. A number takes the first of the scans that have a
            label, in an order by ``seed``: those of a smaller number are among those of a greater.

    Raises:
        UDAError: a scan that is no target training scan or has no label, or more than there are.
    """
    ids = sorted(case.identifier for case in target.cases)
    candidates = sorted(case.identifier for case in target.cases if case.label and case.label_map)
    if len(asked) == 1 and asked[0].isdecimal():
        number = int(asked[0])
        if not 1 <= number <= len(candidates):
            raise UDAError(
                f"-few {asked[0]}: {len(candidates)} of the {len(ids)} {target.domain} training scans have a label "
                f"({some(candidates) or 'none'}); expected a number "
                f"from 1 to {len(candidates)}, or ids. Ask for fewer, or give more labels."
            )
        chosen = np.random.RandomState(seed).permutation(candidates)[:number].tolist()
    else:
        chosen = list(dict.fromkeys(asked))
    for identifier in chosen:
        if identifier not in candidates:
            fact = "has no label" if identifier in ids else f"is no {target.domain} training scan"
            raise UDAError(
                f"-few: {identifier} {fact}; expected a number, or some of {some(candidates, 10) or '(none)'}. Correct "
                "the id, or give its label."
            )
    return replace(target, labelled=frozenset(chosen))


def splits_with_labelled(splits: list[dict[str, list[str]]], labelled: Collection[str]) -> list[dict[str, list[str]]]:
    """Folds of the target in which every labelled scan is trained on, and none tested.

    Raises:
        UDAError: a fold has nothing left to test on.
    """
    for fold, split in enumerate(splits):
        if split["val"] and set(split["val"]) <= set(labelled):
            raise UDAError(
                f"-few: all test scans of the target's fold {fold} ({', '.join(split['val'])}) are trained on with "
                "their labels; expected one that is not. Ask for fewer, or for fewer folds."
            )
    return [
        {
            "train": sorted({*split["train"], *labelled}),
            "val": [identifier for identifier in split["val"] if identifier not in labelled],
        }
        for split in splits
    ]
