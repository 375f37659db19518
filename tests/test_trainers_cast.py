"""CAST: who learns from what, who is averaged, when self-training starts, and what is never read."""

from __future__ import annotations

import functools
import itertools
import shutil

import pytest
import torch
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from conftest import batch, changed, make_trainer, parameters, same_weights, weights

from nnunet_uda.errors import UDAError
from nnunet_uda.losses.prototypes import IGNORED
from nnunet_uda.trainers.cast import every_other
from nnunet_uda.training.intensity_posterior import IntensityPosterior
from nnunet_uda.training.streams import target_batch_size
from nnunet_uda.training.uda_trainer import UDATrainer

TERMS = {"loss", "segmentation", "self_training"}
TEACHING = {"cast__start_share": 0.0, "cast__confidence": 0.0, "cast__target_style_probability": 1.0}
"""Self-training from the first epoch, on whatever the teacher says, every target image restyled."""


def made(name: str = "CASTTrainer", **options):
    return make_trainer(name, **{"criterion_patches": 2} | options)


def started(name: str = "CASTTrainer", **options):
    trainer = made(name, **options)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def test_one_step_trains_the_student_and_averages_the_teacher(in_workspace):
    trainer = started(**TEACHING)
    teacher, student = parameters(trainer.network), trainer.networks["student"]
    before = parameters(student)
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert set(losses) == TERMS and losses["self_training"] > 0
    lowest = {name for name in teacher if "seg_layers.0" in name}  # deep supervision gives it weight 0
    assert changed(before, student) >= set(teacher) - lowest
    for name, value in trainer.network.named_parameters():
        torch.testing.assert_close(value, 0.1 * teacher[name] + 0.9 * dict(student.named_parameters())[name])
        assert not value.requires_grad and value.grad is None
    assert all(p.grad is None for p in student.parameters()), "none outlives its optimiser's step"
    assert trainer.networks["average"].steps == 1
    assert not trainer.network.training and student.training


def test_the_gradient_is_that_of_both_terms(in_workspace, monkeypatch):
    """Adding the terms one after the other saves memory and changes nothing."""
    trainer = started(**TEACHING)
    source, label, target = batch(trainer)
    gradients = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: gradients.append(
        [p.grad.clone() for p in trainer.networks["student"].parameters() if p.grad is not None]))  # fmt: skip
    trainer.train_on(source, label, target)
    source, label = every_other(source), [every_other(scale) for scale in label]
    plain, styled, *views = target.split(1, dim=1)
    trainer.networks["self_training"].class_confidence.fill_(1)
    trainer.networks["intensities"].domain.zero_()
    student = trainer.networks["student"]
    pseudo = trainer.pseudo_label(plain, *views)
    from nnunet_uda.losses.pseudo_label import pseudo_label_loss

    loss = trainer.loss(student(source), label)
    loss = loss + trainer.self_training_weight * pseudo_label_loss(student(styled)[0], pseudo)
    student.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 12)
    expected = [p.grad for p in student.parameters() if p.grad is not None]
    assert len(expected) == len(gradients[0])
    for found, wanted in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


def test_the_teacher_sees_target_images_plain_and_restyled_and_the_student_its_own_view(in_workspace, monkeypatch):
    trainer = started(**TEACHING)
    source, label, target = batch(trainer)
    assert source.shape[:2] == (2, 1) and target.shape[:2] == (1, 4)  # plain, the student's, two for the teacher
    plain, styled, *views = target.split(1, dim=1)
    for one, other in itertools.combinations((plain, styled, *views), 2):
        assert not torch.equal(one, other)
    contrasts = trainer.networks["contrasts"]
    assert contrasts.searched
    contrasts.number.fill_(1)  # one contrast was found
    (found,) = contrasts(plain)
    asked, studied = [], []
    predict, study = trainer._predict, trainer.study
    monkeypatch.setattr(trainer, "_predict", lambda images: asked.append(images) or predict(images))
    monkeypatch.setattr(trainer, "study", lambda images: studied.append(images) or study(images))
    trainer.train_on(source, label, target)
    assert len(asked) == 4 and all(map(torch.equal, asked, (plain, found, *views)))
    assert len(studied) == 2 and torch.equal(studied[0], source[1:]) and torch.equal(studied[1], styled)


