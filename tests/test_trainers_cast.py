"""CAST: who learns from what, who is averaged, when self-training starts, and what is never read."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path

import pytest
import torch
from conftest import batch, changed, make_trainer, parameters, same_weights, weights

from nnunet_uda.errors import UDAError
from nnunet_uda.losses.prototypes import IGNORED

TINY = {"cast__generator_width": 4, "cast__generator_blocks": 2, "cast__discriminator_width": 4, "cast__patches": 16,
        "criterion_patches": 2}  # fmt: skip
TERMS = {"loss", "patch_contrastive", "style_diversity", "semantic", "generator_adversarial", "segmentation",
         "self_training", "image_discriminator"}  # fmt: skip


def made(name: str = "CASTTrainer", **options):
    return make_trainer(name, **TINY | options)


def started(name: str = "CASTTrainer", **options):
    trainer = made(name, **options)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def trusting(trainer):
    """Let self-training run at full weight, on whatever the teacher says."""
    trainer.networks["self_training"].ramp.fill_(trainer.networks["self_training"].ramp_epochs)
    trainer.networks["self_training"].confidence = 0.0
    return trainer


def test_one_step_trains_everything_but_the_teacher_who_is_averaged(in_workspace):
    trainer = trusting(started(cast__student_updates=1))
    before = {name: parameters(network) for name, network in trainer.networks.items()}
    teacher = parameters(trainer.network)
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert set(losses) == TERMS and losses["self_training"] > 0
    for name in ("generator", "patch_projector", "image_discriminator"):
        assert changed(before[name], trainer.networks[name]) == set(before[name]), name
    student = trainer.networks["student"]
    lowest = {name for name in teacher if "seg_layers.0" in name}  # deep supervision gives it weight 0
    assert changed(before["student"], student) >= set(teacher) - lowest
    for name, value in trainer.network.named_parameters():
        torch.testing.assert_close(value, 0.1 * teacher[name] + 0.9 * dict(student.named_parameters())[name])
        assert not value.requires_grad and value.grad is None
    assert all(p.grad is None for p in trainer.networks.parameters()), "none outlives its optimiser's step"
    assert trainer.networks["average"].steps == 1
    assert not trainer.network.training and student.training


def test_updates_touch_their_own_networks_alone(in_workspace):
    trainer = trusting(started())
    source, label, target = batch(trainer)
    translated = trainer.translate(source).detach()
    steps = {
        ("generator", "patch_projector"): lambda: trainer.update_generator(source, label),
        ("student",): lambda: trainer.update_student(source, translated, label, target),
        ("image_discriminator",): lambda: trainer.update_discriminator(translated, target),
        ("teacher",): trainer.update_teacher,
    }
    networks = {**trainer.networks, "teacher": trainer.network}
    for touched, step in steps.items():
        before = {name: parameters(network) for name, network in networks.items()}
        step()
        for name, network in networks.items():
            assert bool(changed(before[name], network)) == (name in touched), (name, touched)


def test_the_generator_learns_to_keep_what_the_student_segments(in_workspace):
    """With nothing else to learn, the student's loss on translations falls, and the student stays as it is."""
    only = {"cast__patch_contrastive_weight": 0, "cast__style_diversity_weight": 0, "cast__image_adversarial_weight": 0}
    trainer = started(cast__gan_learning_rate=1e-2, **only)
    source, label, _ = batch(trainer)
    student = parameters(trainer.networks["student"])
    losses = []
    for _ in range(12):
        trainer.update_generator(source, label)
        losses.append(trainer._terms["semantic"].item())
    assert losses[-1] < losses[0] - 0.02
    assert not changed(student, trainer.networks["student"])
    assert all(p.requires_grad and p.grad is None for p in trainer.networks["student"].parameters())


def test_a_step_may_update_the_student_several_times_on_as_many_source_batches(in_workspace, monkeypatch):
    trainer = trusting(started(cast__student_updates=3))
    source, label, target = batch(trainer)
    seen, labelled = [], []
    update, pseudo_label = trainer.update_student, trainer.pseudo_label
    monkeypatch.setattr(trainer, "update_student", lambda *given: seen.append(given) or update(*given))
    monkeypatch.setattr(trainer, "pseudo_label", lambda images: labelled.append(images) or pseudo_label(images))
    trainer.train_on(source, label, target)
    assert trainer.networks["average"].steps == 3 and len(seen) == 3
    sources, translations, _, targets = zip(*seen, strict=True)
    assert sources[0] is source and not any(torch.equal(source, other) for other in sources[1:])
    assert all(torch.isfinite(t).all() and not torch.equal(s, t) for s, t in zip(sources, translations, strict=True))
    assert targets == (target, None, None) and len(labelled) == 1, "a target image is learned once a step"
    assert trainer._terms["self_training"] > 0


