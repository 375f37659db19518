"""The shared part of the converters: reading, refusing, label maps, folds, and writing whole or not at all."""

from __future__ import annotations

import errno
import gzip
import json
import math
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import two_geometries
from support.folders import use_folders
from support.kills import held
from support.scans import image_of, save

from nnunet_uda.commands import convert
from nnunet_uda.dataset_conversion.case import Case, Clipping, Group, convert_case
from nnunet_uda.dataset_conversion.dataset import skip_or_refuse, write_dataset
from nnunet_uda.dataset_conversion.splits import folds_of, source_folds
from nnunet_uda.dataset_conversion.windows import IntensityRequest
from nnunet_uda.errors import UDAError
from nnunet_uda.images.geometry import Grid, check_against_source, check_possible
from nnunet_uda.images.intensities import Intensities
from nnunet_uda.images.reading import (
    LabelMap,
    check_image,
    check_same_geometry,
    check_values,
    check_whole,
    read_image,
    write_image,
)

MAP = LabelMap({7: 1})


def scan(seed: int, shape=(6, 8, 10), dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(-500, 500, shape).astype(dtype)


def label(shape=(6, 8, 10), value=7) -> np.ndarray:
    array = np.zeros(shape, np.int16)
    array[2:4, 2:5, 3:6] = value
    return array


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    use_folders(monkeypatch, tmp_path)
    return tmp_path / "nnUNet_raw"


@pytest.fixture
def groups(tmp_path) -> list[Group]:
    source, target = [], []
    for i in range(2):
        image = save(image_of(scan(i)), tmp_path / "in" / f"s{i}.nii.gz")
        source.append(Case(f"s{i}", (image,), save(image_of(label()), tmp_path / "in" / f"s{i}_l.nii.gz"), MAP))
        target.append(Case(f"t{i}", (save(image_of(scan(9 + i)), tmp_path / "in" / f"t{i}.nii.gz"),)))
    return [Group("MR", source, "imagesTr", "labelsTr"), Group("CT", target, "imagesTu")]


def write(groups, **options) -> Path:
    kept = {"intensities": IntensityRequest(None, None), "processes": 1}
    return write_dataset(7, "Tiny", groups, ["organ"], ["intensity"], **{**kept, **options})


def leftovers(raw: Path) -> list[str]:
    return sorted(path.name for path in raw.iterdir() if not path.name.startswith("Dataset"))


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "hdr", "nrrd", "nhdr", "mha", "mhd", "gipl", "gipl.gz"])
def test_reads_every_format_and_refuses_a_truncated_one(tmp_path, ending):
    array = scan(0, (10, 20, 30))
    path = save(image_of(array), tmp_path / f"a.{ending}")
    assert (sitk.GetArrayFromImage(read_image(path)) == array).all()
    data = {"hdr": tmp_path / "a.img", "nhdr": tmp_path / "a.raw", "mhd": tmp_path / "a.raw"}.get(ending, path)
    data.write_bytes(data.read_bytes()[: data.stat().st_size * 2 // 3])
    with pytest.raises(UDAError, match=rf"a\.{ending}: .*(truncated|cannot be read)"):
        read_image(path)


@pytest.mark.parametrize("ending", ["gipl", "gipl.gz", "nii", "hdr"])
def test_the_last_bytes_are_missed_too(tmp_path, ending):
    """ITK puts zeros in their place."""
    path = save(image_of(scan(0)), tmp_path / f"a.{ending}")
    data = tmp_path / "a.img" if ending == "hdr" else path
    data.write_bytes(gzip.compress(gzip.decompress(data.read_bytes())[:-2]) if ending.endswith("gz") else
                     data.read_bytes()[:-2])  # fmt: skip
    with pytest.raises(UDAError, match=rf"a\.{ending}: the file is truncated"):
        read_image(path)


def test_refuses_damaged_nifti(tmp_path):
    path = save(image_of(scan(0)), tmp_path / "a.nii.gz")
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"not an image",
        whole[:-4],  # all voxels there, checksum cut
        whole[:500] + bytes([whole[500] ^ 255]) + whole[501:],
        gzip.compress(gzip.decompress(whole)[:-10]),  # whole gzip of a short NIfTI
    ):
        path.write_bytes(damaged)
        with pytest.raises(UDAError, match=r"a\.nii\.gz: "):
            read_image(path)
    with pytest.raises(UDAError, match=r"none\.nii: there is no such file"):
        read_image(tmp_path / "none.nii")


def test_an_ending_in_letters_of_both_kinds_is_named(tmp_path):
    """ITK calls such a file unreadable, whatever it holds."""
    for name, wrong in (("a.NII.GZ", False), ("b.Nii.gz", True), ("c.nii.GZ", True), ("d.NII", False)):
        path = save(image_of(scan(0)), tmp_path / name.lower()).rename(tmp_path / name)
        if wrong:
            with pytest.raises(UDAError, match=rf"{name}: its name ends in {name[1:]}, .* Rename the file"):
                read_image(path)
        else:
            assert read_image(path).GetSize() == (10, 8, 6)


def test_refuses_dimensions_and_components(tmp_path):
    flat = save(sitk.GetImageFromArray(scan(0)[0]), tmp_path / "flat.nii.gz")
    four = save(sitk.JoinSeries([image_of(scan(0)), image_of(scan(1))]), tmp_path / "four.nii.gz")
    colour = save(sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True), tmp_path / "rgb.mha")
    for path, found in ((flat, "2 dimensions"), (four, "4 dimensions"), (colour, "3 components")):
        with pytest.raises(UDAError, match=rf"{path.name}: .*{found}.*expected one"):
            read_image(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ending", ["nii", "nii.gz", "mha"])
def test_refuses_non_finite(tmp_path, value, ending):
    """ITK reads NaN in a NIfTI as 0."""
    array = scan(0).astype(np.float32)
    array[1, 2, 3] = value
    path = save(image_of(array), tmp_path / f"x.{ending}")
    with pytest.raises(UDAError, match=rf"x\.{ending}: 1 of 480 voxels are NaN or infinite"):
        check_image(read_image(path), path)


@pytest.mark.parametrize("value", [np.finfo(np.float32).min, 1e38, 1e11, -1e11])
@pytest.mark.parametrize("ending", ["nii.gz", "hdr", "mha", "nrrd", "gipl"])
def test_refuses_values_that_no_scan_has(tmp_path, value, ending):
    array = scan(0).astype(np.float32)
    array[1, 2, 3] = value
    path = save(image_of(array), tmp_path / f"x.{ending}")
    with pytest.raises(UDAError, match=rf"x\.{ending}: intensities from .* 1 of 480 voxels are beyond"):
        check_image(read_image(path), path)


def test_the_whole_range_of_32_bits_is_a_scan(tmp_path):
    for low, high in ((-(2**31), 2**31 - 1), (0, 2**32 - 1)):
        array = np.full((3, 4, 5), low, np.int64 if low else np.uint32)
        array[0] = high
        check_image(image_of(array), Path("x.mha"))


def test_refuses_constant():
    with pytest.raises(UDAError, match=r"x\.mha: every voxel is 4"):
        check_image(image_of(np.full((3, 4, 5), 4)), Path("x.mha"))


def test_a_range_that_normalisation_loses_is_refused():
    """Diffusion in m2/s. Of a constant channel nothing is lost: that of a new scan may stand for a missing one."""
    assert check_values(np.zeros((2, 3, 4)), Path("x.mha")) == (0, 0)
    with pytest.raises(UDAError, match=r"x\.mha: intensities from 0 to 4\.79e-09.*another unit"):
        check_image(image_of(np.arange(480.0).reshape(6, 8, 10) * 1e-11), Path("x.mha"))
    check_image(image_of(np.arange(480.0).reshape(6, 8, 10) * 1e-8), Path("x.mha"))


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no such names")
@pytest.mark.parametrize("place", [b"M\xfcller/a.nii.gz", b"M\xfcller.nii.gz", b"M\xfcller.mha"])
def test_a_path_that_is_no_text_is_refused_by_name(tmp_path, place):
    """ITK would end the process."""
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), place)))
    path.parent.mkdir(exist_ok=True)
    os.rename(save(image_of(scan(0)), tmp_path / f"a{''.join(path.suffixes)}"), path)
    for use in (read_image, check_whole, lambda path: write_image(image_of(scan(0)), path)):
        with pytest.raises(UDAError, match=r"M.*ller.*: its path holds bytes that are no UTF-8"):
            use(path)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("size", {"array": np.zeros((6, 8, 11))}),
        ("spacing", {"spacing": (1.0, 1.5, 2.2)}),
        ("origin", {"origin": (3.0, -4.0, 6.0)}),
        ("direction", {"direction": (-1.0, 0, 0, 0, 1, 0, 0, 0, 1)}),
    ],
)
def test_geometry_differences_are_named(what, options):
    image, other = image_of(np.zeros((6, 8, 10))), image_of(**{"array": np.zeros((6, 8, 10)), **options})
    with pytest.raises(UDAError, match=rf"l\.nii: its geometry differs from that of i\.nii: .*{what} \("):
        check_same_geometry(image, Path("i.nii"), other, Path("l.nii"))


