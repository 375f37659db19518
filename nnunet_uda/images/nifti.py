"""NIfTI-1 files, read by their bytes: what ITK and nibabel read as something else without a word is refused here.

Such a header may hold two geometries, the qform and the sform. Programs choose by different rules, so where the two
disagree a scan is mirrored, stretched or shifted for some of them; both are looked at, and the user
says which is right.
Voxels are read by slabs (ITK needs twice the volume), with NaN counted (which ITK turns into zeros).
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
from nibabel.quaternions import quat2mat

from nnunet_uda.errors import UDAError
from nnunet_uda.images.geometry import Grid, differences, mm, short

GEOMETRIES = ("qform", "sform")
SLAB = 1 << 24
"""Bytes of a file that are in memory at a time, or one plane where that is more."""
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_BITS = {1: 1, 32: 64, 128: 24, 1536: 128, 1792: 128, 2048: 256, 2304: 32}
"""Bits a voxel of the types that are no real number: binary, complex, colours."""
_UNITS = {1: 1000.0, 2: 1.0, 3: 0.001}
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_ROUNDING = 1.5e-3
"""Radians that a quaternion of single precision may be off, near half a turn."""
_chosen: ContextVar[str | None] = ContextVar("nifti_geometry", default=None)


@contextmanager
def nifti_geometry(choice: str | None) -> Iterator[None]:
    """Within it, files whose geometries disagree are read by their ``choice`` (of ``GEOMETRIES``), not refused."""
    token = _chosen.set(choice)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_geometry() -> str | None:
    """The choice in force, for processes that are started to read files."""
    return _chosen.get()


def choose_geometry(choice: str | None) -> None:
    """``nifti_geometry`` to the end of this process."""
    _chosen.set(choice)


def add_geometry_argument(parser: argparse.ArgumentParser) -> None:
    """``-nifti_geometry``, of every command that reads scans and labels as their owner has them."""
    parser.add_argument(
        "-nifti_geometry", choices=GEOMETRIES,
        help="read NIfTI files whose qform and sform disagree by this one [such files are refused]",
    )  # fmt: skip


@dataclass(frozen=True)
class Nifti:
    """What a header says.

    Attributes:
        path: the header's file.
        data: the file of the voxels: another one for ``.hdr`` with ``.img``.
        size: voxels an axis, fastest first.
        bits: of one voxel.
        dtype: numpy type with byte order, None for colours, complex numbers and the like.
        offset: of the first voxel in bytes.
        scale: slope and intercept of the voxels.
        readings: the grids that the header holds, of ``GEOMETRIES`` and in mm.
        disagreement: what tells the readings apart, empty where there is one geometry.
        note: what a user should know about the geometry, mostly empty.
    """

    path: Path
    data: Path
    size: tuple[int, ...]
    bits: int
    dtype: np.dtype | None
    offset: int
    scale: tuple[float, float]
    readings: dict[str, Grid]
    disagreement: str
    note: str

    @property
    def length(self) -> int:
        """Bytes of the whole data file."""
        return self.offset + (math.prod(self.size) * self.bits + 7) // 8

    @property
    def grid(self) -> Grid | None:
        """The grid to read it by where ``nifti_geometry`` had to choose, None where nothing was to be chosen.

        Raises:
            UDAError: if the geometries disagree and none is chosen, or the chosen one is no grid.
        """
        if not self.disagreement:
            return None
        choice = _chosen.get()
        if choice is None:
            raise UDAError(
                f"{self.path}: its header holds two geometries that disagree: {self.disagreement}. Expected one, for "
                "programs choose differently, and left and right may be exchanged. Find out which is right; "
                "nnUNetUDA_convert, nnUNetUDA_evaluate and nnUNetUDA_intensities read such files by it with "
                "-nifti_geometry qform or sform. Anywhere else write it over the other (fslorient -copyqform2sform or "
                "-copysform2qform)."
            )
        if choice not in self.readings or not self.readings[choice].is_orthogonal:
            what = "axes that are not at right angles" if choice in self.readings else "no valid one"
            raise UDAError(
                f"{self.path}: read by its {choice}, the file has {what} ({self.disagreement}). Use -nifti_geometry "
                f"{GEOMETRIES[choice == 'qform']}, or repair the header."
            )
        return self.readings[choice]

    @property
    def repair(self) -> str:
        """What ``grid`` did, for a summary; empty where nothing was to be chosen."""
        return f"{self.path.name}: read by its {_chosen.get()} ({self.disagreement})" if self.disagreement else ""


def is_nifti(path: Path) -> bool:
    """Whether ITK and nibabel take a file of this name for NIfTI (or its predecessor, Analyze)."""
    return path.name.lower().endswith((".nii", ".nii.gz", ".hdr", ".img"))


def read_header(path: Path) -> Nifti:
    """The header, checked. May raise whatever reading raises: see ``reading.readable``.

    Raises:
        UDAError: for a header that cannot be true, or that ITK and nibabel understand differently.
    """
    path, data = _files(path)
    with opened(path) as stream:
        block = stream.read(348)
    if len(block) < 348:
        raise UDAError(f"{path}: the file is truncated, {len(block)} bytes; expected a header of 348. Get it again.")
    lengths = {order: int(np.frombuffer(block, f"{order}i4", 1)[0]) for order in "<>"}
    order: Any = next((order for order, length in lengths.items() if length == 348), "")
    if not order and 540 in lengths.values():
        raise _corrupt(path, "NIfTI-2", "ITK does not read it: save it as NIfTI-1.")
    magic = block[344:]
    analyze = path != data and magic not in (b"ni1\0", b"n+1\0")
    if not order or not (analyze or magic == (b"n+1\0" if path == data else b"ni1\0")):
        raise _corrupt(path, "it has no NIfTI-1 header")
    raw = np.frombuffer(block, nibabel.nifti1.header_dtype.newbyteorder(order))[0]

    count = int(raw["dim"][0])
    if not 1 <= count <= 7:
        raise _corrupt(path, f"its number of dimensions (dim[0]) is {count}, expected 1 to 7")
    size = tuple(int(n) for n in raw["dim"][1 : count + 1])
    if min(size) < 1:
        raise _corrupt(path, f"its size (dim) is {size}, expected positive numbers")
    code, bits = int(raw["datatype"]), int(raw["bitpix"])
    dtype = np.dtype(_TYPES[code]).newbyteorder(order) if code in _TYPES else None
    real = _BITS.get(code) if dtype is None else 8 * dtype.itemsize
    if real is None or bits not in (0, real):
        raise _corrupt(path, f"its datatype is {code} with {bits} bits a voxel (bitpix)")
    offset = float(raw["vox_offset"])
    least = 352 if path == data else 0
    if not (math.isfinite(offset) and offset.is_integer() and least <= offset < 2**31):
        raise _corrupt(path, f"its voxels begin at byte {offset:g} (vox_offset), expected {least} or somewhat more")
    slope, inter = (1.0, 0.0) if analyze else (float(raw["scl_slope"]), float(raw["scl_inter"]))
    if math.isinf(slope) or math.isinf(inter):
        raise _corrupt(path, f"its voxels are scaled by {slope:g} and shifted by {inter:g} (scl_slope, scl_inter)")
    scale = (1.0 if math.isnan(slope) else slope or 1.0, 0.0 if math.isnan(inter) else inter)  # as ITK has it
    readings, disagreement, note = _geometries(path, raw, size, analyze)
    return Nifti(path, data, size, real, dtype, int(offset), scale, readings, disagreement, note)


def slabs(nifti: Nifti) -> Iterator[np.ndarray]:
    """The voxels as they are stored, native byte order, in blocks of whole planes: ``(planes, size[1], size[0])``.

    Raises:
        UDAError: for a file that is truncated or corrupt (seen at its end at the latest), or that holds NaN or
            infinite numbers.
    """
    shape = (*nifti.size, 1)[:2]
    plane = math.prod(shape) * nifti.bits // 8
    planes = math.prod(nifti.size[2:])
    bad, done = 0, 0
    for count, block in _blocks(nifti, plane, planes):
        if nifti.dtype is None:
            continue
        slab = np.frombuffer(block, nifti.dtype).reshape(count, *shape[::-1])
        slab = slab.astype(nifti.dtype.newbyteorder("="), copy=False)
        if slab.dtype.kind == "f" and not np.isfinite(slab).all():
            bad += int((~np.isfinite(slab)).sum())
        done += count
        yield slab
    if bad:
        raise not_finite(nifti.path, bad, math.prod(nifti.size))


def not_finite(path: Path, bad: int, total: int) -> UDAError:
    return UDAError(
        f"{path}: {bad} of {total} voxels are NaN or infinite; expected finite numbers. Replace them by a value that "
        "means background."
    )


def truncated(path: Path, length: int, expected: int) -> UDAError:
    return UDAError(
        f"{path}: the file is truncated, {length} bytes of {expected} that its header announces. Get it again."
    )


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed where its name ends in ``.gz``; a damaged one is a ``UDAError``."""
    try:
        opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(path, "rb") as stream:
            yield stream
    except EOFError as error:
        raise UDAError(f"{path}: the compressed file is truncated ({error}). Get it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UDAError(
            f"{path}: cannot be read ({error}); expected a whole compressed image. The file is corrupt, or its name is "
            "wrong: get it again."
        ) from None


