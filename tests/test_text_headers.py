"""MetaImage and NRRD whose headers lack what counts, or say it in another unit."""

from __future__ import annotations

import locale
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_uda.errors import UDAError
from nnunet_uda.images.reading import check_whole, read_image, remarks

VOXELS = np.random.default_rng(0).normal(0, 100, (4, 6, 8)).astype(np.float32)
NRRD = {"type": "float", "dimension": "3", "sizes": "8 6 4", "encoding": "raw", "endian": "little"}
PLACED = NRRD | {"space": "left-posterior-superior", "space directions": "(1,0,0) (0,1,0) (0,0,3)"}


def nrrd(path: Path, fields: dict[str, str]) -> Path:
    header = "NRRD0004\n# made here\n" + "".join(f"{key}: {value}\n" for key, value in fields.items())
    path.write_bytes(header.encode() + b"\n" + VOXELS.tobytes())
    return path


def image(path: Path, changed: tuple[str, str] = ("", "")) -> Path:
    """A file of ITK's, one line of its header changed."""
    made = sitk.GetImageFromArray(VOXELS)
    made.SetSpacing((1.0, 1.0, 3.0))
    sitk.WriteImage(made, str(path))
    content = path.read_bytes()
    assert changed[0].encode() in content
    path.write_bytes(content.replace(*(part.encode() for part in changed)))
    return path


def test_what_itk_writes_is_read_without_a_remark(tmp_path):
    for ending in (".mha", ".mhd", ".nrrd", ".nhdr"):
        path = image(tmp_path / f"a{ending}")
        assert (sitk.GetArrayFromImage(read_image(path)) == VOXELS).all()
        assert remarks(path) == ([], [])


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_the_file_of_the_voxels_is_named_where_it_is_missing(tmp_path, ending):
    path = image(tmp_path / f"a{ending}")
    (beside,) = set(tmp_path.iterdir()) - {path}
    beside.unlink()
    for read in (read_image, check_whole):
        with pytest.raises(UDAError, match=rf"a\{ending}: its data file '{beside.name}' is missing"):
            read(path)


@pytest.mark.parametrize(
    ("unit", "wrong"), [("cm", True), ("Micrometers", True), ("m", True), ("mm", False), ("", False)]
)
def test_other_units_than_mm_are_refused(tmp_path, unit, wrong):
    path = nrrd(tmp_path / "a.nrrd", PLACED | {"space units": f'"{unit}" "{unit}" "{unit}"'})
    if wrong:
        with pytest.raises(UDAError, match=f"a.nrrd: its axes are in '{unit}', which is read as mm"):
            read_image(path)
    else:
        assert read_image(path).GetSpacing() == (1, 1, 3)


def test_what_a_header_does_not_say_is_remarked(tmp_path):
    bare = nrrd(tmp_path / "bare.nrrd", NRRD)
    assert read_image(bare).GetSpacing() == (1, 1, 1)
    (warning,) = remarks(bare)[1]
    assert "bare.nrrd: its header holds no voxel size, so 1 mm is a guess of the reader and no orientation" in warning
    assert "no voxel size" not in remarks(nrrd(tmp_path / "b.nrrd", NRRD | {"spacings": "1 1 3"}))[1][0]
    meta = image(tmp_path / "a.mha", ("TransformMatrix = 1 0 0 0 1 0 0 0 1\n", ""))
    read_image(meta)
    assert "a.mha: its header holds no orientation" in remarks(meta)[1][0]


def test_a_space_that_is_not_the_bodys_is_remarked(tmp_path):
    for space in ("left-posterior-superior", "RAS", "right-anterior-superior-time"):
        assert remarks(nrrd(tmp_path / "a.nrrd", PLACED | {"space": space})) == ([], [])
    other = nrrd(tmp_path / "a.nrrd", PLACED | {"space": "scanner-xyz"})
    read_image(other)
    assert "holds the space 'scanner-xyz', so which side is left is a guess" in remarks(other)[1][0]


def test_formats_that_hold_no_orientation_are_remarked(tmp_path):
    for ending, more in ((".gipl", False), (".tif", True), (".vtk", True)):
        path = image(tmp_path / f"a{ending}")
        read_image(path)
        (warning,) = remarks(path)[1]
        assert f"a{ending}: the format holds no orientation" in warning
        assert ("no way to tell whether a file is whole" in warning) == more


