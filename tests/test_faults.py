"""Kills at the worst moments, signals, damaged files, dead workers: after each the same command goes on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import differences, make_trainer, same_weights, sampled, weights
from support.kills import kill_at, killed
from support.tiny import PROTOTYPES, write_plans

from nnunet_uda import files, workers
from nnunet_uda.adaptation import model as adapted_model
from nnunet_uda.commands import configure, convert, fold_images, intensities, preprocess
from nnunet_uda.data.damage import refuse_damaged
from nnunet_uda.data.target import MANIFEST, TargetDataset
from nnunet_uda.errors import UDAError
from nnunet_uda.images import reading
from nnunet_uda.training import checkpoint, interruption
from nnunet_uda.training.interruption import StopSignals, fold_lock
from nnunet_uda.training.streams import refuse_damaged_cases
from nnunet_uda.workers import as_done


@pytest.fixture
def own_copy(in_workspace, monkeypatch, tmp_path):
    """Raw and preprocessed folders that the test may change."""
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(in_workspace, name), tmp_path / name, ignore=shutil.ignore_patterns("*_target"))
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


# -- checkpoints -------------------------------------------------------------------------------------------------------


def content(epoch: int) -> dict:
    return {"current_epoch": epoch, "weights": torch.full((1000,), float(epoch))}


@pytest.mark.parametrize(
    ("module", "name", "call", "after", "latest"),
    [
        (torch, "save", 1, True, 2),  # written, not yet synced or renamed
        (os, "link", 1, True, 2),  # the previous one's second name is there, not yet its final name
        (os, "replace", 1, True, 2),  # previous renamed, the new one not
        (os, "replace", 2, False, 2),
        (os, "replace", 2, True, 3),
        (files, "sync_folder", 2, False, 3),
    ],
)
def test_a_kill_while_a_checkpoint_is_written(tmp_path, monkeypatch, module, name, call, after, latest):
    path = tmp_path / checkpoint.LATEST
    for epoch in (1, 2):
        checkpoint.write_checkpoint(content(epoch), path)

    def write():
        kill_at(monkeypatch, module, name, call, after)
        checkpoint.write_checkpoint(content(3), path)

    killed(write)
    assert checkpoint.read_checkpoint(path)["current_epoch"] == latest
    assert checkpoint.read_checkpoint(tmp_path / checkpoint.PREVIOUS)["current_epoch"] in (latest - 1, latest)
    files.remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {checkpoint.LATEST, checkpoint.PREVIOUS}
    checkpoint.write_checkpoint(content(4), path)
    assert checkpoint.read_checkpoint(tmp_path / checkpoint.PREVIOUS)["current_epoch"] == latest


def test_file_systems_without_hard_links_keep_the_previous_checkpoint_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in (1, 2):
        checkpoint.write_checkpoint(content(epoch), tmp_path / checkpoint.LATEST)
    assert checkpoint.read_checkpoint(tmp_path / checkpoint.PREVIOUS)["current_epoch"] == 1


@pytest.mark.parametrize("damaged", [checkpoint.LATEST, checkpoint.FINAL, checkpoint.BEST])
def test_a_damaged_checkpoint_offers_a_whole_one_with_a_command_that_works(tmp_path, damaged):
    folder = tmp_path / "fold 0"  # with a space
    folder.mkdir()
    if damaged == checkpoint.LATEST:
        for epoch in (4, 5):
            checkpoint.write_checkpoint(content(epoch), folder / checkpoint.LATEST)
    else:
        checkpoint.write_checkpoint(content(4), folder / checkpoint.PREVIOUS)
        checkpoint.write_checkpoint(content(5), folder / damaged)
    path = folder / damaged
    path.write_bytes(path.read_bytes()[:3000])
    (folder / checkpoint.BEST).write_bytes(b"") if damaged != checkpoint.BEST else None
    with pytest.raises(UDAError, match=r"cut short.*previous.pth is whole and stands at epoch 4") as error:
        checkpoint.read_checkpoint(path)
    command = str(error.value).split("To go on from it: ")[1].split(" and then the same")[0]
    subprocess.run(command, shell=True, check=True)
    first = next(p for p in (folder / checkpoint.FINAL, folder / checkpoint.LATEST) if p.exists())  # as --c chooses
    assert checkpoint.read_checkpoint(first)["current_epoch"] == 4
    for other in folder.iterdir():
        other.write_bytes(b"PK")
    with pytest.raises(UDAError, match="start anew, without --c"):
        checkpoint.read_checkpoint(folder / checkpoint.LATEST)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_checkpoint_that_the_system_does_not_let_be_read_is_not_called_damaged(tmp_path, monkeypatch, number):
    def refuse(path, **_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(torch, "load", refuse)
    for read in (checkpoint.read_checkpoint, lambda path: adapted_model._read(path, trusted=False)):
        with pytest.raises(UDAError, match=rf"x\.pth cannot be read \({os.strerror(number)}: '.*x\.pth'\. \w"):
            read(tmp_path / "x.pth")


def test_reading_a_checkpoint_runs_nothing(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({**content(1), "more": Evil(tmp_path / "ran")}, path)
    with pytest.raises(UDAError, match=r"evil.pth cannot be read"):
        checkpoint.read_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(UDAError, match=r"evil.pth cannot be read"):
        checkpoint.read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_numpys_numbers_and_random_states_are_read_old_and_new(tmp_path):
    np.random.seed(3)
    old = {"numpy": np.random.get_state(), "dice": [np.float64(0.5), np.float32(0.25)]}
    torch.save(old, tmp_path / "old.pth")
    new = {**checkpoint.random_state(), "dice": checkpoint.plain(old["dice"])}
    torch.save(new, tmp_path / "new.pth")
    torch.load(tmp_path / "new.pth", weights_only=True)  # nothing of numpy's is left
    expected = np.random.rand(5)
    for name in ("old", "new"):
        np.random.seed(0)
        state = checkpoint.read_checkpoint(tmp_path / f"{name}.pth")
        checkpoint.set_random_state({**new, "numpy": state["numpy"]})
        assert (np.random.rand(5) == expected).all()
        assert state["dice"] == [0.5, 0.25]


def test_a_training_begun_anew_takes_the_former_ones_checkpoints_out_of_sight(tmp_path):
    names = (checkpoint.PREVIOUS, checkpoint.LATEST, checkpoint.FINAL, checkpoint.BEST, "checkpoint_epoch_0005.pth")
    for epoch, name in enumerate(names):
        checkpoint.write_checkpoint(content(epoch), tmp_path / name)
    assert checkpoint.set_former_aside(tmp_path) == tmp_path / checkpoint.FORMER
    left = {checkpoint.FORMER, checkpoint.BEST, "former_checkpoint_epoch_0005.pth"}
    assert {p.name for p in tmp_path.iterdir()} == left
    assert checkpoint.read_checkpoint(tmp_path / checkpoint.FORMER)["current_epoch"] == 2
    assert checkpoint.set_former_aside(tmp_path) is None
    for epoch, number in ((1, 2), (7, 3)):  # begun anew again and again: nothing that was kept is overwritten
        for name in (checkpoint.LATEST, "checkpoint_epoch_0005.pth"):
            checkpoint.write_checkpoint(content(epoch), tmp_path / name)
        former = tmp_path / f"checkpoint_former_{number}.pth"
        assert checkpoint.set_former_aside(tmp_path) == former
        assert checkpoint.read_checkpoint(former)["current_epoch"] == epoch
        left |= {former.name, f"former_checkpoint_epoch_0005_{number}.pth"}
    assert {p.name for p in tmp_path.iterdir()} == left
    assert checkpoint.read_checkpoint(tmp_path / checkpoint.FORMER)["current_epoch"] == 2


# -- signals -----------------------------------------------------------------------------------------------------------


def signalled(trainer, method: str, call: int, number: signal.Signals) -> None:
    """Let the signal arrive during the given call of one of the trainer's methods."""
    original, seen = getattr(trainer, method), []

    def replacement(*args):
        seen.append(1)
        if len(seen) == call:
            os.kill(os.getpid(), number)
        return original(*args)

    setattr(trainer, method, replacement)


