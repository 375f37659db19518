"""Plans of others are data: what they name is looked up, and nothing of it runs."""

from __future__ import annotations

import copy
import json
import math
import os
import pydoc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TRAINERS
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from support.plans import UNETS, plans

from nnunet_uda.commands import compare, configure, evaluate, preprocess, sweep, train
from nnunet_uda.errors import UDAError, print_without_traceback
from nnunet_uda.foreign_plans import check_plans, find_in_nnunet, read_plans
from nnunet_uda.plans import replan_plane


def changed(*keys: Any, value: Any) -> dict[str, Any]:
    """The plans with one entry of the configuration 2d changed, or, for a single key, of the plans."""
    content = plans()
    place = content if len(keys) == 1 else content["configurations"]["2d"]
    for key in keys[:-1]:
        place = place[key] if key else place
    place[keys[-1]] = value
    return content


ARCHITECTURE, ARGUMENTS = ("architecture",), ("architecture", "arch_kwargs")
BAD = [
    ((*ARCHITECTURE, "network_class_name"), "os.system"),
    ((*ARCHITECTURE, "network_class_name"), "builtins.exec"),
    ((*ARCHITECTURE, "network_class_name"), f"{UNETS}.np"),
    ((*ARCHITECTURE, "network_class_name"), f"{UNETS}.nn.Module"),
    ((*ARCHITECTURE, "network_class_name"), f"{UNETS}.PlainConvUNet.initialize"),
    ((*ARCHITECTURE, "network_class_name"), "evil.architectures.unet.PlainConvUNet"),
    ((*ARCHITECTURE, "network_class_name"), "PlainConvUNet"),
    ((*ARCHITECTURE, "network_class_name"), ["os.system"]),
    ((*ARGUMENTS, "conv_op"), "os.system"),
    ((*ARGUMENTS, "conv_op"), "torch.hub.load"),
    ((*ARGUMENTS, "conv_op"), "torch.nn.modules.conv.os"),
    ((*ARGUMENTS, "conv_op"), "torch.nn.modules.linear.Conv2d"),
    ((*ARGUMENTS, "conv_op"), 7),
    ((*ARGUMENTS, "norm_op"), "builtins.exec"),
    ((*ARGUMENTS, "norm_op"), "torch.nn.Conv2d"),
    ((*ARGUMENTS, "nonlin"), "subprocess.call"),
    ((*ARGUMENTS, "nonlin"), "torch.nn.Sequential"),
    ((*ARGUMENTS, "dropout_op"), "shutil.rmtree"),
    ((*ARCHITECTURE, "_kw_requires_import"), ["conv_op", "absent"]),
    ((*ARCHITECTURE, "_kw_requires_import"), [["conv_op"]]),
    ((*ARCHITECTURE, "_kw_requires_import"), "conv_op"),
    ((*ARCHITECTURE, "_kw_requires_import"), ["n_stages"]),
    ((*ARCHITECTURE, "arch_kwargs"), [1]),
    (("", "architecture"), {"network_class_name": f"{UNETS}.PlainConvUNet"}),
    (("", "preprocessor_name"), "os"),
    (("", "preprocessor_name"), "join"),
    (("", "preprocessor_name"), "../evil"),
    (("", "normalization_schemes"), ["ZScoreNormalization", "exec"]),
    (("", "normalization_schemes"), "ZScoreNormalization"),
    (("", "resampling_fn_data"), "eval"),
    (("", "resampling_fn_seg"), "resize"),
    (("", "resampling_fn_probabilities"), None),
    (("image_reader_writer",), "os.system"),
    (("image_reader_writer",), "np"),
    (("label_manager",), "evil.LabelManager"),
    (("experiment_planner_used",), "os.system"),
]  # fmt: skip


NUMBERS = [
    (("uda",), [1]),
    (("image_reader_writer",), None),
    (("", "architecture"), None),
    (("transpose_forward",), None),
    (("transpose_forward",), [0, 1]),
    (("transpose_forward",), [0, 0, 1]),
    (("transpose_forward",), "012"),
    (("transpose_backward",), [1, 0, 2]),
    (("original_median_spacing_after_transp",), None),
    (("original_median_spacing_after_transp",), [3.0, 0, 1.0]),
    (("foreground_intensity_properties_per_channel",), None),
    (("", "patch_size"), None),
    (("", "patch_size"), [0, 8]),
    (("", "patch_size"), [8.5, 8]),
    (("", "patch_size"), "88"),
    (("", "patch_size"), [8]),
    (("", "patch_size"), [10**6, 10**6]),
    (("", "batch_size"), 0),
    (("", "batch_size"), "2"),
    (("", "batch_size"), True),
    (("", "spacing"), [1.0]),
    (("", "spacing"), [math.nan, 1.0]),
    (("", "spacing"), [-1.0, 1.0]),
    (("", "normalization_schemes"), []),
    (("", "use_mask_for_norm"), [False, False]),
    (("", "use_mask_for_norm"), None),
]
"""What nnU-Net takes for granted; None is a missing key."""


