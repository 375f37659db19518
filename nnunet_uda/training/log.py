"""What a training's log says, for people to read."""

from __future__ import annotations

import json
from typing import Any


def in_columns(title: str, values: dict[str, float]) -> str:
    """Names over their values, two lines::

    losses      segmentation  self_training
                      0.5066         0.2692
    """
    cells = {name: f"{value:.4f}" for name, value in values.items()}
    names = "  ".join(name.rjust(len(cell)) for name, cell in cells.items())
    numbers = "  ".join(cell.rjust(len(name)) for name, cell in cells.items())
    return f"{title:<10}  {names}\n{'':<10}  {numbers}"


def settings_table(settings: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The settings that differ from their defaults, one a line, with the default; methods' by ``method.name``."""
    ours, theirs = flat(settings), flat(defaults)
    rows = [(name, json.dumps(value), json.dumps(theirs.get(name))) for name, value in ours.items()
            if value != theirs.get(name)]  # fmt: skip
    if not rows:
        return "Settings: all at their defaults (nnUNetUDA_configure --list)"
    header = ("setting", "here", "default")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(3)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(["Settings that differ from their defaults:", *(f"  {line.rstrip()}" for line in lines)])


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with those of a method as ``method.name``."""
    found = {}
    for name, value in settings.items():
        found.update(
            {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        )
    return found