TINY = {
    "CISFATrainer": {},
    "CASTTrainer": {"cast__start_share": 0.0, "cast__confidence": 0.0},
    "SimilarityPrototypesTrainer": {f"similarity_prototypes__{name}": value for name, value in PROTOTYPES.items()}
    | {"similarity_prototypes__warmup_epochs": 0, "similarity_prototypes__confidence": 0.0},
    "UUDSTrainer": {"plans": "uuds", "uuds__content_weight": 1.0},
    "CUTTrainer": {"cut__generator_width": 4, "cut__generator_blocks": 2, "cut__discriminator_width": 4,
                   "cut__patches": 16},
    "EntMinTrainer": {},
    "ADVENTTrainer": {"advent__discriminator_width": 4},
}  # fmt: skip


@sampled("name", TINY, "CASTTrainer", "CUTTrainer")
def test_a_signal_ends_training_with_a_checkpoint_that_goes_on_bit_for_bit(in_workspace, name):
    """In a step, in the validation and in a step again, all in one training. CUT goes on into its second part."""
    options = {"num_epochs": 3, "iterations_per_epoch": 3, "val_iterations_per_epoch": 2, "criterion_patches": 2,
               "segmenter_learning_rate": 0.05, **TINY[name]}  # fmt: skip
    write_plans(in_workspace, "uuds")
    whole = make_trainer(name, **options)
    whole.run_training()
    folder = Path(whole.output_folder)
    moments = [("train_on", 2, signal.SIGTERM), ("validation_step", 1, signal.SIGINT), ("train_on", 2, signal.SIGTERM)]
    trainer = make_trainer(name, **options)
    for number, (method, call, kind) in enumerate(moments):
        if number:
            trainer = make_trainer(name, **options)
            trainer.load_checkpoint(str(folder / checkpoint.LATEST))
        signalled(trainer, method, call, kind)
        with pytest.raises(SystemExit) as end:
            trainer.run_training()
        assert end.value.code == 128 + kind
        steps = checkpoint.read_checkpoint(folder / checkpoint.LATEST)["uda"]["steps"]
        assert (trainer.current_epoch, len(steps)) == [(0, 2), (0, 3), (1, 2)][number], "nothing done twice"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not (folder / checkpoint.FINAL).exists() and (folder / checkpoint.FORMER).exists()
    last = make_trainer(name, **options)
    last.load_checkpoint(str(folder / checkpoint.LATEST))
    last.run_training()
    assert same_weights(weights(whole), weights(last))
    undisturbed, continued = (checkpoint.read_checkpoint(folder / n) for n in (checkpoint.FORMER, checkpoint.FINAL))
    assert undisturbed["_best_ema"] == max(undisturbed["logging"]["ema_fg_dice"]) > 0, (
        "else it says nothing of the mean"
    )
    assert differences(undisturbed, continued) == []
    assert not (folder / checkpoint.PREVIOUS).exists() and not (folder / checkpoint.LATEST).exists()


