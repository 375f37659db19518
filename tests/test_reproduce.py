"""docs/reproduce.md: every command that it gives is taken out of it, checked, and (slow) run on made vendor trees."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_conversion_brats as brats
import test_conversion_btcv as btcv
import test_conversion_chaos as chaos
import test_conversion_mmwhs as mmwhs
import test_conversion_vs as vs
import torch
from conftest import REPOSITORY, TRAINERS
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_uda.commands.configure import parse_assignment
from nnunet_uda.methods import check_uda
from nnunet_uda.networks.clip import _build, clip_shape
from nnunet_uda.plans import PROTOCOLS, merge_uda

DOCUMENT = REPOSITORY / "docs" / "reproduce.md"
PAPERS = ("CISFA", "Similarity-based prototypes", "UUDS")
CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TINY = {
    "SIZE": "-slice_size 32 32 -batch_size 4 -base_features 4 -max_features 8 -stages 3",
    "SET": " ".join(
        [
            "num_epochs=1", "iterations_per_epoch=1", "val_iterations_per_epoch=1", "cisfa.generator_width=4",
            "cisfa.generator_blocks=1", "cisfa.discriminator_width=4", "cisfa.patches=16",
            "similarity_prototypes.embedding_dim=8", "similarity_prototypes.discriminator_width=4",
            "similarity_prototypes.warmup_epochs=0", "uuds.warmup_epochs=0",
            f"uuds.clip_config={json.dumps(CLIP, separators=(',', ':'))}",
        ]
    ),
    "DEVICE": "cpu", "PROCESSES": "1", "FOLDS": "0",
}  # fmt: skip


def sections() -> dict[str, list[str]]:
    """Second-level headings of the document, and the bash blocks under each."""
    parts = re.split(r"^## (.+)$", DOCUMENT.read_text(), flags=re.M)
    return {
        title: re.findall(r"^```bash\n(.*?)^```$", text, flags=re.M | re.S)
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def script(paper: str) -> str:
    """The set-up and one paper's commands."""
    found = sections()
    title = next(title for title in found if title.startswith(paper))
    return "\n".join([*found["Set-up"], *found[title]])


def unroll(text: str, folder: Path, **variables: str) -> list[list[str]]:
    """The words of every command of a script in order, its loops and functions run by bash; nothing else is run."""
    folder.mkdir(exist_ok=True)
    for name in set(re.findall(r"\bnnUNet(?:v2|UDA)_\w+", text)):
        recorder = folder / name
        recorder.write_text(f'#!/bin/bash\nprintf "%q " {name} "$@" >> "{folder}/log"\necho >> "{folder}/log"\n')
        recorder.chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", text], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "nnUNet_raw": "raw", **variables, "PATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in (folder / "log").read_text().splitlines()]


# --- what the commands say ----------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Carries the namespace out of a command before it does anything."""


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[list[str]]]:
    return {paper: unroll(script(paper), tmp_path_factory.mktemp("recorded")) for paper in PAPERS}


@pytest.fixture
def parse(monkeypatch):
    """Options of a command as its own parser reads them; an unknown command or option is an error."""
    entries = {entry.name: entry for entry in importlib.metadata.entry_points(group="console_scripts")}
    parse_known = argparse.ArgumentParser.parse_known_args

    def parse_only(self, args=None, namespace=None):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known)  # for a subcommand's parser
        found, unknown = parse_known(self, args, namespace)
        assert not unknown, unknown
        raise Parsed(found)

    def parsed(words: list[str]) -> argparse.Namespace:
        assert words[0] in entries, f"there is no command {words[0]}"
        main = entries[words[0]].load()
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
        try:
            main()
        except Parsed as caught:
            return caught.args[0]
        except SystemExit as error:
            raise AssertionError(shlex.join(words)) from error
        raise AssertionError(f"{words[0]} parsed nothing")

    return parsed


def fingerprint() -> dict:
    return {"shapes_after_crop": [[10, 40, 40], [12, 40, 40]]}


