"""Contours of structures (DICOM RTSTRUCT, or the same as JSON) drawn on the voxels of the image they belong to."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from skimage.draw import polygon

from nnunet_uda.errors import UDAError, printable
from nnunet_uda.images.dicom import Header, read_header
from nnunet_uda.images.geometry import FARTHEST, Grid
from nnunet_uda.images.reading import readable

SAME_PLANE = 0.1
"""In slices: contours nearer to each other than this lie in one plane."""


@dataclass(frozen=True)
class Contour:
    """A closed planar polygon: (points, 3) in mm, DICOM's patient coordinates (LPS). ``xor``: it may cut a hole."""

    points: np.ndarray
    xor: bool = False


@dataclass(frozen=True)
class Structures:
    """What one file outlines: (name, contours) in the file's order, the series it was drawn on, its patient.

    ``series`` and ``patient`` are empty where the file does not say (JSON never does).
    """

    path: Path
    named: tuple[tuple[str, tuple[Contour, ...]], ...]
    series: tuple[str, ...] = ()
    patient: str = ""


def referenced_series(header: Header) -> tuple[str, ...]:
    """SeriesInstanceUIDs that an RTSTRUCT says it was drawn on."""
    uids = (
        series.text("SeriesInstanceUID")
        for frame in header.items("ReferencedFrameOfReferenceSequence")
        for study in frame.items("RTReferencedStudySequence")
        for series in study.items("RTReferencedSeriesSequence")
    )
    return tuple(uid for uid in uids if uid)


def read_rtstruct(path: Path) -> Structures:
    """All structures of an RTSTRUCT file. Contours that enclose no area (points, open lines) are left out."""
    header = read_header(
        path, "Modality", "SOPClassUID", "PatientID", "StructureSetROISequence", "ROIContourSequence",
        "ReferencedFrameOfReferenceSequence", "SpecificCharacterSet",
    )  # fmt: skip
    if header.modality != "RTSTRUCT":
        raise UDAError(
            f"{path}: a DICOM file of modality {header.modality or 'unknown'}; expected an RTSTRUCT. Get the right "
            "file."
        )
    drawn: dict[int, tuple[Contour, ...]] = {}
    for roi in header.items("ROIContourSequence"):
        contours = [_contour(contour) for contour in roi.items("ContourSequence")]
        drawn[roi.whole("ReferencedROINumber", -1)] = tuple(contour for contour in contours if contour is not None)
    named = tuple(
        (roi.text("ROIName"), drawn.get(roi.whole("ROINumber", 0), ()))
        for roi in header.items("StructureSetROISequence")
    )
    return Structures(path, named, referenced_series(header), header.text("PatientID"))


def _contour(contour: Header) -> Contour | None:
    """A closed contour, None for another kind."""
    kind = contour.text("ContourGeometricType")
    if kind not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
        return None
    numbers = contour.numbers("ContourData") or ()
    if len(numbers) % 3:
        raise UDAError(
            f"{contour.path}: no valid RTSTRUCT ({len(numbers)} numbers in a ContourData; expected three for each "
            "point). It is corrupt: get it again."
        )
    return Contour(np.reshape(numbers, (-1, 3)), kind == "CLOSEDPLANAR_XOR")


def read_contours_json(path: Path) -> Structures:
    """A list of ``{"structure_name": ..., "LPS_contour_points": [[[x, y, z], ...], ...]}``, in mm."""
    with readable(path, "a list of structures with structure_name and LPS_contour_points"):
        named = tuple(
            (
                printable(str(structure["structure_name"])),
                tuple(Contour(np.array(points, float).reshape(-1, 3)) for points in structure["LPS_contour_points"]),
            )
            for structure in json.loads(path.read_text(encoding="utf-8"))
        )
    return Structures(path, named)


