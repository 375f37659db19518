"""Where jobs run: processes of this machine, or SLURM through submitit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nnunet_uda.data.convention import read_json
from nnunet_uda.durations import duration_text, moment_text
from nnunet_uda.errors import UDAError
from nnunet_uda.experiments.job import Job, Score, last_error
from nnunet_uda.files import write_json
from nnunet_uda.workers import tied, usable_cores

POLL_SECONDS = 0.5
SLURM_POLL_SECONDS = 15.0
GONE = "no longer known to it"
ENDED = {GONE, "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
         "REVOKED", "TIMEOUT"}  # fmt: skip
"""States of SLURM jobs that nothing follows but, where SLURM requeues the job, PENDING."""
SLURM_WARNING = "TERM@90"
"""Seconds before its time limit at which SLURM asks a job to end; submitit's own SIGUSR2 would kill the training."""
Done = Callable[[Job, str | None], None]
"""Called with every job when it has ended, and with the reason where it has failed."""


def run_jobs(
    engine: Engine, jobs: Sequence[Job], scores: dict[str, Score], failed: dict[str, str], changed: Callable[[], object]
) -> None:
    """Finish all jobs, put scores and reasons of failures into the dictionaries, and call ``changed`` after each."""
    scores.update((job.name, score) for job in jobs if (score := job.score()) is not None)
    waiting = [job for job in jobs if job.name not in scores]
    print(f"{len(jobs)} runs, {len(scores)} of them finished before", flush=True)
    if waiting:
        changed()
    pace = Pace(len(waiting), engine.at_a_time)

    def started(job: Job) -> None:
        pace.started(job.name)
        print(f"{job.name} (log: {job.log})", flush=True)

    def done(job: Job, reason: str | None) -> None:
        score = job.score() if reason is None else None
        if score is not None:
            scores[job.name] = score
        else:
            failed[job.name] = reason or f"it wrote no scores (log: {job.log})"
        print(f"[{len(scores) + len(failed)}/{len(jobs)}] {job.name}: {failed.get(job.name, 'done')}", flush=True)
        if left := pace.done(job.name, reason is None):
            print(left, flush=True)
        changed()

    engine.run(waiting, started, done)


