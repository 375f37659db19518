"""``nnUNetUDA_train``: ``nnUNetv2_train`` on one process, several, or several machines, on CPUs and on CUDA devices."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed

from nnunet_uda import devices
from nnunet_uda.collectives import StoppedWithOthersError, rank, world_size
from nnunet_uda.data.convention import is_fold
from nnunet_uda.errors import UDAError, command, shown
from nnunet_uda.methods import let_find
from nnunet_uda.training.fold import train
from nnunet_uda.training.launch import adopt_srun, join, set_threads, spawn, started_by
from nnunet_uda.workers import end_with_starter

PATIENCE_SECONDS = 5.0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_train",
        description="Train as nnUNetv2_train does, with its options, on the device that there is. It finds the "
        "trainers here without nnUNet_extTrainer, and uses as many threads as OMP_NUM_THREADS says. Several processes "
        "share each batch: "
        "-num_processes starts them on this machine; torchrun or SLURM's srun, on one machine or several, start them "
        "by starting this command. The plans' batch size is that of all processes together and must be a multiple of "
        "their number.",
        epilog="Examples: nnUNetUDA_train 501 2d 0 -tr CASTTrainer    |    nnUNetUDA_train 501 2d 0 -tr CISFATrainer "
        "-num_processes 4    |    torchrun --nnodes 2 "
        "--nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --no-python nnUNetUDA_train 501 2d 0 -tr "
        "CISFATrainer    |    srun --ntasks-per-node 4 --gpus-per-node 4 --kill-on-bad-exit nnUNetUDA_train 501 2d 0 "
        "-tr CISFATrainer",
    )
    parser.add_argument("dataset", help="dataset id or name")
    parser.add_argument("configuration", help="configuration, such as 2d or 3d_fullres")
    parser.add_argument("fold", help="fold's number, or 'all'")
    parser.add_argument("-tr", required=True, help="trainer")
    parser.add_argument("-p", default="nnUNetPlans", help="plans [nnUNetPlans]")
    parser.add_argument("-pretrained_weights", type=Path, help="checkpoint whose network's weights to start from; the "
                        "segmentation layers', too, where it was trained for the same structures")  # fmt: skip
    parser.add_argument("-device", choices=["cpu", "cuda", "mps"], help=devices.DEVICE_HELP)
    parser.add_argument("-num_processes", type=int, default=1, help="processes to start here; with cuda one for each "
                        "visible device at most [1]")  # fmt: skip
    parser.add_argument("--npz", action="store_true", help="keep probabilities of the final validation")
    parser.add_argument("--c", action="store_true", help="continue from the latest checkpoint")
    parser.add_argument("--val", action="store_true", help="only the final validation, of a finished training")
    parser.add_argument("--val_best", action="store_true", help="final validation with checkpoint_best")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoint")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ``UDAError`` for what the parser let through."""
    if not is_fold(arguments.fold):
        raise UDAError(f"the fold is a number or 'all', found {shown(arguments.fold)}")
    if arguments.num_processes < 1:
        raise UDAError(f"-num_processes must be at least 1, found {arguments.num_processes}")
    for pair in (("--c", "--val"), ("--c", "-pretrained_weights"), ("--val_best", "--disable_checkpointing")):
        if all(getattr(arguments, option.lstrip("-")) for option in pair):
            raise UDAError(f"{pair[0]} and {pair[1]} exclude each other")
    if arguments.pretrained_weights is not None and not arguments.pretrained_weights.exists():
        raise UDAError(f"-pretrained_weights {arguments.pretrained_weights} does not exist")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    arguments = make_parser().parse_args(argv)
    check_arguments(arguments)
    return arguments


def choose_device(arguments: argparse.Namespace) -> None:
    """Where no device is given, choose the one that is there, and say so."""
    arguments.device = str(devices.choose_device(arguments.device, say=int(os.environ.get("RANK", "0")) == 0))


def train_with(arguments: argparse.Namespace, device: torch.device) -> Path:
    """Train in this process, which may be one of several; return the fold's folder."""
    return train(
        arguments.dataset, arguments.configuration, arguments.fold, arguments.tr, arguments.p, device,
        go_on=arguments.c, only_validate=arguments.val, validate_best=arguments.val_best,
        keep_probabilities=arguments.npz, write_checkpoints=not arguments.disable_checkpointing,
        pretrained_weights=arguments.pretrained_weights,
    )  # fmt: skip


def train_here(arguments: argparse.Namespace) -> Path:
    """Train in this process alone; return the fold's folder."""
    check_arguments(arguments)
    if arguments.num_processes > 1:
        raise UDAError("several processes are started by the command: nnUNetUDA_train ... -num_processes N")
    let_find()
    choose_device(arguments)
    set_threads(arguments.device)
    hook = sys.excepthook
    try:
        return train_with(arguments, torch.device(arguments.device))
    finally:
        sys.excepthook = hook  # trainers have errors printed without a traceback


def next_step(arguments: argparse.Namespace) -> str:
    """The command that predicts with what was trained."""
    plans = "" if arguments.p == "nnUNetPlans" else f" -p {arguments.p}"
    device = "" if arguments.device == "cuda" else f" -device {arguments.device}"
    return (
        f"Next: nnUNetv2_predict -d {arguments.dataset} -c {arguments.configuration} -f {arguments.fold} "
        f"-tr {arguments.tr}{plans}{device} -i IMAGES -o PREDICTIONS"
    )


@command
def main(argv: list[str] | None = None) -> None:
    end_with_starter()
    arguments = parse_arguments(argv)
    let_find()
    starter = started_by()
    choose_device(arguments)
    if starter is None and arguments.num_processes > 1:
        own = sys.argv[1:] if argv is None else argv
        spawn(arguments.num_processes, [sys.executable, "-m", "nnunet_uda.commands.train", *own])
        return
    set_threads(arguments.device)
    device = torch.device(arguments.device)
    if starter is not None:
        if starter == "srun":
            adopt_srun()
        device = join(arguments.device)
    try:
        train_with(arguments, device)
        if rank() == 0:
            print(next_step(arguments))
    except StoppedWithOthersError:
        raise SystemExit(1) from None
    except UDAError:
        if rank() > 0:
            time.sleep(PATIENCE_SECONDS)  # most errors are every process's, and process 0 says them
        raise
    if world_size() > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