@pytest.mark.parametrize(("keys", "value"), NUMBERS)
def test_numbers_that_no_planner_writes_are_refused_by_name(keys, value):
    content = changed(*keys, value=value)
    if value is None:
        (content if len(keys) == 1 else content["configurations"]["2d"]).pop(keys[-1])
    with pytest.raises(UDAError, match=f"my.json.*'{keys[-1]}' is .*; expected .* plan again"):
        check_plans(content, "my.json")


def test_what_ct_normalisation_needs(tmp_path):
    content = changed("", "normalization_schemes", value=["CTNormalization"])
    with pytest.raises(UDAError, match="'foreground_intensity_properties_per_channel' is None; .* of channel 0"):
        check_plans(content, "my.json")
    known = {"mean": 1.0, "std": 2.0, "percentile_00_5": 0.0, "percentile_99_5": 9}
    content["foreground_intensity_properties_per_channel"] = {"0": known}
    check_plans(content, "my.json")


@pytest.mark.parametrize(("other", "said"), [("child", "which leads back to itself"), ("gone", "which there is not")])
def test_configurations_inherit_from_others(other, said):
    content = plans()
    content["configurations"]["child"]["inherits_from"] = other
    with pytest.raises(UDAError, match=f"my.json, configuration 'child': it inherits from '{other}', {said}"):
        check_plans(content, "my.json")


@pytest.fixture
def watched(monkeypatch) -> None:
    """Nothing may be located, imported or called by a name that the plans hold."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a name in the plans was followed")

    for module, name in ((pydoc, "locate"), (os, "system"), (subprocess, "call")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize(("keys", "value"), BAD)
def test_what_nnunet_never_writes_is_refused_by_name(watched, keys, value):
    with pytest.raises(UDAError, match="my.json") as error:
        check_plans(changed(*keys, value=value), "my.json")
    assert "plan again" in str(error.value)
    assert keys[-1] in str(error.value) or str(value).strip("[]'") in str(error.value)


GOOD = [
    ((*ARCHITECTURE, "network_class_name"), f"{UNETS}.ResidualEncoderUNet"),
    ((*ARCHITECTURE, "network_class_name"), f"{UNETS.replace('unet', 'residual_unet')}.ResidualEncoderUNet"),
    ((*ARGUMENTS, "conv_op"), "torch.nn.Conv3d"),
    ((*ARGUMENTS, "norm_op"), "torch.nn.modules.batchnorm.BatchNorm2d"),
    ((*ARGUMENTS, "norm_op"), "torch.nn.GroupNorm"),
    ((*ARGUMENTS, "dropout_op"), "torch.nn.modules.dropout.Dropout2d"),
    ((*ARGUMENTS, "nonlin"), "torch.nn.modules.activation.GELU"),
    ((*ARCHITECTURE, "_kw_requires_import"), ("conv_op", "norm_op", "dropout_op", "nonlin")),
    (("", "normalization_schemes"), ["NoNormalization"]),
    (("transpose_backward",), [0, 1, 2]),
    (("", "spacing"), [1, 0.7]),
    (("", "patch_size"), [512, 512]),
    (("", "resampling_fn_seg"), "resample_torch_fornnunet"),
    (("image_reader_writer",), "NibabelIOWithReorient"),
    (("experiment_planner_used",), "nnUNetPlannerResEncM"),
    (("experiment_planner_used",), "MyOwnPlanner"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "value"), GOOD)
def test_what_planners_write_is_taken(keys, value):
    content = changed(*keys, value=value)
    assert check_plans(content, "my.json") is content


def test_a_block_of_the_network_library_is_taken():
    content = plans()
    architecture = content["configurations"]["2d"]["architecture"]
    architecture["_kw_requires_import"].append("block")
    for value, fits in (("dynamic_network_architectures.building_blocks.residual.BottleneckD", True),
                        ("dynamic_network_architectures.building_blocks.residual.nn", False)):  # fmt: skip
        architecture["arch_kwargs"]["block"] = value
        if fits:
            check_plans(content, "my.json")
        else:
            with pytest.raises(UDAError, match="'block' is"):
                check_plans(content, "my.json")


def test_plans_of_an_old_nnunet_name_one_of_two_networks():
    old = plans()["configurations"]["2d"] | {"UNet_class_name": "PlainConvUNet"}
    del old["architecture"]
    check_plans(plans() | {"configurations": {"2d": old}}, "my.json")
    with pytest.raises(UDAError, match="'UNet_class_name' is 'exec'"):
        check_plans(plans() | {"configurations": {"2d": old | {"UNet_class_name": "exec"}}}, "my.json")


@pytest.mark.parametrize("name", ["CISFATrainer", "SimilarityPrototypesTrainer", "UUDSTrainer", "SupervisedTrainer"])
def test_prediction_builds_no_network_from_other_names(monkeypatch, watched, name):
    """What nnUNetv2_predict calls, without a trainer's start before it."""
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS))
    trainer = recursive_find_trainer_class_by_name(name)
    manager = PlansManager(changed("architecture", "network_class_name", value="os.system"))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(UDAError, match="'network_class_name' is 'os.system'"):
        trainer.build_network_architecture(manager, manager.get_configuration("2d"), 1, 2, False)
    assert sys.excepthook is print_without_traceback


