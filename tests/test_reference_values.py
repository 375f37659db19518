"""References that hold the values of the files that were converted: recognised, mapped or refused; exchanged values."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import LPS, litter, two_geometries, write_volume

from nnunet_uda.commands import convert, evaluate
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation import metrics
from nnunet_uda.evaluation.reference_values import named_values, recorded_values
from nnunet_uda.evaluation.runs import Labels
from nnunet_uda.evaluation.tables import MEAN
from nnunet_uda.images.nifti import choose_geometry, chosen_geometry

LABELS = Labels({"liver": 1, "spleen": 2}, None, ".nii.gz")
SHAPE = (6, 20, 24)


save = partial(write_volume, spacing=(1.0, 1.5, 3.0), direction=LPS)


def organs(liver: int, spleen: int, shift: int = 0, equal: bool = False) -> np.ndarray:
    """A liver, much larger than the spleen or of the same volume."""
    array = np.zeros(SHAPE, np.int16)
    array[1:5, 3 : 7 if equal else 15, 2 + shift : 12 + shift] = liver
    array[1:5, 3:7, (13 if equal else 17) + shift : 19 + shift + 4 * equal] = spleen
    return array[..., :24]


class Work:
    """Files of a user, a dataset that was converted from them, and perfect predictions in the dataset's classes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def convert(self, liver: int, spleen: int, *options: str, equal: bool = False) -> Path:
        rng = np.random.default_rng(0)
        for i in range(2):
            save(self.root / "ct" / f"a{i}.nii.gz", rng.normal(0, 9, SHAPE).astype(np.float32))
            save(self.root / "mr" / f"b{i}.nii.gz", rng.normal(0, 9, SHAPE).astype(np.float32))
            save(self.root / "ctl" / f"a{i}.nii.gz", organs(liver, spleen, 0, equal))
            save(self.root / "mrl" / f"b{i}.nii.gz", organs(liver, spleen, i, equal))
            for folder in ("mapped", "predictions"):
                save(self.root / folder / f"b{i}.nii.gz", organs(1, 2, i, equal))
        labels = () if "-labels" in options else ("-labels", f"liver={liver}", f"spleen={spleen}")
        convert.main(["folders", "-d", "700", "-name", "X", "-source", "CT", "-target", "MR", "-np", "1", "--overwrite",
                      "-source_images", f"{self.root}/ct", "-source_labels", f"{self.root}/ctl", "-target_images",
                      f"{self.root}/mr", *labels, *options])  # fmt: skip
        return self.root / "raw" / "Dataset700_X"

    def words(self, reference: str | None, *options: str) -> list[str]:
        references = [] if reference is None else ["-r", str(self.root / reference)]
        return ["-d", "700", "-p", f"ours={self.root / 'predictions'}", *references, "-o", str(self.root / "out"),
                "-np", "1", "--no_overlays", *options]  # fmt: skip

    def evaluate(self, reference: str | None, *options: str) -> dict:
        evaluate.main(self.words(reference, *options))
        return json.loads((self.root / "out" / "evaluation.json").read_text())

    def refused(self, capsys, reference: str, *options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(self.words(reference, *options))
        assert stopped.value.code == 1 and not (self.root / "out").exists()
        return capsys.readouterr().err


@pytest.fixture
def work(tmp_path, monkeypatch) -> Work:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    return Work(tmp_path)


def dice(result: dict) -> float:
    return result["summary"]["ours"][MEAN]["Dice"]["mean"]


# --- what conversion keeps -------------------------------------------------------------------------------------------


def test_the_mapping_is_kept(work):
    out = work.convert(5, 1, "-labels", "both=5,1", "--ignore_other_labels")
    uda = json.loads((out / "dataset.json").read_text())["uda"]
    assert uda["label_values"] == {"CT": {"both": [5, 1]}} and uda["other_label_values"] == "background"
    out = work.convert(5, 1, "-target_labels", f"{work.root}/mrl")
    uda = json.loads((out / "dataset.json").read_text())["uda"]
    assert uda["label_values"] == {name: {"liver": [5], "spleen": [1]} for name in ("CT", "MR")}
    assert "other_label_values" not in uda


def test_an_upper_bound_keeps_it_too(work):
    out = work.convert(2, 1, "--upper_bound", "-target_labels", f"{work.root}/mrl")
    content = json.loads((out / "dataset.json").read_text())
    assert "target_domain" not in content.get("uda", {}) and content["label_values"] == {
        "MR": {"liver": [2], "spleen": [1]}
    }
    assert dice(work.evaluate("mrl")) == 1


# --- what the references hold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("liver", "spleen"), [(2, 1), (5, 1), (205, 420), (-3, 7)])
def test_a_perfect_prediction_scores_one_against_the_users_own_files(work, capsys, liver, spleen):
    work.convert(liver, spleen)
    result = work.evaluate("mrl")
    assert dice(result) == 1
    [note] = result["notes"]
    assert f"liver {liver}" in note and f"spleen {spleen}" in note and "liver 1, spleen 2" in note
    assert note in capsys.readouterr().out
    assert note in (work.root / "out" / "evaluation.md").read_text()
    assert "liver 1, spleen 2" in (work.root / "out" / "evaluation.html").read_text()
    assert result["volumes"]["ours"][0]["metrics"]["liver"]["n_reference"] == (organs(1, 2) == 1).sum()


@pytest.mark.parametrize(("liver", "spleen"), [(2, 1), (5, 1), (205, 420)])
def test_files_with_the_datasets_classes_are_recognised(work, liver, spleen):
    work.convert(liver, spleen)
    result = work.evaluate("mapped")
    assert dice(result) == 1
    assert len(result["notes"]) == (liver == 2), "only what could be read in two ways is spoken of"


def test_several_values_of_one_structure_and_others_that_are_background(work):
    work.convert(5, 4, "-labels", "organ=4,5", "--ignore_other_labels")
    for i in range(2):
        save(work.root / "predictions" / f"b{i}.nii.gz", (organs(1, 1, i) > 0).astype(np.int16))
        own = organs(5, 4, i)
        own[0, 0, 0] = 77
        save(work.root / "mrl" / f"b{i}.nii.gz", own)
    assert dice(work.evaluate("mrl")) == 1


def test_a_mapping_that_changes_nothing_is_not_spoken_of(work):
    work.convert(1, 2)
    result = work.evaluate("mrl")
    assert dice(result) == 1 and result["notes"] == []


def test_one_clear_file_decides_for_those_that_fit_both(work):
    work.convert(5, 1)
    only = organs(0, 1, 1)  # spleen alone: 1 is the spleen's former value, and the liver's class
    save(work.root / "mrl" / "b1.nii.gz", only)
    save(work.root / "predictions" / "b1.nii.gz", 2 * only)
    assert dice(work.evaluate("mrl")) == 1
    save(work.root / "mapped" / "b1.nii.gz", 2 * only)
    save(work.root / "mapped" / "b0.nii.gz", organs(1, 2, 0))
    assert dice(work.evaluate("mapped")) == 1


def test_files_of_both_kinds(work, capsys):
    work.convert(5, 7)
    shutil.copy(work.root / "mapped" / "b0.nii.gz", work.root / "mrl" / "b0.nii.gz")
    result = work.evaluate("mrl")
    assert dice(result) == 1 and "1 of 2 references hold" in result["notes"][0]
    shutil.rmtree(work.root / "out")
    work.convert(5, 1)
    save(work.root / "mrl" / "b0.nii.gz", organs(1, 2, 0))
    save(work.root / "mrl" / "b2.nii.gz", organs(1, 0, 0))
    save(work.root / "predictions" / "b2.nii.gz", organs(1, 0, 0))
    text = work.refused(capsys, "mrl")
    assert all(f"b{i}.nii.gz" in text for i in range(3)) and "Evaluate files of one kind" in text


@pytest.mark.parametrize("own", [True, False])
def test_volumes_that_do_not_tell_leave_it_to_where_the_files_come_from(work, own):
    work.convert(2, 1, equal=True)
    result = work.evaluate("mrl" if own else "mapped")
    note = result["notes"][0]
    assert "most often those that were converted" in note and "If that is wrong: -labels liver=1 spleen=2;" in note
    assert dice(result) == (1 if own else 0)
    assert (len(result["notes"]) == 2) != own
    if not own:
        warning = result["notes"][1]
        assert "Run ours: liver, spleen have a Dice below 0.1" in warning
        assert "liver of the references is spleen of the predictions (Dice 1.00)" in warning
        again = work.evaluate("mapped", "-labels", "liver=1", "spleen=2")
        assert dice(again) == 1 and again["notes"] == ["The references are read as -labels says: liver 1, spleen 2."]


def test_the_datasets_own_files_tell(work):
    out = work.convert(2, 1, "-target_labels", f"{work.root}/mrl", equal=True)
    for folder in ("mrl", "mapped", "predictions"):
        for path in sorted((work.root / folder).iterdir()):
            path.rename(path.with_name(f"MR_{path.name}"))
    for reference, words in ((None, "the dataset's own folder"), ("mapped", "equal to the dataset's in labelsTs"),
                             ("mrl", "so read, MR_b0.nii.gz is equal")):  # fmt: skip
        result = work.evaluate(reference)
        assert dice(result) == 1 and words in result["notes"][0]
    shutil.copytree(out / "labelsTs", work.root / "copy")
    assert dice(work.evaluate("copy")) == 1


def test_values_that_fit_neither_are_refused(work, capsys):
    work.convert(5, 7)
    save(work.root / "mrl" / "b1.nii.gz", organs(5, 9))
    text = work.refused(capsys, "mrl")
    assert "mrl/b1.nii.gz holds the values 0, 5, 9" in text
    assert "liver 1, spleen 2" in text and "liver 5, spleen 7" in text and "-labels NAME=VALUE" in text
    save(work.root / "mrl" / "b1.nii.gz", organs(5, 7).astype(np.float32) / 2)
    assert "b1.nii.gz holds the non-integer label" in work.refused(capsys, "mrl")


def test_a_dataset_that_was_not_converted_here(work, capsys):
    out = work.convert(5, 7)
    content = json.loads((out / "dataset.json").read_text())
    del content["uda"]["label_values"]
    (out / "dataset.json").write_text(json.dumps(content))
    assert "nnUNetUDA_evaluate -labels NAME=VALUE" in work.refused(capsys, "mrl")
    for words, message in ((["liver=5"], "Of one alone: spleen"), (["liver=5", "spleen=7", "x=3"], "Of one alone: x"),
                           (["liver=5", "spleen=5"], "value 5 is already liver"), (["liver"], "expected name=value"),
                           (["liver=5", "spleen=8"], "holds the values 7")):  # fmt: skip
        assert message in work.refused(capsys, "mrl", "-labels", *words)
    assert dice(work.evaluate("mrl", "-labels", "spleen=7", "liver=5")) == 1


def test_references_with_two_geometries_are_refused_or_read_by_the_chosen_one(work, capsys, monkeypatch):
    work.convert(1, 2)
    for index in range(2):
        two_geometries(work.root / "mrl" / f"b{index}.nii.gz")
    assert "two geometries" in work.refused(capsys, "mrl")
    assert "differs from that of" in work.refused(capsys, "mrl", "-nifti_geometry", "sform"), "it lies elsewhere"
    assert dice(work.evaluate("mrl", "-nifti_geometry", "qform")) == 1

    def elsewhere(function, tasks, processes, set_up):
        """As in other processes, which know nothing of what this one has chosen."""
        here = chosen_geometry()
        choose_geometry(None)
        set_up()
        done = [function(task) for task in tasks]
        choose_geometry(here)
        return done

    monkeypatch.setattr(metrics, "PATIENCE", -1.0)
    monkeypatch.setattr(metrics, "as_done", elsewhere)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert dice(work.evaluate("mrl", "-nifti_geometry", "qform", "-np", "2")) == 1, "in worker processes too"


def test_a_mac_leaves_files_beside_the_labels_that_tell_volumes(work):
    raw = work.convert(2, 1)
    litter(raw / "labelsTr")
    work.evaluate("mrl")


def test_overlays_show_the_mapped_reference(work):
    work.convert(205, 420)
    result = work.root / "out" / "overlays"
    evaluate.main([*(word for word in work.words("mrl") if word != "--no_overlays"), "-i", str(scans(work))])
    pictures = [path.read_bytes() for path in sorted(result.iterdir())]
    evaluate.main([*(word for word in work.words("mapped") if word != "--no_overlays"), "-i", str(scans(work))])
    assert pictures and pictures == [path.read_bytes() for path in sorted(result.iterdir())]


def scans(work: Work) -> Path:
    for i in range(2):
        path = work.root / "scans" / f"b{i}_0000.nii.gz"
        if not path.exists():
            save(path, organs(40, 90, i).astype(np.float32))
    return work.root / "scans"


@pytest.mark.parametrize(
    "record",
    [[], {}, {"MR": []}, {"MR": {"kidney": [1]}}, {"MR": {"liver": 5, "spleen": [7]}}, {"MR": {"liver": ["5"]}},
     {"MR": {"liver": [True]}}, {"MR": {"liver": [10**9]}}],
)  # fmt: skip
def test_a_damaged_mapping_is_named(record):
    with pytest.raises(UDAError, match=r"my.json: 'label_values' must hold"):
        recorded_values({"uda": {"target_domain": "MR", "label_values": record}}, LABELS, "my.json")


def test_the_targets_mapping_is_taken():
    record = {"CT": {"liver": [6], "spleen": [1]}, "MR": {"liver": [60, 61], "spleen": [250], "background": [110]}}
    found = recorded_values({"uda": {"target_domain": "MR", "label_values": record}}, LABELS, "x")
    assert found.values == {60: 1, 61: 1, 250: 2, 110: 0} and not found.ignore_other
    found = recorded_values({"uda": {"target_domain": "US", "label_values": record}}, LABELS, "x")
    assert found.values == {6: 1, 1: 2}
    assert recorded_values({"uda": {"target_domain": "MR"}}, LABELS, "x") is None
    ignored = Labels({"liver": 1, "spleen": 2}, 3, ".nii.gz")
    assert named_values(["spleen=1", "liver=2"], ignored).values == {2: 1, 1: 2, 3: 3}
