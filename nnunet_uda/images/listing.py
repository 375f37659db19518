"""The one listing of folders that others filled: what systems leave beside people's files is passed over everywhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from nnunet_uda.errors import UDAError

ENDINGS = (".nii.gz", ".gipl.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".hdr")
"""Of images that are taken from a folder; a file named explicitly may have any ending that SimpleITK reads."""
NIFTI = (".nii.gz", ".nii")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
LEFT_BY_SYSTEMS = frozenset(
    "__macosx,icon\r,thumbs.db,ehthumbs.db,desktop.ini,$recycle.bin,lost+found,@eadir,#recycle,#snapshot,"
    "system volume information".split(",")
)
"""Names in lower case. Names that begin with a dot (``._scan.nii.gz``, ``.DS_Store``) are passed over too, and those of
files that Office keeps open (``~$scan.nii.gz``)."""


def passed_over(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was left by a system, and so is nobody's data."""
    return name.startswith((".", "~$")) or name.lower() in LEFT_BY_SYSTEMS


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


def nifti_files(folder: Path) -> list[Path]:
    """NIfTI files of ``files_in``."""
    return [path for path in files_in(folder) if path.name.lower().endswith(NIFTI)]


def _called_as_an_image(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS)


def folders_in(folder: Path) -> list[Path]:
    """Folders of ``entries``, without those that count as files.

    Raises:
        UDAError: as ``entries``; for a link without an ending that leads nowhere: a patient's folder would be missed.
    """
    return [
        path
        for path in entries(folder)
        if (path.is_dir() if path.suffix else is_folder(path)) and not _called_as_an_image(path)
    ]


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder. Raises ``UDAError`` for a link that leads nowhere: what it held would be missed."""
    if path.is_symlink() and not path.exists():
        raise UDAError(
            f"{path}: a link to {os.readlink(path)}, where there is nothing; expected a folder, or nothing of this "
            "name. Mount or restore what it leads to, or remove the link."
        )
    return path.is_dir()


def folders_named(folder: Path, pattern: str, example: str, begins: str = "") -> list[Path]:
    """Folders of ``folders_in`` whose names match ``pattern``, whatever the case of the letters.

    Args:
        example: of such a name, for messages.
        begins: how only such folders are expected to begin, in lower case; empty where others may.

    Raises:
        UDAError: for a folder that begins so and is called otherwise (``patient002 copy``), and for a file that is
            called as one, or an archive of one: a case would be missed.
    """
    named = []
    for path in entries(folder):
        bare = path.name
        while (ending := Path(bare).suffix.lower()) in ARCHIVES:
            bare = bare[: -len(ending)]
        if path.is_dir():
            if re.fullmatch(pattern, path.name, re.IGNORECASE):
                named.append(path)
            elif begins and path.name.lower().startswith(begins):
                raise UDAError(f"{path}: unexpected folder; expected names like {example}. Rename or remove it.")
        elif re.fullmatch(pattern, bare, re.IGNORECASE) and not is_folder(path) and not (folder / bare).is_dir():
            raise UDAError(f"{path}: a file; expected a folder, like {example}. Unpack it, or remove it.")
    return named


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
