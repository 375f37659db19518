"""One rule for names - of labels, channels, domains, cases, datasets, plans and runs - and how tables carry them.

A name is printed, drawn, and written to JSON, CSV, Markdown and HTML. It may hold any letters and signs; what would
break a line, steer a terminal, turn the writing's direction or be no text at all is refused where it comes in.
"""

from __future__ import annotations

from typing import Any

from nnunet_uda.errors import UDAError, shown

MOST_BYTES = 200
"""In UTF-8. A file's name has 255 at most, and others are made of a dataset's or a case's by additions."""
MEAN = "mean over structures"
"""A row of every table, and so no structure's name."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""First characters (the last four: full-width) of what a spreadsheet takes for a formula."""


def is_text(name: str) -> bool:
    """Whether ``name`` can be written as UTF-8: a file's name that is no UTF-8 has lone surrogates in Python."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_name(name: Any) -> bool:
    """Whether ``name`` is a string of 1 to ``MOST_BYTES`` bytes, all of it printable and not only spaces.

    Not printable are control characters, line breaks, escape sequences, marks of writing direction and other marks
    without width, lone surrogates and characters that do not exist.
    """
    return isinstance(name, str) and name.isprintable() and bool(name.strip()) and len(name.encode()) <= MOST_BYTES


def is_plain_name(name: Any) -> bool:
    """Whether ``name`` is a name that can be (the main part of) a file's, and leads nowhere outside a folder."""
    return is_name(name) and name not in (".", "..") and not set(name) & set("/\\")


def check_name(name: Any, where: str, file: bool = False) -> str:
    """Check a name and return it.

    Args:
        where: the option or file and what is named there, for the message.
        file: it becomes (a part of) a file's name.

    Raises:
        UDAError: naming what was found.
    """
    if not (is_plain_name if file else is_name)(name):
        path = ", and no path" if file else ""
        raise UDAError(
            f"{where}: {shown(name)} cannot be a name. A name has 1 to {MOST_BYTES} bytes that can be printed: no line "
            f"breaks, control characters or marks of writing direction{path}. Choose another"
        )
    return name


def spreadsheet_cell(value: Any) -> Any:
    """``value`` for a CSV file: text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(value, str) or not value.lstrip(" ").startswith(_FORMULA) or _is_number(value):
        return value
    return f"'{value}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
