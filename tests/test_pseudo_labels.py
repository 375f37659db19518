"""Whole-volume pseudo labels: cleaning, plausibility, and the dataset made of them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import litter, make_raw_dataset, write_volume
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_uda.commands.pseudo_labels import main
from nnunet_uda.data import convention
from nnunet_uda.data.pseudo_labels import implausible_structures, keep_components, structure_volumes
from nnunet_uda.errors import UDAError


def test_small_components_become_background():
    label = np.zeros((3, 8, 8), np.uint8)
    label[:, :2, :2], label[0, 5, 5], label[1, 6:, 6:] = 1, 1, 1  # 12, 1 and 4 voxels
    label[2, 0, 7] = 2
    kept = {share: keep_components(label, 2, share) for share in (0.0, 0.1, 0.5, 1.0)}
    assert [int((kept[share] == 1).sum()) for share in kept] == [17, 16, 12, 12]
    assert all((array == 2).sum() == 1 for array in kept.values())
    assert (label == 1).sum() == 17
    diagonal = np.zeros((1, 4, 4), np.uint8)
    diagonal[0, 0, 0], diagonal[0, 1, 1:3] = 1, 1
    assert keep_components(diagonal, 1, 1.0).sum() == 2  # a corner connects nothing
    assert not keep_components(np.zeros((2, 2, 2), np.uint8), 3, 0.1).any()


def test_volumes_are_in_cubic_mm():
    label = np.zeros((2, 3, 4), np.uint8)
    label[0], label[1, 0, 0] = 1, 3
    assert structure_volumes(label, 3, (2.0, 0.5, 4.0)).tolist() == [48.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("volumes", "expected"),
    [
        ([10, 5], []), ([5, 5], []), ([4.9, 5], [1]), ([40, 5], []), ([41, 5], [1]),
        ([0, 5], [1]), ([10, 0], []), ([10, 11], [2]), ([0, 100], [1, 2]),
    ],
)  # fmt: skip
def test_plausible_is_what_the_source_holds_within_a_factor(volumes, expected):
    known = np.array([[10.0, 5.0], [20.0, 0.0]])
    assert implausible_structures(np.array(volumes, float), known, 2.0) == expected


def test_a_structure_that_no_source_case_has_is_implausible():
    assert implausible_structures(np.array([3.0]), np.zeros((2, 1)), 2.0) == [1]
    assert implausible_structures(np.array([0.0]), np.zeros((2, 1)), 2.0) == []


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A raw dataset, and predictions of its target that are a source case's label."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    raw = make_raw_dataset(tmp_path / "raw")
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "labelsTr" / "mr_Tr00.nii.gz")))
    for index in range(4):
        write_volume(tmp_path / "predictions" / f"ct_Tu{index:02d}.nii.gz", label)
    return raw


def arguments(dataset: Path, *options: str, name: str = "Dataset601_Second") -> list[str]:
    return ["-d", "501", "-i", str(dataset.parent.parent / "predictions"), "-o", name, *options]


def run(dataset: Path, *options: str, name: str = "Dataset601_Second") -> Path:
    main(arguments(dataset, *options, name=name))
    return dataset.parent / name


def change(dataset: Path, case: str, function) -> np.ndarray:
    path = dataset.parent.parent / "predictions" / f"{case}.nii.gz"
    array = function(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    write_volume(path, array)
    return array


def add_speck(label: np.ndarray) -> np.ndarray:
    label[0, 0, 0] = 2
    return label


def test_what_is_done_to_scans_stays(dataset):
    content = json.loads((dataset / "dataset.json").read_text())
    content["uda"] |= {"intensities": {"source": None, "target": {"window": [-900, 250]}}, "slices": {"order": "file"}}
    (dataset / "dataset.json").write_text(json.dumps(content))
    made = json.loads((run(dataset) / "dataset.json").read_text())["uda"]
    assert made == {key: content["uda"][key] for key in ("intensities", "slices")}


def test_the_dataset_is_source_and_filtered_predictions(dataset, capsys):
    shutil.rmtree(dataset / "labelsTs")  # no target label is needed
    change(dataset, "ct_Tu01", lambda label: np.where(label == 1, 0, label))
    speckled = change(dataset, "ct_Tu02", add_speck)
    litter(dataset)
    litter(dataset.parent.parent / "predictions")
    out = run(dataset)
    source, pseudo = [f"mr_Tr{i:02d}" for i in range(5)], [f"pseudo_ct_Tu{i:02d}" for i in (0, 2, 3)]
    assert sorted(path.name for path in (out / "labelsTr").iterdir()) == [f"{i}.nii.gz" for i in source + pseudo]
    assert sorted(path.name for path in (out / "imagesTr").iterdir()) == [f"{i}_0000.nii.gz" for i in source + pseudo]
    content = json.loads((out / "dataset.json").read_text())
    assert content["numTraining"] == 8 and content["pseudo_labelled"] == pseudo and "uda" not in content
    cleaned = sitk.ReadImage(str(out / "labelsTr" / "pseudo_ct_Tu02.nii.gz"))
    expected = speckled.copy()
    expected[0, 0, 0] = 0
    assert np.array_equal(sitk.GetArrayFromImage(cleaned), expected)
    image = sitk.ReadImage(str(out / "imagesTr" / "pseudo_ct_Tu02_0000.nii.gz"))
    assert cleaned.GetSpacing() == image.GetSpacing() and cleaned.GetDirection() == image.GetDirection()
    printed = capsys.readouterr().out
    assert "ct_Tu01: left out, left has 0.0 ml (source" in printed and "3 of 4 target case(s)" in printed
    assert "Next: nnUNetv2_plan_and_preprocess -d 601 -c 2d" in printed


def test_pseudo_labels_are_trained_on_in_every_fold_and_never_tested(dataset):
    out = run(dataset)
    splits = json.loads((out / "splits_final.json").read_text())
    pseudo = {f"pseudo_ct_Tu{i:02d}" for i in range(4)}
    assert len(splits) == 5
    for split in splits:
        assert pseudo <= set(split["train"]) and not set(split["train"]) & set(split["val"])
    assert sorted(i for split in splits for i in split["val"]) == [f"mr_Tr{i:02d}" for i in range(5)]


def test_folds_of_the_raw_dataset_are_kept(dataset):
    fold = {"train": ["mr_Tr00", "mr_Tr01"], "val": ["mr_Tr02"]}
    (dataset / "splits_final.json").write_text(json.dumps([fold]))
    (split,) = json.loads((run(dataset) / "splits_final.json").read_text())
    assert split["val"] == ["mr_Tr02"] and split["train"][:2] == fold["train"] and len(split["train"]) == 6


def everything_wrong(dataset: Path) -> None:
    for index in range(4):
        change(dataset, f"ct_Tu{index:02d}", np.zeros_like)


def half_a_source_label(dataset: Path) -> None:
    path = dataset / "labelsTr" / "mr_Tr00.nii.gz"
    write_volume(path, sitk.GetArrayFromImage(sitk.ReadImage(str(path))) * 0.5)


@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        (lambda d: (d.parent.parent / "predictions" / "ct_Tu03.nii.gz").unlink(), (), "ct_Tu03.nii.gz does not exist"),
        (
            lambda d: change(d, "ct_Tu00", lambda x: x + 3),
            (),
            r"ct_Tu00\.nii\.gz: the label holds the values 3, 4, 5, .* expected only 0, 1 \(left\), 2 \(right\)",
        ),
        (lambda d: change(d, "ct_Tu00", lambda x: x * 0.5), (), "non-integer values .e.g. 0.5"),
        (lambda d: change(d, "ct_Tu00", lambda x: np.where(x == 2, np.nan, x)), (), "voxels are NaN or infinite"),
        (lambda d: change(d, "ct_Tu00", lambda x: np.where(x == 2, -1, x).astype(np.int8)), (), "holds the values -1,"),
        (lambda d: change(d, "ct_Tu00", lambda x: np.where(x == 2, 2e9, x).astype(np.int32)), (), "values 2000000000,"),
        (half_a_source_label, (), r"mr_Tr00\.nii\.gz: the label holds non-integer values"),
        (lambda d: change(d, "ct_Tu00", lambda x: x[1:]), (), "ct_Tu00"),
        (everything_wrong, (), "no prediction in .* is plausible"),
        (lambda d: (d.parent / "Dataset601_Other").mkdir(), (), "Dataset601_Other exists"),
        (lambda d: None, ("-pred", "nowhere"), r"nowhere \(-pred\) is no folder"),
        (lambda d: None, ("-volume_factor", "0.5"), "-volume_factor must be at least 1"),
        (lambda d: None, ("-component_share", "2"), "-component_share must be between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(dataset, refused, prepare, options, words):
    prepare(dataset)
    before = sorted(path.name for path in dataset.parent.iterdir())
    assert re.search(words, refused(main, arguments(dataset, *options)))
    assert sorted(path.name for path in dataset.parent.iterdir()) == before


def test_a_bad_name_is_refused(dataset, refused):
    assert "DatasetXXX_NAME" in refused(main, arguments(dataset, name="../Dataset601_Second"))


# -- a list of files in dataset.json ---------------------------------------------------------------------------------


def listed(raw: Path, cases: dict) -> None:
    """Write nnU-Net's key ``dataset``, its list of labelled cases."""
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(content | {"dataset": cases}))


