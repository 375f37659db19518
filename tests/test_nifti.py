"""NIfTI by its bytes: equal to ITK where a file says one thing, refused or chosen where it says two."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_uda.errors import UDAError
from nnunet_uda.images import nifti
from nnunet_uda.images.geometry import Grid
from nnunet_uda.images.nifti import nifti_geometry
from nnunet_uda.images.reading import check_whole, read_image

SHAPE = (6, 8, 10)
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def moved(x: float = 0.0, flip: bool = False, turn: float = 0.0, stretch: float = 1.0) -> np.ndarray:
    """``AFFINE`` shifted by x voxels, mirrored left to right, turned about z (radians), or with other voxel sizes."""
    affine = AFFINE.copy()
    affine[0, 3] += x
    if flip:
        affine[0] = [-1, 0, 0, SHAPE[0] - 1]
    turned = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    affine[:2, :2] = turned @ affine[:2, :2]
    affine[:3, :3] *= stretch
    return affine


def write(path: Path, qform: np.ndarray | None = AFFINE, sform: np.ndarray | None = AFFINE, **options) -> Path:
    """A scan with these geometries; ``codes`` of both, ``pixdim``, ``array``."""
    array = options.get("array", np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int16))
    kind = nib.Nifti1Pair if path.suffix in (".hdr", ".img") else nib.Nifti1Image
    image = kind(array, AFFINE, dtype=array.dtype)
    codes = options.get("codes", (1, 1))
    image.set_qform(qform, codes[0] if qform is not None else 0)
    image.set_sform(sform, codes[1] if sform is not None else 0)
    if "pixdim" in options:
        image.header["pixdim"][1:4] = options["pixdim"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, str(path.with_suffix(".img") if path.suffix == ".hdr" else path))
    return path


def patch(path: Path, offset: int, value: np.generic) -> Path:
    """Put bytes into a written header."""
    whole = bytearray(gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes())
    whole[offset : offset + value.nbytes] = value.tobytes()
    path.write_bytes(gzip.compress(whole) if path.suffix == ".gz" else bytes(whole))
    return path


def test_what_a_header_is_instead_is_said(tmp_path):
    image = nib.Nifti2Image(np.ones(SHAPE, np.int16), AFFINE)
    nib.save(image, str(tmp_path / "two.nii.gz"))
    with pytest.raises(UDAError, match=r"two.nii.gz: cannot be read \(NIfTI-2\).*save it as NIfTI-1"):
        read_image(tmp_path / "two.nii.gz")
    path = write(tmp_path / "short.nii")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UDAError, match=r"short.nii: the file is truncated, 300 bytes; expected a header of 348"):
        read_image(path)


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "hdr"])
@pytest.mark.parametrize("scale", [None, (2.5, -7.0), (0.0, 3.0), (math.nan, math.nan)])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u8", "f8"])
def test_reads_what_itk_reads_by_slabs(tmp_path, monkeypatch, ending, dtype, scale):
    monkeypatch.setattr(nifti, "SLAB", 200)  # so that there are several
    array = np.random.default_rng(1).integers(0, 90, SHAPE).astype(dtype)
    path = write(tmp_path / f"a.{ending}", array=array, sform=AFFINE.copy())
    if scale is not None:
        for offset, number in zip((112, 116), scale, strict=True):
            patch(path, offset, np.float32(number))
    image, expected = read_image(path), sitk.ReadImage(str(path))
    assert image.GetPixelID() == expected.GetPixelID()
    assert (sitk.GetArrayFromImage(image) == sitk.GetArrayFromImage(expected)).all()
    for part in ("Size", "Spacing", "Origin", "Direction"):
        assert getattr(image, f"Get{part}")() == getattr(expected, f"Get{part}")()


def test_of_two_files_of_one_name_the_named_one_is_read(tmp_path):
    """ITK takes the voxels of a.nii when it is asked for a.nii.gz."""
    arrays = [np.random.default_rng(seed).integers(0, 90, SHAPE).astype(np.uint8) for seed in (1, 2)]
    for name, array in zip(("a.nii", "a.nii.gz"), arrays, strict=True):
        write(tmp_path / name, array=array)
    for name, array in zip(("a.nii", "a.nii.gz"), arrays, strict=True):
        assert (sitk.GetArrayFromImage(read_image(tmp_path / name)).T == array).all()


DISAGREEING = {
    "mirrored": ({"sform": moved(flip=True)}, r"mirrored"),
    "mirrored, aligned": ({"sform": moved(flip=True), "codes": (1, 2)}, r"RAS of .* by its qform and LAS of"),
    "shifted": ({"sform": moved(x=0.2)}, r"from \(0, 0, 0\) by its qform and .* from \(0.2, 0, 0\)"),
    "rotated": ({"sform": moved(turn=0.1)}, "by its qform"),
    "rotated by a degree": ({"sform": moved(turn=0.0175)}, "by its qform"),
    "stretched": ({"sform": moved(stretch=0.7)}, r"1 x 2 x 3 mm .* 0\.7 x 1\.4 x 2\.1 mm"),
    "stretched, sform alone": ({"qform": None, "pixdim": 1}, r"1 x 1 x 1 mm by its pixdim, RAS of 1 x 2 x 3 mm"),
    "stretched a little, sform alone": ({"qform": None, "pixdim": (1, 2, 3.05)}, r"1 x 2 x 3\.05 mm by its pixdim"),
    "no size, sform alone": ({"qform": None, "pixdim": 0}, r"0 x 0 x 0 mm by its pixdim"),
}


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "hdr"])
@pytest.mark.parametrize("case", DISAGREEING)
def test_two_geometries_are_refused_with_both_readings(tmp_path, case, ending):
    options, words = DISAGREEING[case]
    path = write(tmp_path / f"a.{ending}", **options)
    for read in (read_image, check_whole):
        with pytest.raises(UDAError, match=rf"a\.{ending}: .*two geometries that disagree.*{words}"):
            read(path)


@pytest.mark.parametrize("choice", nifti.GEOMETRIES)
@pytest.mark.parametrize("case", ["mirrored", "mirrored, aligned", "shifted", "rotated", "stretched"])
def test_a_chosen_geometry_is_the_one_that_is_read(tmp_path, case, choice):
    options, _ = DISAGREEING[case]
    path = write(tmp_path / "a.nii.gz", **options)
    with nifti_geometry(choice):
        image = read_image(path)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ (options["sform"] if choice == "sform" else AFFINE)
    for corner in ((0, 0, 0), (5, 0, 0), (5, 7, 9)):
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(corner), (lps @ [*corner, 1])[:3], atol=1e-4)
    with pytest.raises(UDAError, match="two geometries"):
        read_image(path)  # the choice has ended


@pytest.mark.parametrize(("shear", "fits"), [(0.03, False), (5e-4, True)])
def test_right_angles_are_right_to_a_thousandth(shear, fits):
    affine = AFFINE.copy()
    affine[0, 1] += 2 * shear
    assert Grid(SHAPE, affine).is_orthogonal == fits


@pytest.mark.parametrize(("code", "factor"), [(1, 1e-3), (2, 1.0), (3, 1e3)])
def test_lengths_are_in_the_unit_that_the_header_names(tmp_path, code, factor):
    """Metres, millimetres and micrometres, whichever geometry is read."""
    scale = np.diag([factor, factor, factor, 1.0])
    path = write(tmp_path / "a.nii", scale @ AFFINE, scale @ moved(flip=True), pixdim=np.array([1, 2, 3]) * factor)
    patch(path, 123, np.uint8(code))
    grids = [nifti.read_header(path).readings[name] for name in nifti.GEOMETRIES]
    assert all(grid.spacing == pytest.approx((1, 2, 3)) for grid in grids)
    assert grids[1].origin == pytest.approx((-5, 0, 0)), "of the flipped one"
    with nifti_geometry("sform"):
        assert read_image(path).GetSpacing() == pytest.approx((1, 2, 3))
    path = patch(write(tmp_path / "b.nii", scale @ AFFINE, scale @ AFFINE), 123, np.uint8(code))
    assert read_image(path).GetSpacing() == pytest.approx((1, 2, 3)), "as ITK has it"


def test_a_choice_that_the_file_does_not_offer(tmp_path):
    path = write(tmp_path / "a.nii", qform=None, pixdim=1)
    with (
        nifti_geometry("qform"),
        pytest.raises(UDAError, match=r"qform, the file has no valid one .* Use -nifti_geometry sform"),
    ):
        read_image(path)
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.5
    path = write(tmp_path / "b.nii", sform=sheared)
    with nifti_geometry("sform"), pytest.raises(UDAError, match=r"not at right angles .* Use -nifti_geometry qform"):
        read_image(path)
    with nifti_geometry("qform"):
        assert read_image(path).GetSpacing() == (1, 2, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"sform": None},
        {"qform": None},
        {"sform": moved(x=0.09)},
        {"sform": moved(turn=1e-3)},
        {"codes": (1, 4)},
        {"qform": moved(flip=True), "sform": moved(flip=True)},
    ],
)
def test_one_geometry_or_two_that_agree_are_read(tmp_path, options):
    with nifti_geometry("sform"):  # of no matter where nothing is to be chosen
        chosen = read_image(write(tmp_path / "a.nii.gz", **options))
    image = read_image(tmp_path / "a.nii.gz")
    assert image.GetSpacing() == chosen.GetSpacing() == pytest.approx((1, 2, 3), rel=1e-3)
    assert nifti.read_header(tmp_path / "a.nii.gz").note == ""


def test_quaternions_near_half_a_turn_are_no_disagreement(tmp_path):
    """There single precision holds the angle to a thousandth only, which is a voxel at the corner of a large scan."""
    shape = (512, 512, 2)
    for angle in np.linspace(1e-4, 5e-4, 5):
        affine = np.diag([0.5, 0.5, 3, 1.0])
        affine[:2, :2] = 0.5 * np.array([[-math.cos(angle), math.sin(angle)], [-math.sin(angle), -math.cos(angle)]])
        path = write(tmp_path / "a.nii", affine, affine, array=np.ones(shape, np.uint8))
        assert nifti.read_header(path).disagreement == ""


def test_no_orientation_at_all_is_noted(tmp_path):
    header = nifti.read_header(write(tmp_path / "a.nii", None, None))
    assert "qform_code and sform_code are both 0" in header.note and header.grid is None
    assert read_image(tmp_path / "a.nii").GetSpacing() == (1, 2, 3)
    nib.save(nib.AnalyzeImage(np.ones(SHAPE, np.int16), AFFINE), str(tmp_path / "b.img"))
    for ending in ("hdr", "img"):
        assert "Analyze" in nifti.read_header(tmp_path / f"b.{ending}").note
    assert read_image(tmp_path / "b.hdr").GetSize() == SHAPE


BROKEN = {
    "vox_offset": (108, [math.nan, math.inf, -math.inf, -352, 1e30, 352.5, 0, 1e6]),
    "slope": (112, [math.inf, -math.inf]),
    "intercept": (116, [math.inf]),
    "pixdim[1]": (80, [0, -1, math.nan, math.inf, 1000, 1e-3 / 8]),
    "dim[0]": (40, [np.int16(v) for v in (0, -3, 8, 300)]),
    "dim[1]": (42, [np.int16(v) for v in (0, -6, 32767)]),
    "datatype": (70, [np.int16(v) for v in (0, -4, 8, 128, 32767)]),
    "bitpix": (72, [np.int16(v) for v in (-16, 8, 32)]),
    "quatern_b": (256, [math.nan, 2.0, 1e30]),
    "srow_x[0]": (280, [math.nan, 0.0, 1e30]),
    "qoffset_x": (268, [math.nan, math.inf]),
    "magic": (344, [np.int32(0), np.int32(7)]),
    "sizeof_hdr": (0, [np.int32(0), np.int32(540)]),
}


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
@pytest.mark.parametrize("field", BROKEN)
def test_broken_headers_are_refused(tmp_path, field, ending):
    offset, values = BROKEN[field]
    for value in values:
        path = patch(
            write(tmp_path / f"a.{ending}"), offset, np.float32(value) if isinstance(value, float | int) else value
        )
        with pytest.raises(UDAError, match=rf"a\.{ending}: "):
            read_image(path)


def test_the_other_file_of_a_pair(tmp_path):
    path = write(tmp_path / "a.hdr")
    assert (
        sitk.GetArrayFromImage(read_image(path.with_suffix(".img"))) == sitk.GetArrayFromImage(read_image(path))
    ).all()
    path.unlink()
    with pytest.raises(UDAError, match=r"a\.img: its header a\.hdr is missing"):
        read_image(path.with_suffix(".img"))
