"""The benchmark of precision and compilation, as far as a CPU can tell; whole runs are slow tests."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import multiprocessing
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY

from nnunet_uda.errors import UDAError
from nnunet_uda.plans import derive_plans, merge_uda

pytestmark = pytest.mark.slow

DATASET = "Dataset501_Blobs"
SMALL = ["-patch", "32", "-batch", "2", "-base_features", "4", "-max_features", "8", "-steps", "1", "-pairs", "1",
         "-device", "cpu", "-set", "cisfa.generator_width=4", "cisfa.generator_blocks=2", "cisfa.discriminator_width=4",
         "cisfa.patches=16"]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    module = importlib.import_module("benchmarks.gpu")
    for name in ("_do_i_compile", "get_training_transforms"):
        monkeypatch.setattr(module.nnunet.nnUNetTrainer, name, vars(module.nnunet.nnUNetTrainer)[name])
    monkeypatch.setattr(module.nnunet, "dummy_context", module.nnunet.dummy_context)
    return module


class Regression:
    """The least that the benchmark asks of a trainer; its scaled gradients overflow at a scale of 2^126."""

    device = torch.device("cpu")

    def __init__(self, scale: float | None = None) -> None:
        torch.manual_seed(1)
        self.network = torch.nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1, momentum=0.9)
        self.grad_scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        self.dataloader_train = ({"data": torch.randn(4, 3, 2, 2), "target": None} for _ in itertools.count())

    def train_step(self, batch):
        loss = 100 * (self.network(batch["data"].mean((2, 3))) + torch.rand(()) - 3).square().mean()
        self.optimizer.zero_grad()
        if self.grad_scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        return {"loss": loss.item()}


def compared(gpu, trainer, pairs=2):
    return gpu.Steps(trainer, 5, torch.contiguous_format).compared(pairs, gpu.saved_state(trainer))


def test_steps_skip_no_update_and_are_the_same_at_every_scale(gpu):
    plain, restarts = compared(gpu, Regression())
    assert restarts == 0 and len({losses["loss"] for pair in plain for losses in pair}) == 4
    trainer = Regression(scale=2.0**126)
    scaled, restarts = compared(gpu, trainer)
    assert restarts > 0 and trainer.grad_scaler.get_scale() <= 2.0 ** (126 - restarts)
    for ours, theirs in zip(scaled, plain, strict=True):
        assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in theirs], rel=1e-5)


def test_every_pair_begins_with_the_same_weights(gpu):
    losses, _ = compared(gpu, Regression(), pairs=3)
    alone = Regression()
    steps = gpu.Steps(alone, 5, torch.contiguous_format)
    assert steps.run([2, 3])[0] == losses[2]


def test_gradients_that_never_become_finite_are_said(gpu):
    trainer = Regression(scale=2.0)
    trainer.train_step = lambda batch: Regression.train_step(trainer, {"data": batch["data"] * math.inf})
    with pytest.raises(UDAError, match="gradients overflow at every scale"):
        compared(gpu, trainer)


def test_variants_are_checked(gpu):
    assert gpu.check_variant("amp+channels_last+compile", "cuda") == "amp+compile+channels_last"
    for wrong in ("bf16", "amp+compiled", "amp+compile+compile", "compile", "amp+"):
        with pytest.raises(UDAError, match="give one of fp32, tf32, amp"):
            gpu.check_variant(wrong, "cuda")
    with pytest.raises(UDAError, match="CUDA devices only"):
        gpu.check_variant("tf32", "cpu")


def row(variant, losses, **others):
    figures = {"seconds": [0.1, 0.2], "median": 0.15, "peak_bytes": 2**21, "first_step": 1.0, "losses": losses,
               "losses_again": losses, "weights": 10.0, "images": 7.0}  # fmt: skip
    return {"job": {"size": "nnunet", "trainer": "CISFATrainer", "variant": variant}, **figures, **others}


def test_losses_beyond_the_tolerance_are_named(gpu, capsys):
    expected = [[{"segmentation": 1.0, "adversarial": 0.5}, {"segmentation": 0.8, "adversarial": 0.4}]]
    near = [[{"segmentation": 1.029, "adversarial": 0.5}, {"segmentation": 0.8, "adversarial": 0.4 + 0.035}]]
    far = [[{"segmentation": 1.0, "adversarial": 0.5}, {"segmentation": 0.8, "adversarial": 0.4 + 0.037}]]
    broken = [[{"segmentation": 1.0, "adversarial": 0.5}, {"segmentation": math.nan, "adversarial": 9.0}]]
    rows = [row("fp32", expected), row("amp", near), row("amp+compile", far), row("tf32", broken)]
    assert gpu.report(rows[:2], 0.02, 0.01) == []
    faults = gpu.report(rows, 0.02, 0.01)
    assert len(faults) == 2
    assert faults[0] == (
        "CISFATrainer, nnunet, amp+compile: 'adversarial' of pair 1, step 2 is 0.437, with fp32 0.4; a difference "
        "of at most 0.036 is allowed"
    )
    assert "tf32: 'segmentation' of pair 1, step 2 is nan, with fp32 0.8" in faults[1]
    assert (
        "| nnunet | CISFATrainer | amp | 150.0 (100.0, 200.0) | 1.00 | 2 | 1.00 | 1.0 | 0.97" in capsys.readouterr().out
    )


def test_what_cannot_be_compared_is_said(gpu):
    losses = [[{"loss": 1.0}]]
    failed = {"job": row("amp", [])["job"], "error": "OutOfMemoryError: CUDA out of memory"}
    assert gpu.report([row("fp32", losses), failed], 0.02, 0.01) == [
        "CISFATrainer, nnunet, amp: OutOfMemoryError: CUDA out of memory"
    ]
    faults = gpu.report([row("fp32", losses), row("amp", losses, images=7.1)], 0.02, 0.01)
    assert len(faults) == 1 and "begins with other images than fp32" in faults[0]
    unsteady = row("fp32", losses, losses_again=[[{"loss": 2.0}]])
    assert "fp32: 'loss' of pair 1, step 1 is 2, with fp32 1" in gpu.report([unsteady], 0.02, 0.01)[0]
    failed["job"]["variant"] = "fp32"
    assert len(gpu.report([failed, row("amp", losses)], 0.02, 0.01)) == 1


def test_rows_are_kept_and_failures_repeated(gpu, in_workspace, monkeypatch, tmp_path, capsys):
    asked, answer = [], {"amp": {"error": "OutOfMemoryError: CUDA out of memory"}}

    def in_process(job, plans, dataset):
        asked.append((job["size"], job["variant"]))
        assert dataset == DATASET and plans["uda"]["cisfa"]["generator_width"] == 4 and plans["uda"]["seed"] == 3
        assert plans["configurations"]["2d"]["batch_size"] == job["batch"] == 2
        assert (job["patch"], job["features"]) == ([32, 32], [4, 8, 8, 8])
        return answer.get(job["variant"]) or {k: v for k, v in row("fp32", [[{"loss": 1.0}] * 2]).items() if k != "job"}

    monkeypatch.setattr(gpu, "in_process", in_process)
    arguments = ["-o", str(tmp_path / "gpu.json"), "-d", "501", "-tr", "CISFATrainer", "-seed", "3", "-variants", "amp",
                 "-sizes", "nnunet", *SMALL]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 1 and "amp: OutOfMemoryError" in capsys.readouterr().err
    assert asked == [("nnunet", "fp32"), ("nnunet", "amp")]
    answer.clear()
    gpu.main(arguments)
    assert asked[2:] == [("nnunet", "amp")]
    gpu.main(arguments)
    assert len(asked) == 3 and len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 2


def test_the_sizes_are_what_they_are_said_to_be(gpu, in_workspace):
    base = json.loads((in_workspace.preprocessed / DATASET / "nnUNetPlans.json").read_text())
    features = {}
    for name, size in gpu.SIZES.items():
        chosen = derive_plans(base, "2d", name, merge_uda({}, gpu.SETTINGS), **size)["configurations"]["2d"]
        features[name] = chosen["architecture"]["arch_kwargs"]["features_per_stage"]
        assert chosen["patch_size"] == size["patch_size"]
    assert features == {"nnunet": [32, 64, 128, 256, 512, 512, 512], "cisfa": [64, 128, 256, 512, 1024]}


def test_mixed_precision_and_channels_last_train_to_float32s_losses(gpu, in_workspace):
    content = json.loads((in_workspace.preprocessed / DATASET / "tiny.json").read_text())
    content["uda"] = merge_uda(content["uda"], gpu.SETTINGS)
    rows = []
    for variant in ("fp32", "amp+channels_last"):
        job = {"trainer": "CISFATrainer", "size": "tiny", "variant": variant, "device": "cpu", "seed": 0, "steps": 1,
               "pairs": 1}  # fmt: skip
        rows.append({"job": job, **gpu.measure(job, content, DATASET)})
    assert gpu.report(rows, 0.02, 0.01) == []
    plain, mixed = rows
    assert plain["losses"] == plain["losses_again"] != mixed["losses"]  # the same again, and float16 is not the same
    assert plain["scale"] is None and mixed["scale"] > 0 and mixed["losses_again"] is None
    assert {"patch_contrastive", "segmentation", "segmentation_discriminator"} < set(mixed["losses"][0][0])


def test_a_failure_becomes_an_answer(gpu, in_workspace):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    job = {"trainer": "NoSuchTrainer", "variant": "fp32", "device": "cpu", "seed": 0}
    gpu.measure_apart(job, {}, DATASET, sender)
    answer = receiver.recv()
    assert "NoSuchTrainer" in answer["error"] and "measure" in answer["traceback"]


def test_without_a_cuda_device_it_says_so(gpu, monkeypatch, refused):
    monkeypatch.setattr(gpu, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)))
    assert "torch sees no CUDA device here" in refused(gpu.main, [])


@pytest.mark.slow
def test_the_command_on_a_cpu(planned, tmp_path):
    words = [sys.executable, "-m", "benchmarks.gpu", "-o", str(tmp_path / "gpu.json"), "-d", "501",
             "-sizes", "cisfa", "-tr", "nnUNetTrainer", "-variants", "amp", "fp32+compile",
             *SMALL]  # fmt: skip
    first = planned.run_apart(*words, PYTHONPATH=str(REPOSITORY))
    assert "nnUNetTrainer | fp32+compile" in first.stdout
    again = planned.run_apart(*words, PYTHONPATH=str(REPOSITORY))
    assert "..." not in again.stdout and again.stdout == first.stdout[first.stdout.index("\n" + DATASET) :]
