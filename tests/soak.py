"""Kill training, checkpointing, preprocessing, conversion and prediction at random moments; see that all goes on.

``python tests/soak.py`` (``make soak``): real commands are killed by SIGKILL, one process or its whole group, and
started again until one gets to its end; what it leaves is compared with what an undisturbed run left: weights bit for
bit, files voxel for voxel. Ends with a table, and status 1 if anything differed, hung or could not go on.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from conftest import Workspace, make_raw_dataset, same_weights

from nnunet_uda.data.damage import refuse_damaged
from nnunet_uda.data.target import TargetDataset
from nnunet_uda.training.checkpoint import FINAL, read_checkpoint

TRAINER = "CISFATrainer"
SHARES = {"training": 0.36, "checkpointing": 0.24, "preprocessing": 0.14, "conversion": 0.14, "prediction": 0.12}
LONGEST = 1800
"""Seconds after which a command counts as hung."""
AFTER_DEATH = 60
"""Seconds that processes may live on after the one they worked for was killed: one that is starting looks only then."""


class Fault(Exception):
    """Something did not go on as it should."""


@dataclass
class Stage:
    """A command, how to tell that it is at its end, and what it must leave.

    Args:
        command: the same at every start; a function, since ``--c`` may be added after the first.
        clear: remove what the command made, for the next round.
        check: raise ``Fault`` unless what it left is whole and as the undisturbed run's.
        moment: called once a millisecond with the command's age in seconds; true where a kill aimed at a moment is due.
        ours: whether all worker processes are this project's: nnU-Net's own may outlive it.
    """

    name: str
    command: Callable[[], list[str]]
    clear: Callable[[], None]
    check: Callable[[], None]
    moment: Callable[[float], bool] | None = None
    ours: bool = True
    seconds: float = 0.0
    kills: int = 0
    rounds: int = 0
    faults: list[str] = field(default_factory=list)


def start(workspace: Workspace, stage: Stage, log: Path) -> subprocess.Popen:
    with open(log, "a") as file:
        return subprocess.Popen(
            stage.command(), env=workspace.environment | {"nnUNet_n_proc_DA": "0"}, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen, log: Path) -> None:
    try:
        status = process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise Fault(f"hung for {LONGEST} s; see {log}") from None
    if status != 0:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise Fault(f"ended with status {status}; see {log}: {last}")


def kill(process: subprocess.Popen, whole_group: bool, ours: bool) -> None:
    """SIGKILL the command alone, as the kernel does when memory is short, or with its workers, as a scheduler does."""
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + AFTER_DEATH
    while group_lives(process.pid):
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            if ours:
                raise Fault(f"worker processes lived on {AFTER_DEATH} s after their parent's death")
            return
        time.sleep(0.05)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    states = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True, check=False)
    return any(not state.startswith("Z") for state in states.stdout.split())


def disturb(workspace: Workspace, stage: Stage, kills: int, rng: random.Random, log: Path, deadline: float) -> None:
    """Rounds of one to four kills and an undisturbed end, until ``kills`` were made."""
    while stage.kills < kills and time.monotonic() < deadline:
        stage.clear()
        stage.rounds += 1
        due = min(rng.randint(1, 4), kills - stage.kills)
        try:
            while due and time.monotonic() < deadline:
                process = start(workspace, stage, log)
                begin, wait = time.monotonic(), rng.uniform(0.2, 1.0) * stage.seconds
                while process.poll() is None and time.monotonic() - begin < LONGEST:
                    age = time.monotonic() - begin
                    if stage.moment(age) if stage.moment else age > wait:
                        kill(process, rng.random() < 0.5, stage.ours)
                        stage.kills, due = stage.kills + 1, due - 1
                        break
                    time.sleep(0.001)
                else:
                    finish(process, log)  # it got to its end first
                    break
            finish(start(workspace, stage, log), log)
            stage.check()
        except Fault as fault:
            stage.faults.append(str(fault))
            print(f"{stage.name}: FAULT: {fault}", flush=True)


def build_stages(workspace: Workspace, folder: Path, rng: random.Random) -> list[Stage]:
    fold, raw = workspace.fold_folder(TRAINER, "soak"), workspace.raw / "Dataset501_Blobs"
    target = workspace.preprocessed / "Dataset501_Blobs" / "nnUNetPlans_2d_target"
    converted, predictions = workspace.raw / "Dataset777_Soak", folder / "predictions"
    undisturbed: dict[str, object] = {}

    def training() -> list[str]:
        more = ["--c"] if any(fold.glob("checkpoint_*.pth")) else []
        return ["nnUNetv2_train", "501", "2d", "0", "-tr", TRAINER, "-p", "soak", "-device", "cpu", *more]

    def final() -> dict:
        content = read_checkpoint(fold / FINAL)
        return {**content["network_weights"], **content["uda"]["networks"]}

    def same_network() -> None:
        for path in fold.glob("checkpoint_*.pth"):
            read_checkpoint(path)
        if not same_weights(undisturbed.setdefault("weights", final()), final()):
            raise Fault("other weights than the undisturbed run's")

    def checkpoint_under_way(age: float) -> bool:
        if any(fold.glob(".checkpoint_*.tmp")) and rng.random() < 0.3:
            time.sleep(rng.uniform(0, 0.02))
            return True
        return False

    def same_target() -> None:
        dataset = TargetDataset(str(target))
        refuse_damaged((dataset,), "", voxels=True)
        voxels = {name: dataset.load_case(name)[0][:] for name in sorted(dataset.identifiers)}
        compare("target", voxels, [path.name for path in target.iterdir()])

    def same_files(name: str, root: Path) -> None:
        voxels = {str(path.relative_to(root)): sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
                  for path in sorted(root.rglob("*.nii.gz"))}  # fmt: skip
        compare(name, voxels, [path.name for path in root.parent.glob(".*")])

    def compare(name: str, voxels: dict[str, np.ndarray], names: list[str]) -> None:
        before, listed = undisturbed.setdefault(name, (voxels, sorted(names)))
        if before.keys() != voxels.keys() or not all(np.array_equal(before[key], voxels[key]) for key in before):
            raise Fault("other files or voxels than the undisturbed run's")
        if sorted(names) != listed:
            raise Fault(f"leftovers: {sorted(set(names) - set(listed))}")

    def conversion() -> list[str]:
        more = ["--overwrite"] if converted.exists() else []  # as whoever finds it there would
        return ["nnUNetUDA_convert", "folders", "-d", "777", "-name", "Soak", "-source", "MR", "-target", "CT", "-np",
                "2", "-labels", "left=1", "right=2", "-source_images", str(raw / "imagesTr"), "-source_labels",
                str(raw / "labelsTr"), "-target_images", str(raw / "imagesTu"), *more]  # fmt: skip

    def remove(*paths: Path) -> Callable[[], None]:
        return lambda: [shutil.rmtree(path, ignore_errors=True) for path in paths] and None

    prediction = ["nnUNetv2_predict", "-i", str(raw / "imagesTs"), "-o", str(predictions), "-d", "501", "-c", "2d",
                  "-tr", TRAINER, "-p", "soak", "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]  # fmt: skip
    preprocessing = ["nnUNetUDA_preprocess", "-d", "501", "-c", "2d", "-p", "soak", "-np", "2"]
    return [
        Stage("training", training, remove(fold), same_network),
        Stage("checkpointing", training, remove(fold), same_network, checkpoint_under_way),
        Stage("preprocessing", lambda: preprocessing, remove(target), same_target),
        Stage("conversion", conversion, remove(converted), lambda: same_files("conversion", converted)),
        Stage("prediction", lambda: prediction, remove(predictions),
              lambda: same_files("prediction", predictions), ours=False),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-kills", type=int, default=50, help="kills in all [50]")
    parser.add_argument("-minutes", type=float, default=120, help="stop killing after so many minutes [120]")
    parser.add_argument("-seed", type=int, default=0, help="of the moments [0]")
    parser.add_argument("-stages", nargs="+", default=list(SHARES), choices=list(SHARES), help="of these only")
    parser.add_argument("-o", type=Path, help="keep all files in this new folder [a temporary one, removed]")
    arguments = parser.parse_args()
    folder = arguments.o or Path(tempfile.mkdtemp(prefix="soak_"))
    folder.mkdir(parents=True, exist_ok=True)
    rng, log = random.Random(arguments.seed), folder / "log.txt"
    workspace = Workspace(folder)
    make_raw_dataset(workspace.raw)
    workspace.plan("501", "2d")
    workspace.configure("tiny")
    workspace.configure("soak", "num_epochs=6", "iterations_per_epoch=6", "picture_every=3")

    stages = build_stages(workspace, folder, rng)
    deadline = time.monotonic() + 60 * arguments.minutes
    shares = {name: SHARES[name] for name in arguments.stages}
    for stage in stages:
        if stage.name not in shares and not (stage.name == "training" and "prediction" in shares):
            continue
        print(f"{stage.name}: undisturbed ...", flush=True)
        stage.clear()
        begin = time.monotonic()
        finish(start(workspace, stage, log), log)
        stage.seconds = time.monotonic() - begin
        stage.check()
        kills = round(arguments.kills * shares.get(stage.name, 0) / sum(shares.values()))
        disturb(workspace, stage, kills, rng, log, deadline)
        print(f"{stage.name}: {stage.kills} of {kills} kills, {len(stage.faults)} faults", flush=True)

    print(f"\n{'stage':15}{'kills':>7}{'rounds':>8}{'undisturbed':>13}{'faults':>8}")
    for stage in stages:
        print(f"{stage.name:15}{stage.kills:7}{stage.rounds:8}{stage.seconds:11.1f} s{len(stage.faults):8}")
        for fault in stage.faults:
            print(f"  {fault}")
    faults = sum(len(stage.faults) for stage in stages)
    if arguments.o is None and not faults:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
