"""The options that ``nnUNetUDA_sweep`` and ``nnUNetUDA_compare`` share, their checks, and the engine they choose."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import is_fold
from nnunet_uda.devices import DEVICE_HELP, choose_device
from nnunet_uda.errors import UDAError, shown
from nnunet_uda.experiments.engines import SLURM_WARNING, Engine, LocalEngine, SubmititEngine
from nnunet_uda.workers import usual_processes


def add_grid_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Options of every grid, and those that choose an engine and its means."""
    parser.add_argument("-c", default="2d", help="configuration [2d]")
    parser.add_argument("-o", type=Path, required=True, help=f"output folder: new, empty, or of {command} before")
    parser.add_argument("-device", help=f"device of training and prediction: {DEVICE_HELP}; slurm: [cuda]")
    parser.add_argument("-np", type=int, default=usual_processes(), help="processes that score predictions "
                        "[%(default)s]")  # fmt: skip
    group = parser.add_argument_group("where the runs run")
    group.add_argument("-engine", choices=["local", "slurm"], default="local", help="processes of this machine, or "
                       "jobs of SLURM (needs submitit: pip install 'nnunet_uda[slurm]') [local]")  # fmt: skip
    group.add_argument("-jobs", type=int, help="runs at a time; local: each has its share of cores and one of the "
                       "visible CUDA devices in turn [local: 1; slurm: as many as there are]")  # fmt: skip
    group.add_argument("-partition", help="slurm: partition")
    group.add_argument("-time", type=int, default=1440, help="slurm: minutes for each run; 90 s before, its training "
                       "stops with a checkpoint, from which the next start goes on [1440]")  # fmt: skip
    group.add_argument("-gpus", type=int, help="slurm: GPUs for each run [1 with -device cuda, else 0]")
    group.add_argument("-cpus", type=int, default=8, help="slurm: cores for each run [8]")
    group.add_argument("-mem", type=int, default=32, help="slurm: GB of memory for each run [32]")
    group.add_argument("-slurm", nargs="+", default=[], metavar="KEY=VALUE", help="slurm: more of sbatch's options, "
                       "such as account=mine qos=long")  # fmt: skip


def check_grid_arguments(arguments: argparse.Namespace, folds: Iterable[str], once: Iterable[str]) -> None:
    """Check what the parser let through, and choose the device where none is named.

    Args:
        folds: must be numbers or ``all``.
        once: options in which no value may stand twice.

    Raises:
        UDAError: for the first fault.
    """
    for name in once:
        values = getattr(arguments, name) or []
        if len(set(values)) != len(values):
            raise UDAError(f"-{name}: a value is given twice in {values}")
    for fold in folds:
        if not is_fold(fold):
            raise UDAError(f"-f takes a fold's number or 'all', found {shown(fold)}")
    for name, least in (("np", 1), ("jobs", 1), ("time", 1), ("cpus", 1), ("mem", 1), ("gpus", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UDAError(f"-{name} must be at least {least}, found {value}")
    if arguments.device not in (None, "cpu", "cuda", "mps"):
        raise UDAError(f"-device takes cpu, cuda or mps, found {arguments.device!r}")
    for word in arguments.slurm:
        if not all(word.partition("=")):
            raise UDAError(f"-slurm takes KEY=VALUE, found {word!r}")
    if arguments.engine == "local":
        arguments.device = str(choose_device(arguments.device))
    elif arguments.device is None:
        arguments.device = "cuda"


def make_engine(arguments: argparse.Namespace, out: Path) -> Engine:
    """The engine that these options ask for, which keeps what it needs below ``out``."""
    if arguments.engine == "local":
        return LocalEngine(arguments.jobs or 1, arguments.device)
    more = {"signal": SLURM_WARNING} | dict(word.partition("=")[::2] for word in arguments.slurm)
    gpus = arguments.gpus if arguments.gpus is not None else int(arguments.device == "cuda")
    parameters: dict[str, Any] = {"timeout_min": arguments.time, "cpus_per_task": arguments.cpus,
                                  "gpus_per_node": gpus, "mem_gb": arguments.mem,
                                  "slurm_additional_parameters": more}  # fmt: skip
    parameters |= {"slurm_partition": arguments.partition} if arguments.partition else {}
    parameters |= {"slurm_array_parallelism": arguments.jobs} if arguments.jobs else {}
    return SubmititEngine(out / "slurm", parameters)