def test_a_signal_outside_the_loop_ends_at_once_and_a_repeated_one_changes_nothing(capfd):
    before = signal.getsignal(signal.SIGINT)  # a shell ignores it for what it starts in the background
    with pytest.raises(SystemExit) as end, StopSignals("do this"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert end.value.code == 143
    with StopSignals("do this") as stop:
        stop.at_once = False
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert "SIGTERM: ended. do this" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


# -- processes ---------------------------------------------------------------------------------------------------------


def run_python(*lines: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, text=True)


def test_a_fold_takes_one_training_and_a_killed_one_frees_it_though_its_workers_live(tmp_path):
    process = run_python(
        "import multiprocessing, pathlib, sys, time",
        "from nnunet_uda.training.interruption import fold_lock",
        f"with fold_lock(pathlib.Path({str(tmp_path)!r})):",
        "    worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))",
        "    worker.start()",
        "    print(worker.pid, flush=True)",
        "    time.sleep(60)",
    )
    worker = int(process.stdout.readline())
    with pytest.raises(UDAError, match=rf"another training runs on this fold \(process {process.pid} on "):
        with fold_lock(tmp_path):
            pass
    process.kill()
    process.wait()
    os.kill(worker, 0)  # alive
    with fold_lock(tmp_path):
        pass
    os.kill(worker, signal.SIGKILL)


def test_workers_end_with_the_process_they_work_for():
    process = run_python(
        "import multiprocessing, os, time",
        "from nnunet_uda.training.interruption import StopSignals",
        "with StopSignals(''):",
        "    worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))",
        "    worker.start()",
        "    print(worker.pid, flush=True)",
        "    time.sleep(60)",
    )
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and "zombie" not in Path(f"/proc/{worker}/status").read_text():
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.1)


