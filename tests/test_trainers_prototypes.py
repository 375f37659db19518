"""What a step of the similarity-based prototypes does to which network, and the readings of the paper."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_trainer
from support.tiny import PROTOTYPES

from nnunet_uda.errors import UDAError
from nnunet_uda.losses.adversarial import lsgan_loss
from nnunet_uda.trainers.similarity_prototypes import Passes
from nnunet_uda.training.embedding_picture import load_embeddings, principal_plane


def started(name="SimilarityPrototypesTrainer", configuration="2d", **own):
    settings = {f"similarity_prototypes__{key}": value for key, value in {**PROTOTYPES, **own}.items()}
    trainer = make_trainer(name, configuration=configuration, **settings)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


@pytest.fixture
def trainer(in_workspace):
    return started(warmup_epochs=0, confidence=0.0)


def batch(trainer):
    source = next(trainer.dataloader_train)
    target = next(trainer.dataloader_target)["data"] if trainer.needs_target else None
    return source["data"], source["target"], target


def parameters(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def test_one_step_changes_every_network_and_leaves_none_frozen(trainer):
    before = {name: parameters(network) for name, network in trainer.networks.items()}
    network = parameters(trainer.network)
    trainer.train_step(next(trainer.dataloader_train))  # the image decoders' heads leave 0
    losses = trainer.train_step(next(trainer.dataloader_train))
    for name, module in trainer.networks.items():
        if "dictionary" in name:
            assert changed(before[name], module) == {"entries", "count", "position"}
        else:
            assert changed(before[name], module) == set(before[name]), name
    lowest = {name for name in network if "seg_layers.0" in name}  # deep supervision gives it weight 0
    assert changed(network, trainer.network) >= set(network) - lowest
    assert all(p.requires_grad for p in [*trainer.networks.parameters(), *trainer.network.parameters()])
    assert set(losses) == {
        "loss", "segmentation", "segmentation_translated", "cycle", "image_adversarial", "segmentation_adversarial",
        "similarity", "contrastive", "image_discriminators", "segmentation_discriminators",
    }  # fmt: skip


def test_updates_touch_their_own_networks_alone(trainer):
    source, label, target = batch(trainer)
    networks = {**trainer.networks, "network": trainer.network}

    def touched(step):
        before = {name: parameters(network) for name, network in networks.items()}
        result = step()
        return {name for name, network in networks.items() if changed(before[name], network)}, result

    names, passes = touched(lambda: trainer.update_generators(source, label, target))
    assert names == {"network", "source_dictionary", "target_dictionary"}
    names, _ = touched(lambda: trainer.update_image_discriminators(source, target, passes))
    assert names == {"source_image_discriminator", "target_image_discriminator"}
    names, _ = touched(lambda: trainer.update_segmentation_discriminators(passes))
    assert names == {"source_segmentation_discriminator", "target_segmentation_discriminator"}


def test_each_image_is_encoded_once_a_step(trainer, monkeypatch):
    counts = {"source": [], "target": []}
    for domain, seen in counts.items():
        encoder = getattr(trainer, f"{domain}_generator").encoder
        encoder.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0].detach().clone()))
    source, label, target = batch(trainer)
    trainer.train_on(source, label, target)
    assert len(counts["source"]) == len(counts["target"]) == 2
    torch.testing.assert_close(counts["source"][0], source)
    torch.testing.assert_close(counts["target"][0], target)


def test_the_generators_oppose_the_discriminators(trainer):
    """The generators' adversarial terms and the discriminators' losses pull the same maps apart."""
    source, _label, target = batch(trainer)
    share = ForegroundShare()
    for name in ("source", "target"):
        trainer.networks[f"{name}_segmentation_discriminator"] = share
        trainer.networks[f"{name}_image_discriminator"] = share
    passes = trainer.run_generators(source, target)
    ours = trainer.segmentation_adversarial_loss(passes)
    for output, labelled in ((passes.target, passes.source_to_target), (passes.target_to_source, passes.source)):
        fake, real = trainer.probabilities(output), trainer.probabilities(labelled)
        theirs = lsgan_loss(share(real), is_real=True) + lsgan_loss(share(fake), is_real=False)
        leaf = trainer.finest(output.segmentation)
        push, pull = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs))
        assert torch.cosine_similarity(push.flatten(), pull.flatten(), dim=0) < -0.99
        leaf = trainer.finest(labelled.segmentation)  # what was learned from labels is not moved
        assert torch.autograd.grad(ours, leaf, retain_graph=True, allow_unused=True)[0] is None
    image = trainer.image_adversarial_loss(passes)
    for output in (passes.source, passes.target):
        assert torch.autograd.grad(image, output.image, retain_graph=True)[0].abs().sum() > 0


class Mean(torch.nn.Module):
    """A discriminator of two numbers."""

    def __init__(self):
        super().__init__()
        self.slope, self.offset = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.full((), 0.5))

    def forward(self, maps):
        return self.slope * maps[:, -1].mean((1, 2)) + self.offset


def trained_discriminators(trainer, kind, update):
    """The slopes of both domains' ``Mean`` after an update: the scores rise with what is in its place positive."""
    for domain in ("source", "target"):
        trainer.networks[f"{domain}_{kind}_discriminator"] = Mean()
    found = trainer.discriminators(kind)
    trainer.optimizers[f"{kind}_discriminators"] = torch.optim.SGD([p for n in found for p in n.parameters()], 0.1)
    update()
    return [network.slope.item() for network in found]


