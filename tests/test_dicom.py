"""DICOM series made here: what is read back, and what is refused by name."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import litter
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless, generate_uid
from support.dicom import DIRECTIONS, edit, shorter, write_series

from nnunet_uda.dataset_conversion.case import Case, convert_case
from nnunet_uda.errors import UDAError
from nnunet_uda.images.dicom import (
    by_name,
    dicom_files,
    order_series,
    read_series,
    series_folders,
    series_remarks,
)

SHAPE = (6, 5, 7)


def scan(seed: int = 0, dtype=np.int16, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, shape).astype(dtype)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", DIRECTIONS)
@pytest.mark.parametrize("order", ["by position", "reversed", "shuffled"])
def test_round_trip_of_voxels_and_geometry(tmp_path, orientation, order):
    ranks = {"by position": range(6), "reversed": range(5, -1, -1), "shuffled": [3, 0, 5, 1, 4, 2]}[order]
    array, direction = scan(), DIRECTIONS[orientation]
    files = write_series(tmp_path, array, direction=direction, names=[f"s{rank}.dcm" for rank in ranks])
    image, series = read_series(tmp_path), order_series(tmp_path)
    assert (sitk.GetArrayFromImage(image) == array).all() and image.GetPixelID() == sitk.sitkInt16
    assert series.files == files and series.size == image.GetSize() == (7, 5, 6)
    assert np.allclose(image.GetSpacing(), (0.75, 0.5, 2.0), atol=1e-5)  # SliceThickness says 9.5
    assert np.allclose(image.GetOrigin(), (-10.5, 20.25, -30), atol=1e-5)
    assert np.allclose(np.reshape(image.GetDirection(), (3, 3)), direction, atol=1e-5)
    corner = image.TransformIndexToPhysicalPoint((6, 4, 5))
    expected = np.array([-10.5, 20.25, -30]) + direction @ (np.array([6, 4, 5]) * [0.75, 0.5, 2.0])
    assert np.allclose(corner, expected, atol=1e-4)
    assert order_series(files).files == series.files


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(1, -1000, np.int16), (2, 3, np.int16), (50, 0, np.int32), (0.5, 0, np.float32), (1, 0.25, np.float32)],
)
def test_rescale_slope_and_intercept(tmp_path, slope, intercept, dtype):
    def rescaled(ds: pydicom.Dataset, z: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)

    array = scan(dtype=np.uint16)
    write_series(tmp_path, array, change=rescaled)
    voxels = sitk.GetArrayFromImage(read_series(tmp_path))
    assert voxels.dtype == dtype and (voxels == array * float(slope) + intercept).all()


def test_every_slice_has_its_own_slope(tmp_path):
    def rescaled(ds: pydicom.Dataset, z: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = str(1 + 0.5 * z), "0"

    array = scan(dtype=np.uint16)
    write_series(tmp_path, array, change=rescaled)
    voxels = sitk.GetArrayFromImage(read_series(tmp_path))
    assert voxels.dtype == np.float32 and (voxels == array * (1 + 0.5 * np.arange(6))[:, None, None]).all()


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_empty_elements_count_as_missing(tmp_path, how):
    optional = (
        "RescaleSlope", "RescaleIntercept", "NumberOfFrames", "SliceThickness", "SeriesDescription", "PatientName",
        "ModalityLUTSequence", "Modality", "SOPInstanceUID", "InstanceNumber", "StudyInstanceUID",
    )  # fmt: skip

    def change(ds: pydicom.Dataset, z: int) -> None:
        for keyword in optional:
            if how == "empty":
                setattr(ds, keyword, None)
            elif keyword in ds:
                delattr(ds, keyword)

    for path in write_series(tmp_path, scan()):
        ds = pydicom.dcmread(path)
        change(ds, 0)
        ds.save_as(path)
    image = read_series(tmp_path)
    assert (sitk.GetArrayFromImage(image) == scan()).all() and image.GetPixelID() == sitk.sitkInt16
    assert np.allclose(image.GetSpacing(), (0.75, 0.5, 2.0))


def test_float_pixels_keep_their_fractions(tmp_path):
    def floats(ds: pydicom.Dataset, z: int) -> None:
        ds.BitsAllocated = 32
        for keyword in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
            delattr(ds, keyword)
        ds.FloatPixelData = (scan()[z] + 0.25).astype("<f4").tobytes()

    write_series(tmp_path, scan(), change=floats)
    assert (sitk.GetArrayFromImage(read_series(tmp_path)) == scan() + 0.25).all()


def test_deflated_files(tmp_path):
    files = write_series(tmp_path, scan())
    for path in files:
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.save_as(path)
    assert (sitk.GetArrayFromImage(read_series(tmp_path)) == scan()).all()
    content = files[0].read_bytes()
    end = 144 + pydicom.dcmread(files[0]).file_meta.FileMetaInformationGroupLength
    zeros = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = b"".join(zeros.compress(bytes(2**24)) for _ in range(17)) + zeros.flush()
    files[0].write_bytes(content[:end] + packed)
    with pytest.raises(UDAError, match=r"IMG-0001\.dcm: cannot be read \(inflated it has more than"):
        read_series(tmp_path)


def test_agrees_with_itk(tmp_path):
    array = scan(3) - 400
    files = write_series(tmp_path, array, direction=DIRECTIONS["oblique"], modality="CT")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in files])
    other, image = reader.Execute(), read_series(tmp_path)
    assert (sitk.GetArrayFromImage(other) == sitk.GetArrayFromImage(image)).all()
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(other, get)(), getattr(image, get)(), atol=1e-4)


def test_large_unsigned_values_and_rle(tmp_path):
    array = scan(dtype=np.uint16) + np.uint16(60000)
    for path in write_series(tmp_path, array):
        ds = pydicom.dcmread(path)
        ds.compress(RLELossless)
        ds.save_as(path)
    voxels = sitk.GetArrayFromImage(read_series(tmp_path))
    assert voxels.dtype == np.int32 and (voxels == array).all()


@pytest.mark.parametrize("uid", [generate_uid, str, lambda: None])
def test_what_an_anonymiser_does_to_series_uids_is_accepted(tmp_path, uid):
    def own_series(ds: pydicom.Dataset, z: int) -> None:
        ds.SeriesInstanceUID = uid()

    write_series(tmp_path, scan(), change=own_series)
    assert (sitk.GetArrayFromImage(read_series(tmp_path)) == scan()).all()


def test_unusual_intensities_of_a_series_are_warned_of(tmp_path):
    def padded(ds: pydicom.Dataset, z: int) -> None:
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.add_new("PixelPaddingValue", "SS", -2000)

    write_series(tmp_path / "P1", scan(), change=padded)
    write_series(tmp_path / "P2", scan())
    (tmp_path / "masks").mkdir()
    report = convert_case(Case("a", (tmp_path / "P1",), read_image=read_series), tmp_path, None, 0)
    inverted, outside = report.warnings
    assert "P1: its slices are to be shown inverted (MONOCHROME1), and are taken as stored: compare" in inverted
    assert "P1: voxels of -2000 lie outside of the scan, and are taken as stored: compare the picture" in outside
    assert series_remarks(tmp_path / "P2") == series_remarks(tmp_path / "masks") == []


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_accepted(tmp_path):
    def rounded(ds: pydicom.Dataset, z: int) -> None:
        ds.ImagePositionPatient = [0, 0, round(0.75 * z, 1)]

    write_series(tmp_path, scan(), change=rounded)
    assert np.allclose(read_series(tmp_path).GetSpacing(), (0.75, 0.5, 0.76))  # 3.8 mm in five steps


def test_files_of_a_folder(tmp_path):
    names = ["IMG10.dcm", "IMG2.DCM", "IMG1.ima", "1.2.840.7", "MR000", "i0000,0000b.dcm"]
    write_series(tmp_path, scan(), names=names)
    write_series(tmp_path, scan(), names=["RTSS.dcm"] * 6, modality="RTSTRUCT")
    for other in ("contours.json", ".hidden.dcm", "notes.txt", "README", "VERSION.2", "DICOMDIR"):
        (tmp_path / other).write_text("{}")
    (tmp_path / "folder").mkdir()
    litter(tmp_path)
    expected = ["1.2.840.7", "IMG1.ima", "IMG2.DCM", "IMG10.dcm", "MR000", "i0000,0000b.dcm"]
    assert [path.name for path in dicom_files(tmp_path)] == expected
    assert [p.name for p in by_name([Path("a-0010.png"), Path("a-9.png"), Path("a-08.png")])] == [
        "a-08.png", "a-9.png", "a-0010.png",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["{}", "{}.DCM", "{}.dicom", "MR.1.2.840.{}", "{}.img"])
def test_any_ending_and_none(tmp_path, name):
    write_series(tmp_path / "a" / "b", scan(), names=[name.format(z) for z in range(6)])
    (tmp_path / "a" / "README").write_text("no DICOM")
    litter(tmp_path)
    assert series_folders(tmp_path) == [tmp_path / "a" / "b"]
    assert (sitk.GetArrayFromImage(read_series(tmp_path / "a" / "b")) == scan()).all()


def test_a_slice_without_an_ending_that_is_cut_short_is_not_missed(tmp_path):
    files = write_series(tmp_path, scan(), names=[f"IM{z}" for z in range(6)])
    for content in (b"", files[5].read_bytes()[:100], bytes(5000)):
        files[5].write_bytes(content)
        with pytest.raises(UDAError, match="IM5: cannot be read"):
            read_series(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_lies_in_a_slices_place_is_not_missed(tmp_path, make):
    """The last one: the rest is a whole series of its own."""
    files = write_series(tmp_path, scan())
    files[5].unlink()
    make(files[5])
    with pytest.raises(UDAError, match=rf"{files[5].name}: a (folder|pipe).*expected an image"):
        read_series(tmp_path)


# --- refusing ---------------------------------------------------------------------------------------------------------


def tilted(files: list[Path]) -> None:
    for z, path in enumerate(files):
        edit(path, ImagePositionPatient=[0, 0.3 * z, 2 * z])


def compressed(files: list[Path]) -> None:
    ds = pydicom.dcmread(files[4])
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    ds.PixelData = encapsulate([b"\xff\xd8\xff\xc3 no real stream \xff\xd9"])
    ds.save_as(files[4])


def syntax(uid: str | None) -> Callable[[list[Path]], None]:
    def change(files: list[Path]) -> None:
        ds = pydicom.dcmread(files[3])
        ds.file_meta.TransferSyntaxUID = uid
        ds.save_as(files[3], implicit_vr=False, little_endian=True, enforce_file_format=False)

    return change


def no_number(files: list[Path]) -> None:
    edit(files[3], NumberOfFrames=1234)
    files[3].write_bytes(files[3].read_bytes().replace(b"IS\x04\x001234", b"IS\x04\x00abc "))


def without(tag: str) -> Callable[[list[Path]], None]:
    def remove(files: list[Path]) -> None:
        ds = pydicom.dcmread(files[3])
        delattr(ds, tag)
        ds.save_as(files[3])

    return remove


def copied(files: list[Path], name: str, **tags: object) -> None:
    path = files[2].with_name(name)
    path.write_bytes(files[2].read_bytes())
    edit(path, **tags)


def in_micrometres(files: list[Path]) -> None:
    for z, path in enumerate(files):
        edit(path, PixelSpacing=["0.0005", "0.00075"], ImagePositionPatient=[0, 0, z * 0.002])


def all_gone(files: list[Path]) -> None:
    for path in files:
        path.unlink()


MALFORMED = {
    "missing slice": (lambda f: f[2].unlink(), r"IMG-0002\.dcm: 4\.000 mm to the next slice IMG-0004.*about 1 missing"),
    "doubled slice": (lambda f: copied(f, "copy.dcm"), r"at the same position as \S+\.dcm, -26\.00 mm"),
    "extra slice": (
        lambda f: copied(f, "extra.dcm", ImagePositionPatient=[-10.5, 20.25, -25]),
        r"IMG-0003\.dcm: 1\.000 mm to the next slice extra\.dcm, 2\.000 mm between",
    ),
    "two series": (lambda f: edit(f[4], SeriesInstanceUID="1.9"), r"IMG-0005\.dcm: 2 series in one folder, of 5, 1 "),
    "another size": (
        lambda f: edit(f[1], Rows=7, Columns=5),
        r"IMG-0002\.dcm: the slice is 5 x 7 of .*the others are 7 x 5 of 0\.75 x 0\.5 mm",
    ),
    "another orientation": (
        lambda f: edit(f[0], ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), r"IMG-0001\.dcm: the slice is .*-1\.000;"
    ),
    "another pixel spacing": (lambda f: edit(f[5], PixelSpacing=[0.5, 0.8]), r"IMG-0006\.dcm: .*0\.8 x 0\.5 mm"),
    "tilted gantry": (tilted, r"IMG-0006\.dcm: shifted by 1\.50 mm within the slice plane"),
    "no DICOM": (
        lambda f: f[3].write_bytes(b"garbage" * 50), r"IMG-0004\.dcm: cannot be read \(.*from the header\.\); exp"
    ),
    "cut in the header": (lambda f: shorter(f[3], 0.4), r"IMG-0004\.dcm: (cannot be read|without)"),
    "cut in the pixels": (lambda f: shorter(f[3], 0.97), r"IMG-0004\.dcm: cannot be read"),
    "no pixels": (without("PixelData"), r"IMG-0004\.dcm: cannot be read"),
    "no position": (without("ImagePositionPatient"), r"IMG-0004\.dcm: without ImagePositionPatient"),
    "no orientation": (without("ImageOrientationPatient"), r"IMG-0004\.dcm: without ImageOrientationPatient"),
    "no spacing": (without("PixelSpacing"), r"IMG-0004\.dcm: without PixelSpacing"),
    "axes not at right angles": (
        lambda f: edit(f[3], ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), r"IMG-0004\.dcm: .*at right angles"
    ),
    "spacing of zero": (lambda f: edit(f[3], PixelSpacing=[0, 1]), r"IMG-0004\.dcm: size .*positive"),
    "compressed": (compressed, r"IMG-0005\.dcm: .*JPEG Lossless.*1\.2\.840\.10008\.1\.2\.4\.70.*gdcmconv --raw"),
    "empty position": (lambda f: edit(f[3], ImagePositionPatient=None), r"0004\.dcm: without ImagePositionPatient"),
    "empty series": (
        lambda f: edit(f[3], SeriesInstanceUID=""), r"IMG-0004\.dcm: 2 series in one folder.*UID is empty"
    ),
    "several volumes in one series": (
        lambda f: [copied([f[z]] * 3, f"echo{z}.dcm") for z in range(6)],
        r"at the same position as \S+\.dcm.* So it is with 6 of 12 slices: .*several volumes .times, echoes, phases",
    ),
    "micrometres": (in_micrometres, r"IMG-0001\.dcm: its voxels are 0\.00075 x 0\.0005 x 0\.002 mm.*another unit"),
    "micrometres in the plane alone": (
        lambda f: [edit(path, PixelSpacing=[500, 750]) for path in f],
        r"IMG-0001\.dcm: its voxels are 750 x 500 x 2 mm.*another unit",
    ),
    "one place for all slices": (
        lambda f: [edit(path, ImagePositionPatient=[0, 0, 0]) for path in f],
        r"at the same position as \S+\.dcm, 0\.00 mm.* So it is with 5 of 6 slices",
    ),
    "a position of two numbers": (
        lambda f: edit(f[3], ImagePositionPatient=[1, 2]), r"0004\.dcm: ImagePositionPatient is \(1.0, 2.0\); .*3 num"
    ),
    "a position beyond any scanner": (
        lambda f: edit(f[3], ImagePositionPatient=[0, 0, "1e300"]), r"IMG-0004\.dcm: .*expected a slice of a scan"
    ),
    "slope of zero": (lambda f: edit(f[3], RescaleSlope=0), r"IMG-0004\.dcm: RescaleSlope 0 and"),
    "slope of 1e19": (lambda f: edit(f[3], RescaleSlope="1e19"), r"IMG-0004\.dcm: RescaleSlope 1e\+19 and"),
    "slope of 1e300": (lambda f: edit(f[3], RescaleSlope="1e300"), r"IMG-0004\.dcm: RescaleSlope 1e\+300 and"),
    "two slopes": (lambda f: edit(f[3], RescaleSlope=[1, 2]), r"IMG-0004\.dcm: RescaleSlope is \(1.0, 2.0\); .*one"),
    "frames that are no number": (no_number, r"IMG-0004\.dcm: NumberOfFrames is 'abc'; exp"),
    "two numbers of frames": (lambda f: edit(f[3], NumberOfFrames=[1, 2]), r"0004\.dcm: NumberOfFrames is .*one num"),
    "samples twice": (lambda f: edit(f[3], SamplesPerPixel=[1, 1]), r"IMG-0004\.dcm: SamplesPerPixel is .*one number"),
    "a transfer syntax that is none": (syntax("1.2.3"), r"IMG-0004\.dcm: cannot be read"),
    "no transfer syntax": (syntax(None), r"IMG-0004\.dcm: cannot be read"),
    "a size beyond memory": (lambda f: edit(f[3], Rows=65535, Columns=65535), r"IMG-0004\.dcm: size \(65535, 65535\)"),
    "indices of colours": (
        lambda f: edit(f[0], PhotometricInterpretation="PALETTE COLOR"), r"IMG-0001\.dcm: .*PALETTE COLOR; expected"
    ),
    "one multi-frame file": (
        lambda f: (all_gone(f[1:]), edit(f[0], NumberOfFrames=12)), r"IMG-0001\.dcm: a multi-frame DICOM of 12 frames"
    ),
    "an enhanced file": (
        lambda f: (without("PixelSpacing")(f), edit(f[3], PerFrameFunctionalGroupsSequence=[pydicom.Dataset()])),
        r"IMG-0004\.dcm: a multi-frame DICOM of 1 frames.*dcm2niix",
    ),
    "multi-frame": (lambda f: edit(f[0], NumberOfFrames=12), r"IMG-0001\.dcm: a multi-frame DICOM of 12 frames"),
    "colour": (lambda f: edit(f[0], SamplesPerPixel=3), r"IMG-0001\.dcm: 3 samples per pixel"),
    "lookup table": (
        lambda f: edit(f[0], ModalityLUTSequence=[pydicom.Dataset()]), r"IMG-0001\.dcm: .*ModalityLUTSequence"
    ),
    "one slice": (lambda f: all_gone(f[1:]), r"IMG-0001\.dcm: a series of 1 slice"),
    "no slice": (all_gone, r"series: there is no DICOM slice"),
    "no folder": (lambda f: (all_gone(f), f[0].parent.rmdir()), r"series: there is no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_series_are_refused_by_name(tmp_path, case):
    spoil, message = MALFORMED[case]
    spoil(write_series(tmp_path / "series", scan()))
    with pytest.raises(UDAError, match=message):
        read_series(tmp_path / "series")