def _end_badly(task: int) -> int:
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


@pytest.mark.parametrize(
    ("given", "cores", "expected"), [("", 2, 2), ("", 64, 8), ("12", 2, 12), ("many", 3, 3), ("²", 3, 3)]
)
def test_no_more_workers_than_cores_unless_someone_says_so(monkeypatch, given, cores, expected):
    monkeypatch.setenv("nnUNet_def_n_proc", given)
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    assert workers.usual_processes() == expected


@pytest.mark.slow
def test_a_killed_worker_is_noticed():
    with pytest.raises(UDAError, match="a worker process was killed"):
        list(as_done(_end_badly, [0, 1, 2], 1))


def test_a_dead_loader_process_ends_training_with_a_message(in_workspace, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = make_trainer("SourceOnlyTrainer", num_epochs=1, iterations_per_epoch=10000)
    step = trainer.train_on

    def kill_one(*args):
        if trainer.dataloader_train._processes:
            trainer.dataloader_train._processes[0].kill()
        return step(*args)

    monkeypatch.setattr(trainer, "train_on", kill_one)
    with pytest.raises(UDAError, match=r"a process that loads training data was killed.*nnUNet_n_proc_DA"):
        trainer.run_training()
    assert multiprocessing.active_children() == []


# -- preprocessed cases ------------------------------------------------------------------------------------------------


def test_a_damaged_source_case_is_named_before_training(own_copy):
    path = own_copy / "preprocessed" / "Dataset501_Blobs" / "nnUNetPlans_2d" / "mr_Tr01.b2nd"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UDAError, match=r"nnUNetPlans_2d/mr_Tr01 .*nnUNetv2_preprocess -d Dataset501_Blobs"):
        make_trainer("SourceOnlyTrainer").run_training()


def test_damage_inside_a_label_is_named_before_training(own_copy):
    path = own_copy / "preprocessed" / "Dataset501_Blobs" / "nnUNetPlans_2d" / "mr_Tr01_seg.b2nd"
    content = path.read_bytes()
    third = len(content) // 3
    path.write_bytes(content[:third] + b"\xff" * third + content[2 * third :])
    with pytest.raises(UDAError, match=r"nnUNetPlans_2d/mr_Tr01 .*nnUNetv2_preprocess -d Dataset501_Blobs"):
        make_trainer("SourceOnlyTrainer").run_training()


def test_damage_inside_a_file_is_found_when_loading_fails(own_copy, monkeypatch):
    trainer = make_trainer("SourceOnlyTrainer", num_epochs=1)
    trainer.on_train_start()
    dataset = trainer.training_dataset
    case = dataset.identifiers[0]
    data, seg, _, properties = dataset.load_case(case)
    voxels = data[:].copy()
    voxels[0, 3, 5, 5] = np.nan
    labels = seg[:].copy()
    for suffix in (".b2nd", "_seg.b2nd"):
        Path(trainer.preprocessed_dataset_folder, f"{case}{suffix}").unlink()
    dataset.save_case(voxels, labels, properties, str(Path(trainer.preprocessed_dataset_folder, case)))
    refuse_damaged((dataset,), "x")  # opens
    with pytest.raises(UDAError, match=rf"{case} \(voxels are NaN.*Preprocess the source again"):
        refuse_damaged_cases(trainer)


