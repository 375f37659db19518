"""``nnUNetUDA_export``: stock models of nnU-Net, equal voxel for voxel, and their cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import make_trainer, write_volume, written_model

from nnunet_uda.commands import export
from nnunet_uda.data.components import KEY
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation import stock_model
from nnunet_uda.evaluation.model_card import clipping_words, model_card
from nnunet_uda.evaluation.stock_model import check_plain, compare_segmentations
from nnunet_uda.images.intensities import Intensities
from nnunet_uda.training.checkpoint import read_checkpoint


def trained_folder(trainer_name: str) -> Path:
    """A model's folder with the weights of a training that was begun, as good as another for what is tested here."""
    trainer = make_trainer(trainer_name)
    trainer.initialize()
    return written_model(trainer)


def words(folder: Path, archive: Path) -> list[str]:
    return ["-m", str(folder), "-f", "0", "-o", str(archive), "-device", "cpu"]


@pytest.fixture
def unpredicted(monkeypatch) -> None:
    """The comparison before an export finds nothing, without a prediction: the slow test predicts."""
    for name in ("predict_folder", "predict_as_a_receiver", "postprocess_as_a_receiver"):
        monkeypatch.setattr(stock_model, name, lambda *_: None)
    monkeypatch.setattr(stock_model, "compare_segmentations", lambda *_: (2, 100, 0))


