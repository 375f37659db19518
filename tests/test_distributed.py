"""Training on several devices, shown by two processes over gloo on the CPU that run the trainers' own code."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_trainer, same_weights, sampled, weights
from support.tiny import CLIP
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from nnunet_uda import collectives as shared
from nnunet_uda.commands import train
from nnunet_uda.errors import UDAError
from nnunet_uda.losses.boundary import boundary_loss
from nnunet_uda.losses.dice import soft_dice_loss
from nnunet_uda.losses.global_contrastive import GlobalContrastiveLoss
from nnunet_uda.losses.prototype_contrast import PrototypeDictionary, prototype_contrastive_loss
from nnunet_uda.losses.prototypes import class_prototypes, inter_class_loss, intra_class_loss
from nnunet_uda.losses.pseudo_label import pseudo_label_loss
from nnunet_uda.losses.supervised_contrastive import supervised_contrastive_loss
from nnunet_uda.losses.uncertainty import uncertain_segmentation_loss
from nnunet_uda.plans import derive_plans
from nnunet_uda.training import fold, launch
from nnunet_uda.training.uda_trainer import NonFiniteLossError

DATASET = "Dataset501_Blobs"


def in_processes(folder: Path, function: Callable[..., Any], *args: Any, number: int = 2) -> list[Any]:
    """What ``function(rank, *args)`` returns in each of ``number`` processes that train together."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.start_processes(
        _enter, (function, str(folder), number, args), nprocs=number, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in range(number)]


def _enter(rank: int, function: Callable[..., Any], folder: str, number: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if number > 1:
        store = f"file://{folder}/store"
        distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=number, timeout=timedelta(seconds=300)
        )
    torch.save(function(rank, *args), Path(folder, f"{rank}.pth"))
    if number > 1:
        distributed.barrier()
        distributed.destroy_process_group()


# --- what processes say to each other --------------------------------------------------------------------------------


def sums_and_rows(rank: int) -> dict[str, Any]:
    x = torch.arange(3.0, requires_grad=True)
    rows = torch.full((2 * rank, 2), float(rank + 1), requires_grad=True)  # rank 0 brings none
    gathered = shared.gather_rows(rows)
    ((shared.global_sum(x) ** 2).sum() + (gathered * torch.arange(4.0).view(2, 2)).sum() * (rank + 1)).backward()
    flags = shared.gather_rows(torch.tensor([True, False])[: rank + 1])
    return {"sum": shared.global_sum(x).detach(), "x": x.grad, "rows": gathered.detach(), "of_rows": rows.grad,
            "flags": flags, "mean": shared.global_mean(x.detach().sum() * rank, torch.tensor(3 * rank))}  # fmt: skip


def test_sums_means_and_rows_have_the_gradients_of_all_ranks(tmp_path):
    first, second = in_processes(tmp_path, sums_and_rows)
    for found in (first, second):
        assert found["sum"].tolist() == [0, 2, 4] and found["rows"].tolist() == [[2, 2], [2, 2]]
        assert found["x"].tolist() == [0, 8, 16], "2 (x + x) of each of two losses"
        assert found["flags"].tolist() == [True, True, False] and found["mean"] == 1
    assert first["of_rows"].shape == (0, 2)
    assert second["of_rows"].tolist() == [[0, 3], [6, 9]], "1 and 2 times the weights"


def test_one_process_leaves_everything_as_it_is():
    x = torch.ones(2, requires_grad=True)
    assert shared.global_sum(x) is x and shared.gather_rows(x) is x
    assert shared.global_mean(torch.tensor(6.0), torch.tensor(0)) == 6
    assert (shared.rank(), shared.world_size()) == (0, 1)


