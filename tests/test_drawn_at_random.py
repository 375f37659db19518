"""What tells the domains apart sees source patches drawn as target patches are: at random, not on structures."""

from __future__ import annotations

import pytest
import torch
from conftest import batch
from support.trainers import started

from nnunet_uda.training.translation import drawn_at_random

TRAINERS = {
    "CISFATrainer": {"cisfa__segmenter_adversarial_weight": 1.0},
    "CUTTrainer": {},
    "ADVENTTrainer": {},
    "SimilarityPrototypesTrainer": {},
}


def repeated(images: torch.Tensor, number: int) -> torch.Tensor:
    return images[:1].expand(number, *images.shape[1:]).clone()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("share", [0.0, 0.33, 0.5, 0.9])
def test_they_are_those_on_which_nnunet_forces_no_structure(in_workspace, size, share):
    trainer = started("SourceOnlyTrainer")
    loader = trainer.dataloader_train.data_loader
    trainer.oversample_foreground_percent = loader.oversample_foreground_percent = share
    loader.batch_size = size
    forced = [loader.get_do_oversample(place) for place in range(size)]
    expected = [place for place in range(size) if not forced[place]] or list(range(size))
    assert drawn_at_random(trainer, torch.arange(size)).tolist() == expected


@pytest.mark.parametrize("name", TRAINERS)
def test_discriminators_learn_from_no_patch_that_is_put_on_a_structure(in_workspace, name):
    """A batch of 6, of which the last 3 are on structures: discriminators learn from 3 of the source's, 6 targets."""
    trainer = started(name, **TRAINERS[name])
    source, label, target = batch(trainer)
    source, target = repeated(source, 6), repeated(target, 6)
    label = [repeated(scale, 6) for scale in label] if isinstance(label, list) else repeated(label, 6)
    trainer.oversample_foreground_percent = 0.5
    seen: dict[str, list[int]] = {}
    for network in [network for network in trainer.networks if "discriminator" in network]:

        def keep(module, inputs, network=network):
            if next(module.parameters()).requires_grad:  # it is frozen where a generator or segmenter learns
                seen.setdefault(network, []).append(len(inputs[0]))

        trainer.networks[network].register_forward_pre_hook(keep)
    trainer.train_on(source, label, target)
    assert seen and all(sorted(sizes) == [3, 6] for sizes in seen.values()), seen
