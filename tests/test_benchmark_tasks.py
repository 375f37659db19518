"""The tasks' preparation: what is made where, going on after a stop, and what is refused; whole runs are slow tests."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from nnunet_uda.commands.convert import main as convert_main
from nnunet_uda.errors import UDAError

DATA = os.environ.get("NNUNET_UDA_TEST_DATA")


@pytest.fixture
def tasks(monkeypatch):
    specification = importlib.util.spec_from_file_location("tasks", REPOSITORY / "benchmarks" / "tasks.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "tasks", module)  # where dataclasses look for the module of a class
    specification.loader.exec_module(module)
    monkeypatch.delenv("NNUNET_UDA_TEST_DATA", raising=False)
    return module


@pytest.fixture
def log(tasks, monkeypatch):
    """Commands that would run, as (folder, words); scans appear at once."""
    seen = []

    def run(demo, *words, **variables):
        words = [str(word) for word in words]
        seen.append((demo.folder.name, words))
        if "-m" in words:
            out = Path(words[words.index("-o") + 1])
            for part in ("mr_train", "ct_train") if "phantom" in words[2] else ("T1", "T2"):
                (out / part).mkdir(parents=True)

    monkeypatch.setattr(tasks.Demo, "run", run)
    return seen


def ids(log, program):
    return [w[w.index("-d") + 1] for _, w in log if w[0] == program]


def test_every_task_is_made_in_its_folder_with_its_upper_bound(tasks, log, tmp_path):
    tasks.main(["-o", str(tmp_path), "-seeds", "3", "4", "-data", str(tmp_path / "data")])
    places = {}
    for folder, words in log:
        if words[0] == "nnUNetUDA_convert":
            places.setdefault(folder, []).append(words[words.index("-d") + 1])
    phantom, others = ["501", "511", "502", "512"], ["521", "524", "522", "523", "525"]
    others += ["531", "533", "532", "534"]
    assert places == {"seed_3": phantom, "seed_4": phantom, "seed_0": others}
    scans = [words for _, words in log if "-m" in words]
    assert [(w[2], w[w.index("-seed") + 1]) for w in scans] == [
        ("nnunet_uda.demo.phantom", "3"), ("nnunet_uda.demo.phantom", "4"), ("nnunet_uda.demo.brain", "0")
    ]  # fmt: skip
    configured = [words for _, words in log if words[0] == "nnUNetUDA_configure"]
    assert len(configured) == 17 and all(tasks.PLANS in words for words in configured)
    patches = {w[w.index("-d") + 1]: w[w.index("-patch_size") + 1] for w in configured}
    assert {patch for dataset, patch in patches.items() if dataset < "520"} == {"64"}
    assert {patch for dataset, patch in patches.items() if dataset > "520"} == {"96"}
    assert {w[-1] for w in configured if "501" in w} == {"seed=3", "seed=4"}
    manifest = json.loads((tmp_path / "seed_3" / "phantom_mr2ct.json").read_text())
    assert (manifest["dataset"], manifest["upper_bound"], manifest["fold"], manifest["seed"]) == (501, 511, "0", 3)
    assert json.loads((tmp_path / "seed_0" / "totalseg.json").read_text())["upper_bound"] is None


def test_what_is_whole_is_not_made_again_and_what_is_not_goes_on(tasks, log, tmp_path, monkeypatch, capsys):
    arguments = ["-o", str(tmp_path), "-tasks", "phantom_mr2ct", "phantom_ct2mr", "-seeds", "0"]
    run = tasks.Demo.run

    def fail_at_planning(demo, *words, **variables):
        if words[0] == "nnUNetv2_plan_and_preprocess" and "502" in words:
            raise UDAError("ended with status 1")
        run(demo, *words, **variables)

    monkeypatch.setattr(tasks.Demo, "run", fail_at_planning)
    with pytest.raises(SystemExit):
        tasks.main(arguments)
    assert [p.name for p in (tmp_path / "seed_0").glob("*.json")] == ["phantom_mr2ct.json"]
    monkeypatch.setattr(tasks.Demo, "run", run)
    log.clear()
    tasks.main(arguments)
    assert ids(log, "nnUNetUDA_convert") == ["502", "512"] and not [w for _, w in log if "-m" in w]
    assert all("--overwrite" in w for _, w in log if w[0] == "nnUNetUDA_convert")
    log.clear()
    tasks.main(arguments)
    assert log == [] and "phantom_ct2mr, seed 0: whole already" in capsys.readouterr().out


def test_half_a_phantom_is_made_anew(tasks, log, tmp_path):
    (tmp_path / "seed_0" / "phantom" / "mr_train").mkdir(parents=True)
    tasks.main(["-o", str(tmp_path), "-tasks", "phantom_mr2ct", "-seeds", "0"])
    assert len([w for _, w in log if "-m" in w]) == 1


def test_a_task_may_move_but_not_change(tasks, log, tmp_path, capsys):
    arguments = ["-tasks", "brain_t12t2", "-data", str(tmp_path / "data")]
    tasks.main(["-o", str(tmp_path / "a"), *arguments])
    shutil.move(tmp_path / "a", tmp_path / "b")
    log.clear()
    tasks.main(["-o", str(tmp_path / "b"), *arguments])
    assert log == []
    path = tmp_path / "b" / "seed_0" / "brain_t12t2.json"
    path.write_text(path.read_text().replace('"patch": 96', '"patch": 64'))
    with pytest.raises(SystemExit):
        tasks.main(["-o", str(tmp_path / "b"), *arguments])
    assert "brain_t12t2.json was written for another form of this task" in capsys.readouterr().err


def test_scans_of_others_must_be_given(tasks, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tasks.main(["-o", str(tmp_path), "-tasks", "vs"])
    assert "vs needs third-party scans: give their folder with -data" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(DATA is None, reason="NNUNET_UDA_TEST_DATA is not set: no real scans to convert")
def test_the_real_scans_upper_bound_has_its_labels(tasks, tmp_path, monkeypatch):
    data = Path(DATA)
    if not (data / "vs").is_dir():
        pytest.skip(f"{data / 'vs'} does not exist")
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for _ in range(2):  # again, as after a stop
        tasks.labels_by_image("vs", tmp_path, data)
    _, words = tasks.conversions("vs", tmp_path, data)
    convert_main([*words[1:], "-np", "1"])
    raw = tmp_path / "nnUNet_raw" / "Dataset523_VShrT2Supervised"
    names = {folder: sorted(p.name for p in (raw / folder).iterdir()) for folder in ("labelsTr", "labelsTs")}
    assert names == {
        "labelsTr": ["hrT2_vs_gk_95_t2.nii.gz", "hrT2_vs_gk_98_t2.nii.gz"], "labelsTs": ["hrT2_vs_gk_9_t2.nii.gz"]
    }  # fmt: skip


@pytest.mark.skipif(DATA is None, reason="NNUNET_UDA_TEST_DATA is not set: no real scans to convert")
@pytest.mark.parametrize(("name", "dataset", "labelled", "unlabelled"), [
    ("vs_back", "Dataset525_VShrT22ceT1", [f"hrT2_vs_gk_{i}_t2" for i in (95, 98, 9)], "ceT1_vs_gk_99_t1"),
    ("totalseg", "Dataset521_TotalSegCT2MR", ["CT_example_ct_sm"], "MR_example_mr_sm"),
    ("totalseg_back", "Dataset524_TotalSegMR2CT", ["MR_example_mr_sm"], "CT_example_ct_sm"),
])  # fmt: skip
def test_the_way_back_has_the_other_scans_labels(tasks, tmp_path, monkeypatch, name, dataset, labelled, unlabelled):
    data = Path(DATA)
    if not (data / name.removesuffix("_back")).is_dir():
        pytest.skip(f"{data / name.removesuffix('_back')} does not exist")
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    if name in tasks.SCHWANNOMAS:
        tasks.labels_by_image(name, tmp_path, data)
    (words,) = tasks.conversions(name, tmp_path, data)
    convert_main([*words[1:], "-np", "1"])
    raw = tmp_path / "nnUNet_raw" / dataset
    assert sorted(p.name.removesuffix(".nii.gz") for p in (raw / "labelsTr").iterdir()) == labelled
    assert [p.name.removesuffix("_0000.nii.gz") for p in (raw / "imagesTu").iterdir()] == [unlabelled]
    assert [p.name.removesuffix(".nii.gz") for p in (raw / "labelsTs").iterdir()] == [unlabelled]


@pytest.mark.slow
def test_a_phantom_task_from_nothing_to_plans(tasks, tmp_path):
    tasks.main(["-o", str(tmp_path), "-tasks", "phantom_mr2ct", "-seeds", "5", "-np", "1"])
    for dataset in ("Dataset501_Phantom", "Dataset511_PhantomSupervised"):
        plans = json.loads((tmp_path / "seed_5/nnUNet_preprocessed" / dataset / f"{tasks.PLANS}.json").read_text())
        assert plans["configurations"]["2d"]["patch_size"] == [64, 64] and plans["uda"]["seed"] == 5
    assert (tmp_path / "seed_5/nnUNet_preprocessed/Dataset501_Phantom/nnUNetPlans_2d_target").is_dir()
