"""What tells the domains apart learns from source patches drawn as target patches are: at random, not on structures."""

from __future__ import annotations

import pytest
import torch
from conftest import batch
from support.trainers import started

from nnunet_uda.training.translation import random_patch_weights

TRAINERS = {
    "CISFATrainer": {"cisfa__segmenter_adversarial_weight": 1.0},
    "CUTTrainer": {},
    "ADVENTTrainer": {},
    "SimilarityPrototypesTrainer": {},
}


def repeated(images: torch.Tensor, number: int) -> torch.Tensor:
    return images[:1].expand(number, *images.shape[1:]).clone()


def test_they_are_0_where_nnunet_forces_a_structure_and_1_on_average(in_workspace):
    trainer = started("SourceOnlyTrainer")
    loader = trainer.dataloader_train.data_loader
    for size in (1, 2, 3, 4, 9):
        for share in (0.0, 0.33, 0.5, 0.9):
            trainer.oversample_foreground_percent = loader.oversample_foreground_percent = share
            loader.batch_size = size
            free = torch.tensor([not loader.get_do_oversample(place) for place in range(size)])
            free = free if free.any() else ~free  # where every patch is forced there is nothing else
            expected = free * size / free.sum()
            assert torch.allclose(random_patch_weights(trainer, torch.zeros(size, 3)), expected), (size, share)


@pytest.mark.parametrize("name", TRAINERS)
def test_discriminators_learn_from_no_patch_that_is_put_on_a_structure(in_workspace, name):
    """A batch of 6, the last 3 on structures: of a discriminator's two losses one depends on 3 images, one on 6."""
    trainer = started(name, **TRAINERS[name])
    source, label, target = batch(trainer)
    source, target = repeated(source, 6), repeated(target, 6)
    label = [repeated(scale, 6) for scale in label] if isinstance(label, list) else repeated(label, 6)
    trainer.oversample_foreground_percent = 0.5
    judged: dict[str, list[torch.Tensor]] = {}
    for network in [network for network in trainer.networks if "discriminator" in network]:

        def keep(module, inputs, output, network=network):
            if next(module.parameters()).requires_grad:  # it is frozen where a generator or segmenter learns
                output.retain_grad()
                judged.setdefault(network, []).append(output)

        trainer.networks[network].register_forward_hook(keep)
    trainer.train_on(source, label, target)
    assert judged
    for network, outputs in judged.items():
        learned = sorted((output.grad.flatten(1) != 0).any(1).tolist() for output in outputs)
        assert learned == [[True] * 3 + [False] * 3, [True] * 6], network
