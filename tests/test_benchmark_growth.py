"""The benchmarks of growth, prediction and steps at tiny sizes: what they compare, and going on after a stop."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from nnunet_uda.data.target import target_identifiers
from nnunet_uda.errors import UDAError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def with_target(planned):
    planned.run("nnUNetUDA_preprocess", "-d", "501", "-np", "1")


@pytest.fixture
def benchmarks(with_target, in_workspace, monkeypatch):
    """The scripts' folder as the first place of imports, and the preprocessed dataset."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return in_workspace.preprocessed / "Dataset501_Blobs"


@pytest.fixture
def plans(benchmarks):
    return json.loads((benchmarks / "tiny.json").read_text())


def test_ten_times_the_cases_are_there_and_train(benchmarks, plans, tmp_path, monkeypatch):
    import growth

    dataset = tmp_path / "ten" / benchmarks.name
    growth.multiply_dataset(benchmarks, plans, "2d", dataset, 10)
    once, ten = ({p.name for p in (place / "nnUNetPlans_2d").glob("*.pkl")} for place in (benchmarks, dataset))
    assert len(ten) == 10 * len(once) and json.loads((dataset / "dataset.json").read_text())["numTraining"] == 50
    assert len(target_identifiers(dataset / "nnUNetPlans_2d_target", 0)) == 40
    monkeypatch.setenv("nnUNet_preprocessed", str(dataset.parent))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "none"))
    task = {"trainer": "CISFATrainer", "dataset": dataset.name, "plans": plans, "configuration": "2d", "device": "cpu",
            "threads": torch.get_num_threads(), "steps": 2}  # fmt: skip
    found = growth.measure_training(task)
    assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0 and found["start"] > 0
    assert 50e6 < found["resident_bytes"] and 50e6 < found["peak_bytes"]


def test_splits_hold_every_copy_of_their_cases(benchmarks, plans, tmp_path):
    import growth

    source = shutil.copytree(benchmarks, tmp_path / "source")
    (source / "splits_final.json").write_text(json.dumps([{"train": ["mr_Tr00"], "val": ["mr_Tr01"]}]))
    growth.multiply_dataset(source, plans, "2d", tmp_path / "two", 2)
    splits = json.loads((tmp_path / "two" / "splits_final.json").read_text())
    assert splits == [{"train": ["mr_Tr00_000", "mr_Tr00_001"], "val": ["mr_Tr01_000", "mr_Tr01_001"]}]


def test_a_dataset_without_target_is_refused(benchmarks, plans, tmp_path):
    import growth

    source = shutil.copytree(benchmarks, tmp_path / "source")
    shutil.rmtree(source / "nnUNetPlans_2d_target")
    with pytest.raises(UDAError, match=r"nnUNetPlans_2d_target does not exist: run nnUNetv2_plan_and_preprocess"):
        growth.multiply_dataset(source, plans, "2d", tmp_path / "two", 2)


def test_twice_the_edge_is_four_times_the_segmenters_operations(benchmarks, plans):
    import growth

    found = growth.measure_patches(["SourceOnlyTrainer"], benchmarks.name, plans, "2d", CPU, 1, (16, 32))
    assert [one["edge"] for one in found] == [16, 32] and found[1]["flops"] == 4 * found[0]["flops"]


def test_volumes_are_preprocessed_and_weighed(benchmarks, plans):
    import growth

    size = (64, 512, 512)  # large enough to be seen among what start-up takes
    (found,) = growth.measure_volumes(benchmarks.name, plans, "2d", size, [(1, 1)])
    assert found["volume_bytes"] == 4 * 64 * 512 * 512
    assert found["bytes"] > 0.5 * found["volume_bytes"] and found["start_bytes"] > 50e6


