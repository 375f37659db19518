"""Time, memory and losses of training steps on a GPU: mixed precision, torch.compile and channels-last against float32.

One command on a machine with a CUDA device and this project installed:

    python -m benchmarks.gpu -o gpu.json

It makes a phantom beside the JSON, in the folder gpu_work, plans two networks for it (patch 256 and batch 12 with
nnU-Net's default 2D features, patch 160 and batch 4 with CISFA's) and gives every trainer and variant a process of its
own. ``-d`` takes a dataset that is planned and preprocessed instead. What is in the JSON is not measured again, except
for what failed: the same command goes on where it was stopped, and repeats failures.

A variant is a precision with what is added to it: ``fp32`` (without TF32), ``tf32``, ``amp`` (the trainers' own float16
autocast and gradient scaling), then ``+compile`` (what the trainers compile), ``+channels_last`` (networks and images).
Every variant begins with the same weights, batches and random numbers as ``fp32``, which also says what a repetition
alone changes. Loss terms must be those of ``fp32`` within a tolerance, else the exit status is 1. They are compared in
pairs of steps, each pair from the first weights on other batches: the first step shows the losses at equal weights, the
second what the update has made of these. (Over more steps a GAN enlarges any difference: fp32 in another memory format
too.) A gradient scale that overflows would skip an update: such a pair begins anew until the scale holds.

Steps are those of the last epoch, without warm-up, at the first epoch's learning rate, and every pseudo label is
trusted (``SETTINGS``): all of a trainer's loss terms are at work. nnUNetTrainer is at its first epoch. CLIP starts from
random weights. After its steps a trainer validates once: that must pass, and is not timed. ``-device cpu`` serves for a
look at small sizes: there ``amp`` is torch's float16 autocast for the CPU, and both it and ``compile`` are turned on
where nnU-Net leaves them off.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Iterable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet

from benchmarks.accuracy.tasks import TASKS, make_task
from benchmarks.speed.step_time import (
    BATCHES,
    make_trainer,
    modules,
    optimizers,
    peak_bytes,
    print_table,
    set_aside,
    synchronise,
)
from nnunet_uda.data.convention import dataset_name, environment_folder, read_json
from nnunet_uda.demo.road import Demo
from nnunet_uda.errors import UDAError, command
from nnunet_uda.files import write_json
from nnunet_uda.plans import derive_plans, merge_uda
from nnunet_uda.settings import parse_assignment
from nnunet_uda.training.checkpoint import seed_everything
from nnunet_uda.training.streams import without_stopwatch

SIZES: dict[str, dict[str, Any]] = {
    "nnunet": {"patch_size": [256, 256], "batch_size": 12, "base_features": 32, "max_features": 512},
    "cisfa": {"patch_size": [160, 160], "batch_size": 4, "base_features": 64, "max_features": 1024, "stages": 5},
}
"""What ``derive_plans`` makes of the dataset's plans. Generators and discriminators have their default sizes: 64
channels, 9 blocks, 256 patches."""
TRAINERS = ("nnUNetTrainer", "CISFATrainer", "SimilarityPrototypesTrainer", "UUDSAdversarialTrainer", "CASTTrainer")
REFERENCE = "fp32"
VARIANTS = (REFERENCE, "tf32", "amp", "amp+compile", "amp+channels_last", "amp+compile+channels_last")
PRECISIONS, ADDITIONS = ("fp32", "tf32", "amp"), ("compile", "channels_last")
SETTINGS = {
    "seed": 0,
    "segmenter_schedule": "constant",
    "similarity_prototypes.confidence": 0.0,
    "uuds.clip_weights": "random",
    "uuds.threshold": 1.0,
    "cast.confidence": 0.0,
}
PHANTOM, PLANS, SLICE = "phantom_mr2ct", "nnUNetPlansGPU", "256"
SCALES = 24
"""How often steps begin anew with half the gradient scale, at most: from 65536 to below 0.01."""


# -- one trainer, one variant, in a process of its own ---------------------------------------------------------------


def choose_numerics(variant: str, device: torch.device) -> None:
    """What is set before a trainer exists: compilation, TF32, what nnU-Net's autocast casts to, the same batches."""
    precision, *additions = variant.split("+")
    original = nnunet.nnUNetTrainer.get_training_transforms
    nnunet.nnUNetTrainer.get_training_transforms = staticmethod(lambda *a, **k: without_stopwatch(original(*a, **k)))
    nnunet.nnUNetTrainer._do_i_compile = lambda self: "compile" in additions
    if device.type == "cuda":
        torch.set_num_threads(1)  # these two as nnUNetv2_train
        torch.backends.cudnn.benchmark = True
        if precision != "amp":
            torch.set_autocast_dtype("cuda", torch.float32)  # autocast stays where it is, and casts nothing
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def adopt_variant(trainer: Any, variant: str, device: torch.device) -> None:
    """What a variant changes in a trainer: gradient scaling and the memory format of its networks."""
    precision, *additions = variant.split("+")
    if precision != "amp":
        trainer.grad_scaler = None
    elif device.type == "cpu":
        trainer.grad_scaler = torch.amp.GradScaler("cpu")
        trainer.autocast = nnunet.dummy_context = partial(torch.autocast, "cpu", torch.float16)
    if "channels_last" in additions:
        for module in modules(trainer).values():
            module.to(memory_format=torch.channels_last)