def rasterise(contours: Sequence[Contour], image: sitk.Image, path: Path) -> tuple[np.ndarray, list[str]]:
    """Voxels of ``image`` whose centre lies inside the contours of their slice.

    Of contours in one plane, one that lies inside another cuts a hole into it, and one inside that hole is an island,
    and so on; contours that overlap otherwise are united. ``xor`` ones are then combined by exclusive or (DICOM PS3.3,
    C.8.8.6.3). Planes nearest to the same slice are united. Slices between contours are not filled in.

    Args:
        contours: of one structure, drawn in the slice planes of ``image``, whose axes may be oblique.
        path: file of the contours, for messages.

    Returns:
        uint8 mask, axes (z, y, x); notes on what was done about contours off the slices, and inside others.

    Raises:
        UDAError: when a contour crosses slices or leaves the image: it was drawn on another one.
    """
    grid = Grid.of(image)
    size, thickness = np.array(grid.size), grid.spacing[2]
    to_index = np.linalg.inv(grid.affine[:3, :3])
    drawn: list[tuple[float, np.ndarray, bool]] = []
    for contour in contours:
        if not (np.abs(contour.points) <= FARTHEST).all():
            raise UDAError(
                f"{path}: a contour has points that are not finite, or {FARTHEST:g} mm away. The file is corrupt: get "
                "it again."
            )
        if len(contour.points) < 3:
            continue
        index = (contour.points - grid.origin) @ to_index.T
        x, y, z = index.T
        if np.ptp(z) > 0.5:
            raise UDAError(
                f"{path}: a contour runs through {np.ptp(z):.1f} slices of the image; expected contours in its slice "
                "planes. They were drawn on another series: find the image that they belong to."
            )
        if index.min() < -1 or (index > size).any() or not 0 <= round(z.mean()) < size[2]:
            place, box = (", ".join(f"{v:.0f}" for v in values) for values in (index.mean(axis=0), size))
            raise UDAError(
                f"{path}: a contour lies outside the image, around voxel ({place}) of ({box}); expected it inside. It "
                "belongs to another scan: find the image that it was drawn on."
            )
        drawn.append((float(z.mean()), np.stack([y, x]), contour.xor))
    drawn.sort(key=lambda contour: contour[0])
    heights = [height for height, _, _ in drawn]
    mask = np.zeros(size[::-1], np.uint8)
    off, holes, at = 0.0, 0, 0
    while at < len(drawn):
        end = bisect_right(heights, heights[at] + SAME_PLANE)
        z = round(sum(heights[at:end]) / (end - at))
        off = max(off, *(abs(height - z) * thickness for height in heights[at:end]))
        filled, cut = _even_odd([outline for _, outline, xor in drawn[at:end] if not xor], mask.shape[1:])
        for _, outline, xor in drawn[at:end]:
            if xor:
                filled[polygon(*outline, filled.shape)] ^= 1
        mask[z] |= filled
        holes, at = holes + cut, end
    # a tenth of a slice is rounding, and changes no voxel
    notes = [f"contours up to {off:.2f} mm off the slices, drawn on the nearest"] if off > 0.1 * thickness else []
    if holes:
        notes.append(f"{holes} contours inside others, cut out of them as holes")
    return mask, notes


def _even_odd(outlines: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, int]:
    """A plane (uint8) of ``shape`` with ``outlines`` ((2, points): y, x) filled or cut out, and how many are holes.

    One is a hole where an odd number of larger ones lies around it. Those around the same pixels count as one: what was
    drawn twice is no hole. Pixels of one outline at a time are held, as a file may have any number of them.
    """
    plane, layers = np.zeros(shape, np.uint8), np.zeros(shape, np.int32)
    sizes = [len(polygon(*outline, shape)[0]) for outline in outlines]
    holes, seen = 0, set()
    for number in sorted(range(len(outlines)), key=sizes.__getitem__, reverse=True):
        inside = polygon(*outlines[number], shape)
        pixels = hashlib.sha256(np.sort(np.ravel_multi_index(inside, shape)).tobytes()).digest()
        if not sizes[number] or pixels in seen:
            continue
        seen.add(pixels)
        hole = int(layers[inside].min()) % 2
        layers[inside] += 1
        plane[inside] = 1 - hole
        holes += hole
    return plane, holes
