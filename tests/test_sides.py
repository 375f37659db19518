"""Paired structures, and the mirroring that would exchange them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_trainer

from nnunet_uda.data.sides import paired_names
from nnunet_uda.training.trainer_state import check_checkpoint, settings_in_force


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["liver", "right_kidney", "left_kidney"], [("left_kidney", "right_kidney")]),
        (["Kidney (L)", "Kidney (R)"], [("Kidney (L)", "Kidney (R)")]),
        (["KidneyLeft", "KidneyRight"], [("KidneyLeft", "KidneyRight")]),
        (["leftlung", "aorta", "rightlung"], [("leftlung", "rightlung")]),
        (["lh-thalamus", "rh-thalamus"], [("lh-thalamus", "rh-thalamus")]),
        (["left", "right"], [("left", "right")]),
        (["Niere links", "Niere rechts"], [("Niere links", "Niere rechts")]),
        (["LV", "RV", "MYO", "LA", "RA"], []),
        (["left_kidney", "spleen"], []),
        (["liver", "river", "lumen", "rumen"], []),
    ],
)  # fmt: skip
def test_pairs_are_told_by_their_names(names, pairs):
    assert paired_names(names) == pairs


UNPAIRED = {"background": 0, "liver": 1, "spleen": 2}


@pytest.mark.parametrize(
    ("configuration", "forward", "reader", "expected"),
    [
        ("2d", [0, 1, 2], "SimpleITKIOWithReorient", (0,)),
        ("2d", [1, 0, 2], "SimpleITKIOWithReorient", (0,)),
        ("2d", [0, 2, 1], "SimpleITKIOWithReorient", (1,)),
        ("2d", [2, 0, 1], "SimpleITKIOWithReorient", (0, 1)),  # sagittal slices have no left and right
        ("3d_fullres", [0, 1, 2], "SimpleITKIOWithReorient", (0, 1)),
        ("3d_fullres", [2, 0, 1], "SimpleITKIOWithReorient", (1, 2)),
        ("2d", [0, 1, 2], "NibabelIO", None),  # arrays as the file has them: nobody knows where left is
    ],
)
def test_the_axis_from_left_to_right_is_left_out(in_workspace, configuration, forward, reader, expected):
    plans = "tiny" if configuration == "2d" else "nnUNetPlans"
    trainer = make_trainer("SourceOnlyTrainer", plans=plans, configuration=configuration)
    content = trainer.plans_manager.plans
    content["transpose_forward"], content["image_reader_writer"] = forward, reader
    for mirror, axes in (("auto", expected), (True, (0, 1, 2)[: len(trainer.configuration_manager.patch_size)])):
        object.__setattr__(trainer.settings, "mirror", mirror)
        used = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1]
        assert used == trainer.inference_allowed_mirroring_axes == axes, mirror
    assert ("it would exchange left and right" in Path(trainer.log_file).read_text()) == (expected != (0, 1, 2))


def test_other_structures_and_false_are_as_ever(in_workspace):
    for settings, axes in (({"labels": UNPAIRED}, (0, 1)), ({"mirror": True}, (0, 1)), ({"mirror": False}, None)):
        trainer = make_trainer("SourceOnlyTrainer", **settings)
        assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1] == axes


def test_checkpoints_from_before_go_on(in_workspace):
    trainer = make_trainer("CISFATrainer")
    settings = settings_in_force(trainer)

    def check(**changes):
        written = {"uda": {"settings": settings | changes}, "trainer_name": "CISFATrainer", "init_args": {
            "plans": trainer.plans_manager.plans, "configuration": "2d"}}  # fmt: skip
        check_checkpoint(trainer, written, "checkpoint.pth")

    own = {name: value for name, value in settings["cisfa"].items() if name != "identity_weight"}
    check(mirror=True, cisfa=own | {"patch_layers": "all"})  # no setting any more
    with pytest.raises(RuntimeError, match=r"other settings: \{'mirror': False\}"):
        check(mirror=False)
    with pytest.raises(RuntimeError, match="other settings"):
        check(cisfa=own | {"patches": 3})
    with pytest.raises(RuntimeError, match="other settings"):
        check(cisfa=own | {"identity_weight": 0.5})
