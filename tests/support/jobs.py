"""A job of an experiment that is never run."""

from __future__ import annotations

from pathlib import Path

from nnunet_uda.evaluation.runs import Labels
from nnunet_uda.experiments.job import Job, TargetTest

DATASET = "Dataset501_Blobs"


def a_job(folder: Path, name: str = "a") -> Job:
    test = TargetTest(["x"], folder / "labelsTs", Labels({"left": 1}, None, ".nii.gz"), None)
    return Job(name, folder / "runs" / name, DATASET, "2d", "0", "T", "P", test, folder / "imagesTs", "cpu", 1)