def saved_state(trainer: Any) -> dict[str, Any]:
    """Copies of all weights, buffers and optimisers, weights on the CPU."""
    held = modules(trainer).items()
    weights = {n: {key: t.detach().cpu().clone() for key, t in m.state_dict().items()} for n, m in held}
    return {
        "modules": weights,
        "optimizers": {n: copy.deepcopy(o.state_dict()) for n, o in optimizers(trainer).items()},
    }


def restore(trainer: Any, state: dict[str, Any]) -> None:
    for name, module in modules(trainer).items():
        module.load_state_dict(state["modules"][name])
    for name, optimizer in optimizers(trainer).items():
        optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))


def draw_batches(loader: Any, device: torch.device, memory_format: torch.memory_format) -> list[dict[str, Any]]:
    """Batches on the device, the images in a memory format."""
    batches = []
    for batch in itertools.islice(loader, BATCHES):
        label = batch.get("target")
        label = [item.to(device) for item in label] if isinstance(label, list) else label
        label = label.to(device) if isinstance(label, torch.Tensor) else label
        batches.append({"data": batch["data"].to(device).to(memory_format=memory_format), "target": label})
    return batches


class Steps:
    """A trainer with its batches: steps from any of them on, with the same random numbers for the same batch."""

    def __init__(self, trainer: Any, seed: int, memory_format: torch.memory_format) -> None:
        self.trainer, self.seed = trainer, seed
        seed_everything(seed)
        self.sources = draw_batches(trainer.dataloader_train, trainer.device, memory_format)
        self.targets = []
        if getattr(trainer, "needs_target", False):
            self.targets = draw_batches(trainer.dataloader_target, trainer.device, memory_format)

    def scale(self) -> float | None:
        scaler = self.trainer.grad_scaler
        return None if scaler is None else scaler.get_scale()

    def run(self, batches: Iterable[int]) -> tuple[list[dict[str, float]], list[float]]:
        """Loss terms and seconds of a step on each of these batches, whose numbers go round."""
        trainer, losses, seconds = self.trainer, [], []
        for number in batches:
            trainer.dataloader_target = iter(self.targets[number % BATCHES :][:1])
            trainer.dataloader_train = itertools.cycle(self.sources[number % BATCHES :] + self.sources)  # for more
            seed_everything(self.seed + number)
            synchronise(trainer.device)
            start = time.perf_counter()
            outputs = trainer.train_step(self.sources[number % BATCHES])
            synchronise(trainer.device)
            seconds.append(time.perf_counter() - start)
            losses.append({name: float(value) for name, value in outputs.items()})
        return losses, seconds

    def compared(self, pairs: int, state: dict[str, Any]) -> tuple[list[list[dict[str, float]]], int]:
        """Loss terms of pairs of steps, each from ``state`` on, that skip no update; how often one began anew."""
        losses, restarts = [], 0
        while len(losses) < pairs:
            restore(self.trainer, state)
            scale = self.scale()
            pair, _ = self.run([len(losses), len(losses) + 1])
            if self.scale() == scale:
                losses.append(pair)
            elif restarts == SCALES:
                raise UDAError(f"gradients overflow at every scale down to {self.scale():g}: are some infinite or NaN?")
            else:
                restarts += 1
        return losses, restarts