def files_of(case: str, folder: str = "") -> dict:
    return {"images": [f"{folder}imagesTr/{case}_0000.nii.gz"], "label": f"{folder}labelsTr/{case}.nii.gz"}


def test_pseudo_labelled_cases_are_seen_beside_a_list_of_files(dataset, tmp_path, monkeypatch):
    """One listed case lies elsewhere, behind a variable and under another name; one in imagesTr is not listed."""
    monkeypatch.setenv("ELSEWHERE", str(tmp_path / "elsewhere"))
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / "elsewhere" / kind).mkdir(parents=True)
    shutil.move(dataset / "imagesTr/mr_Tr01_0000.nii.gz", tmp_path / "elsewhere/imagesTr/scan_0000.nii.gz")
    shutil.move(dataset / "labelsTr/mr_Tr01.nii.gz", tmp_path / "elsewhere/labelsTr/scan.nii.gz")
    listed(dataset, {"mr_Tr00": files_of("mr_Tr00"), "mr_Tr01": files_of("scan", "$ELSEWHERE/")})
    main(["-d", "501", "-i", str(tmp_path / "predictions"), "-o", "Dataset502_Second"])
    new = tmp_path / "raw" / "Dataset502_Second"
    seen = get_filenames_of_train_images_and_targets(str(new))
    assert sorted(seen) == ["mr_Tr00", "mr_Tr01", *(f"pseudo_ct_Tu{i:02d}" for i in range(4))]
    assert all(Path(path).is_file() for case in seen.values() for path in (*case["images"], case["label"]))
    assert Path(seen["mr_Tr01"]["images"][0]).resolve().name == "scan_0000.nii.gz"
    content = json.loads((new / "dataset.json").read_text())
    assert content["numTraining"] == 6 and "dataset" not in content
    known = {case for split in json.loads((new / "splits_final.json").read_text()) for case in split["val"]}
    assert known == {"mr_Tr00", "mr_Tr01"}


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        ([], "'dataset' must be like"),
        ({}, "'dataset' must be like"),
        ({"a": []}, "'dataset' must be like"),
        ({"a": {"images": "a", "label": "b"}}, "'dataset' must be like"),
        ({"a": {"images": [3], "label": "b"}}, "'dataset' must be like"),
        ({"../a": files_of("mr_Tr00")}, "cannot be a name"),
        ({"a": files_of("absent")}, "absent_0000.nii.gz does not exist"),
        ({"a": {"images": ["imagesTr/mr_Tr00_0000.nii.gz"], "label": "dataset.json"}}, "expected a file that ends in"),
        ({"ct_Tu00": files_of("mr_Tr00")}, "must not see a target label"),
        ({"a": {"images": ["imagesTu/ct_Tu00_0000.nii.gz"], "label": "labelsTr/mr_Tr00.nii.gz"}}, "lies in imagesTu"),
    ],
)
def test_a_list_of_files_that_is_none_or_shows_target_labels_is_refused(dataset, refused, cases, words):
    listed(dataset, cases)
    assert words in refused(main, arguments(dataset))
    assert not (dataset.parent / "Dataset601_Second").exists()


