"""A trainer in the middle of a training, its steps, and what several trainers are asked alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from conftest import batch, changed, make_trainer, parameters

from nnunet_uda.losses.entropy import entropy_loss


def started(name: str, epoch: int = 0, **options):
    """A trainer as ``make_trainer`` makes it, at the beginning of an epoch."""
    trainer = make_trainer(name, **options)
    trainer.on_train_start()
    trainer.current_epoch = epoch
    trainer.on_train_epoch_start()
    return trainer


def all_networks(trainer) -> dict[str, torch.nn.Module]:
    return {**trainer.networks, "segmenter": trainer.network}


def step(trainer) -> tuple[dict[str, float], set[str]]:
    """One training step: the losses, and the names of the networks that it changed."""
    before = {name: parameters(network) for name, network in all_networks(trainer).items()}
    losses = trainer.train_step(next(trainer.dataloader_train))
    touched = {name for name, network in all_networks(trainer).items() if changed(before[name], network)}
    assert all(p.requires_grad for network in all_networks(trainer).values() for p in network.parameters())
    return losses, touched


def entropy_falls(trainer) -> bool:
    """Whether ten steps on one batch make predictions on its target images a fifth more certain."""
    source, label, target = batch(trainer)

    def entropy() -> float:
        with torch.no_grad():
            return entropy_loss(trainer.finest(trainer.segment(target))).item()

    before = entropy()
    for _ in range(10):
        trainer.train_on(source, label, target)
    return entropy() < 0.8 * before


def check_three_dimensions(in_workspace, start: Callable[..., object], epochs: Sequence[int] = (0,)) -> None:
    """A step in 3D, and one without deep supervision, in each of ``epochs``; ``start`` is ``started`` of a trainer."""
    in_workspace.configure("tiny3d", configuration="3d_fullres", options=("--overwrite",))
    for epoch in epochs:
        losses, touched = step(start(epoch=epoch, plans="tiny3d", configuration="3d_fullres"))
        assert touched and all(math.isfinite(value) for value in losses.values())
        losses, _ = step(start(epoch=epoch, deep_supervision=False))
        assert all(math.isfinite(value) for value in losses.values())