class Pace:
    """How many runs are left, and when they will be done.

    Args:
        number: of runs.
        at_a_time: of them that run side by side; None where a queue decides.
        clock: seconds.
    """

    def __init__(self, number: int, at_a_time: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.left, self.at_a_time, self.clock = number, at_a_time, clock
        self.starts: dict[str, float] = {}
        self.took: list[float] = []

    def started(self, name: str) -> None:
        self.starts[name] = self.clock()

    def done(self, name: str, finished: bool) -> str | None:
        """What to say when a run has finished or failed; None after the last one."""
        self.left -= 1
        begun = self.starts.pop(name)
        if finished:
            self.took.append(self.clock() - begun)
        if not self.left:
            return None
        text = f"{self.left} run{'s' if self.left > 1 else ''} left"
        if not self.took or self.at_a_time is None:
            return text
        mean = fmean(self.took)
        spent = sum(min(self.clock() - begun, mean) for begun in self.starts.values())
        seconds = max(mean * self.left - spent, 0) / min(self.at_a_time, self.left)
        return f"{text}, {duration_text(mean)} each: about {duration_text(seconds)}, until {moment_text(seconds)}"


def command_of(job: Job) -> list[str]:
    """The command that finishes a job whose file has been written."""
    return [sys.executable, "-m", "nnunet_uda.experiments.job", str(job.folder / "job.json")]


def prepare(job: Job) -> int:
    """Write the job's file; return the size of its log so far."""
    job.write()
    job.log.touch()
    return job.log.stat().st_size


class LocalEngine:
    """Run ``number`` jobs at a time as processes of this machine; they end with this process, even if it is killed."""

    def __init__(self, number: int, device: str) -> None:
        self.at_a_time, self.device = number, device

    def environment(self, slot: int) -> dict[str, str]:
        """Give a slot its share of this machine's cores and CUDA devices; what the user has set stays."""
        if self.at_a_time == 1:
            return dict(os.environ)
        cores = max(1, usable_cores() // self.at_a_time)
        shares = {"OMP_NUM_THREADS": str(cores), "nnUNet_n_proc_DA": str(cores)}
        environment = shares | dict(os.environ)
        if self.device == "cuda":
            visible = _visible_devices()
            environment["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
        return environment

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None], done: Done) -> None:
        """Finish all jobs; a failure stops no other job. If this call is ended, so are its processes."""
        waiting, slots = list(jobs), list(range(self.at_a_time))
        running: list[tuple[subprocess.Popen, Job, int, int]] = []
        with _ended_by_sigterm():
            try:
                while waiting or running:
                    while waiting and slots:
                        job, slot = waiting.pop(0), slots.pop(0)
                        start = prepare(job)
                        environment = tied(self.environment(slot))
                        process = subprocess.Popen(command_of(job), env=environment, start_new_session=True)
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


@dataclass(frozen=True)
class Submitted:
    """A SLURM job: its id, and the size in bytes of its run's log when it was submitted."""

    id: str
    log_start: int


class SubmititEngine:
    """Run jobs through SLURM, submitted by submitit; they outlive this process.

    Which run has which SLURM job is kept in ``folder``: a new start waits for those still there. SLURM's controller is
    asked what became of them, as it needs no accounting and knows of a job at once.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        try:
            import submitit
        except ImportError as error:
            raise UDAError("-engine slurm needs submitit: pip install 'nnunet_uda[slurm]'") from error
        self.submitit, self.folder, self.parameters = submitit, folder, parameters
        self.poll_seconds = SLURM_POLL_SECONDS
        self.at_a_time: int | None = None  # the queue decides

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None], done: Done) -> None:
        """Submit what is not under way, and wait for everything.

        A job that has left the queue without scores has failed, unless they show until the next look: a shared file
        system may be late, and a job that SLURM requeues is between two states.
        """
        with _ended_by_sigterm():
            under_way = self._submit(jobs)
            for job in jobs:
                started(job)
            waiting, left, answers = list(jobs), set[str](), True
            while waiting:
                time.sleep(self.poll_seconds)
                try:
                    states = slurm_states()
                except UDAError as error:
                    if answers:
                        print(f"{error}; asking again every {self.poll_seconds:.0f} s", flush=True)
                    answers = False
                    continue
                answers = True
                for job in list(waiting):
                    item = under_way[job.name]
                    state = states.get(item.id, GONE)
                    if state not in ENDED:
                        left.discard(job.name)
                    elif job.score() is not None:
                        waiting.remove(job)
                        done(job, None)
                    elif job.name not in left:
                        left.add(job.name)
                    else:
                        waiting.remove(job)
                        done(job, self._reason(job, item, state))

    def _submit(self, jobs: Sequence[Job]) -> dict[str, Submitted]:
        """Submit runs that have no job in the queue; return the SLURM jobs of all runs.

        Raises:
            UDAError: SLURM or submitit is not there, or refuses the jobs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "submitted.json"
        submitting, known = _read_record(record) if record.exists() else (None, {})
        if submitting is not None:  # killed before their ids were written down
            _ask_slurm("scancel", f"--user={os.getuid()}", f"--name={submitting}")
        states = slurm_states()
        ended = {name for name, item in known.items() if states.get(item.id, GONE) in ENDED}
        finished = {job.name for job in jobs if job.name in ended and job.score() is not None}  # meanwhile
        under_way = {name: item for name, item in known.items() if name not in ended - finished}
        fresh = [job for job in jobs if job.name not in under_way]
        if fresh:
            name = f"nnUNetUDA-{uuid.uuid4().hex[:8]}"
            starts = [prepare(job) for job in fresh]
            _write_record(record, name, under_way)
            try:
                executor = self.submitit.AutoExecutor(self.folder, cluster="slurm")
                executor.update_parameters(name=name, **self.parameters)
                with executor.batch():
                    items = [executor.submit(self.submitit.helpers.CommandFunction(command_of(job))) for job in fresh]
            except (RuntimeError, ValueError, NameError, OSError) as error:
                raise UDAError(f"SLURM did not take the jobs: {str(error).strip()}") from error
            for job, item, start in zip(fresh, items, starts, strict=True):
                under_way[job.name] = Submitted(item.job_id, start)
        _write_record(record, None, under_way)
        return under_way

    def _reason(self, job: Job, item: Submitted, state: str) -> str:
        errors = self.submitit.SlurmJob(self.folder, item.id).paths.stderr
        otherwise = last_error(errors, 0, "it said nothing") if errors.exists() else "it said nothing"
        return _reason(job, item.log_start, f"SLURM job {item.id} {state}", otherwise)


Engine = LocalEngine | SubmititEngine


def slurm_states() -> dict[str, str]:
    """State of every job of this user that SLURM's controller knows, by id; it forgets those that ended long ago.

    Raises:
        UDAError: no answer.
    """
    answer = _ask_slurm("squeue", f"--user={os.getuid()}", "--states=all", "--array", "--noheader", "--format=%i %T")
    return dict(words for line in answer.splitlines() if len(words := line.split()) == 2)


def _ask_slurm(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise UDAError(f"SLURM's {words[0]} does not answer here ({said.strip()})") from error


def _read_record(path: Path) -> tuple[str | None, dict[str, Submitted]]:
    """What ``_write_record`` wrote.

    Raises:
        UDAError: for another content: which jobs are under way is not known.
    """
    try:
        content = read_json(path)
        known = {name: Submitted(str(item["id"]), int(item["log_start"])) for name, item in content["jobs"].items()}
        return content["submitting"], known
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UDAError(
            f"{path} is no record of submitted jobs ({type(error).__name__}: {error}), so that runs under way would be "
            "submitted again. End those that squeue shows (scancel), then remove the file"
        ) from error


def _write_record(path: Path, submitting: str | None, jobs: dict[str, Submitted]) -> None:
    write_json({"submitting": submitting, "jobs": {name: asdict(item) for name, item in jobs.items()}}, path)


def _reason(job: Job, start: int, state: str, otherwise: str = "it said nothing") -> str:
    return f"{last_error(job.log, start, otherwise)} ({state}; log: {job.log})"


def _visible_devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    import torch

    return [str(index) for index in range(max(1, torch.cuda.device_count()))]


def _end(process: subprocess.Popen) -> None:
    """End a job and its processes: SIGTERM, as a cluster would, then SIGKILL for what is left after ten seconds."""
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