def gradients_of_rank(rank: int) -> list[Tensor | None]:
    parameters = [nn.Parameter(torch.zeros(40)), nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(2)),
                  nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(1))]  # fmt: skip
    for index in (0, 1, 3) if rank == 0 else (0,):
        parameters[index].grad = torch.full_like(parameters[index], 2.0 * (rank + 1))
    parameters[4].requires_grad_(False)
    shared.BUCKET_BYTES = 100
    shared.average_gradients(parameters, shared.patient_group())
    return [parameter.grad for parameter in parameters]


def test_a_gradient_that_only_one_rank_has_counts_on_all(tmp_path):
    for gradients in in_processes(tmp_path, gradients_of_rank):
        assert torch.equal(gradients[0], torch.full((40,), 3.0)) and torch.equal(gradients[1], torch.ones(3, 5))
        assert torch.equal(gradients[3], torch.ones(2, dtype=torch.float64))
        assert gradients[2] is None and gradients[4] is None, "without a gradient anywhere: optimisers skip it"


def alone_on_rank(rank: int) -> list[Any]:
    group = shared.patient_group()
    called = []

    def fail() -> None:
        raise UDAError("the disk is full")

    found = [shared.on_first_rank(lambda: called.append(rank) or {"made": rank}, group), called]
    try:
        shared.on_first_rank(fail, group)
    except UDAError as error:
        found += [type(error).__name__, str(error)]
    return found


def test_rank_0_works_alone_and_its_error_stops_all(tmp_path):
    assert in_processes(tmp_path, alone_on_rank) == [
        [{"made": 0}, [0], "UDAError", "the disk is full"],
        [{"made": 0}, [], "StoppedWithOthersError", "the disk is full"],
    ]


# --- losses ----------------------------------------------------------------------------------------------------------

CLASSES = 3


def losses_of(rows: slice) -> dict[str, tuple[Tensor, Tensor]]:
    """Every loss that mixes samples on rows of the same 4 images, and its gradient for a layer before it."""
    generator = torch.Generator().manual_seed(0)
    images = 1 + torch.randn(4, 1, 12, 12, generator=generator)  # prototypes of a positive cosine
    label = torch.zeros(4, 1, 12, 12, dtype=torch.int64)
    label[0, :, 2:9, 2:9], label[1, :, 4:8, 1:5], label[2, :, 5:9, 5:8] = 1, 2, 1  # class 2 in the first half only
    weight = torch.randn(CLASSES, 1, 3, 3, generator=generator)
    holds = torch.tensor([True, True, False, True])
    images, label, holds = images[rows], label[rows], holds[rows]
    dictionaries = [PrototypeDictionary(CLASSES, 4, CLASSES)]
    rows_before = F.normalize(torch.randn(5, CLASSES, generator=generator), dim=1)
    if shared.rank() == 0:  # a collective call: together the ranks bring each row once
        dictionaries[0].enqueue(rows_before, torch.tensor([0, 1, 1, 2, 0]))
    else:
        dictionaries[0].enqueue(rows_before[:0], torch.zeros(0, dtype=torch.int64))

    def contrast(features: Tensor) -> Tensor:
        prototypes, present = class_prototypes(features, label[:, 0], CLASSES)
        return prototype_contrastive_loss(prototypes[present], present.nonzero()[:, 1], dictionaries, 2, 1.0)

    functions = {
        "dice": lambda f: soft_dice_loss(f, label),
        "boundary": lambda f: boundary_loss(f.softmax(1), label),
        "global": lambda f: GlobalContrastiveLoss(0.2)(f.mean((2, 3)), f.amax((2, 3))),
        "supervised": lambda f: supervised_contrastive_loss(f.amax(3).flatten(1), holds, 0.5),
        "certain": lambda f: uncertain_segmentation_loss(f, 0.6),
        "pseudo": lambda f: pseudo_label_loss(f, label[:, 0] - 1),
        "intra": lambda f: intra_class_loss(f, label[:, 0], *class_prototypes(f, label[:, 0], CLASSES)),
        "inter": lambda f: inter_class_loss(*class_prototypes(f, label[:, 0], CLASSES)),
        "prototypes": contrast,
    }
    found = {}
    for name, function in functions.items():
        own = weight.clone().requires_grad_(True)
        loss = function(F.conv2d(images, own, padding=1))
        loss.backward()
        found[name] = (loss.detach(), own.grad)
    return found


