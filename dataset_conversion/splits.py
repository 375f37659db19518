"""Folds in nnU-Net's form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunet_uda.errors import UDAError


def folds_of(identifiers: Sequence[str], folds: int, seed: int) -> list[dict[str, list[str]]]:
    """Disjoint validation folds in nnU-Net's form: the sorted ids permuted by ``numpy.random.RandomState(seed)``."""
    ids = sorted(identifiers)
    if not 2 <= folds <= len(ids):
        raise UDAError(
            f"{folds} folds were asked for, with {len(ids)} cases ({', '.join(ids[:5])}"
            f"{' ...' if len(ids) > 5 else ''}); expected at least 2 folds and one case in each. "
            "Ask for fewer folds, or give more cases."
        )
    parts = np.array_split(np.random.RandomState(seed).permutation(ids), folds)
    return [{"train": [i for i in ids if i not in set(part)], "val": sorted(str(i) for i in part)} for part in parts]


def source_folds(identifiers: Sequence[str], folds: int, seed: int) -> tuple[list[dict[str, list[str]]], list[str]]:
    """Folds of the labelled cases, fewer where there are too few cases, with warnings that say so."""
    ids = sorted(identifiers)
    if not ids:
        return [], []
    if len(ids) == 1:
        return [{"train": ids, "val": ids}], [
            f"only one labelled case ({ids[0]}): the one fold trains and validates on it, so its validation score "
            "measures nothing"
        ]
    used = min(folds, len(ids))
    warnings = [f"only {len(ids)} labelled cases: {used} folds instead of {folds}"] if used < folds else []
    return folds_of(ids, used, seed), warnings