@pytest.mark.parametrize("paper", PAPERS)
def test_commands_parse_and_use_what_earlier_ones_made(commands, parse, monkeypatch, paper):
    """Trainers, protocols and settings exist; a dataset is converted before it is planned, and so on to the scores."""
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS))
    converted, planned, preprocessed, predicted = set(), set(), set(), set()
    trained, scored = set(), set()
    for words in commands[paper]:
        args = parse(words)
        if words[0] == "nnUNetUDA_convert":
            assert args.d not in converted, "an id is used twice"
            converted.add(args.d)
        elif words[0] == "nnUNetv2_plan_and_preprocess":
            assert set(args.d) <= converted and args.verify_dataset_integrity
        elif words[0] == "nnUNetUDA_configure":
            assert int(args.d) in converted
            uda, _ = PROTOCOLS[args.protocol](fingerprint(), 0)
            check_uda(merge_uda(uda, dict(map(parse_assignment, args.set))), shlex.join(words))
            planned.add((int(args.d), args.p))
        elif words[0] == "nnUNetv2_preprocess":
            assert {(d, args.plans_name) for d in args.d} <= planned
            preprocessed |= {(d, args.plans_name) for d in args.d}
        elif words[0] == "nnUNetv2_train":
            run = (int(args.dataset_name_or_id), args.p)
            assert run in preprocessed
            trained.add((*run, args.tr, args.fold))
        elif words[0] == "nnUNetv2_predict":
            assert {(int(args.d), args.p, args.tr, fold) for fold in args.f} <= trained
            predicted.add(args.o)
        elif words[0] == "nnUNetUDA_sweep":
            assert (int(args.d), args.p) in preprocessed
            for name, *values in args.vary:
                for value in values:
                    check_uda(merge_uda({}, dict([parse_assignment(f"{name}={value}")])), shlex.join(words))
        elif words[0] == "nnUNetUDA_evaluate":
            runs = dict(run.split("=") for run in args.p)
            assert {args.lower, args.upper} <= set(runs)
            scored |= {folder.replace("{fold}", str(fold)) for folder in runs.values() for fold in args.f or [0]}
        else:
            assert words[0] in ("nnUNetUDA_trainers", "nnUNetUDA_fold_images")
    for name in {trainer for _, _, trainer, _ in trained}:
        assert recursive_find_trainer_class_by_name(name).__name__ == name
    assert trained and scored == predicted, "everything that is predicted is scored, and nothing else"


def test_the_tables_name_trainers_that_are_run(commands):
    run = {words[words.index("-tr") + 1] for paper in PAPERS for words in commands[paper] if "-tr" in words}
    text = DOCUMENT.read_text()
    rows = {name for line in text.splitlines() if line.startswith("|") for name in re.findall(r"`(\w+Trainer)`", line)}
    assert rows == run


def test_settings_named_in_the_text_exist():
    for name in re.findall(r"`((?:uuds|cisfa|similarity_prototypes)\.\w+=\w+)`", DOCUMENT.read_text()):
        check_uda(merge_uda({}, dict([parse_assignment(name)])), name)


# --- running them ---------------------------------------------------------------------------------------------------


def wider(draw: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """What ``draw`` draws, each voxel as 4 x 4 in its plane: slices of a size that a U-Net takes."""
    return lambda *args: np.kron(array := draw(*args), np.ones((1, 4, 4), array.dtype))


def make_vendor_trees(folder: Path) -> dict[str, str]:
    """All trees that the document names, as variables of its script."""
    drawn = {chaos: ("stored", "organs"), btcv: ("scan", "organs"), brats: ("brain", "tumour"), mmwhs: ("heart",)}
    with pytest.MonkeyPatch.context() as patch:
        for module, names in drawn.items():
            for name in names:
                patch.setattr(module, name, wider(getattr(module, name)))
        chaos.make_chaos(folder / "CHAOS", mr=(1, 2, 3, 13, 20, 38), ct=(2,))
        btcv.make_btcv(folder / "BTCV", (1, 2, 9, 21, 30, 40))
        brats.make_tree(folder / "BRATS", kinds=("t2", "flair", "seg"))
        for modality, ids in mmwhs.IDS.items():
            (folder / "MMWHS" / f"{modality}_train").mkdir(parents=True)
            for i, number in enumerate(ids):
                path = folder / "MMWHS" / f"{modality}_train" / f"{modality}_train_{number}"
                image = np.random.default_rng(i).integers(-100, 900, mmwhs.heart().shape).astype(np.int16)
                mmwhs.save(image, path.with_name(f"{path.name}_image.nii.gz"), mmwhs.DIRECTIONS[i % 3])
                mmwhs.save(mmwhs.heart(i), path.with_name(f"{path.name}_label.nii.gz"), mmwhs.DIRECTIONS[i % 3])
        patch.setattr(vs, "SIZE", (36, 32, 6))
        vs.make_tcia(folder / "VS")
    return {name: str(folder / name) for name in ("CHAOS", "BTCV", "BRATS", "MMWHS", "VS")}


@pytest.fixture(scope="module")
def vendor(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("vendor")
    torch.manual_seed(0)
    torch.save(_build(clip_shape("", CLIP)).state_dict(), folder / "clip.pt")
    return make_vendor_trees(folder) | {"NNUNET_UDA_CLIP": str(folder / "clip.pt")}


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
        stderr=subprocess.STDOUT, text=True, check=False,
        env={**os.environ, **folders, **workers, "nnUNet_extTrainer": str(TRAINERS), "PATH": path,
             "OMP_WAIT_POLICY": "passive", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10000:]
    said = re.split(r"^\$ (.*)\n", done.stdout, flags=re.M)
    return dict(zip(said[1::2], said[2::2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_commands_run(vendor, tmp_path, paper):
    variables = {"nnUNet_raw": str(tmp_path / "nnUNet_raw"), **TINY, **vendor}
    run_commands(unroll(script(paper), tmp_path / "recorded", **variables), tmp_path, **variables)
    tested = {path.parent.name for path in tmp_path.glob("evaluation/*/evaluation.json")}
    assert tested and tested == {path.name for path in tmp_path.glob("predictions/*")}