def test_geometry_tolerates_header_rounding():
    image = image_of(np.zeros((6, 8, 10)))
    other = image_of(np.zeros((6, 8, 10)), spacing=(1.00001, 1.5, 2.0), origin=(3.0005, -4.0, 5.0))
    check_same_geometry(image, Path("i.nii"), other, Path("l.nii"))


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, np.int64, np.float32])
def test_label_map_against_a_dictionary(dtype):
    values = {5: 2, 90: 1, 30: 0}
    array = np.random.default_rng(0).choice([0, 5, 30, 90], (5, 6, 7)).astype(dtype)
    expected = np.vectorize({0: 0, **values}.get)(array.astype(int))
    assert (LabelMap(values).apply(sitk.GetImageFromArray(array), Path("l")) == expected).all()


def test_label_map_refuses_or_ignores_other_values():
    array = np.array([[[0, 5, 6, 40000, 3, -1]]])  # -1: the last of a list
    with pytest.raises(UDAError, match=r"l\.nii: the label holds the values -1, 3, 6, 40000.*0, 5 \(liver\)"):
        LabelMap({5: 1}, names={5: "liver"}).apply(sitk.GetImageFromArray(array), Path("l.nii"))
    ignored = LabelMap({5: 1}, ignore_other=True).apply(sitk.GetImageFromArray(array), Path("l.nii"))
    assert ignored.tolist() == [[[0, 1, 0, 0, 0, 0]]]
    negative = LabelMap({-1: 1}).apply(sitk.GetImageFromArray(np.array([[[0, -1]]])), Path("l.nii"))
    assert negative.tolist() == [[[0, 1]]]


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_label_map_refuses_non_integers(value):
    with pytest.raises(UDAError, match=r"l\.nii: the label holds non-integer values"):
        LabelMap({1: 1}).apply(sitk.GetImageFromArray(np.array([[[0.0, 1.0, value]]])), Path("l.nii"))


