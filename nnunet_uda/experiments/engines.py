"""Where jobs run: processes of this machine, or SLURM through submitit."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import read_json
from nnunet_uda.errors import UDAError
from nnunet_uda.experiments.job import Job, Score, last_error
from nnunet_uda.files import write_json

POLL_SECONDS = 0.5
SLURM_POLL_SECONDS = 15.0
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "PREEMPTED", "REQUEUED", "COMPLETING")
"""States of SLURM jobs that will still do something; one that SLURM has forgotten (UNKNOWN) will not."""
Done = Callable[[Job, str | None], None]
"""Called with every job when it has ended, and with the reason where it has failed."""


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose an engine and its means."""
    group = parser.add_argument_group("where the runs run")
    group.add_argument("-engine", choices=["local", "slurm"], default="local", help="processes of this machine, or "
                       "jobs of SLURM (needs submitit: pip install 'nnunet_uda[slurm]') [local]")  # fmt: skip
    group.add_argument("-jobs", type=int, help="runs at a time; local: each has its share of cores and one of the "
                       "visible CUDA devices in turn [local: 1; slurm: as many as there are]")  # fmt: skip
    group.add_argument("-partition", help="slurm: partition")
    group.add_argument("-time", type=int, default=1440, help="slurm: minutes for each run [1440]")
    group.add_argument("-gpus", type=int, help="slurm: GPUs for each run [1 with -device cuda, else 0]")
    group.add_argument("-cpus", type=int, default=8, help="slurm: cores for each run [8]")
    group.add_argument("-mem", type=int, default=32, help="slurm: GB of memory for each run [32]")
    group.add_argument("-slurm", nargs="+", default=[], metavar="KEY=VALUE", help="slurm: more of sbatch's options, "
                       "such as account=mine qos=long")  # fmt: skip


def make_engine(arguments: argparse.Namespace, out: Path) -> LocalEngine | SubmititEngine:
    """The engine that ``add_engine_arguments`` asked for."""
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UDAError(f"-jobs must be at least 1, found {arguments.jobs}")
    if arguments.engine == "local":
        return LocalEngine(arguments.jobs or 1, arguments.device)
    more = dict(word.partition("=")[::2] for word in arguments.slurm)
    gpus = arguments.gpus if arguments.gpus is not None else int(arguments.device == "cuda")
    parameters: dict[str, Any] = {"timeout_min": arguments.time, "cpus_per_task": arguments.cpus,
                                  "gpus_per_node": gpus, "mem_gb": arguments.mem}  # fmt: skip
    parameters |= {"slurm_partition": arguments.partition} if arguments.partition else {}
    parameters |= {"slurm_array_parallelism": arguments.jobs} if arguments.jobs else {}
    parameters |= {"slurm_additional_parameters": more} if more else {}
    return SubmititEngine(out / "slurm", parameters)


def run_jobs(
    engine: LocalEngine | SubmititEngine,
    jobs: Sequence[Job],
    scores: dict[str, Score],
    failed: dict[str, str],
    changed: Callable[[], object],
) -> None:
    """Finish all jobs, put scores and reasons of failures into the dictionaries, and call ``changed`` after each."""
    for job in jobs:
        score = job.score()
        if score is not None:
            scores[job.name] = score
    waiting = [job for job in jobs if job.name not in scores]
    print(f"{len(jobs)} runs, {len(scores)} of them finished before", flush=True)
    if waiting:
        changed()

    def done(job: Job, reason: str | None) -> None:
        score = job.score() if reason is None else None
        if score is not None:
            scores[job.name] = score
        else:
            failed[job.name] = reason or f"it wrote no scores (log: {job.log})"
        print(f"[{len(scores) + len(failed)}/{len(jobs)}] {job.name}: {failed.get(job.name, 'done')}", flush=True)
        changed()

    engine.run(waiting, lambda job: print(f"{job.name} (log: {job.log})", flush=True), done)


def command_of(job: Job) -> list[str]:
    """The command that finishes a job whose file has been written."""
    return [sys.executable, "-m", "nnunet_uda.experiments.job", str(job.folder / "job.json")]


def prepare(job: Job) -> int:
    """Write the job's file; the size of its log so far."""
    job.write()
    job.log.touch()
    return job.log.stat().st_size


