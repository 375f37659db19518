"""Reading images and labels, and refusing what would go wrong later: what ITK reads without a word is checked here."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_uda.errors import UDAError, printable

ENDINGS = (".nii.gz", ".gipl.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".hdr")
"""File endings taken from a folder; a file named explicitly may have any ending that SimpleITK reads."""


@contextmanager
def readable(path: Path, expected: str = "a whole 3D image") -> Iterator[None]:
    """Whatever a library raises while it reads ``path`` becomes the one ``UDAError`` that names the file.

    For everything that others wrote: parsers have no error class of their own, and raise what the bytes make of them.
    """
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


def stem(path: Path) -> str:
    """File name without its image ending (``a.nii.gz`` -> ``a``)."""
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def read_image(path: Path) -> sitk.Image:
    """One scalar 3D image. Raises ``UDAError`` when the file is unreadable, truncated, corrupt or not 3D scalar."""
    path = Path(path)
    if not path.is_file():
        raise UDAError(f"{path}: there is no such file; expected an image.")
    reader = check_whole(path)
    if reader.GetDimension() != 3:
        raise UDAError(
            f"{path}: the image has {reader.GetDimension()} dimensions, size {reader.GetSize()}; expected one 3D "
            "file per case. Split a 4D file into one 3D file per channel (case_0000, case_0001), stack 2D slices."
        )
    pixel_type = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in pixel_type:
        raise UDAError(
            f"{path}: {reader.GetNumberOfComponents()} components per voxel, type {pixel_type}; expected one real "
            "number per voxel. Write each component to a file of its own."
        )
    image = execute(reader)
    for key in image.GetMetaDataKeys():  # vendor header fields are not carried on: image and label geometry must agree
        image.EraseMetaData(key)
    return image


def check_whole(path: Path) -> sitk.ImageFileReader:
    """A reader with the file's header read, after checking length and checksum (of NIfTI, GIPL, and of any .gz).

    SimpleITK pads these with zeros without saying so. Raises ``UDAError`` for a short or corrupt file.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with readable(path):
        reader.ReadImageInformation()
    data_file = path.with_suffix(".img") if path.name.lower().endswith(".hdr") else path
    if not data_file.is_file():
        raise UDAError(f"{path}: its data file {data_file.name} is missing; expected it beside the header.")
    length = os.path.getsize(data_file)
    if data_file.name.lower().endswith(".gz"):
        length = 0
        try:
            with gzip.open(data_file) as stream:
                while chunk := stream.read(1 << 20):
                    length += len(chunk)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UDAError(
                f"{path}: the compressed file is truncated or corrupt ({error}); expected a whole "
                "image. Get the file again."
            ) from None
    expected = 0  # the other formats' short files SimpleITK refuses itself
    if reader.HasMetaDataKey("bitpix"):
        dims = [int(reader.GetMetaData(f"dim[{i}]")) for i in range(1, 1 + int(reader.GetMetaData("dim[0]")))]
        bits = int(reader.GetMetaData("bitpix"))
        expected = int(float(reader.GetMetaData("vox_offset"))) + math.prod(dims) * bits // 8
    elif data_file.name.lower().endswith((".gipl", ".gipl.gz")):
        expected = 256 + math.prod(reader.GetSize()) * sitk.Image(1, 1, reader.GetPixelID()).GetSizeOfPixelComponent()
    if length < expected:
        raise UDAError(
            f"{path}: the file is truncated, {length} bytes of {expected} that its header announces. Get it again."
        )
    return reader


def execute(reader: sitk.ImageFileReader) -> sitk.Image:
    """Read the voxels too; a failure is a ``UDAError`` that names the file."""
    with readable(Path(reader.GetFileName())):
        return reader.Execute()


def _unreadable(path: Path, error: Exception, expected: str) -> UDAError:
    reason = " ".join(line.strip() for line in str(error).strip().splitlines()[-2:]).split("sitk::ERROR: ")[-1]
    hint = "The file is corrupt, truncated or of another kind: get it again."
    if "orthonormal" in str(error):
        hint = "Repair the header so that the axes are at right angles, or resample the image."
    return UDAError(
        f"{path}: cannot be read ({printable(reason) or type(error).__name__}); expected {expected}. {hint}"
    )


def check_image(image: sitk.Image, path: Path) -> None:
    """Raise ``UDAError`` for NaN, infinite or constant voxels."""
    voxels = sitk.GetArrayViewFromImage(image)
    low, high = voxels.min(), voxels.max()
    bad = 0
    if voxels.dtype.kind == "f" and path.name.lower().endswith((".nii", ".nii.gz")):
        bad = int((~np.isfinite(np.asanyarray(nibabel.load(path).dataobj))).sum())  # ITK has turned them into zeros
    elif not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~np.isfinite(voxels)).sum())
    if bad:
        raise UDAError(
            f"{path}: {bad} of {voxels.size} voxels are NaN or infinite; expected finite intensities. "
            "Replace them by a value that means background in this modality."
        )
    if low == high:
        raise UDAError(
            f"{path}: every voxel is {low}; expected an image. An empty scan cannot be normalised: leave it out."
        )


def check_same_geometry(image: sitk.Image, path: Path, other: sitk.Image, other_path: Path) -> None:
    """Raise ``UDAError`` unless both grids have the same size and their corners lie within 0.1 voxel of each other."""
    names = ["size", "spacing", "origin", "direction"]
    values = [(image.GetSize(), other.GetSize()), (image.GetSpacing(), other.GetSpacing())]
    values += [(image.GetOrigin(), other.GetOrigin()), (image.GetDirection(), other.GetDirection())]
    if image.GetSize() == other.GetSize():
        corners = product(*[(0, n - 1) for n in image.GetSize()])
        gap = max(
            math.dist(image.TransformIndexToPhysicalPoint(c), other.TransformIndexToPhysicalPoint(c)) for c in corners
        )
        if gap <= 0.1 * min(image.GetSpacing()) and np.allclose(image.GetSpacing(), other.GetSpacing(), rtol=1e-3):
            return
    different = [
        f"{name} {_short(a)} and {_short(b)}"
        for name, (a, b) in zip(names, values, strict=True)
        if not np.allclose(a, b, rtol=1e-3, atol=1e-3)
    ]
    raise UDAError(
        f"{other_path}: its geometry differs from that of {path}: {'; '.join(different) or 'corners'} "
        f"(here the second). Expected the same grid: resample {other_path.name} onto {path.name}, or find the file "
        "that belongs to it."
    )


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.5g}" for v in values) + ")"


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
    """

    values: Mapping[int, int]
    ignore_other: bool = False
    names: Mapping[int, str] = field(default_factory=dict)
    hint: str = "Correct the label file."

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
                f"{path}: the label holds the values {_some(sorted(unknown))}, which are not in the map; expected only "
                f"{known}. {self.hint}"
            )
        return classes


def _some(values: list[int], limit: int = 20) -> str:
    return ", ".join(map(str, values[:limit])) + (f" and {len(values) - limit} more" if len(values) > limit else "")