# --- folds ------------------------------------------------------------------------------------------------------------


def test_folds_are_a_seeded_partition():
    ids = [f"c{i:02d}" for i in range(20)]
    folds = folds_of(ids, 4, 1)
    assert [len(fold["val"]) for fold in folds] == [5, 5, 5, 5]
    assert sorted(i for fold in folds for i in fold["val"]) == ids
    assert all(sorted(fold["train"] + fold["val"]) == ids for fold in folds)
    assert folds == folds_of(ids[::-1], 4, 1) != folds_of(ids, 4, 2)
    json.dumps(folds)


def test_too_few_cases_for_the_folds():
    with pytest.raises(UDAError, match=r"4 folds were asked for, with 3 cases \(a, b, c\)"):
        folds_of(["a", "b", "c"], 4, 0)
    warnings: list[str] = []
    assert len(source_folds(["a", "b", "c"], 4, 0, warnings)) == 3 and "3 folds instead of 4" in warnings[0]
    assert source_folds(["a"], 4, 0, warnings) == [{"train": ["a"], "val": ["a"]}] and "measures nothing" in warnings[1]
    assert source_folds([], 4, 0, warnings) == [] and len(warnings) == 2


# --- the dataset ------------------------------------------------------------------------------------------------------


def test_round_trip_keeps_voxels_types_and_oblique_geometry(forked, raw, tmp_path):
    c, s = math.cos(0.3), math.sin(0.3)
    directions = [(1, 0, 0, 0, 1, 0, 0, 0, 1), (-1, 0, 0, 0, -1, 0, 0, 0, 1), (c, -s, 0, s, c, 0, 0, 0, 1)]
    directions += [(0, 0, 1, 1, 0, 0, 0, 1, 0), (0, -c, s, 0, s, c, -1, 0, 0)]
    cases = []
    for i, direction in enumerate(directions):
        dtype = (np.int16, np.uint8, np.float32, np.float64, np.int32)[i]
        image = image_of(np.abs(scan(i)).clip(0, 255).astype(dtype), direction=[float(d) for d in direction])
        mask = image_of(label(), direction=[float(d) for d in direction])
        ending = "nii.gz" if i % 2 else "nrrd"
        paths = save(image, tmp_path / f"{i}.{ending}"), save(mask, tmp_path / f"{i}_l.{ending}")
        cases.append(Case(f"c{i}", paths[:1], paths[1], MAP))
    target = Case("t", (save(image_of(scan(50)), tmp_path / "t.nii.gz"),))
    out = write([Group("MR", cases, "imagesTr", "labelsTr"), Group("CT", [target], "imagesTu")], processes=2)
    for i, case in enumerate(cases):
        before, after = sitk.ReadImage(str(case.images[0])), sitk.ReadImage(str(out / f"imagesTr/c{i}_0000.nii.gz"))
        mask = sitk.ReadImage(str(out / f"labelsTr/c{i}.nii.gz"))
        assert before.GetPixelID() == after.GetPixelID()
        assert (sitk.GetArrayFromImage(before) == sitk.GetArrayFromImage(after)).all()
        assert (sitk.GetArrayFromImage(mask) == (label() == 7)).all()
        for get in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(getattr(before, get)(), getattr(after, get)(), atol=1e-5)
            assert getattr(mask, get)() == getattr(after, get)()