def test_the_teachers_opinion_is_the_mean_over_its_views(in_workspace, monkeypatch):
    trainer = made(cast__intensity_labels=False, **TEACHING)
    trainer.initialize()
    logits = {1.0: [8.0, 0.0, 0.0], 2.0: [0.0, 8.0, 0.0], 3.0: [0.0, 8.0, 0.0]}
    monkeypatch.setattr(
        trainer,
        "_predict",
        lambda images: torch.tensor(logits[images.max().item()]).view(1, 3, 1, 1).expand(1, 3, 4, 4),
    )
    views = [torch.full((1, 1, 4, 4), value) for value in logits]
    expected = torch.stack([torch.tensor(each).softmax(0) for each in logits.values()]).mean(0)
    torch.testing.assert_close(trainer.opinion(*views), expected.view(1, 3, 1, 1).expand(1, 3, 4, 4))


def test_contrasts_are_searched_when_self_training_begins_and_let_go_later(in_workspace, monkeypatch):
    trainer = made(num_epochs=10, cast__start_share=0.5)
    trainer.on_train_start()
    contrasts, found = trainer.networks["contrasts"], []
    for trainer.current_epoch in range(4, 8):
        trainer.on_train_epoch_start()
        found.append(int(contrasts.number))
        if trainer.current_epoch == 6:  # from here on the teacher is as sure of any image
            monkeypatch.setattr(trainer, "_predict", lambda images: torch.zeros(1, 3, 2, 2))
    assert found[0] == -1 and found[1] >= found[2] > 0 and found[3] == 0


def test_an_epoch_that_goes_on_after_a_stop_chooses_no_contrasts_again(in_workspace, monkeypatch):
    """What a stop interrupts goes on as if it had not been stopped."""
    trainer = started(**TEACHING)
    monkeypatch.setattr(trainer, "choose_contrasts", lambda: pytest.fail("chosen again"))
    trainer.train_step(next(trainer.dataloader_train))
    trainer.on_train_epoch_start()


@pytest.mark.parametrize("name, options", [
    ("CASTTrainer", {"cast__teacher_views": 0} | TEACHING), ("CASTNoSelfTrainingTrainer", {}),
])  # fmt: skip
def test_without_views_no_contrast_is_searched(in_workspace, name, options):
    trainer = started(name, **options)
    trainer.train_step(next(trainer.dataloader_train))
    contrasts = trainer.networks["contrasts"]
    assert not contrasts.searched and contrasts(torch.ones(1, 1, 8, 8)) == []


def test_a_step_takes_half_a_batch_of_each_domain_its_last_patch_included(in_workspace):
    batch = torch.arange(5.0)[:, None]
    assert every_other(batch).flatten().tolist() == [0, 2, 4]
    assert every_other(batch[:4]).flatten().tolist() == [1, 3]
    assert len(every_other(batch[:1])) == 1
    trainer = started(num_epochs=10)  # before self-training
    studied, study = [], trainer.study
    trainer.study = lambda images: studied.append(len(images)) or study(images)
    trainer.train_step(next(trainer.dataloader_train))
    assert studied == [trainer.batch_size]
    for size, half in ((1, 1), (4, 2), (5, 3)):
        trainer.batch_size = size
        assert target_batch_size(trainer) == half


def test_what_it_trusts_is_remembered_as_the_intensities_of_the_domain(in_workspace):
    trainer = started(**TEACHING)
    intensities = trainer.networks["intensities"]
    volume = trainer.target_dataset.load_case(trainer.target_dataset.identifiers[0])[0][:]
    assert intensities.has_range and volume.min() <= intensities.low < intensities.high <= volume.max()
    target = batch(trainer)[2][:, :1]
    labels = trainer.pseudo_label(target)
    expected = IntensityPosterior(3, 1)
    expected.low, expected.high = intensities.low, intensities.high
    expected.observe(labels, target)
    assert intensities.domain.sum() > 0 and torch.equal(intensities.domain, expected.domain)


def test_the_plain_view_has_the_intensities_of_the_scan(in_workspace):
    """Neither noise nor blur nor gamma: values are those of the scan, moved by the spatial transform alone."""
    trainer = made(augmentation="nnunet", seed=1, cast__target_style_probability=1.0, cast__teacher_views=1)
    trainer.initialize()
    pipeline = trainer.get_target_transforms(
        trainer.configuration_manager.patch_size, (0, 0), None, None, False, use_mask_for_norm=[False]
    )
    spatial = pipeline.transforms[0]
    spatial.p_rotation = spatial.p_scaling = spatial.p_elastic_deform = 0
    image = torch.randn(1, *trainer.configuration_manager.patch_size)
    segmentation = torch.zeros_like(image, dtype=torch.int16)
    for _ in range(5):
        views = pipeline(image=image.clone(), segmentation=segmentation.clone())["image"]
        torch.testing.assert_close(views[0], image[0])
        assert not torch.allclose(views[1], image[0], atol=0.05)


