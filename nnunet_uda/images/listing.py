"""The one listing of folders that others filled: what systems leave beside people's files is passed over everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nnunet_uda.errors import UDAError

ENDINGS = (".nii.gz", ".gipl.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".hdr")
"""Of images that are taken from a folder; a file named explicitly may have any ending that SimpleITK reads."""
LEFT_BY_SYSTEMS = frozenset(
    "__macosx,icon\r,thumbs.db,ehthumbs.db,desktop.ini,$recycle.bin,lost+found,@eadir,#recycle,#snapshot,"
    "system volume information".split(",")
)
"""Names in lower case. Names that begin with a dot (``._scan.nii.gz``, ``.DS_Store``) are passed over too."""


def passed_over(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was left by a system, and so is nobody's data."""
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


def entries(folder: Path) -> list[Path]:
    """Files and folders in ``folder`` by name, without what is ``passed_over``.

    Raises:
        UDAError: when the folder is missing or may not be listed.
    """
    try:
        return sorted(path for path in Path(folder).iterdir() if not passed_over(path.name))
    except OSError as error:
        raise UDAError(
            f"{folder}: cannot be listed ({error.strerror}); expected a folder. Check the path and its permissions."
        ) from None


def files_in(folder: Path) -> list[Path]:
    """Files of ``entries``. What reading will refuse by name counts, too: links that lead nowhere, and folders (as some
    programs unpack an image), pipes and devices that are called as an image."""
    return [path for path in entries(folder) if path.is_file() or not path.exists() or _called_as_an_image(path)]


def _called_as_an_image(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS)


def folders_in(folder: Path) -> list[Path]:
    """Folders of ``entries``, without those that count as files."""
    return [path for path in entries(folder) if path.is_dir() and not _called_as_an_image(path)]


def folders_below(folder: Path) -> Iterator[Path]:
    """``folder`` and every folder below it by name, each before what it holds. Links are followed, but in no circle."""
    waiting: list[tuple[Path, frozenset[str]]] = [(Path(folder), frozenset())]
    while waiting:
        here, above = waiting.pop()
        if (real := os.path.realpath(here)) not in above:
            yield here
            waiting += [(inside, above | {real}) for inside in reversed(folders_in(here))]


def contents(folder: Path) -> str:
    """The first names in ``folder``, for messages that say what was found."""
    if not folder.is_dir():
        return "no such folder"
    return ", ".join([path.name for path in entries(folder)][:8]) or "nothing"
