"""``-engine slurm``: what is asked of SLURM and what is made of its answers; and real runs where SLURM is installed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.jobs import a_job

from nnunet_uda.commands import compare
from nnunet_uda.commands.grid_options import make_engine
from nnunet_uda.errors import UDAError
from nnunet_uda.errors import command as as_command
from nnunet_uda.experiments import engines
from nnunet_uda.experiments.engines import SubmititEngine, run_jobs
from nnunet_uda.experiments.job import Job, Score
from nnunet_uda.training import launch

pytest.importorskip("submitit")

# --- with commands of SLURM's names ----------------------------------------------------------------------------------

COMMANDS = r'''#!/usr/bin/env python3
"""sbatch, srun, squeue and scancel for one machine without a queue; each job's state is a file."""
import os, re, signal, subprocess, sys
from pathlib import Path

name, words, jobs = Path(sys.argv[0]).name, sys.argv[1:], Path(os.environ["FAKE_SLURM"])
with open(jobs / "calls", "a") as file:
    file.write(f"{name} {' '.join(words)}\n")
if (jobs / "down").exists():
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
if name == "sbatch":
    if (jobs / "refuse").exists():
        sys.exit("sbatch: error: invalid partition specified: gpu")
    script = Path(words[0]).read_text()
    number = len(list(jobs.glob("*.sh"))) + 1
    (jobs / f"{number}.sh").write_text(script)
    array = re.search(r"--array=0-(\d+)", script)
    for index in range(int(array[1]) + 1 if array else 1):
        job = f"{number}_{index}" if array else f"{number}"
        own = {"SLURM_ARRAY_JOB_ID": f"{number}", "SLURM_ARRAY_TASK_ID": f"{index}"} if array else {}
        (jobs / f"{job}.state").write_text("RUNNING")
        run = f"bash {jobs}/{number}.sh >{jobs}/{job}.out 2>&1 && state=COMPLETED || state=FAILED; " \
              f"grep -q RUNNING {jobs}/{job}.state && echo $state >{jobs}/{job}.state"
        process = subprocess.Popen(["bash", "-c", run], env=os.environ | own | {"SLURM_JOB_ID": job},
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        (jobs / f"{job}.pid").write_text(str(process.pid))
    print(f"Submitted batch job {number}")
elif name == "srun":
    own = {"%j": "SLURM_JOB_ID", "%A": "SLURM_ARRAY_JOB_ID", "%a": "SLURM_ARRAY_TASK_ID"}
    for number, path in ((1, words[2]), (2, words[4])):  # --unbuffered --output FILE --error FILE
        for sign, variable in own.items():
            path = path.replace(sign, os.environ.get(variable, ""))
        os.dup2(os.open(path.replace("%t", "0"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.execvp(words[5], words[5:])
elif name == "squeue":
    for path in jobs.glob("*.state"):
        print(path.stem, path.read_text().strip())
elif name == "scancel":
    wanted = next(word.partition("=")[2] for word in words if word.startswith("--name="))
    for path in jobs.glob("*.state"):
        if f"--job-name={wanted}\n" in (jobs / f"{path.stem.partition('_')[0]}.sh").read_text():
            path.write_text("CANCELLED")
            os.killpg(int((jobs / f"{path.stem}.pid").read_text()), signal.SIGKILL)
'''

RUN = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
with open(folder / "log.txt", "a") as log:
    print("started", file=log, flush=True)
    while not (folder.parent / "go").exists():
        time.sleep(0.02)
    if "bad" in folder.name:
        print("ERROR: it broke", file=log)
    if folder.name in ("bad", "silent"):
        sys.exit("MemoryError: too much")
(folder / "ended").touch()
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder where these commands keep their jobs; ``calls`` holds what they were asked."""
    folder, commands = tmp_path / "fake_slurm", tmp_path / "bin"
    folder.mkdir()
    commands.mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (commands / name).write_text(COMMANDS)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(commands), os.environ["PATH"]]))
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setattr(engines, "command_of", lambda job: [sys.executable, "-c", RUN, str(job.folder)])
    monkeypatch.setattr(Job, "score", lambda self: Score([], 0.5) if (self.folder / "ended").exists() else None)
    yield folder
    for path in folder.glob("*.pid"):
        if (folder / f"{path.stem}.state").read_text() == "RUNNING":
            os.killpg(int(path.read_text()), signal.SIGKILL)


def engine_of(folder: Path) -> SubmititEngine:
    engine = SubmititEngine(folder / "slurm", {"timeout_min": 5})
    engine.poll_seconds = 0.1
    return engine


def finish(folder: Path, *jobs: Job) -> tuple[dict[str, Score], dict[str, str]]:
    """Scores and reasons of failures."""
    scores, failed = {}, {}
    run_jobs(engine_of(folder), jobs, scores, failed, lambda: None)
    return scores, failed


def stop_while_it_waits(folder: Path, job: Job) -> None:
    """SIGTERM ends the engine, not its job."""

    def end(_: Job) -> None:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 0.3)

    with pytest.raises(SystemExit) as stopped:
        engine_of(folder).run([job], end, lambda *_: pytest.fail("nothing ends yet"))
    assert stopped.value.code == 128 + signal.SIGTERM


def let_go(folder: Path) -> None:
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / "go").touch()


def calls(slurm: Path, name: str) -> int:
    return sum(line.startswith(f"{name} ") for line in (slurm / "calls").read_text().splitlines())


def parse(*options: str):
    words = ["-d", "501", "-tr", "SourceOnlyTrainer", "-p", "tiny", "-o", "out", "-engine", "slurm", *options]
    return compare.parse_arguments(words)


def test_options_become_parameters_of_submitit(tmp_path):
    options = ("-partition", "gpu", "-time", "90", "-jobs", "4", "-slurm", "account=x", "qos=y")
    assert make_engine(parse(*options), tmp_path).parameters == {
        "timeout_min": 90, "cpus_per_task": 8, "gpus_per_node": 1, "mem_gb": 32, "slurm_partition": "gpu",
        "slurm_array_parallelism": 4,
        "slurm_additional_parameters": {"signal": "TERM@90", "account": "x", "qos": "y"},
    }  # fmt: skip
    engine = make_engine(parse("-device", "cpu", "-slurm", "signal=TERM@300"), tmp_path)
    assert engine.parameters["gpus_per_node"] == 0
    assert engine.parameters["slurm_additional_parameters"] == {"signal": "TERM@300"}


def test_jobs_end_with_scores_or_with_what_they_and_slurm_said(tmp_path, slurm):
    let_go(tmp_path)
    jobs = [a_job(tmp_path, name) for name in ("good", "bad", "silent")]
    engine = engine_of(tmp_path)
    engine.parameters["slurm_additional_parameters"] = {"signal": engines.SLURM_WARNING}
    jobs[2].log.parent.mkdir(parents=True)
    jobs[2].log.write_text("ERROR: of a start before\n")
    scores, failed = {}, {}
    run_jobs(engine, jobs, scores, failed, lambda: None)
    assert set(scores) == {"good"} and set(failed) == {"bad", "silent"}
    assert failed["bad"] == f"ERROR: it broke (SLURM job 1_1 FAILED; log: {jobs[1].log})"
    assert failed["silent"].startswith("started (SLURM job 1_2 FAILED"), "the run's own log goes first"
    script = (slurm / "1.sh").read_text()
    assert "--signal=TERM@90\n" in script and "USR2" not in script and "--array=0-2%3\n" in script

    run_jobs(engine, jobs, {}, failed, lambda: None)
    assert calls(slurm, "sbatch") == 2 and "--array=0-1%2\n" in (slurm / "2.sh").read_text(), "only the failed ones"


def test_a_run_that_could_not_begin_is_explained_by_slurms_log(tmp_path, slurm, monkeypatch):
    words = ["bash", "-c", "echo 'ImportError: no such library' >&2; exit 3"]
    monkeypatch.setattr(engines, "command_of", lambda _: words)
    _, failed = finish(tmp_path, a_job(tmp_path))
    assert "ImportError: no such library (SLURM job 1 FAILED; log: " in failed["a"]


def test_a_new_start_waits_for_the_jobs_under_way(tmp_path, slurm, recwarn):
    jobs = [a_job(tmp_path, name) for name in ("a", "b")]
    stop_while_it_waits(tmp_path, jobs[0])
    assert json.loads((tmp_path / "slurm" / "submitted.json").read_text())["jobs"]["a"]["id"] == "1"

    let_go(tmp_path)
    scores, _ = finish(tmp_path, *jobs)
    assert set(scores) == {"a", "b"} and calls(slurm, "sbatch") == 2
    assert jobs[0].log.read_text() == jobs[1].log.read_text() == "started\n", "each once"
    finish(tmp_path, *jobs)
    assert calls(slurm, "sbatch") == 2 and not [w for w in recwarn if "submission" in str(w.message)]


def test_a_job_that_ends_while_a_new_start_looks_is_not_submitted_again(tmp_path, slurm, monkeypatch):
    job, ask = a_job(tmp_path), engines.slurm_states
    stop_while_it_waits(tmp_path, job)

    def after_its_end() -> dict[str, str]:
        let_go(tmp_path)
        while "COMPLETED" not in ask().values():
            time.sleep(0.02)
        return ask()

    monkeypatch.setattr(engines, "slurm_states", after_its_end)
    assert set(finish(tmp_path, job)[0]) == {"a"} and calls(slurm, "sbatch") == 1


def test_a_start_killed_while_it_submits_leaves_no_second_job(tmp_path, slurm, monkeypatch):
    job = a_job(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        write = engines.write_json

        def killed(content: dict, path: Path) -> None:
            if content["submitting"] is None:
                raise KeyboardInterrupt
            write(content, path)

        patch.setattr(engines, "write_json", killed)
        engine_of(tmp_path).run([job], lambda _: None, lambda *_: None)
    assert (slurm / "1.state").read_text() == "RUNNING"
    let_go(tmp_path)
    scores, _ = finish(tmp_path, job)
    assert (slurm / "1.state").read_text() == "CANCELLED" and (slurm / "2.state").read_text() == "COMPLETED\n"
    assert set(scores) == {"a"}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"submitting": null, "jobs": []}', '{"jobs": {"a": {"id": "1"}}}'])
def test_a_damaged_record_of_jobs_is_not_taken_for_none(tmp_path, slurm, text):
    record = tmp_path / "slurm" / "submitted.json"
    record.parent.mkdir()
    record.write_text(text)
    with pytest.raises(UDAError, match="submitted.json is n"):
        finish(tmp_path, a_job(tmp_path))
    assert not (slurm / "1.sh").exists(), "nothing was submitted"


def test_a_line_of_squeue_that_is_no_state_is_passed_over(monkeypatch):
    monkeypatch.setattr(engines, "_ask_slurm", lambda *_: "1 RUNNING\n\nslurm is busy now\n2_0 PENDING\n")
    assert engines.slurm_states() == {"1": "RUNNING", "2_0": "PENDING"}


def test_a_requeued_job_is_waited_for(tmp_path, slurm, monkeypatch):
    seen = iter(["RUNNING", "PREEMPTED", "PENDING", "NODE_FAIL", "PENDING", "CANCELLED"])
    monkeypatch.setattr(engines, "slurm_states", lambda: {"1": next(seen, "CANCELLED")})
    _, failed = finish(tmp_path, a_job(tmp_path))
    assert "SLURM job 1 CANCELLED" in failed["a"] and next(seen, None) is None


def test_a_job_that_slurm_has_forgotten_is_not_waited_for(tmp_path, slurm, monkeypatch):
    looks = iter([{}, {"1": "RUNNING"}, {}, {}])  # the first: what is under way; a fifth would find none, and fail
    monkeypatch.setattr(engines, "slurm_states", lambda: next(looks))
    _, failed = finish(tmp_path, a_job(tmp_path))
    assert "SLURM job 1 no longer known to it; log: " in failed["a"]


def test_what_slurm_refuses_or_does_not_answer(tmp_path, slurm, monkeypatch, capsys):
    job = a_job(tmp_path)
    for state, words in (("down", r"SLURM's squeue does not answer here \(slurm_load_jobs error: Unable"),
                         ("refuse", "SLURM did not take the jobs: sbatch: error: invalid partition")):  # fmt: skip
        (slurm / state).touch()
        with pytest.raises(UDAError, match=words):
            finish(tmp_path, job)
        (slurm / state).unlink()

    ask, down = engines.slurm_states, iter([False, True, True, False, True])

    def with_outages() -> dict[str, str]:
        is_down = next(down, None)
        if is_down is None:
            let_go(tmp_path)
        if is_down:
            raise UDAError("SLURM's squeue does not answer here")
        return ask()

    monkeypatch.setattr(engines, "slurm_states", with_outages)
    ended = []
    engine_of(tmp_path).run([job], lambda _: None, lambda *what: ended.append(what))
    assert ended == [(job, None)], "an outage ends nothing"
    assert capsys.readouterr().out.count("squeue does not answer here; asking again") == 2


def test_sigterm_waits_for_the_checkpoint_of_the_command(tmp_path):
    command = tmp_path / "train"
    command.write_text(
        "#!/bin/bash\ntrap 'sleep 0.5; echo saved >saved; exit 143' TERM\ntouch ready\n"
        "for i in $(seq 600); do sleep 0.1; done\n"
    )
    command.chmod(0o755)

    def job() -> None:
        os.chdir(tmp_path)
        with open("said", "w", buffering=1) as sys.stderr:
            as_command(lambda _: Job.call(None, str(command)))()

    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    limit = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert (tmp_path / "saved").exists() and process.exitcode == 1
    said = (tmp_path / "said").read_text()
    assert "train was asked to end (SIGTERM); a new start goes on from its last checkpoint" in said


def test_a_task_takes_the_cores_that_slurm_gives_it(monkeypatch):
    taken = []
    monkeypatch.setattr(launch.torch, "set_num_threads", taken.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE", "nnUNet_def_n_proc"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("SLURM_CPUS_PER_TASK", "12"), ("OMP_NUM_THREADS", "5")):
        launch.set_threads("cpu")
        monkeypatch.setenv(name, value)
    launch.set_threads("cpu")
    launch.set_threads("cuda")
    assert taken == [16, 8, 6, 5, 1]
    assert os.environ["nnUNet_def_n_proc"] == "8", "nnU-Net's own number, where there are as many cores"


# --- with SLURM ------------------------------------------------------------------------------------------------------


def slurm_missing() -> str | None:
    """Why there is no SLURM to test with."""
    if shutil.which("scontrol") is None:
        return "SLURM is not installed"
    answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False)
    return None if " is UP" in answer.stdout else f"no SLURM controller answers: {answer.stdout or answer.stderr}"


@pytest.mark.slow
@pytest.mark.skipif(slurm_missing() is not None, reason=str(slurm_missing()))
def test_a_comparison_outlives_its_command_and_a_cancelled_job(in_workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    words = [sys.executable, "-m", "nnunet_uda.commands.compare", "-d", "501", "-tr", "SourceOnlyTrainer",
             "SupervisedTrainer", "-p", "tiny", "-o", str(out), "-device", "cpu", "-np", "1", "-engine", "slurm",
             "-jobs", "1", "-cpus", "1", "-mem", "2", "-time", "60"]  # fmt: skip
    environment = in_workspace.environment | {name: os.environ[name] for name in ("nnUNet_results", "nnUNet_n_proc_DA")}

    def states() -> list[str]:
        return [run["state"] for run in json.loads((out / "compare.json").read_text())["runs"]]

    def ids() -> list[str]:
        path = out / "slurm" / "submitted.json"
        return [item["id"] for item in json.loads(path.read_text())["jobs"].values()] if path.exists() else []

    killed = subprocess.Popen(words, env=environment)
    while not ids():
        assert killed.poll() is None
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    first, second = ids()

    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waits:
        while "(log: " not in waits.stdout.readline():
            assert waits.poll() is None
        assert ids() == [first, second]
        subprocess.run(["scancel", second], check=True)
        said = waits.communicate(timeout=1800)[1]
    assert waits.returncode == 1 and f"(SLURM job {second} CANCELLED; log: " in said
    assert states() == ["finished", "failed"]

    again = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert again.returncode == 0, again.stderr
    assert states() == ["finished", "finished"] and len(list(out.glob("slurm/*_submission.sh"))) == 2
    logs = [path.read_text() for path in out.glob("runs/*/log.txt")]
    assert [text.count("$ nnUNetUDA_train") for text in logs] == [1, 1]