def _blocks(nifti: Nifti, plane: int, planes: int) -> Iterator[tuple[int, bytes]]:
    """(planes, bytes) from the first to the last voxel; then the rest of a compressed file, whose checksum counts."""
    stored, compressed = os.path.getsize(nifti.data), nifti.data.name.lower().endswith(".gz")
    if stored * (1100 if compressed else 1) < nifti.length:  # no compression of this kind is better; before any memory
        if compressed:
            with opened(nifti.data) as stream:
                stored = sum(len(chunk) for chunk in iter(lambda: stream.read(1 << 20), b""))
        raise truncated(nifti.path, stored, nifti.length)
    with opened(nifti.data) as stream:
        skipped = stream.seek(nifti.offset)
        step = max(1, SLAB // max(1, plane))
        for first in range(0, planes, step):
            count = min(step, planes - first)
            block = stream.read(count * plane)
            if len(block) < count * plane:
                raise truncated(nifti.path, skipped + first * plane + len(block), nifti.length)
            yield count, block
        if compressed:
            while stream.read(1 << 20):
                pass


def _files(path: Path) -> tuple[Path, Path]:
    """Header and voxels: of ``.hdr`` and ``.img`` either names both."""
    endings = {path.name[-4:].lower(): path}
    for ending, other in ((".hdr", ".img"), (".img", ".hdr")):
        if ending in endings and other not in endings:
            beside = [path.with_suffix(name) for name in (other, other.upper())]
            found = next((file for file in beside if file.is_file()), None)
            if found is None:
                what = "data file" if other == ".img" else "header"
                raise UDAError(f"{path}: its {what} {beside[0].name} is missing; expected it beside this file.")
            return (path, found) if other == ".img" else (found, path)
    return path, path


def _corrupt(path: Path, found: str, remedy: str = "") -> UDAError:
    return UDAError(
        f"{path}: cannot be read ({found}); expected a whole NIfTI image. "
        f"{remedy or 'The file is corrupt or of another kind: get it again.'}"
    )


def _geometries(path: Path, raw: Any, size: tuple[int, ...], analyze: bool) -> tuple[dict[str, Grid], str, str]:
    """The readings, what tells them apart, and a note."""
    size = (*size, 1, 1)[:3]
    unit = _UNITS.get(int(raw["xyzt_units"]) & 7, 1.0)
    used = [i for i in range(3) if i < int(raw["dim"][0])]
    steps = np.array([float(raw["pixdim"][i + 1]) if i in used else 1.0 for i in range(3)])
    valid = bool(np.isfinite(steps).all() and (steps > 0).all())
    codes = {"qform": 0, "sform": 0} if analyze else {"qform": int(raw["qform_code"]), "sform": int(raw["sform_code"])}
    found = {}
    if codes["qform"] > 0 and valid:
        found["qform"] = _quaternion_affine(path, raw, steps)
    if codes["sform"] > 0:
        rows = np.vstack([raw["srow_x"], raw["srow_y"], raw["srow_z"], [0, 0, 0, 1]]).astype(np.float64)
        if not np.isfinite(rows).all() or abs(np.linalg.det(rows)) < 1e-12:
            raise _corrupt(path, "its sform is no affine map")
        found["sform"] = rows
    scale = np.diag([unit, unit, unit, 1.0])
    readings = {name: Grid(size, _RAS_TO_LPS @ scale @ affine) for name, affine in found.items()}
    sizes = f"{mm((steps * unit).tolist())} by its pixdim"
    if "sform" not in readings:
        if not valid:
            raise UDAError(
                f"{path}: its voxels are {sizes}; expected positive numbers. Find out the real size and repair the "
                "header."
            )
        if codes["qform"] > 0:
            return readings, "", ""
        kind = "the format (Analyze) holds no orientation" if analyze else "its qform_code and sform_code are both 0"
        note = f"{path.name}: {kind}, so which side is left is a guess of the reader: compare the picture with the scan"
        return readings, "", note
    stretched = [i for i in used if not abs(readings["sform"].spacing[i] - steps[i] * unit) <= 1e-3 * abs(steps[i])]
    if "qform" not in readings and (stretched or not valid):
        return readings, f"{sizes}, {_describe(readings['sform'])} by its sform", ""
    if "qform" in readings and differences(readings["qform"], readings["sform"], _ROUNDING):
        turned = np.linalg.det(found["qform"]) * np.linalg.det(found["sform"]) < 0
        apart = " and ".join(f"{_describe(readings[name])} by its {name}" for name in GEOMETRIES)
        return readings, f"{apart}{', mirrored' if turned else ''}", ""
    return readings, "", ""


def _quaternion_affine(path: Path, raw: Any, steps: np.ndarray) -> np.ndarray:
    b, c, d = (float(raw[f"quatern_{letter}"]) for letter in "bcd")
    shift = np.array([raw[f"qoffset_{letter}"] for letter in "xyz"], np.float64)
    rest = 1.0 - (b * b + c * c + d * d)
    if not (math.isfinite(rest) and rest > -1e-3 and np.isfinite(shift).all()):
        raise _corrupt(path, f"its qform has the quaternion {short((b, c, d))} and offset {short(tuple(shift))}")
    a = math.sqrt(max(rest, 0.0))
    norm = math.sqrt(a * a + b * b + c * c + d * d)
    affine = np.eye(4)
    affine[:3, :3] = quat2mat(np.array([a, b, c, d]) / norm)
    affine[:3, :3] *= steps * (1, 1, -1 if raw["pixdim"][0] < 0 else 1)
    affine[:3, 3] = shift
    return affine


def _describe(grid: Grid) -> str:
    origin = short(tuple(grid.affine[:3, 3] * (-1, -1, 1)))  # RAS, as in the header
    return f"{grid.code} of {mm(grid.spacing)} from {origin}"
