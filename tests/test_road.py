"""The whole road through the real commands: plan, train, stop, continue, predict, evaluate, export, import."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import Workspace

TRAINER = "CISFATrainer"


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def predict(workspace: Workspace, output: Path, *options: str, plans: str = "tiny", configuration: str = "2d") -> None:
    images = workspace.raw / "Dataset501_Blobs" / "imagesTs"
    workspace.run(
        "nnUNetv2_predict", "-i", str(images), "-o", str(output), "-d", "501", "-c", configuration, "-tr", TRAINER,
        "-p", plans, "-device", "cpu", "-npp", "0", "-nps", "0", *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(planned: Workspace) -> Workspace:
    """CISFA, fold 0, with final validation and probabilities."""
    log = planned.train(TRAINER, "tiny", "--npz").stdout
    assert "Final validation: MR validation cases translated to CT" in log
    return planned


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    return {**checkpoint["network_weights"], **checkpoint["uda"]["networks"]}


def test_training_leaves_what_nnunet_leaves_and_says_what_validation_means(trained):
    folder = trained.fold_folder(TRAINER, "tiny")
    for name in (
        "checkpoint_final.pth",
        "checkpoint_best.pth",
        "progress.png",
        "losses.png",
        "validation/summary.json",
    ):
        assert (folder / name).exists(), name
    assert "no CT label was read" in json.loads((folder / "validation" / "about.json").read_text())["validated_on"]
    network = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(key.startswith(("encoder.", "decoder.")) for key in network), "a plain nnU-Net network"
    before = (folder / "validation" / "summary.json").read_bytes()
    (folder / "validation" / "summary.json").unlink()
    trained.train(TRAINER, "tiny", "--val")
    after = json.loads((folder / "validation" / "summary.json").read_text())
    assert after["foreground_mean"] == pytest.approx(json.loads(before)["foreground_mean"], nan_ok=True)


def test_predict_and_evaluate(trained, tmp_path):
    predict(trained, tmp_path / "predictions", "-f", "0", "--save_probabilities")
    case = tmp_path / "predictions" / "ct_Ts00"
    reference = trained.raw / "Dataset501_Blobs" / "labelsTs" / "ct_Ts00.nii.gz"
    assert read(case.with_suffix(".nii.gz")).shape == read(reference).shape
    with np.load(case.with_suffix(".npz")) as file:
        assert file["probabilities"].shape[0] == 3
    report = trained.run(
        "nnUNetUDA_evaluate", "-d", "501", "-pred", f"CISFA={tmp_path / 'predictions'}", "-np", "1", "-o",
        str(tmp_path / "evaluation"),
    ).stdout  # fmt: skip
    assert "CISFA" in report and "left" in report
    assert (tmp_path / "evaluation" / "evaluation.html").exists()


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_weights(planned, tmp_path):
    planned.configure("kill", "num_epochs=4", "iterations_per_epoch=3")
    planned.train(TRAINER, "kill", "--disable_checkpointing", check=False)  # prepares the target; results are dropped
    shutil.rmtree(planned.fold_folder(TRAINER, "kill").parent)
    planned.train(TRAINER, "kill")
    folder = planned.fold_folder(TRAINER, "kill")
    whole = final_weights(folder)
    shutil.rmtree(folder.parent)

    command = ["nnUNetv2_train", "501", "2d", "0", "-tr", TRAINER, "-p", "kill", "-device", "cpu"]
    environment = planned.environment | {"nnUNet_n_proc_DA": "0"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while not (folder / "checkpoint_latest.pth").exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (folder / "checkpoint_final.pth").exists(), "killed too late to show anything"
    planned.train(TRAINER, "kill", "--c")
    continued = final_weights(folder)
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[key], continued[key]) for key in whole)


@pytest.mark.slow
def test_several_folds_best_configuration_and_export(trained, tmp_path):
    trained.train(TRAINER, "tiny", "--npz", fold="1")
    trained.run(
        "nnUNetv2_find_best_configuration", "501", "-p", "tiny", "-c", "2d", "-tr", TRAINER, "-f", "0", "1", "-np", "1",
        "--disable_ensembling",
    )  # fmt: skip
    predict(trained, tmp_path / "here", "-f", "0", "1")
    archive = tmp_path / "model.zip"
    trained.run(
        "nnUNetv2_export_model_to_zip", "-d", "501", "-o", str(archive), "-c", "2d", "-tr", TRAINER, "-p", "tiny", "-f",
        "0", "1",
    )  # fmt: skip
    elsewhere = {"nnUNet_results": str(tmp_path / "other"), "nnUNet_preprocessed": str(tmp_path / "none")}
    (tmp_path / "other").mkdir()
    trained.run("nnUNetv2_install_pretrained_model_from_zip", str(archive), **elsewhere)
    images = trained.raw / "Dataset501_Blobs" / "imagesTs"
    trained.run(
        "nnUNetv2_predict", "-i", str(images), "-o", str(tmp_path / "there"), "-d", "501", "-c", "2d", "-tr", TRAINER,
        "-p", "tiny", "-f", "0", "1", "-device", "cpu", "-npp", "0", "-nps", "0", **elsewhere, nnUNet_raw="",
    )  # fmt: skip
    for name in ("ct_Ts00.nii.gz", "ct_Ts01.nii.gz"):
        np.testing.assert_array_equal(read(tmp_path / "here" / name), read(tmp_path / "there" / name))


@pytest.mark.slow
def test_a_source_only_network_starts_cisfa(planned):
    planned.train("SourceOnlyTrainer", "tiny")
    start = planned.fold_folder("SourceOnlyTrainer", "tiny") / "checkpoint_final.pth"
    planned.configure("warm", "num_epochs=1")
    log = planned.train(TRAINER, "warm", "-pretrained_weights", str(start)).stdout
    assert "Loading pretrained weights" in log and "encoder.stages.0" in log


@pytest.mark.slow
def test_cast_starts_from_a_general_models_predictions(planned, tmp_path):
    """As docs/howto/evaluate.md has it, from files as TotalSegmentator writes them."""
    for path in sorted((planned.raw / "Dataset501_Blobs" / "imagesTu").iterdir()):
        case = tmp_path / "general" / path.name.removesuffix("_0000.nii.gz")
        case.mkdir(parents=True)
        image = sitk.ReadImage(str(path))
        for name, low, high in (("organ_left", 220, 400), ("organ_right", 90, 180), ("liver", 400, 500)):
            mask = sitk.BinaryThreshold(sitk.DiscreteGaussian(image, 3.0), low, high)  # its borders are not right
            sitk.WriteImage(mask, str(case / f"{name}.nii.gz"))
    said = planned.run(
        "nnUNetUDA_pseudo_labels", "-d", "501", "-pred", str(tmp_path / "general"), "-o", "Dataset601_General",
        "-labels", "left=organ_left", "right=organ_right",
    ).stdout  # fmt: skip
    assert "5 source case(s) and 4 of 4 target case(s)" in said
    planned.run("nnUNetv2_extract_fingerprint", "-d", "601", "-np", "1")
    planned.run("nnUNetv2_plan_experiment", "-d", "601")
    planned.run("nnUNetv2_move_plans_between_datasets", "-s", "501", "-t", "601", "-sp", "tiny", "-tp", "tiny")
    planned.run("nnUNetv2_preprocess", "-d", "601", "-plans_name", "tiny", "-c", "2d", "-np", "1")
    common = ("-device", "cpu")
    planned.run("nnUNetUDA_train", "601", "2d", "0", "-tr", "SupervisedTrainer", "-p", "tiny", *common)
    start = planned.results / "Dataset601_General" / "SupervisedTrainer__tiny__2d" / "fold_0" / "checkpoint_final.pth"
    planned.configure("from_general", "cast.start_share=0", "segmenter_learning_rate=5e-4")
    words = ("nnUNetUDA_train", "501", "2d", "0", "-tr", "CASTTrainer", "-p", "from_general")
    assert "Pretrained weights, all of them" in planned.run(*words, "-pretrained_weights", str(start), *common).stdout
    first, last = (torch.load(path, weights_only=False)["network_weights"]
                   for path in (start, planned.fold_folder("CASTTrainer", "from_general") / start.name))  # fmt: skip
    layer = "decoder.seg_layers.0.weight"
    assert torch.allclose(first[layer], last[layer], atol=0.1 * float(first[layer].std()))


@pytest.mark.slow
def test_the_stock_trainer_runs_on_the_same_dataset(planned):
    log = planned.train("nnUNetTrainer_1epoch", "tiny").stdout
    assert "Mean Validation Dice" in log
    preprocessed = planned.preprocessed / "Dataset501_Blobs" / "nnUNetPlans_2d"
    assert {path.name[:2] for path in preprocessed.iterdir()} == {"mr"}, "no target case in nnU-Net's own folder"


@pytest.mark.slow
def test_three_dimensions_and_residual_encoder_plans(planned, tmp_path):
    planned.configure("tiny3d", configuration="3d_fullres", options=("--overwrite",))
    planned.train(TRAINER, "tiny3d", configuration="3d_fullres")
    predict(planned, tmp_path / "predictions", "-f", "0", plans="tiny3d", configuration="3d_fullres")
    assert len(list((tmp_path / "predictions").glob("*.nii.gz"))) == 2
    planned.run("nnUNetv2_plan_experiment", "-d", "501", "-pl", "nnUNetPlannerResEncM")
    planned.run("nnUNetv2_preprocess", "-d", "501", "-plans_name", "nnUNetResEncUNetMPlans", "-c", "2d", "-np", "1")
    planned.configure("tinyres", options=("-from", "nnUNetResEncUNetMPlans"))
    planned.train(TRAINER, "tinyres")
    architecture = json.loads((planned.fold_folder(TRAINER, "tinyres").parent / "plans.json").read_text())
    assert "ResidualEncoderUNet" in architecture["configurations"]["2d"]["architecture"]["network_class_name"]


def test_bad_input_is_one_message_and_a_status(planned, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(planned.raw, raw)
    shutil.rmtree(raw / "Dataset501_Blobs" / "imagesTu")
    done = planned.run(
        "nnUNetv2_train", "501", "2d", "0", "-tr", TRAINER, "-p", "tiny", "-device", "cpu", check=False,
        nnUNet_raw=str(raw), nnUNet_results=str(tmp_path / "results"), nnUNet_n_proc_DA="0",
    )  # fmt: skip
    assert done.returncode == 1
    assert "ERROR:" in done.stderr and "imagesTu does not exist" in done.stderr
    assert "Traceback" not in done.stderr