def test_styles_are_drawn_outside_of_mixed_precision(in_workspace):
    """Under autocast their products would be of mixed types; torch's own for the CPU shows it."""
    trainer = trusting(started(cast__pseudo_correlation_probability=1.0))
    trainer.autocast = functools.partial(torch.autocast, "cpu", torch.float16)
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert set(losses) == TERMS and losses["self_training"] > 0


def test_pseudo_labels_carry_no_gradient_and_come_from_the_teacher(in_workspace, monkeypatch):
    trainer = trusting(started())
    _, _, target = batch(trainer)
    asked = []
    original = trainer._predict
    monkeypatch.setattr(trainer, "_predict", lambda images: asked.append(images) or original(images))
    labels = trainer.pseudo_label(target)
    assert len(asked) == 2 and torch.equal(asked[0], target) and not torch.equal(asked[1], target)
    assert not labels.requires_grad and labels.shape == (2, 32, 32)
    with torch.no_grad():
        agreed = trainer.finest(trainer.network(target)).argmax(1)
    known = labels != IGNORED
    assert known.any() and torch.equal(labels[known], agreed[known])
    state = trainer.networks["self_training"]
    state.confidence, state.class_confidence[:] = 1.0, 1.0
    monkeypatch.setattr(state, "observe_target", lambda probabilities: None)
    assert (trainer.pseudo_label(target) == IGNORED).all()


def test_no_target_label_is_read(in_workspace, monkeypatch, tmp_path):
    """With full trust in the teacher, garbage in labelsTs and its absence change nothing."""
    shutil.copytree(in_workspace.raw, tmp_path / "raw")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    labels = tmp_path / "raw" / "Dataset501_Blobs" / "labelsTs"
    results = []
    for _ in range(2):
        trainer = trusting(started(num_epochs=1))
        for _ in range(2):
            losses = trainer.train_step(next(trainer.dataloader_train))
        assert losses["self_training"] > 0
        results.append(weights(trainer))
        for path in labels.iterdir() if labels.exists() else ():
            path.write_bytes(b"garbage")
    assert same_weights(*results)


def test_random_weights_do_not_start_self_training(in_workspace):
    """However well its own views agree, a network that is sure of nothing is no teacher."""
    trainer = started()
    state = trainer.networks["self_training"]
    for seed in range(5):
        torch.manual_seed(seed)
        for module in trainer.network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        state.observe_source(batch(trainer)[1][0])
        for _ in range(3):
            trainer.judge_teacher(1.0, 1.0)
    assert state.weight == 0 and trainer.self_training_weight == 0
    assert trainer.train_step(next(trainer.dataloader_train))["self_training"] == 0


def test_a_good_teacher_starts_it(in_workspace, monkeypatch):
    trainer = started(cast__start_score=0.7, cast__self_training_weight=1.0)
    state = trainer.networks["self_training"]
    state.observe_source(torch.tensor([0] * 8 + [1, 2]))
    good = torch.zeros(1, 3, 32, 32)
    good[:, 0], good[:, 1, :4, :20], good[:, 2, -4:, :20] = 5, 20, 20
    monkeypatch.setattr(trainer, "_predict", lambda images: good.expand(len(images), 3, 32, 32))
    weights_of_epochs = []
    for _ in range(4):
        trainer.judge_teacher(0.95, 1.0)
        weights_of_epochs.append(trainer.self_training_weight)
    assert weights_of_epochs == [0, 1, 1, 1]  # the mean is 0.475, then 0.71; a ramp of one epoch
    assert "weight of pseudo labels 1.00" in Path(trainer.log_file).read_text()
    for _ in range(4):
        trainer.judge_teacher(1.0, 0.5)
    assert trainer.self_training_weight == 0, "it agrees with itself, but has not learned its labels"


TRANSLATION = {"patch_contrastive", "style_diversity", "semantic", "generator_adversarial", "image_discriminator"}


def judged(trainer, epoch: int, agreements: list[float]):
    """The trainer after ``epoch`` epochs with this agreement on target patches."""
    trainer.current_epoch = epoch - 1
    trainer.model_choice.history = {"agreement": agreements}
    trainer.judge_translation()
    return trainer