def test_outside_of_the_mask_both_views_are_zero(in_workspace):
    """Scans that are normalised within a mask are 0 outside of it at prediction."""
    trainer = made(augmentation="nnunet")
    trainer.initialize()
    for make in (trainer.get_target_transforms, trainer.get_training_transforms):
        pipeline = make(
            trainer.configuration_manager.patch_size, (0, 0), None, None, False, use_mask_for_norm=[True],
        )  # fmt: skip
        assert any(isinstance(step, MaskImageTransform) for step in pipeline.transforms)
        spatial = pipeline.transforms[0]
        spatial.p_rotation = spatial.p_scaling = spatial.p_elastic_deform = 0
        image = torch.randn(1, *trainer.configuration_manager.patch_size)
        segmentation = torch.zeros_like(image, dtype=torch.int16)
        image[:, :9], segmentation[:, :9] = 0, -1
        for _ in range(5):
            views = pipeline(image=image.clone(), segmentation=segmentation.clone())["image"]
            assert (views[:, :9] == 0).all() and (views[:, 9:] != 0).float().mean() > 0.9


def test_pseudo_labels_carry_no_gradient_and_come_from_the_teacher(in_workspace, monkeypatch):
    trainer = started(cast__teacher_views=0, **TEACHING)
    target = batch(trainer)[2][:, :1]
    labels = trainer.pseudo_label(target)
    assert not labels.requires_grad and labels.shape == (1, 32, 32)
    trainer.networks["intensities"].domain.zero_()
    with torch.no_grad():
        prior = trainer.finest(trainer.network(target)).softmax(1)
        found = trainer.networks["intensities"](prior, target).argmax(1)
    known = labels != IGNORED
    assert known.any() and torch.equal(labels[known], found[known])
    state = trainer.networks["self_training"]
    state.confidence, state.class_confidence[:] = 1.0, 1.0
    monkeypatch.setattr(state, "observe", lambda probabilities: None)
    assert (trainer.pseudo_label(target) == IGNORED).all()


def test_the_image_corrects_the_teacher_unless_asked_not_to(in_workspace, monkeypatch):
    """A teacher that has an edge in the wrong place, and an image that shows the right one."""
    image = torch.full((1, 1, 32, 32), -1.0)
    image[..., 12:] = 1.0
    image = image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(1, 3, 32, 32)
    logits[:, 1, :, :16], logits[:, 2, :, 16:] = 1.0, 1.0
    for corrected, edge in ((True, 12), (False, 16)):
        trainer = made(cast__intensity_labels=corrected, **TEACHING)
        trainer.initialize()
        trainer.networks["intensities"].set_range([image[0].numpy()])
        monkeypatch.setattr(trainer, "_predict", lambda images: logits)
        labels = trainer.pseudo_label(image)
        assert (labels[..., :edge] == 1).float().mean() > 0.96 and (labels[..., edge:] == 2).float().mean() > 0.96


def test_intensities_are_looked_at_only_where_they_correct_labels(in_workspace):
    """Without self-training no target image is opened but to choose a checkpoint."""
    for trainer in (started("CASTNoSelfTrainingTrainer"), started(cast__intensity_labels=False, **TEACHING)):
        intensities = trainer.networks["intensities"]
        assert not intensities.has_range
        trainer.train_step(next(trainer.dataloader_train))
        assert (intensities.domain == 0).all()


def test_a_share_of_the_target_images_is_restyled_for_the_student(in_workspace):
    for share in (0.0, 0.25):
        trainer = made(augmentation="none", seed=3, cast__target_style_probability=share, cast__teacher_views=1)
        trainer.initialize()
        pipeline = trainer.get_target_transforms(
            trainer.configuration_manager.patch_size, (0, 0), None, None, False, use_mask_for_norm=[False]
        )
        image = torch.randn(1, *trainer.configuration_manager.patch_size)
        segmentation = torch.zeros_like(image, dtype=torch.int16)
        views = [pipeline(image=image.clone(), segmentation=segmentation.clone())["image"] for _ in range(200)]
        assert views[0].shape == (3, *trainer.configuration_manager.patch_size)
        restyled = sum(not torch.equal(plain, student) for plain, student, *_ in views) / 200
        for_teacher = sum(not torch.equal(plain, restyled) for plain, _, restyled in views) / 200
        assert for_teacher == pytest.approx(0.95, abs=0.06)
        assert restyled == pytest.approx(0.95 * share, abs=0.1)


