"""nnU-Net's ignore label through the trainers: voxels that nobody labelled teach nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import batch, make_trainer, sampled
from support.tiny import PROTOTYPES, UUDS

from nnunet_uda.errors import UDAError

LABELS = {"background": 0, "left": 1, "ignore": 2}
"""The datasets' second structure is what was not labelled."""
SETTINGS = {
    **{f"similarity_prototypes__{name}": value for name, value in PROTOTYPES.items()},
    **{f"uuds__{name}": value for name, value in UUDS.items()},
}


def started(name: str, **settings: object):
    trainer = make_trainer(name, labels=LABELS, **{**SETTINGS, **settings})
    trainer.initialize()
    load_case = trainer.dataset_class.load_case

    def annotated(self, identifier):  # as preprocessing with an ignore label lists the places of all other classes
        data, seg, previous, properties = load_case(self, identifier)
        labelled = np.argwhere((found := seg[:]) < 2)
        places = {1: np.argwhere(found == 1), (-1, 0, 1): labelled[:: max(1, len(labelled) // 100)]}
        return data, seg, previous, properties | {"class_locations": places}

    trainer.dataset_class = type("Annotated", (trainer.dataset_class,), {"load_case": annotated})
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def with_ignored(trainer) -> tuple:
    """A step's batch, whose labels certainly hold foreground and ignored voxels."""
    source, label, target = batch(trainer)
    for each in label if isinstance(label, list) else [label]:
        each[..., -4:, :] = 2
        each[..., :2, :] = 1
    return source, label, target


@pytest.mark.parametrize("loss", ["dice", "dice_ce"])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_no_gradient_comes_from_ignored_voxels(in_workspace, loss, deep_supervision):
    trainer = started("SourceOnlyTrainer", segmentation_loss=loss, deep_supervision=deep_supervision)
    _, label = (data := next(trainer.dataloader_train))["data"], data["target"]
    levels = label if deep_supervision else [label]
    for level in levels:
        level[..., -4:, :] = 2
        level[..., :2, :] = 1
    logits = [torch.randn(len(level), 2, *level.shape[2:], requires_grad=True) for level in levels]
    trainer.loss(logits if deep_supervision else logits[0], label).backward()
    for level, each in list(zip(levels, logits, strict=True))[: len(levels) - deep_supervision]:  # the coarsest: 0
        where = each.grad.abs().sum(1, keepdim=True)
        assert not where[level == 2].any() and (where[level != 2] > 0).all()


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_dice_trains_in_2d_and_3d(in_workspace, configuration, deep_supervision):
    if configuration == "3d_fullres":
        in_workspace.configure("tiny3d_ignore", configuration=configuration, options=("--overwrite",))
    plans = "tiny" if configuration == "2d" else "tiny3d_ignore"
    trainer = started(
        "SourceOnlyTrainer", plans=plans, configuration=configuration, segmentation_loss="dice",
        deep_supervision=deep_supervision,
    )  # fmt: skip
    assert 0 <= trainer.train_step(next(trainer.dataloader_train))["segmentation"] <= 1


@pytest.mark.draws
@sampled(
    "name",
    ["CISFATrainer", "CASTTrainer", "UUDSTrainer", "RandomStyleTrainer", "SimilarityPrototypesTrainer"],
    "CISFATrainer",
    "CASTTrainer",
    "RandomStyleTrainer",
)
def test_every_trainer_takes_it(in_workspace, name):
    trainer = started(name, segmentation_loss="dice", similarity_prototypes__boundary_weight=1.0)
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert all(map(torch.isfinite, map(torch.as_tensor, losses.values())))
    trainer.draw_pictures(Path(trainer.output_folder, "pictures", "epoch_0000.png"))


def test_the_patch_contrast_weighs_them_as_background(in_workspace):
    trainer = started("CISFATrainer", cisfa__patches=10**6)
    source, label, target = with_ignored(trainer)

    def loss(label: torch.Tensor, **seen: torch.Tensor) -> float:
        trainer.update_segmenter = trainer.update_discriminators = lambda *_: None
        for group in trainer.optimizers["generator"].param_groups:
            group["lr"] = 0.0
        trainer.train_on(source, label, target)
        return trainer.updates.terms["patch_contrastive"].item()

    ignored, background, foreground = (
        loss([torch.where(level == 2, value, level) for level in label]) for value in (2, 0, 1)
    )
    assert ignored == pytest.approx(background, rel=1e-5) and foreground > 1.05 * ignored


def test_prototypes_and_boundaries_leave_them_out(in_workspace):
    trainer = started("SimilarityPrototypesTrainer")
    source, label, target = with_ignored(trainer)
    view = trainer.find_prototypes(trainer.run_generators(source, target), label)[0]
    assert (view.labels[:, -1] == -1).all() and view.present.shape[1] == 2


def test_a_slice_that_may_hold_the_object_is_no_example_without_it(in_workspace):
    trainer = started("UUDSTrainer")
    pooled = torch.randn(4, 1, trainer.plain_network.channels)
    label = torch.zeros(4, 1, 8, 8)
    label[:2, :, 0, 0] = 1
    sure = trainer.contrastive_loss(pooled[[0, 1, 2]], label[[0, 1, 2]])
    label[3, :, 0, 0], label[1, :, 1, 1] = -1, -1  # of the last nobody knows; the second holds the object in any case
    torch.testing.assert_close(trainer.contrastive_loss(pooled, label), sure)


def test_a_fold_with_nothing_but_background_and_ignored_voxels_is_refused(in_workspace, monkeypatch):
    trainer = make_trainer("SourceOnlyTrainer", labels=LABELS)
    trainer.initialize()
    load_case = trainer.dataset_class.load_case

    def without(self, identifier):
        *arrays, properties = load_case(self, identifier)
        return *arrays, properties | {"class_locations": {1: [], (-1, 0, 1): [[0, 0, 0, 0]]}}

    monkeypatch.setattr(trainer.dataset_class, "load_case", without)
    with pytest.raises(UDAError, match="holds a foreground voxel"):
        trainer.on_train_start()
