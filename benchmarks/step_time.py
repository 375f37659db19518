"""Time and memory of one training step of several trainers on the same plans and batches.

The dataset must be planned and preprocessed, and the plans written by ``nnUNetUDA_configure``. Steps are timed on
batches drawn beforehand, in rounds that take the trainers in turn, so that a slow moment of the machine meets all of
them. Nothing is written into nnU-Net's folders.

    python benchmarks/step_time.py -d 501 -p nnUNetPlansDemo -tr SourceOnlyTrainer CISFATrainer
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from nnunet_uda.data.convention import dataset_name, environment_folder, read_json
from nnunet_uda.errors import command


def make_trainer(name: str, dataset: str, plans: dict, configuration: str, device: torch.device):
    """A trainer ready to step, found as nnU-Net finds it."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    dataset_json = read_json(environment_folder("nnUNet_preprocessed") / dataset / "dataset.json")
    trainer_class = recursive_find_trainer_class_by_name(name)
    trainer = trainer_class(plans | {"continue_training": False}, configuration, 0, dataset_json, device)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(trainer, batch: dict, device: torch.device) -> int:
    """Most memory that tensors held during one step, the trainer's own weights and optimisers included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.train_step(batch)
        synchronise(device)
        return torch.cuda.max_memory_allocated()
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train_step(batch)
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    modules = [trainer.network, *getattr(trainer, "networks", {}).values()]
    optimizers = getattr(trainer, "optimizers", {"network": trainer.optimizer}).values()
    fixed = {t.data_ptr(): t.nbytes for m in modules for t in [*m.parameters(), *m.buffers()]}
    moments = [
        t for o in optimizers for state in o.state.values() for t in state.values() if isinstance(t, torch.Tensor)
    ]
    return peak + sum(fixed.values()) + sum(t.nbytes for t in moments)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-p", default="nnUNetPlans", help="plans [nnUNetPlans]")
    parser.add_argument("-c", default="2d", help="configuration [2d]")
    parser.add_argument("-tr", nargs="+", default=["SourceOnlyTrainer", "CISFATrainer"], help="trainers to compare")
    parser.add_argument("-steps", type=int, default=20, help="timed steps of each trainer [20]")
    parser.add_argument("-threads", type=int, default=os.cpu_count() or 1, help="CPU threads [all]")
    parser.add_argument("-device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("-o", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    os.environ["nnUNet_n_proc_DA"] = "0"
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dataset = dataset_name(args.d)
    plans = read_json(environment_folder("nnUNet_preprocessed") / dataset / f"{args.p}.json")

    with tempfile.TemporaryDirectory() as results, redirect_stdout(StringIO()):
        os.environ["nnUNet_results"] = results
        trainers = {name: make_trainer(name, dataset, plans, args.c, device) for name in args.tr}
        first = next(iter(trainers.values()))
        batches = [next(first.dataloader_train) for _ in range(4)]
        for trainer in trainers.values():
            if getattr(trainer, "needs_target", False):
                targets = [next(trainer.dataloader_target) for _ in range(4)]
                trainer.dataloader_target = iter(targets * (args.steps + 4))
            for batch in batches[:2]:
                trainer.train_step(batch)
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for step in range(args.steps):
            for name, trainer in trainers.items():
                synchronise(device)
                start = time.perf_counter()
                trainer.train_step(batches[step % 4])
                synchronise(device)
                times[name].append(time.perf_counter() - start)
        memory = {name: peak_bytes(trainer, batches[0], device) for name, trainer in trainers.items()}

    reference = statistics.median(times[args.tr[0]])
    figures = {}
    print(f"{dataset}, {args.p}, {args.c}, {device}, {args.threads} threads, {args.steps} steps each")
    print(f"| trainer | ms a step (median) | fastest | slowest | times {args.tr[0]} | peak MiB |")
    print("|---|---|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        figures[name] = {"seconds": values, "median": median, "peak_bytes": memory[name]}
        print(f"| {name} | {1e3 * median:.0f} | {1e3 * min(values):.0f} | {1e3 * max(values):.0f} | "
              f"{median / reference:.2f} | {memory[name] / 2**20:.0f} |")  # fmt: skip
    if args.o:
        args.o.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