def test_predictions_are_compared_round_by_round(benchmarks, plans):
    import prediction_time

    trainers = ("nnUNetTrainer", "CISFATrainer", "SimilarityPrototypesTrainer")
    runs = [(name, "tiny", plans) for name in trainers]
    found = prediction_time.measure_predictions(runs, benchmarks.name, "2d", CPU, 3, 4)
    assert [one["trainer"] for one in found] == list(trainers) and found[0]["ratio"] == 1
    assert {tuple(one["shape"][:2]) for one in found} == {(1, 4)}
    for one in found:
        ratios = [mine / first for mine, first in zip(one["seconds"], found[0]["seconds"], strict=True)]
        assert len(ratios) == 3 and one["ratio"] == statistics.median(ratios)
    assert found[0]["peak_bytes"] < found[2]["peak_bytes"]


def test_the_last_epoch_is_the_whole_method(benchmarks, plans):
    import step_time

    small = {"generator_width": 4, "generator_blocks": 2, "discriminator_width": 4, "patches": 16}
    plans["uda"] |= {"cut": small}

    def steps(trainer, last):
        _, (found,) = step_time.measure_steps(
            [(trainer, "tiny", plans)], benchmarks.name, "2d", CPU, 1, last_epoch=last
        )
        return [one["name"] for one in found["passes"]], found

    first, last = (steps("CUTTrainer", epoch)[0] for epoch in (False, True))
    assert "discriminator" in first and "discriminator" not in last and "network.encoder" in last
    passes, found = steps("CASTTrainer", True)
    assert passes.count("network") == 1  # the teacher's look at target images
    assert found["resident_bytes"] > 50e6
    assert os.environ["nnUNet_n_proc_DA"] == "0" and "nnUNet_results" in os.environ


def test_a_step_is_set_against_a_plain_network_s_over_the_whole_schedule(benchmarks, plans, monkeypatch):
    import calibrate
    import step_time

    plans["uda"] |= {"num_epochs": 20, "cut": {"generator_width": 4, "generator_blocks": 2, "patches": 16}}
    epochs, make = [], step_time.make_trainer

    def watched(*arguments, **more):
        trainer = make(*arguments, **more)
        start = trainer.on_train_epoch_start
        trainer.on_train_epoch_start = lambda: (epochs.append((type(trainer).__name__, trainer.current_epoch)), start())
        return trainer

    monkeypatch.setattr(step_time, "make_trainer", watched)
    run = {"trainer": "CUTTrainer", "dataset": benchmarks.name, "plans": plans, "configuration": "2d", "fold": "all",
           "device": "cpu"}  # fmt: skip
    plain, own = calibrate.step_seconds(run)
    assert 0 < plain < own
    assert epochs == [(name, epoch) for epoch in (2, 7, 12, 17) for name in ("SourceOnlyTrainer", "CUTTrainer")]


def test_the_passes_of_cisfas_code_give_the_same_terms(benchmarks, plans):
    import step_time
    from cisfa_code import PlainInstanceNorm

    plans["uda"]["seed"] = 3
    terms, passes, plain = {}, {}, {}
    for name in ("CISFACodeTrainer", "CISFATrainer"):
        with step_time.set_aside("0"):
            trainer = step_time.make_trainer(name, benchmarks.name, plans, "2d", CPU)
            terms[name] = trainer.train_step(next(trainer.dataloader_train))
            passes[name] = [one.name for one in step_time.record_passes(trainer, next(trainer.dataloader_train))]
        plain[name] = any(type(module).__name__ == PlainInstanceNorm.__name__ for module in trainer.networks.modules())
    assert terms["CISFATrainer"] == pytest.approx(terms["CISFACodeTrainer"], rel=1e-4, abs=1e-6)
    assert len(terms["CISFATrainer"]) == 8
    assert plain == {"CISFACodeTrainer": True, "CISFATrainer": False}
    code, ours = passes.values()
    assert code.count("generator") == 3 and ours.count("generator") == 1  # forward_with_features is the other
    assert len(code) == len(ours) + 5  # an encoding, a translation, a segmentation (encoder, decoder), an encoding


