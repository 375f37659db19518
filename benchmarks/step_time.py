"""Time, passes and memory of one training step of several trainers on the same plans and batches.

The dataset must be planned and preprocessed, and the plans written by ``nnUNetUDA_configure``. Steps are timed on
batches drawn beforehand, in rounds that take the trainers in turn, so that a slow moment of the machine meets all of
them; in each round every pass of the step's networks is also repeated alone (``passes.py``). A step's overhead is what
it takes beyond the sum of those: losses, optimisers, logging. Nothing is written into nnU-Net's folders.

    python benchmarks/step_time.py -d 501 -p nnUNetPlansDemo -tr nnUNetTrainer SourceOnlyTrainer CISFATrainer --passes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from passes import convolution_peak, record_passes, synchronise

from nnunet_uda.data.convention import dataset_name, environment_folder, read_json
from nnunet_uda.errors import command

BATCHES = 4


def make_trainer(name: str, dataset: str, plans: dict, configuration: str, device: torch.device):
    """A trainer ready to step, found as nnU-Net finds it."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    dataset_json = read_json(environment_folder("nnUNet_preprocessed") / dataset / "dataset.json")
    trainer_class = nnUNetTrainer if name == "nnUNetTrainer" else recursive_find_trainer_class_by_name(name)
    trainer = trainer_class(plans | {"continue_training": False}, configuration, 0, dataset_json, device)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


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


class Measured:
    """A trainer, its recorded passes and its times so far."""

    def __init__(self, name: str, trainer, device: torch.device, steps: int) -> None:
        self.name, self.trainer, self.device = name, trainer, device
        self.batches = [next(trainer.dataloader_train) for _ in range(BATCHES)]
        if getattr(trainer, "needs_target", False):
            targets = [next(trainer.dataloader_target) for _ in range(BATCHES)]
            trainer.dataloader_target = iter(targets * (steps + BATCHES))
        for batch in self.batches[:2]:
            trainer.train_step(batch)
        self.passes = record_passes(trainer, self.batches[0])
        self.flops = [one.flops() for one in self.passes]
        self.times: list[float] = []
        self.pass_times: list[list[tuple[float, float]]] = [[] for _ in self.passes]
        self.peak = 0

    def round(self, step: int) -> None:
        synchronise(self.device)
        start = time.perf_counter()
        self.trainer.train_step(self.batches[step % BATCHES])
        synchronise(self.device)
        self.times.append(time.perf_counter() - start)
        for one, times in zip(self.passes, self.pass_times, strict=True):
            times.append(one.run())

    def figures(self, conv_peak: float) -> dict:
        bare = [sum(map(sum, times)) for times in zip(*self.pass_times, strict=True)]
        median = statistics.median(self.times)
        overhead = statistics.median(step / passes for step, passes in zip(self.times, bare, strict=True)) - 1
        return {
            "seconds": self.times, "median": median, "bare_median": statistics.median(bare), "overhead": overhead,
            "flops": sum(self.flops), "share_of_peak": sum(self.flops) / median / conv_peak, "peak_bytes": self.peak,
            "passes": [
                {"name": one.name, "shape": one.shape, "kind": one.kind, "flops": flops,
                 "forward": statistics.median(f for f, _ in times), "backward": statistics.median(b for _, b in times)}
                for one, flops, times in zip(self.passes, self.flops, self.pass_times, strict=True)
            ],
        }  # fmt: skip


class _Timed:
    """An iterator that adds up the time spent in it."""

    def __init__(self, inner: Iterator) -> None:
        self.inner, self.seconds = inner, 0.0

    def __next__(self):
        start = time.perf_counter()
        item = next(self.inner)
        self.seconds += time.perf_counter() - start
        return item


