"""Time, passes and memory of one training step of several trainers on the same plans and batches.

The dataset must be planned and preprocessed, and the plans written by ``nnUNetUDA_configure``. Steps are timed on
batches drawn beforehand, in rounds that take the trainers in turn, so that a slow moment of the machine meets all of
them; in each round every pass of the step's networks is also repeated alone (``passes.py``). A step's overhead is what
it takes beyond the sum of those: losses, optimisers, logging. Nothing is written into nnU-Net's folders.

    python benchmarks/step_time.py -d 501 -p nnUNetPlansDemo -tr nnUNetTrainer SourceOnlyTrainer CISFATrainer --passes
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
from cisfa_code import CISFACodeTrainer
from memory import PROC, peak_resident
from passes import convolution_peak, record_passes, synchronise
from torch.utils.flop_counter import FlopCounterMode

from nnunet_uda.data.convention import dataset_name, environment_folder, read_json
from nnunet_uda.errors import UDAError, command
from nnunet_uda.methods import trainers_folder
from nnunet_uda.workers import as_done

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
    here = {one.__name__: one for one in (nnUNetTrainer, CISFACodeTrainer)}
    trainer_class = here.get(name) or recursive_find_trainer_class_by_name(name)
    trainer = trainer_class(plans | {"continue_training": False}, configuration, fold, dataset_json, device)
    trainer.on_train_start()
    if last_epoch:
        trainer.current_epoch = trainer.num_epochs - 1
    trainer.on_train_epoch_start()
    return trainer


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


class Measured:
    """A trainer, its recorded passes and its times so far."""

    def __init__(self, name: str, trainer, device: torch.device, steps: int) -> None:
        self.name, self.trainer, self.device = name, trainer, device
        self.batches = [next(trainer.dataloader_train) for _ in range(BATCHES)]
        if getattr(trainer, "needs_target", False):
            targets = [next(trainer.dataloader_target) for _ in range(BATCHES)]
            trainer.dataloader_target = iter(targets * (steps + BATCHES))
        trainer.dataloader_train = itertools.cycle(self.batches)  # of which a step may take more
        for batch in self.batches[:2]:
            trainer.train_step(batch)
        self.times: list[float] = []
        self.peak = 0

    def record(self) -> None:
        with FlopCounterMode(display=False) as counter:  # a pass's gradient may be asked for nowhere in the step
            self.passes = record_passes(self.trainer, self.batches[0])
        self.step_flops = counter.get_total_flops()
        self.flops = [one.flops() for one in self.passes]
        self.pass_times: list[list[tuple[float, float]]] = [[] for _ in self.passes]

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
            "flops": self.step_flops, "share_of_peak": self.step_flops / median / conv_peak, "peak_bytes": self.peak,
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
    source = trainer.dataloader_train = _Timed(trainer.dataloader_train)  # of which a step may take more
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
    runs: Sequence[tuple[str, str, dict]],
    dataset: str,
    configuration: str,
    device: torch.device,
    steps: int,
    live: int = 0,
    last_epoch: bool = False,
) -> tuple[float, list[dict]]:
    """Time ``steps`` steps of every run, a trainer's name, the name of its plans and these, taken in turn.

    Returns:
        The operations a second that convolutions reach, and the figures of every run.
    """
    with set_aside("0"):
        measured = [
            Measured(name, make_trainer(name, dataset, plans, configuration, device, last_epoch), device, steps)
            for name, _, plans in runs
        ]
        # what several runs take together would say nothing about one
        resident = {"resident_bytes": peak_resident()} if len(runs) == 1 and PROC.is_dir() else {}
        for one in measured:
            one.record()
        conv_peak = convolution_peak(device)
        for step in range(steps):
            for one in measured:
                one.round(step)
        for one in measured:
            one.peak = peak_bytes(one.trainer, one.batches[0], device)
        figures = [
            {"trainer": name, "plans": plans, **one.figures(conv_peak), **resident}
            for (name, plans, _), one in zip(runs, measured, strict=True)
        ]
        del measured, one
    if live:
        with set_aside(os.environ.get("nnUNet_n_proc_DA")):
            for (name, _, plans), found in zip(runs, figures, strict=True):
                trainer = make_trainer(name, dataset, plans, configuration, device, last_epoch)
                found["loader_wait"] = loader_wait(trainer, live, device)
                trainer.on_train_end()
    return conv_peak, figures


def resident_after_two_steps(run: tuple[str, str, dict, str, str, int, bool]) -> int:
    """Most bytes in memory of this process, to be a fresh one, that makes a trainer and two steps.

    Args:
        run: trainer, dataset, content of the plans, configuration, device, threads, and whether in the last epoch.
    """
    name, dataset, plans, configuration, device, threads, last_epoch = run
    torch.set_num_threads(threads)
    with set_aside("0"):
        where = torch.device(device)
        Measured(name, make_trainer(name, dataset, plans, configuration, where, last_epoch), where, 1)
    return peak_resident()


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def draw_steps(axis, runs: list[dict]) -> None:
    """A bar a run, its passes alone as a mark in it, and the first run's time as a line."""
    several = len({run["plans"] for run in runs}) > 1
    labels = [f"{run['trainer']}\n{run['plans']}" if several else run["trainer"] for run in runs]
    places = range(len(runs))
    axis.barh(places, [1e3 * run["median"] for run in runs], color="C0", alpha=0.6, label="a step")
    axis.plot([1e3 * run["bare_median"] for run in runs], places, "k|", markersize=14, label="its passes alone")
    axis.axvline(1e3 * runs[0]["median"], color="C1", linestyle="--", label=runs[0]["trainer"])
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("ms")
    axis.legend(fontsize=8)