def test_verify_dataset_integrity_and_reader(serial, raw, groups, capfd):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    out = write(groups)
    verify_dataset_integrity(str(out), num_processes=1)
    printed = capfd.readouterr().out
    assert "verify_dataset_integrity Done" in printed and "WARNING! " not in printed and "Error" not in printed
    content = json.loads((out / "dataset.json").read_text())
    assert content["uda"] == {
        "source_domain": "MR",
        "target_domain": "CT",
        "numSource": 2,
        "numTarget": 2,
        "numTest": 0,
        "label_values": {"MR": {"organ": [7]}},
    }
    assert content["overwrite_image_reader_writer"] == "SimpleITKIOWithReorient"


def test_information_adds_to_uda_and_replaces_labels(raw, groups):
    regions = {"background": 0, "all": [1, 2], "part": [2]}
    more = {"licence": "free", "uda": {"extra": 1}, "labels": regions, "regions_class_order": [1, 2]}
    out = write_dataset(7, "Tiny", groups, ["organ"], ["intensity"], information=more, processes=1)
    content = json.loads((out / "dataset.json").read_text())
    assert content["licence"] == "free" and content["uda"]["extra"] == 1 and content["uda"]["source_domain"] == "MR"
    assert content["labels"] == regions and content["regions_class_order"] == [1, 2]
    assert more["uda"] == {"extra": 1}


def test_conversion_is_deterministic(raw, groups):
    first = {p.name: p.read_bytes() for p in write(groups).rglob("*.*") if p.is_file()}
    time.sleep(1.1)  # a gzip time stamp would differ
    assert first == {p.name: p.read_bytes() for p in write(groups, overwrite=True).rglob("*.*") if p.is_file()}


def test_summary(raw, groups, capsys):
    write(groups)
    text = capsys.readouterr().out
    volume = 2 * 3 * 3 * 3.0 / 1000
    assert "imagesTr: 2 MR case(s)" in text and "imagesTu: 2 CT case(s), no labels" in text
    assert "10 x 8 x 6" in text and "1 x 1.5 x 2" in text and "LPS (2)" in text
    assert f"1 organ: mean {volume:.3g} ml" in text and "in 2 of 2 cases" in text
    path = raw.parent / "in" / "t1_l.nii.gz"
    labelled = Case("t1", groups[1].cases[1].images, save(image_of(label() * 0), path), MAP)
    test = Group("CT", [labelled], "imagesTs", "labelsTs")
    write([groups[0], Group("CT", groups[1].cases[:1], "imagesTu"), test], overwrite=True)
    text = capsys.readouterr().out
    assert "1 organ: mean 0 ml, 0 to 0, in 0 of 1 cases" in text and "t1: its label is all background" in text


def test_warns_of_thick_axes_and_zero_background(raw, tmp_path, groups, capsys):
    masked = scan(3)
    masked[:, :, :5] = 0
    coronal = image_of(masked, spacing=(1.0, 1.0, 4.0), direction=(1.0, 0, 0, 0, 0, 1, 0, -1, 0))
    target = Case("t", (save(coronal, tmp_path / "t.nii.gz"),))
    write([groups[0], Group("CT", [target], "imagesTu")])
    text = capsys.readouterr().out
    assert "thick slices lie along inferior-superior in the source and along posterior-anterior in the target" in text
    assert "0% of the source's voxels are exactly 0, 50% of the target's" in text


def test_one_slice_is_warned_of_with_the_plane_that_shows_it(raw, tmp_path, groups, capsys):
    flat = save(image_of(scan(3)[:1]), tmp_path / "in" / "flat.nii.gz")
    write([groups[0], Group("CT", [Case("flat", (flat,)), *groups[1].cases], "imagesTu")])
    out = capsys.readouterr().out
    assert "1 of 3 cases in imagesTu have one slice inferior-superior (flat)" in out
    assert "nnUNetUDA_configure -plane axial" in out
    write(groups, overwrite=True)
    assert "one slice" not in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1000, 0.001, 0.02, 21])
def test_spacing_in_another_unit_is_refused_with_the_sources(raw, tmp_path, groups, factor):
    spacing = (factor, 1.5 * factor, 2.0 * max(factor, 1))
    wrong = save(image_of(scan(3), spacing), tmp_path / "in" / "wrong.nii.gz")
    words = "1 x 1.5 x 2 mm: .* times (larger|finer)" if factor == 21 else "of them"
    with pytest.raises(UDAError, match=rf"wrong\.nii\.gz: its voxels are {factor:.4g} x .*{words}"):
        write([groups[0], Group("CT", [Case("t", (wrong,)), *groups[1].cases], "imagesTu")])
    assert leftovers(raw) == [] and not list(raw.glob("Dataset*"))
    source = [Case(f"{case.identifier}x", case.images, case.label, MAP) for case in groups[0].cases]
    label_file = save(image_of(label(), spacing), tmp_path / "in" / "wrong_l.nii.gz")
    with pytest.raises(UDAError, match=r"wrong\.nii\.gz: its voxels are"):
        write([Group("MR", [*source, Case("s", (wrong,), label_file, MAP)], "imagesTr", "labelsTr"), groups[1]])


