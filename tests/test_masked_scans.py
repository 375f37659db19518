"""Skull-stripped scans: what is 0 outside of the mask stays 0 after every restyling and translation."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAINERS

from nnunet_uda.training.background import outside_mask
from nnunet_uda.training.uda_trainer import UDATrainer


def bare(trainer_class: type, *masked: bool):
    """A trainer without anything but its plans' masks, and a generator that moves every voxel."""
    trainer = object.__new__(trainer_class)
    trainer.configuration_manager = SimpleNamespace(use_mask_for_norm=list(masked))
    trainer.label_manager = SimpleNamespace(ignore_label=None)
    trainer.networks = {"generator": lambda images: 2 * images + 0.5}
    trainer.device = torch.device("cpu")
    return trainer


def stripped(channels: int = 1, dimensions: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    images = torch.randn(2, channels, *(8,) * dimensions)
    images[..., :3] = 0
    return images


@pytest.mark.parametrize("dimensions", [2, 3])
def test_background_comes_back_in_masked_channels_alone(dimensions):
    reference = stripped(2, dimensions)
    trainer = bare(UDATrainer, True, False)
    restyled = (reference * 3 + 1).requires_grad_()
    restored = trainer.restore_background(restyled, reference)
    assert (restored[:, 0, ..., :3] == 0).all() and torch.equal(restored[:, 0, ..., 3:], restyled[:, 0, ..., 3:])
    assert torch.equal(restored[:, 1], restyled[:, 1])
    restored.sum().backward()
    assert (restyled.grad[:, 0, ..., :3] == 0).all() and (restyled.grad[:, 0, ..., 3:] == 1).all()
    assert outside_mask(reference, [True, False]).shape == reference.shape


def test_nothing_is_done_without_a_mask():
    trainer = bare(UDATrainer, False)
    restyled = stripped() + 1
    assert outside_mask(stripped(), [False]) is None
    assert trainer.restore_background(restyled, stripped()) is restyled


@pytest.fixture
def classes(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINERS))
    import cisfa
    import cut

    yield {"cisfa": cisfa.CISFATrainer, "cut": cut.CUTTrainer}
    for name in ("cisfa", "cut"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["cisfa", "cut"])
def test_translations_keep_the_background(classes, name):
    source = stripped()
    translated = bare(classes[name], True).translate(source)
    assert (translated[..., :3] == 0).all() and torch.equal(translated[..., 3:], 2 * source[..., 3:] + 0.5)
    assert (bare(classes[name], False).translate(source)[..., :3] == 0.5).all()


def test_the_segmenter_and_the_discriminators_see_it(classes, monkeypatch):
    seen = []
    trainer = bare(classes["cisfa"], True)
    monkeypatch.setattr(trainer, "update_generator", lambda *images: None, raising=False)
    monkeypatch.setattr(trainer, "update_segmenter", lambda source, translated, *rest: seen.append(translated), False)
    monkeypatch.setattr(trainer, "update_discriminators", lambda translated, target: seen.append(translated), False)
    trainer.train_on(stripped(), stripped(), stripped())
    assert len(seen) == 2 and all((translated[..., :3] == 0).all() for translated in seen)