def test_training_sees_no_target_label_by_a_list_of_files(dataset):
    listed(dataset, {"a": {"images": ["imagesTu/ct_Tu00_0000.nii.gz"], "label": "labelsTs/ct_Tu00.nii.gz"}})
    content = convention.read_json(dataset / "dataset.json")
    convention.check_dataset_json(content, "dataset.json")
    with pytest.raises(UDAError, match="lists a with a label for training, but .* lies in imagesTu"):
        convention.target_cases(dataset, content)


# -- predictions of a general model ----------------------------------------------------------------------------------


def as_general(dataset: Path, write) -> None:
    """Each prediction in another layout: ``write(folder, case, label)``."""
    folder = dataset.parent.parent / "predictions"
    for path in list(folder.glob("*.nii.gz")):
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        path.unlink()
        write(folder, path.name.removesuffix(".nii.gz"), label)


def one_file_a_structure(folder: Path, case: str, label: np.ndarray) -> None:
    half = np.zeros(label.shape, bool)
    half[:, : label.shape[1] // 2] = True
    masks = {"upper_left": (label == 1) & half, "lower_left": (label == 1) & ~half, "right": label == 2,
             "spleen": label == 0}  # fmt: skip
    for name, mask in masks.items():
        write_volume(folder / case / f"{name}.nii.gz", mask.astype(np.uint8))
    (folder / case / "statistics.json").write_text("{}")


def labels_of(dataset: Path) -> dict[str, np.ndarray]:
    return {
        path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for path in sorted(dataset.glob("labelsTr/pseudo_*"))
    }


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return len(first) == 4 and first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def test_one_file_of_other_values_becomes_the_datasets_classes(dataset):
    expected = labels_of(run(dataset))

    def other_values(folder: Path, case: str, label: np.ndarray) -> None:
        values = np.array([0, 5, 300])[label].astype(np.int16)
        values[0, 0, 0] = 77  # a structure that the dataset lacks
        write_volume(folder / f"{case}_0000.nii.gz", values)

    as_general(dataset, other_values)
    assert same(labels_of(run(dataset, "-labels", "left=5", "right=300,301", name="Dataset602_General")), expected)


def test_one_file_a_structure_is_joined(dataset, capsys):
    expected = labels_of(run(dataset))
    as_general(dataset, one_file_a_structure)
    words = ("-labels", "left=upper_left,lower_left", "right=right")
    out = run(dataset, *words, name="Dataset602_General")
    assert same(labels_of(out), expected)
    report = json.loads((out / "pseudo_labels.json").read_text())
    assert report["ct_Tu00"]["left_out"] == "" and report["ct_Tu00"]["volumes_ml"]["left"] > 0
    folder = dataset.parent.parent / "predictions" / "ct_Tu00"
    right = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "right.nii.gz")))
    left = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "upper_left.nii.gz")))
    write_volume(folder / "right.nii.gz", right | left)
    capsys.readouterr()
    again = run(dataset, *words, name="Dataset603_Overlap")
    assert same(labels_of(again), expected)
    assert f"{int(left.sum())} voxel(s) lie in two structures: given to the first" in capsys.readouterr().out


