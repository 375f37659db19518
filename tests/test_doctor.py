"""``nnUNetUDA_doctor``, and what the commands find by themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import TRAINERS

from nnunet_uda import installation
from nnunet_uda.commands import compare, doctor, train
from nnunet_uda.errors import UDAError
from nnunet_uda.installation import NOTE, OK, WRONG, Finding
from nnunet_uda.methods import find_any_trainer, let_find


@pytest.fixture
def healthy(tmp_path, monkeypatch):
    for name in installation.FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS))
    return tmp_path


def test_a_machine_that_has_everything(healthy, capsys):
    doctor.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Everything is there" and not any(line.startswith(WRONG) for line in lines)
    for word in ("Python", "nnunetv2 2.8", *installation.FOLDERS, "device", "cores", "trainers"):
        assert any(word in line for line in lines), word


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda path, patch: patch.delenv("nnUNet_raw"), "nnUNet_raw           not set. Add: export nnUNet_raw="),
        (lambda path, patch: patch.setenv("nnUNet_raw", "~/raw"), "nnUNet_raw           '~/raw'; expected a folder"),
        (lambda path, patch: (path / "nnUNet_results").rmdir(), "nnUNet_results is no folder. Make it: mkdir -p"),
        (lambda path, patch: patch.setattr(os, "access", lambda p, mode: mode != os.W_OK), "nnUNet_results       "),
        (lambda path, patch: patch.delenv("nnUNet_extTrainer"), "is not set: nnUNetUDA_train finds the trainers"),
        (lambda path, patch: patch.setenv("nnUNet_extTrainer", str(path)), ", without /"),
        (lambda path, patch: patch.setenv("nnUNet_extTrainer", f"{TRAINERS}:{path}/gone"), "gone is no folder"),
        (lambda path, patch: patch.setattr(installation, "LEAST_GIB", 10**9), "make room there"),
        (lambda path, patch: patch.setattr(installation, "version", lambda name: "0.1"), "nnunetv2 0.1 ("),
    ],
)
def test_what_is_wrong_has_a_line_and_a_status(healthy, monkeypatch, capsys, change, text):
    change(healthy, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        doctor.main([])
    said = capsys.readouterr()
    assert stopped.value.code == 1 and "to mend" in said.err
    assert any(line.startswith(WRONG) and text in line for line in said.out.splitlines()), said.out


@pytest.mark.parametrize("value", ["0", "2"])
def test_what_planning_fails_with_is_noted(monkeypatch, value):
    monkeypatch.setenv("nnUNet_n_proc_DA", value)
    noted = [finding.state for finding in installation.devices() if finding.what == "nnUNet_n_proc_DA"]
    assert noted == ([NOTE] if value == "0" else [])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "code", ["import nothing_of_this_name", "import sys\nsys.exit(3)", "raise RuntimeError('no device')", "a b", "a"]
)
def test_a_trainer_of_the_users_that_cannot_be_imported(healthy, monkeypatch, capsys, code, first):
    (healthy / "mine").mkdir()
    (healthy / "mine" / "broken.py").write_text(f"{code}\n")
    folders = [str(TRAINERS), str(healthy / "mine")]
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(reversed(folders) if first else folders))
    with pytest.raises(SystemExit) as stopped:
        doctor.main([])
    said = capsys.readouterr()
    assert stopped.value.code == 1 and "1 thing(s) to mend" in said.err
    assert "broken cannot be imported: " in said.out and "\nok    trainers " not in said.out
    with pytest.raises(UDAError, match=r"mine/broken.py, line \d, cannot be imported \(\w+: .*mend this one"):
        find_any_trainer("CASTTrainer" if first else "NoTrainer")


def test_one_failing_check_stops_no_other():
    def failing():
        raise OSError("no such thing")
        yield

    found = list(installation.examine((failing, lambda: iter([Finding(OK, "x", "y")]))))
    assert [finding.state for finding in found] == [WRONG, OK] and "no such thing" in found[0].text
    assert NOTE != WRONG


def test_our_trainers_are_found_beside_the_users(monkeypatch):
    for before, after in (("", [str(TRAINERS)]), ("/mine", ["/mine", str(TRAINERS)]), (str(TRAINERS), [str(TRAINERS)])):
        monkeypatch.setenv("nnUNet_extTrainer", before)
        let_find()
        assert [str(Path(path).resolve()) for path in os.environ["nnUNet_extTrainer"].split(os.pathsep)] == after


@pytest.mark.parametrize(("cuda", "device"), [(True, "cuda"), (False, "cpu")])
def test_training_takes_the_device_that_there_is_and_says_so(monkeypatch, capsys, cuda, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    taken = []
    monkeypatch.setattr(train, "train", lambda *words, **_: taken.append(words[5].type))
    monkeypatch.setattr(train, "set_threads", lambda device: None)
    train.main(["501", "2d", "0", "-tr", "CASTTrainer"])
    assert taken == [device]
    said = capsys.readouterr().out
    assert ("No CUDA device is visible: running on the CPU" in said) == (not cuda)
    predict = f"nnUNetv2_predict -d 501 -c 2d -f 0 -tr CASTTrainer{'' if cuda else ' -device cpu'} "
    assert said.splitlines()[-1] == f"Next: {predict}-i IMAGES -o PREDICTIONS"


def test_where_no_device_is_named_the_grids_take_the_best_and_slurm_cuda(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["-d", "501", "-tr", "EntMinTrainer", "-p", "tiny", "-o", "out"]
    assert compare.parse_arguments(words).device == "cpu"
    assert "No CUDA device is visible: running on the CPU" in capsys.readouterr().out
    assert compare.parse_arguments([*words, "-engine", "slurm"]).device == "cuda"


def test_a_device_that_was_asked_for_is_not_exchanged(monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "Add -device cpu" in refused(train.main, ["501", "2d", "0", "-tr", "CASTTrainer", "-device", "cuda"])


def test_waiting_threads_leave_the_cores_to_others():
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