def test_no_target_label_is_read(in_workspace, monkeypatch, tmp_path):
    """With full trust in the teacher, garbage in labelsTs and its absence change nothing."""
    shutil.copytree(in_workspace.raw, tmp_path / "raw")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    labels = tmp_path / "raw" / "Dataset501_Blobs" / "labelsTs"
    results = []
    for _ in range(2):
        trainer = started(num_epochs=1, **TEACHING)
        for _ in range(2):
            losses = trainer.train_step(next(trainer.dataloader_train))
        assert losses["self_training"] > 0
        results.append(weights(trainer))
        for path in labels.iterdir() if labels.exists() else ():
            path.write_bytes(b"garbage")
    assert same_weights(*results)


def test_self_training_begins_after_its_share_of_the_schedule_and_rises(in_workspace):
    trainer = made(num_epochs=20, cast__start_share=0.4, cast__self_training_weight=0.5)
    found = []
    for trainer.current_epoch in range(20):
        found.append(trainer.self_training_weight)
        assert trainer.reads_target() == (found[-1] > 0)
    assert found == pytest.approx([0] * 8 + [0.25] + [0.5] * 11)
    without = made("CASTNoSelfTrainingTrainer", num_epochs=20)
    for without.current_epoch in range(20):
        assert without.self_training_weight == 0 and not without.reads_target()


def test_before_it_and_without_it_there_is_no_such_term(in_workspace):
    for trainer in (started(num_epochs=10), started("CASTNoSelfTrainingTrainer")):
        losses = trainer.train_step(next(trainer.dataloader_train))
        assert set(losses) == {"loss", "segmentation"} and trainer.networks["average"].steps == 1


def test_the_teacher_averages_over_a_share_of_the_schedule(in_workspace):
    decays = []
    for epochs in (1, 10, 1000):
        trainer = made(num_epochs=epochs, iterations_per_epoch=50)
        trainer.initialize()
        decays.append(trainer.networks["average"].decay)
    assert decays == pytest.approx([0.5, 0.9, 0.999])


def test_styles_are_those_of_the_settings(in_workspace):
    off = {f"cast__{part}_probability": 0.0 for part in (
        "cluster_contrast", "random_convolution", "global_location_scale")}  # fmt: skip
    trainer = started(augmentation="none", **off, **TEACHING)
    plain, *others = batch(trainer)[2].split(1, dim=1)
    assert len(others) == 3 and all(torch.equal(plain, other) for other in others)


@pytest.mark.draws
def test_labels_that_are_trusted_are_drawn(in_workspace, tmp_path):
    started(**TEACHING).draw_pictures(tmp_path / "epoch_0000.png")
    for name in ("trusted_epoch_0000.png", "epoch_0000.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_half_precision_trains(in_workspace):
    trainer = started(**TEACHING)
    trainer.autocast = functools.partial(torch.autocast, "cpu", torch.float16)
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert set(losses) == TERMS and losses["self_training"] > 0


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
    trainer = started(plans="tiny3d", configuration="3d_fullres", **TEACHING)
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert set(losses) == TERMS and all(torch.isfinite(torch.tensor(list(losses.values()))))


def test_it_does_not_translate(in_workspace):
    trainer = made()
    assert not trainer.translates and type(trainer).translate is UDATrainer.translate


def test_wrong_settings_are_named(in_workspace):
    with pytest.raises(UDAError, match="'teacher_horizon' must be over 0 and at most 1, found 0"):
        made(cast__teacher_horizon=0.0)
    with pytest.raises(UDAError, match="'start_share' must be between 0 and 1, found 1.5"):
        made(cast__start_share=1.5)
    with pytest.raises(UDAError, match="'self_training_weight' must be at least 0, found -1"):
        made(cast__self_training_weight=-1.0)
    with pytest.raises(UDAError, match="CASTNoSelfTrainingTrainer fixes.*self_training"):
        made("CASTNoSelfTrainingTrainer", cast__self_training=True)
