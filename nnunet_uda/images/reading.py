"""Reading images and labels, and refusing what would go wrong later: what ITK reads without a word is checked here."""

from __future__ import annotations

import locale
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import SimpleITK as sitk

from nnunet_uda.errors import UDAError, printable, some
from nnunet_uda.files import cannot_write
from nnunet_uda.images.geometry import Grid, check_possible, check_same_geometry, place, short
from nnunet_uda.images.listing import ENDINGS
from nnunet_uda.images.nifti import Nifti, is_nifti, not_finite, opened, read_header, slabs, truncated
from nnunet_uda.images.text_headers import check_inflated, check_text_header, has_text_header
from nnunet_uda.names import check_name, is_text

_WITHOUT_ORIENTATION = (".gipl", ".gipl.gz", ".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".vtk", ".mrc")
"""Formats that hold none, or from which ITK reads none."""
MOST = 1e10
"""Intensities are below: whole numbers of 32 bits are. Greater ones overflow when they are normalised."""
LEAST_CONTRAST = 1e-6
"""Of a scan's intensities: nnU-Net divides by no deviation below 1e-8."""
Part = TypeVar("Part", int, str)


@contextmanager
def readable(path: Path, expected: str = "a whole 3D image") -> Iterator[None]:
    """Whatever a library raises while it reads ``path`` becomes the one ``UDAError`` that names the file.

    For everything that others wrote: parsers have no error class of their own, and raise what the bytes make of them.
    The locale stays as it was: after ITK's reader of VTK files it is C, in which Python takes text for ASCII.
    """
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    except UDAError:
        raise
    except PermissionError as error:
        raise UDAError(f"{path}: cannot be opened ({error.strerror}); check its permissions.") from None
    except MemoryError:
        raise UDAError(
            f"{path}: its header asks for more memory than there is; expected {expected}. Get the file again, or use "
            "fewer processes (-np)."
        ) from None
    except Exception as error:
        raise _unreadable(path, error, expected) from error
    finally:
        locale.setlocale(locale.LC_ALL, before)


def stem(path: Path) -> str:
    """File name without its image ending (``a.nii.gz`` -> ``a``)."""
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def read_image(path: Path, dimensions: tuple[int, ...] = (3,)) -> sitk.Image:
    """One scalar image of so many dimensions.

    Raises:
        UDAError: when the file is unreadable, truncated, corrupt, of other dimensions or not scalar, holds NaN, or has
            a geometry that cannot be (NIfTI: or two of them).
    """
    reader, nifti = _open(Path(path))
    check_kind(path, reader, dimensions)
    with readable(path):
        if nifti is not None:
            return _read_by_slabs(reader, nifti)
        _check_length(path, reader)
        image = reader.Execute()
    for key in image.GetMetaDataKeys():  # vendor header fields are not carried on: image and label geometry must agree
        image.EraseMetaData(key)
    voxels = sitk.GetArrayViewFromImage(image)
    if voxels.dtype.kind == "f" and not np.isfinite([voxels.min(), voxels.max()]).all():
        raise _not_finite(voxels, path)
    return image


def check_kind(path: Path, reader: sitk.ImageFileReader, dimensions: tuple[int, ...]) -> None:
    """Raise ``UDAError`` for a header that announces other dimensions, or not one real number per voxel."""
    if reader.GetDimension() not in dimensions:
        raise UDAError(
            f"{path}: the image has {reader.GetDimension()} dimensions, size {reader.GetSize()}; expected one "
            f"{' or '.join(f'{n}D' for n in dimensions)} file per case. Split a 4D file into one 3D file per channel "
            "(case_0000, case_0001), stack 2D slices."
        )
    pixel_type = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in pixel_type:
        raise UDAError(
            f"{path}: {reader.GetNumberOfComponents()} components per voxel, type {pixel_type}; expected one real "
            "number per voxel. Write each component to a file of its own."
        )


def check_whole(path: Path) -> sitk.ImageFileReader:
    """A reader with the file's header read, after checking length and checksum, or reading all voxels.

    SimpleITK pads short NIfTI and GIPL files with zeros without saying so. Raises ``UDAError`` for a short or corrupt
    file.
    """
    reader, nifti = _open(Path(path))
    with readable(path):
        if nifti is None:
            _check_length(path, reader)
            reader.Execute()
        else:
            for _ in slabs(nifti):
                pass
    return reader


def check_nifti(path: Path) -> Grid | None:
    """As ``check_whole``, without ITK and what it refuses (axes not at right angles); the grid, if there is one."""
    check_file(path)
    with readable(path):
        nifti = read_header(path)
        grid = nifti.grid or next(reversed(nifti.readings.values()), None)
        for _ in slabs(nifti):
            pass
    return grid


def _open(path: Path) -> tuple[sitk.ImageFileReader, Nifti | None]:
    """A reader with the header read, after everything that the header alone tells was checked."""
    check_file(path)
    _check_ending(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with readable(path):
        nifti = read_header(path) if is_nifti(path) else None
        grid = nifti.grid if nifti is not None else None
        if has_text_header(path):
            check_text_header(path)
        reader.ReadImageInformation()
        grid = grid or Grid.of(reader)
        check_possible(path, grid.size, grid.spacing, grid.origin)
        if not grid.is_orthogonal:
            raise UDAError(
                f"{path}: its axes are not at right angles (directions {short(grid.direction)}); expected a scan on a "
                "rectangular grid. Repair the header, or resample the image."
            )
    return reader, nifti


def check_file(path: Path) -> None:
    """Raise ``UDAError`` for what can be opened as no file: folders, links to nowhere, pipes (which wait forever), and
    names that are no text, at which ITK ends the process."""
    check_path(path)
    if path.is_file():
        return
    if path.is_dir():
        raise UDAError(
            f"{path}: a folder; expected an image file. Where a program unpacked it so, move the file that lies in the "
            "folder to its place."
        )
    found = "a pipe, a socket or a device" if path.exists() else "there is no such file"
    if path.is_symlink() and not path.exists():
        found = f"a link to {os.readlink(path)}, where there is no file"
    raise UDAError(f"{path}: {found}; expected an image.")


def check_path(path: Path) -> None:
    """Raise ``UDAError`` for a path with bytes that are no UTF-8, as of a disk that was written elsewhere."""
    if not is_text(str(path)):
        raise UDAError(
            f"{path}: its path holds bytes that are no UTF-8; expected text, for image readers take no other name. "
            "Rename the file, or the folder (convmv renames whole trees)."
        )


def _check_ending(path: Path) -> None:
    """ITK takes a NIfTI file for one by its ending, in small letters or in capitals throughout."""
    ending = path.name[len(stem(path)) :]
    if is_nifti(path) and ending not in (ending.lower(), ending.upper()):
        raise UDAError(
            f"{path}: its name ends in {ending}, letters of both kinds, which other programs do not take for an image; "
            f"expected {ending.lower()}. Rename the file."
        )


def _check_length(path: Path, reader: sitk.ImageFileReader) -> None:
    """Length and checksum of what is no NIfTI; other formats' short files SimpleITK refuses itself."""
    name = path.name.lower()
    length = os.path.getsize(path)
    if name.endswith(".gz"):
        with opened(path) as stream:
            length = sum(len(chunk) for chunk in iter(lambda: stream.read(1 << 20), b""))
    component = sitk.Image([1] * reader.GetDimension(), reader.GetPixelID(), reader.GetNumberOfComponents())
    voxels = math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * component.GetSizeOfPixelComponent()
    if name.endswith((".gipl", ".gipl.gz")) and length < 256 + voxels:
        raise truncated(path, length, 256 + voxels)
    if has_text_header(path):
        check_inflated(path, voxels)


def _read_by_slabs(reader: sitk.ImageFileReader, nifti: Nifti) -> sitk.Image:
    """What ``reader.Execute()`` gives, with one slab in memory beside the volume (ITK needs a second volume)."""
    size, pixel_id = reader.GetSize(), reader.GetPixelID()
    if math.prod(size) != math.prod(nifti.size):
        raise ValueError(f"of {nifti.size} voxels ITK finds {size}")
    dtype = sitk.GetArrayViewFromImage(sitk.Image([1] * len(size), pixel_id)).dtype
    image: Any = None
    first = 0
    for slab in slabs(nifti):
        values = slab if nifti.scale == (1, 0) else slab * nifti.scale[0] + nifti.scale[1]  # scaled in double precision
        part = sitk.GetImageFromArray(values.astype(dtype, copy=False))
        if len(size) == 2:
            image = part[:, :, 0]
        elif len(slab) == size[2]:
            image = part
        else:
            image = sitk.Image(size, pixel_id) if image is None else image
            image[:, :, first : first + len(slab)] = part
        first += len(slab)
    if (grid := nifti.grid) is None:
        place(image, reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())
    else:
        n = len(size)
        place(image, grid.spacing[:n], grid.origin[:n], grid.axes[:n, :n].ravel().tolist())
    return image


def _unreadable(path: Path, error: Exception, expected: str) -> UDAError:
    reason = " ".join(line.strip() for line in str(error).strip().splitlines()[-2:]).split("sitk::ERROR: ")[-1]
    advice = r" Use force=True to force reading\."  # pydicom's, for who writes programs
    reason = re.sub(
        rf"\(0x[0-9a-f]+\)|( for reading)?\.? Reason: (No such file or directory|Success)|{advice}", "", reason
    )
    hint = "The file is corrupt, truncated or of another kind: get it again."
    if "orthonormal" in str(error):
        hint = "Repair the header so that the axes are at right angles, or resample the image."
    return UDAError(
        f"{path}: cannot be read ({printable(reason) or type(error).__name__}); expected {expected}. {hint}"
    )


def remarks(path: Path) -> tuple[list[str], list[str]]:
    """Repairs and warnings about the geometry of a file that was read, whatever its format."""
    header = read_header(path) if is_nifti(path) and path.is_file() else None
    note = check_text_header(path) if has_text_header(path) and path.is_file() else header.note if header else ""
    if path.name.lower().endswith(_WITHOUT_ORIENTATION):
        note = f"{path.name}: the format holds no orientation, so which side is left is a guess of the reader"
        if not path.name.lower().endswith(ENDINGS):
            note += ", no sure distance of slices, and no way to tell whether a file is whole"
        note += ": compare the picture with the scan"
    return ([header.repair] if header and header.repair else []), ([note] if note else [])


def check_image(image: sitk.Image, path: Path) -> None:
    """Raise ``UDAError`` for voxels that no scan has: NaN, infinite, beyond ``MOST`` or all the same."""
    check_voxels(sitk.GetArrayViewFromImage(image), path)


def check_voxels(voxels: np.ndarray, path: Path) -> None:
    """``check_image`` of an array; by planes of its first axis, for memory."""
    low, high = check_values(voxels, path)
    if low == high:
        raise UDAError(
            f"{path}: every voxel is {low}; expected an image. An empty scan cannot be normalised: leave it out."
        )


def check_values(voxels: np.ndarray, path: Path) -> tuple[Any, Any]:
    """The least and the greatest value.

    Raises:
        UDAError: where they are NaN, infinite, beyond ``MOST``, or nearer to each other than ``LEAST_CONTRAST``.
    """
    low, high = voxels.min(), voxels.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise _not_finite(voxels, path)
    if max(high, -float(low)) > MOST:
        beyond = sum(int(((plane > MOST) | (plane < -MOST)).sum()) for plane in voxels)
        raise UDAError(
            f"{path}: intensities from {low:.4g} to {high:.4g}; expected numbers below {MOST:.0e}, as of a scan. "
            f"{beyond} of {voxels.size} voxels are beyond: they mark what lies outside of the scan, or the file is "
            "corrupt. Replace them by a value that means background in this modality."
        )
    if 0 < float(high) - float(low) < LEAST_CONTRAST:
        raise UDAError(
            f"{path}: intensities from {low:.4g} to {high:.4g}; expected a range of {LEAST_CONTRAST:.0e} or more, for "
            "nnU-Net's normalisation loses a smaller one. Give the scan in another unit (diffusion in um2/s, not m2/s)."
        )
    return low, high


def _not_finite(voxels: np.ndarray, path: Path) -> UDAError:
    return not_finite(path, sum(int((~np.isfinite(plane)).sum()) for plane in voxels), voxels.size)


def write_image(image: sitk.Image, path: Path) -> None:
    """Write an image, compressed; ``UDAError`` if it cannot be written whole."""
    check_path(path)
    try:
        sitk.WriteImage(image, str(path), True)
        check_whole(path)  # on a full disk SimpleITK leaves a short file without an error
    except (RuntimeError, OSError) as error:
        raise cannot_write(path, error) from None


def read_label(path: Path, image: sitk.Image, image_path: Path) -> tuple[sitk.Image, list[str]]:
    """The label file on the image's grid, and notes on what was repaired (here never anything)."""
    label = read_image(path)
    check_same_geometry(image, image_path, label, path)
    return label, []


@dataclass(frozen=True)
class LabelMap:
    """How vendor values become classes; value 0 is background.

    Args:
        values: vendor value -> class (0 to drop a known structure).
        ignore_other: other values become background; otherwise they are refused.
        names: vendor value -> name, for messages only.
        hint: what to do about a value outside the map.
        files: value in a vendor's file -> class, where these are not the values that the converter's reader returns.
    """

    values: Mapping[int, int]
    ignore_other: bool = False
    names: Mapping[int, str] = field(default_factory=dict)
    hint: str = "Correct the label file."
    files: Mapping[int, int] | None = None

    def apply(self, label: sitk.Image, path: Path) -> np.ndarray:
        """uint8 classes, axes (z, y, x). Raises ``UDAError`` for non-integer values and values outside the map."""
        values = {0: 0, **self.values}
        low, high = min(values), max(values)
        table = np.full(high - low + 1, 255, np.uint8)
        for value, index in values.items():
            table[value - low] = index
        voxels = sitk.GetArrayViewFromImage(label)
        classes = np.empty(voxels.shape, np.uint8)
        unknown: set[int] = set()
        for z, plane in enumerate(voxels):
            if plane.dtype.kind == "f":
                wrong = plane[~(np.isfinite(plane) & (plane == np.rint(plane)))]
                if wrong.size:
                    raise UDAError(
                        f"{path}: the label holds non-integer values (e.g. {wrong[0]}); expected whole numbers. It is "
                        "a probability map, or was resampled by interpolation: use nearest-neighbour, or threshold it."
                    )
            inside = (plane >= low) & (plane <= high)
            # clip keeps an unsigned type unsigned; subtract in int64
            classes[z] = np.where(inside, table[np.where(inside, plane, 0).astype(np.int64) - low], 255)
            if not self.ignore_other and (classes[z] == 255).any():
                unknown.update(int(v) for v in np.unique(plane[classes[z] == 255]))
        classes[classes == 255] = 0
        if unknown:
            known = ", ".join(f"{v}{f' ({self.names[v]})' if v in self.names else ''}" for v in sorted(values))
            raise UDAError(
                f"{path}: the label holds the values {some(sorted(unknown), 20)}, which are not in the map; expected "
                f"only {known}. {self.hint}"
            )
        return classes


def parse_parts(
    arguments: Sequence[str], pattern: str, expected: str, kind: Callable[[str], Part]
) -> dict[str, tuple[Part, ...]]:
    """What ``-labels name=part,part ...`` gives to each name, in order.

    Args:
        pattern: of one part.
        expected: in words.
        kind: of a part's text; 0 is the background.

    Raises:
        UDAError: for another form, a name twice, and a part of two names.
    """
    found: dict[str, tuple[Part, ...]] = {}
    owner: dict[Part, str] = {kind("0"): "the background"}
    for text in arguments:
        name, _, words = (part.strip() for part in text.partition("="))
        parts = [part.strip() for part in words.split(",")]
        if not name or not all(re.fullmatch(pattern, part) for part in parts):
            raise UDAError(f"-labels {text}: expected {expected}.")
        check_name(name, "-labels")
        if name in found:
            raise UDAError(f"-labels {text}: {name} is named twice; give all of it at once, as {name}=2,3.")
        found[name] = tuple(map(kind, parts))
        for part in found[name]:
            if owner.setdefault(part, name) != name:
                raise UDAError(
                    f"-labels {text}: value {part} is already {owner[part]}; expected every one in one structure, and "
                    "0 in none."
                )
    return found


def parse_labels(arguments: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``["liver=5", "kidneys=2,3"]`` -> values by name, in order."""
    expected = "name=value or name=value,value with whole numbers, as liver=5"
    structures = parse_parts(arguments, r"-?\d{1,6}", expected, int)
    if len(structures) > 254:
        raise UDAError(f"-labels: {len(structures)} structures; expected at most 254.")
    return structures
