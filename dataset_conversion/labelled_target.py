"""Which target training scans are trained on with their labels, and what that makes of the target's folds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from nnunet_uda.dataset_conversion.case import Group
from nnunet_uda.errors import UDAError


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
                f"({', '.join(candidates[:5]) or 'none'}{' ...' if len(candidates) > 5 else ''}); expected a number "
                f"from 1 to {len(candidates)}, or ids. Ask for fewer, or give more labels."
            )
        chosen = np.random.RandomState(seed).permutation(candidates)[:number].tolist()
    else:
        chosen = list(dict.fromkeys(asked))
    for identifier in chosen:
        if identifier not in candidates:
            fact = "has no label" if identifier in ids else f"is no {target.domain} training scan"
            raise UDAError(
                f"-few: {identifier} {fact}; expected a number, or some of {', '.join(candidates[:10]) or '(none)'}"
                f"{' ...' if len(candidates) > 10 else ''}. Correct the id, or give its label."
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