class LocalEngine:
    """``number`` jobs at a time as processes of this machine, which end with this one."""

    def __init__(self, number: int, device: str) -> None:
        self.number, self.device = number, device

    def environment(self, slot: int) -> dict[str, str]:
        """One of ``number`` shares of this machine's cores and CUDA devices; what the user has set stays."""
        if self.number == 1:
            return dict(os.environ)
        cores = max(1, len(os.sched_getaffinity(0)) // self.number)
        shares = {"OMP_NUM_THREADS": str(cores), "nnUNet_n_proc_DA": str(cores)}
        environment = shares | dict(os.environ)
        if self.device == "cuda":
            visible = _visible_devices()
            environment["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
        return environment

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None], done: Done) -> None:
        """Finish all jobs; no failure stops another. Where this call is ended, so are its processes."""
        waiting, slots = list(jobs), list(range(self.number))
        running: list[tuple[subprocess.Popen, Job, int, int]] = []
        with _ended_by_sigterm():
            try:
                while waiting or running:
                    while waiting and slots:
                        job, slot = waiting.pop(0), slots.pop(0)
                        start = prepare(job)
                        process = subprocess.Popen(command_of(job), env=self.environment(slot), start_new_session=True)
                        running.append((process, job, slot, start))
                        started(job)
                    time.sleep(POLL_SECONDS)
                    for entry in [entry for entry in running if entry[0].poll() is not None]:
                        running.remove(entry)
                        process, job, slot, start = entry
                        slots.append(slot)
                        failed = process.returncode != 0
                        done(job, _reason(job, start, f"status {process.returncode}") if failed else None)
            finally:
                for process, *_ in running:
                    _end(process)


class SubmititEngine:
    """Jobs of SLURM (or, for tests, of submitit's own local executor), which outlive this process.

    Which job has which SLURM id is kept in ``folder``: a new start waits for those still there.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any], cluster: str = "slurm") -> None:
        try:
            import submitit
        except ImportError as error:
            raise UDAError("-engine slurm needs submitit: pip install 'nnunet_uda[slurm]'") from error
        self.submitit, self.folder, self.parameters, self.cluster = submitit, folder, parameters, cluster
        self.job_class = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
        self.poll_seconds = SLURM_POLL_SECONDS

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None], done: Done) -> None:
        """Submit what is not under way, and wait for everything."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "submitted.json"
        ids: dict[str, str] = read_json(record) if record.exists() else {}
        under_way = {name: self.job_class(self.folder, ids[name]) for name in ids}
        under_way = {name: item for name, item in under_way.items() if item.state.partition(" ")[0] in LIVE}
        try:
            executor = self.submitit.AutoExecutor(self.folder, cluster=self.cluster)
            executor.update_parameters(name="nnUNetUDA", **self.parameters)
        except (RuntimeError, ValueError, NameError) as error:
            raise UDAError(f"submitit cannot use SLURM here ({error}): start this where sbatch works") from error
        fresh = [job for job in jobs if job.name not in under_way]
        starts = {job.name: prepare(job) if job in fresh else 0 for job in jobs}
        with executor.batch():
            submitted = [executor.submit(self.submitit.helpers.CommandFunction(command_of(job))) for job in fresh]
        under_way |= {job.name: item for job, item in zip(fresh, submitted, strict=True)}
        write_json({name: item.job_id for name, item in under_way.items()}, record)
        for job in jobs:
            started(job)
        waiting = list(jobs)
        with _ended_by_sigterm():
            while waiting:
                for job in [job for job in waiting if under_way[job.name].done()]:
                    waiting.remove(job)
                    error = under_way[job.name].exception()
                    state = f"SLURM job {under_way[job.name].job_id} {under_way[job.name].state}"
                    done(job, None if error is None else _reason(job, starts[job.name], state))
                if waiting:
                    time.sleep(self.poll_seconds)


def _reason(job: Job, start: int, state: str) -> str:
    return f"{last_error(job.log, start, 'it said nothing')} ({state}; log: {job.log})"


def _visible_devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    import torch

    return [str(index) for index in range(max(1, torch.cuda.device_count()))]


def _end(process: subprocess.Popen) -> None:
    """End a job with all its processes: first as a cluster would, and what is left after ten seconds for good."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        limit = time.monotonic() + 10
        while time.monotonic() < limit:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # none is left
        pass
    process.wait()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises ``SystemExit``, so that the jobs under way end too: a new start would not be alone with them."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
