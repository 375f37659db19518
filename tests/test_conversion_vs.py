"""VS converter on vendor trees made here: TCIA, its convenient and converted layouts, crossMoDA of three years."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import litter
from pydicom import dcmread
from pydicom.dataset import Dataset
from support.folders import refuser, use_folders
from support.rtstruct import save_rtstruct
from support.scans import VENDORS, names
from support.vs import (
    NUMBERS,
    ROLES,
    direction,
    make_tcia,
    outline,
    real_crossmoda,
    real_pairs,
    save_series,
    scan,
    structures,
    tumour,
    uid,
)

from nnunet_uda.commands.convert import main
from nnunet_uda.dataset_conversion.protocols import split_patients
from nnunet_uda.dataset_conversion.vs import PATIENTS, choose_tumour
from nnunet_uda.errors import UDAError
from nnunet_uda.images.rtstruct import Contour, Structures

DATA = os.environ.get("NNUNET_UDA_TEST_DATA")


def label_image(number: int, weighting: str) -> sitk.Image:
    label = sitk.GetImageFromArray(tumour(number))
    label.CopyInformation(scan(number, weighting))
    return label


def make_convenient(tree: Path) -> Path:
    for number in NUMBERS:
        for weighting in ("t1", "t2"):
            folder = tree / f"vs_gk_{number}_{weighting}"
            save_series(scan(number, weighting), folder, "IMG{:010d}.dcm", number, weighting)
            named = structures(number, weighting)
            if number % 2:
                patient = {"PatientID": f"VS-SEG-{number:03d}"}
                save_rtstruct(folder / "RTSS.dcm", named, uid(number, weighting), **patient)
                save_rtstruct(folder / "RTPLAN.dcm", [], Modality="RTPLAN", **patient)
            else:
                write_json(folder / "contours.json", named)
    return tree


def write_json(path: Path, named: list[tuple[str, list[Contour]]]) -> None:
    content = [{"structure_name": n, "LPS_contour_points": [c.points.tolist() for c in cs]} for n, cs in named]
    path.write_text(json.dumps(content))


def make_converted(tree: Path, numbers=NUMBERS) -> Path:
    for number in numbers:
        folder = tree / f"vs_gk_{number}"
        folder.mkdir(parents=True)
        for weighting in ("t1", "t2"):
            end = f"ref{weighting.upper()}.nii.gz"
            sitk.WriteImage(scan(number, weighting), str(folder / f"vs_gk_{weighting}_{end}"))
            sitk.WriteImage(label_image(number, weighting), str(folder / f"vs_gk_seg_{end}"))
    return tree


CROSSMODA = {
    "2021": ("", "source_training", "target_training", "target_validation", ("crossmoda",), "hrT2"),
    "2022": (
        "crossmoda2022_training/", "training_source", "training_target", "../crossmoda2022_validation/validation",
        ("crossmoda2021_ldn", "crossmoda2022_etz"), "hrT2",
    ),
    "2023": (
        "crossmoda23_training/", "TrainingSource", "TrainingTarget", "../crossmoda23_validation",
        ("crossmoda2023_etz", "crossmoda2023_ukm"), "T2",
    ),
}  # fmt: skip


def make_crossmoda(tree: Path, year: str = "2021") -> Path:
    """Six sources, three targets, two of the validation; cochlea beside the tumour, which 2023 has in two parts."""
    above, source, target, validation, prefixes, suffix = CROSSMODA[year]
    for i in range(11):
        folder = tree / above / (source if i < 6 else target if i < 9 else validation)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{prefixes[i % len(prefixes)]}_{i + 1}"
        sitk.WriteImage(scan(i, "t1"), str(folder.resolve() / f"{name}_{'ceT1' if i < 6 else suffix}.nii.gz"))
        if i < 6:
            sitk.WriteImage(crossmoda_label(i, year), str(folder / f"{name}_Label.nii.gz"))
    return tree


def crossmoda_label(i: int, year: str) -> sitk.Image:
    array = tumour(i)
    if year == "2023":
        array[3][array[3] == 1] = 2
    array[5, 10:12, 10:13] = 3 if year == "2023" else 2
    label = sitk.GetImageFromArray(array)
    label.CopyInformation(scan(i, "t1"))
    return label


MAKERS: dict[str, Callable[[Path], Path]] = {
    "tcia": make_tcia, "convenient": make_convenient, "converted": make_converted,
    **{f"crossmoda {year}": partial(make_crossmoda, year=year) for year in CROSSMODA},
}  # fmt: skip


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Callable[[str], Path]:
    """A tree of each layout, made once; copy it before changing it."""
    made: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in made:
            made[layout] = MAKERS[layout](tmp_path_factory.mktemp("vs") / "vendor")
        return made[layout]

    return get


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    use_folders(monkeypatch, tmp_path)
    return tmp_path


def convert(tree: Path, *options: str, source: str = "cet1", target: str = "hrt2", d: str = "507") -> Path:
    main(["vs", "-i", str(tree), "-d", d, "-source", source, "-target", target, "-np", "1", *VENDORS, *options])
    return next(Path(os.environ["nnUNet_raw"]).glob(f"Dataset{d}_*"))


refused = refuser(convert)


def ids(*groups: str, weighting: str) -> list[str]:
    return sorted(f"vs_gk_{number}_{weighting}" for group in groups for number in ROLES[group])


def folds(out: Path) -> list[dict[str, list[str]]]:
    return [{k: sorted(v) for k, v in fold.items()} for fold in json.loads((out / "splits_final.json").read_text())]


def same_in_space(first: sitk.Image, second: sitk.Image) -> bool:
    """The same voxels at the same places, whatever their order in the file."""
    first, second = sitk.DICOMOrient(first, "LPS"), sitk.DICOMOrient(second, "LPS")
    corners = [(0, 0, 0), tuple(n - 1 for n in first.GetSize())]
    return first.GetSize() == second.GetSize() and all(
        np.allclose(first.TransformIndexToPhysicalPoint(c), second.TransformIndexToPhysicalPoint(c), atol=1e-4)
        for c in corners
    ) and bool((sitk.GetArrayFromImage(first) == sitk.GetArrayFromImage(second)).all())  # fmt: skip


# --- the trees --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tcia", "convenient", "converted"])
def test_voxels_labels_and_places_are_kept_both_ways(root, pristine, layout):
    tree = pristine(layout)
    out, back = convert(tree), convert(tree, source="hrt2", target="cet1", d="508")
    assert (out.name, back.name) == ("Dataset507_VS_ceT1_to_hrT2", "Dataset508_VS_hrT2_to_ceT1")
    for dataset, source, target in ((out, "t1", "t2"), (back, "t2", "t1")):
        labelled = ids("source", "validation", weighting=source)
        assert names(dataset / "imagesTr") == names(dataset / "labelsTr") == labelled
        assert names(dataset / "imagesTu") == ids("target", weighting=target)
        assert names(dataset / "imagesTs") == names(dataset / "labelsTs") == ids("test", weighting=target)
        for path in dataset.rglob("*_0000.nii.gz"):
            _, _, number, weighting, _ = path.name.split("_")
            assert same_in_space(sitk.ReadImage(str(path)), scan(int(number), weighting)), path
        for path in [*dataset.glob("labels*/*")]:
            _, _, number, weighting = path.name.removesuffix(".nii.gz").split("_")
            assert same_in_space(sitk.ReadImage(str(path)), label_image(int(number), weighting)), path
    assert {direction(n) for n in NUMBERS} > {"oblique", "flipped"}
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "vs": 1} and content["channel_names"] == {"0": "intensity"}
    assert (content["uda"]["source_domain"], content["uda"]["target_domain"]) == ("ceT1", "hrT2")
    assert folds(out) == [{"train": ids("source", weighting="t1"), "val": ids("validation", weighting="t1")}]


@pytest.mark.parametrize("year", CROSSMODA)
@pytest.mark.parametrize("chosen", [("vs",), ("cochlea", "vs")])
def test_crossmoda(root, pristine, year, chosen, capsys):
    tree = pristine(f"crossmoda {year}")
    out = convert(tree, "-structures", *chosen)
    prefixes = CROSSMODA[year][4]
    stems = [f"{prefixes[i % len(prefixes)]}_{i + 1}" for i in range(11)]
    assert names(out / "imagesTr") == names(out / "labelsTr") == sorted(f"{s}_ceT1" for s in stems[:6])
    assert names(out / "imagesTu") == sorted(f"{s}_hrT2" for s in stems[6:9])
    assert names(out / "imagesTs") == sorted(f"{s}_hrT2" for s in stems[9:]) and not (out / "labelsTs").exists()
    assert "2 of 2 cases in imagesTs have no label" in capsys.readouterr().out
    for i, stem in enumerate(stems[:6]):
        image = sitk.ReadImage(str(out / "imagesTr" / f"{stem}_ceT1_0000.nii.gz"))
        assert same_in_space(image, scan(i, "t1")) and image.GetPixelID() == sitk.sitkInt16
        expected = tumour(i) * (chosen.index("vs") + 1)
        if "cochlea" in chosen:
            expected[5, 10:12, 10:13] = 1
        label = sitk.ReadImage(str(out / "labelsTr" / f"{stem}_ceT1.nii.gz"))
        assert (sitk.GetArrayFromImage(label) == expected).all()
    splits = json.loads((out / "splits_final.json").read_text())
    assert len(splits) == 5 and sorted(i for s in splits for i in s["val"]) == names(out / "imagesTr")


def test_crossmoda_validation_with_labels_of_ones_own(root):
    tree = make_crossmoda(root / "vendor")
    sitk.WriteImage(crossmoda_label(9, "2021"), str(tree / "target_validation" / "crossmoda_10_Label.nii.gz"))
    out = convert(tree)
    assert names(out / "labelsTs") == ["crossmoda_10_hrT2"]
    assert (sitk.GetArrayFromImage(sitk.ReadImage(str(out / "labelsTs/crossmoda_10_hrT2.nii.gz"))) == tumour(9)).all()


def test_upper_bound(root, pristine):
    out = convert(pristine("converted"), "--upper_bound")
    assert out.name == "Dataset507_VS_hrT2_upper_bound"
    assert "target_domain" not in json.loads((out / "dataset.json").read_text()).get("uda", {})
    assert names(out / "imagesTr") == names(out / "labelsTr") == ids("target", "validation", weighting="t2")
    assert names(out / "imagesTs") == ids("test", weighting="t2") and not (out / "imagesTu").exists()
    assert folds(out) == [{"train": ids("target", weighting="t2"), "val": ids("validation", weighting="t2")}]


@pytest.mark.parametrize("layout", ["convenient", "converted"])
def test_target_labels_cannot_change_an_image_or_a_group(root, layout):
    tree = MAKERS[layout](root / "vendor")

    def converted(d: str) -> dict[str, bytes]:
        out = convert(tree, d=d)
        kept = [*out.glob("images*/*"), *out.glob("labelsTr/*"), out / "splits_final.json"]
        return {str(p.relative_to(out)): p.read_bytes() for p in kept}

    before = converted("507")
    targets = [p for p in tree.rglob("*") if p.name in ("RTSS.dcm", "contours.json") and p.parent.name.endswith("t2")]
    targets += tree.rglob("vs_gk_seg_refT2.nii.gz")
    assert len(targets) == len(NUMBERS)
    for path in targets:
        if all(str(number) not in path.parent.name.split("_") for number in ROLES["test"]):
            path.write_bytes(b"garbage")  # not even opened
    assert converted("508") == before
    for path in targets:
        path.unlink()
    assert converted("509") == before


@pytest.mark.parametrize("layout", ["tcia", "convenient", "converted", "crossmoda 2022"])
def test_what_systems_leave_beside_files_is_passed_over(root, pristine, layout, capsys):
    tree = Path(shutil.copytree(pristine(layout), root / "vendor"))
    litter(tree)
    out = convert(tree)
    assert len(list(out.glob("images*/*"))) == (11 if layout.startswith("crossmoda") else len(NUMBERS))
    assert "repaired: nothing" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["tcia", "convenient", "converted", "crossmoda 2021"])
def test_endings_in_capitals(root, pristine, layout):
    tree = Path(shutil.copytree(pristine(layout), root / "vendor"))
    for path in [p for p in tree.rglob("*") if p.is_file()]:
        name, dot, ending = path.name.partition(".")
        path.rename(path.with_name(name + dot + ending.upper()))
    assert len(list(convert(tree).glob("images*/*"))) == (11 if layout.startswith("crossmoda") else len(NUMBERS))


@pytest.mark.parametrize("layout", ["tcia", "convenient"])
def test_dicom_files_without_an_ending(root, pristine, layout):
    tree = Path(shutil.copytree(pristine(layout), root / "vendor"))
    for path in list(tree.rglob("*.dcm")):
        path.rename(path.with_suffix(""))
    (tree / "README").write_text("no DICOM")
    assert len(list(convert(tree).glob("images*/*"))) == len(NUMBERS)


def test_empty_elements_count_as_missing(root, pristine):
    tree = Path(shutil.copytree(pristine("tcia"), root / "vendor"))
    number = ROLES["source"][0]
    for path in tree.rglob("*.dcm"):
        dataset = dcmread(path)
        dataset.PatientName, dataset.SliceThickness, dataset.StudyDescription = "", None, None
        if "-rt" in path.parent.name:
            dataset.PatientID = ""
        if "series" in path.parent.name:
            dataset.Modality, dataset.NumberOfFrames = "", None
        if path.parent == source(tree, "t1-series"):
            dataset.RescaleSlope = dataset.RescaleIntercept = None
            dataset.PixelData = (np.frombuffer(dataset.PixelData, "<i2") * 2 + 100).astype("<i2").tobytes()
        dataset.save_as(path)
    out = convert(tree)
    image = sitk.ReadImage(str(out / "imagesTr" / f"vs_gk_{number}_t1_0000.nii.gz"))
    assert same_in_space(image, scan(number, "t1"))
    assert len(list(out.glob("images*/*"))) == len(NUMBERS)


def test_a_contour_inside_another_makes_a_ring_and_is_reported(root, pristine, capsys):
    tree = Path(shutil.copytree(pristine("convenient"), root / "vendor"))
    number = ROLES["source"][0]
    hole = np.zeros_like(tumour(number))
    hole[2:4, 4:6, 5 + number % 3 : 8] = 1
    only_contours(tree, [("TV", [*drawn(), *outline(scan(number, "t1"), hole)])])
    out = convert(tree)
    assert f"vs_gk_{number}_t1: RTSS.dcm: 2 contours inside others, cut out of them" in capsys.readouterr().out
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "labelsTr" / f"vs_gk_{number}_t1.nii.gz")))
    assert label.sum() == (tumour(number) - hole).sum() and hole.sum() > 0


# --- the split --------------------------------------------------------------------------------------------------------


def test_split_of_the_paper():
    numbers = sorted(set(range(1, 251)) - {39, 97, 130, 160, 168, 208, 219, 227})
    groups, warnings = split_patients(numbers, PATIENTS, 7)
    assert {group: len(members) for group, members in groups.items()} == {
        "source": 100, "validation": 14, "target": 100, "test": 28,
    }  # fmt: skip
    assert warnings == [] and sorted(n for members in groups.values() for n in members) == numbers
    assert groups == split_patients(numbers[::-1], PATIENTS, 7)[0] != split_patients(numbers, PATIENTS, 8)[0]
    groups, warnings = split_patients(numbers[:121], PATIENTS, 7)
    assert [len(m) for m in groups.values()] == [
        50,
        7,
        50,
        14,
    ] and "121 patients, 14 of them for testing, where the paper has 242" in warnings[0]
    groups, _ = split_patients(numbers, PATIENTS, 7, test=numbers[:28])
    assert groups["test"] == numbers[:28] and [len(m) for m in groups.values()] == [100, 14, 100, 28]
    assert [len(m) for m in split_patients([5, 6, 7, 8], PATIENTS, 0)[0].values()] == [1, 1, 1, 1]
    with pytest.raises(UDAError, match=r"3 patients \(5, 6, 7\) for source, validation, target, test"):
        split_patients([5, 6, 7], PATIENTS, 0)


def test_chosen_test_patients_and_excluded_ones(root, pristine, refused):
    tree = pristine("converted")
    out = convert(tree, "-test_ids", "1", "38", "-exclude", "40")
    assert names(out / "imagesTs") == ["vs_gk_1_t2", "vs_gk_38_t2"]
    assert not [p for p in out.rglob("*_40_*")] and len(list(out.glob("images*/*"))) == 5
    shutil.rmtree(out)
    assert "-test_ids names 39, which is not there" in refused(tree, "-test_ids", "39")
    assert "-exclude names 97, which is not there" in refused(tree, "-exclude", "97")


def test_a_missing_modality_is_skipped_or_refused(root, refused, capsys):
    tree = make_converted(root / "vendor")
    (tree / "vs_gk_3" / "vs_gk_t2_refT2.nii.gz").unlink()
    message = "vs_gk_3/vs_gk_t1_refT1.nii.gz: patient 3 has no hrT2 scan"
    assert message in refused(tree, "--strict")
    out = convert(tree)
    assert f"{message}: this patient is left out" in capsys.readouterr().out
    assert not list(out.rglob("*_3_*")) and len(list(out.glob("images*/*"))) == 5


# --- the tumour's name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TV", "tv", "AN", "an ", "Tumour", "tumor", "VS", "Rt AN"])
def test_tumour_by_name(name):
    named = tuple((n, ()) for n in ("Brainstem", "Modiolus", "cochlea", name, "Test", "Men", "Vol2016"))
    assert choose_tumour(Structures(Path("RTSS.dcm"), named), ()) == name


@pytest.mark.parametrize(
    ("named", "further", "found"),
    [
        (["cochlea", "vol 2y"], ["Vol 2y"], "vol 2y"),
        (["TV", "vol 2y"], ["vol 2y"], "TV"),  # further names do not replace a usual one
        (["TV", "AN"], ["AN"], "AN"),
        (["TV", "AN", "x"], ["x"], None),
        (["TV", "AN"], [], None),
        (["TV", "tv"], [], None),
        (["x", "y"], ["x", "y"], None),
        (["Brainstem", "Men", "Test", "Cochlea_c", "TV2", "vol 2y"], [], None),
        ([], [], None),
    ],
)
def test_unknown_or_ambiguous_names(named, further, found):
    structures_ = Structures(Path("a/RTSS.dcm"), tuple((name, ()) for name in named))
    if found:
        assert choose_tumour(structures_, further) == found
        return
    with pytest.raises(UDAError, match=rf"a/RTSS\.dcm: .*found: {', '.join(named) or 'no structure at all'}.*-tumour"):
        choose_tumour(structures_, further)


def test_contours_off_the_slices_are_reported(root, capsys):
    tree = make_convenient(root / "vendor")
    number = ROLES["source"][0]
    folder, image = tree / f"vs_gk_{number}_t1", scan(number, "t1")
    for path in (folder / "RTSS.dcm", folder / "contours.json"):
        path.unlink(missing_ok=True)
    write_json(folder / "contours.json", [("TV", outline(image, tumour(number), shift=0.3))])
    out = convert(tree)
    assert f"vs_gk_{number}_t1: contours.json: contours up to 0.45 mm off the slices" in capsys.readouterr().out
    label = sitk.ReadImage(str(out / "labelsTr" / f"vs_gk_{number}_t1.nii.gz"))
    assert same_in_space(label, label_image(number, "t1"))


# --- what is refused --------------------------------------------------------------------------------------------------


def source(tree: Path, name: str = "") -> Path:
    """A file of a source patient: its folder in the convenient or converted tree, or its study in TCIA's."""
    number = ROLES["source"][0]
    for folder in (tree / f"vs_gk_{number}_t1", tree / f"vs_gk_{number}"):
        if folder.is_dir():
            return folder / name
    return tree / "Vestibular-Schwannoma-SEG" / f"VS-SEG-{number:03d}" / "08-30-1994-NA-27505" / name