def add_run_arguments(parser: argparse.ArgumentParser, trainers: Sequence[str]) -> None:
    """Options of what is timed: trainers, dataset, plans, device; ``chosen_runs`` reads them."""
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-p", nargs="+", default=["nnUNetPlans"], help="plans, one or several [nnUNetPlans]")
    parser.add_argument("-c", default="2d", help="configuration [2d]")
    parser.add_argument("-tr", nargs="+", default=list(trainers),
                        help="trainers to compare; the first is what the others are compared with")  # fmt: skip
    parser.add_argument("-threads", type=int, default=os.cpu_count() or 1, help="CPU threads [all]")
    parser.add_argument("-device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("-o", type=Path, help="write the figures as JSON")


def chosen_runs(args: argparse.Namespace) -> tuple[str, torch.device, list[tuple[str, str, dict]]]:
    """Dataset, device and (trainer, plans, their content) for each run; PyTorch gets its threads."""
    torch.set_num_threads(args.threads)
    dataset = dataset_name(args.d)
    folder = environment_folder("nnUNet_preprocessed") / dataset
    contents = {plans: read_json(folder / f"{plans}.json") for plans in args.p}
    runs = [(name, plans, content) for name in args.tr for plans, content in contents.items()]
    return dataset, torch.device(args.device), runs


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, ["nnUNetTrainer", "SourceOnlyTrainer", "CISFATrainer"])
    parser.add_argument("-steps", type=int, default=20, help="timed steps of each trainer [20]")
    parser.add_argument("-live", type=int, default=0, help="also time so many steps with live loaders, whose number of "
                        "workers nnUNet_n_proc_DA says, and report the wait for them [0]")  # fmt: skip
    parser.add_argument("-epoch", choices=("first", "last"), default="first", help="of the schedule: the last one is "
                        "without warm-up [first]")  # fmt: skip
    parser.add_argument("--resident", action="store_true", help="also report what a process of its own holds in memory "
                        "with each trainer, PyTorch included (Linux)")  # fmt: skip
    parser.add_argument("--passes", action="store_true", help="list every pass of every step")
    parser.add_argument("-plot", type=Path, help="write a picture of the step times (PNG)")
    args = parser.parse_args(argv)
    if args.resident and not PROC.is_dir():
        raise UDAError(f"--resident reads {PROC}, which only Linux has: leave it out")
    dataset, device, runs = chosen_runs(args)
    conv_peak, figures = measure_steps(runs, dataset, args.c, device, args.steps, args.live, args.epoch == "last")

    print(f"{dataset}, {args.c}, {device}, {args.threads} threads, {args.steps} steps each; 3 x 3 convolutions reach "
          f"{conv_peak / 1e9:.0f} GFLOP/s here\n")  # fmt: skip
    for found, (name, _, plans) in zip(figures, runs, strict=True) if args.resident else ():
        alone = (name, dataset, plans, args.c, args.device, args.threads, args.epoch == "last")
        (found["resident_bytes"],) = as_done(resident_after_two_steps, [alone], 1)
    rows, firsts = [], {found["plans"]: found["median"] for found in reversed(figures)}
    for found in figures:
        low, high = min(found["seconds"]), max(found["seconds"])
        wait = f"{100 * found['loader_wait']:.1f} %" if "loader_wait" in found else ""
        rows.append([
            found["trainer"], found["plans"], f"{1e3 * found['median']:.0f} ({1e3 * low:.0f}, {1e3 * high:.0f})",
            f"{found['median'] / firsts[found['plans']]:.2f}", f"{1e3 * found['bare_median']:.0f}",
            f"{100 * found['overhead']:.0f} %",
            f"{found['flops'] / 1e9:.1f}", f"{100 * found['share_of_peak']:.0f} %", wait,
            f"{found['peak_bytes'] / 2**20:.0f}",
            f"{found['resident_bytes'] / 2**20:.0f}" if "resident_bytes" in found else "",
        ])  # fmt: skip
    print_table(
        ["trainer", "plans", "ms a step: median (fastest, slowest)", f"times {args.tr[0]}", "its passes alone, ms",
         "overhead", "GFLOP", "share of peak", "loader wait", "peak MiB", "process MiB"],
        rows,
    )  # fmt: skip
    if "resident_bytes" in figures[0]:
        print("\nProcess: most that a process held in memory up to its second step, PyTorch included")
    if args.passes:
        for found in figures:
            print(f"\n{found['trainer']}, {found['plans']}:\n")
            print_table(
                ["pass", "input", "gradients", "forward ms", "backward ms", "GFLOP"],
                [[p["name"], p["shape"], p["kind"], f"{1e3 * p['forward']:.1f}", f"{1e3 * p['backward']:.1f}",
                  f"{p['flops'] / 1e9:.2f}"] for p in found["passes"]],
            )  # fmt: skip
    if args.o:
        args.o.write_text(json.dumps({"convolution_peak": conv_peak, "runs": figures}, indent=1))
    if args.plot:
        from nnunet_uda.figures import plt, save_figure

        figure, axis = plt.subplots(figsize=(7, 1 + 0.4 * len(figures)))
        draw_steps(axis, figures)
        figure.tight_layout()
        save_figure(figure, args.plot)


if __name__ == "__main__":
    main()
