"""Files that people and other programs wrote, damaged at random: each ends in a UDAError or in a correct run."""

from __future__ import annotations

import gzip
import json
import math
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import few_or_many, make_trainer
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from support.fuzzing import as_text, mutated, refused

from nnunet_uda.commands import configure, evaluate, fold_images, intensities, preprocess
from nnunet_uda.data import convention
from nnunet_uda.evaluation.runs import cases_of_folds, read_labels
from nnunet_uda.images.geometry import Grid
from nnunet_uda.images.intensities import read_intensities
from nnunet_uda.images.nifti import nifti_geometry
from nnunet_uda.images.reading import check_image, check_whole, read_image
from nnunet_uda.methods import check_uda, find_methods
from nnunet_uda.networks.clip.shape import clip_shape
from nnunet_uda.settings import UDASettings, describe_settings, parse_settings, split_settings


@contextmanager
def bounded(megabytes: int = 1024) -> Iterator[None]:
    """Within it the process can take so much memory more than it has, and no more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcomes(
    count: int,
    seed: int,
    value: Any,
    attempt: Callable[[Any, random.Random], Callable[[], object]],
    damage: Callable[[Any, random.Random], Any] = mutated,
) -> float:
    """The share that was refused of ``count`` mutations of ``value``."""
    rng = random.Random(seed)
    bad = 0
    for _ in range(count):
        damaged = damage(value, rng)
        bad += refused(attempt(damaged, rng), damaged)
    return bad / count


def whole_uda() -> dict[str, Any]:
    """Every setting of every method at its default."""
    uda = {name: default for name, _, default in describe_settings(UDASettings)}
    for method in find_methods().methods:
        uda.setdefault(method.name, {name: default for name, _, default in describe_settings(method.settings)})
    uda["uuds"]["clip_config"] = {
        "embed_dim": 16, "quick_gelu": True, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    return uda


def test_mutations_change_values_and_the_undamaged_passes():
    rng = random.Random(0)
    assert sum(mutated(whole_uda(), rng) == whole_uda() for _ in range(100)) < 20
    assert not refused(lambda: check_uda(whole_uda(), "x"), "undamaged")


@few_or_many(60, 500)
def test_settings(count):
    methods = find_methods().methods

    def attempt(uda: Any, rng: random.Random) -> Callable[[], object]:
        def read() -> None:
            if isinstance(uda, dict) and isinstance(uda.get("uuds"), dict):
                config = uda["uuds"].get("clip_config")
                if isinstance(config, dict):
                    clip_shape("RN50-quickgelu", config)
            method = rng.choice(methods)
            shared, own = split_settings(uda, method.name, "x")
            parse_settings(UDASettings, shared, "x")
            parse_settings(method.settings, own, "x")
            check_uda(uda, "x")

        return read

    assert 0.5 < outcomes(count, 1, whole_uda(), attempt) < 1


@pytest.fixture
def dataset(in_workspace, tmp_path, monkeypatch):
    """Raw and preprocessed folders to damage, the target preprocessed, and whole predictions."""
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(in_workspace, name), tmp_path / name)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    preprocess.main(["-d", "501", "-c", "2d", "-np", "1"])
    raw = tmp_path / "raw" / "Dataset501_Blobs"
    splits = [{"train": ["ct_Tu00", "ct_Tu01"], "val": ["ct_Tu02"]}, {"train": ["ct_Tu03"], "val": ["ct_Tu00"]}]
    (raw / "splits_target.json").write_text(json.dumps(splits))
    content = json.loads((raw / "dataset.json").read_text())
    content["uda"]["intensities"] = {"percentiles": [5, 95], "range": [-1, 1]}
    (raw / "dataset.json").write_text(json.dumps(content))
    return raw


def outside(raw: Path) -> set[Path]:
    """What lies beside the dataset's folders, where nothing may appear."""
    root = raw.parent.parent
    return {
        path
        for path in root.rglob("*")
        if path.relative_to(root).parts[0] not in ("raw", "preprocessed", "results", "out")
    }