def loader_wait(trainer, steps: int, device: torch.device) -> float:
    """Share of the time of ``steps`` steps that a training with live loaders waits for batches."""
    source = _Timed(trainer.dataloader_train)
    loaders = [source]
    if getattr(trainer, "needs_target", False):
        trainer.dataloader_target = _Timed(trainer.dataloader_target)
        loaders.append(trainer.dataloader_target)
    for _ in range(3):
        trainer.train_step(next(source))
    for loader in loaders:
        loader.seconds = 0.0
    synchronise(device)
    start = time.perf_counter()
    for _ in range(steps):
        trainer.train_step(next(source))
    synchronise(device)
    return sum(loader.seconds for loader in loaders) / (time.perf_counter() - start)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-p", nargs="+", default=["nnUNetPlans"], help="plans, one or several [nnUNetPlans]")
    parser.add_argument("-c", default="2d", help="configuration [2d]")
    parser.add_argument("-tr", nargs="+", default=["nnUNetTrainer", "SourceOnlyTrainer", "CISFATrainer"],
                        help="trainers to compare; the first is what the others are compared with")  # fmt: skip
    parser.add_argument("-steps", type=int, default=20, help="timed steps of each trainer [20]")
    parser.add_argument("-live", type=int, default=0, help="also time so many steps with live loaders, whose number of "
                        "workers nnUNet_n_proc_DA says, and report the wait for them [0]")  # fmt: skip
    parser.add_argument("-threads", type=int, default=os.cpu_count() or 1, help="CPU threads [all]")
    parser.add_argument("-device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--passes", action="store_true", help="list every pass of every step")
    parser.add_argument("-o", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    workers = os.environ.get("nnUNet_n_proc_DA")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dataset = dataset_name(args.d)
    folder = environment_folder("nnUNet_preprocessed") / dataset

    figures = {}
    with tempfile.TemporaryDirectory() as results, redirect_stdout(StringIO()):
        os.environ["nnUNet_results"] = results
        os.environ["nnUNet_n_proc_DA"] = "0"
        measured = {}
        for name in args.tr:
            for plans in args.p:
                trainer = make_trainer(name, dataset, read_json(folder / f"{plans}.json"), args.c, device)
                measured[name, plans] = Measured(name, trainer, device, args.steps)
        conv_peak = convolution_peak(device)
        for step in range(args.steps):
            for one in measured.values():
                one.round(step)
        for one in measured.values():
            one.peak = peak_bytes(one.trainer, one.batches[0], device)
        figures = {key: one.figures(conv_peak) for key, one in measured.items()}
        del measured
        if args.live:
            if workers is None:
                del os.environ["nnUNet_n_proc_DA"]
            else:
                os.environ["nnUNet_n_proc_DA"] = workers
            for name, plans in figures:
                trainer = make_trainer(name, dataset, read_json(folder / f"{plans}.json"), args.c, device)
                figures[name, plans]["loader_wait"] = loader_wait(trainer, args.live, device)
                trainer.on_train_end()

    print(f"{dataset}, {args.c}, {device}, {args.threads} threads, {args.steps} steps each; 3 x 3 convolutions reach "
          f"{conv_peak / 1e9:.0f} GFLOP/s here")  # fmt: skip
    rows = []
    for (name, plans), found in figures.items():
        first = figures[args.tr[0], plans]["median"]
        low, high = min(found["seconds"]), max(found["seconds"])
        wait = f"{100 * found['loader_wait']:.1f} %" if "loader_wait" in found else ""
        rows.append([
            name, plans, f"{1e3 * found['median']:.0f} ({1e3 * low:.0f}, {1e3 * high:.0f})",
            f"{found['median'] / first:.2f}", f"{1e3 * found['bare_median']:.0f}", f"{100 * found['overhead']:.0f} %",
            f"{found['flops'] / 1e9:.1f}", f"{100 * found['share_of_peak']:.0f} %", wait,
            f"{found['peak_bytes'] / 2**20:.0f}",
        ])  # fmt: skip
    print_table(
        ["trainer", "plans", "ms a step: median (fastest, slowest)", f"times {args.tr[0]}", "its passes alone, ms",
         "overhead", "GFLOP", "share of peak", "loader wait", "peak MiB"],
        rows,
    )  # fmt: skip
    if args.passes:
        for (name, plans), found in figures.items():
            print(f"\n{name}, {plans}:\n")
            print_table(
                ["pass", "input", "gradients", "forward ms", "backward ms", "GFLOP"],
                [[p["name"], p["shape"], p["kind"], f"{1e3 * p['forward']:.1f}", f"{1e3 * p['backward']:.1f}",
                  f"{p['flops'] / 1e9:.2f}"] for p in found["passes"]],
            )  # fmt: skip
    if args.o:
        listed = [{"trainer": name, "plans": plans, **found} for (name, plans), found in figures.items()]
        args.o.write_text(json.dumps({"convolution_peak": conv_peak, "runs": listed}, indent=1))


if __name__ == "__main__":
    main()
