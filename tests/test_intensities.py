"""Clipping by percentiles: by hand, in the converter and in the command alike, and what is refused."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import litter

from nnunet_uda.commands.clip import main
from nnunet_uda.commands.convert import main as convert
from nnunet_uda.data.intensities import Intensities, read_clipped, read_intensities
from nnunet_uda.errors import UDAError

UUDS = Intensities((5, 95), (-1, 1))
DIRECTION = (0.0, 0, 1.0, 1.0, 0, 0, 0, 1.0, 0)


def image_of(array: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.5, 2.0))
    image.SetOrigin((3.0, -4.0, 5.0))
    image.SetDirection(DIRECTION)
    return image


def brain(seed: int = 0, dtype=np.int16) -> np.ndarray:
    array = np.random.default_rng(seed).integers(1, 4000, (6, 8, 10)).astype(dtype)
    array[:, :3] = 0
    return array


def save(image: sitk.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), path.name.endswith("gz"))
    return path


def load(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == 1
    return capsys.readouterr().err.split("ERROR: ")[1]


# --- the function -----------------------------------------------------------------------------------------------------


def test_percentiles_by_hand():
    array = np.zeros((3, 7, 7), np.int16)
    array.ravel()[20:121] = np.arange(1, 102)[::-1]  # nonzero 1 to 101: percentile p is 1 + p
    clipped = sitk.GetArrayFromImage(Intensities((5, 95)).apply(image_of(array), Path("a")))
    assert clipped.dtype == np.float32 and (clipped[array == 0] == 0).all()
    assert (clipped[array > 0] == np.clip(array[array > 0], 6, 96)).all()
    scaled = sitk.GetArrayFromImage(UUDS.apply(image_of(array), Path("a")))
    assert np.allclose(scaled[array == 51], 0) and (scaled[array == 0] == -1).all()
    assert (scaled[(array > 0) & (array < 7)] == -1).all() and np.allclose(scaled[array > 95], 1)
    assert np.allclose(scaled[array == 21], -1 + 15 / 45)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_types_negative_values_and_geometry(dtype):
    array = np.random.default_rng(1).integers(0, 200, (6, 8, 10)).astype(dtype)
    if dtype != np.uint8:
        array -= 50
    image = image_of(array)
    for intensities in (UUDS, Intensities((0, 100), (0, 1))):
        out = intensities.apply(image, Path("a"))
        assert out.GetPixelID() == sitk.sitkFloat32
        for get in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
            assert getattr(out, get)() == getattr(image, get)()
        low, high = np.percentile(array[array != 0].astype(float), intensities.percentiles)
        a, b = intensities.scale
        expected = np.where(array == 0, a, a + (np.clip(array, low, high) - low) / (high - low) * (b - a))
        assert np.allclose(sitk.GetArrayFromImage(out), expected, atol=1e-6)
    assert (sitk.GetArrayFromImage(image) == array).all()


def test_a_scan_without_contrast_is_refused():
    mask = (brain() > 0).astype(np.int16)
    with pytest.raises(UDAError, match=r"a\.nii: percentiles 5 and 95 of its 300 nonzero voxels are both 1"):
        UUDS.apply(image_of(mask), Path("a.nii"))


@pytest.mark.parametrize("percentiles", [(5, 5), (95, 5), (-1, 50), (50, 101), (float("nan"), 50)])
def test_percentiles_out_of_order_are_refused(percentiles):
    with pytest.raises(UDAError, match="expected 0 <= low < high <= 100"):
        Intensities(percentiles)


@pytest.mark.parametrize("scale", [(1, 1), (1, -1), (0, float("inf")), (float("nan"), 1)])
def test_ranges_out_of_order_are_refused(scale):
    with pytest.raises(UDAError, match="expected two numbers, low < high"):
        Intensities((5, 95), scale)


def test_the_reader_can_be_sent_to_another_process(tmp_path):
    path = save(image_of(brain()), tmp_path / "a.nii.gz")
    reader = pickle.loads(pickle.dumps(partial(read_clipped, intensities=UUDS)))
    assert (sitk.GetArrayFromImage(reader(path)) == sitk.GetArrayFromImage(read_clipped(path, UUDS))).all()


# --- dataset.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intensities", [UUDS, Intensities((0.5, 99.5)), Intensities((1, 99), (0, 255))])
def test_parameters_survive_json(intensities):
    content = json.loads(json.dumps({"uda": {"source_domain": "T2", "intensities": intensities.to_json()}}))
    assert read_intensities(content, "dataset.json") == intensities


@pytest.mark.parametrize("content", [{}, {"uda": None}, {"uda": {"source_domain": "T2"}}])
def test_a_dataset_without_parameters(content):
    with pytest.raises(UDAError, match=r"d\.json holds no uda\.intensities.*predicted as they are"):
        read_intensities(content, "d.json")


@pytest.mark.parametrize(
    "found", [5, [5, 95], {}, {"percentiles": [5]}, {"percentiles": "ab"}, {"percentiles": [5, 95], "range": [True, 2]}]
)
def test_broken_parameters(found):
    with pytest.raises(UDAError, match=r"d\.json: uda\.intensities is .*expected the form"):
        read_intensities({"uda": {"intensities": found}}, "d.json")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path, monkeypatch) -> Path:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for i in range(3):
        save(image_of(brain(i)), tmp_path / "scans" / f"new{i}_0000.nii.gz")
    return tmp_path / "scans"


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.parent.iterdir() if p.name not in ("scans", "nnUNet_raw", "vendor"))


@pytest.mark.parametrize(
    "options", [("-protocol", "uuds"), ("-clip", "2", "98"), ("-clip", "1", "90", "-range", "0", "1")]
)
@pytest.mark.parametrize("bound", [(), ("--upper_bound",)])
def test_a_new_scan_is_treated_as_the_converted_ones(scans, tmp_path, options, bound):
    vendor = tmp_path / "vendor"
    for i in range(1, 6):
        name = f"BraTS20_Training_{i:03d}"
        for k, kind in enumerate(("t2", "flair")):
            save(image_of(brain(10 * i + k, np.float32)), vendor / name / f"{name}_{kind}.nii")
        save(image_of((brain(i) > 2000).astype(np.uint8)), vendor / name / f"{name}_seg.nii")
    convert(
        ["brats", "-i", str(vendor), "-d", "505", "-source", "flair", "-target", "t2", "-np", "1", *options, *bound]
    )
    dataset = next((tmp_path / "nnUNet_raw").glob("Dataset505_*"))
    converted = sorted(dataset.glob("images*/*"))
    new = tmp_path / "new"
    new.mkdir()
    for path in converted:
        name, kind = path.name.removesuffix("_0000.nii.gz").rsplit("_", 1)
        (new / f"{name}_0000.nii").write_bytes((vendor / name / f"{name}_{kind}.nii").read_bytes())
    main(["-d", "505", "-i", str(new), "-o", str(tmp_path / "clipped")])
    assert len(converted) == (5 if not bound else 3) == len(list((tmp_path / "clipped").iterdir()))
    for path in converted:
        name = path.name.removesuffix("_0000.nii.gz").rsplit("_", 1)[0]
        assert (tmp_path / "clipped" / f"{name}_0000.nii.gz").read_bytes() == path.read_bytes()
    assert not (load(converted[0]) == load(new / f"{name}_0000.nii")).all()


def test_explicit_parameters(scans, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    litter(scans)
    main(["-i", str(scans), "-o", str(out), "-percentiles", "5", "95", "-range", "-1", "1"])
    assert "3 scan(s) clipped" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [f"new{i}_0000.nii.gz" for i in range(3)]
    for i in range(3):
        expected = UUDS.apply(image_of(brain(i)), Path("a"))
        assert (load(out / f"new{i}_0000.nii.gz") == sitk.GetArrayFromImage(expected)).all()
        assert sitk.ReadImage(str(out / f"new{i}_0000.nii.gz")).GetDirection() == DIRECTION
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    empty = tmp_path / "empty"
    empty.mkdir()
    main(["-i", str(scans), "-o", str(empty), "-percentiles", "5", "95"])
    assert load(empty / "new0_0000.nii.gz").max() == np.float32(np.percentile(brain()[brain() > 0], 95))


def test_options_that_are_refused(scans, tmp_path, capsys):
    out = tmp_path / "out"
    folders = ("-i", scans, "-o", out)
    assert "give either -d DATASET" in refused(capsys, *folders)
    assert "give either -d DATASET" in refused(capsys, *folders, "-d", 505, "-percentiles", 5, 95)
    assert "-range goes with -percentiles" in refused(capsys, *folders, "-d", 505, "-range", 0, 1)
    assert "expected 0 <= low < high <= 100" in refused(capsys, *folders, "-percentiles", 95, 5)
    dataset = tmp_path / "nnUNet_raw" / "Dataset505_Plain"
    dataset.mkdir(parents=True)
    assert "dataset.json does not exist" in refused(capsys, *folders, "-d", 505)
    (dataset / "dataset.json").write_text(json.dumps({"uda": {"source_domain": "T2", "target_domain": "FLAIR"}}))
    assert "dataset.json holds no uda.intensities" in refused(capsys, *folders, "-d", 505)
    assert "found not exactly one dataset with id 077" in refused(capsys, *folders, "-d", 77)
    assert leftovers(out) == []


def test_folders_that_are_refused(scans, tmp_path, capsys):
    out, clip = tmp_path / "out", ("-percentiles", 5, 95)
    assert "absent (-i) is no folder" in refused(capsys, "-i", tmp_path / "absent", "-o", out, *clip)
    assert "scans exists and is not an empty folder" in refused(capsys, "-i", scans, "-o", scans, *clip)
    (tmp_path / "nothing").mkdir()
    assert "nothing (-i) holds no scan" in refused(capsys, "-i", tmp_path / "nothing", "-o", out, *clip)
    (tmp_path / "nothing").rmdir()
    (tmp_path / "mine.txt").write_text("kept")
    assert "mine.txt exists and is not an empty folder" in refused(
        capsys, "-i", scans, "-o", tmp_path / "mine.txt", *clip
    )
    assert (tmp_path / "mine.txt").read_text() == "kept" and len(list(scans.iterdir())) == 3
    odd = save(image_of(brain()), scans / "new9.nii.gz")
    assert "new9.nii.gz: expected a name like CASE_0000.nii.gz" in refused(capsys, "-i", scans, "-o", out, *clip)
    odd.unlink()
    save(image_of(brain()), scans / "new1_0000.nii")
    assert "new1_0000.nii: there is also new1_0000.nii.gz" in refused(capsys, "-i", scans, "-o", out, *clip)
    assert leftovers(out) == ["mine.txt"]


def test_every_bad_file_is_listed_and_nothing_is_written(scans, tmp_path, capsys):
    out = tmp_path / "out"
    whole = (scans / "new0_0000.nii.gz").read_bytes()
    (scans / "new0_0000.nii.gz").write_bytes(whole[:-40])
    save(image_of(np.full((6, 8, 10), 3, np.int16)), scans / "new1_0000.nii.gz")
    text = refused(capsys, "-i", scans, "-o", out, "-percentiles", 5, 95)
    assert "new0_0000.nii.gz: " in text and "new1_0000.nii.gz: every voxel is 3" in text and "new2" not in text
    assert leftovers(out) == []
    (scans / "new1_0000.nii.gz").unlink()
    (scans / "new0_0000.nii.gz").write_bytes(b"no image")
    assert "new0_0000.nii.gz: cannot be read" in refused(capsys, "-i", scans, "-o", out, "-percentiles", 5, 95)
    assert leftovers(out) == []