def test_an_exported_model_is_nnunets_own(in_workspace, unpredicted, tmp_path, capsys, refused):
    folder = trained_folder("CASTTrainer")
    plans = json.loads((folder / "plans.json").read_text(encoding="utf-8"))
    (folder / "plans.json").write_text(json.dumps(plans | {KEY: [[1, 2], [1]]}), encoding="utf-8")
    Path(folder, "fold_0", "quality.json").write_text(json.dumps({"about": {"calibrated_on": "3 cases"}}))
    archive = tmp_path / "out" / "Dataset501_Blobs.zip"
    export.main(words(folder, archive))
    assert "equal those of the trained model voxel for voxel" in capsys.readouterr().out
    place = "Dataset501_Blobs/nnUNetTrainer__tiny__2d"
    with zipfile.ZipFile(archive) as content:
        names = set(content.namelist())
        content.extractall(tmp_path / "receiver")
    files = ("plans.json", "dataset.json", "postprocessing.pkl", "MODEL_CARD.md", "fold_0/checkpoint_final.pth",
             "fold_0/quality.json")  # fmt: skip
    assert {f"{place}/{name}" for name in files} == names
    there = tmp_path / "receiver" / place
    checkpoint = torch.load(there / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer" and "uda" not in checkpoint
    exported = json.loads((there / "plans.json").read_text())
    assert "uda" not in exported and KEY not in exported
    assert "uda" not in json.loads((there / "dataset.json").read_text())
    card = archive.with_suffix(".md").read_text()
    assert card == (there / "MODEL_CARD.md").read_text()
    for said in ("| Labelled domain (source) | MR |", "Licence of the weights: ...", "sha256", "1 left, 2 right",
                 "nnUNetv2_apply_postprocessing -i"):  # fmt: skip
        assert said in card
    assert "exists" in refused(export.main, words(folder, archive))


def test_a_model_whose_folder_was_renamed_is_exported_and_files_beside_it_are_looked_at_first(
    in_workspace, tmp_path, monkeypatch, refused, unpredicted
):
    folder = trained_folder("SourceOnlyTrainer").rename(tmp_path / "renamed")
    monkeypatch.setattr(stock_model, "predict_folder", lambda *_: pytest.fail("predicted before all was looked at"))
    scans = in_workspace.raw / "Dataset501_Blobs" / "imagesTs"
    command = [*words(folder, tmp_path / "a.zip"), "-i", str(scans)]
    summary = folder / "fold_0" / "validation" / "summary.json"
    summary.parent.mkdir()
    summary.write_text('{"foreground_mean": ')
    assert f"{summary} is not valid JSON" in refused(export.main, command)
    for strange in ("[]", '{"foreground_mean": "x"}', '{"foreground_mean": {"Dice": "x"}}'):
        summary.write_text(strange)
        summary.with_name("about.json").write_text("{}")
        (folder / "fold_0" / "quality.json").write_text('{"about": "x"}')
        quality = {"cases": [{"case": "a", "overall": {}, "structures": {}}]}
        card = model_card(folder, folder, ["0"], "checkpoint_final.pth", "not compared", quality)
        assert "fold 0: Dice not defined on MR validation cases" in card and "| Configuration | 2d, spacing" in card
    monkeypatch.setattr(stock_model, "predict_folder", lambda *_: None)
    export.main(command)
    with zipfile.ZipFile(tmp_path / "a.zip") as content:
        assert "Dataset501_Blobs/nnUNetTrainer__tiny__2d/plans.json" in content.namelist()


def test_other_predictions_are_not_exported(in_workspace, unpredicted, tmp_path, monkeypatch, refused):
    folder = trained_folder("SourceOnlyTrainer")
    monkeypatch.setattr(stock_model, "compare_segmentations", lambda *_: (2, 100, 3))
    assert "predicts 3 of 100 voxels" in refused(export.main, words(folder, tmp_path / "a.zip"))
    assert not list(tmp_path.glob("a.*"))


def test_differing_voxels_are_counted(tmp_path):
    label = np.zeros((2, 4, 4), np.uint8)
    other = label.copy()
    other[0, 1, 1:3] = 1
    for name, array in (("a", label), ("b", other)):
        write_volume(tmp_path / name / "case.nii.gz", array)
    assert compare_segmentations(tmp_path / "a", tmp_path / "b", ".nii.gz") == (1, 32, 2)
    assert compare_segmentations(tmp_path / "a", tmp_path / "a", ".nii.gz") == (1, 32, 0)


def test_a_network_of_another_kind_is_refused_with_what_the_receiver_needs(in_workspace):
    folder = trained_folder("SimilarityPrototypesTrainer")
    path = folder / "fold_0" / "checkpoint_final.pth"
    with pytest.raises(UDAError, match=r"not nnU-Net's plain one.*nnUNetv2_export_model_to_zip.*nnunet_uda"):
        check_plain(folder, read_checkpoint(path), path)


def test_a_model_whose_scans_are_clipped_needs_a_word(in_workspace, tmp_path, refused):
    folder = trained_folder("SourceOnlyTrainer")
    content = json.loads((folder / "dataset.json").read_text())
    content["uda"]["intensities"] = {"source": None, "target": {"window": [-125, 275]}}
    (folder / "dataset.json").write_text(json.dumps(content))
    said = refused(export.main, words(folder, tmp_path / "a.zip"))
    assert "window -125 to 275 HU" in said and "--receiver_clips" in said
    card = model_card(folder, folder, ["0"], "checkpoint_final.pth", "not compared")
    assert "Clip every scan first (window -125 to 275 HU)" in card


@pytest.mark.parametrize(
    "intensities",
    [
        Intensities(window=(-125, 275)),
        Intensities(percentiles=(5, 95)),
        Intensities(percentiles=(5, 95), scale=(-1, 1)),
        Intensities(window=(0, 300), scale=(-1, 1)),
    ],
    ids=str,
)
def test_the_cards_lines_clip_as_this_package_does(intensities, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    scan = rng.normal(100, 300, (6, 20, 20)).astype(np.float32)
    scan[:, :5] = 0
    write_volume(tmp_path / "scan.nii.gz", scan)
    (tmp_path / "clipped").mkdir()
    monkeypatch.chdir(tmp_path)
    lines = [line[4:] for line in clipping_words(intensities).splitlines() if line.startswith("    ")]
    exec("\n".join(lines), {})
    clipped = sitk.GetArrayFromImage(sitk.ReadImage("clipped/CASE_0000.nii.gz"))
    assert np.allclose(clipped, intensities.clip(scan, "scan"), atol=1e-4)


@pytest.mark.slow
def test_it_predicts_the_same_and_nnunets_own_commands_install_and_predict_it(in_workspace, tmp_path, capsys):
    folder = trained_folder("CASTTrainer")
    plans = json.loads((folder / "plans.json").read_text(encoding="utf-8"))
    (folder / "plans.json").write_text(json.dumps(plans | {KEY: [[1, 2], [1]]}), encoding="utf-8")
    archive = tmp_path / "model.zip"
    export.main(words(folder, archive))
    assert "equal those of the trained model voxel for voxel" in capsys.readouterr().out
    environment = {key: value for key, value in os.environ.items() if "nnUNet" not in key and "NNUNET" not in key}
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        environment[name] = str(tmp_path / "receiver")
    (tmp_path / "receiver").mkdir()
    commands = Path(sys.executable).parent
    scans = in_workspace.raw / "Dataset501_Blobs" / "imagesTs"
    for command in (
        ["nnUNetv2_install_pretrained_model_from_zip", archive],
        ["nnUNetv2_predict", "-d", "501", "-tr", "nnUNetTrainer", "-p", "tiny", "-c", "2d", "-f", "0",
         "-i", scans, "-o", tmp_path / "predicted", "-device", "cpu"],
    ):  # fmt: skip
        subprocess.run([commands / command[0], *command[1:]], env=environment, check=True, capture_output=True)
    assert len(list((tmp_path / "predicted").glob("*.nii.gz"))) == 2
