"""CUT: what each update changes, the schedule's two parts, and its own choices."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from conftest import batch, make_trainer
from support.trainers import check_three_dimensions, started, step

from nnunet_uda.errors import UDAError

NAME = "CUTTrainer"
TRANSLATION = {"generator_adversarial", "patch_contrastive", "identity", "discriminator"}
start = partial(
    started, NAME, cut__generator_width=4, cut__generator_blocks=2, cut__discriminator_width=4, cut__patches=16
)


def test_cut_trains_the_generator_first_and_the_segmenter_then(in_workspace):
    trainer = start(num_epochs=4)
    losses, touched = step(trainer)
    assert touched == {"generator", "patch_projector", "discriminator"} and set(losses) == TRANSLATION | {"loss"}
    assert math.isfinite(losses["loss"])
    trainer.current_epoch = 2
    trainer.on_train_epoch_start()
    losses, touched = step(trainer)
    assert touched == {"segmenter"} and set(losses) == {"segmentation", "loss"}
    assert losses["loss"] == losses["segmentation"]


@pytest.mark.parametrize(("epoch", "passes", "target_batches"), [(0, 1, 1), (1, 1, 0)])
def test_cut_makes_one_pass_of_the_generator_and_loads_no_image_in_vain(
    in_workspace, monkeypatch, epoch, passes, target_batches
):
    trainer = start(epoch)
    generator, seen, drawn = trainer.networks["generator"], [], []
    forward = generator.forward_with_features
    monkeypatch.setattr(generator, "forward_with_features", lambda x: seen.append(len(x)) or forward(x))
    loader = trainer.dataloader_target
    trainer.dataloader_target = iter(lambda: drawn.append(1) or next(loader), None)
    trainer.train_step(next(trainer.dataloader_train))
    assert len(seen) == passes and len(drawn) == target_batches
    assert sum(seen) == (4 if epoch == 0 else 2)  # with the identity the target's images pass too


def test_cut_learns_from_translations_without_a_gradient_to_the_generator(in_workspace, monkeypatch):
    trainer = start(epoch=1)
    source, label, _ = batch(trainer)
    seen = []
    segment, generator = trainer.segment, trainer.networks["generator"]
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    monkeypatch.setattr(trainer, "segment", lambda images: seen.append(images) or segment(images))
    trainer.train_on(source, label, None)
    torch.testing.assert_close(seen[0], trainer.translate(source))
    assert not seen[0].requires_grad
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


def test_cuts_own_choices(in_workspace, monkeypatch):
    """Negatives of the input alone, tau 0.07, both PatchNCE terms with weight 1, each on its own images."""
    trainer = start()
    assert trainer.patch_contrastive.temperature == 0.07 and trainer.patch_contrastive.negatives == "input"
    source, _, target = batch(trainer)
    generator, projector = (copy.deepcopy(trainer.networks[name]) for name in ("generator", "patch_projector"))
    discriminator = trainer.networks["discriminator"]
    sample = trainer.networks["patch_projector"].sample_positions
    drawn = []
    monkeypatch.setattr(
        trainer.networks["patch_projector"], "sample_positions", lambda f: drawn.append(sample(f)) or drawn[0]
    )
    trainer.update_generator(source, target)
    for name, images in (("patch_contrastive", source), ("identity", target)):
        with torch.no_grad():
            output, features = generator.forward_with_features(images)
            keys = projector(features, drawn[0])
            queries = projector(generator.encode(output), drawn[0])
        losses = []
        for query, key in zip(queries, keys, strict=True):
            for image in range(len(images)):
                similarity = query[image] @ key[image].T / 0.07
                losses.append(torch.nn.functional.cross_entropy(similarity, torch.arange(len(similarity))))
        torch.testing.assert_close(trainer.updates.terms[name], torch.stack(losses).mean(), atol=1e-4, rtol=1e-3)
    with torch.no_grad():  # the discriminator was updated before the generator asked it
        expected = (discriminator(generator(source)) - 1).square().mean()
    torch.testing.assert_close(trainer.updates.terms["generator_adversarial"], expected, atol=1e-4, rtol=1e-3)


def test_cuts_players_pull_in_opposite_directions(in_workspace):
    """The discriminator learns that 1 is a target image; the generator is as far from its aim as from that."""
    trainer = start(cut__patch_contrastive_weight=0.0, cut__identity_weight=0.0)
    source, _, target = batch(trainer)
    generator, discriminator = trainer.networks["generator"], trainer.networks["discriminator"]

    def scores():
        with torch.no_grad():
            return discriminator(target).mean().item(), discriminator(generator(source)).mean().item()

    still = trainer.optimizers["generator"].param_groups
    for group in still:
        group["lr"] = 0.0
    before = scores()
    for _ in range(15):
        trainer.update_generator(source, target)
    real, fake = scores()
    assert real - fake > before[0] - before[1] + 0.01
    for group in trainer.optimizers["discriminator"].param_groups:
        group["lr"] = 0.0
    for group in still:
        group["lr"] = 1e-3
    with torch.no_grad():
        distance = (discriminator(generator(source)) - 1).square().mean().item()
    trainer.update_generator(source, target)
    assert trainer.updates.terms["generator_adversarial"].item() == pytest.approx(distance, rel=1e-3)
    for _ in range(10):
        trainer.update_generator(source, target)
    assert trainer.updates.terms["generator_adversarial"].item() < distance


def test_cut_without_identity_leaves_the_targets_images_out(in_workspace):
    losses, _ = step(start(cut__identity_weight=0.0))
    assert set(losses) == TRANSLATION - {"identity"} | {"loss"}


@pytest.mark.parametrize(
    ("epochs", "share", "first"), [(10, 0.5, 5), (10, 0.3, 3), (2, 0.01, 1), (2, 0.99, 1), (5, 0.9, 4)]
)
def test_the_split_and_both_schedules(in_workspace, epochs, share, first):
    trainer = start(num_epochs=epochs, cut__translation_share=share)
    assert trainer.translation_epochs == first
    segmenter, generator = [], []
    for epoch in range(epochs):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        segmenter.append(trainer.optimizer.param_groups[0]["lr"])
        generator.append(trainer.optimizers["generator"].param_groups[0]["lr"])
    rest = epochs - first
    assert segmenter == pytest.approx([1e-3] * first + [1e-3 * (1 - e / rest) ** 0.9 for e in range(rest)])
    assert generator[:first] == pytest.approx([2e-4 * min(1, 2 * (1 - e / first)) for e in range(first)])


def test_cut_needs_two_epochs(in_workspace):
    with pytest.raises(UDAError, match="num_epochs is 1; expected at least 2"):
        make_trainer(NAME, num_epochs=1).initialize()


@pytest.mark.parametrize(
    ("setting", "value"), [("translation_share", 1.0), ("temperature", 0.1), ("identity_weight", -1)]
)
def test_bad_settings_are_refused_by_name(in_workspace, setting, value):
    with pytest.raises(UDAError, match=setting):
        make_trainer(NAME, **{f"cut__{setting}": value})


def test_three_dimensions_and_no_deep_supervision_train_too(in_workspace):
    check_three_dimensions(in_workspace, start, epochs=(0, 1))
