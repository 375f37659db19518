"""Processes of a training, started here, by torchrun or by SLURM's srun: they join, each with its share of threads."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from datetime import timedelta

import torch
from torch import distributed

from nnunet_uda.errors import UDAError
from nnunet_uda.workers import tied, usable_cores, usual_processes, wished_threads

TIMEOUT = timedelta(hours=2)
"""After which a collective call that another process does not answer is an error."""
POLL_SECONDS = 0.2


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


def spawn(number: int, command: list[str]) -> None:
    """Start ``command`` ``number`` times as one group, and end all where one fails.

    Raises:
        SystemExit: with the status of the first that failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for index in range(number):
        own = {"RANK": str(index), "LOCAL_RANK": str(index), "LOCAL_WORLD_SIZE": str(number)}
        processes.append(subprocess.Popen(command, env=tied({**os.environ, **shared, **own})))

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