def rewrite(path: Path, **tags) -> None:
    dataset = dcmread(path)
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    dataset.save_as(path)


def only_contours(tree: Path, named, series: str | None = None, patient: str | None = None) -> None:
    number = ROLES["source"][0]
    source(tree, "contours.json").unlink(missing_ok=True)
    tags = {"PatientID": patient or f"VS-SEG-{number:03d}"}
    save_rtstruct(source(tree, "RTSS.dcm"), named, uid(number, "t1") if series is None else series, **tags)


def other_label(tree: Path, array: np.ndarray | None = None, spacing: float = 1.5) -> None:
    number = ROLES["source"][0]
    label = label_image(number, "t1") if array is None else sitk.GetImageFromArray(array)
    if array is not None:
        label.CopyInformation(scan(number, "t1"))
    label.SetSpacing((0.8, 0.75, spacing))
    sitk.WriteImage(label, str(source(tree, "vs_gk_seg_refT1.nii.gz")))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drawn(number: int = ROLES["source"][0]) -> list[Contour]:
    return outline(scan(number, "t1"), tumour(number))


def far() -> list[Contour]:
    return [Contour(c.points + np.array([0.0, 0.0, 300.0])) for c in drawn()]


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "RTSTRUCT without a tumour": (
        "convenient", lambda t: only_contours(t, [("Brainstem", drawn()), ("Men", drawn())]),
        r"_t1/RTSS.dcm: no tumour \(found: Brainstem, Men\); expected exactly one named tv, ",
    ),
    "RTSTRUCT with two": (
        "convenient", lambda t: only_contours(t, [("TV", drawn()), ("AN", drawn())]),
        r"_t1/RTSS.dcm: 2 of its structures are named as a tumour \(found: TV, AN\)",
    ),
    "RTSTRUCT without structures": (
        "convenient", lambda t: only_contours(t, []), r"_t1/RTSS.dcm: no tumour \(found: no structure at all\)",
    ),
    "tumour without contours": (
        "convenient", lambda t: only_contours(t, [("TV", [])]), r"RTSS.dcm: the structure TV encloses no voxel \(0 con",
    ),
    "RTSTRUCT of another series": (
        "convenient", lambda t: only_contours(t, [("TV", drawn())], "1.2.3.4"),
        r"_t1/RTSS.dcm: it refers to the series 1.2.3.4, but the scan in .*_t1 is 1.2.826",
    ),
    "RTSTRUCT of no series": (
        "convenient", lambda t: only_contours(t, [("TV", drawn())], ""), r"RTSS.dcm: it refers to the series \(none\)",
    ),
    "RTSTRUCT of another patient": (
        "convenient", lambda t: only_contours(t, [("TV", drawn())], patient="VS-SEG-099"),
        r"_t1/RTSS.dcm: its PatientID is 'VS-SEG-099'",
    ),
    "contours outside the scan": (
        "convenient", lambda t: only_contours(t, [("TV", far())]), r"RTSS.dcm: a contour (lies outside|runs through)",
    ),
    "an image instead of the RTSTRUCT": (
        "convenient",
        lambda t: (
            source(t, "contours.json").unlink(missing_ok=True),
            shutil.copy(source(t, "IMG0000000001.dcm"), source(t, "RTSS.dcm")),
        ),
        r"RTSS.dcm: a DICOM file of modality MR; expected an RTSTRUCT",
    ),
    "contours.json that is none": (
        "convenient",
        lambda t: (
            source(t, "RTSS.dcm").unlink(missing_ok=True),
            source(t, "contours.json").write_text("[{}]"),
        ),
        r"_t1/contours.json: cannot be read",
    ),
    "a scan under another patient's name": (
        "convenient", lambda t: (t / "vs_gk_4_t1").rename(t / "vs_gk_77_t1"),
        r"vs_gk_77_t1/IMG0000000001.dcm: its PatientID is VS-SEG-004, but it lies in the folder of patient 77",
    ),
    "T2 in the folder of T1": (
        "convenient",
        lambda t: rewrite(source(t, "IMG0000000001.dcm"), SeriesDescription="t2_ci3d"),
        r"_t1/IMG0000000001.dcm: its SeriesDescription is 't2_ci3d'; expected a ceT1 scan",
    ),
    "corrupt DICOM": (
        "convenient", lambda t: source(t, "IMG0000000003.dcm").write_bytes(b"garbage"),
        r"_t1/IMG0000000003.dcm: cannot be read",
    ),
    "missing slice": (
        "convenient", lambda t: source(t, "IMG0000000003.dcm").unlink(), r"_t1/IMG\d+.dcm: 3.000 mm to the next slice",
    ),
    "multi-frame": (
        "tcia",
        lambda t: (
            [p.unlink() for p in source(t, "t1-series").iterdir() if p.name != "1-1.dcm"],
            rewrite(source(t, "t1-series/1-1.dcm"), NumberOfFrames=6, ImagePositionPatient=None, PixelSpacing=None),
        ),
        r"t1-series/1-1.dcm: a multi-frame DICOM of 6 frames; expected one slice per file. Split it",
    ),
    "RTSTRUCT whose reference is empty": (
        "tcia", lambda t: rewrite(source(t, "t1-rt/1-1.dcm"), ReferencedFrameOfReferenceSequence=[Dataset()]),
        r"t1-rt/1-1.dcm: it refers to the series \(none\)",
    ),
    "two series in one folder": (
        "convenient", lambda t: rewrite(source(t, "IMG0000000003.dcm"), SeriesInstanceUID="1.2.9"),
        r"_t1/IMG0000000003.dcm: 2 series in one folder",
    ),
    "source scan without label": (
        "convenient",
        lambda t: [source(t, name).unlink(missing_ok=True) for name in ("RTSS.dcm", "contours.json")],
        r"_t1: there is no label for this ceT1 case",
    ),
    "the same patient twice": (
        "convenient", lambda t: shutil.copytree(t / "vs_gk_1_t1", t / "vs_gk_01_t1"),
        r"vs_gk_0?1_t1: the ceT1 scan of patient 1 is already in .*vs_gk_0?1_t1",
    ),
    "TCIA: an RTSTRUCT of no series of the patient": (
        "tcia", lambda t: save_rtstruct(source(t, "t1-rt/1-1.dcm"), [("TV", drawn())], "1.2.3.4"),
        r"t1-rt/1-1.dcm: it refers to the series 1.2.3.4; expected one of this patient's, 1.2.826.*\(ceT1\)",
    ),
    "TCIA: two RTSTRUCTs of a series": (
        "tcia", lambda t: shutil.copytree(source(t, "t1-rt"), source(t, "t1-rt2")),
        r"t1-rt2/1-1.dcm: .*t1-rt/1-1.dcm is an RTSTRUCT of the same series",
    ),
    "TCIA: two T1 series": (
        "tcia", lambda t: save_series(scan(2, "t1"), source(t, "t1-again"), "1-{:d}.dcm", ROLES["source"][0], "t1"),
        r"1-1.dcm: an MR series described as 't1_mpr_tra', .* is one already",
    ),
    "TCIA: a series of neither": (
        "tcia",
        lambda t: save_series(
            scan(2, "t1"), source(t, "loc"), "1-{:d}.dcm", ROLES["source"][0], "t1", SeriesDescription="localizer"
        ),
        r"loc/1-1.dcm: an MR series described as 'localizer', it names neither t1 nor t2",
    ),
    "TCIA: another patient's scan": (
        "tcia", lambda t: [rewrite(p, PatientID="VS-SEG-200") for p in source(t, "t2-series").iterdir()],
        r"t2-series/1-1.dcm: its PatientID is VS-SEG-200",
    ),
    "TCIA: corrupt RTSTRUCT": (
        "tcia", lambda t: source(t, "t1-rt/1-1.dcm").write_bytes(b"garbage"), r"t1-rt/1-1.dcm: cannot be read",
    ),
    "converted: label of another patient": (
        "converted", lambda t: other_label(t, np.pad(tumour(1), ((0, 0), (0, 0), (0, 0))), 1.7),
        r"vs_gk_seg_refT1.nii.gz: its geometry differs from that of .*vs_gk_t1_refT1.nii.gz: spacing",
    ),
    "converted: unknown label value": (
        "converted", lambda t: other_label(t, tumour(1) * 3),
        r"vs_gk_seg_refT1.nii.gz: the label holds the values 3, .*1 \(tumour\)",
    ),
    "converted: corrupt NIfTI": (
        "converted", lambda t: truncate(source(t, "vs_gk_t1_refT1.nii.gz")), r"vs_gk_t1_refT1.nii.gz: .*truncated",
    ),
    "converted: empty label": (
        "converted",
        lambda t: [
            sitk.WriteImage(sitk.ReadImage(str(p)) * 0, str(p)) for p in t.rglob("vs_gk_seg_refT1.nii.gz")
        ],
        r"vs_gk_seg_refT1.nii.gz: neither this label nor any other .* holds the structure 'vs'",
    ),
    "mixed layouts": (
        "converted", make_crossmoda, r"two layouts in one tree, .* \(crossMoDA\) and .* \(vs_gk_<n>\)",
    ),
    "mixed layouts of one patient": (
        "converted", lambda t: (t / "vs_gk_1_t1").mkdir(), r"two layouts in one tree, .*vs_gk_1_t1",
    ),
    "too few patients": (
        "converted", lambda t: [shutil.rmtree(t / f"vs_gk_{n}") for n in NUMBERS[3:]], r"3 patients \(1, 2, 3\) for",
    ),
    "TCIA: no scan": (
        "tcia", lambda t: [shutil.rmtree(p) for p in t.rglob("t?-*")],
        r"vendor: none of the 6 folders of patients .*VS-SEG-001, .* has both scans; .*<study>/<series>/\*.dcm",
    ),
    "convenient: no scan": (
        "convenient", lambda t: [p.unlink() for p in t.rglob("IMG*.dcm")],
        r"none of the 12 folders of patients .*vs_gk_1_t1, .* has both scans; .*IMG\*.dcm",
    ),
    "converted: no T2": (
        "converted", lambda t: [p.unlink() for p in t.rglob("*_t2_*")], r"none of the 6 .*vs_gk_t2_refT2.nii.gz",
    ),
    "empty tree": ("converted", lambda t: (shutil.rmtree(t), t.mkdir()), r"holds no vestibular .*found: nothing"),
    "no tree": ("converted", shutil.rmtree, r"holds no vestibular .*found: no such folder"),
    "crossMoDA: no label": (
        "crossmoda 2021", lambda t: (t / "source_training/crossmoda_1_Label.nii.gz").unlink(),
        r"crossmoda_1_ceT1.nii.gz: there is no label for this ceT1 case",
    ),
    "crossMoDA: label without scan": (
        "crossmoda 2021", lambda t: (t / "source_training/crossmoda_1_ceT1.nii.gz").unlink(),
        r"crossmoda_1_Label.nii.gz: its image is missing",
    ),
    "crossMoDA: cochlea of 2023 in 2021": (
        "crossmoda 2021",
        lambda t: sitk.WriteImage(
            crossmoda_label(0, "2023"), str(t / "source_training/crossmoda_1_Label.nii.gz")
        ),
        r"crossmoda_1_Label.nii.gz: the label holds the values 3, .*1 \(vs\), 2 \(cochlea\)",
    ),
    "crossMoDA: a target in the source": (
        "crossmoda 2021",
        lambda t: shutil.copy(t / "target_training/crossmoda_7_hrT2.nii.gz", t / "source_training"),
        r"source_training/crossmoda_7_hrT2.nii.gz: unexpected file",
    ),
    "crossMoDA: no target": (
        "crossmoda 2021", lambda t: shutil.rmtree(t / "target_training"),
        r"there is no target training folder with scans \(found: source_training, target_validation\)",
    ),
    "crossMoDA: two years": (
        "crossmoda 2023",
        lambda t: [
            p.rename(p.with_name(p.name.replace("crossmoda2023_ukm", "crossmoda2022_etz"))) for p in t.rglob("*ukm_2_*")
        ],
        r"is named as crossMoDA .*expected one year's tree",
    ),
    "crossMoDA: two trees": (
        "crossmoda 2021", lambda t: make_crossmoda(t / "other", "2022"), r"is the source folder already",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_trees_that_are_refused(root, pristine, refused, what):
    layout, damage, message = BAD[what]
    tree = Path(shutil.copytree(pristine(layout), root / "vendor"))
    damage(tree)
    text = refused(tree)
    assert re.search(message.replace(".dcm", r"\.dcm").replace(".nii.gz", r"\.nii\.gz"), text), text


@pytest.mark.parametrize("layout", ["tcia", "convenient", "converted"])
def test_warnings_are_printed_where_an_error_stops(root, pristine, capsys, layout):
    tree = Path(shutil.copytree(pristine(layout), root / "vendor"))
    for path in [p for p in tree.rglob("*") if p.is_file()]:
        if re.search(r"t2-|vs_gk_\d+_t2/IMG|vs_gk_t2_", str(path)):
            path.unlink()
    with pytest.raises(SystemExit):
        convert(tree)
    printed = capsys.readouterr().err
    for number in NUMBERS:
        assert f"patient {number} has no hrT2 scan: this patient is left out" in printed
    assert printed.index("WARNING: ") < printed.index("ERROR: ") and printed.count("WARNING: ") == len(NUMBERS)


def test_requests_that_are_refused(root, pristine, refused):
    vs_seg, crossmoda = pristine("converted"), pristine("crossmoda 2021")
    for tree, options, modalities, message in (
        (vs_seg, (), {"target": "cet1"}, "-source and -target are both cet1"),
        (vs_seg, ("-protocol", "crossmoda"), {}, "which -protocol crossmoda cannot split"),
        (vs_seg, ("-structures", "vs", "cochlea"), {}, "this tree is vs_gk_<n>, where only some patients"),
        (crossmoda, ("-protocol", "uuds"), {}, "this tree is crossMoDA, which -protocol uuds cannot split"),
        (crossmoda, (), {"source": "hrt2", "target": "cet1"}, "crossMoDA has labels of ceT1 alone"),
        (crossmoda, ("--upper_bound",), {}, "crossMoDA has labels of ceT1 alone"),
        (crossmoda, ("-test_ids", "3"), {}, "-test_ids go with -protocol uuds"),
    ):
        assert message in refused(tree, *options, **modalities)


# --- real files -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DATA is None, reason="NNUNET_UDA_TEST_DATA is not set: no real scans to convert")
def test_real_scans_named_as_crossmoda(root):
    files = Path(DATA, "vs")
    out = convert(real_crossmoda(root / "vendor", files))
    for kind, name, file in (
        ("imagesTr", "crossmoda_99_ceT1_0000", "vs_gk_99_t1"), ("labelsTr", "crossmoda_99_ceT1", "vs_gk_99_t1_seg"),
        ("imagesTu", "crossmoda_198_hrT2_0000", "vs_gk_98_t2"), ("labelsTs", "crossmoda_219_hrT2", "vs_gk_9_t2_seg"),
    ):  # fmt: skip
        image, vendor = (sitk.ReadImage(str(p)) for p in (out / kind / f"{name}.nii.gz", files / f"{file}.nii.gz"))
        assert same_in_space(image, vendor)


@pytest.mark.skipif(DATA is None, reason="NNUNET_UDA_TEST_DATA is not set: no real scans to convert")
def test_real_scans_in_the_converted_layout(root):
    files = Path(DATA, "vs")
    out = convert(real_pairs(root / "vendor", files), "-test_ids", "9")
    assert names(out / "imagesTs") == names(out / "labelsTs") == ["vs_gk_9_t2"]
    for kind, file in (("imagesTs/vs_gk_9_t2_0000", "vs_gk_9_t2"), ("labelsTs/vs_gk_9_t2", "vs_gk_9_t2_seg")):
        image, vendor = (sitk.ReadImage(str(p)) for p in (out / f"{kind}.nii.gz", files / f"{file}.nii.gz"))
        assert same_in_space(image, vendor) and math.prod(image.GetSize()) == 272 * 160 * 40
