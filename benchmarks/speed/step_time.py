"""Time and memory of one training step of several trainers on the same plans and batches.

The dataset must be planned and preprocessed, and the plans written by ``nnUNetUDA_configure``. Steps are timed on
batches drawn beforehand, in rounds that take the trainers in turn, so that a slow moment of the machine meets all of
them. Nothing is written into nnU-Net's folders.

    python -m benchmarks.speed.step_time -d 501 -p nnUNetPlansDemo -tr nnUNetTrainer SourceOnlyTrainer CISFATrainer
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from nnunet_uda.data.convention import dataset_name, environment_folder, read_json
from nnunet_uda.errors import command
from nnunet_uda.methods import trainers_folder

BATCHES = 4


def make_trainer(
    name: str, dataset: str, plans: dict, configuration: str, device: torch.device, last_epoch: bool = False,
    fold: str | int = 0,
):  # fmt: skip
    """A trainer ready to step, found as nnU-Net finds it; with ``last_epoch`` as at the end of its schedule.

    Then no warm-up is left, CUT trains its segmenter, and CAST's pseudo labels have their full weight.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    os.environ.setdefault("nnUNet_extTrainer", str(trainers_folder()))
    dataset_json = read_json(environment_folder("nnUNet_preprocessed") / dataset / "dataset.json")
    trainer_class = nnUNetTrainer if name == "nnUNetTrainer" else recursive_find_trainer_class_by_name(name)
    fold = fold if fold == "all" else int(fold)
    trainer = trainer_class(plans | {"continue_training": False}, configuration, fold, dataset_json, device)
    trainer.on_train_start()
    if last_epoch:
        trainer.current_epoch = trainer.num_epochs - 1
    trainer.on_train_epoch_start()
    return trainer


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock tells what it has done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def most_held(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors at once during ``run``; on CUDA those from before it included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated()
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def modules(trainer) -> dict[str, torch.nn.Module]:
    """All networks of a trainer, nnU-Net's own or ours."""
    return {"network": trainer.network, **dict(getattr(trainer, "networks", {}))}


def optimizers(trainer) -> dict[str, torch.optim.Optimizer]:
    """All optimisers of a trainer, nnU-Net's own or ours."""
    return getattr(trainer, "optimizers", {"network": trainer.optimizer})


def peak_bytes(trainer, batch: dict, device: torch.device) -> int:
    """Most memory that tensors held during one step, the trainer's own weights and optimisers included."""
    peak = most_held(lambda: trainer.train_step(batch), device)
    if device.type == "cuda":
        return peak
    fixed = {t.data_ptr(): t.nbytes for m in modules(trainer).values() for t in [*m.parameters(), *m.buffers()]}
    states = [state for optimizer in optimizers(trainer).values() for state in optimizer.state.values()]
    moments = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    return peak + sum(fixed.values()) + sum(t.nbytes for t in moments)


@contextmanager
def environment(variables: dict[str, str | None]) -> Iterator[None]:
    """Environment variables inside, None unset; as before afterwards."""

    def change(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    before = {name: os.environ.get(name) for name in variables}
    change(variables)
    try:
        yield
    finally:
        change(before)


@contextmanager
def set_aside(workers: str | None) -> Iterator[None]:
    """nnU-Net's results in a folder that is removed afterwards, its loaders with ``workers`` processes (None: as many
    as it chooses), and its output nowhere."""
    with tempfile.TemporaryDirectory() as results, redirect_stdout(StringIO()):
        with environment({"nnUNet_results": results, "nnUNet_n_proc_DA": workers}):
            yield


def measure_steps(
    names: Sequence[str], dataset: str, plans: dict, configuration: str, device: torch.device, steps: int,
    last_epoch: bool = False,
) -> list[dict]:  # fmt: skip
    """Time ``steps`` steps of every trainer, taken in turn: its ``seconds`` and the most memory of its tensors."""
    with set_aside("0"):
        trainers = [make_trainer(name, dataset, plans, configuration, device, last_epoch) for name in names]
        batches = []
        for trainer in trainers:
            drawn = [next(trainer.dataloader_train) for _ in range(BATCHES)]
            if getattr(trainer, "needs_target", False):
                trainer.dataloader_target = itertools.cycle([next(trainer.dataloader_target) for _ in range(BATCHES)])
            trainer.dataloader_train = itertools.cycle(drawn)  # of which a step may take more
            batches.append(drawn)
            for batch in drawn[:2]:
                trainer.train_step(batch)
        found = [{"trainer": name, "seconds": []} for name in names]
        for step in range(steps):
            for trainer, drawn, one in zip(trainers, batches, found, strict=True):
                synchronise(device)
                start = time.perf_counter()
                trainer.train_step(drawn[step % BATCHES])
                synchronise(device)
                one["seconds"].append(time.perf_counter() - start)
        for trainer, drawn, one in zip(trainers, batches, found, strict=True):
            one["peak_bytes"] = peak_bytes(trainer, drawn[0], device)
    return found


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-p", default="nnUNetPlans", help="plans [nnUNetPlans]")
    parser.add_argument("-c", default="2d", help="configuration [2d]")
    parser.add_argument("-tr", nargs="+", default=["nnUNetTrainer", "SourceOnlyTrainer", "CISFATrainer"],
                        help="trainers to compare; the first is what the others are compared with")  # fmt: skip
    parser.add_argument("-threads", type=int, default=os.cpu_count() or 1, help="CPU threads [all]")
    parser.add_argument("-device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("-steps", type=int, default=20, help="timed steps of each trainer [20]")
    parser.add_argument("-epoch", choices=("first", "last"), default="first", help="of the schedule: the last one is "
                        "without warm-up [first]")  # fmt: skip
    parser.add_argument("-o", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dataset = dataset_name(args.d)
    plans = read_json(environment_folder("nnUNet_preprocessed") / dataset / f"{args.p}.json")
    device, last = torch.device(args.device), args.epoch == "last"
    figures = measure_steps(args.tr, dataset, plans, args.c, device, args.steps, last)

    print(f"{dataset}, {args.p}, {args.c}, {device}, {args.threads} threads, {args.steps} steps each\n")
    rows = []
    for found in figures:
        median, low, high = (1e3 * one(found["seconds"]) for one in (statistics.median, min, max))
        share = statistics.median(
            own / first for own, first in zip(found["seconds"], figures[0]["seconds"], strict=True)
        )
        peak = found["peak_bytes"] / 2**20
        rows.append([found["trainer"], f"{median:.0f} ({low:.0f}, {high:.0f})", f"{share:.2f}", f"{peak:.0f}"])
    print_table(["trainer", "ms a step: median (fastest, slowest)", f"times {args.tr[0]}", "peak MiB"], rows)
    if args.o:
        args.o.write_text(json.dumps({"plans": args.p, "runs": figures}, indent=1))


if __name__ == "__main__":
    main()