@few_or_many(60, 400)
def test_dataset_json(dataset, tmp_path, count):
    file = tmp_path / "dataset.json"
    content = json.loads((dataset / "dataset.json").read_text())

    def attempt(damaged: Any, rng: random.Random) -> Callable[[], object]:
        file.write_bytes(as_text(damaged, rng))

        def read() -> None:
            read_labels(file)
            read_intensities(convention.read_json(file), file)
            found = convention.read_json(file)
            convention.check_dataset_json(found, file)
            convention.normalisation_warning(found, convention.read_domains(found))
            convention.target_cases(dataset, found)

        return read

    assert 0.5 < outcomes(count, 2, content, attempt) < 1


@few_or_many(60, 200)
def test_splits(dataset, tmp_path, count):
    file, known = tmp_path / "splits.json", {"ct_Tu00", "ct_Tu01", "ct_Tu02", "ct_Tu03"}

    def attempt(damaged: Any, rng: random.Random) -> Callable[[], object]:
        file.write_bytes(as_text(damaged, rng))

        def read() -> None:
            cases_of_folds(file, [0, 1])
            splits = convention.check_splits(convention.read_json(file), known, file)
            convention.fold_of(splits, 1, file)

        return read

    assert 0.5 < outcomes(count, 3, json.loads((dataset / "splits_target.json").read_text()), attempt) < 1


@few_or_many(2, 12)
def test_commands_and_trainers(dataset, tmp_path, capsys, count):
    """The same files through whole commands and a trainer's start, as far as training data."""
    preprocessed = tmp_path / "preprocessed" / "Dataset501_Blobs"
    predictions, out = tmp_path / "out" / "predictions", tmp_path / "out" / "result"
    shutil.copytree(dataset / "labelsTs", predictions)
    fold = tmp_path / "out" / "fold"
    fold.mkdir()
    for folder in (dataset / "labelsTs", predictions, fold):
        shutil.copy(predictions / "ct_Ts00.nii.gz", folder / "ct_Tu02.nii.gz")
    scans = tmp_path / "out" / "scans"
    scans.mkdir()
    shutil.copy(dataset / "imagesTs" / "ct_Ts00_0000.nii.gz", scans)
    evaluation = ["-d", "501", "-o", str(out), "--no_overlays", "-np", "1", "-p"]

    def train(**uda: Any) -> None:
        trainer = make_trainer("CISFATrainer", **uda)
        trainer.dataset_class = infer_dataset_class(trainer.preprocessed_dataset_folder)
        trainer.do_split()
        convention.target_cases(dataset, trainer.dataset_json)

    known = [f"mr_Tr0{index}" for index in range(5)]
    commands: list[tuple[Path, Callable[[], object]]] = [
        (dataset / "dataset.json", lambda: fold_images.main(["-d", "501", "-f", "0", "-o", str(out)])),
        (dataset / "splits_target.json", lambda: fold_images.main(["-d", "501", "-f", "1", "-o", str(out)])),
        (dataset / "dataset.json", lambda: evaluate.main([*evaluation, f"a={predictions}"])),
        (dataset / "splits_target.json", lambda: evaluate.main([*evaluation, f"a={fold}", "-f", "0"])),
        (dataset / "dataset.json", lambda: intensities.main(["-d", "501", "-i", str(scans), "-o", str(out)])),
        (preprocessed / "dataset.json", lambda: preprocess.main(["-d", "501", "-np", "1"])),
        (dataset / "splits_target.json", lambda: preprocess.main(["-d", "501", "-np", "1"])),
        (preprocessed / "dataset.json", train),
        (preprocessed / "splits_final.json", train),
    ]
    splits = [{"train": known[:3], "val": known[3:]}, {"train": known[2:], "val": known[:2]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))
    train()  # imports what is slow to import, without a limit
    before, rng = outside(dataset), random.Random(4)
    for file, run in commands:
        whole = file.read_bytes()
        shutil.rmtree(out, ignore_errors=True)
        assert not refused(run, f"{file.name} undamaged")
        for _ in range(count):
            damaged = mutated(json.loads(whole), rng)
            try:
                json_only = run is train  # nnU-Net itself reads these, so they must at least be JSON
                file.write_bytes(json.dumps(damaged).encode() if json_only else as_text(damaged, rng))
                refused(run, damaged)
            finally:
                file.write_bytes(whole)
                shutil.rmtree(out, ignore_errors=True)
    plans = preprocessed / "tiny.json"
    content = json.loads(plans.read_text())
    for _ in range(5 * count):
        damaged = mutated(whole_uda(), rng)
        plans.write_text(json.dumps(content | {"uda": damaged}))
        refused(train, damaged)
        refused(lambda: configure.main(["-d", "501", "-from", "tiny", "-p", "other", "--overwrite"]), damaged)
    assert outside(dataset) == before
    assert "Traceback" not in capsys.readouterr().err