def test_a_process_of_its_own_is_weighed_for_every_trainer(benchmarks, tmp_path, capsys):
    import step_time

    out = tmp_path / "figures.json"
    step_time.main(["-d", "501", "-p", "tiny", "-tr", "CISFACodeTrainer", "CISFATrainer", "-steps", "1", "-threads",
                    "1", "--resident", "-o", str(out)])  # fmt: skip
    runs, shown = json.loads(out.read_text())["runs"], capsys.readouterr().out
    assert [run["trainer"] for run in runs] == ["CISFACodeTrainer", "CISFATrainer"]
    for run in runs:
        assert 50e6 < run["resident_bytes"] < 4e9 and f"| {run['resident_bytes'] / 2**20:.0f} |" in shown


def test_the_memory_of_a_command_is_its_familys(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from memory import watched

    hold = "import time; held = bytearray(60_000_000); time.sleep(1.5)"
    both = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    seconds, held = watched([sys.executable, "-c", both], dict(os.environ))
    assert seconds > 1.5 and held > 60e6
    with pytest.raises(UDAError, match=r"ended with status 3:\nwhat went wrong"):
        watched([sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"], dict(os.environ))


def test_a_second_start_skips_what_is_done(benchmarks, tmp_path, monkeypatch, capsys):
    import run_all

    ran = []

    def run(program, **options):
        ran.append(program[1])
        run = {"plans": "a", "bare_median": 1.5, "overhead": 0.2, "loader_wait": 0.01, "share_of_peak": 0.5}
        runs = [run | {"trainer": trainer, "median": 1.75 * n, "seconds": [2.0 * n, 1.75 * n, n], "flops": 5e9 * n,
                       "peak_bytes": 1e9 * n, "resident_bytes": 2e9 * n}
                for trainer, n in (("CISFACodeTrainer", 4), ("CISFATrainer", 3))]  # fmt: skip
        with open(program[-1], "w") as file:
            json.dump({"runs": runs}, file)
        return subprocess.CompletedProcess(program, 0, "| a table |\n")

    monkeypatch.setattr(run_all.subprocess, "run", run)
    words = ["-d", "501", "-p", "tiny", "-o", str(tmp_path / "out"), "-only"]
    run_all.main([*words, "steps", "cisfa64"])
    assert len(ran) == 2
    run_all.main([*words, "cisfa64", "cisfa160"])
    assert len(ran) == 3 and "cisfa64: done already" in capsys.readouterr().out
    text = (tmp_path / "out" / "benchmarks.md").read_text()
    assert "| 64 x 64 | 7.00, 5.25 (0.75) | 20, 15 (0.75) | 4.00, 3.00 (0.75) | 8.00, 6.00 (0.75) |" in text
    assert text.count("| a table |") == 3 and "## Step times, last epoch" in text
    assert (tmp_path / "out" / "benchmarks.png").exists()
    plans = json.loads((benchmarks / "nnUNetPlansCISFA160.json").read_text())
    kwargs = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    assert kwargs["features_per_stage"] == [64, 128, 256, 512, 1024]
    assert plans["uda"]["cisfa"]["generator_width"] == 64 and plans["uda"]["cisfa"]["patches"] == 256
    small = json.loads((benchmarks / "nnUNetPlansBenchmark.json").read_text())["uda"]
    assert small["cisfa"]["generator_width"] == 4 and small["cut"]["generator_width"] == 16  # tiny sets CISFA's
    wide = json.loads((benchmarks / "nnUNetPlansBenchmarkWide.json").read_text())
    chosen = wide["configurations"]["2d"]
    assert (chosen["patch_size"], chosen["batch_size"]) == ([80, 80], 20) and wide["uda"] == small
    assert max(chosen["architecture"]["arch_kwargs"]["features_per_stage"]) == 512
    run_all.main(["-d", "501", "-p", "nnUNetPlans", *words[4:], "cisfa64"])
    assert len(ran) == 4  # other plans
