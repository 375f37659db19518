"""What CISFA's updates do to which network, and the readings of the paper."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import batch, changed, make_trainer, parameters
from support.trainers import started

from nnunet_uda.losses.adversarial import lsgan_loss
from nnunet_uda.training.streams import target_scans


@pytest.fixture
def trainer(in_workspace):
    return started("CISFATrainer")


def test_one_step_changes_every_network_and_leaves_none_frozen(trainer):
    before = {name: parameters(network) for name, network in trainer.networks.items()}
    segmenter = parameters(trainer.network)
    losses = trainer.train_step(next(trainer.dataloader_train))
    for name, network in trainer.networks.items():
        assert changed(before[name], network) == set(before[name]), name
        assert all(p.requires_grad for p in network.parameters())
    lowest = {name for name in segmenter if "seg_layers.0" in name}  # deep supervision gives it weight 0
    assert changed(segmenter, trainer.network) >= set(segmenter) - lowest
    assert set(losses) == {
        "loss", "patch_contrastive", "generator_adversarial", "segmentation", "global_contrastive",
        "segmenter_adversarial", "image_discriminator", "segmentation_discriminator",
    }  # fmt: skip


def test_updates_touch_their_own_networks_alone(trainer):
    source, label, target = batch(trainer)
    with torch.no_grad():
        translated = trainer.translate(source)
    steps = {
        ("generator", "patch_projector"): lambda: trainer.update_generator(source, label[0], target),
        ("projection_head", "segmenter"): lambda: trainer.update_segmenter(source, translated, label, target),
        ("image_discriminator", "segmentation_discriminator"): lambda: trainer.update_discriminators(
            translated, target
        ),
    }
    networks = {**trainer.networks, "segmenter": trainer.network}
    for touched, step in steps.items():
        before = {name: parameters(network) for name, network in networks.items()}
        step()
        for name, network in networks.items():
            assert bool(changed(before[name], network)) == (name in touched), (name, touched)


def gradients_of(trainer, monkeypatch, update):
    """The gradients that an update has before they are clipped, by the parameter's place in its optimiser."""
    seen = []

    def keep(optimizer):
        seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None])

    monkeypatch.setattr(trainer.ranks, "share_gradients", keep)
    update()
    return seen[0]


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_the_segmenters_gradient_is_that_of_all_its_terms_at_once(in_workspace, monkeypatch, weight):
    trainer = started("CISFATrainer", cisfa__segmenter_adversarial_weight=weight, cisfa__global_contrastive_weight=3.0)
    source, label, target = batch(trainer)
    with torch.no_grad():
        translated = trainer.translate(source)
    head, parameters = trainer.networks["projection_head"], trainer.optimizers["segmenter"].param_groups
    outputs = trainer.segment(translated)
    encoded = [head(trainer.encoder(images)[-1]) for images in (source, translated)]
    judged = trainer.segmenter_adversarial_loss(outputs, target)
    loss = trainer.loss(outputs, label) + 3 * trainer.global_contrastive(*encoded) + weight * judged
    wanted = torch.autograd.grad(loss, [p for group in parameters for p in group["params"]], allow_unused=True)

    found = gradients_of(
        trainer, monkeypatch, lambda: trainer.update_segmenter(source, translated, label, target)
    )  # fmt: skip
    for ours, theirs in zip(found, [one for one in wanted if one is not None], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("identity", [0.0, 1.0])
def test_large_images_go_through_the_generators_update_in_parts_of_the_same_gradient(
    in_workspace, monkeypatch, identity
):
    trainer = started("CISFATrainer", cisfa__patches=10**6, cisfa__identity_weight=identity)  # every position is drawn
    source, label, target = (torch.cat([each, each.flip(2)])[:3] for each in map(trainer.finest, batch(trainer)))
    module = type(trainer).parts.__globals__  # nnU-Net imports a trainer under a name of its own
    image = 4 * trainer.own_settings.generator_width * source[0, 0].numel()
    found, terms = {}, {}
    for images in (3, 2, 1, 0.5):
        monkeypatch.setitem(module, "LARGEST_MAP", int(images * image))
        parts = [len(source[part]) for part in trainer.parts(source)]
        assert parts == {3: [3], 2: [2, 1], 1: [1, 1, 1], 0.5: [1, 1, 1]}[images]
        again = copy.deepcopy(trainer.networks), copy.deepcopy(trainer.optimizers["generator"].state_dict())
        found[images] = gradients_of(
            trainer, monkeypatch, lambda: trainer.update_generator(source, label, target)
        )  # fmt: skip
        terms[images] = {name: value.item() for name, value in trainer.updates.terms.items()}
        trainer.networks.load_state_dict(again[0].state_dict())
        trainer.optimizers["generator"].load_state_dict(again[1])
    for images in (2, 1):
        assert terms[images] == pytest.approx(terms[3], rel=1e-4)
        for ours, theirs in zip(found[images], found[3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def scores(discriminator, *images):
    with torch.no_grad():
        return [discriminator(each).mean().item() for each in images]


def test_the_image_discriminator_learns_to_tell_target_images_from_translations(trainer):
    source, _, target = batch(trainer)
    with torch.no_grad():
        translated = trainer.translate(source)
    network = trainer.networks["image_discriminator"]
    for _ in range(5):
        trainer.update_discriminators(translated, target)
    real, fake = scores(network, target, translated)
    for _ in range(10):
        trainer.update_discriminators(translated, target)
    later, fake_later = scores(network, target, translated)
    assert later - fake_later > real - fake + 0.01, "1 is real"


def test_the_segmentation_discriminator_takes_target_images_for_real(trainer, monkeypatch):
    source, _, target = batch(trainer)
    maps = {True: torch.zeros(2, 3, 32, 32), False: torch.zeros(2, 3, 32, 32)}
    maps[True][:, 1], maps[False][:, 2] = 5, 5  # logits, far apart
    monkeypatch.setattr(trainer, "segment", lambda images: maps[images is target])
    network, images = trainer.networks["segmentation_discriminator"], [maps[kind].softmax(1) for kind in (True, False)]
    real, fake = scores(network, *images)
    for _ in range(10):
        trainer.update_discriminators(source, target)
    later, fake_later = scores(network, *images)
    assert later - fake_later > real - fake + 0.01, "1 is real"


def test_the_generator_makes_translations_that_the_discriminator_takes_for_real(in_workspace):
    trainer = started("CISFATrainer", cisfa__patch_contrastive_weight=0.0)
    source, label, target = batch(trainer)
    network = trainer.networks["image_discriminator"]
    before = trainer.generator_terms(source, label[0], target)["generator_adversarial"].item()
    with torch.no_grad():
        distance = (network(trainer.translate(source)) - 1).square().mean().item()
    assert before == pytest.approx(distance, rel=1e-4), "as far as the discriminator is from saying real"
    for _ in range(10):
        trainer.update_generator(source, label[0], target)
    with torch.no_grad():
        assert (network(trainer.translate(source)) - 1).square().mean().item() < distance


@pytest.mark.parametrize("kind", ["translated", "target", "both"])
def test_the_segmenter_opposes_its_discriminator(in_workspace, monkeypatch, kind):
    trainer = started("CISFATrainer", cisfa__segmenter_adversarial=kind)
    maps = ForegroundShare()  # logits between 0 and 1, where a least-squares loss has a clear direction
    trainer.networks["segmentation_discriminator"] = maps
    of_translated, of_target = (torch.randn(2, 3, 8, 8, requires_grad=True) for _ in range(2))
    monkeypatch.setattr(trainer, "segment", lambda images: of_target)

    segmenter = trainer.segmenter_adversarial_loss(of_translated, torch.zeros(2, 1, 8, 8))
    real, fake = (maps(trainer.segmentation_maps(outputs)) for outputs in (of_target, of_translated))
    discriminator = lsgan_loss(real, is_real=True) + lsgan_loss(fake, is_real=False)
    for outputs, opposed in ((of_translated, kind != "target"), (of_target, kind != "translated")):
        ours = torch.autograd.grad(segmenter, outputs, retain_graph=True, allow_unused=True)[0]
        theirs = torch.autograd.grad(discriminator, outputs, retain_graph=True)[0]
        assert (ours is not None) == opposed
        if opposed:
            assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) < -0.99


class ForegroundShare(torch.nn.Module):
    def forward(self, probabilities):
        return probabilities[:, 1:].sum(1).mean().reshape(1)


def test_pairs_of_the_global_loss_are_a_slice_and_its_own_translation(trainer, monkeypatch):
    source, label, target = batch(trainer)
    seen = {}

    def spy(z_source, z_translated):
        seen["source"], seen["translated"] = z_source, z_translated
        return z_source.sum() * 0

    monkeypatch.setattr(trainer, "global_contrastive", spy)
    with torch.no_grad():
        translated = trainer.translate(source)
    network, head = copy.deepcopy(trainer.network), copy.deepcopy(trainer.networks["projection_head"])
    trainer.update_segmenter(source, translated, label, target)
    for index in range(len(source)):
        alone = head(network.encoder(source[index : index + 1])[-1])
        own = head(network.encoder(trainer.translate(source[index : index + 1]))[-1])
        torch.testing.assert_close(seen["source"][index : index + 1], alone, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(seen["translated"][index : index + 1], own, atol=1e-4, rtol=1e-3)


def test_the_segmenter_learns_from_translations_of_the_new_generator(trainer, monkeypatch):
    source, label, target = batch(trainer)
    seen = {}
    original = trainer.update_segmenter

    def spy(source, translated, label, target):
        seen["translated"] = translated.clone()
        seen["now"] = trainer.translate(source).detach()
        original(source, translated, label, target)

    monkeypatch.setattr(trainer, "update_segmenter", spy)
    old = trainer.translate(source).detach()
    trainer.train_on(source, label, target)
    torch.testing.assert_close(seen["translated"], seen["now"])
    assert not torch.allclose(seen["translated"], old)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("CISFANoPCLTrainer", {"patch_contrastive"}),
        ("CISFANoGCLTrainer", {"global_contrastive"}),
        ("CISFANoPCLNoGCLTrainer", {"patch_contrastive", "global_contrastive"}),
        ("CISFANoWeightTrainer", set()),
        ("CISFASequentialGCLTrainer", set()),
    ],
)
def test_variants_leave_out_what_they_say(in_workspace, name, missing):
    trainer = started(name)
    losses = trainer.train_step(next(trainer.dataloader_train))
    terms = {"patch_contrastive", "global_contrastive", "segmentation", "segmenter_adversarial"}
    assert terms - set(losses) == missing
    assert trainer.own_settings.foreground_weight == (1.0 if name == "CISFANoWeightTrainer" else 2.0)


def test_sequential_updates_the_encoder_before_the_other_losses(in_workspace, monkeypatch):
    trainer = started("CISFASequentialGCLTrainer")
    order = []
    original = trainer.updating

    @contextmanager
    def spy(name, max_norm=None):
        order.append((name, terms := set()))
        with original(name, max_norm) as add:
            yield lambda part: (terms.update(part), add(part))

    monkeypatch.setattr(trainer, "updating", spy)
    trainer.train_step(next(trainer.dataloader_train))
    assert [step for step in order if step[0] == "segmenter"] == [
        ("segmenter", {"global_contrastive"}),
        ("segmenter", {"segmentation", "segmenter_adversarial"}),
    ]
    assert [name for name, _ in order] == [
        "generator", "segmenter", "segmenter", "image_discriminator", "segmentation_discriminator",
    ]  # fmt: skip


def test_sequential_updates_pass_the_gradient_scaler(in_workspace):
    """CUDA's mixed precision scales gradients; torch's scaler for the CPU keeps the same books."""
    trainer = started("CISFASequentialGCLTrainer")
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    before = parameters(trainer.plain_network.encoder)
    trainer.train_step(next(trainer.dataloader_train))
    assert changed(before, trainer.plain_network.encoder) == set(before)


def test_validation_sees_translated_source_images(trainer, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer.networks["generator"], "forward", lambda x: seen.append(x) or x)
    with torch.no_grad():
        trainer.validation_step(next(trainer.dataloader_val))
    assert len(seen) == 1


def test_three_dimensions_and_the_papers_protocol_train_too(in_workspace):
    in_workspace.configure("tiny3d", configuration="3d_fullres", options=("--overwrite",))
    trainer = started("CISFATrainer", plans="tiny3d", configuration="3d_fullres")
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert all(map(torch.isfinite, map(torch.as_tensor, losses.values())))
    generator = trainer.networks["generator"]
    assert generator(torch.zeros(1, 1, 8, 32, 32)).shape == (1, 1, 8, 32, 32)

    paper = started(
        "CISFATrainer", segmenter_optimizer="adam", segmenter_learning_rate=2e-4, segmenter_schedule="constant",
        segmentation_loss="dice", deep_supervision=False, augmentation="none", mirror=False,
    )  # fmt: skip
    losses = paper.train_step(next(paper.dataloader_train))
    assert 0 <= losses["segmentation"] <= 1
    assert paper.optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    assert paper.optimizer.param_groups[0]["lr"] == 2e-4


def test_the_trainer_warns_of_a_channel_called_ct(in_workspace):
    trainer = make_trainer("CISFATrainer")
    trainer.dataset_json["channel_names"] = {"0": "CT"}
    target_scans(trainer).unlabelled()
    assert "WARNING: channel 0 is called CT" in Path(trainer.log_file).read_text()