# --- headers of images -----------------------------------------------------------------------------------------------


def damaged_nifti(whole: bytes, fields: dict[str, tuple[np.dtype, int]], rng: random.Random) -> bytes:
    """``whole`` with one to three fields of its header (348 bytes) set to something strange, bits turned, or cut."""
    damaged = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(sorted(fields))
        kind, offset = fields[name]
        base = kind.base if kind.shape else kind
        offset += base.itemsize * rng.randrange(kind.itemsize // base.itemsize)
        values = [0, 1, -1, 2, 3, 7, 8, 127, 255, 32767, -32768, 2**31 - 1, -(2**31)]
        if base.kind == "f":
            values += [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-30, 0.5, -3.4e38, 352, 348, 1e9]
        if base.kind in "fiu" and rng.random() < 0.8:
            with np.errstate(all="ignore"):
                new = np.array(rng.choice(values), np.float64).astype(base.newbyteorder("<")).tobytes()
        else:
            new = rng.randbytes(base.itemsize)
        damaged[offset : offset + base.itemsize] = new
    if rng.random() < 0.1:
        position = rng.randrange(len(damaged))
        damaged[position] ^= 1 << rng.randrange(8)
    return bytes(damaged[: rng.randrange(len(damaged))] if rng.random() < 0.05 else damaged)


@few_or_many(100, 1000)
def test_nifti_headers(tmp_path, count):
    """What is read is a scan; the rest is refused, in no more time or memory than a scan takes."""
    array = np.random.default_rng(0).integers(1, 99, (5, 6, 7)).astype(np.int16)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    fields = nibabel.nifti1.header_dtype.fields
    for ending, kind in ((".nii", nibabel.Nifti1Image), (".nii.gz", nibabel.Nifti1Image), (".hdr", nibabel.Nifti1Pair)):
        image = kind(array, affine)
        image.set_qform(affine, 1)
        path = tmp_path / f"a{ending}"
        nibabel.save(image, str(path.with_suffix(".img") if ending == ".hdr" else path))
        whole = gzip.decompress(path.read_bytes()) if ending == ".nii.gz" else path.read_bytes()

        def attempt(
            damaged: bytes, rng: random.Random, path: Path = path, ending: str = ending
        ) -> Callable[[], object]:
            path.write_bytes(gzip.compress(damaged, 1) if ending == ".nii.gz" else damaged)

            def read() -> None:
                if rng.random() < 0.2:
                    check_whole(path)
                with nifti_geometry(rng.choice((None, "qform", "sform"))):
                    scan = read_image(path)
                    check_image(scan, path)
                grid = Grid.of(scan)
                assert np.isfinite(grid.affine).all() and min(grid.spacing) > 0
                assert np.isfinite(sitk.GetArrayViewFromImage(scan)).all()

            return read

        attempt(whole, random.Random(0))()
        with bounded():
            share = outcomes(count, 5, whole, attempt, lambda whole, rng: damaged_nifti(whole, fields, rng))
        assert 0.3 < share < 0.95
