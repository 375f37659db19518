"""What checkpoint_best follows: means over epochs, fixed target patches, and whole trainings."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_trainer, same_weights, weights
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnunet_uda.errors import UDAError
from nnunet_uda.settings import UDASettings, parse_settings
from nnunet_uda.training.criteria import HIGHER_IS_BETTER, TargetCriteria, change_looks, look_twice
from nnunet_uda.training.model_choice import ModelChoice, criteria_on, fixed_patches


def choice_of(criterion: str, values: list[float], **settings: int) -> ModelChoice:
    choice = ModelChoice(UDASettings(checkpoint_criterion=criterion, **settings))
    choice.patches = torch.zeros(1) if criterion != "pseudo_dice" else None
    choice.history = {criterion: values}
    return choice


def test_means_are_those_of_nnunet(tmp_path) -> None:
    values = [0.1, 0.7, 0.65, 0.2]
    logger = MetaLogger(str(tmp_path), False)
    for epoch, value in enumerate(values):
        logger.log("mean_fg_dice", value, epoch)
    assert choice_of("pseudo_dice", values).means == pytest.approx(logger.get_value("ema_fg_dice", None), rel=1e-12)


@pytest.mark.parametrize("criterion", ["pseudo_dice", *HIGHER_IS_BETTER])
def test_the_best_epoch_is_the_lowest_or_the_highest_mean(criterion: str) -> None:
    values = [0.5, 0.6, 0.1, 0.2, 0.9, 0.05]
    means = choice_of(criterion, values).means
    for end in range(1, len(values) + 1):
        pick = max if HIGHER_IS_BETTER.get(criterion, True) else min
        best = means.index(pick(means[:end])) == end - 1
        assert choice_of(criterion, values[:end]).last_is_best is best
        names = choice_of(criterion, values[:end], keep_every=3).checkpoints()
        assert ("checkpoint_best.pth" in names) is best
        assert [name for name in names if "epoch" in name] == ([f"checkpoint_epoch_{end:04d}.pth"] * (end % 3 == 0))


def test_means_on_target_patches_are_shorter() -> None:
    assert choice_of("agreement", [0.5, 0.7, 0.2]).means == pytest.approx([0.5, 0.6, 0.4])


def test_a_segmenter_that_disagrees_with_itself_is_warned_of() -> None:
    low = choice_of("agreement", [0.9, 0.1, 0.3])  # 0.9, 0.5, 0.4
    assert "agreement with itself is only 0.40" in low.warning(True) and "if translations keep" in low.warning(True)
    assert "agreement with itself is only 0.40" in low.warning(False) and "transl" not in low.warning(False)
    for fine in (("agreement", [0.8, 0.9, 0.95]), ("agreement", [math.nan]), ("pseudo_dice", [0.1, 0.2])):
        assert choice_of(*fine).warning(True) is choice_of(*fine).warning(False) is None


def test_agreement_is_followed_where_there_are_target_patches() -> None:
    choice = ModelChoice(UDASettings())
    assert choice.criterion == "pseudo_dice"
    choice.patches = torch.zeros(1)
    assert choice.criterion == "agreement"
    assert UDASettings(criterion_patches=0).checkpoint_criterion == "agreement", "pseudo Dice, as above: no error"


def test_an_undefined_epoch_changes_nothing() -> None:
    nan = math.nan
    assert choice_of("pseudo_dice", [nan, 0.5, nan, 0.7]).means[1:] == pytest.approx([0.5, 0.5, 0.52])
    assert [choice_of("pseudo_dice", v).last_is_best for v in ([nan], [nan, 0.5], [0.5, nan])] == [False, True, False]
    assert choice_of("pseudo_dice", [0.5, 0.5]).last_is_best is False


def test_criteria_need_patches() -> None:
    with pytest.raises(UDAError, match="'criterion_patches' must be at least 1"):
        parse_settings(UDASettings, {"checkpoint_criterion": "snd", "criterion_patches": 0}, "here")
    with pytest.raises(UDAError, match="'checkpoint_criterion' must be one of 'pseudo_dice', 'entropy'"):
        parse_settings(UDASettings, {"checkpoint_criterion": "dice"}, "here")


class Cases:
    """A dataset that says where its patches come from: channels 1000 case + slice (first axis), 100 row + column."""

    def __init__(self, *shapes: tuple[int, int, int]) -> None:
        self.shapes = dict(zip("abcdef", shapes, strict=False))
        self.identifiers = list(self.shapes)

    def load_case(self, identifier: str):
        shape = self.shapes[identifier]
        data = np.zeros((2, *shape), np.float32)
        data[0] = 1000 * (1 + self.identifiers.index(identifier)) + np.arange(shape[0])[:, None, None]
        data[1] = 100 * np.arange(shape[1])[:, None] + np.arange(shape[2])
        return data, None, None, {}


def test_patches_are_spread_over_cases_and_slices_and_always_the_same() -> None:
    dataset = Cases((20, 12, 14), (10, 12, 14), (30, 12, 14))
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    patches = fixed_patches(dataset, (8, 10), 6)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    assert patches.shape == (6, 2, 8, 10) and patches.dtype == torch.float32
    assert patches[:, 0, 0, 0].tolist() == [1005, 1015, 2002, 2007, 3007, 3022]
    assert len(set(patches[:, 1, 0, 0].tolist())) > 1  # other places in the slices
    assert torch.equal(patches, fixed_patches(dataset, (8, 10), 6))
    assert fixed_patches(dataset, (8, 10), 2)[:, 0, 0, 0].tolist() == [1010, 2005]


def test_patches_larger_than_the_images_and_in_3d() -> None:
    dataset = Cases((6, 5, 9), (12, 5, 9))
    patches = fixed_patches(dataset, (8, 8, 8), 4)
    assert patches.shape == (4, 2, 8, 8, 8)
    inside = patches[0, 0] > 0
    assert inside.sum() == 6 * 5 * 8 and inside[1:7, 2:7].all()  # the image in the middle, zeros around it
    assert patches[2, 0, :, 2, 0].tolist() == list(range(2001, 2009)) and patches[3, 0, 0, 2, 0] == 2003


def test_changed_looks_keep_mean_deviation_and_order() -> None:
    images = torch.randn(2, 3, 16, 17, generator=torch.Generator().manual_seed(0))
    changed = change_looks(images)
    assert torch.allclose(changed.mean((2, 3)), images.mean((2, 3)), atol=1e-5)
    assert torch.allclose(changed.std((2, 3)), images.std((2, 3)), rtol=1e-4)
    assert (changed - images).abs().max() > 0.1
    assert torch.equal(changed[1, 2].flatten().argsort(), images[1, 2].flatten().argsort())
    assert torch.isfinite(change_looks(torch.zeros(1, 1, 4, 4))).all()


def test_a_network_is_asked_about_the_mirrored_image_and_answered_in_its_place() -> None:
    images = torch.randn(3, 1, 12, 10, generator=torch.Generator().manual_seed(0))
    seen = []

    def position_blind(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.cat([torch.zeros_like(x), 9 * x], 1)

    probabilities, again = look_twice(position_blind, images, (1,))
    assert torch.allclose(seen[0].flip(3), change_looks(images)) and torch.equal(seen[1], images)
    assert torch.equal(probabilities, position_blind(images).softmax(1))
    assert torch.equal(again, (change_looks(images)[:, 0] > 0).long())
    assert torch.equal(look_twice(position_blind, images, None)[1], again)
    left = torch.zeros(1, 2, 12, 10)
    left[:, 1, :, :5] = 1  # always sees the object on the left
    assert (look_twice(lambda x: left.expand(3, -1, -1, -1), images, (1,))[1][:, :, 5:] == 1).all()


def test_criteria_on_patches_do_not_depend_on_the_batch_size() -> None:
    patches = torch.randn(6, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    convolution = torch.nn.Conv2d(1, 3, 3, padding=1)
    options = {"mirror_axes": (0, 1), "num_classes": 3, "device": torch.device("cpu")}
    values = criteria_on(patches, convolution, batch_size=2, **options)
    gathered = TargetCriteria(3)
    with torch.no_grad():
        gathered.add(*look_twice(convolution, patches, (0, 1)))
    assert values == pytest.approx(gathered.values(), rel=1e-5)
    assert 0 < values["agreement"] < 1


def train(name: str = "CISFATrainer", **options):
    trainer = make_trainer(name, **options)
    trainer.run_training()
    return trainer


def read(folder: str, name: str) -> dict:
    return torch.load(Path(folder, name), weights_only=False)


def test_measuring_leaves_training_alone_and_chooses_its_checkpoint(in_workspace) -> None:
    plain = train(num_epochs=3, criterion_patches=0)
    expected = weights(plain)
    assert list(plain.model_choice.history) == ["pseudo_dice"]
    shutil.rmtree(plain.output_folder_base)

    options = {"num_epochs": 3, "criterion_patches": 3, "checkpoint_criterion": "entropy", "keep_every": 1}
    trainer = train(**options)
    assert same_weights(expected, weights(trainer))
    assert trainer.model_choice.patches.shape == (4, 1, 32, 32)  # whole batches of two
    history = trainer.model_choice.history
    assert history.keys() == {"pseudo_dice", *HIGHER_IS_BETTER}
    assert all(len(values) == 3 and all(0 <= value <= 1 for value in values) for values in history.values())
    assert history["pseudo_dice"] == trainer.logger.get_value("mean_fg_dice", None)

    means = trainer.model_choice.means
    best = means.index(min(means)) + 1
    folder = trainer.output_folder
    kept = {epoch: read(folder, f"checkpoint_epoch_{epoch:04d}.pth") for epoch in (1, 2, 3)}
    for name, content in ((str(epoch), kept[epoch]) for epoch in kept):
        assert content["current_epoch"] == int(name)
        assert {k: len(v) for k, v in content["uda"]["criteria"].items()} == dict.fromkeys(history, int(name))
    assert same_weights(kept[best]["network_weights"], read(folder, "checkpoint_best.pth")["network_weights"])
    assert same_weights(kept[3]["network_weights"], read(folder, "checkpoint_final.pth")["network_weights"])
    log = next(Path(folder).glob("training_log*.txt")).read_text()
    assert "checkpoint_best follows entropy" in log and log.count("criteria    pseudo_dice  ") == 3
    assert Path(folder, "criteria.png").read_bytes()[:4] == b"\x89PNG"
    warning = trainer.model_choice.warning(True)
    assert warning and warning in log, "three tiny epochs adapt nothing"

    resumed = make_trainer("CISFATrainer", **options)
    resumed.load_checkpoint(str(Path(folder, "checkpoint_epoch_0002.pth")))
    resumed.run_training()
    assert same_weights(expected, weights(resumed)) and resumed.model_choice.history == history

    with torch.no_grad():
        trainer.network.eval()
        patches = fixed_patches(trainer.target_dataset, (32, 32), 4)
        gathered = TargetCriteria(3)
        gathered.add(*look_twice(lambda x: trainer.network(x)[0], patches, (0,)))  # not left and right
    last = {name: values[-1] for name, values in history.items() if name != "pseudo_dice"}
    assert last == pytest.approx(gathered.values(), rel=1e-4, abs=1e-6)


def test_without_target_images_pseudo_dice_is_followed(in_workspace, monkeypatch, tmp_path) -> None:
    shutil.copytree(in_workspace.raw, tmp_path / "raw")
    shutil.rmtree(tmp_path / "raw" / "Dataset501_Blobs" / "imagesTu")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    trainer = train("SourceOnlyTrainer", num_epochs=1, checkpoint_criterion="agreement")
    assert trainer.model_choice.criterion == "pseudo_dice" and list(trainer.model_choice.history) == ["pseudo_dice"]
    assert Path(trainer.output_folder, "checkpoint_best.pth").exists()


def test_two_generators_are_measured_as_they_predict(in_workspace) -> None:
    small = {"embedding_dim": 8, "discriminator_width": 4, "dictionary_size": 6, "top_k": 2}
    options = {f"similarity_prototypes__{key}": value for key, value in small.items()}
    trainer = make_trainer("SimilarityPrototypesTrainer", criterion_patches=2, **options)
    trainer.on_train_start()
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        images, network = trainer.model_choice.patches, trainer.plain_network
        direct = network.target_generator(images)
        by_source = network.source_generator(direct.image)
        average = (direct.segmentation.softmax(1) + by_source.segmentation.softmax(1)) / 2
        assert network.deep_supervision  # as in the middle of a training
        assert torch.allclose(trainer._predict(images).softmax(1), average, atol=1e-5)
