"""Contours to voxels, against shapes whose volume is known, on straight, oblique and flipped grids."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from support.rtstruct import DIRECTIONS, grid, physical, ring, rings, save_rtstruct

from nnunet_uda.errors import UDAError
from nnunet_uda.images.rtstruct import Contour, rasterise, read_contours_json, read_rtstruct


def volume(mask: np.ndarray, image: sitk.Image) -> float:
    return float(mask.sum() * np.prod(image.GetSpacing()))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sphere_and_cylinder_have_their_volume_and_place(direction):
    image = grid(direction)
    axes = np.array(DIRECTIONS[direction]).reshape(3, 3)
    assert np.allclose(axes @ axes.T, np.eye(3))
    sphere = rings(image, lambda d: math.sqrt(15**2 - d**2) if abs(d) < 15 else None)
    mask, notes = rasterise(sphere, image, Path("r.dcm"))
    assert volume(mask, image) == pytest.approx(4 / 3 * math.pi * 15**3, rel=0.01) and notes == []
    assert np.allclose(np.argwhere(mask).mean(axis=0), (20, 32, 30), atol=0.05)
    cylinder = rings(image, lambda d: 12 if abs(d) < 7 else None)
    mask, _ = rasterise(cylinder, image, Path("r.dcm"))
    assert sorted(set(np.nonzero(mask)[0])) == list(range(16, 25))
    assert volume(mask, image) == pytest.approx(math.pi * 12**2 * 9 * 1.5, rel=0.01)


def test_against_every_voxel_one_by_one():
    """A concave outline: inside is where an odd number of edges is crossed on the way out."""
    image = grid("oblique", (20, 18, 3))
    outline = np.array([(2.3, 2.2), (16.7, 3.1), (9.4, 8.6), (15.2, 15.8), (3.6, 14.1)])
    points = physical(image, np.column_stack([outline, np.ones(5)]))
    mask, _ = rasterise([Contour(points)], image, Path("r.dcm"))
    for y in range(18):
        for x in range(20):
            crossed = 0
            for (x1, y1), (x2, y2) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
                crossed += (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1)
            assert mask[1, y, x] == crossed % 2, (x, y)
    assert not mask[[0, 2]].any()


def area(contours: list[Contour], image: sitk.Image) -> float:
    """Square mm of what is drawn in the middle slice, and nothing elsewhere."""
    mask = rasterise(contours, image, Path("r.dcm"))[0]
    assert not mask[:20].any() and not mask[21:].any()
    return volume(mask, image) / 1.5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contours_inside_others_are_holes_and_islands_in_any_order(direction):
    image = grid(direction)
    outer, middle, inner = (ring(image, radius) for radius in (12, 8, 4))
    assert area([outer], image) == pytest.approx(math.pi * 144, rel=0.02)
    for order in ([outer, middle], [middle, outer], [outer, middle, outer], [middle, middle, outer]):
        assert area(order, image) == pytest.approx(math.pi * (144 - 64), rel=0.03)
    for order in ([outer, middle, inner], [inner, outer, middle], [middle, inner, outer]):
        assert area(order, image) == pytest.approx(math.pi * (144 - 64 + 16), rel=0.03)
    xor = [ring(image, radius, xor=True) for radius in (12, 8)]
    assert area(xor, image) == area([outer, middle], image)
    assert rasterise([outer, middle, inner], image, Path("r.dcm"))[1] == [
        "1 contours inside others, cut out of them as holes"
    ]


def test_contours_beside_each_other_overlapping_or_drawn_twice_are_united():
    image = grid()
    left, right = (Contour(ring(image, 8).points + np.array([shift, 0, 0])) for shift in (-5.0, 5.0))
    lens = 2 * 64 * math.acos(5 / 8) - 10 * math.sqrt(64 - 25)
    assert area([left, right], image) == pytest.approx(2 * math.pi * 64 - lens, rel=0.02)
    assert area([left, left, left], image) == area([left], image) == pytest.approx(math.pi * 64, rel=0.02)
    apart = [Contour(ring(image, 4).points + np.array([shift, 0, 0])) for shift in (-6.0, 6.0)]
    assert area(apart, image) == pytest.approx(2 * math.pi * 16, rel=0.03)
    assert area([ring(image, 14), *apart], image) == pytest.approx(math.pi * (196 - 32), rel=0.03)
    assert rasterise([left, right], image, Path("r.dcm"))[1] == []


def test_many_contours_of_one_plane_take_the_memory_of_one():
    image = grid()
    outlines = [ring(image, 20 - 0.05 * number, corners=12) for number in range(60)]
    tracemalloc.start()
    rasterise(outlines, image, Path("r.dcm"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e5  # the indices of all their pixels at once take 2 MB


def test_a_hole_with_a_keyhole_and_planes_nearest_to_one_slice():
    image = grid()
    outer, inner = (ring(image, radius, corners=360).points for radius in (12, 6))
    keyhole = Contour(np.concatenate([outer, outer[:1], inner[:1], inner[:0:-1], inner[:1]]))
    assert area([keyhole], image) == pytest.approx(math.pi * (144 - 36), rel=0.02)
    # the cross sections of a cone that lie nearest to one slice are inside each other, but in planes of their own
    cone = [ring(image, 12, shift=-0.2), ring(image, 8), ring(image, 4, shift=0.2)]
    assert area(cone, image) == area([ring(image, 12)], image)


@pytest.mark.parametrize("implicit", [False, True])
def test_contours_of_any_length_are_read(tmp_path, implicit):
    """In explicit VR a value beyond 64 kB is written as UN."""
    image = grid()
    long = ring(image, 12, corners=5000)
    path = save_rtstruct(tmp_path / "RTSS.dcm", [("TV", [long])], implicit=implicit)
    assert len("\\".join(f"{v:.4f}" for v in long.points.ravel())) > 1 << 16
    assert (b"UN\0\0" in path.read_bytes()) is not implicit
    assert np.allclose(read_rtstruct(path).named[0][1][0].points, long.points, atol=1e-4)


def test_sequences_written_as_unknown(tmp_path):
    """Other software writes a sequence that it does not know as UN, its items in implicit VR (PS3.5, 6.2.2)."""
    path = save_rtstruct(tmp_path / "RTSS.dcm", [("TV", [ring(grid(), 12, corners=5000)])])
    dataset = dcmread(path)
    buffer, alone = DicomBytesIO(), Dataset()
    buffer.is_little_endian, buffer.is_implicit_VR = True, True
    alone.ROIContourSequence = dataset.ROIContourSequence
    write_dataset(buffer, alone)
    dataset[0x30060039] = DataElement(0x30060039, "UN", buffer.getvalue()[8:])
    dataset.save_as(path)
    assert len(read_rtstruct(path).named[0][1][0].points) == 5000


def test_elements_that_are_missing_or_empty(tmp_path):
    path = save_rtstruct(tmp_path / "RTSS.dcm", [("TV", [ring(grid(), 12)])])
    for spoil in (
        lambda ds: setattr(ds, "PatientID", ""),
        lambda ds: delattr(ds, "PatientID"),
        lambda ds: setattr(ds.StructureSetROISequence[0], "ROIName", None),
        lambda ds: setattr(ds.ROIContourSequence[0], "ContourSequence", []),
        lambda ds: delattr(ds.ROIContourSequence[0], "ContourSequence"),
        lambda ds: setattr(ds.ROIContourSequence[0].ContourSequence[0], "ContourData", None),
        lambda ds: delattr(ds.ROIContourSequence[0].ContourSequence[0], "ContourData"),
        lambda ds: delattr(ds.ROIContourSequence[0].ContourSequence[0], "ContourGeometricType"),
        lambda ds: setattr(ds.ROIContourSequence[0], "ReferencedROINumber", None),
        lambda ds: setattr(reference(ds), "SeriesInstanceUID", ""),
        lambda ds: delattr(reference(ds), "SeriesInstanceUID"),
        lambda ds: delattr(ds, "ReferencedFrameOfReferenceSequence"),
        lambda ds: setattr(ds, "ReferencedFrameOfReferenceSequence", []),
        lambda ds: setattr(ds, "Modality", ""),
    ):
        dataset = dcmread(path)
        spoil(dataset)
        dataset.save_as(tmp_path / "spoilt.dcm")
        read = read_rtstruct(tmp_path / "spoilt.dcm")
        assert len(read.named) == 1 and read.patient in ("", "VS-SEG-001") and read.series in ((), ("1.2.3",))


def reference(dataset: Dataset) -> Dataset:
    """The item that says which series an RTSTRUCT was drawn on."""
    return dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]


def test_contours_between_slices_go_to_the_nearest_and_the_distance_is_told():
    image = grid("oblique")
    mask, notes = rasterise(rings(image, lambda d: 9 if d == 0 else None, shift=0.3), image, Path("r.dcm"))
    assert set(np.nonzero(mask)[0]) == {20} and notes == ["contours up to 0.45 mm off the slices, drawn on the nearest"]


def test_contours_of_another_image_are_refused():
    image = grid()
    ring = rings(image, lambda d: 9 if d == 0 else None)[0].points
    crossing = np.array([(10, 10, 3), (20, 10, 3), (20, 20, 6)], float)
    for points, message in (
        (
            ring + np.array([0, 0, 60]),
            r"r\.dcm: a contour lies outside the image, around voxel \(30, 32, 60\) of \(60, 64, 40\)",
        ),
        (ring - np.array([0, 0, 32]), "lies outside the image"),
        (ring + np.array([30, 0, 0]), "lies outside the image"),
        (ring - np.array([0, 30, 0]), "lies outside the image"),
        (physical(image, crossing), r"r\.dcm: a contour runs through 3\.0 slices"),
        (ring * np.nan, "not finite"),
    ):
        with pytest.raises(UDAError, match=message):
            rasterise([Contour(points)], image, Path("r.dcm"))
    assert not rasterise([Contour(ring[:2])], image, Path("r.dcm"))[0].any()


def test_rtstruct_and_json_hold_the_same(tmp_path):
    image = grid("oblique")
    sphere = rings(image, lambda d: math.sqrt(9**2 - d**2) if abs(d) < 9 else None)
    named = [("Brainstem", sphere[:1]), ("TV", sphere), ("empty", [])]
    read = read_rtstruct(save_rtstruct(tmp_path / "RTSS.dcm", named, "1.2.99"))
    assert [name for name, _ in read.named] == ["Brainstem", "TV", "empty"]
    assert [len(contours) for _, contours in read.named] == [1, len(sphere), 0]
    assert (read.series, read.patient) == (("1.2.99",), "VS-SEG-001")
    content = [
        {"structure_name": name, "LPS_contour_points": [c.points.tolist() for c in contours]}
        for name, contours in named
    ]
    (tmp_path / "contours.json").write_text(json.dumps(content))
    again = read_contours_json(tmp_path / "contours.json")
    assert again.series == () and [name for name, _ in again.named] == ["Brainstem", "TV", "empty"]
    masks = [rasterise(structures.named[1][1], image, structures.path)[0] for structures in (read, again)]
    assert (masks[0] == masks[1]).mean() > 0.9999  # the RTSTRUCT is rounded to 0.1 micrometre
    assert volume(masks[0], image) == pytest.approx(4 / 3 * math.pi * 9**3, rel=0.02)


def test_roi_numbers_not_positions_join_names_and_contours(tmp_path):
    image = grid()
    one, two = (rings(image, lambda d, r=r: r if d == 0 else None) for r in (12, 5))
    path = save_rtstruct(tmp_path / "RTSS.dcm", [("TV", one), ("cochlea", two)])
    items = dcmread(path).ROIContourSequence
    whole = save_rtstruct(
        path, [("TV", one), ("cochlea", two)], ROIContourSequence=[items[1], items[0]]
    )  # the other way round
    named = dict(read_rtstruct(whole).named)
    assert np.allclose(named["TV"][0].points, one[0].points, atol=1e-3)
    assert np.allclose(named["cochlea"][0].points, two[0].points, atol=1e-3)


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "RTSS.dcm"
    path.write_bytes(b"no DICOM at all")
    with pytest.raises(UDAError, match=r"RTSS\.dcm: cannot be read"):
        read_rtstruct(path)
    with pytest.raises(UDAError, match=r"RTSS\.dcm: a DICOM file of modality RTPLAN; expected an RTSTRUCT"):
        read_rtstruct(save_rtstruct(path, [], Modality="RTPLAN"))
    broken = Dataset()
    broken.ReferencedROINumber = 1
    broken.ContourSequence = [Dataset()]
    broken.ContourSequence[0].ContourGeometricType = "CLOSED_PLANAR"
    broken.ContourSequence[0].ContourData = ["1", "2"]
    with pytest.raises(UDAError, match=r"RTSS\.dcm: no valid RTSTRUCT"):
        read_rtstruct(save_rtstruct(path, [("TV", [])], ROIContourSequence=[broken]))
    for text in (
        "{",
        "[1]",
        '[{"structure_name": "TV"}]',
        '[{"structure_name": "TV", "LPS_contour_points": [[1, 2]]}]',
    ):
        (tmp_path / "contours.json").write_text(text)
        with pytest.raises(UDAError, match=r"contours\.json: cannot be read"):
            read_contours_json(tmp_path / "contours.json")
