"""Clipping at percentiles and windows: by hand, twice, in the converter and in the command alike; what is refused."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import litter, two_geometries
from support.folders import refuser, use_folders
from support.scans import body, load, save
from support.scans import image_of as make_image

from nnunet_uda.commands.convert import main as convert
from nnunet_uda.commands.intensities import clip, main
from nnunet_uda.errors import UDAError
from nnunet_uda.images.intensities import (
    DEFAULT,
    Intensities,
    not_hounsfield,
    parse_intensities,
    read_clipped,
    read_intensities,
    structure_bounds,
    window_of_structures,
)

UUDS = Intensities((5, 95), (-1, 1))
DIRECTION = (0.0, 0, 1.0, 1.0, 0, 0, 0, 1.0, 0)


image_of = partial(make_image, direction=DIRECTION)


def brain(seed: int = 0, dtype=np.int16) -> np.ndarray:
    array = np.random.default_rng(seed).integers(1, 4000, (6, 8, 10)).astype(dtype)
    array[:, :3] = 0
    return array


refused = refuser(lambda *arguments: main([str(argument) for argument in arguments]))


# --- the function -----------------------------------------------------------------------------------------------------


def test_percentiles_by_hand():
    array = np.zeros((3, 7, 7), np.int16)
    array.ravel()[20:121] = np.arange(1, 102)[::-1]  # nonzero 1 to 101: percentile p is 1 + p
    clipped = sitk.GetArrayFromImage(Intensities((5, 95)).apply(image_of(array), Path("a")))
    assert clipped.dtype == np.int16 and (clipped[array == 0] == 0).all()
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
        low = np.percentile(array[array != 0].astype(float), intensities.percentiles[0], method="lower")
        high = np.percentile(array[array != 0].astype(float), intensities.percentiles[1], method="higher")
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


# --- twice ------------------------------------------------------------------------------------------------------------


def stripped(dtype=np.int16, seed: int = 3) -> np.ndarray:
    """A skull-stripped scan of many different values, some of them negative, and some bright voxels."""
    rng = np.random.default_rng(seed)
    array = rng.normal(400, 200, (12, 20, 20))
    array[rng.random(array.shape) < 0.003] = 9000
    array[:, :8] = 0
    return array.astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize(
    "intensities",
    [
        Intensities((0.5, 99.5)),
        Intensities((5, 95)),
        Intensities((10, 60)),
        UUDS,
        Intensities((2, 98), (0, 1)),
        Intensities(window=(-125, 275)),
        Intensities(window=(0, 80)),
        Intensities(window=(-5, 100_000)),
    ],
    ids=str,
)
def test_clipping_again_changes_nothing(intensities, dtype):
    with np.errstate(invalid="ignore"):
        array = np.clip(stripped(np.float64), *((0, 255) if dtype == np.uint8 else (0, 1e4))).astype(dtype)
    if dtype in (np.int16, np.int32, np.float32, np.float64):
        array = stripped(dtype)
    once = intensities.clip(array, "a")
    twice = intensities.clip(once, "a")
    assert (once != array).any() or intensities.window in ((-5, 100_000), (-125, 275))
    assert twice.dtype == once.dtype == (np.float32 if intensities.scale else dtype)
    assert (twice == once).all()
    if intensities.scale is None:
        assert (once[array == 0] == 0).all() or intensities.window is not None
        as_float = intensities.clip(array.astype(np.float32), "a")  # as nnU-Net's readers give it
        assert (as_float == once.astype(np.float32)).all()


def test_a_scan_that_was_clipped_by_an_earlier_version_stays():
    """It interpolated between voxel values."""
    array = stripped()
    low, high = np.percentile(array[array != 0], (5, 95))
    former = np.where(array != 0, np.clip(array, low, high), 0).astype(np.float32)
    assert (Intensities((5, 95)).clip(former, "a") == former).all()
    scaled = np.where(array != 0, -1 + 2 * (np.clip(array, low, high) - low) / (high - low), -1).astype(np.float32)
    assert (UUDS.clip(scaled, "a") == scaled).all()


def test_a_scan_that_happens_to_end_at_the_range_is_clipped():
    array = stripped(np.float32)
    array = -1 + 2 * (array - array.min()) / (array.max() - array.min())  # from -1 to 1, a few voxels at the ends
    assert array.min() == -1 and array.max() == 1
    assert np.mean(UUDS.clip(array, "a") == 1) > 0.02


# --- windows ----------------------------------------------------------------------------------------------------------


def test_windows_by_hand():
    array = np.array([-1000, -125, -124, 0, 275, 276, 3000], np.int16).reshape(1, 1, 7)
    clipped = Intensities(window=(-125, 275)).clip(array, "a")
    assert clipped.dtype == np.int16 and clipped.ravel().tolist() == [-125, -125, -124, 0, 275, 275, 275]
    with pytest.raises(UDAError, match=r"a: its values are -1000 to 3000, all outside of the window 3000 to 3100 HU"):
        Intensities(window=(3000, 3100)).clip(array, "a")


@pytest.mark.parametrize("window", [(275, -125), (1, 1), (0.5, 2), (float("nan"), 3), (0, float("inf"))])
def test_windows_out_of_order_are_refused(window):
    with pytest.raises(UDAError, match="expected two whole numbers in HU, the lower one first"):
        Intensities(window=window)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (None, DEFAULT),
        (["none"], None),
        (["Abdomen"], Intensities(window=(-125, 275))),
        (["-100", "250"], Intensities(window=(-100, 250))),
        (["window", "-100", "250"], Intensities(window=(-100, 250))),
        (["percentiles"], Intensities((0.5, 99.5))),
        (["percentiles", "1", "99"], Intensities((1, 99))),
    ],
)
def test_words_on_the_command_line(words, expected):
    assert parse_intensities(words, "-source_intensities") == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["liver"], "-source_intensities liver: expected two numbers.*abdomen, bone, brain, heart, lung, soft_tissue"),
        (["1"], "-source_intensities 1: expected two numbers"),
        (["1", "2", "3"], "expected two numbers"),
        (["none", "2"], "expected two numbers"),
        (["percentiles", "1"], "expected two numbers"),
        (["275", "-125"], "-source_intensities: window 275 -125: expected two whole numbers.*the lower one first"),
        (["percentiles", "99", "1"], "-source_intensities: percentiles 99 1: expected 0 <= low < high <= 100"),
        (["nan", "5"], "expected two whole numbers"),
    ],
)
def test_words_that_are_refused(words, message):
    with pytest.raises(UDAError, match=message):
        parse_intensities(words, "-source_intensities")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda ct: ct, None),
        (lambda ct: ct[:, 6:14, 6:9], None),  # soft tissue alone
        (lambda ct: np.clip(ct, 0, 80), None),
        (lambda ct: np.clip(ct, -125, 275), None),
        (lambda ct: ct + 1024, "denser than 700, and none air: perhaps 1024"),
        (lambda ct: (ct + 1024).astype(np.uint16), "perhaps 1024"),
        (lambda ct: (ct - ct.mean()) / ct.std(), "as of a scan that was scaled"),
        (lambda ct: np.round(255 * ((ct - ct.min()) / (ct.max() - ct.min()))), "a picture of 8 bits"),
        (lambda ct: ct - 2000, "hardly any of them that of soft tissue"),
    ],
)
def test_what_looks_like_hounsfield_units(change, found):
    reason = not_hounsfield(change(body()))
    assert (reason is None) if found is None else (found in reason)


def test_a_window_around_structures_stays_when_it_is_found_again():
    array = body()
    classes = np.zeros(array.shape, np.uint8)
    classes[:, 6:12, 6:8], classes[:, 9:11, 9:11] = 1, 2
    for used in (1, 2):
        labels = np.where(classes <= used, classes, 0)
        window = window_of_structures(structure_bounds(image_of(array), labels))
        clipped = Intensities(window=window).clip(array, "a")
        assert window_of_structures(structure_bounds(image_of(clipped), labels)) == window
        assert window == ((-50, 120) if used == 1 else (-150, 1070))


# --- dataset.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "intensities", [UUDS, Intensities((0.5, 99.5)), Intensities((1, 99), (0, 255)), Intensities(window=(-125, 275))]
)
def test_parameters_survive_json(intensities):
    """Of both domains at once, as earlier versions wrote them, too."""
    content = json.loads(json.dumps({"uda": {"source_domain": "T2", "intensities": intensities.to_json()}}))
    assert read_intensities(content, "dataset.json") == intensities
    content["uda"]["intensities"] = {"source": None, "target": content["uda"]["intensities"]}
    assert read_intensities(content, "dataset.json") == intensities
    assert read_intensities(content, "dataset.json", "source") is None


@pytest.mark.parametrize("content", [{}, {"uda": None}, {"uda": {"source_domain": "T2"}}])
def test_a_dataset_without_parameters(content):
    assert read_intensities(content, "d.json") is None


@pytest.mark.parametrize(
    "found",
    [
        5,
        [5, 95],
        {},
        {"percentiles": [5]},
        {"percentiles": "ab"},
        {"percentiles": [5, 95], "range": [True, 2]},
        {"percentiles": [95, 5]},
        {"window": [275, -125]},
        {"window": [0, 80], "percentiles": [5, 95]},
        {"source": None, "target": 5},
        {"source": None, "target": {"window": [1]}},
    ],
)
def test_broken_parameters(found):
    with pytest.raises(UDAError, match=r"d\.json: uda\.intensities is .*expected the form"):
        read_intensities({"uda": {"intensities": found}}, "d.json")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path, monkeypatch) -> Path:
    use_folders(monkeypatch, tmp_path)
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
    values = brain()[brain() > 0]
    assert load(empty / "new0_0000.nii.gz").max() == np.percentile(values, 95, method="higher")


def test_a_scan_with_two_geometries_is_refused_or_read_by_the_chosen_one(scans, tmp_path, refused):
    words = ["-i", str(scans), "-o", str(tmp_path / "out"), "-percentiles", "5", "95"]
    expected = sitk.ReadImage(str(scans / "new1_0000.nii.gz")).GetOrigin()
    two_geometries(scans / "new1_0000.nii.gz")
    assert "new1_0000.nii.gz: its header holds two geometries" in refused(*words)
    for choice, mirrored in (("qform", False), ("sform", True)):
        main([*words[:3], str(tmp_path / choice), *words[4:], "-nifti_geometry", choice])
        written = sitk.ReadImage(str(tmp_path / choice / "new1_0000.nii.gz"))
        assert np.allclose(written.GetOrigin(), expected) != mirrored


def test_windows_domains_and_the_former_name(scans, tmp_path, capsys):
    main(["-i", str(scans), "-o", str(tmp_path / "a"), "-window", "100", "900"])
    main(["-i", str(scans), "-o", str(tmp_path / "b"), "-window", "brain"])
    for folder, window in (("a", (100, 900)), ("b", (0, 80))):
        clipped = load(tmp_path / folder / "new1_0000.nii.gz")
        assert clipped.dtype == np.int16 and (clipped == np.clip(brain(1), *window)).all()
    dataset = tmp_path / "nnUNet_raw" / "Dataset505_Two"
    dataset.mkdir(parents=True)
    both = {"source": Intensities(window=(1, 50)).to_json(), "target": Intensities(window=(2, 60)).to_json()}
    (dataset / "dataset.json").write_text(json.dumps({"uda": {"intensities": both}}))
    main(["-i", str(scans), "-o", str(tmp_path / "c"), "-d", "505"])
    main(["-i", str(scans), "-o", str(tmp_path / "d"), "-d", "505", "-domain", "source"])
    assert load(tmp_path / "c" / "new0_0000.nii.gz").max() == 60 and load(tmp_path / "d/new0_0000.nii.gz").max() == 50
    capsys.readouterr()
    clip(["-i", str(scans), "-o", str(tmp_path / "e"), "-d", "505"])
    assert "now called nnUNetUDA_intensities" in capsys.readouterr().err
    assert load(tmp_path / "e" / "new0_0000.nii.gz").max() == 60


def test_options_that_are_refused(scans, tmp_path, refused):
    out = tmp_path / "out"
    folders = ("-i", scans, "-o", out)
    assert "give either -d DATASET" in refused(*folders)
    assert "give either -d DATASET" in refused(*folders, "-d", 505, "-percentiles", 5, 95)
    assert "-range goes with -percentiles" in refused(*folders, "-d", 505, "-range", 0, 1)
    assert "expected 0 <= low < high <= 100" in refused(*folders, "-percentiles", 95, 5)
    dataset = tmp_path / "nnUNet_raw" / "Dataset505_Plain"
    dataset.mkdir(parents=True)
    assert "dataset.json does not exist" in refused(*folders, "-d", 505)
    (dataset / "dataset.json").write_text(json.dumps({"uda": {"source_domain": "T2", "target_domain": "FLAIR"}}))
    text = refused(*folders, "-d", 505)
    assert "dataset.json holds no uda.intensities of the target" in text and "predicted as they are" in text
    assert "expected two whole numbers in HU, the lower one first" in refused(*folders, "-window", 275, -125)
    assert "expected two numbers, or one of abdomen" in refused(*folders, "-window", "none")
    (dataset.parent / "Dataset077_One").mkdir()
    assert "no dataset has the id 078 in nnUNet_raw=" in (said := refused(*folders, "-d", 78))
    assert "There are: Dataset077_One, Dataset505_Plain" in said
    (dataset.parent / "Dataset077_Two").mkdir()
    assert "several datasets have the id 077" in (said := refused(*folders, "-d", 77))
    assert "There are: Dataset077_One, Dataset077_Two. Give one by its id, or by its full name" in said
    assert leftovers(out) == []


def test_folders_that_are_refused(scans, tmp_path, refused):
    out, clip = tmp_path / "out", ("-percentiles", 5, 95)
    assert "absent (-i) is no folder" in refused("-i", tmp_path / "absent", "-o", out, *clip)
    assert "scans exists and is not an empty folder" in refused("-i", scans, "-o", scans, *clip)
    (tmp_path / "nothing").mkdir()
    assert "nothing (-i) holds no scan" in refused("-i", tmp_path / "nothing", "-o", out, *clip)
    (tmp_path / "nothing").rmdir()
    (tmp_path / "mine.txt").write_text("kept")
    assert "mine.txt exists and is not an empty folder" in refused("-i", scans, "-o", tmp_path / "mine.txt", *clip)
    assert (tmp_path / "mine.txt").read_text() == "kept" and len(list(scans.iterdir())) == 3
    odd = save(image_of(brain()), scans / "new9.nii.gz")
    assert "new9.nii.gz: expected a name like CASE_0000.nii.gz" in refused("-i", scans, "-o", out, *clip)
    odd.unlink()
    save(image_of(brain()), scans / "new1_0000.nii")
    assert "new1_0000.nii: there is also new1_0000.nii.gz" in refused("-i", scans, "-o", out, *clip)
    (scans / "new1_0000.nii").unlink()
    save(image_of(brain()), scans / "new1_0000.mha")  # another image, and not to be passed over
    assert "new1_0000.mha: there is also new1_0000.nii.gz" in refused("-i", scans, "-o", out, *clip)
    assert leftovers(out) == ["mine.txt"]


def test_every_bad_file_is_listed_and_nothing_is_written(scans, tmp_path, refused):
    out = tmp_path / "out"
    whole = (scans / "new0_0000.nii.gz").read_bytes()
    (scans / "new0_0000.nii.gz").write_bytes(whole[:-40])
    save(image_of(np.full((6, 8, 10), 3, np.int16)), scans / "new1_0000.nii.gz")
    text = refused("-i", scans, "-o", out, "-percentiles", 5, 95)
    assert "new0_0000.nii.gz: " in text and "new1_0000.nii.gz: every voxel is 3" in text and "new2" not in text
    assert leftovers(out) == []
    (scans / "new1_0000.nii.gz").unlink()
    (scans / "new0_0000.nii.gz").write_bytes(b"no image")
    assert "new0_0000.nii.gz: cannot be read" in refused("-i", scans, "-o", out, "-percentiles", 5, 95)
    assert leftovers(out) == []
