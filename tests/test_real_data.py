"""Real scans through the real commands, in little time: that they run, not how well they do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import Workspace

DATA = os.environ.get("NNUNET_UDA_TEST_DATA")
TASKS = {
    "totalseg": [
        "-source", "CT", "-target", "MR", "-source_images", "totalseg/example_ct_sm.nii.gz", "-source_labels",
        "totalseg/example_seg.nii.gz", "-target_images", "totalseg/example_mr_sm.nii.gz", "-target_labels",
        "totalseg/example_seg_mr.nii.gz", "-labels", "spleen=1", "right_kidney=2", "left_kidney=3", "liver=5",
        "--ignore_other_labels",
    ],
    "vs": [
        "-source", "ceT1", "-target", "hrT2", "-source_images", "vs/vs_gk_99_t1.nii.gz", "-source_labels",
        "vs/vs_gk_99_t1_seg.nii.gz", "-target_images", "vs/vs_gk_98_t2.nii.gz", "vs/vs_gk_95_t2.nii.gz",
        "-target_test_images", "vs/vs_gk_9_t2.nii.gz", "-target_test_labels", "vs/vs_gk_9_t2_seg.nii.gz", "-labels",
        "tumour=1",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="NNUNET_UDA_TEST_DATA is not set: no real scans to train on")
@pytest.mark.parametrize("task", TASKS)
def test_real_scans_from_files_to_scores(tmp_path, task):
    if not Path(DATA, task).is_dir():
        pytest.skip(f"{Path(DATA, task)} does not exist")
    workspace = Workspace(tmp_path)
    arguments = [str(Path(DATA, word)) if word.startswith(task + "/") else word for word in TASKS[task]]
    workspace.raw.mkdir()
    workspace.run("nnUNetUDA_convert", "folders", "-d", "501", "-name", "Real", *arguments)
    workspace.plan()
    workspace.configure("tiny", "mirror=false", patch=("96", "96"))
    log = workspace.train("CISFATrainer", "tiny", fold="all").stdout
    assert "No target label is read" in log and "Validation complete" in log
    raw = workspace.raw / "Dataset501_Real"
    images = raw / ("imagesTs" if (raw / "imagesTs").exists() else "imagesTu")
    workspace.run(
        "nnUNetv2_predict", "-i", str(images), "-o", str(tmp_path / "predictions"), "-d", "501", "-c", "2d", "-tr",
        "CISFATrainer", "-p", "tiny", "-f", "all", "-device", "cpu", "-npp", "0", "-nps", "0",
    )  # fmt: skip
    workspace.run(
        "nnUNetUDA_evaluate", "-d", "501", "-pred", f"CISFA={tmp_path / 'predictions'}", "-i", str(images), "-np", "1",
        "-o", str(tmp_path / "evaluation"),
    )  # fmt: skip
    summary = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["summary"]["CISFA"]
    assert 0 <= summary["mean over structures"]["Dice"]["mean"] <= 1
