"""docs/reproduce.md: every command that it gives is taken out of it, checked, and (slow) run on made vendor trees; what
is trained again on data of the same vendor is only set up there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TRAINERS
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from support.documents import bash_blocks, parsed
from support.reproduce import make_vendor_trees, run_commands

from nnunet_uda.methods import check_uda
from nnunet_uda.networks.clip.shape import build_whole, clip_shape
from nnunet_uda.plans import PROTOCOLS, merge_uda
from nnunet_uda.settings import parse_assignment

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
            "num_epochs=1", "iterations_per_epoch=1", "val_iterations_per_epoch=1", "quality_volumes=0",
            "cisfa.generator_width=4",
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
    return {title: bash_blocks(text) for title, text in zip(parts[1::2], parts[2::2], strict=True)}


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


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[list[str]]]:
    return {paper: unroll(script(paper), tmp_path_factory.mktemp("recorded")) for paper in PAPERS}


def fingerprint() -> dict:
    return {"shapes_after_crop": [[10, 40, 40], [12, 40, 40]]}


@pytest.mark.parametrize("paper", PAPERS)
def test_commands_parse_and_use_what_earlier_ones_made(commands, monkeypatch, paper):
    """Trainers, protocols and settings exist; a dataset is converted before it is planned, and so on to the scores."""
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS))
    converted, planned, preprocessed, predicted = set(), set(), set(), set()
    trained, scored = set(), set()
    for words in commands[paper]:
        args = parsed(words)
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
            runs = dict(run.split("=") for run in args.predictions)
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


SETTING_UP = ("nnUNetUDA_convert", "nnUNetv2_plan_and_preprocess", "nnUNetUDA_configure", "nnUNetv2_preprocess")


def without_repeats(commands: list[list[str]]) -> list[list[str]]:
    """Commands up to each evaluation; where they train nothing new for this converter, those that set datasets up."""
    converters: dict[str, str] = {}
    trained: dict[str, set[str]] = {}
    kept, block = [], []
    for words in commands:
        block.append(words)
        if words[0] == "nnUNetUDA_convert":
            converters[words[words.index("-d") + 1]] = words[1]
        elif words[0] == "nnUNetUDA_evaluate":
            before = trained.setdefault(converters[words[words.index("-d") + 1]], set())
            trainers = {other[other.index("-tr") + 1] for other in block if other[0] == "nnUNetv2_train"}
            kept += [other for other in block if not trainers <= before or other[0] in SETTING_UP]
            before |= trainers
            block = []
    return kept + block


# --- running them ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vendor(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("vendor")
    torch.manual_seed(0)
    torch.save(build_whole(clip_shape("", CLIP)).state_dict(), folder / "clip.pt")
    return make_vendor_trees(folder) | {"NNUNET_UDA_CLIP": str(folder / "clip.pt")}


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_commands_run(vendor, tmp_path, paper):
    variables = {"nnUNet_raw": str(tmp_path / "nnUNet_raw"), **TINY, **vendor}
    commands = without_repeats(unroll(script(paper), tmp_path / "recorded", **variables))
    run_commands(commands, tmp_path, **variables)
    tested = {path.parent.name for path in tmp_path.glob("evaluation/*/evaluation.json")}
    assert tested and tested == {path.name for path in tmp_path.glob("predictions/*")}