def test_discriminators_take_images_of_their_domain_for_real(trainer):
    shape = (2, 1, 32, 32)
    bright, dark = torch.ones(shape), -torch.ones(shape)
    passes = trainer.run_generators(bright, bright)
    fake = Passes(*(output._replace(image=dark) for output in passes))

    def update():
        trainer.update_image_discriminators(bright, bright, fake)

    assert min(trained_discriminators(trainer, "image", update)) > 0
    mixed = Passes(*(output._replace(image=bright) for output in passes))
    slopes = trained_discriminators(trainer, "image", lambda: trainer.update_image_discriminators(bright, dark, mixed))
    by_domain = dict(
        zip([name for name in trainer.networks if name.endswith("image_discriminator")], slopes, strict=True)
    )
    assert by_domain["target_image_discriminator"] < 0, "bright translations are not dark target images"
    assert by_domain["source_image_discriminator"] == pytest.approx(0, abs=1e-6), "both are bright"


def test_discriminators_take_segmentations_learned_from_labels_for_real(trainer):
    passes = trainer.run_generators(*batch(trainer)[::2])
    full, empty = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    full[:, 2], empty[:, 0] = 9, 9
    learned, other = passes.source._replace(segmentation=full), passes.source._replace(segmentation=empty)
    both = Passes(source=learned, source_to_target=learned, target=other, target_to_source=other)
    slopes = trained_discriminators(trainer, "segmentation", lambda: trainer.update_segmentation_discriminators(both))
    assert min(slopes) > 0


def test_translations_are_to_look_real_to_the_other_domains_discriminator(trainer):
    passes = trainer.run_generators(*batch(trainer)[::2])
    for name in ("source", "target"):
        trainer.networks[f"{name}_image_discriminator"] = ForegroundShare()
    values = {"source": 0.7, "target": 0.2}  # a score of 1 is real
    images = {name: torch.full((2, 1, 8, 8), value) for name, value in values.items()}
    seen = passes._replace(**{name: getattr(passes, name)._replace(image=image) for name, image in images.items()})
    expected = (0.7 - 1) ** 2 + (0.2 - 1) ** 2
    assert trainer.image_adversarial_loss(seen).item() == pytest.approx(expected)
    trainer.networks["source_image_discriminator"] = torch.nn.Flatten(0)  # of x_{t->s}
    trainer.networks["target_image_discriminator"] = Constant()
    assert trainer.image_adversarial_loss(seen).item() == pytest.approx((0.2 - 1) ** 2)


class Constant(torch.nn.Module):
    def forward(self, maps):
        return torch.ones(1)


class ForegroundShare(torch.nn.Module):
    def forward(self, maps):
        return maps[:, 1:].sum(1).mean().reshape(1) if maps.shape[1] > 1 else maps.mean().reshape(1)


def test_both_heads_are_supervised_by_the_source(trainer):
    source, label, target = batch(trainer)
    passes = trainer.run_generators(source, target)
    heads = {name: getattr(trainer, f"{name}_generator").decoder.seg_layers[-1].weight for name in ("source", "target")}
    of_source = torch.autograd.grad(trainer.loss(passes.source.segmentation, label), heads.values(),
                                    retain_graph=True, allow_unused=True)  # fmt: skip
    of_translated = torch.autograd.grad(trainer.loss(passes.source_to_target.segmentation, label), heads.values(),
                                        retain_graph=True, allow_unused=True)  # fmt: skip
    assert of_source[0] is not None and of_source[1] is None
    assert of_translated[1] is not None and of_translated[0] is None