def test_files_called_as_the_structures_need_no_map(dataset):
    expected = labels_of(run(dataset))

    def by_name(folder: Path, case: str, label: np.ndarray) -> None:
        for value, name in ((1, "left"), (2, "right")):
            write_volume(folder / case / f"{name}.nii.gz", (label == value).astype(np.uint8))

    as_general(dataset, by_name)
    assert same(labels_of(run(dataset, name="Dataset602_General")), expected)


def test_a_scan_that_was_labelled_by_hand_keeps_its_label(dataset):
    content = json.loads((dataset / "dataset.json").read_text())
    content["uda"]["labelled_target"] = ["ct_Tu01"]
    (dataset / "dataset.json").write_text(json.dumps(content))
    own = np.zeros((10, 36, 36), np.uint8)
    own[2:4, 3:6, 3:6] = 2  # no plausible volume
    write_volume(dataset / "labelsTu" / "ct_Tu01.nii.gz", own)
    (dataset.parent.parent / "predictions" / "ct_Tu01.nii.gz").unlink()
    assert np.array_equal(labels_of(run(dataset))["pseudo_ct_Tu01.nii.gz"], own)


def an_extra(dataset: Path) -> None:
    folder = dataset.parent.parent / "predictions"
    shutil.copyfile(folder / "ct_Tu00.nii.gz", folder / "ct_Ts00.nii.gz")