def test_every_command_refuses_them_before_anything_is_imported(tmp_path, monkeypatch, watched, capsys):
    folders = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, folder in folders.items():
        monkeypatch.setenv(name, str(folder))
        (folder / "Dataset501_Blobs").mkdir(parents=True)
    bad = changed(*ARGUMENTS, "conv_op", value="os.system")
    model = folders["nnUNet_results"] / "Dataset501_Blobs" / "nnUNetTrainer__P__2d"
    (model / "fold_0").mkdir(parents=True)
    (model / "fold_0" / "checkpoint_final.pth").touch()
    content = {"channel_names": {"0": "x"}, "labels": {"background": 0, "a": 1}, "numTraining": 1,
               "file_ending": ".nii.gz", "uda": {"source_domain": "A", "target_domain": "B"}}  # fmt: skip
    for folder in (*(folders[name] / "Dataset501_Blobs" for name in folders), model):
        (folder / "dataset.json").write_text(json.dumps(content))
        (folder / "plans.json").write_text(json.dumps(bad))
        (folder / "P.json").write_text(json.dumps(bad))
    for file in ("imagesTu/b_0000.nii.gz", "imagesTs/c_0000.nii.gz", "labelsTs/c.nii.gz"):
        path = folders["nnUNet_raw"] / "Dataset501_Blobs" / file
        path.parent.mkdir()
        path.touch()
    out = ["-o", str(tmp_path / "out")]
    for main, words in (
        (preprocess.main, ["-d", "501", "-p", "P"]),
        (configure.main, ["-d", "501", "-from", "P", "-p", "Q"]),
        (sweep.main, ["-d", "501", "-p", "P", "-tr", "CISFATrainer", "-vary", "mirror", "true", *out]),
        (compare.main, ["-d", "501", "-p", "P", "-tr", "CISFATrainer", *out]),
        (train.main, ["501", "2d", "0", "-tr", "nnUNetTrainer", "-p", "P", "-device", "cpu"]),
        (evaluate.main, ["--unsupervised", "-d", "501", "-tr", "nnUNetTrainer", "-p", "P", "-device", "cpu", *out]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        error = capsys.readouterr().err
        assert stopped.value.code == 1 and "'conv_op' is 'os.system'" in error, (main, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../P", "a/b", "", "a\nb", "absent"])
def test_plans_that_are_not_there(tmp_path, name):
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(plans()))
    (tmp_path.parent / "P.json").write_text(json.dumps(plans()))
    with pytest.raises(UDAError, match=r"There are: nnUNetPlans$" if name == "absent" else "cannot be a name"):
        read_plans(tmp_path, name)


def test_a_planner_that_nnunet_lacks_plans_no_plane(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    (tmp_path / "Dataset501_Blobs").mkdir()
    (tmp_path / "Dataset501_Blobs" / "dataset.json").write_text("{}")
    content = plans() | {"image_reader_writer": "SimpleITKIOWithReorient", "experiment_planner_used": "MyOwnPlanner"}
    with pytest.raises(UDAError, match="'MyOwnPlanner'; expected a name in nnunetv2.experiment_planning"):
        replan_plane("Dataset501_Blobs", copy.deepcopy(content), "coronal", "Q")
    assert find_in_nnunet("label_manager", "LabelManager", Path("x")).__name__ == "LabelManager"