def test_the_labels_of_each_view(trainer):
    source, label, target = batch(trainer)
    passes = trainer.run_generators(source, target)
    views = trainer.find_prototypes(passes, label)
    assert [view.dictionary for view in views] == [
        "source_dictionary", "target_dictionary", "target_dictionary", "source_dictionary",
    ]  # fmt: skip
    known = label[0][:, 0, ::4, ::4]
    for view in views[:2]:
        torch.testing.assert_close((view.labels > 0).float().mean(), (known > 0).float().mean(), atol=0.1, rtol=0)
    for view, output in zip(views[2:], (passes.target, passes.target_to_source), strict=True):
        probabilities = trainer.probabilities(output)
        pooled = torch.nn.functional.avg_pool2d(probabilities, 4)
        assert torch.equal(view.labels, pooled.argmax(1))
        assert not view.labels.requires_grad


def test_pseudo_labels_wait_for_the_warm_up_and_for_confidence(in_workspace):
    trainer = started(warmup_epochs=3, confidence=1.0)
    passes = trainer.run_generators(*batch(trainer)[::2])
    label = batch(trainer)[1]
    assert len(trainer.find_prototypes(passes, label)) == 2
    trainer.current_epoch = 3
    views = trainer.find_prototypes(passes, label)
    assert len(views) == 4 and all((view.labels == -1).all() and not view.present.any() for view in views[2:])
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert np.isfinite(list(losses.values())).all()


def test_prototype_losses_reach_the_embeddings_alone_and_never_the_dictionaries(trainer):
    source, label, target = batch(trainer)
    trainer.update_generators(source, label, target)  # the dictionaries hold something now
    passes = trainer.run_generators(source, target)
    views = trainer.find_prototypes(passes, label)
    loss = trainer.similarity_loss(views) + trainer.contrastive_loss(views)
    heads = [trainer.target_generator.decoder.seg_layers[-1].weight, trainer.source_generator.projection[0].weight,
             trainer.target_generator.encoder.stages[0][0].convs[0].conv.weight]  # fmt: skip
    of_head, of_projection, of_encoder = torch.autograd.grad(loss, heads, allow_unused=True)
    assert of_head is None  # pseudo labels pass no gradient
    assert of_projection.abs().sum() > 0 and of_encoder.abs().sum() > 0
    assert not any(buffer.requires_grad for buffer in trainer.networks["source_dictionary"].buffers())


def test_every_loss_has_its_weight(trainer, monkeypatch):
    trainer.train_step(next(trainer.dataloader_train))  # the translation leaves the identity
    data, seen = batch(trainer), []
    monkeypatch.setattr(trainer, "update", lambda name, terms: seen.append(terms))
    trainer.networks["source_dictionary"].enqueue(torch.eye(3, 8), torch.arange(3))
    for dictionary in (trainer.networks[f"{domain}_dictionary"] for domain in ("source", "target")):
        monkeypatch.setattr(dictionary, "enqueue", lambda *_: None)
    factors = {"cycle": 3.0, "image_adversarial": 5.0, "segmentation_adversarial": 7.0, "similarity": 11.0,
               "contrastive": 13.0}  # fmt: skip
    ones = dataclasses.replace(trainer.own_settings, **{f"{name}_weight": 1.0 for name in factors})
    for changes in ({}, {f"{name}_weight": value for name, value in factors.items()}):
        trainer.own_settings = dataclasses.replace(ones, **changes)
        trainer.update_generators(*data)
    for name, factor in factors.items():
        assert seen[1][name].item() == pytest.approx(factor * seen[0][name].item(), rel=1e-3) != 0, name


def test_the_cycle_compares_an_image_with_its_translation_back(trainer):
    source, _, target = batch(trainer)
    passes = trainer.run_generators(source, target)
    back = passes._replace(
        source_to_target=passes.source_to_target._replace(image=source + 0.5),
        target_to_source=passes.target_to_source._replace(image=target - 0.25),
    )
    assert trainer.cycle_loss(source, target, back).item() == pytest.approx(0.75, rel=1e-4)


def test_dictionaries_are_filled_after_the_loss(trainer, monkeypatch):
    order = []
    update = trainer.update
    monkeypatch.setattr(trainer, "update", lambda name, *rest: (order.append(name), update(name, *rest)))
    for name in ("source", "target"):
        dictionary = trainer.networks[f"{name}_dictionary"]
        enqueue = dictionary.enqueue
        monkeypatch.setattr(
            dictionary, "enqueue", lambda *args, enqueue=enqueue: (order.append("enqueue"), enqueue(*args))
        )
    trainer.train_on(*batch(trainer))
    assert order == ["generators", *["enqueue"] * 4, "image_discriminators", "segmentation_discriminators"]
    assert trainer.networks["source_dictionary"].count.sum() > 0


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("PrototypesBaselineTrainer", {"similarity", "contrastive"}),
        ("PrototypesNoSimilarityTrainer", {"similarity"}),
        ("PrototypesNoContrastTrainer", {"contrastive"}),
    ],
)
def test_ablations_leave_their_terms_out(in_workspace, name, absent):
    trainer = started(name)
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert {"similarity", "contrastive"} - set(losses) == absent
    assert (trainer.networks["source_dictionary"].count.sum() > 0) == (name != "PrototypesBaselineTrainer")