def as_folders(dataset: Path) -> None:
    as_general(dataset, one_file_a_structure)


def a_probability(dataset: Path) -> None:
    as_folders(dataset)
    path = dataset.parent.parent / "predictions" / "ct_Tu00" / "right.nii.gz"
    write_volume(path, np.linspace(0, 1, 10 * 36 * 36, dtype=np.float32).reshape(10, 36, 36))


@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        (an_extra, (), r"ct_Ts00.nii.gz: ct_Ts00 is no case of imagesTu"),
        (lambda d: None, ("left=5", "right=3", "liver=6"), "the dataset has no structure 'liver'"),
        (lambda d: None, ("left=5",), "-labels names nothing for right"),
        (lambda d: None, ("left=5", "right=5"), "5 is already left"),
        (lambda d: None, ("left=5", "right=right"), "values for all structures, or names of files for all"),
        (lambda d: None, ("left=0", "right=1"), "0 is already the background"),
        (lambda d: None, ("left", "right=1"), "expected structure=value or =file"),
        (lambda d: None, ("left=left", "right=right"), "one file of all structures; expected values"),
        (as_folders, ("left=1", "right=2"), "one file a structure .*expected names of files"),
        (as_folders, ("left=left", "right=right"), "ct_Tu00 has no file left.nii.gz for the structure left"),
        (as_folders, (), "has no file left.nii.gz"),
        (
            a_probability,
            ("left=upper_left,lower_left", "right=right"),
            "right.nii.gz holds the values .*expected a mask",
        ),
    ],
)
def test_maps_and_layouts_that_do_not_fit_are_refused(dataset, refused, prepare, options, words):
    prepare(dataset)
    labels = ("-labels", *options) if options else ()
    assert re.search(words, refused(main, arguments(dataset, *labels)))


def quality_report(path: Path, dices: dict[str, float | None]) -> str:
    cases = [{"case": case, "overall": {"dice": dice}, "structures": {}} for case, dice in dices.items()]
    path.write_text(json.dumps({"cases": cases}))
    return str(path)


def test_cases_of_low_estimated_quality_are_left_out(dataset, tmp_path, capsys):
    dices = {"ct_Tu00": 0.9, "ct_Tu01": 0.59, "ct_Tu02": None, "ct_Tu03": 0.6}
    report = quality_report(tmp_path / "quality_report.json", dices)
    made = run(dataset, "-q", report)
    kept = json.loads((made / "dataset.json").read_text())["pseudo_labelled"]
    assert kept == ["pseudo_ct_Tu00", "pseudo_ct_Tu03"]
    assert "ct_Tu01: left out, its estimated Dice is 0.59, below 0.6" in capsys.readouterr().out
    made = run(dataset, "-q", report, "-least_dice", "0.5", name="Dataset602_Third")
    assert len(json.loads((made / "dataset.json").read_text())["pseudo_labelled"]) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [({"cases": [{"case": "ct_Tu00"}]}, "is no report of nnUNetUDA_quality"), (None, "has no case ct_Tu01")],
)
def test_another_quality_report_is_refused(content, message, dataset, tmp_path, refused):
    report = quality_report(tmp_path / "quality_report.json", {"ct_Tu00": 0.9})
    if content is not None:
        Path(report).write_text(json.dumps(content))
    assert message in refused(main, arguments(dataset, "-q", report))
    assert not (dataset.parent / "Dataset601_Second").exists()
