from __future__ import annotations

import json
import os

import pytest

from nnunet_uda.commands import configure
from nnunet_uda.data.slices import plane_warning
from nnunet_uda.errors import UDAError
from nnunet_uda.plans import PROTOCOLS, cpu_preset, derive_plans, fits_cpu, training_share


@pytest.fixture
def plans(planned):
    return json.loads((planned.preprocessed / "Dataset501_Blobs" / "nnUNetPlans.json").read_text())


def test_a_derived_plan_keeps_the_data_and_changes_the_network(plans):
    derived = derive_plans(
        plans, "2d", "small", {"seed": 1}, patch_size=(48, 30), batch_size=3, base_features=8, stages=3
    )
    chosen = derived["configurations"]["2d"]
    kwargs = chosen["architecture"]["arch_kwargs"]
    assert derived["plans_name"] == "small" and derived["uda"] == {"seed": 1}
    assert chosen["patch_size"] == [48, 32], "30 is padded to a multiple of 4"
    assert chosen["batch_size"] == 3 and kwargs["n_stages"] == 3
    assert kwargs["features_per_stage"][:2] == [8, 16]
    assert [len(kwargs[key]) for key in ("strides", "kernel_sizes", "n_conv_per_stage")] == [3, 3, 3]
    assert len(kwargs["n_conv_per_stage_decoder"]) == 2
    assert chosen["data_identifier"] == plans["configurations"]["2d"]["data_identifier"]
    assert "uda" not in plans, "the base is left alone"


@pytest.mark.parametrize(("shape", "wrong"), [([48, 1, 48], True), ([48, 48, 5], True), ([1, 48, 48], False)])
def test_slices_that_are_rows_are_warned_of_in_2d_alone(shape, wrong):
    plans = {
        "original_median_shape_after_transp": shape,
        "configurations": {"2d": {"patch_size": [8, 48]}, "3d_fullres": {"patch_size": [8, 48, 48]}},
    }
    warning = plane_warning(plans, "2d")
    assert ("nnUNetUDA_configure -plane" in warning) if wrong else warning is None
    assert plane_warning(plans, "3d_fullres") is None