@pytest.mark.parametrize("spacing", [(0.1, 0.1, 1.0), (0.2, 0.2, 0.2), (10.0, 1.0, 1.0), (5.0, 5.0, 20.0)])
def test_fine_and_thick_voxels_are_scans(raw, tmp_path, groups, spacing):
    """A cochlea at 0.1 mm, and slices of 20 mm, beside 1 x 1.5 x 2 mm."""
    image = save(image_of(scan(3, (30, 30, 30)), spacing), tmp_path / "in" / "other.nii.gz")
    write([groups[0], Group("CT", [Case("t", (image,))], "imagesTu")])


@pytest.mark.parametrize(
    ("size", "spacing", "fits"),
    [
        ((10, 10, 10), (0.05, 0.05, 0.05), False),
        ((30, 30, 30), (0.05, 0.05, 0.05), True),
        ((600, 10, 10), (10.0, 1.0, 1.0), False),
        ((400, 10, 10), (10.0, 1.0, 1.0), True),
        ((10, 10, 10), (1.0, 1.0, 150.0), False),
        ((10, 10, 1), (1.0, 1.0, 150.0), True),  # of one slice its distance says nothing
        ((10, 10, 1), (1.0, 1.0, math.nan), False),
    ],
)
def test_what_no_scan_measures_is_refused(size, spacing, fits):
    with nullcontext() if fits else pytest.raises(UDAError, match=r"a\.nii: its voxels are .* of them; expected mm"):
        check_possible(Path("a.nii"), size, spacing)


def test_a_case_that_resampling_would_blow_up_is_refused():
    with pytest.raises(UDAError, match=r"a\.nii: .* resampled to them it would have 1.3e\+09 voxels"):
        check_against_source(Path("a.nii"), (512, 512, 600), (1, 1, 1), (0.5, 0.5, 0.5), (1024, 1024, 1200))
    check_against_source(Path("a.nii"), (512, 512, 1500), (0.9, 0.9, 1), (0.8, 0.8, 0.8), (576, 576, 1875))


def test_a_case_of_which_resampling_would_leave_nothing_is_refused():
    """One slice beside a source of thick ones, in 3D."""
    with pytest.raises(UDAError, match=r"a\.nii: .* nothing would be left of it"):
        check_against_source(Path("a.nii"), (64, 64, 1), (1, 1, 1), (1, 1, 4), (64, 64, 0.25))
    check_against_source(Path("a.nii"), (64, 64, 2), (1, 1, 1), (1, 1, 4), (64, 64, 0.5))


def test_units_ten_times_apart_are_warned_of(raw, tmp_path, groups, capsys):
    image = save(image_of(scan(3, (8, 30, 30)), (0.1, 0.15, 0.2)), tmp_path / "in" / "cm.nii.gz")
    source = Case("s", (save(image_of(scan(1, (8, 30, 30))), tmp_path / "in" / "s.nii.gz"),),
                  save(image_of(label((8, 30, 30))), tmp_path / "in" / "sl.nii.gz"), MAP)  # fmt: skip
    write([Group("MR", [source], "imagesTr", "labelsTr"), Group("CT", [Case("t", (image,))], "imagesTu")])
    assert "the target's voxels are 0.1 times the source's" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [1, 2])
def test_two_geometries_are_refused_or_chosen_for_image_and_label(raw, groups, capsys, processes):
    case = groups[0].cases[0]
    expected = read_image(case.images[0])
    for path in (*case.images, case.label):
        two_geometries(path)
    with pytest.raises(UDAError, match=r"s0\.nii\.gz: .*two geometries.*mirrored.*-nifti_geometry qform or sform"):
        write(groups)
    written = write(groups, processes=processes, geometry="qform")
    out = capsys.readouterr().out
    assert "s0: s0.nii.gz: read by its qform" in out and "s0: s0_l.nii.gz: read by its qform" in out
    for name in ("imagesTr/s0_0000.nii.gz", "labelsTr/s0.nii.gz"):
        assert Grid.of(read_image(written / name)).code == Grid.of(expected).code


def test_no_orientation_is_warned_of(raw, tmp_path, groups, capsys):
    path = tmp_path / "in" / "none.nii.gz"
    image = nibabel.Nifti1Image(scan(5), np.diag([1.0, 1, 1, 1]))
    image.set_qform(None, 0)
    image.set_sform(None, 0)
    nibabel.save(image, path)
    write([groups[0], Group("CT", [Case("none", (path,))], "imagesTu")])
    assert "WARNING: none: none.nii.gz: its qform_code and sform_code are both 0" in capsys.readouterr().out