def losses_of_rank(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    return losses_of(slice(2 * rank, 2 * rank + 2))


def test_losses_are_those_of_the_whole_batch(tmp_path):
    first, second = in_processes(tmp_path, losses_of_rank)
    whole, half = losses_of(slice(None)), losses_of(slice(2))
    for name, (loss, gradient) in whole.items():
        for found in (first, second):
            assert torch.allclose(found[name][0], loss, rtol=1e-5), name
        mean = (first[name][1] + second[name][1]) / 2
        assert torch.allclose(mean, gradient, rtol=1e-4, atol=1e-6) and gradient.norm() > 1e-4, name
        assert not torch.allclose(half[name][0], loss, rtol=1e-4), f"{name}: a rank alone would give the same"


# --- trainers --------------------------------------------------------------------------------------------------------

PROTOTYPES = {"similarity_prototypes__" + name: value for name, value in {
    "warmup_epochs": 0, "confidence": 0.34, "boundary_weight": 1.0, "embedding_dim": 8, "discriminator_width": 4,
    "dictionary_size": 6, "top_k": 2, "min_positions": 1, "similarity_weight": 1.0, "contrastive_weight": 1.0,
}.items()}  # fmt: skip
UUDS = {"uuds__clip_config": CLIP, "uuds__clip_weights": "random", "uuds__warmup_epochs": 0, "uuds__threshold": 1.0,
        "uuds__clip_batch_statistics": "frozen"}  # fmt: skip
CUT = {"cut__generator_width": 4, "cut__generator_blocks": 1, "cut__discriminator_width": 4, "cut__patches": 16}
CAST = {"cast__start_share": 0.0, "cast__confidence": 0.0}
FAMILIES = {
    "source": ("SourceOnlyTrainer", {}),
    "dice": ("SourceOnlyTrainer", {"segmentation_loss": "dice"}),
    "cisfa": ("CISFATrainer", {}),
    "sequential": ("CISFASequentialGCLTrainer", {}),
    "prototypes": ("SimilarityPrototypesTrainer", PROTOTYPES),
    "uuds": ("UUDSTrainer", UUDS),
    "cut": ("CUTTrainer", CUT),
    "advent": ("ADVENTTrainer", {"advent__discriminator_width": 4}),
    "entropy": ("EntMinTrainer", {}),
    "cast": ("CASTTrainer", CAST),
}


@pytest.fixture
def workspace(in_workspace, monkeypatch):
    """Plans of a batch of 4 beside ``tiny``."""
    folder = in_workspace.preprocessed / DATASET
    tiny = json.loads((folder / "tiny.json").read_text())
    (folder / "four.json").write_text(json.dumps(derive_plans(tiny, "2d", "four", tiny["uda"], batch_size=4)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return in_workspace


def steps(rank: int, name: str, options: dict[str, Any], number: int = 1) -> dict[str, Any]:
    """Losses and weights of three steps of a trainer on its share of always the same batches, in double precision.

    In single precision rounding turns a unit on or off now and then; networks this small and this raw make more of that
    with each step, and how often it happens is another matter on each processor.
    """
    torch.set_default_dtype(torch.float64)
    Tensor.float = Tensor.double  # this process is the test's own
    trainer = make_trainer(name, "four", **options)
    trainer.initialize()
    trainer.ranks.start_together((trainer.plain_network, trainer.networks), trainer.settings.seed, 0)
    before = {key: value.clone() for key, value in weights(trainer).items()}
    for key, optimizer in trainer.optimizers.items():  # Adam would enlarge rounding where a gradient is nothing else
        trainer.optimizers[key] = torch.optim.SGD([{"params": g["params"]} for g in optimizer.param_groups], lr=0.002)
    trainer.optimizer = trainer.optimizers[trainer.network_update]
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    trainer.network.train()
    trainer.networks.train()
    share = slice(rank * 4 // number, (rank + 1) * 4 // number)
    assert trainer.batch_size == 4 // number
    losses, after = [], []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        source, target = torch.randn(2, 4, 1, 32, 32, generator=generator)
        label = torch.zeros(4, 1, 32, 32)
        label[0, :, 4:20, 4:20], label[1, :, 10:25, 8:30], label[2, :, 5:9, 5:9] = 1, 2, 1  # class 2 on one rank only
        source += 2 * label
        if name == "CASTTrainer":  # as they are, and restyled
            target = torch.cat((target, 0.5 * target), 1)
        labels = label[share]
        if trainer.enable_deep_supervision:
            sizes = [[round(32 * scale) for scale in scales] for scales in trainer._get_deep_supervision_scales()]
            labels = [F.interpolate(label[share], size, mode="nearest") for size in sizes]
        batch = {"data": source[share], "target": labels}
        trainer.dataloader_target = iter([{"data": target[share]}])
        torch.manual_seed(step)  # the same patch positions everywhere
        losses.append(trainer.train_step(batch))
        after.append({key: value.clone() for key, value in weights(trainer).items()})
    return {"losses": losses, "before": before, "after": after}


@sampled("family", FAMILIES, "cisfa", "cast")
def test_two_processes_take_the_steps_of_one(workspace, tmp_path, family):
    name, options = FAMILIES[family]
    first, second = in_processes(tmp_path / "two", steps, name, options, 2)
    [one] = in_processes(tmp_path / "one", steps, name, options, number=1)
    assert same_weights(first["after"][-1], second["after"][-1])
    assert first["losses"] == second["losses"]
    for found, expected in zip(first["losses"], one["losses"], strict=True):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    whole, halves = one["after"][-1], first["after"][-1]
    for key, start in one["before"].items():
        assert torch.equal(first["before"][key], start) and start.dtype != torch.float32
        moved = whole[key].double() - start.double()
        off = halves[key].double() - whole[key].double()
        assert off.norm() <= 1e-5 * moved.norm() + 1e-9 * (1 + start.double().norm()), key
    moved = sum(not torch.equal(whole[key], start) for key, start in one["before"].items())
    assert moved > len(one["before"]) / 6, "CUT moves its generator alone at first"


def loop(rank: int, name: str, options: dict[str, Any], stop_after: int | None = None, resume: bool = False):
    """Files that this process opens for writing, its weights and its trainer's log at the end of a training."""
    written: set[str] = set()
    folders = [os.environ[name] for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")]
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def watch(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str) and any(args[0].startswith(str(f)) for f in folders):
            if args[2] & flags:
                written.add(args[0])

    sys.addaudithook(watch)
    trainer = make_trainer(name, "four", **options)
    drawn = []
    if resume:
        trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_latest.pth")))
    else:
        trainer.initialize()

    class Killed(Exception):
        pass

    before, step = trainer.on_epoch_start, trainer.train_step

    def on_epoch_start() -> None:
        if trainer.current_epoch == stop_after:
            raise Killed
        before()

    def train_step(batch: dict) -> dict:
        drawn.append(float(batch["data"].double().sum()))
        return step(batch)

    trainer.on_epoch_start, trainer.train_step = on_epoch_start, train_step
    try:
        trainer.run_training()
    except Killed:
        pass
    history = {key: list(values) for key, values in trainer.record.history.items()}
    return {"written": sorted(written), "weights": weights(trainer), "drawn": drawn, "history": history,
            "dice": trainer.logger.get_value("mean_fg_dice", None), "batch": trainer.batch_size}  # fmt: skip


@sampled("family", ["cisfa", "prototypes"], "cisfa")
def test_a_training_of_two_goes_on_bit_for_bit_and_rank_0_writes_alone(workspace, tmp_path, monkeypatch, family):
    name, options = FAMILIES[family]
    whole = in_processes(tmp_path / "whole", loop, name, options)
    assert same_weights(whole[0]["weights"], whole[1]["weights"])
    assert whole[0]["history"] == whole[1]["history"] and whole[0]["dice"] == whole[1]["dice"]
    assert whole[1]["written"] == [] and any("checkpoint_final.pth" in path for path in whole[0]["written"])
    assert [rank["batch"] for rank in whole] == [2, 2]
    assert len(set(whole[0]["drawn"] + whole[1]["drawn"])) == 8, "two epochs of two steps, other images on each rank"

    monkeypatch.setenv("nnUNet_results", str(tmp_path / "killed"))
    halves = in_processes(tmp_path / "half", loop, name, options, 1)
    rest = in_processes(tmp_path / "rest", loop, name, options, None, True)
    for rank in range(2):
        assert halves[rank]["drawn"] + rest[rank]["drawn"] == whole[rank]["drawn"]
        assert same_weights(rest[rank]["weights"], whole[rank]["weights"])
    assert rest[0]["history"] == whole[0]["history"]

    monkeypatch.setenv("nnUNet_results", str(tmp_path / "killed"))
    final = next((tmp_path / "killed").rglob("checkpoint_final.pth"))
    final.rename(final.with_name("checkpoint_latest.pth"))
    alone = make_trainer(name, "four", **options)
    alone.load_checkpoint(str(final.with_name("checkpoint_latest.pth")))
    assert same_weights(weights(alone), whole[0]["weights"]) and alone.checkpoints.random_state is None


def not_finite(rank: int) -> list[str]:
    trainer = make_trainer("EntMinTrainer", "four")
    if rank == 1:
        segment = trainer.segment
        trainer.segment = lambda images: [level * math.nan for level in segment(images)]
    begun = time.monotonic()
    try:
        trainer.run_training()
    except NonFiniteLossError as error:
        return [str(error), trainer.current_epoch, time.monotonic() - begun < 240]
    return []


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_with_one_message(workspace, tmp_path):
    first, second = in_processes(tmp_path, not_finite)
    assert first == second and "the loss term 'segmentation' became nan in epoch 0" in first[0] and first[2]


def signalled(rank: int) -> Any:
    trainer = make_trainer("SourceOnlyTrainer", "four")
    step = trainer.train_step

    def train_step(batch: dict) -> dict:
        if rank == 1 and trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # a cluster need not warn all processes at one moment
        return step(batch)

    trainer.train_step = train_step
    try:
        trainer.run_training()
    except SystemExit as end:
        return end.code, len(trainer.record.steps), weights(trainer)
    return None


def test_a_signal_to_one_rank_ends_both_after_the_same_step(workspace, tmp_path):
    first, second = in_processes(tmp_path, signalled)
    assert first[:2] == second[:2] == (128 + signal.SIGTERM, 1) and same_weights(first[2], second[2])
    checkpoint = next((tmp_path / "results").rglob("checkpoint_latest.pth"))
    content = torch.load(checkpoint, weights_only=False)
    assert content["current_epoch"] == 1 and len(content["uda"]["random_state"]) == 2


def shares(rank: int) -> Any:
    torch.manual_seed(rank)  # as processes are that were started by themselves
    trainer = make_trainer("CISFATrainer", "four", foreground_oversampling=0.5, seed=None)
    trainer.on_train_start()
    source, target = next(trainer.dataloader_train), next(trainer.dataloader_target)
    return {"source": source["data"], "target": target["data"], "oversampled": trainer.oversample_foreground_percent,
            "loss": trainer.loss.weight_factors, "weights": weights(trainer)}  # fmt: skip


def test_each_rank_loads_its_share_and_draws_its_own(workspace, tmp_path):
    first, second = in_processes(tmp_path, shares)
    for name in ("source", "target"):
        assert first[name].shape == second[name].shape == (2, 1, 32, 32)
        assert not torch.equal(first[name], second[name])
    assert (first["oversampled"], second["oversampled"]) == (0, 1), "the second half of the batch, as with one process"
    assert first["loss"][-1] == 0
    assert same_weights(first["weights"], second["weights"]), "without a seed, too"


def first_images(rank: int) -> Tensor:
    trainer = make_trainer("SourceOnlyTrainer", "four", foreground_oversampling=0.0)
    trainer.on_train_start()
    return next(trainer.dataloader_train)["data"]


def test_one_seed_gives_each_rank_images_of_its_own_again_and_again(workspace, tmp_path):
    first, second = in_processes(tmp_path / "once", first_images)
    assert not torch.equal(first, second)
    again = in_processes(tmp_path / "twice", first_images)
    assert torch.equal(again[0], first) and torch.equal(again[1], second)


def refused(rank: int, name: str, plans: str, options: dict[str, Any]) -> str:
    trainer = make_trainer(name, plans, **options)
    try:
        trainer.on_train_start()
    except UDAError as error:
        return str(error)
    return ""


def test_unequal_shares_and_batch_statistics_on_the_cpu_are_refused(workspace, tmp_path):
    for text in in_processes(tmp_path / "3", refused, "SourceOnlyTrainer", "four", {}, number=3):
        assert "the batch size 4 cannot be shared equally by 3 processes" in text
    trained = UUDS | {"uuds__clip_batch_statistics": "trained"}
    for text in in_processes(tmp_path / "norm", refused, "UUDSTrainer", "four", trained):
        assert "batch norm layers" in text and "uuds.clip_batch_statistics=frozen" in text


def validated(rank: int) -> list[str]:
    trainer = make_trainer("CISFATrainer", "four", fold="all", num_epochs=1)
    trainer.run_training()
    trainer.perform_actual_validation()
    return sorted(path.name for path in Path(trainer.output_folder, "validation").iterdir())


@pytest.mark.slow
def test_the_final_validation_is_shared(workspace, tmp_path):
    lists = in_processes(tmp_path, validated)
    cases = [f"mr_Tr{index:02d}.nii.gz" for index in range(5)]
    assert lists[0] == ["about.json", *cases, "summary.json"]


# --- the launcher ----------------------------------------------------------------------------------------------------


def test_who_started_a_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR",
                 "MASTER_PORT"):  # fmt: skip
        monkeypatch.setenv(name, "")  # so that what the command sets is unset again
        monkeypatch.delenv(name)
    assert launch.started_by() is None
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert launch.started_by() is None, "a plain job of one task"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "70123")
    assert launch.started_by() == "srun"
    with pytest.raises(UDAError, match="export MASTER_ADDR=HOST"):
        monkeypatch.setenv("PATH", "")
        launch.adopt_srun()
    monkeypatch.setenv("MASTER_ADDR", "node1")
    launch.adopt_srun()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["5", "1", "8", "30123"]
    assert launch.started_by() == "torchrun", "its variables are there now"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--c", "--val"], "--c and --val exclude each other"),
        (["--c", "-pretrained_weights", "x"], "--c and -pretrained_weights exclude"),
        (["-pretrained_weights", "absent.pth"], "absent.pth does not exist"),
        (["-num_processes", "0"], "-num_processes must be at least 1"),
    ],
)
def test_the_launcher_refuses(options, words):
    with pytest.raises(UDAError, match=words):
        train.parse_arguments(["501", "2d", "0", "-tr", "SourceOnlyTrainer", *options])


def test_pretrained_weights_are_read_on_any_device(tmp_path):
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    wanted = {key: torch.full_like(value, 3.0) for key, value in network.state_dict().items()}
    torch.save({"network_weights": wanted}, tmp_path / "c.pth")
    fold.load_pretrained(network, tmp_path / "c.pth", {})
    assert all((value == 3).all() for value in network.state_dict().values())
    torch.save({"network_weights": wanted | {"0.weight": torch.zeros(3, 2)}}, tmp_path / "c.pth")
    with pytest.raises(UDAError, match=r"0.weight is of shape \(3, 2\), this network's has shape \(2, 2\)"):
        fold.load_pretrained(network, tmp_path / "c.pth", {})


def test_pretrained_segmentation_layers_are_taken_for_the_same_structures_alone(tmp_path, capsys):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.ModuleDict({"stages": nn.Linear(2, 2), "seg_layers": nn.ModuleList([nn.Linear(2, 3)])})

    labels = {"background": 0, "a": 1, "b": 2}
    wanted = {key: torch.full_like(value, 3.0) for key, value in Network().state_dict().items()}
    for theirs, taken in ((labels, True), ({"background": 0, "b": 1, "a": 2}, False), (None, False)):
        init_args = {} if theirs is None else {"dataset_json": {"labels": theirs}}
        torch.save({"network_weights": wanted, "init_args": init_args}, tmp_path / "c.pth")
        network = Network()
        fold.load_pretrained(network, tmp_path / "c.pth", labels)
        assert (network.decoder["stages"].weight == 3).all()
        assert bool((network.decoder["seg_layers"][0].weight == 3).all()) == taken
        assert ("all of them" if taken else "all but the segmentation layers") in capsys.readouterr().out


def test_memory_is_the_most_of_all_starts_and_time_their_sum(tmp_path):
    path = tmp_path / "cost.json"
    fold.write_cost(path, torch.device("cpu"))
    first = json.loads(path.read_text())["peak_memory_gib"]
    assert 0.05 < first < 100
    path.write_text(json.dumps({"peak_memory_gib": 1000.0, "cpu_seconds": 1e6}))
    before = time.process_time()
    fold.write_cost(path, torch.device("cpu"))
    found = json.loads(path.read_text())
    assert found["peak_memory_gib"] == 1000.0 and before <= found["cpu_seconds"] - 1e6 <= time.process_time()


@pytest.mark.slow
def test_the_launcher_trains_and_validates_again(workspace):
    words = ("nnUNetUDA_train", "501", "2d", "0", "-tr", "CISFATrainer", "-p", "four", "-device", "cpu",
             "-num_processes", "2")  # fmt: skip
    variables = {"nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1"}
    fold = workspace.fold_folder("CISFATrainer", "four")
    done = workspace.run_apart(*words, **variables)
    assert (fold / "checkpoint_final.pth").exists() and (fold / "validation" / "summary.json").exists()
    assert len(list(fold.glob("training_log_*.txt"))) == 1 and (fold / "training_cost.json").exists()
    assert done.stdout.count("Training done.") == 1
    assert np.isfinite(json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"])
    workspace.run_apart(*words, "--val", **variables)

    bad = workspace.run_apart(
        *words[:3], "1", *words[4:], "-pretrained_weights", "absent.pth", check=False, **variables
    )
    assert bad.returncode == 1 and bad.stderr.count("ERROR: -pretrained_weights absent.pth does not exist") == 1
    assert "Traceback" not in bad.stderr


@pytest.mark.slow
def test_torchrun_starts_the_processes(workspace):
    words = ("torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", "nnUNetUDA_train", "501", "2d", "0",
             "-tr", "SourceOnlyTrainer", "-p", "four", "-device", "cpu")  # fmt: skip
    workspace.run_apart(*words, nnUNet_n_proc_DA="0", OMP_NUM_THREADS="1")
    assert (workspace.fold_folder("SourceOnlyTrainer", "four") / "validation" / "summary.json").exists()