def test_a_damaged_or_missing_target_file_is_made_again(own_copy, capsys):
    preprocess.main(["-d", "501", "-np", "1"])
    folder = own_copy / "preprocessed" / "Dataset501_Blobs" / "nnUNetPlans_2d_target"
    whole = {path.name: path.read_bytes() for path in folder.glob("*.b2nd")}
    (folder / "ct_Tu01.b2nd").write_bytes(whole["ct_Tu01.b2nd"][:-1])
    (folder / "ct_Tu02_seg.b2nd").unlink()
    (folder / "ct_Tu03.pkl").write_bytes(b"")
    preprocess.main(["-d", "501", "-np", "1"])
    assert "files of ct_Tu01, ct_Tu02, ct_Tu03 are missing or cut short" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.glob("*.b2nd")} == whole
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sizes"]  # as written before sizes were noted
    (folder / MANIFEST).write_text(json.dumps(manifest))
    preprocess.main(["-d", "501", "-np", "1"])
    assert "Preprocessing" not in capsys.readouterr().out
    (folder / MANIFEST).write_bytes(b"[")
    preprocess.main(["-d", "501", "-np", "1"])
    assert "Preprocessing 4 unlabelled" in capsys.readouterr().out


@pytest.mark.parametrize("call", [4, 6, 7])  # of os.replace: among a case's files, before and after the manifest
def test_a_kill_while_the_target_is_preprocessed(own_copy, monkeypatch, call, capsys):
    folder = own_copy / "preprocessed" / "Dataset501_Blobs" / "nnUNetPlans_2d_target"

    def run():
        kill_at(monkeypatch, os, "replace", call)
        preprocess.main(["-d", "501", "-np", "1"])

    killed(run)
    listed = json.loads((folder / MANIFEST).read_text())["cases"]
    assert len(listed) < 4
    refuse_damaged((TargetDataset(str(folder), list(listed)),), "x", voxels=True)
    preprocess.main(["-d", "501", "-np", "1"])
    assert f"Preprocessing {4 - len(listed)} unlabelled" in capsys.readouterr().out
    assert len(json.loads((folder / MANIFEST).read_text())["cases"]) == 4
    refuse_damaged((TargetDataset(str(folder)),), "x", voxels=True)
    assert len(list(folder.iterdir())) == 3 * 4 + 2, "no leftovers"


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [b"", b'{"dataset_name": "Data', b"[]"])
def test_a_description_of_results_that_was_cut_short_is_written_again(in_workspace, cut, capsys):
    trainer = make_trainer("SourceOnlyTrainer", num_epochs=1)
    trainer.run_training()
    folder = Path(trainer.output_folder_base)
    whole = {name: json.loads((folder / name).read_text()) for name in ("plans.json", "dataset.json")}
    for goes_on in (False, True):
        for name in whole:
            (folder / name).write_bytes(cut)
        again = make_trainer("SourceOnlyTrainer", num_epochs=1)
        if goes_on:
            again.load_checkpoint(str(Path(again.output_folder, checkpoint.FINAL)))
        again.run_training()
        assert {name: json.loads((folder / name).read_text()) for name in whole} == whole
        assert capsys.readouterr().out.count("was cut short: written again") == 2


def test_the_description_of_results_appears_whole(in_workspace, monkeypatch):
    trainer = make_trainer("SourceOnlyTrainer", num_epochs=1)
    folder = Path(trainer.output_folder_base)

    def run():
        kill_at(monkeypatch, shutil, "copyfile", 2)
        trainer.run_training()

    killed(run)
    described = list(folder.glob("*.json"))
    assert len(described) < 3 and all(json.loads(path.read_text()) for path in described)


# -- other commands ----------------------------------------------------------------------------------------------------


def test_a_kill_while_a_dataset_takes_its_place(own_copy, monkeypatch):
    source = own_copy / "raw" / "Dataset501_Blobs"
    command = [
        "folders", "-d", "777", "-name", "Kill", "-source", "MR", "-target", "CT", "-np", "1", "-labels", "left=1",
        "right=2", "-source_images", str(source / "imagesTr"), "-source_labels", str(source / "labelsTr"),
        "-target_images", str(source / "imagesTu"),
    ]  # fmt: skip
    final = own_copy / "raw" / "Dataset777_Kill"

    rename = os.replace

    def killed_before_the_last_rename(*options: str) -> None:
        def replace(old, new):
            if Path(new) == final:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(old, new)

        def run():
            monkeypatch.setattr(os, "replace", replace)
            convert.main([*command, *options])

        killed(run)
        assert not final.exists()

    killed_before_the_last_rename()
    convert.main(command)
    whole = {path.relative_to(final): path.stat().st_size for path in final.rglob("*") if path.is_file()}
    (final / "mark").touch()
    killed_before_the_last_rename("--overwrite")  # the former dataset is out of the way
    with pytest.raises(SystemExit):
        convert.main(command)  # without --overwrite: the former one is back
    assert (final / "mark").exists()
    convert.main([*command, "--overwrite"])
    assert {path.relative_to(final): path.stat().st_size for path in final.rglob("*") if path.is_file()} == whole
    assert [path.name for path in (own_copy / "raw").glob(".*")] == []