def test_a_slice_size_resamples_the_median_slice(plans):
    derived = derive_plans(plans, "2d", "s", {}, slice_size=(64, 48))["configurations"]["2d"]
    median, spacing = plans["original_median_shape_after_transp"], plans["original_median_spacing_after_transp"]
    assert derived["patch_size"] == [64, 48]
    assert derived["spacing"] == pytest.approx([spacing[1] * median[1] / 64, spacing[2] * median[2] / 48])
    assert derived["data_identifier"] == "s_2d"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": (32,)}, "has 2 numbers"),
        ({"patch_size": (4, 4)}, "too small"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_impossible_plans_are_refused(plans, options, words):
    with pytest.raises(UDAError, match=words):
        derive_plans(plans, "2d", "x", {}, **options)


def test_unknown_settings_are_refused_before_anything_is_written(in_workspace, refused):
    words = ["-d", "501", "-p", "typo", "-set", "cisfa.generater_width=3"]
    assert "generater_width" in refused(configure.main, words)
    assert not (in_workspace.preprocessed / "Dataset501_Blobs" / "typo.json").exists()


def test_existing_plans_are_kept_and_nnunets_own_name_refused(in_workspace, refused):
    for name, words in (("tiny", "--overwrite"), ("nnUNetPlans", "new name")):
        assert words in refused(configure.main, ["-d", "501", "-p", name])


def test_cisfa_protocol_writes_section_4_2(in_workspace):
    configure.main(["-d", "501", "-p", "paper", "-protocol", "cisfa"])
    written = json.loads((in_workspace.preprocessed / "Dataset501_Blobs" / "paper.json").read_text())
    uda, chosen = written["uda"], written["configurations"]["2d"]
    assert (uda["segmenter_optimizer"], uda["segmenter_learning_rate"], uda["num_epochs"]) == ("adam", 2e-4, 200)
    assert uda["segmentation_loss"] == "dice" and uda["augmentation"] == "none"
    assert uda["iterations_per_epoch"] == round(4 * 10 / 4), "4 of 5 cases of 10 slices in a fold, 4 at a time"
    assert chosen["batch_size"] == 4 and chosen["patch_size"] == [160, 160]
    kwargs = chosen["architecture"]["arch_kwargs"]
    assert kwargs["features_per_stage"] == [64, 128, 256, 512, 1024], "four contractions and the bottom"
    assert kwargs["strides"] == [[1, 1], *[[2, 2]] * 4]
    configure.main(["-d", "501", "-p", "paper196", "-protocol", "cisfa", "-slice_size", "196", "196"])
    written = json.loads((in_workspace.preprocessed / "Dataset501_Blobs" / "paper196.json").read_text())
    assert written["configurations"]["2d"]["patch_size"] == [208, 208], "as docs/reproduce.md says"


def test_the_cpu_preset_is_small_keeps_the_data_and_yields_to_set(in_workspace, capsys, monkeypatch):
    folder = in_workspace.preprocessed / "Dataset501_Blobs"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    configure.main(["-d", "501", "-p", "on_cpu", "-preset", "cpu", "-set", "num_epochs=7", "cisfa.patches=9"])
    written, base = (json.loads((folder / f"{name}.json").read_text()) for name in ("on_cpu", "nnUNetPlans"))
    chosen = written["configurations"]["2d"]
    assert chosen["data_identifier"] == base["configurations"]["2d"]["data_identifier"]
    patch = " x ".join(map(str, chosen["patch_size"]))
    assert max(chosen["patch_size"]) <= 128 and chosen["batch_size"] <= 4
    assert fits_cpu(chosen) and not fits_cpu(base["configurations"]["2d"])
    assert chosen["architecture"]["arch_kwargs"]["features_per_stage"][0] == 16
    assert written["uda"]["num_epochs"] == 7 and written["uda"]["iterations_per_epoch"] == 100
    assert written["uda"]["cisfa"]["patches"] == 9 and written["uda"]["cisfa"]["generator_width"] == 16
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "Next: nnUNetUDA_train 501 2d 0 -tr CASTTrainer -p on_cpu -device cpu"
    assert said[0] == f"Wrote {folder / 'on_cpu.json'} (2d: patch {patch}, batch {chosen['batch_size']})"
    assert ["num_epochs", "7", "200"] in [line.split() for line in said[1:-1]], "a table against the defaults"
    assert ["cisfa.patches", "9", "256"] in [line.split() for line in said[1:-1]]
    epochs = [cpu_preset(base, "2d", cores)[0]["num_epochs"] for cores in (1, 7, 8, 64)]
    assert epochs == [50, 50, 100, 100], "more on a machine with more cores"
    big = json.loads(json.dumps(base))
    big["configurations"]["3d_fullres"] |= {
        "patch_size": [160, 20, 160],
        "median_image_size_in_voxels": [50.4, 200, 200],
        "batch_size": 9,
    }
    _, options = cpu_preset(big, "3d_fullres", 1)
    assert options["patch_size"] == (50, 20, 64) and options["batch_size"] == 2
    with pytest.raises(UDAError, match="no configuration '4d'"):
        cpu_preset(base, "4d", 1)


@pytest.mark.parametrize(
    ("folds", "iterations"),
    [
        ([[4, 4], [3, 5], [2, 6], [3, 5]], 30 / 4),  # 3 of 5 cases on average
        ([[2, 3]], 20 / 4),
        (None, 40 / 4),  # nnU-Net draws five folds
    ],
)
def test_an_epoch_is_all_slices_that_a_fold_trains_on(tmp_path, folds, iterations):
    fingerprint = {"shapes_after_crop": [[30, 10, 30]] * 5}
    if folds is not None:
        splits = [{"train": [f"t{i}" for i in range(n)], "val": [f"v{i}" for i in range(m)]} for n, m in folds]
        (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    share = training_share(tmp_path, fingerprint)
    for protocol in PROTOCOLS.values():
        assert protocol(fingerprint, 1, share)[0]["iterations_per_epoch"] == round(iterations)
    assert training_share(tmp_path / "few", {"shapes_after_crop": [[3, 3, 3]] * 4}) == 1, "fold all"
    (tmp_path / "splits_final.json").write_text('[{"train": "all"}]')
    with pytest.raises(UDAError, match=r"splits_final\.json: fold 0 must hold two lists"):
        training_share(tmp_path, fingerprint)


def test_the_prototypes_protocol_is_cisfas_schedule(in_workspace):
    for protocol in ("cisfa", "similarity_prototypes"):
        configure.main(["-d", "501", "-p", f"paper_{protocol}", "-protocol", protocol, "-set", "seed=1"])
    cisfa, prototypes = (
        json.loads((in_workspace.preprocessed / "Dataset501_Blobs" / f"paper_{protocol}.json").read_text())
        for protocol in ("cisfa", "similarity_prototypes")
    )
    ours, theirs = (plans["configurations"]["2d"] for plans in (prototypes, cisfa))
    assert {key for key in ours if ours[key] != theirs[key]} == {"data_identifier"}
    assert prototypes["uda"].pop("similarity_prototypes") == {"cycle_weight": 10.0, "residual_translation": False}
    assert prototypes["uda"] == {key: value for key, value in cisfa["uda"].items() if key != "cisfa"}


def test_a_plane_turns_the_volumes(in_workspace):
    assert os.environ["nnUNet_n_proc_DA"] == "0", "nnU-Net itself cannot plan with it"
    configure.main(["-d", "501", "-p", "coronal", "-plane", "coronal"])
    written = json.loads((in_workspace.preprocessed / "Dataset501_Blobs" / "coronal.json").read_text())
    assert written["transpose_forward"] == [1, 0, 2] and written["transpose_backward"] == [1, 0, 2]
    assert written["original_median_shape_after_transp"] == [36, 10, 36]
    assert written["configurations"]["2d"]["data_identifier"] == "coronal_2d"
    assert written["experiment_planner_used"] == "ExperimentPlanner"