def test_translation_is_given_up_where_the_teacher_disagrees_with_itself_on_the_target(in_workspace):
    trainer = judged(trusting(started(num_epochs=10, cast__updates_without_translation=4)), 3, [0.5, 0.6, 0.8])
    assert not trainer.translates
    assert "given up: on target images agreement is only 0.80 after 3 epochs" in Path(trainer.log_file).read_text()
    networks = ("generator", "patch_projector", "image_discriminator")
    before = {name: parameters(trainer.networks[name]) for name in networks}
    trainer.on_train_epoch_start()
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert TERMS - set(losses) == TRANSLATION and losses["self_training"] > 0
    assert not any(changed(before[name], trainer.networks[name]) for name in networks)
    assert trainer.networks["average"].steps == 4
    source, _, _ = batch(trainer)
    assert trainer.translate(source) is source, "validation is on the source as it is"


@pytest.mark.parametrize(
    ("epoch", "agreements"),
    [(2, [0.5, 0.5]), (10, [0.5] * 10), (3, [0.1, 0.1, 0.9]), (3, [0.9, 0.9, 0.8]),
     (3, [float("nan")] * 3)],
    ids=["before the end of the trial", "after the last epoch", "agreement is high now", "a single low epoch",
         "agreement is undefined"],
)  # fmt: skip
def test_translation_is_not_given_up(in_workspace, epoch, agreements):
    trainer = judged(started(num_epochs=10), epoch, agreements)
    assert trainer.translates and "given up" not in Path(trainer.log_file).read_text()
    assert set(trainer.train_step(next(trainer.dataloader_train))) == TERMS
    judged(trainer, 9, [0.5] * 9)
    assert not trainer.translates, "it may be at a later epoch"


@pytest.mark.parametrize("self_training", [True, False])
def test_a_training_without_translation_goes_on_to_its_end(in_workspace, self_training):
    """From the first epoch on: no agreement reaches 1. Target images are opened for self-training alone."""
    options = {"num_epochs": 2, "cast__trial_share": 0.0, "cast__trial_agreement": 1.0,
               "cast__self_training": self_training}  # fmt: skip
    trainer = made(**options)
    trainer.run_training()
    assert [len(trainer.loss_history[name]) for name in ("segmentation", "semantic")] == [2, 1]
    assert not trainer.translates and trainer.reads_target() == self_training
    assert not Path(trainer.output_folder, "validation", "about.json").exists()
    again = made(**options)
    again.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    assert not again.translates and same_weights(weights(trainer), weights(again))


def test_the_student_sees_translations_and_a_share_of_images_in_random_styles(in_workspace, monkeypatch):
    trainer = started(cast__styled_share=1.0)
    source, label, _ = batch(trainer)
    translated = trainer.translate(source).detach()
    before = source.clone(), translated.clone()
    images = trainer.labelled_images(source, translated, label[0])
    assert images.shape == (2, 1, 32, 32)
    for seen, *originals in zip(images, source, translated, strict=True):
        assert all(not torch.allclose(seen, original, atol=1e-2) for original in originals)
    assert torch.equal(source, before[0]) and torch.equal(translated, before[1])
    trainer.own_settings = dataclasses.replace(trainer.own_settings, styled_share=0.0)
    assert torch.equal(trainer.labelled_images(source, translated, label[0]), translated)

    trainer.own_settings = dataclasses.replace(trainer.own_settings, styled_share=0.25)
    names = type(trainer).labelled_images.__globals__  # nnU-Net does not register the modules that it finds
    monkeypatch.setitem(names, "restyle_batch", lambda styles, images, label: images + 100)
    zeros = torch.zeros(100, 1, 1, 1)
    seen = [trainer.labelled_images(zeros, zeros + 1, zeros) for _ in range(40)]
    values, counts = torch.cat(seen).unique(return_counts=True)  # of 4000; three deviations are 82 and 62
    assert values.tolist() == [1, 100, 101]
    assert ((counts - torch.tensor([3000, 500, 500])).abs() < torch.tensor([83, 63, 63])).all()


