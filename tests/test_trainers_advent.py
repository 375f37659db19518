"""Adversarial entropy minimisation: what each update changes, the players' directions, and the schedule."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from conftest import batch, make_trainer
from support.trainers import all_networks, check_three_dimensions, entropy_falls, started, step

from nnunet_uda.errors import UDAError
from nnunet_uda.losses.entropy import domain_cross_entropy, weighted_self_information

NAME = "ADVENTTrainer"
start = partial(started, NAME, advent__discriminator_width=4)


def test_one_step_changes_every_network(in_workspace):
    losses, touched = step(trainer := start())
    assert touched == set(all_networks(trainer))
    assert set(losses) == {"segmentation", "segmenter_adversarial", "discriminator", "loss"}


def test_advent_trains_its_networks_on_maps_of_one_pass(in_workspace, monkeypatch):
    trainer = start()
    source, label, target = batch(trainer)
    discriminator, passes = copy.deepcopy(trainer.networks["discriminator"]), []
    with torch.no_grad():
        outputs = [trainer.finest(trainer.segment(images)) for images in (source, target)]
        logits = [discriminator(weighted_self_information(output)) for output in outputs]
    segment = trainer.segment
    monkeypatch.setattr(trainer, "segment", lambda images: passes.append(1) or segment(images))
    trainer.train_on(source, label, target)
    assert len(passes) == 2
    expected = 0.001 * domain_cross_entropy(logits[1], True)
    torch.testing.assert_close(trainer.updates.terms["segmenter_adversarial"], expected, atol=1e-6, rtol=1e-3)
    expected = 0.5 * (domain_cross_entropy(logits[0], True) + domain_cross_entropy(logits[1], False))
    torch.testing.assert_close(trainer.updates.terms["discriminator"], expected, atol=1e-5, rtol=1e-3)


class MeanInformation(torch.nn.Module):
    """A discriminator with one weight: certain maps get high logits where it is negative."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(-3.0))

    def forward(self, maps):
        return self.weight * maps.sum(1).mean((1, 2))


def test_the_segmenter_opposes_its_discriminator_through_target_maps_alone(in_workspace):
    trainer = start(advent__adversarial_weight=1000.0, segmenter_learning_rate=0.01)
    trainer.networks["discriminator"] = MeanInformation()
    trainer.optimizers["discriminator"] = torch.optim.SGD(trainer.networks["discriminator"].parameters(), 0.0)
    assert entropy_falls(trainer)  # certain is what this discriminator takes for the source


def test_the_discriminators_rate_falls_as_the_segmenters(in_workspace):
    trainer = start(num_epochs=4)
    rates = []
    for epoch in range(4):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        rates.append(trainer.optimizers["discriminator"].param_groups[0]["lr"])
    assert rates == pytest.approx([1e-4 * (1 - epoch / 4) ** 0.9 for epoch in range(4)])


@pytest.mark.parametrize(("setting", "value"), [("adversarial_weight", -1), ("discriminator_width", 0)])
def test_bad_settings_are_refused_by_name(in_workspace, setting, value):
    with pytest.raises(UDAError, match=setting):
        make_trainer(NAME, **{f"advent__{setting}": value})


def test_three_dimensions_and_no_deep_supervision_train_too(in_workspace):
    check_three_dimensions(in_workspace, start)