def test_a_default_window_that_shows_nothing_is_refused_and_percentiles_that_do_are_left_out(tmp_path):
    """A window around bone, on a scan that has none: the network would see one value."""
    flat = np.zeros((6, 8, 10), np.int16)
    flat[0, 0, :3] = 7, 7, 9
    case = Case("t", (save(image_of(flat), tmp_path / "t.nii.gz"),))
    window = Intensities(window=(300, 1300), origin="found around the structures labelled in CT")
    with pytest.raises(UDAError, match=r"t\.nii\.gz: its values are 0 to 9, all outside of the window 300 to 1300 HU"):
        convert_case(case, tmp_path, None, 1, Clipping(window, given=False))
    report = convert_case(case, tmp_path, None, 1, Clipping(Intensities((0.5, 50), origin="default"), given=False))
    assert "left as it is" in report.notes[0]
    assert (sitk.GetArrayFromImage(read_image(tmp_path / "t_0000.nii.gz")) == flat).all()


def test_channels_on_other_grids_are_refused(raw, tmp_path, groups):
    first, second = (save(image_of(scan(i), origin=(i, 0, 0)), tmp_path / "in" / f"c{i}.nii.gz") for i in (1, 3))
    source = Group("MR", [Case("s", (first, second), groups[0].cases[0].label, MAP)], "imagesTr", "labelsTr")
    target = Group("CT", [Case("t", (groups[1].cases[0].images[0], groups[1].cases[1].images[0]))], "imagesTu")
    with pytest.raises(UDAError, match=r"c3\.nii\.gz: its geometry differs from that of .*c1\.nii\.gz: origin"):
        write_dataset(7, "Tiny", [source, target], ["organ"], ["a", "b"], processes=1)


def test_channels_within_the_tolerance_share_one_geometry(raw, tmp_path, groups):
    first = save(image_of(scan(1)), tmp_path / "in" / "c0.nii.gz")
    second = save(image_of(scan(2), origin=(3.05, -4.0, 5.0)), tmp_path / "in" / "c1.nii.gz")
    label_file = save(image_of(label(), origin=(3.0, -4.05, 5.0)), tmp_path / "in" / "cl.nii.gz")
    cases = [Case("s", (first, second), label_file, MAP)]
    other = [save(image_of(scan(i)), tmp_path / "in" / f"d{i}.nii.gz") for i in (3, 4)]
    groups = [Group("MR", cases, "imagesTr", "labelsTr"), Group("CT", [Case("t", tuple(other))], "imagesTu")]
    out = write_dataset(7, "Tiny", groups, ["organ"], ["a", "b"], processes=1)
    for name in ("imagesTr/s_0001.nii.gz", "labelsTr/s.nii.gz"):
        assert read_image(out / name).GetOrigin() == read_image(out / "imagesTr" / "s_0000.nii.gz").GetOrigin()