def measure(job: dict[str, Any], plans: dict[str, Any], dataset: str) -> dict[str, Any]:
    """Time, memory and losses of one trainer in one variant; this process does nothing else."""
    device, variant = torch.device(job["device"]), job["variant"]
    channels_last = "channels_last" in variant.split("+")
    choose_numerics(variant, device)
    seed_everything(job["seed"])
    last = job["trainer"] != "nnUNetTrainer"  # its learning rate has no other schedule than down to 0
    trainer = make_trainer(job["trainer"], dataset, plans, "2d", device, last)
    adopt_variant(trainer, variant, device)
    steps = Steps(trainer, job["seed"], torch.channels_last if channels_last else torch.contiguous_format)

    state = saved_state(trainer)
    weights = sum(t.double().abs().sum().item() for m in state["modules"].values() for t in m.values())
    images = sum(batch["data"].double().abs().sum().item() for batch in steps.sources + steps.targets)
    _, [first, *_] = steps.run(range(1))  # torch compiles, cuDNN chooses
    losses, restarts = steps.compared(job["pairs"], state)
    scale = steps.scale()
    again = steps.compared(job["pairs"], state)[0] if variant == REFERENCE else None
    _, seconds = steps.run(range(job["steps"]))
    found = {
        "seconds": seconds, "median": statistics.median(seconds), "first_step": first, "losses": losses,
        "losses_again": again, "restarts": restarts, "scale": scale, "weights": weights, "images": images,
    }  # fmt: skip
    trainer.dataloader_target = iter(steps.targets)
    found["peak_bytes"] = peak_bytes(trainer, steps.sources[0], device)
    if device.type == "cuda":
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    if "compile" in variant.split("+"):
        found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    trainer.on_validation_epoch_start()
    trainer.on_validation_epoch_end([trainer.validation_step(steps.sources[0])])
    return found


def measure_apart(job: dict[str, Any], plans: dict[str, Any], dataset: str, answers: Connection) -> None:
    """``measure`` in this process; whatever it raises becomes an answer too."""
    try:
        with set_aside("0"):
            found = measure(job, plans, dataset)
    except Exception as error:  # out of memory, a compiler's failure: a row of the table
        first_line = (str(error).strip().splitlines() or [""])[0]
        found = {"error": f"{type(error).__name__}: {first_line}", "traceback": traceback.format_exc()}
    answers.send(found)


