"""``nnUNetUDA_train``: ``nnUNetv2_train`` on one process, several, or several machines, on CPUs and on CUDA devices."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from nnunet_uda.collectives import StoppedWithOthersError, rank, world_size
from nnunet_uda.data.convention import dataset_name, environment_folder, is_fold, read_json
from nnunet_uda.devices import best_device, open_device
from nnunet_uda.errors import UDAError, command, shown
from nnunet_uda.experiments.job import COST, find_any_trainer
from nnunet_uda.files import write_json
from nnunet_uda.foreign_plans import read_plans
from nnunet_uda.methods import let_find
from nnunet_uda.training.checkpoint import BEST, FINAL, read_checkpoint
from nnunet_uda.workers import end_with_starter, tied, usable_cores, usual_processes, wished_threads

TIMEOUT = timedelta(hours=2)
"""After which a collective call that another process does not answer is an error."""
POLL_SECONDS = 0.2
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
    parser.add_argument("-pretrained_weights", type=Path, help="checkpoint whose network's weights to start from")
    parser.add_argument("-device", choices=["cpu", "cuda", "mps"], help="[cuda where there is one, else cpu]")
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


# --- processes -------------------------------------------------------------------------------------------------------


def started_by() -> str | None:
    """Who started this process as one of several: ``torchrun``'s variables, SLURM's, or nobody."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return "torchrun"
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "srun"
    return None


def adopt_srun() -> None:
    """SLURM's variables of a job step under the names that torch reads.

    Raises:
        UDAError: if the first machine's name cannot be found.
    """
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    os.environ.update({name: os.environ[theirs] for name, theirs in names.items()})
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST", "")
        try:
            hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UDAError(
                f"the first machine of {nodes!r} is unknown ({error}): export MASTER_ADDR=HOST before srun"
            ) from error
        os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(20000 + job % 20000))


def join(device: str) -> torch.device:
    """Join the processes that were started with this one; the device of this one.

    Raises:
        UDAError: fewer CUDA devices than processes on this machine.
    """
    if device == "mps":
        raise UDAError("several processes need -device cpu or cuda")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    backend, chosen = "gloo", torch.device("cpu")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UDAError(
                f"process {local} of this machine has no CUDA device: {torch.cuda.device_count()} are visible. Start "
                "one process for each, or use -device cpu"
            )
        backend, chosen = "nccl", torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    distributed.init_process_group(backend, timeout=TIMEOUT)
    return chosen


def spawn(number: int, argv: list[str]) -> None:
    """Start this command ``number`` times as one group, and end all where one fails.

    Raises:
        SystemExit: with the status of the first that failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-m", "nnunet_uda.commands.train", *argv]
    processes = []
    for index in range(number):
        own = {"RANK": str(index), "LOCAL_RANK": str(index), "LOCAL_WORLD_SIZE": str(number)}
        processes.append(subprocess.Popen(words, env=tied({**os.environ, **shared, **own})))

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(number)

    before = {wish: signal.signal(wish, pass_on) for wish in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not any(process.poll() for process in processes) and any(p.poll() is None for p in processes):
            time.sleep(POLL_SECONDS)
        failed = [process.returncode for process in processes if process.returncode]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        for wish, handler in before.items():
            signal.signal(wish, handler)
    if failed:
        raise SystemExit(1 if failed[0] > 0 else 128 - failed[0])


def set_threads(device: str) -> None:
    """As nnU-Net: all cores on the CPU, shared by this machine's processes; what OMP_NUM_THREADS says goes first.

    All are those that this process may use: SLURM gives a task some of a machine's. Nor does nnU-Net start more workers
    for the final validation, each of which imports torch.
    """
    os.environ.setdefault("nnUNet_def_n_proc", str(usual_processes()))
    if device == "cuda":
        torch.set_num_threads(1)
    elif os.environ.get("OMP_NUM_THREADS", "").isdigit():
        torch.set_num_threads(wished_threads())
    else:
        cores = usable_cores()
        cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


# --- training --------------------------------------------------------------------------------------------------------


def choose_device(arguments: argparse.Namespace) -> None:
    """Put the device that there is into ``arguments`` where none is given, and say so."""
    if arguments.device is None:
        arguments.device = best_device()
        if arguments.device == "cpu" and int(os.environ.get("RANK", "0")) == 0:
            print("No CUDA device is visible: training on the CPU (-device cpu)", flush=True)
    open_device(arguments.device)


def train_here(arguments: argparse.Namespace) -> Path:
    """Train in this process alone; the fold's folder."""
    check_arguments(arguments)
    if arguments.num_processes > 1:
        raise UDAError("several processes are started by the command: nnUNetUDA_train ... -num_processes N")
    let_find()
    choose_device(arguments)
    set_threads(arguments.device)
    hook = sys.excepthook
    try:
        return train(arguments, torch.device(arguments.device))
    finally:
        sys.excepthook = hook  # trainers have errors printed without a traceback


