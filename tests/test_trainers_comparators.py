"""CUT, direct and adversarial entropy minimisation: what each update changes, the schedule's parts, and going on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import batch, changed, make_trainer, parameters

from nnunet_uda.errors import UDAError
from nnunet_uda.losses.entropy import domain_cross_entropy, entropy_loss, weighted_self_information

SMALL = {
    "CUTTrainer": {
        "cut__generator_width": 4, "cut__generator_blocks": 2, "cut__discriminator_width": 4, "cut__patches": 16,
    },
    "EntMinTrainer": {},
    "ADVENTTrainer": {"advent__discriminator_width": 4},
}  # fmt: skip
TERMS = {
    "EntMinTrainer": {"segmentation", "entropy"},
    "ADVENTTrainer": {"segmentation", "segmenter_adversarial", "discriminator"},
}
TRANSLATION = {"generator_adversarial", "patch_contrastive", "identity", "discriminator"}


def started(name, epoch=0, **options):
    trainer = make_trainer(name, **SMALL[name] | options)
    trainer.on_train_start()
    trainer.current_epoch = epoch
    trainer.on_train_epoch_start()
    return trainer


def all_networks(trainer):
    return {**trainer.networks, "segmenter": trainer.network}


def step(trainer):
    """One training step: the losses, and the names of the networks that it changed."""
    before = {name: parameters(network) for name, network in all_networks(trainer).items()}
    losses = trainer.train_step(next(trainer.dataloader_train))
    touched = {name for name, network in all_networks(trainer).items() if changed(before[name], network)}
    assert all(p.requires_grad for network in all_networks(trainer).values() for p in network.parameters())
    return losses, touched


# -- entropy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
def test_one_step_changes_every_network(in_workspace, name):
    losses, touched = step(trainer := started(name))
    assert touched == set(all_networks(trainer)) and set(losses) == TERMS[name] | {"loss"}


def test_entropy_counts_target_predictions_with_the_papers_weight(in_workspace):
    trainer = started("EntMinTrainer")
    source, label, target = batch(trainer)
    with torch.no_grad():
        of_source, of_target = trainer.segment(source), trainer.segment(target)
        expected = {"segmentation": trainer.loss(of_source, label), "entropy": 0.001 * entropy_loss(of_target[0])}
    trainer.train_on(source, label, target)
    for name, value in expected.items():
        torch.testing.assert_close(trainer.updates.terms[name], value, atol=1e-6, rtol=1e-4)


def test_entropy_falls_where_it_weighs_much(in_workspace):
    trainer = started("EntMinTrainer", entropy_minimisation__entropy_weight=100.0, segmenter_learning_rate=0.01)
    source, label, target = batch(trainer)

    def entropy():
        with torch.no_grad():
            return entropy_loss(trainer.finest(trainer.segment(target))).item()

    before = entropy()
    for _ in range(10):
        trainer.train_on(source, label, target)
    assert entropy() < 0.8 * before


def test_advent_trains_its_networks_on_maps_of_one_pass(in_workspace, monkeypatch):
    trainer = started("ADVENTTrainer")
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
    trainer = started("ADVENTTrainer", advent__adversarial_weight=1000.0, segmenter_learning_rate=0.01)
    trainer.networks["discriminator"] = MeanInformation()
    trainer.optimizers["discriminator"] = torch.optim.SGD(trainer.networks["discriminator"].parameters(), 0.0)
    source, label, target = batch(trainer)

    def entropy():
        with torch.no_grad():
            return entropy_loss(trainer.finest(trainer.segment(target))).item()

    before = entropy()
    for _ in range(10):
        trainer.train_on(source, label, target)
    assert entropy() < 0.8 * before  # certain is what this discriminator takes for the source


def test_the_discriminators_rate_falls_as_the_segmenters(in_workspace):
    trainer = started("ADVENTTrainer", num_epochs=4)
    rates = []
    for epoch in range(4):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        rates.append(trainer.optimizers["discriminator"].param_groups[0]["lr"])
    assert rates == pytest.approx([1e-4 * (1 - epoch / 4) ** 0.9 for epoch in range(4)])


# -- CUT -------------------------------------------------------------------------------------------------------------


def test_cut_trains_the_generator_first_and_the_segmenter_then(in_workspace):
    trainer = started("CUTTrainer", num_epochs=4)
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
    trainer = started("CUTTrainer", epoch)
    generator, seen, drawn = trainer.networks["generator"], [], []
    forward = generator.forward_with_features
    monkeypatch.setattr(generator, "forward_with_features", lambda x: seen.append(len(x)) or forward(x))
    loader = trainer.dataloader_target
    trainer.dataloader_target = iter(lambda: drawn.append(1) or next(loader), None)
    trainer.train_step(next(trainer.dataloader_train))
    assert len(seen) == passes and len(drawn) == target_batches
    assert sum(seen) == (4 if epoch == 0 else 2)  # with the identity the target's images pass too


def test_cut_learns_from_translations_without_a_gradient_to_the_generator(in_workspace, monkeypatch):
    trainer = started("CUTTrainer", epoch=1)
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
    trainer = started("CUTTrainer")
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
    trainer = started("CUTTrainer", cut__patch_contrastive_weight=0.0, cut__identity_weight=0.0)
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
    losses, _ = step(started("CUTTrainer", cut__identity_weight=0.0))
    assert set(losses) == TRANSLATION - {"identity"} | {"loss"}


@pytest.mark.parametrize(
    ("epochs", "share", "first"), [(10, 0.5, 5), (10, 0.3, 3), (2, 0.01, 1), (2, 0.99, 1), (5, 0.9, 4)]
)
def test_the_split_and_both_schedules(in_workspace, epochs, share, first):
    trainer = started("CUTTrainer", num_epochs=epochs, cut__translation_share=share)
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


def test_cut_needs_two_epochs_and_names_bad_settings(in_workspace):
    with pytest.raises(UDAError, match="num_epochs is 1; expected at least 2"):
        make_trainer("CUTTrainer", num_epochs=1).initialize()
    for name, options in (
        ("CUTTrainer", {"cut__translation_share": 1.0}),
        ("CUTTrainer", {"cut__temperature": 0.1}),
        ("CUTTrainer", {"cut__identity_weight": -1}),
        ("EntMinTrainer", {"entropy_minimisation__entropy_weight": -1}),
        ("ADVENTTrainer", {"advent__adversarial_weight": -1}),
        ("ADVENTTrainer", {"advent__discriminator_width": 0}),
    ):
        with pytest.raises(UDAError, match=next(iter(options)).split("__")[1]):
            make_trainer(name, **options)


# -- all three -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_three_dimensions_and_no_deep_supervision_train_too(in_workspace, name):
    in_workspace.configure("tiny3d", configuration="3d_fullres", options=("--overwrite",))
    for epoch in (0, 1) if name == "CUTTrainer" else (0,):
        trainer = started(name, epoch, plans="tiny3d", configuration="3d_fullres")
        losses, touched = step(trainer)
        assert touched and all(math.isfinite(value) for value in losses.values())
        trainer = started(name, epoch, deep_supervision=False)
        assert all(math.isfinite(value) for value in step(trainer)[0].values())