MEMORY = """
import re, resource, sys
from pathlib import Path
from nnunet_uda.images.intensities import Intensities
from nnunet_uda.dataset_conversion.case import Case, Clipping, convert_case
from nnunet_uda.dataset_conversion.quicklook import draw_quicklook
path, small, out = map(Path, sys.argv[1:4])
clipping = Clipping(eval(sys.argv[4]))

def peak():  # on Linux not by getrusage, in which that of the process that started this one counts
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def run(path):
    convert_case(Case("x", (path,)), out, None, 1, clipping)
    draw_quicklook([("x", out / "x_0000.nii.gz", None)], ["a"], out / "q.png")
    return peak()

before = run(small)  # what is imported and allocated once
print(run(path) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("clipping", ["None", "Intensities((0.5, 99.5))", "Intensities(window=(-100, 5))"])
def test_one_volume_and_one_slab_are_in_memory(tmp_path, clipping):
    """ITK's reader of NIfTI needs two volumes, and so does its reorientation; numpy's clip a second one, too."""
    big = sitk.GetImageFromArray(np.arange(256**3, dtype=np.float64).reshape(256, 256, 256) % 1000)
    paths = [save(image, tmp_path / name) for image, name in ((big, "a.nii"), (big[:40, :40, :40], "b.nii"))]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, paths), str(tmp_path), clipping],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.split()[-1]) < 1.5 * 256**3 * 8  # slabs of a few times 16 MB, whatever the volume


def test_every_bad_file_is_listed_and_nothing_remains(forked, raw, groups):
    for name in ("s0", "t1"):
        path = next(c.images[0] for g in groups for c in g.cases if c.identifier == name)
        path.write_bytes(path.read_bytes()[:300])
    for processes in (1, 2):
        with pytest.raises(UDAError, match=r"(?s)2 cases cannot be converted.*s0\.nii\.gz.*t1\.nii\.gz"):
            write(groups, processes=processes)
        assert list(raw.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "options"),
    [("origin", {"origin": (4.0, -4.0, 5.0)}), ("size", {"array": np.zeros((6, 8, 11), np.uint8)}),
     ("direction", {"direction": (-1.0, 0, 0, 0, 1, 0, 0, 0, 1)})],
)  # fmt: skip
def test_a_label_on_another_grid_than_its_image_is_refused(raw, groups, what, options):
    save(image_of(**({"array": label()} | options)), groups[0].cases[0].label)
    with pytest.raises(UDAError, match=rf"s0_l\.nii\.gz: its geometry differs from that of .*s0\.nii\.gz: .*{what} \("):
        write(groups)
    assert list(raw.iterdir()) == []


def test_structure_that_never_occurs_is_refused(raw, groups):
    with pytest.raises(UDAError, match="holds the structure 'tumour'"):
        write_dataset(7, "Tiny", groups, ["organ", "tumour"], ["intensity"], processes=1)
    assert list(raw.iterdir()) == []


def test_requests_that_are_refused(raw, groups):
    source, target = groups
    twice = Group("CT", [*target.cases, Case("T0", target.cases[1].images)], "imagesTu")
    same_file = Group("CT", [Case("x", source.cases[0].images)], "imagesTs", "labelsTs")
    (link := source.cases[0].images[0].with_name("link.nii.gz")).symlink_to(source.cases[0].images[0])
    linked = Group("CT", [Case("y", (link,))], "imagesTs", "labelsTs")
    two_channels = Group("CT", [Case("t", (target.cases[0].images[0], target.cases[1].images[0]))], "imagesTu")
    unlabelled = Group("MR", [Case("s", source.cases[0].images)], "imagesTr", "labelsTr")
    for bad, message in (
        ([source], "no unlabelled target case"),
        ([source, Group("CT", [], "imagesTu")], "no unlabelled target case"),
        ([target], "no labelled case"),
        ([source, twice], "case id T0 is already that of"),
        ([source, target, same_file], "the same file is used for s0 and for x"),
        ([source, target, linked], "the same file is used for s0 and for y"),
        ([source, two_channels], r"t0\.nii\.gz: .* has 2 channel\(s\), the dataset has 1"),
        ([unlabelled, target], r"s0\.nii\.gz: there is no label"),
    ):
        with pytest.raises(UDAError, match=message):
            write(bad)
    for arguments, message in (
        ((0, "Tiny", groups, ["a"], ["i"]), "-d 0"),
        ((7, "../Tiny", groups, ["a"], ["i"]), "-name '../Tiny'"),
        ((7, "Tiny", groups, ["a", "a"], ["i"]), "each once"),
        ((7, "Tiny", groups, ["background"], ["i"]), "'background'"),
        ((7, "Tiny", groups, ["mean over structures"], ["i"]), "none of them .*'mean over structures'"),
    ):
        with pytest.raises(UDAError, match=message):
            write_dataset(*arguments)


def test_ct_channel_of_a_domain_that_is_not_ct_is_warned_of(raw, groups, capsys):
    write_dataset(7, "Tiny", groups, ["organ"], ["CT"], processes=1)
    assert "WARNING: channel 0 is called CT, but the domains are MR and CT" in capsys.readouterr().out


def test_nnunet_raw_unset(groups, monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(UDAError, match=r"nnUNet_raw is not set.*export nnUNet_raw="):
        write(groups)


def test_existing_dataset_and_taken_id(raw, groups, tmp_path, capsys):
    out = write(groups)
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UDAError, match=r"Dataset007_Tiny: this dataset exists already. Use --overwrite"):
        write(groups)
    assert (out / "mine.txt").exists()
    with pytest.raises(UDAError, match=r"Dataset007_Tiny: dataset id 7 is already taken"):
        write_dataset(7, "Other", groups, ["organ"], ["intensity"], overwrite=True, processes=1)
    (tmp_path / "nnUNet_preprocessed" / "Dataset007_Tiny").mkdir(parents=True)
    write(groups, overwrite=True)
    assert not (out / "mine.txt").exists() and leftovers(raw) == []
    assert "plan, preprocess and train again" in capsys.readouterr().out
    (tmp_path / "nnUNet_results" / "Dataset008_Else").mkdir(parents=True)
    with pytest.raises(UDAError, match=r"Dataset008_Else: dataset id 8 is already taken in nnUNet_results"):
        write_dataset(8, "Tiny", groups, ["organ"], ["intensity"], processes=1)


def test_failed_overwrite_keeps_the_old_dataset(raw, groups):
    out = write(groups)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    groups[1].cases[0].images[0].write_bytes(b"broken")
    with pytest.raises(UDAError, match=r"t0\.nii\.gz"):
        write(groups, overwrite=True)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} and leftovers(raw) == []


def test_two_conversions_at_once_are_refused(raw, groups):
    raw.mkdir()
    with held(raw / ".converting_Dataset007.lock"):
        with pytest.raises(UDAError, match="another conversion to this dataset id is running"):
            write(groups)
    write(groups)
    assert leftovers(raw) == []


def dying_read(path: Path) -> sitk.Image:
    os._exit(9)


def test_a_killed_worker_is_explained(forked, raw, groups):
    groups[1] = Group("CT", [Case("t", groups[1].cases[0].images, read_image=dying_read)], "imagesTu")
    with pytest.raises(UDAError, match="a worker process was killed.*smaller -np"):
        write(groups, processes=2)
    assert list(raw.iterdir()) == []


def slow_read(path: Path) -> sitk.Image:
    time.sleep(60 if path.name.startswith("t1") else 0)
    return read_image(path)


def test_killed_conversion_leaves_nothing_visible_and_the_next_completes(raw, groups, tmp_path):
    """SIGKILL while the last case is being read."""
    cases = [Case(f"t{i}", (tmp_path / "in" / f"t{i}.nii.gz",), read_image=slow_read) for i in range(2)]
    slow = [Group("MR", groups[0].cases[:1], "imagesTr", "labelsTr"), Group("CT", cases, "imagesTu")]
    process = multiprocessing.get_context("fork").Process(target=write, args=(slow,))
    process.start()
    deadline = time.time() + 40
    while not list(raw.glob(".converting_Dataset007_*/new/imagesTu/t0_0000.nii.gz")):
        assert time.time() < deadline and process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    assert not list(raw.glob("Dataset*")) and list(raw.glob(".converting_Dataset007_*"))
    out = write(groups)
    assert leftovers(raw) == [] and len(list((out / "imagesTu").iterdir())) == 2


@pytest.mark.parametrize("name", ["Tiny", "Other"])
@pytest.mark.parametrize("aside", [".converting_Dataset007_replaced", ".converting_Dataset007_0a1b2c3d/former"])
def test_kill_between_the_two_renames_of_an_overwrite(raw, groups, name, aside):
    """Whatever name is given next, the dataset that was set aside comes back; the first place is of versions before."""
    out = write(groups)
    (raw / aside).mkdir(parents=True)
    out.rename(raw / aside / out.name)
    with pytest.raises(
        UDAError, match="exists already" if name == "Tiny" else "Dataset007_Tiny: dataset id 7 is already"
    ):
        write_dataset(7, name, groups, ["organ"], ["intensity"], processes=1, overwrite=name == "Other")
    assert (out / "dataset.json").exists() and leftovers(raw) == []


def test_what_was_set_aside_comes_back_before_the_input_is_looked_at(raw, groups, capsys):
    out = write(groups)
    aside = raw / ".converting_Dataset007_0a1b2c3d" / "former"
    aside.mkdir(parents=True)
    out.rename(aside / out.name)
    with pytest.raises(SystemExit):
        convert.main(["brats", "-i", "/no/such/folder", "-d", "7", "-source", "flair", "-target", "t2"])
    assert (out / "dataset.json").exists() and leftovers(raw) == []


def test_the_former_dataset_is_put_back_when_the_new_one_cannot_take_its_place(raw, groups, monkeypatch):
    out, replace = write(groups), os.replace
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def fail(old, new):
        if Path(new) == out and Path(old).name == "new":
            raise OSError(errno.EIO, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UDAError, match=r"Dataset007_Tiny cannot be written \(Input/output error"):
        write(groups, overwrite=True)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} and leftovers(raw) == []


def test_a_full_disk_is_noticed(raw, groups, tmp_path):
    """SimpleITK leaves a short file without an error; a file size limit stands for the full disk."""
    big = save(image_of(scan(1, (20, 60, 60))), tmp_path / "in" / "big.nii.gz")
    groups[1] = Group("CT", [Case("big", (big,))], "imagesTu")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(
            UDAError, match=r"big_0000\.nii\.gz: cannot be written whole \(it was left short\); .* free"
        ):
            write(groups)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(raw.iterdir()) == []


# --- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*convert.CONVERTERS} - {"folders"}))
def test_help_shows_tree_licence_and_page(capsys, name):
    with pytest.raises(SystemExit):
        convert.main([name, "-h"])
    text = capsys.readouterr().out
    assert "xpected tree" in text and "https://" in text and re.search("CC BY|terms", text)


def test_strict_refuses_what_is_otherwise_a_warning(raw, groups, capsys):
    warnings: list[str] = []
    skip_or_refuse("a/b: there is no T2", False, warnings)
    assert warnings == ["a/b: there is no T2: this case is left out"]
    with pytest.raises(UDAError, match=r"a/b: there is no T2\. Complete the input; without --strict this case is left"):
        skip_or_refuse("a/b: there is no T2", True, warnings)

    test = [Case("u", (save(image_of(scan(9)), raw.parent / "u.nii.gz"),))]
    unlabelled = [*groups, Group("CT", test, "imagesTs", "labelsTs")]
    with pytest.raises(UDAError, match=r"1 of 1 cases in imagesTs have no label \(u\)\. Complete the input"):
        write(unlabelled, strict=True)
    write(unlabelled)
    assert "WARNING: 1 of 1 cases in imagesTs have no label (u): they cannot be evaluated" in capsys.readouterr().out
    write([*groups, Group("CT", test, "imagesTs")], strict=True, overwrite=True)  # labels were never to be had
    assert "they cannot be evaluated" in capsys.readouterr().out