def test_the_locale_stays_as_it_was(tmp_path):
    """ITK's reader of VTK files leaves the process in the locale C."""
    before = locale.setlocale(locale.LC_ALL)
    whole = image(tmp_path / "whole.vtk")
    read_image(whole)
    assert locale.setlocale(locale.LC_ALL) == before
    short = tmp_path / "short.vtk"
    short.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(UDAError, match=r"short\.vtk"):
        read_image(short)
    assert locale.setlocale(locale.LC_ALL) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("Offset = 0 0 0", "Offset = nan 0 0"), "offset in its header is 'nan 0 0'; expected 3 finite numbers"),
        (("Offset = 0 0 0", "Offset = 1e30 0 0"), "its first voxel lies at 1e.30 x 0 x 0 mm; expected a place within"),
        (("ElementSpacing = 1 1 3", "ElementSpacing = -1 1 3"), "elementspacing in .*; expected 3 positive numbers"),
        (("ElementSpacing = 1 1 3", "ElementSpacing = 0 1 3"), "elementspacing in .*; expected 3 positive numbers"),
        (("ElementSpacing = 1 1 3", "ElementSpacing = 1 3"), "elementspacing in .* is '1 3'; expected 3"),
        (("TransformMatrix = 1 0", "TransformMatrix = x 0"), "transformmatrix in its header is .*; expected 9"),
    ],
)
def test_numbers_that_are_none_are_refused(tmp_path, changed, said):
    path = image(tmp_path / "a.mha", changed)
    for read in (read_image, check_whole):
        with pytest.raises(UDAError, match=rf"a\.mha: {said}"):
            read(path)


@pytest.mark.parametrize(
    "changed", [{"space directions": "none (0,1,0) (0,0,3)"}, {"space directions": "(1,0,0) (0,1,0) none"}]
)
def test_an_axis_without_a_length_is_refused(tmp_path, changed):
    path = nrrd(tmp_path / "a.nrrd", PLACED | changed)
    with pytest.raises(UDAError, match=r"a\.nrrd: 'space directions' in its header is .*none.*length of every axis"):
        read_image(path)


@pytest.mark.parametrize("ending", [".mha", ".mhd"])
def test_damaged_compressed_voxels_are_refused(tmp_path, ending):
    """ITK prints that inflating failed, and returns the voxels that it has beside what was in memory."""
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS), str(path), True)
    assert (sitk.GetArrayFromImage(read_image(path)) == VOXELS).all()
    data = path if ending == ".mha" else tmp_path / "a.zraw"
    whole = data.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 255
    head = whole[: -len(zlib.compress(VOXELS.tobytes()))] if ending == ".mha" else b""
    longer = head + zlib.compress(VOXELS.tobytes() + bytes(10))  # of another image than the header's
    assert ending == ".mhd" or head.endswith(b"LOCAL\n")
    for damaged in (bytes(flipped), whole[:-2], whole[:-200], longer):
        data.write_bytes(damaged)
        for read in (read_image, check_whole):
            with pytest.raises(UDAError, match=rf"a\{ending}: its compressed voxels are .*It is corrupt: get it again"):
                read(path)
    plain = image(tmp_path / f"b{ending}", ("CompressedData = False", "CompressedData = True"))
    with pytest.raises(UDAError, match=rf"b\{ending}: its compressed voxels are 0 bytes, 768 are announced"):
        read_image(plain)


def test_axes_that_are_not_at_right_angles_are_refused(tmp_path):
    path = image(tmp_path / "a.mha", ("TransformMatrix = 1 0 0 0 1 0 0 0 1", "TransformMatrix = 1 0.5 0 0 1 0 0 0 1"))
    for read in (read_image, check_whole):
        with pytest.raises(UDAError, match=r"a\.mha: its axes are not at right angles"):
            read(path)


def test_a_short_file_is_not_called_missing(tmp_path):
    path = image(tmp_path / "a.mha")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UDAError, match=r"a\.mha: cannot be read .*truncated") as error:
        read_image(path)
    assert "No such file" not in str(error.value) and "0x" not in str(error.value)


def test_folders_and_links_in_place_of_files(tmp_path):
    (tmp_path / "a.nii.gz").mkdir()
    (tmp_path / "b.nii.gz").symlink_to(tmp_path / "gone")
    (tmp_path / "c.mha").symlink_to(tmp_path / "c.mha")
    said = {
        "a.nii.gz": "a folder; expected an image file",
        "b.nii.gz": "a link to .*gone, where there is no file",
        "c.mha": "a link to .*c.mha, where there is no file",
        "d.mha": "there is no such file",
        "e.nii.gz": "a pipe, a socket or a device; expected an image",
    }
    os.mkfifo(tmp_path / "e.nii.gz")
    for name, words in said.items():
        with pytest.raises(UDAError, match=f"{name}: {words}"):
            read_image(tmp_path / name)
