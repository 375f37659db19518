"""How start-up, step time and memory grow with the cases, with the patch, and with the volumes to preprocess.

``cases``: a training with live loaders on copies of a preprocessed dataset that hold 1, 10 and 100 times its cases
(links to the same files under other names), each in a fresh process. ``patches``: steps of the same network, the depth
that the smallest patch allows, on patches of edge 32, 64 and 128. ``volumes``: ``nnUNetUDA_preprocess`` on target
volumes of noise, with one process and with two, against the same number of tiny volumes, which costs what starting
costs. Memory is resident memory, read from Linux's ``/proc``: what processes share counts once. Nothing is written into
nnU-Net's folders.

    python benchmarks/growth.py cases -d 501 -p nnUNetPlansDemo
    python benchmarks/growth.py patches -d 501 -p nnUNetPlansDemo
    python benchmarks/growth.py volumes -d 501 -p nnUNetPlansDemo
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from memory import peak_resident, resident, watched
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from step_time import environment, make_trainer, measure_steps, print_table, set_aside

from nnunet_uda.data.convention import SPLITS_TARGET, TARGET_FOLDER, dataset_name, environment_folder, read_json
from nnunet_uda.data.target import MANIFEST, target_folder
from nnunet_uda.errors import UDAError, command
from nnunet_uda.files import write_json
from nnunet_uda.plans import derive_plans
from nnunet_uda.workers import as_done

# -- more cases ------------------------------------------------------------------------------------------------------


def multiply_dataset(source: Path, plans: dict, configuration: str, destination: Path, times: int) -> None:
    """Make ``destination`` a preprocessed dataset with ``times`` the cases of ``source``, for one configuration.

    A case's copies are links to its files, under its name with a number; splits hold all copies of their cases.

    Raises:
        UDAError: where ``source`` or its target has not been preprocessed.
    """
    configured = PlansManager(plans).get_configuration(configuration)
    folders = source / configured.data_identifier, target_folder(source, configured)
    for folder in folders:
        if not folder.is_dir():
            raise UDAError(f"{folder} does not exist: run nnUNetv2_plan_and_preprocess, then nnUNetUDA_preprocess")

    def copies(identifier: str) -> list[str]:
        return [f"{identifier}_{number:03d}" for number in range(times)]

    for folder in folders:
        (destination / folder.name).mkdir(parents=True)
        for path in folder.glob("*.b2nd"):
            if path.stem.endswith("_seg"):
                continue
            for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
                file = folder.absolute() / f"{path.stem}{suffix}"
                for copy in copies(path.stem):
                    (destination / folder.name / f"{copy}{suffix}").symlink_to(file)
    manifest = read_json(folders[1] / MANIFEST)
    for key in ("cases", "sizes"):
        manifest[key] = {copy: value for name, value in manifest[key].items() for copy in copies(name)}
    write_json(manifest, destination / folders[1].name / MANIFEST)
    for name in ("splits_final.json", SPLITS_TARGET):
        if (source / name).exists():
            splits = [
                {part: [copy for case in cases for copy in copies(case)] for part, cases in fold.items()}
                for fold in read_json(source / name)
            ]
            write_json(splits, destination / name)
    write_json(read_json(source / "dataset_fingerprint.json"), destination / "dataset_fingerprint.json")
    dataset = read_json(source / "dataset.json")
    dataset["numTraining"] *= times
    write_json(dataset, destination / "dataset.json")


def measure_training(task: dict) -> dict:
    """Start a training in this process, which has trained nothing before, and time its steps with live loaders.

    Args:
        task: ``trainer``, ``dataset``, ``plans`` (their content), ``configuration``, ``device``, ``threads`` and
            ``steps``.

    Returns:
        ``start``, seconds until the first batch is there; ``seconds`` of every step after the first three, the wait for
        its batch included; ``resident_bytes`` of the process and its loaders after the last one; ``peak_bytes`` that
        the process itself has had.
    """
    torch.set_num_threads(task["threads"])
    device = torch.device(task["device"])
    with set_aside(os.environ.get("nnUNet_n_proc_DA")):
        start = time.perf_counter()
        trainer = make_trainer(task["trainer"], task["dataset"], task["plans"], task["configuration"], device)
        batch = next(trainer.dataloader_train)
        begun = time.perf_counter() - start
        seconds = []
        for _ in range(task["steps"] + 3):
            start = time.perf_counter()
            trainer.train_step(batch)
            batch = next(trainer.dataloader_train)
            seconds.append(time.perf_counter() - start)
        held = resident(os.getpid())
        trainer.on_train_end()
    return {"start": begun, "seconds": seconds[3:], "resident_bytes": held, "peak_bytes": peak_resident()}


def measure_cases(
    trainers: Sequence[str],
    dataset: str,
    plans: dict,
    configuration: str,
    device: str,
    threads: int,
    steps: int,
    times: Sequence[int],
) -> list[dict]:
    """``measure_training`` of every trainer on 1 and more times the cases."""
    source = environment_folder("nnUNet_preprocessed") / dataset
    found = []
    with tempfile.TemporaryDirectory() as name:
        for factor in times:
            multiply_dataset(source, plans, configuration, Path(name, str(factor), dataset), factor)
        for trainer in trainers:
            for factor in times:
                task = {"trainer": trainer, "dataset": dataset, "plans": plans, "configuration": configuration,
                        "device": device, "threads": threads, "steps": steps}  # fmt: skip
                folder = Path(name, str(factor))
                variables = {"nnUNet_preprocessed": str(folder), "nnUNet_raw": str(folder / "no_raw_data")}
                with environment(variables):
                    (one,) = as_done(measure_training, [task], 1)
                content = folder / dataset / PlansManager(plans).get_configuration(configuration).data_identifier
                cases = len(list(content.glob("*.pkl")))
                found.append({"trainer": trainer, "times": factor, "cases": cases, **one})
    for one in found:
        one["median"] = statistics.median(one["seconds"])
    return found


def print_cases(found: list[dict]) -> None:
    rows = []
    for one in found:
        first = next(other for other in found if other["trainer"] == one["trainer"])
        rows.append([
            one["trainer"], str(one["cases"]), f"{one['start']:.1f}", f"{1e3 * one['median']:.0f}",
            f"{one['median'] / first['median']:.2f}", f"{one['resident_bytes'] / 2**20:.0f}",
            f"{one['resident_bytes'] / first['resident_bytes']:.2f}", f"{one['peak_bytes'] / 2**20:.0f}",
        ])  # fmt: skip
    print_table(
        ["trainer", "source cases", "start-up, s", "ms a step", "times the first", "MiB with its loaders",
         "times the first", "most MiB, without loaders"],
        rows,
    )  # fmt: skip


# -- larger patches --------------------------------------------------------------------------------------------------


def measure_patches(
    trainers: Sequence[str],
    dataset: str,
    plans: dict,
    configuration: str,
    device: torch.device,
    steps: int,
    edges: Sequence[int],
) -> list[dict]:
    """Step times of every trainer on patches of these edges, all with the stages that the smallest one allows."""
    chosen = plans["configurations"][configuration]

    def resized(edge: int, stages: int | None) -> dict:
        size = (edge,) * len(chosen["patch_size"])
        return derive_plans(plans, configuration, f"edge {edge}", plans.get("uda", {}), patch_size=size, stages=stages)

    smallest = resized(min(edges), None)["configurations"][configuration]
    stages = min(smallest["architecture"]["arch_kwargs"]["n_stages"], chosen["architecture"]["arch_kwargs"]["n_stages"])
    runs = [(trainer, str(edge), resized(edge, stages)) for trainer in trainers for edge in edges]
    _, found = measure_steps(runs, dataset, configuration, device, steps)
    return [{"edge": int(one["plans"]), **one} for one in found]


def print_patches(found: list[dict]) -> None:
    rows, before = [], None
    for one in found:
        same = before is not None and before["trainer"] == one["trainer"]
        ratios = [f"{one[key] / before[key]:.2f}" if same else "" for key in ("median", "flops", "peak_bytes")]
        rows.append([
            one["trainer"], str(one["edge"]), f"{1e3 * one['median']:.0f}", ratios[0], f"{one['flops'] / 1e9:.1f}",
            ratios[1], f"{one['peak_bytes'] / 2**20:.0f}", ratios[2],
        ])  # fmt: skip
        before = one
    print_table(
        ["trainer", "patch edge", "ms a step", "times the row above", "GFLOP", "times", "peak MiB", "times"], rows
    )


# -- more volumes to preprocess --------------------------------------------------------------------------------------


def measure_volumes(
    dataset: str, plans: dict, configuration: str, size: tuple[int, int, int], runs: Sequence[tuple[int, int]]
) -> list[dict]:
    """Preprocess target volumes of noise, ``(number, processes)`` a run, and as many tiny ones.

    Args:
        size: ``(Z, Y, X)`` of a volume.

    Returns:
        ``seconds`` and ``bytes`` of every run are what it takes beyond tiny volumes, ``start`` and ``start_bytes`` what
        these take.
    """
    folder = environment_folder("nnUNet_preprocessed") / dataset
    channels = len(read_json(folder / "dataset.json")["channel_names"])
    found = []
    with tempfile.TemporaryDirectory() as name:
        for number, processes in runs:
            took = []
            for shape in ((8, 16, 16), size):
                with tempfile.TemporaryDirectory(dir=name) as place:
                    root = Path(place)
                    _write_volumes(root / "raw" / dataset / TARGET_FOLDER, number, channels, shape)
                    for file, content in (("dataset.json", read_json(folder / "dataset.json")), ("Noise.json", plans)):
                        (root / "preprocessed" / dataset).mkdir(parents=True, exist_ok=True)
                        write_json(content, root / "preprocessed" / dataset / file)
                    words = ["-d", dataset, "-p", "Noise", "-c", configuration, "-np", str(processes)]
                    places = {f"nnUNet_{folder}": str(root / folder) for folder in ("raw", "preprocessed")}
                    program = [sys.executable, "-m", "nnunet_uda.commands.preprocess"]
                    took.append(watched([*program, *words], os.environ | places))
            (start, start_bytes), (seconds, held) = took
            found.append({
                "volumes": number, "processes": processes, "volume_bytes": 4 * channels * int(np.prod(size)),
                "seconds": seconds - start, "bytes": held - start_bytes, "start": start, "start_bytes": start_bytes,
            })  # fmt: skip
    return found


def _write_volumes(folder: Path, number: int, channels: int, size: tuple[int, int, int]) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(number):
        for channel in range(channels):
            image = sitk.GetImageFromArray(rng.normal(0, 12, size).astype(np.int16))
            image.SetSpacing((1.0, 1.0, 2.5))
            sitk.WriteImage(image, str(folder / f"noise{index}_{channel:04d}.nii.gz"), True)


def print_volumes(found: list[dict]) -> None:
    print_table(
        ["volumes", "processes", "s beyond start-up", "s a volume", "MiB beyond start-up", "in volumes", "start-up, s",
         "start-up, MiB"],
        [[str(one["volumes"]), str(one["processes"]), f"{one['seconds']:.1f}", f"{one['seconds'] / one['volumes']:.2f}",
          f"{one['bytes'] / 2**20:.0f}", f"{one['bytes'] / one['volume_bytes']:.1f}", f"{one['start']:.1f}",
          f"{one['start_bytes'] / 2**20:.0f}"] for one in found],
    )  # fmt: skip
    print(f"\nA volume is {found[0]['volume_bytes'] / 2**20:.0f} MiB as float32.")


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cases", "patches", "volumes"))
    parser.add_argument("-d", required=True, help="dataset id or name, planned and preprocessed, target too")
    parser.add_argument("-p", default="nnUNetPlans", help="plans [nnUNetPlans]")
    parser.add_argument("-c", default="2d", help="configuration [2d]")
    parser.add_argument("-tr", nargs="+", default=["nnUNetTrainer", "CISFATrainer"], help="trainers (cases, patches)")
    parser.add_argument("-steps", type=int, default=20, help="timed steps of each run (cases, patches) [20]")
    parser.add_argument("-times", nargs="+", type=int, default=[1, 10, 100], help="cases: how many times [1 10 100]")
    parser.add_argument("-edges", nargs="+", type=int, default=[32, 64, 128], help="patches: edges [32 64 128]")
    parser.add_argument("-runs", nargs="+", default=["2x1", "6x1", "6x2"], help="volumes: how many, by how many "
                        "processes [2x1 6x1 6x2]")  # fmt: skip
    parser.add_argument("-size", nargs=3, type=int, default=[120, 320, 320], help="volumes: Z Y X [120 320 320]")
    parser.add_argument("-threads", type=int, default=os.cpu_count() or 1, help="CPU threads of a training [all]")
    parser.add_argument("-device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("-o", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    dataset = dataset_name(args.d)
    plans = read_json(environment_folder("nnUNet_preprocessed") / dataset / f"{args.p}.json")
    print(f"{dataset}, {args.p}, {args.c}, {args.device}, {args.threads} threads\n")
    if args.what == "cases":
        found = measure_cases(args.tr, dataset, plans, args.c, args.device, args.threads, args.steps, args.times)
        print_cases(found)
    elif args.what == "patches":
        torch.set_num_threads(args.threads)
        device = torch.device(args.device)
        found = measure_patches(args.tr, dataset, plans, args.c, device, args.steps, args.edges)
        print_patches(found)
    else:
        runs = [tuple(int(part) for part in run.split("x")) for run in args.runs]
        found = measure_volumes(dataset, plans, args.c, tuple(args.size), runs)
        print_volumes(found)
    if args.o:
        args.o.write_text(json.dumps({"runs": found}, indent=1))


if __name__ == "__main__":
    main()
