"""Predictions of whole volumes as labels for another training: cleaned, and left out where they are implausible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage


def keep_components(label: np.ndarray, num_structures: int, share: float) -> np.ndarray:
    """Each structure without its small connected components, which become background.

    Args:
        label: ``(Z, Y, X)`` integer, 0 is background, structures are 1 .. num_structures.
        num_structures: number of structures.
        share: a component stays if it has at least this share of its structure's largest one, from 0 (all stay) to 1.

    Returns:
        A new array. Components are connected through faces.
    """
    cleaned = label.copy()
    for structure in range(1, num_structures + 1):
        components, number = ndimage.label(label == structure)
        if number > 1:
            sizes = np.bincount(components.ravel())
            sizes[0] = sizes[1:].max()
            small = sizes < share * sizes[0]
            cleaned[small[components]] = 0
    return cleaned


def structure_volumes(label: np.ndarray, num_structures: int, spacing: Sequence[float]) -> np.ndarray:
    """``(num_structures,)`` volumes in cubic mm of a label ``(Z, Y, X)``; ``spacing`` in mm, in any order."""
    counts = np.bincount(label.ravel().astype(np.int64), minlength=num_structures + 1)
    return counts[1 : num_structures + 1] * float(np.prod(spacing))


def implausible_structures(volumes: np.ndarray, known: np.ndarray, factor: float) -> list[int]:
    """The structures (from 1) whose volume no labelled case makes plausible.

    Plausible is from the least known volume divided by ``factor`` to the greatest times ``factor``. A structure that is
    absent is plausible where a known case lacks it too.

    Args:
        volumes: ``(S,)``, of the case in question.
        known: ``(N, S)``, of N labelled cases, in the same unit.
        factor: at least 1.
    """
    found = []
    for structure, volume in enumerate(volumes):
        seen = known[:, structure]
        present = seen[seen > 0]
        if volume == 0:
            plausible = len(present) < len(seen)
        else:
            plausible = len(present) > 0 and present.min() / factor <= volume <= present.max() * factor
        if not plausible:
            found.append(structure + 1)
    return found
