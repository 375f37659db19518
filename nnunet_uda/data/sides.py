"""Structures that come in pairs, told by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

WORDS = {"left": "right", "links": "rechts", "l": "r", "lt": "rt", "lh": "rh"}
LONG = 4
"""Letters from which a word counts inside of another one: leftkidney."""


def paired_names(names: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of names that differ only in a word for left and its word for right, the left one first.

    Words are parted by anything that is no letter or digit, or by a capital: left_kidney, KidneyLeft, "kidney (L)",
    hippocampus.lh. Short ones (l, lt, lh) count as whole words alone.
    """
    by_form = {_form(name): name for name in names}
    pairs = []
    for form, name in by_form.items():
        for left, right in WORDS.items():
            pattern = left if len(left) >= LONG else rf"(?<![a-z0-9]){left}(?![a-z0-9])"
            other = by_form.get(re.sub(pattern, right, form))
            if other is not None and other != name:
                pairs.append((name, other))
    return pairs


def _form(name: str) -> str:
    """In small letters, its words parted by single spaces."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return re.sub(r"[\W_]+", " ", parted).strip().lower()
