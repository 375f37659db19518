"""Files and folders are whole, synced, and never lost; what the system refuses is one message."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.kills import fork, held, kill_at, killed
from tqdm import tqdm

from nnunet_uda import files
from nnunet_uda.errors import UDAError, command, system_fault
from nnunet_uda.files import put_back, whole_file, whole_folder, write_json


@pytest.fixture
def steps(monkeypatch) -> list[tuple[str, str]]:
    """What was synced (``("sync", path)``) and renamed (``("rename", new path)``), in order."""
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        seen.append(("sync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(old, new) -> None:
        seen.append(("rename", str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return seen


def fill(folder: Path, text: str) -> None:
    (folder / "below").mkdir()
    (folder / "one").write_text(text)
    (folder / "below" / "two").write_text(text)


def make(target: Path, text: str) -> None:
    with whole_folder(target) as folder:
        fill(folder, text)


def text_of(target: Path) -> set[str]:
    return {(target / name).read_text() for name in ("one", "below/two")}


# -- synced ------------------------------------------------------------------------------------------------------------


def test_a_file_is_synced_before_it_gets_its_name_and_its_name_after(tmp_path, steps):
    write_json([1], tmp_path / "a.json")
    kinds = [(kind, Path(path).name) for kind, path in steps]
    [temporary] = {name for kind, name in kinds if name not in ("a.json", tmp_path.name)}
    assert kinds == [("sync", temporary), ("rename", "a.json"), ("sync", tmp_path.name)]


def test_a_folder_is_synced_to_its_last_file_before_the_former_one_goes(tmp_path, steps, monkeypatch):
    target = tmp_path / "out"
    make(target, "former")
    steps.clear()
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (steps.append(("remove", str(path))), rmtree(path)))
    with whole_folder(target) as folder:
        fill(folder, "new")
        (folder / "link").symlink_to("/nowhere")
    new = [str(folder), str(folder / "below"), str(folder / "one"), str(folder / "below" / "two")]
    aside = next(i for i, (kind, _) in enumerate(steps) if kind == "rename")
    assert {path for kind, path in steps[:aside] if kind == "sync"} == set(new), "all is on the disk before any rename"
    stands = steps.index(("rename", str(target)))
    removed = next(i for i, (kind, _) in enumerate(steps) if kind == "remove")
    assert ("sync", str(tmp_path)) in steps[stands:removed], "the former one goes when the new one's name is synced"


# -- never lost --------------------------------------------------------------------------------------------------------


def test_an_error_leaves_the_former_folder(tmp_path):
    make(tmp_path / "out", "former")
    with pytest.raises(ValueError), whole_folder(tmp_path / "out") as folder:
        fill(folder, "new")
        raise ValueError
    assert text_of(tmp_path / "out") == {"former"} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_the_former_folder_is_put_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, error):
    target, replace = tmp_path / "out", os.replace
    make(target, "former")

    def fail(old, new):
        if Path(old).name == "new":
            raise error
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((UDAError, KeyboardInterrupt)):
        make(target, "new")
    assert text_of(target) == {"former"} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("call", [1, 2, 3])  # of os.replace: former aside, new in place, former given up
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_rename_loses_neither_and_a_failing_next_start_neither(tmp_path, monkeypatch, call, after):
    target = tmp_path / "out"
    make(target, "former")

    def run():
        kill_at(monkeypatch, os, "replace", call, after)
        make(target, "new")

    killed(run)
    with pytest.raises(ValueError), whole_folder(target):
        raise ValueError
    assert text_of(target) == {"former" if (call, after) < (2, True) else "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_given_up_never_comes_back_and_another_target_takes_nothing(tmp_path, monkeypatch):
    target = tmp_path / "out"
    make(target, "former")
    killed(lambda: (kill_at(monkeypatch, shutil, "rmtree", 1), make(target, "new")))
    shutil.rmtree(target)
    put_back(target)
    assert list(tmp_path.iterdir()) == []
    make(target, "former")
    killed(lambda: (kill_at(monkeypatch, os, "replace", 2), make(target, "new")))
    make(tmp_path / "other", "other")
    assert not target.exists()
    put_back(target)
    assert text_of(target) == {"former"}


def test_a_full_disk_names_the_file_and_leaves_the_former_one(tmp_path):
    write_json([1], tmp_path / "a.json")
    with pytest.raises(OSError) as caught, whole_file(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert system_fault(caught.value) == (
        f"No space left on device: '{tmp_path / 'a.json'}'. Make room there, or choose another folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_input_that_may_not_be_read_is_not_taken_for_the_output(tmp_path):
    def read(error: OSError) -> None:
        with whole_folder(tmp_path / "out"):
            raise error

    with pytest.raises(PermissionError):
        read(PermissionError(errno.EACCES, "Permission denied", "/in/scan.nii"))
    with pytest.raises(UDAError, match=r"out cannot be written \(No space left on device\. Make room"):
        read(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(BrokenPipeError):
        read(BrokenPipeError(errno.EPIPE, "Broken pipe"))


def test_file_systems_without_locks_are_gone_on_with_and_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    make(tmp_path / "out", "new")
    with files.exclusive(tmp_path / "out"):
        assert text_of(tmp_path / "out") == {"new"}
    assert "knows no locks (Function not implemented)" in capsys.readouterr().err


def test_a_lock_of_another_process_is_refused_or_waited_for(tmp_path):
    entered = fork.Event()

    def wait() -> None:
        with files.exclusive(tmp_path):
            entered.set()

    waiting = fork.Process(target=wait)
    with held(tmp_path / files.LOCK):
        with pytest.raises(BlockingIOError), files.locked(tmp_path / files.LOCK):
            pass
        waiting.start()
        assert not entered.wait(0.3)
    assert entered.wait(60)
    waiting.join()


def test_a_refusal_leaves_no_folder_behind_and_a_success_its_files(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for folder in (tmp_path / "a" / "b", mine):
        with pytest.raises(UDAError), files.exclusive(folder):
            raise UDAError("no such model")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"], "what was there before stays"
    with files.exclusive(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "made").touch()
    assert (tmp_path / "a" / "b" / "made").exists()


def test_who_waited_for_a_folder_that_was_removed_holds_the_new_one(tmp_path):
    folder, entered = tmp_path / "out", fork.Event()

    def wait() -> None:
        with files.exclusive(folder):
            (folder / "made").touch()
            entered.set()

    waiting = fork.Process(target=wait)
    with files.exclusive(folder):
        waiting.start()
        assert not entered.wait(0.3)
    assert entered.wait(60)
    waiting.join()
    assert {path.name for path in folder.iterdir()} == {"made", files.LOCK}


# -- one message -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a"), r"Permission denied: '/a'\. Give this user"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "Read-only file system: '/a'. Mount it for writing"),
        (OSError(errno.ENOSPC, "No space left on device"), r"No space left on device\. Make room"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/a"), "Choose a shorter name"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), "'/a' -> '/b'"),
        (OSError(errno.EMFILE, "Too many open files"), "fewer processes"),
        (MemoryError(), "memory ran out"),
        (OSError("65536 requested and 4080 written"), r"left short \(65536 requested and 4080 written\)\. Make room"),
        (UDAError("ours"), "^ERROR: ours$"),
    ],
)
def test_what_the_system_refuses_is_one_message(capsys, error, words):
    @command
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("ERROR: ") and said.count("\n") == 1
    assert re.search(words, said.strip())


def test_faults_of_ours_keep_their_traceback():
    @command
    def main(argv):
        raise argv

    for error in (ValueError("x"), OSError("no number"), BrokenPipeError(errno.EPIPE, "a worker's pipe")):
        with pytest.raises(type(error)):
            main(error)


def run_command(body: str, *, shell: str = "{}") -> subprocess.CompletedProcess:
    code = f"from nnunet_uda.errors import command\n@command\ndef main(argv=None):\n    {body}\nmain()"
    words = ["bash", "-c", shell.format(f'"{sys.executable}" -c "$CODE"') + '; echo "${PIPESTATUS[0]}"']
    return subprocess.run(words, env={**os.environ, "CODE": code}, capture_output=True, text=True, check=False)


def test_a_reader_that_goes_away_and_ctrl_c_end_a_command_without_a_traceback():
    done = run_command("[print(i) for i in range(100000)]", shell="{} | head -n 1")
    assert done.stdout.split() == ["0", str(128 + signal.SIGPIPE)] and done.stderr == ""
    interrupted = "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT)"
    done = run_command(f"import os, signal, time; {interrupted}; time.sleep(9)")  # a background shell ignores SIGINT
    assert done.stdout.split() == [str(128 + signal.SIGINT)] and done.stderr.strip() == "Interrupted"


def test_a_message_begins_a_line_behind_a_bar_of_progress(capsys):
    @command
    def main(argv):
        for _ in tqdm(range(3)):
            raise UDAError("bad") from ValueError("whose frames hold the bar, too")

    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err.endswith("\nERROR: bad\n")