def in_process(job: dict[str, Any], plans: dict[str, Any], dataset: str) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure_apart, args=(job, plans, dataset, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        found = {"error": f"the process ended with status {process.exitcode}"}
    process.join()
    return found


# -- what is compared ------------------------------------------------------------------------------------------------


def allowed(expected: float, step: int, rtol: float, atol: float) -> float:
    """How much a loss term of a pair's step 1 may differ, and twice as much in step 2."""
    return step * (atol + rtol * abs(expected))


def differences(
    losses: list[list[dict[str, float]]], expected: list[list[dict[str, float]]], rtol: float, atol: float
) -> list[tuple[float, str, int, int, float, float]]:
    """``(share of the allowed difference, term, pair, step, found, expected)`` of all terms, the largest share first.

    Raises:
        UDAError: other terms, or another number of pairs.
    """
    terms = [[sorted(step) for step in pair] for pair in losses]
    if terms != [[sorted(step) for step in pair] for pair in expected]:
        raise UDAError(f"the steps' loss terms are other ones than those of {REFERENCE}: {terms[0][0]} in the first")
    found = []
    for pair, steps in enumerate(zip(losses, expected, strict=True), 1):
        for step, (ours, theirs) in enumerate(zip(*steps, strict=True), 1):
            for term, value in theirs.items():
                share = abs(ours[term] - value) / allowed(value, step, rtol, atol)
                found.append((share, term, pair, step, ours[term], value))
    return sorted(found, key=lambda item: (math.isnan(item[0]), item[0]), reverse=True)


def judge(row: dict[str, Any], reference: dict[str, Any] | None, rtol: float, atol: float) -> tuple[str, str | None]:
    """A cell for the table on the losses of a row, and a line where they are not what they should be."""
    job = row["job"]
    name = f"{job['trainer']}, {job['size']}, {job['variant']}"
    if "error" in row:
        return row["error"], f"{name}: {row['error']}"
    if reference is None or "error" in reference:
        return f"not compared: no {REFERENCE}", None
    for key in ("weights", "images"):
        if abs(row[key] - reference[key]) > 1e-5 * abs(reference[key]):
            return f"other {key}", f"{name}: begins with other {key} than {REFERENCE}, so nothing can be compared"
    losses = row["losses_again"] if row is reference else row["losses"]
    share, term, pair, step, found, expected = differences(losses, reference["losses"], rtol, atol)[0]
    cell = f"{share:.2f} ({term}, pair {pair}, step {step}: {found:.4g}, {expected:.4g})"
    if share <= 1:
        return cell, None
    return cell, (
        f"{name}: '{term}' of pair {pair}, step {step} is {found:.6g}, with {REFERENCE} {expected:.6g}; a difference "
        f"of at most {allowed(expected, step, rtol, atol):.2g} is allowed"
    )


def report(rows: list[dict[str, Any]], rtol: float, atol: float) -> list[str]:
    """Print the table; returns a line for every row that is not as it should be."""
    references = {(r["job"]["size"], r["job"]["trainer"]): r for r in rows if r["job"]["variant"] == REFERENCE}
    table, faults = [], []
    for row in rows:
        job = row["job"]
        reference = references.get((job["size"], job["trainer"]))
        cell, fault = judge(row, reference, rtol, atol)
        faults += [fault] if fault else []
        measured = [""] * 5
        if "error" not in row:
            compared = reference is not None and "error" not in reference
            low, high = min(row["seconds"]), max(row["seconds"])
            measured = [
                f"{1e3 * row['median']:.1f} ({1e3 * low:.1f}, {1e3 * high:.1f})",
                f"{row['median'] / reference['median']:.2f}" if compared else "",
                f"{row['peak_bytes'] / 2**20:.0f}",
                f"{row['peak_bytes'] / reference['peak_bytes']:.2f}" if compared else "",
                f"{row['first_step']:.1f}",
            ]
        table.append([job["size"], job["trainer"], job["variant"], *measured, cell])
    print_table(
        ["size", "trainer", "variant", "ms a step: median (fastest, slowest)", f"times {REFERENCE}", "peak MiB",
         f"times {REFERENCE}", "first step, s", "largest share of the allowed difference (where: found, expected)"],
        table,
    )  # fmt: skip
    return faults


# -- set-up ----------------------------------------------------------------------------------------------------------


def check_variant(text: str, device: str) -> str:
    precision, *additions = text.split("+")
    if precision not in PRECISIONS or any(additions.count(one) != 1 or one not in ADDITIONS for one in additions):
        raise UDAError(
            f"-variants: {text!r} is none; give one of {', '.join(PRECISIONS)}, with +{' or +'.join(ADDITIONS)} or both"
        )
    if precision == "tf32" and device != "cuda":
        raise UDAError("-variants: tf32 is for CUDA devices only")
    return "+".join([precision, *sorted(additions, key=ADDITIONS.index)])


def make_dataset(folder: Path, processes: int) -> tuple[str, str]:
    """A phantom with slices of 256 x 256, planned and preprocessed, as this process's dataset: its name, its plans."""
    make_task(PHANTOM, folder, 0, None, processes)
    demo, number = Demo(folder), str(TASKS[PHANTOM].dataset)
    whole = folder / "resampled.json"
    if not whole.exists():
        demo.run("nnUNetUDA_configure", "-d", number, "-p", PLANS, "-slice_size", SLICE, SLICE, "--overwrite")
        demo.run("nnUNetv2_preprocess", "-d", number, "-plans_name", PLANS, "-c", "2d", "-np", processes)
        demo.run("nnUNetUDA_preprocess", "-d", number, "-p", PLANS, "-c", "2d", "-np", processes)
        write_json({"slice_size": int(SLICE)}, whole)
    os.environ.update(demo.variables)
    return dataset_name(number), PLANS


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    if device == "cpu":
        return versions | {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return versions | {
        "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, default=Path("gpu.json"), help="the figures, also of earlier runs [gpu.json]")
    parser.add_argument("-d", help="dataset id or name below nnUNet_preprocessed [a phantom, made beside the JSON]")
    parser.add_argument("-p", default="nnUNetPlans", help="with -d: the plans whose images are used [nnUNetPlans]")
    parser.add_argument("-tr", nargs="+", default=list(TRAINERS), help=f"trainers [{' '.join(TRAINERS)}]")
    parser.add_argument("-sizes", nargs="+", choices=SIZES, default=list(SIZES), help=f"[{' '.join(SIZES)}]")
    parser.add_argument("-patch", type=int, help="edge of the square patch, instead of the sizes' own")
    parser.add_argument("-batch", type=int, help="batch size, likewise")
    parser.add_argument("-base_features", type=int, help="channels of the segmenter's first stage, likewise")
    parser.add_argument("-max_features", type=int, help="most channels of a stage of the segmenter, likewise")
    parser.add_argument("-set", nargs="+", default=[], metavar="NAME=VALUE", help="settings, as nnUNetUDA_configure")
    parser.add_argument("-variants", nargs="+", help=f"[{' '.join(VARIANTS)}; on the CPU without tf32]")
    parser.add_argument("-steps", type=int, default=20, help="timed steps [20]")
    parser.add_argument("-pairs", type=int, default=3, help="pairs of steps whose losses are compared [3]")
    parser.add_argument("-rtol", type=float, default=0.02, help="allowed relative difference in a first step [0.02]")
    parser.add_argument("-atol", type=float, default=0.01, help="absolute difference allowed besides [0.01]")
    parser.add_argument("-seed", type=int, default=0, help="of weights, batches and steps [0]")
    parser.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="[cuda]; CUDA_VISIBLE_DEVICES chooses")
    parser.add_argument("-np", type=int, default=min(8, os.cpu_count() or 1), help="processes that make the phantom")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UDAError("torch sees no CUDA device here: run this on a machine that has one, or give -device cpu")
    if min(args.steps, args.pairs) < 1:
        raise UDAError(f"-steps and -pairs must be at least 1, found {args.steps} and {args.pairs}")
    default = [variant for variant in VARIANTS if args.device == "cuda" or variant != "tf32"]
    variants = [check_variant(text, args.device) for text in args.variants or default]
    variants = list(dict.fromkeys([REFERENCE, *variants]))
    settings = SETTINGS | {"seed": args.seed} | dict(parse_assignment(text) for text in args.set)

    if args.d is None:
        dataset, base_name = make_dataset(args.o.resolve().with_name(f"{args.o.stem}_work"), args.np)
    else:
        dataset, base_name = dataset_name(args.d), args.p
    base = read_json(environment_folder("nnUNet_preprocessed") / dataset / f"{base_name}.json")
    given = {
        "patch_size": [args.patch] * 2 if args.patch else None, "batch_size": args.batch,
        "base_features": args.base_features, "max_features": args.max_features,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}

    here = machine(args.device)
    known = read_json(args.o)["rows"] if args.o.exists() else []
    rows = {json.dumps(row["job"], sort_keys=True): row for row in known}
    wanted = []
    for size, trainer, variant in itertools.product(args.sizes, args.tr, variants):
        plans = derive_plans(base, "2d", f"{size}_plans", merge_uda(base.get("uda", {}), settings),
                             **SIZES[size] | given)  # fmt: skip
        chosen = plans["configurations"]["2d"]
        job = {
            "size": size, "trainer": trainer, "variant": variant, "device": args.device, "machine": here,
            "dataset": dataset, "patch": chosen["patch_size"], "batch": chosen["batch_size"],
            "features": chosen["architecture"]["arch_kwargs"]["features_per_stage"], "uda": plans["uda"],
            "steps": args.steps, "pairs": args.pairs, "seed": args.seed,
        }  # fmt: skip
        key = json.dumps(job, sort_keys=True)
        wanted.append(key)
        if key in rows and "error" not in rows[key]:
            continue
        print(f"{size}, {trainer}, {variant} ...", end=" ", flush=True)
        found = in_process(job, plans, dataset)
        print(found.get("error", f"{1e3 * found.get('median', 0):.1f} ms a step"), flush=True)
        rows[key] = {"job": job, **found}
        write_json({"rows": list(rows.values())}, args.o)

    print(f"\n{dataset}, {', '.join(f'{name} {value}' for name, value in here.items())}, {args.steps} timed steps; "
          f"loss terms may differ by {args.atol:g} + {args.rtol:g} * |{REFERENCE}| in the first of a pair of steps, "
          f"twice that in the second; {REFERENCE} is compared with its own repetition\n")  # fmt: skip
    faults = report([rows[key] for key in wanted], args.rtol, args.atol)
    if faults:
        print("\n" + "\n".join(faults), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
