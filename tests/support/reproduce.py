"""The commands of docs/reproduce.md, and small vendor trees to run them on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TRAINERS

from support import brats, btcv, chaos, dicom, mmwhs, rtstruct, vs


def wider(draw: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """What ``draw`` draws, each voxel as 4 x 4 in its plane: slices of a size that a U-Net takes."""
    return lambda *args: np.kron(array := draw(*args), np.ones((1, 4, 4), array.dtype))


def make_vendor_trees(folder: Path) -> dict[str, str]:
    """All trees that the document names, as variables of its script; thick slices lie along one axis of the body."""
    axial = {name for module in (dicom, rtstruct) for name in module.DIRECTIONS} - {"coronal", "sagittal"}
    drawn = {chaos: ("stored", "organs"), btcv: ("scan", "organs"), brats: ("brain", "tumour"), mmwhs: ("heart",)}
    with pytest.MonkeyPatch.context() as patch:
        for module, names in drawn.items():
            for name in names:
                patch.setattr(module, name, wider(getattr(module, name)))
        patch.setattr(chaos, "ORIENTATIONS", tuple(name for name in chaos.ORIENTATIONS if name in axial))
        for module in (btcv, vs):
            patch.setattr(module, "DIRECTIONS", {name: d for name, d in module.DIRECTIONS.items() if name in axial})
        chaos.make_chaos(folder / "CHAOS", mr=(1, 2, 3, 13, 20, 38), ct=(2,))
        btcv.make_btcv(folder / "BTCV", (1, 2, 9, 21, 30, 40))
        brats.make_tree(folder / "BRATS", kinds=("t2", "flair", "seg"))
        for modality, ids in mmwhs.IDS.items():
            (folder / "MMWHS" / f"{modality}_train").mkdir(parents=True)
            for i, number in enumerate(ids):
                path = folder / "MMWHS" / f"{modality}_train" / f"{modality}_train_{number}"
                image = np.random.default_rng(i).integers(-100, 900, mmwhs.heart().shape).astype(np.int16)
                mmwhs.save(image, path.with_name(f"{path.name}_image.nii.gz"), mmwhs.DIRECTIONS[i % 2])
                mmwhs.save(mmwhs.heart(i), path.with_name(f"{path.name}_label.nii.gz"), mmwhs.DIRECTIONS[i % 2])
        patch.setattr(vs, "SIZE", (36, 32, 6))
        vs.make_tcia(folder / "VS")
    return {name: str(folder / name) for name in ("CHAOS", "BTCV", "BRATS", "MMWHS", "VS")}


RUNNER = """
import glob, importlib.metadata, json, multiprocessing, multiprocessing.dummy, shlex, sys

entries = {entry.name: entry for entry in importlib.metadata.entry_points(group="console_scripts")}
commands = json.load(sys.stdin)
mains = {name: entries[name].load() for name in {words[0] for words in commands}}
fork, spawn = multiprocessing.get_context("fork"), multiprocessing.get_context
multiprocessing.get_context = lambda method=None: multiprocessing.dummy if method == "spawn" else spawn(method)


def call(words):
    sys.argv = words
    sys.exit(mains[words[0]]())


for words in commands:
    words = [name for word in words for name in (glob.glob(word) or [word] if "*" in word else [word])]
    print("$", shlex.join(words), flush=True)
    process = fork.Process(target=call, args=(words,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"exit status {process.exitcode}: {shlex.join(words)}")
"""
"""Runs commands one after the other, each in a fork that has its modules loaded and pools of threads: importing them
anew takes longer than what these commands do. Patterns for files that did not exist yet are expanded here."""


def run_commands(commands: list[list[str]], folder: Path, **variables: str) -> dict[str, str]:
    """Run commands in ``folder``, which holds nnU-Net's three; what each of them printed, by its words."""
    folders = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    workers = {"nnUNet_def_n_proc": "1", "nnUNet_npp": "0", "nnUNet_nps": "0", "nnUNet_n_proc_DA": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(commands), cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", check=False,
        env={**os.environ, **folders, **workers, "nnUNet_extTrainer": str(TRAINERS), "PATH": path,
             "OMP_WAIT_POLICY": "passive", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10000:]
    said = re.split(r"^\$ (.*)\n", done.stdout, flags=re.M)
    return dict(zip(said[1::2], said[2::2], strict=True))
