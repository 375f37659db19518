"""Direct entropy minimisation: its loss, what a step changes, 3D, and bad settings."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import batch, make_trainer
from support.trainers import check_three_dimensions, entropy_falls, started, step

from nnunet_uda.errors import UDAError
from nnunet_uda.losses.entropy import entropy_loss

NAME = "EntMinTrainer"


def test_one_step_changes_the_segmenter(in_workspace):
    losses, touched = step(started(NAME))
    assert touched == {"segmenter"} and set(losses) == {"segmentation", "entropy", "loss"}


def test_entropy_counts_target_predictions_with_the_papers_weight(in_workspace):
    trainer = started(NAME)
    source, label, target = batch(trainer)
    with torch.no_grad():
        of_source, of_target = trainer.segment(source), trainer.segment(target)
        expected = {"segmentation": trainer.loss(of_source, label), "entropy": 0.001 * entropy_loss(of_target[0])}
    trainer.train_on(source, label, target)
    for name, value in expected.items():
        torch.testing.assert_close(trainer.updates.terms[name], value, atol=1e-6, rtol=1e-4)


def test_entropy_falls_where_it_weighs_much(in_workspace):
    assert entropy_falls(started(NAME, entropy_minimisation__entropy_weight=100.0, segmenter_learning_rate=0.01))


def test_a_bad_weight_is_refused_by_name(in_workspace):
    with pytest.raises(UDAError, match="entropy_weight"):
        make_trainer(NAME, entropy_minimisation__entropy_weight=-1)


def test_three_dimensions_and_no_deep_supervision_train_too(in_workspace):
    check_three_dimensions(in_workspace, partial(started, NAME))