@pytest.mark.draws
def test_training_without_target_images(in_workspace):
    trainer = started(target_images=False)
    assert trainer.dataloader_target is None
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert set(losses) == {"loss", "segmentation", "segmentation_translated", "cycle", "similarity", "contrastive"}
    source = torch.randn(1, 1, 32, 32)
    assert torch.equal(trainer.translate(source), source) and not trainer.translates
    assert all(dictionary.count.sum() > 0 for dictionary in trainer.networks.values())
    trainer.draw_pictures(Path(trainer.output_folder, "pictures", "x.png"))


def test_the_boundary_term_is_an_option(in_workspace):
    trainer = started(boundary_weight=0.5)
    assert trainer.train_step(next(trainer.dataloader_train))["boundary"] > 0


def test_three_dimensions(in_workspace):
    in_workspace.configure("tiny3d_prototypes", configuration="3d_fullres", options=("--overwrite",))
    settings = {f"similarity_prototypes__{key}": value for key, value in {**PROTOTYPES, "warmup_epochs": 0}.items()}
    trainer = make_trainer("SimilarityPrototypesTrainer", "tiny3d_prototypes", "3d_fullres", **settings)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert np.isfinite(list(losses.values())).all()


def test_a_checkpoint_with_other_dictionaries_is_refused(in_workspace, tmp_path):
    first = started()
    first.on_train_epoch_end([{"loss": 0.0, "cycle": 0.0}])
    first.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    second = make_trainer(
        "SimilarityPrototypesTrainer",
        **{f"similarity_prototypes__{key}": value for key, value in {**PROTOTYPES, "dictionary_size": 9}.items()},
    )
    second.initialize()
    with pytest.raises(UDAError, match="dictionary_size"):
        second.load_checkpoint(str(tmp_path / "checkpoint.pth"))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"top_k": 7}, "top_k"),
        ({"confidence": 1.5}, "confidence"),
        ({"dictionary_size": 0}, "dictionary_size"),
        ({"similarity_weight": -1}, "similarity_weight"),
    ],
)
def test_bad_settings_are_refused(in_workspace, own, message):
    with pytest.raises(UDAError, match=message):
        make_trainer(
            "SimilarityPrototypesTrainer",
            **{f"similarity_prototypes__{key}": value for key, value in {**PROTOTYPES, **own}.items()},
        )


def test_labels_without_any_foreground_are_refused(in_workspace, monkeypatch):
    trainer = make_trainer("SimilarityPrototypesTrainer")
    trainer.initialize()
    load_case = trainer.dataset_class.load_case

    def empty(self, identifier):
        *arrays, properties = load_case(self, identifier)
        return *arrays, copy.deepcopy(properties) | {"class_locations": {1: [], 2: []}}

    monkeypatch.setattr(trainer.dataset_class, "load_case", empty)
    with pytest.raises(UDAError, match="foreground"):
        trainer.on_train_start()


@pytest.mark.draws
def test_pictures_show_embeddings_before_and_now(trainer):
    trainer.draw_pictures(Path(trainer.output_folder, "pictures", "epoch_0000.png"))
    folder = Path(trainer.output_folder, "pictures")
    assert {path.name for path in folder.iterdir()} == {
        "epoch_0000.png", "embeddings_epoch_0000.png", "embeddings_before.npz",
    }  # fmt: skip
    kept = load_embeddings(folder / "embeddings_before.npz")
    assert list(kept) == ["source", "target"]
    now = trainer.sample_embeddings()
    for name, item in kept.items():
        np.testing.assert_allclose(item.vectors, now[name].vectors, rtol=1e-5)
    assert len(set(kept["source"].classes)) == 3  # the slice with most label


def test_the_principal_plane_keeps_distances_within_a_plane():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(20, 2)) @ np.linalg.qr(rng.normal(size=(6, 2)))[0].T + 3
    placed = principal_plane(flat)
    expected = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(placed[:, None] - placed[None], axis=-1), expected, atol=1e-9)
