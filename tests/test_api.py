"""``from nnunet_uda import ...``: the road in Python, the same as the commands'."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw_case, write_volume
from nnunetv2.experiment_planning import plan_and_preprocess_api
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from numpy.random import default_rng

import nnunet_uda
from nnunet_uda import UDAError, api
from nnunet_uda.commands import configure as command
from nnunet_uda.dataset_conversion import folders


def test_the_package_loads_nothing_before_it_is_asked():
    script = "import sys, nnunet_uda; print([name for name in ('torch', 'nnunetv2', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert {name: getattr(nnunet_uda, name).__doc__ for name in nnunet_uda.__all__}.keys() == {*nnunet_uda.__all__}
    with pytest.raises(AttributeError, match="no attribute 'learn'"):
        nnunet_uda.learn  # noqa: B018


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: api.convert("brain", dataset_id=1), "no converter 'brain'. There are: mmwhs"),
        (lambda: api.convert("folders", dataset_id=1, colour=3), "no option colour. There are: .*source_images"),
        (lambda: api.convert("folders", dataset_id=1, source="A"), "give source_images"),
        (lambda: api.convert("mmwhs", dataset_id=1, i="x", source="ct", target="us"), "target may be .*found 'us'"),
        (lambda: api.configure(501, "x", device="cpu"), "no option device"),
        (lambda: api.configure(501, "x", preset="gpu"), "preset may be cpu, found 'gpu'"),
        (lambda: api.configure(501, "x", preset="cpu", protocol="cisfa"), "exclude each other"),
        (lambda: api.train(501, fold="first"), "the fold is a number or 'all'"),
        (lambda: api.train(501, device="tpu"), "device may be cpu, cuda, mps, found 'tpu'"),
        (lambda: api.train(501, trainer="CAST", plans="tiny", device="cpu"), "Did you mean CASTTrainer"),
        (lambda: api.predict(501, "images", "out", trainer="CISFATrainer"), "does not exist: train"),
        (lambda: api.evaluate({}, "out", dataset=501), "-pred is missing"),
        (lambda: api.evaluate({"a": "absent"}, "out", lower="b"), "without -d, -r is needed"),
    ],
)
def test_what_a_user_can_mend_is_a_uda_error(in_workspace, monkeypatch, tmp_path, call, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UDAError, match=words):
        call()


def test_from_two_folders_to_a_dataset(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    rng = default_rng(0)
    for index in range(2):
        for domain in ("mr", "ct"):
            image, label = draw_case(rng, domain == "ct", (6, 24, 24))
            write_volume(tmp_path / domain / f"{index}.nii.gz", image)
            write_volume(tmp_path / f"{domain}_labels" / f"{index}.nii.gz", label)
    raw = api.convert(
        "folders", dataset_id=530, name="Two", source="MR", target="CT", source_images=tmp_path / "mr",
        source_labels=tmp_path / "mr_labels", target_images=tmp_path / "ct", labels={"left": 1, "right": [2]}, np=1,
    )  # fmt: skip
    assert raw == tmp_path / "raw" / "Dataset530_Two"
    assert json.loads((raw / "dataset.json").read_text())["labels"] == {"background": 0, "left": 1, "right": 2}
    assert len(list((raw / "imagesTu").iterdir())) == 2
    said = capsys.readouterr().out.splitlines()[-3:]
    assert [re.search(r"nnUNet\w+ (-d )?530", line) is not None for line in said] == [True] * 3
    assert said[0].startswith("Next: nnUNetv2_plan_and_preprocess -d 530 -c 2d") and "-preset cpu" in said[2]
    assert folders.EXAMPLE.startswith("nnUNetUDA_convert folders")


def test_from_a_planned_dataset_to_scores(in_workspace, tmp_path):
    plans = api.configure(501, "in_python", {"num_epochs": 1, "seed": 3}, base="tiny", batch_size=3, overwrite=True)
    written = json.loads(plans.read_text())
    assert (written["uda"]["num_epochs"], written["configurations"]["2d"]["batch_size"]) == (1, 3)
    command.main(
        ["-d", "501", "-p", "by_command", "-from", "tiny", "-batch_size", "3", "-set", "num_epochs=1", "seed=3"]
    )
    by_command = json.loads(plans.with_name("by_command.json").read_text())
    assert written | {"plans_name": ""} == by_command | {"plans_name": ""}

    hook = sys.excepthook
    fold = api.train(501, trainer="SourceOnlyTrainer", plans="in_python", device="cpu")
    assert (fold / "checkpoint_final.pth").is_file() and fold.name == "fold_0" and sys.excepthook is hook
    images = in_workspace.raw / "Dataset501_Blobs" / "imagesTs"
    out = api.predict(
        501, images, tmp_path / "predictions", trainer="SourceOnlyTrainer", plans="in_python", device="cpu"
    )
    assert {path.name for path in out.glob("*.nii.gz")} == {"ct_Ts00.nii.gz", "ct_Ts01.nii.gz"}
    (fold / "checkpoint_cut.pth").write_bytes(b"PK")
    for name, words in (("of_mine", "does not exist"), ("cut", "cannot be read as a checkpoint")):
        bad = {"plans": "in_python", "checkpoint": f"checkpoint_{name}.pth", "device": "cpu"}
        with pytest.raises(UDAError, match=rf"checkpoint_{name}\.pth {words}"):
            api.predict(501, images, out, trainer="SourceOnlyTrainer", **bad)
    scores = api.evaluate({"source only": out}, tmp_path / "evaluation", dataset=501, np=1, slices=1)
    assert [volume["case"] for volume in scores["volumes"]["source only"]] == ["ct_Ts00", "ct_Ts01"]
    assert Path(tmp_path, "evaluation", "evaluation.html").is_file()


@pytest.mark.parametrize(("before", "threads"), [("0", 1), ("2", 2)])
def test_planning_has_a_thread_where_training_loads_in_its_own_process(in_workspace, monkeypatch, before, threads):
    """nnU-Net's planner fails with ``nnUNet_n_proc_DA=0``."""
    seen = []
    monkeypatch.setenv("nnUNet_n_proc_DA", before)
    monkeypatch.setattr(plan_and_preprocess_api, "plan_experiments", lambda _: seen.append(get_allowed_n_proc_DA()))
    for name in ("extract_fingerprints", "preprocess"):
        monkeypatch.setattr(plan_and_preprocess_api, name, lambda *_, **__: None)
    assert api.plan(501, num_processes=1) == in_workspace.preprocessed / "Dataset501_Blobs"
    assert seen == [threads] and os.environ["nnUNet_n_proc_DA"] == before


def test_a_signal_is_a_uda_error_too(in_workspace, monkeypatch):
    from nnunet_uda.commands import train

    def stopped(*_, **options):
        raise SystemExit(130)

    monkeypatch.setattr(train, "train", stopped)
    with pytest.raises(UDAError, match="c=True"):
        api.train(501, device="cpu")
