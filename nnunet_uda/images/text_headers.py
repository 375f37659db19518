"""Headers of MetaImage and NRRD, which are text: what ITK passes over in them without a word.

ITK reads numbers in any unit as mm, takes 1 mm and the body's axes where a header says neither, and names the header
where the file of the voxels is missing.
"""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_uda.errors import UDAError, shown

_META, _NRRD = (".mha", ".mhd"), (".nrrd", ".nhdr")
_LONGEST = 1 << 16
"""Bytes of a header that are looked at."""
_OTHER_UNITS = re.compile(
    r"(cm|dm|m|um|µm|nm|microns?|in|inch(es)?|(centi|deci|micro|nano)?met(er|re)s?)", re.IGNORECASE
)


def has_text_header(path: Path) -> bool:
    return path.name.lower().endswith(_META + _NRRD)


def check_text_header(path: Path) -> str:
    """What a user should know about the geometry, mostly empty.

    Raises:
        UDAError: for lengths in another unit than mm, and where the file of the voxels is missing.
    """
    fields = _fields(path)
    data = fields.get("elementdatafile") or fields.get("data file") or fields.get("datafile") or "LOCAL"
    beside = path.parent / data
    if data.split()[0].upper() not in ("LOCAL", "LIST") and "%" not in data and not beside.is_file():
        raise UDAError(f"{path}: its data file {shown(data)} is missing; expected it beside this file.")
    units = re.findall(r'"([^"]*)"', fields.get("space units", fields.get("units", "")))
    if other := next((unit for unit in units if _OTHER_UNITS.fullmatch(unit.strip())), None):
        raise UDAError(
            f"{path}: its axes are in {shown(other)}, which is read as mm; expected mm. Write the header anew in mm."
        )
    missing = []
    if not {"elementspacing", "elementsize", "spacings", "space directions"} & set(fields):
        missing.append("no voxel size, so 1 mm is a guess of the reader")
    if not {"transformmatrix", "orientation", "rotation", "space directions"} & set(fields):
        missing.append("no orientation, so which side is left is a guess of the reader")
    return (
        f"{path.name}: its header holds {' and '.join(missing)}: compare the picture with the scan" if missing else ""
    )


def _fields(path: Path) -> dict[str, str]:
    """Values by their keys in lower case; the lines up to the voxels alone."""
    with open(path, "rb") as file:
        lines = file.read(_LONGEST).decode("latin-1").splitlines()
    meta = path.name.lower().endswith(_META)
    fields: dict[str, str] = {}
    for line in lines:
        key, separator, value = line.partition("=" if meta else ":")
        if separator:
            fields.setdefault(key.strip().lower(), value.strip())
        if "elementdatafile" in fields if meta else not line.strip():
            break
    return fields