def test_the_discriminator_sees_translations_without_random_styles(in_workspace, monkeypatch):
    trainer = started(cast__styled_share=1.0)
    source, label, target = batch(trainer)
    seen = {}
    student, discriminator = trainer.update_student, trainer.update_discriminator
    monkeypatch.setattr(  # the last update's, where a step has several
        trainer, "update_student", lambda s, t, *rest: seen.update(before=t.clone()) or student(s, t, *rest)
    )
    monkeypatch.setattr(
        trainer, "update_discriminator", lambda t, x: seen.update(after=t.clone()) or discriminator(t, x)
    )
    trainer.train_on(source, label, target)
    assert torch.equal(seen["before"], seen["after"])


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("CASTNoTranslationTrainer", TRANSLATION),
        ("CASTNoSemanticTrainer", {"semantic"}),
        ("CASTNoStyleTrainer", {"style_diversity"}),
        ("CASTNoRandomStyleTrainer", set()),
        ("CASTNoSelfTrainingTrainer", {"self_training"}),
    ],
)  # fmt: skip
def test_ablations_leave_out_what_they_say(in_workspace, name, missing):
    trainer = started(name)
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert TERMS - set(losses) == missing
    source, label, _ = batch(trainer)
    assert trainer.translates == (name != "CASTNoTranslationTrainer")
    assert torch.equal(trainer.translate(source), source) == (not trainer.translates)
    if name == "CASTNoRandomStyleTrainer":
        assert torch.equal(trainer.labelled_images(source, source + 1, label[0]), source + 1)
    if name == "CASTNoTranslationTrainer":
        assert not torch.allclose(trainer.labelled_images(source, None, label[0]), source, atol=1e-2)
    if name == "CASTNoStyleTrainer":
        assert not trainer.draw_codes(3).any()


@pytest.mark.parametrize("translates", [True, False], ids=["translation goes on", "translation is given up"])
def test_continuing_ends_where_an_uninterrupted_run_ends(in_workspace, monkeypatch, translates):
    options = {"num_epochs": 3, "cast__start_score": 0.0, "cast__confidence": 0.0,  # self-training from the first epoch
               "cast__trial_agreement": 0.0 if translates else 1.0}  # fmt: skip
    whole = made(**options)
    whole.run_training()
    assert whole.loss_history["self_training"][-1] > 0
    shutil.rmtree(whole.output_folder)

    class Killed(Exception):
        pass

    stopped = made(**options)
    step, seen = stopped.train_step, []

    def some_steps(batch):
        seen.append(1)
        if len(seen) == 6:  # in the last epoch
            raise Killed
        return step(batch)

    monkeypatch.setattr(stopped, "train_step", some_steps)
    with pytest.raises(Killed):
        stopped.run_training()
    resumed = made(**options)
    resumed.load_checkpoint(str(Path(stopped.output_folder, "checkpoint_latest.pth")))
    assert resumed.self_training_weight > 0
    resumed.run_training()
    assert same_weights(weights(whole), weights(resumed))
    assert whole.translates == resumed.translates == translates
    for name in ("styles_epoch_0000.png", "epoch_0000.png") if translates else ("epoch_0000.png",):
        assert Path(resumed.output_folder, "pictures", name).read_bytes()[:4] == b"\x89PNG"


def test_pretrained_weights_reach_the_student(in_workspace):
    trainer = made()
    trainer.initialize()
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.add_(1.0)
    trainer.on_train_start()
    assert same_weights(trainer.plain_network.state_dict(), trainer.networks["student"].state_dict())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_optimiser_trains_the_student(in_workspace, optimizer):
    trainer = made(segmenter_optimizer=optimizer)
    trainer.initialize()
    owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in trainer.networks["student"].parameters()}
    assert type(trainer.optimizer).__name__.lower() == optimizer


def test_three_dimensions_train_too(in_workspace):
    in_workspace.configure("tiny3d", configuration="3d_fullres", options=("--overwrite",))
    trainer = trusting(started(plans="tiny3d", configuration="3d_fullres"))
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert set(losses) == TERMS and all(torch.isfinite(torch.tensor(list(losses.values()))))
    assert trainer.networks["average"].steps == trainer.own_settings.student_updates
    trainer.networks["trial"].failed.fill_(True)
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer.networks["average"].steps == trainer.own_settings.student_updates + 10, "as long as with translation"


def test_a_step_without_translation_has_six_updates_in_two_dimensions(in_workspace):
    trainer = started("CASTNoTranslationTrainer")
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer.networks["average"].steps == 6


def test_self_training_without_patches_to_judge_on_is_refused(in_workspace):
    with pytest.raises(UDAError, match="'criterion_patches' is 0"):
        made(criterion_patches=0).on_train_start()
    made("CASTNoSelfTrainingTrainer", criterion_patches=0).on_train_start()


def test_wrong_settings_are_named(in_workspace):
    with pytest.raises(UDAError, match="'teacher_decay' must be at least 0 and below 1, found 1"):
        made(cast__teacher_decay=1.0)
    with pytest.raises(UDAError, match="'trial_share' must be between 0 and 1, found 1.5"):
        made(cast__trial_share=1.5)
    with pytest.raises(UDAError, match="'updates_without_translation' must be null or at least 1, found 0"):
        made(cast__updates_without_translation=0)
    with pytest.raises(UDAError, match="CASTNoStyleTrainer fixes.*style_codes"):
        made("CASTNoStyleTrainer", cast__style_codes=True)