def train(arguments: argparse.Namespace, device: torch.device) -> Path:
    """What ``nnUNetv2_train`` does in each process; the fold's folder."""
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
    from torch.backends import cudnn

    fold = arguments.fold if arguments.fold == "all" else int(arguments.fold)
    folder = environment_folder("nnUNet_preprocessed") / dataset_name(arguments.dataset)
    plans = read_plans(folder, arguments.p)
    if arguments.configuration not in plans["configurations"]:
        raise UDAError(
            f"the plans {arguments.p} have no configuration {arguments.configuration!r}; they have "
            f"{', '.join(plans['configurations'])}"
        )
    find_any_trainer(arguments.tr)
    read_json(folder / "dataset.json")  # nnU-Net, which reads it too, does not name a broken one
    trainer = get_trainer_from_args(
        arguments.dataset, arguments.configuration, fold, arguments.tr, arguments.p, arguments.c, device
    )
    for name in [FINAL] * arguments.val + [BEST] * (arguments.val and arguments.val_best):
        if not (needed := Path(trainer.output_folder, name)).is_file():
            raise UDAError(f"--val needs {needed}, which does not exist: train first, or continue with --c")
    trainer.disable_checkpointing = arguments.disable_checkpointing
    if arguments.pretrained_weights is not None:
        trainer.initialize()
        load_pretrained(trainer.network, arguments.pretrained_weights)
    else:
        maybe_load_checkpoint(trainer, arguments.c, arguments.val)
    if device.type == "cuda":
        cudnn.deterministic, cudnn.benchmark = False, True
    if not arguments.val:
        trainer.run_training()
        if rank() == 0:
            write_cost(Path(trainer.output_folder, COST), device)
    if arguments.val_best:
        trainer.load_checkpoint(str(Path(trainer.output_folder, BEST)))
    trainer.perform_actual_validation(arguments.npz)
    return Path(trainer.output_folder)


def load_pretrained(network: torch.nn.Module, path: Path) -> None:
    """All weights but the segmentation layers' from a checkpoint, by nnU-Net's rule, on whatever device.

    Raises:
        UDAError: no readable checkpoint, or a weight that is missing there or has another shape.
    """
    module = getattr(network, "_orig_mod", network)
    weights = read_checkpoint(path)["network_weights"]
    own = module.state_dict()
    for key in (key for key in own if ".seg_layers." not in key):
        found = tuple(weights[key].shape) if key in weights else None
        if found != tuple(own[key].shape):
            raise UDAError(
                f"-pretrained_weights {path}: {key} is {'missing' if found is None else f'of shape {found}'}, this "
                f"network's has shape {tuple(own[key].shape)}. Take weights of the same network and plans"
            )
        own[key] = weights[key]
    module.load_state_dict(own)
    if rank() == 0:
        print(f"Pretrained weights, all but the segmentation layers, from {path}")


def write_cost(path: Path, device: torch.device) -> None:
    """Peak memory of this process so far in GiB, over all starts of a training that was continued the largest; and its
    processor time in seconds, of the starts that came to an end the sum."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes of ru_maxrss
    now = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        now["peak_device_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    before = read_json(path) if path.exists() else {}
    spent = {"cpu_seconds": time.process_time() + before.get("cpu_seconds", 0.0)}
    write_json({name: max(value, before.get(name, 0.0)) for name, value in now.items()} | spent, path)


@command
def main(argv: list[str] | None = None) -> None:
    end_with_starter()
    arguments = parse_arguments(argv)
    let_find()
    starter = started_by()
    choose_device(arguments)
    if starter is None and arguments.num_processes > 1:
        spawn(arguments.num_processes, sys.argv[1:] if argv is None else argv)
        return
    set_threads(arguments.device)
    device = torch.device(arguments.device)
    if starter is not None:
        if starter == "srun":
            adopt_srun()
        device = join(arguments.device)
    try:
        train(arguments, device)
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
