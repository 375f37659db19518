"""Headers of MetaImage and NRRD, which are text: what ITK passes over in them without a word.

ITK reads numbers in any unit as mm, NaN as 0, takes 1 mm and the body's axes where a header says neither, names the
header where the file of the voxels is missing, and takes what it could inflate of damaged voxels for all of them.
"""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

from nnunet_uda.errors import UDAError, shown

_META, _NRRD = (".mha", ".mhd"), (".nrrd", ".nhdr")
_LONGEST = 1 << 16
"""Bytes of a header that are looked at."""
_OTHER_UNITS = re.compile(
    r"(cm|dm|m|um|µm|nm|microns?|in|inch(es)?|(centi|deci|micro|nano)?met(er|re)s?)", re.IGNORECASE
)
_NUMBERS = {
    "offset": 1, "position": 1, "origin": 1, "transformmatrix": 2, "rotation": 2, "orientation": 2,
    "elementspacing": 1, "elementsize": 1, "spacings": 1,
}  # fmt: skip
"""Keys of numbers, and how many there are: one for each axis, or for each pair of axes."""
_LENGTHS = ("elementspacing", "elementsize", "spacings")
_BODY = re.compile(r"(r(ight)?|l(eft)?)-?(a(nterior)?|p(osterior)?)-?s(uperior)?(-?t(ime)?)?", re.IGNORECASE)
"""NRRD's spaces whose axes are those of the body."""


def has_text_header(path: Path) -> bool:
    return path.name.lower().endswith(_META + _NRRD)


def check_text_header(path: Path) -> str:
    """What a user should know about the geometry, mostly empty.

    Raises:
        UDAError: for lengths in another unit than mm, numbers that are none, an axis without a length, and where the
            file of the voxels is missing.
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
    _check_numbers(path, fields)
    missing = []
    if not {"elementspacing", "elementsize", "spacings", "space directions"} & set(fields):
        missing.append("no voxel size, so 1 mm is a guess of the reader")
    if not {"transformmatrix", "orientation", "rotation", "space directions"} & set(fields):
        missing.append("no orientation, so which side is left is a guess of the reader")
    elif "space" in fields and not _BODY.fullmatch(fields["space"]):
        missing.append(f"the space {shown(fields['space'])}, so which side is left is a guess of the reader")
    return (
        f"{path.name}: its header holds {' and '.join(missing)}: compare the picture with the scan" if missing else ""
    )


def _check_numbers(path: Path, fields: dict[str, str]) -> None:
    axes = fields.get("ndims") or fields.get("dimension") or ""
    for key, power in _NUMBERS.items():
        if key not in fields or not axes.isdecimal():
            continue
        try:
            numbers = [float(word) for word in fields[key].split()]
        except ValueError:
            numbers = []
        count, positive = int(axes) ** power, key in _LENGTHS
        if len(numbers) != count or not all(math.isfinite(n) and (n > 0 or not positive) for n in numbers):
            raise UDAError(
                f"{path}: {key} in its header is {shown(fields[key])}; expected {count} "
                f"{'positive' if positive else 'finite'} numbers. Find out the right ones and repair the header."
            )
    if "none" in fields.get("space directions", ""):
        raise UDAError(
            f"{path}: 'space directions' in its header is {shown(fields['space directions'])}; expected a direction "
            "and length of every axis. Repair the header, or split the file where an axis holds channels or times."
        )


def check_inflated(path: Path, expected: int) -> None:
    """Raise ``UDAError`` unless the compressed voxels of a MetaImage, if it has such, are ``expected`` bytes."""
    fields = _fields(path)
    data = fields.get("elementdatafile", "LIST")
    if fields.get("compresseddata", "").lower() != "true" or data.split()[0].upper() == "LIST" or "%" in data:
        return
    local = data.upper() == "LOCAL"
    inflating, found = zlib.decompressobj(zlib.MAX_WBITS | 32), 0
    with open(path if local else path.parent / data, "rb") as file:
        if local:
            start = file.read(_LONGEST)
            file.seek(start.index(b"\n", start.lower().index(b"elementdatafile")) + 1)
        try:
            while not inflating.eof and (chunk := inflating.unconsumed_tail or file.read(1 << 20)):
                found += len(inflating.decompress(chunk, 1 << 24))
            fault = "" if inflating.eof else "the end is missing"
        except zlib.error as error:
            fault = str(error)
    if fault or found != expected:
        raise UDAError(
            f"{path}: its compressed voxels are {found} bytes, {expected} are announced by its header"
            f"{fault and f' ({fault})'}; expected a whole file. It is corrupt: get it again."
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
