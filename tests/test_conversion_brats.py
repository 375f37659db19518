"""BraTS converter on vendor trees made here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.brats import FOLDERS, LPS, SHAPE, brain, case_folder, file, make_case, make_tree, save, tumour
from support.folders import refuser, use_folders
from support.scans import VENDORS, load, names

from nnunet_uda.commands.convert import main
from nnunet_uda.dataset_conversion.brats import PATIENTS
from nnunet_uda.dataset_conversion.protocols import split_patients
from nnunet_uda.images.intensities import Intensities, read_intensities

RAS = (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    use_folders(monkeypatch, tmp_path)
    return tmp_path / "nnUNet_raw"


@pytest.fixture
def tree(raw, tmp_path) -> Path:
    return make_tree(tmp_path / "vendor", kinds=("t2", "flair", "seg"))


def convert(tree: Path, *options: str, source: str = "flair", target: str = "t2", d: str = "505") -> Path:
    kept = () if {"-clip", "-range", "-protocol"} & set(options) else VENDORS
    main(["brats", "-i", str(tree), "-d", d, "-source", source, "-target", target, "-np", "1", *kept, *options])
    return next((tree.parent / "nnUNet_raw").glob(f"Dataset{d}_*"))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


refused = refuser(convert)


# --- the split --------------------------------------------------------------------------------------------------------


def test_the_papers_split():
    patients = [f"p{i:03d}" for i in range(369)]
    groups, warnings = split_patients(patients, PATIENTS, 1)
    assert {group: len(members) for group, members in groups.items()} == PATIENTS and not warnings
    assert sorted(p for members in groups.values() for p in members) == patients
    assert groups == split_patients(patients[::-1], PATIENTS, 1)[0] != split_patients(patients, PATIENTS, 2)[0]
    test = patients[:41]
    groups, warnings = split_patients(patients, PATIENTS, 1, test)
    assert groups["test"] == test and [len(m) for m in groups.values()] == [143, 143, 21, 21, 41] and not warnings
    assert "369 patients, 2 of them for testing" in split_patients(patients, PATIENTS, 1, patients[:2])[1][0]


@pytest.mark.parametrize(
    ("number", "expected"),
    [(5, [1, 1, 1, 1, 1]), (10, [4, 3, 1, 1, 1]), (738, [286, 286, 42, 42, 82]), (1251, [485, 485, 71, 71, 139])],
)
def test_other_numbers_are_split_in_proportion(number, expected):
    groups, warnings = split_patients([f"p{i}" for i in range(number)], PATIENTS, 0)
    assert [len(members) for members in groups.values()] == expected
    assert f"{number} patients, {expected[-1]} of them for testing, where the paper has 369 and 41" in warnings[0]


def test_groups_folders_and_folds(tree, capsys):
    out = convert(tree)
    assert out.name == "Dataset505_BraTS_FLAIR2T2"
    source, target, test = (names(out / f"images{group}") for group in ("Tr", "Tu", "Ts"))
    assert names(out / "labelsTr") == source and names(out / "labelsTs") == test
    assert [len(source), len(target), len(test)] == [4, 3, 1] and not (out / "labelsTu").exists()
    assert all(name.endswith("_flair") for name in source) and all(name.endswith("_t2") for name in target + test)
    patients = [name.rsplit("_", 1)[0] for name in source + target + test]
    assert sorted(patients) == [f"BraTS20_Training_{i:03d}" for i in range(1, 9)]
    for splits, cases in (("splits_final.json", source), ("splits_target.json", target)):
        (fold,) = read(out / splits)
        assert sorted(fold["train"] + fold["val"]) == cases and len(fold["val"]) == 1
    content = read(out / "dataset.json")
    assert content["labels"] == {"background": 0, "whole tumour": 1}
    assert content["channel_names"] == {"0": "intensity"}
    assert content["uda"] == {
        "source_domain": "FLAIR", "target_domain": "T2", "numSource": 4, "numTarget": 3, "numTest": 1,
        "label_values": {domain: {"whole tumour": [1, 2, 4]} for domain in ("FLAIR", "T2")},
    }  # fmt: skip
    assert "BraTS 2020" in content["description"]
    text = capsys.readouterr().out
    assert "Patients: 3 source, 2 target, 1 source validation, 1 target validation, 1 test" in text
    assert "WARNING: 8 patients, 1 of them for testing, where the paper has 369 and 41: split" in text

    other = convert(tree, "-seed", "7", d="506")
    assert names(other / "imagesTr") != source
    back = convert(tree, source="t2", target="flair", d="507")
    assert [name.replace("flair", "t2") for name in source] == names(back / "imagesTr")


def test_a_patient_with_several_visits_is_in_one_group(raw, tmp_path):
    tree = tmp_path / "vendor"
    for i in range(1, 7):
        for visit in ("100", "101", "102"):
            make_case(tree / f"BraTS-GLI-{i:05d}-{visit}", "2024", 9 * i, kinds=("t2", "flair", "seg"))
    out = convert(tree)
    groups = [{name[:15] for name in names(out / f"images{group}")} for group in ("Tr", "Tu", "Ts")]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 6
    assert sum(len(names(out / f"images{group}")) for group in ("Tr", "Tu", "Ts")) == 18
    for splits in ("splits_final.json", "splits_target.json"):
        (fold,) = read(out / splits)
        assert not {name[:15] for name in fold["train"]} & {name[:15] for name in fold["val"]}
    test = convert(tree, "-test_ids", "BraTS-GLI-00003-101", "brats-gli-00005", d="506")
    assert {name[:15] for name in names(test / "imagesTs")} == {"BraTS-GLI-00003", "BraTS-GLI-00005"}
    assert len(names(test / "imagesTs")) == 6


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", list(FOLDERS))
def test_namings_endings_and_round_trip(raw, tmp_path, year, capsys):
    ending, direction = (".nii", RAS) if year in ("2020", "2023") else (".nii.gz", LPS)
    vendor = make_tree(tmp_path / "vendor", year, 5, ending=ending, direction=direction)
    (vendor / "survival_info.csv").write_text("not an image")
    source, target = ("t1ce", "flair") if year in ("2021", "2024") else ("t2", "t1")
    out = convert(vendor, source=source, target=target)
    assert f"BraTS {year}" in read(out / "dataset.json")["description"]
    expected = (tumour(year) > 0) & ~((tumour(year) == 4) & (year == "2024"))
    seen = 0
    for i in range(1, 6):
        folder = case_folder(vendor, year, i)
        for images, labels, kind in (("Tr", "Tr", source), ("Tu", None, target), ("Ts", "Ts", target)):
            path = out / f"images{images}" / f"{folder.name}_{kind}_0000.nii.gz"
            if not path.exists():
                continue
            seen += 1
            before, after = sitk.ReadImage(str(file(folder, kind, ending))), sitk.ReadImage(str(path))
            assert (sitk.GetArrayFromImage(before) == sitk.GetArrayFromImage(after)).all()
            assert before.GetPixelID() == after.GetPixelID()
            label = sitk.ReadImage(str(out / f"labels{labels}" / f"{folder.name}_{kind}.nii.gz")) if labels else after
            for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(before, get)() == getattr(after, get)() == getattr(label, get)()
            assert after.GetDirection() == direction
            if labels:
                assert (sitk.GetArrayFromImage(label) == expected).all()
    assert seen == 5
    assert "repaired: nothing" in capsys.readouterr().out


def test_warnings_are_printed_where_an_error_stops(tree, capsys):
    for path in tree.rglob("*_t2.nii.gz"):
        path.unlink()
    with pytest.raises(SystemExit):
        convert(tree)
    printed = capsys.readouterr().err
    assert printed.count("WARNING: ") == 8 and "BraTS20_Training_003_t2.nii[.gz]: this case is left out" in printed
    assert f"ERROR: {tree}: none of its cases of BraTS 2020 has both scans; expected CASE_flair.nii[.gz] and" in printed


def test_case_355_is_found_and_noted(raw, tmp_path, refused, capsys):
    vendor = tmp_path / "vendor"
    for i in range(351, 357):
        make_case(case_folder(vendor, "2020", i), "2020", i, ".nii")
    folder = case_folder(vendor, "2020", 355)
    misnamed = folder / "W39_1998.09.19_Segm.nii"
    file(folder, "seg", ".nii").rename(misnamed)
    out = convert(vendor, "-test_ids", folder.name)
    assert (load(out / f"labelsTs/{folder.name}_t2.nii.gz") == (tumour("2020") > 0)).all()
    text = capsys.readouterr().out
    assert f"{folder.name}_t2: W39_1998.09.19_Segm.nii: misnamed, taken as the segmentation of {folder.name}" in text
    shutil.copy(misnamed, file(folder, "seg", ".nii"))
    assert "is this case's seg too" in refused(vendor, d="506")
    file(folder, "seg", ".nii").unlink()
    misnamed.rename(case_folder(vendor, "2020", 354) / misnamed.name)
    assert "W39_1998.09.19_Segm.nii: unexpected file" in refused(vendor, d="506")


def test_test_ids(tree, refused, capsys):
    out = convert(tree, "-test_ids", "BraTS20_Training_002", "BraTS20_Training_003")
    assert names(out / "imagesTs") == ["BraTS20_Training_002_t2", "BraTS20_Training_003_t2"]
    everyone = [f"BraTS20_Training_{i:03d}" for i in range(1, 9)]
    assert "8 patients, 2 of them for testing" in capsys.readouterr().out
    text = refused(tree, "-test_ids", *everyone[:5], d="506")
    assert "3 patients (brats20_training_006, " in text and "expected at least one in each" in text


# --- regions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", ["2020", "2024"])
def test_regions_are_nnunets(raw, tmp_path, year, capsys):
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    vendor = make_tree(tmp_path / "vendor", year, 5, kinds=("t2", "flair", "seg"))
    out = convert(vendor, "-structures", "regions")
    assert "the trainers of this package refuse them" in capsys.readouterr().out
    content = read(out / "dataset.json")
    manager = LabelManager(content["labels"], content["regions_class_order"])
    assert manager.has_regions and manager.all_labels == [0, 1, 2, 3]
    label = load(next((out / "labelsTr").iterdir()))
    vendor_label, enhancing = tumour(year), 3 if year == "2024" else 4
    regions = dict(zip(list(content["labels"])[1:], manager.all_regions, strict=True))
    inside = {name: np.isin(label, region) for name, region in regions.items()}
    assert (inside["whole tumour"] == np.isin(vendor_label, (1, 2, enhancing))).all()
    assert (inside["tumour core"] == np.isin(vendor_label, (1, enhancing))).all()
    assert (inside["enhancing tumour"] == (vendor_label == enhancing)).all()
    # nnU-Net paints the regions' masks one over the other in regions_class_order: the labels must come back
    painted = np.zeros_like(label)
    for value, mask in zip(content["regions_class_order"], inside.values(), strict=True):
        painted[mask] = value
    assert (painted == label).all()
    bound = convert(vendor, "-structures", "regions", "--upper_bound", d="525")
    assert "refuse them" not in capsys.readouterr().out
    assert read(bound / "dataset.json")["labels"] == content["labels"]


@pytest.mark.slow
def test_stock_planning_takes_the_regions(tree):
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    out = convert(tree, "-structures", "regions", "--upper_bound")
    extractor = DatasetFingerprintExtractor(505, num_processes=1)
    extractor.num_foreground_voxels_for_intensitystats = 1000  # its 10^8 take long
    extractor.run()
    plans, identifier = plan_experiment_dataset(505)
    manager = PlansManager(plans).get_label_manager(read(out / "dataset.json"))
    assert identifier == "nnUNetPlans" and manager.has_regions and manager.num_segmentation_heads == 3


# --- intensities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "intensities", "channel"),
    [
        ((), None, "intensity"),
        (("-protocol", "uuds"), Intensities((5, 95), (-1, 1)), "noNorm"),
        (("-clip", "1", "99"), Intensities((1, 99)), "intensity"),
        (("-clip", "2", "98", "-range", "0", "1"), Intensities((2, 98), (0, 1)), "noNorm"),
    ],
)
def test_intensities_of_both_domains(tree, options, intensities, channel):
    out = convert(tree, *options)
    bound = convert(tree, *options, "--upper_bound", d="525")
    for folder in (out, bound):
        content = read(folder / "dataset.json")
        assert content["channel_names"] == {"0": channel}
        domains = ("source", "target") if folder == out else ("target",)
        assert set(content.get("uda", {}).get("intensities", {})) == set(domains if intensities else ())
        assert all(read_intensities(content, "dataset.json", domain) == intensities for domain in domains)
    converted = sorted(out.glob("images*/*"))
    assert len(converted) == 8
    for path in converted:
        name, kind = path.name.removesuffix("_0000.nii.gz").rsplit("_", 1)
        vendor = sitk.ReadImage(str(file(tree / "MICCAI_BraTS2020_TrainingData" / name, kind)))
        expected = vendor if intensities is None else intensities.apply(vendor, path)
        assert (load(path) == sitk.GetArrayFromImage(expected)).all()


def test_intensity_options_that_contradict(tree, refused, capsys):
    for options, message in (
        (("-protocol", "uuds", "-clip", "5", "95"), "-protocol uuds clips at 5 95"),
        (("-range", "-1", "1"), "-range scales what -clip leaves"),
        (("-clip", "95", "5"), "percentiles 95 5: expected 0 <= low < high <= 100"),
        (("-clip", "5", "95", "-range", "1", "1"), "range 1 1: expected two numbers"),
    ):
        assert message in refused(tree, *options)
    convert(tree, "-protocol", "uuds", "-channel", "T2")
    assert "WARNING: -channel T2: nnU-Net normalises the scaled intensities again" in capsys.readouterr().out


# --- what is refused --------------------------------------------------------------------------------------------------


def every(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """``change`` of all labels."""
    return lambda cases: [change(file(cases / f"BraTS20_Training_{i:03d}", "seg")) for i in range(1, 9)]


def relabelled(array: np.ndarray, **options) -> Callable[[Path], None]:
    return every(lambda path: save(array, path, **options))


def both(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """``change`` of both scans of one case."""
    return lambda cases: [change(file(cases / "BraTS20_Training_004", kind)) for kind in ("t2", "flair")]


def renamed(kind: str, name: str) -> Callable[[Path], object]:
    return lambda cases: (path := file(cases / "BraTS20_Training_004", kind)).rename(path.with_name(name))


def added(name: str) -> Callable[[Path], None]:
    return lambda cases: save(brain(1), cases / name)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def unpacked_and_cut(path: Path) -> None:
    path.unlink()
    save(brain(4), path.with_suffix(""))
    cut(path.with_suffix(""))


def with_nan() -> np.ndarray:
    array = brain(4).astype(np.float32)
    array[1, 5, 5] = np.nan
    return array


def four_dimensions(path: Path) -> None:
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(brain(i)) for i in range(2)]), str(path))


truncated_image = both(cut)
empty_image = both(lambda path: save(np.zeros(SHAPE, np.int16), path))
nan_image = both(lambda path: save(with_nan(), path))
MALFORMED = {
    "validation case": (
        added("BraTS20_Validation_001/BraTS20_Validation_001_t2.nii.gz"),
        "BraTS20_Validation_001_t2.nii.gz: its folder is not named as a case",
    ),
    "case twice": (
        lambda c: shutil.copytree(c / "BraTS20_Training_004", c / "LGG" / "BraTS20_Training_004"),
        "BraTS20_Training_004: the same case as",
    ),
    "both endings": (
        added("BraTS20_Training_004/BraTS20_Training_004_t2.nii"),
        "BraTS20_Training_004_t2.nii.gz: BraTS20_Training_004_t2.nii is this case's t2 too",
    ),
    "another's label": (
        renamed("seg", "BraTS20_Training_005_seg.nii.gz"),
        "BraTS20_Training_004/BraTS20_Training_005_seg.nii.gz: unexpected file",
    ),
    "another grid": (
        relabelled(tumour("2020"), spacing=(1.0, 1.0, 1.2)), "_seg.nii.gz: its geometry differs from that of"
    ),
    "flipped label": (relabelled(tumour("2020"), direction=RAS), "_seg.nii.gz: its geometry differs from that of"),
    "label of 2023": (
        relabelled(tumour("2023")), "_seg.nii.gz: the label holds the values 3, which are not in the map; expected only"
    ),
    "no labels": (every(Path.unlink), "_flair.nii.gz: there is no label for this FLAIR case"),
    "truncated image": (truncated_image, "BraTS20_Training_004_"),
    "truncated .nii": (both(unpacked_and_cut), ".nii: the file is truncated"),
    "corrupt label": (every(lambda path: path.write_bytes(b"no image")), "_seg.nii.gz: cannot be read"),
    "empty image": (empty_image, ".nii.gz: every voxel is 0"),
    "NaN": (nan_image, ".nii.gz: 1 of 540 voxels are NaN"),
    "fractional label": (
        relabelled(tumour("2020") * np.float32(0.7)), "_seg.nii.gz: the label holds non-integer values"
    ),
    "four dimensions": (both(four_dimensions), ".nii.gz: the image has 4 dimensions"),
    "two years": (
        lambda c: make_case(c / "BraTS2021_00001", "2021", 1),
        "BraTS2021_00001 as BraTS 2021; expected one year's training set",
    ),
    "meningioma": (
        added("BraTS-MEN-00004-000/BraTS-MEN-00004-000-t2w.nii.gz"),
        "BraTS-MEN-00004-000-t2w.nii.gz: its folder is not named as a case",
    ),
    "loose file": (
        added("BraTS20_Training_004_t2.nii.gz"), "BraTS20_Training_004_t2.nii.gz: its folder is not named as a case"
    ),
    "misspelt file": (
        renamed("t2", "BraTS20_Training_004_t2 (1).nii.gz"), "BraTS20_Training_004_t2 (1).nii.gz: unexpected file"
    ),
    "emptied": (
        lambda c: (shutil.rmtree(c), c.mkdir()), "vendor holds no BraTS case (found: MICCAI_BraTS2020_TrainingData)"
    ),
    "few patients": (
        lambda c: [shutil.rmtree(c / f"BraTS20_Training_{i:03d}") for i in range(5, 9)],
        "4 patients (brats20_training_001, ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_trees_are_refused(tree, case, refused):
    spoil, message = MALFORMED[case]
    spoil(tree / "MICCAI_BraTS2020_TrainingData")
    assert message in refused(tree)


@pytest.mark.parametrize("spoil", [empty_image, nan_image, truncated_image])
def test_bad_images_are_refused_when_clipping_too(tree, spoil, refused):
    spoil(tree / "MICCAI_BraTS2020_TrainingData")
    assert "BraTS20_Training_004_" in refused(tree, "-protocol", "uuds")


def test_value_4_in_2023_is_unknown(raw, tmp_path, refused):
    vendor = make_tree(tmp_path / "vendor", "2023", 5, kinds=("t2", "flair"))
    for i in range(1, 6):
        save(tumour("2020"), file(case_folder(vendor, "2023", i), "seg"))
    text = refused(vendor)
    assert "-seg.nii.gz: the label holds the values 4" in text and "3 (enhancing tumour)" in text
    assert "labels of BraTS 2023" in text


def test_missing_modality_is_skipped_or_refused(tree, refused, capsys):
    folder = tree / "MICCAI_BraTS2020_TrainingData" / "BraTS20_Training_004"
    file(folder, "t2").unlink()
    fact = f"{folder}: there is no BraTS20_Training_004_t2.nii[.gz]"
    assert f"{fact}. Complete the input" in refused(tree, "--strict")
    out = convert(tree)
    assert f"WARNING: {fact}: this case is left out" in capsys.readouterr().out
    assert len(list(out.glob("images*/*"))) == 7 and not list(out.glob("images*/*004*"))
    shutil.rmtree(folder)
    folder.mkdir()
    assert "_flair.nii[.gz] and BraTS20_Training_004_t2.nii[.gz]" in refused(tree, "--strict", d="506")


def test_missing_test_label_is_warned_of_or_refused(tree, refused, capsys):
    file(tree / "MICCAI_BraTS2020_TrainingData" / "BraTS20_Training_004", "seg").unlink()
    options = ("-test_ids", "BraTS20_Training_004")
    assert "have no label (BraTS20_Training_004_t2)" in refused(tree, *options, "--strict")
    assert not (convert(tree, *options) / "labelsTs").exists()
    assert "cannot be evaluated" in capsys.readouterr().out


def test_other_requests_that_are_refused(tree, refused):
    assert "-source and -target are both t2" in refused(tree, source="t2")
    assert "-test_ids names BraTS20_Training_099, which is not there" in refused(
        tree, "-test_ids", "BraTS20_Training_099"
    )
    assert "no such folder" in refused(tree / "absent")
    convert(tree)
    assert "this dataset exists already. Use --overwrite" in refused(tree)
    assert "dataset id 505 is already taken" in refused(tree, source="t2", target="flair")
    convert(tree, "--overwrite")


# --- the command ------------------------------------------------------------------------------------------------------