@pytest.mark.parametrize("name", ["fold_images", "clip"])
def test_a_folder_of_images_is_whole_after_a_kill_and_the_same_command(own_copy, monkeypatch, name, tmp_path):
    raw, out = own_copy / "raw" / "Dataset501_Blobs", tmp_path / "images"
    splits = [{"train": ["ct_Tu00", "ct_Tu01"], "val": ["ct_Tu02", "ct_Tu03"]}]
    (raw / "splits_target.json").write_text(json.dumps(splits))
    if name == "clip":
        main, command = intensities.main, ["-percentiles", "5", "95", "-i", str(raw / "imagesTs"), "-o", str(out)]
        module, function = reading.sitk, "WriteImage"
    else:
        main, command = fold_images.main, ["-d", "501", "-f", "0", "-o", str(out)]
        module, function = os, "symlink"

    def run():
        kill_at(monkeypatch, module, function, 2)
        main(command)

    killed(run)
    assert not out.exists()
    main(command)
    assert len(list(out.iterdir())) == 2
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_folder_that_another_process_is_filling_is_left_alone(tmp_path):
    process = run_python(
        "import pathlib, time",
        "from nnunet_uda.files import whole_folder",
        f"with whole_folder(pathlib.Path({str(tmp_path / 'out')!r})) as folder:",
        "    print(folder, flush=True)",
        "    time.sleep(60)",
    )
    other = Path(process.stdout.readline().strip())
    with files.whole_folder(tmp_path / "out") as folder:
        (folder / "mine").touch()
    assert other.exists() and (tmp_path / "out" / "mine").exists()
    process.kill()
    process.wait()
    with files.whole_folder(tmp_path / "out") as folder:
        (folder / "next").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["next"]


def test_plans_are_written_whole_and_the_same_command_again_is_no_error(own_copy, monkeypatch, refused):
    command = ["-d", "501", "-p", "again", "-from", "tiny", "-set", "num_epochs=5"]
    path = own_copy / "preprocessed" / "Dataset501_Blobs" / "again.json"

    def run():
        kill_at(monkeypatch, os, "replace", 1)
        configure.main(command)

    killed(run)
    assert not path.exists()
    for _ in range(2):
        configure.main(command)
    assert json.loads(path.read_text())["uda"]["num_epochs"] == 5
    assert "with other content" in refused(configure.main, [*command[:-1], "num_epochs=6"])


# -- files of others, and disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/b", "..", "x" * 300, "a\x00b", ""])
def test_no_name_in_plans_leads_out_of_nnunets_folders(own_copy, name, refused):
    folder = own_copy / "preprocessed" / "Dataset501_Blobs"
    plans = json.loads((folder / "tiny.json").read_text())
    plans["configurations"]["2d"]["data_identifier"] = name
    (folder / "tiny.json").write_text(json.dumps(plans))
    with pytest.raises(UDAError, match="must be a name without a path"):
        make_trainer("CISFATrainer")
    assert "must be a name without a path" in refused(preprocess.main, ["-d", "501", "-p", "tiny"])
    assert not list(own_copy.rglob("*_target"))


def test_a_disk_that_fills_or_turns_read_only_is_explained(in_workspace, monkeypatch):
    trainer = make_trainer("SourceOnlyTrainer", num_epochs=1)

    def fail(*_):
        raise OSError(30, "Read-only file system", "progress.png")

    monkeypatch.setattr(trainer.logger, "plot_progress_png", fail)
    with pytest.raises(UDAError, match=r"Read-only file system: 'progress.png'.*intact.*continue with --c"):
        trainer.run_training()
    assert interruption.StopSignals._active is None
