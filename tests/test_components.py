"""What is one piece in every label of the source is one piece in a prediction."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_trainer
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import ndimage

from nnunet_uda.data import new_scans
from nnunet_uda.data.components import ENOUGH, KEY, find_single_components, keep_largest_components
from nnunet_uda.data.new_scans import check_prediction
from nnunet_uda.errors import UDAError
from nnunet_uda.foreign_plans import check_plans
from nnunet_uda.quality.asked import Asked
from nnunet_uda.training import start


def ring(*size: int) -> np.ndarray:
    """A cavity 1 within a wall 2."""
    label = np.zeros(size, int)
    label[..., 4:12, 4:12] = 2
    label[..., 6:10, 6:10] = 1
    return label


@pytest.mark.parametrize("size", [(20, 20), (3, 20, 20)])
def test_what_is_one_piece_in_every_label_is_found(size):
    whole = [ring(*size) for _ in range(ENOUGH)]
    assert find_single_components(whole, [1, 2]) == [[1, 2], [1], [2]]
    assert find_single_components(whole[1:], [1, 2]) == []  # too few
    assert find_single_components([np.zeros(size, int), *whole[1:]], [1, 2]) == []  # as few that hold it
    cut = whole[0].copy()
    cut[..., 4:12, 7:9] = 0
    assert find_single_components([*whole, cut], [1, 2]) == []
    apart = whole[0].copy()
    apart[..., 15:18, 15:18] = 1
    assert find_single_components([*whole, apart], [1, 2]) == [[2]]
    assert find_single_components(whole, [1, 2, 3]) == [[1, 2, 3], [1], [2]]
    assert find_single_components(whole, [1]) == [[1]]


def test_specks_are_no_second_piece_and_corners_touch():
    label = np.zeros((40, 40), int)
    label[:20, :20] = 1
    label[20:22, 20:22] = 1
    assert find_single_components([label] * ENOUGH, [1]) == [[1]]
    label[35, 35] = 1
    assert find_single_components([label] * ENOUGH, [1]) == [[1]]
    label[30:34, 30:34] = 1
    assert find_single_components([label] * ENOUGH, [1]) == []


def slow(segmentation: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    result = segmentation.copy()
    for group in groups:
        pieces, number = ndimage.label(np.isin(result, group), np.ones((3,) * result.ndim))
        sizes = [(pieces == piece).sum() for piece in range(1, number + 1)]
        for piece, size in enumerate(sizes, 1):
            if size < max(sizes):
                result[pieces == piece] = 0
    return result


@pytest.mark.parametrize("kind", [np.float32, torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(24, 24), (5, 16, 16)])
@pytest.mark.parametrize("groups", [[], [[1, 2]], [[1, 2], [1], [2]], [[2]]])
def test_it_equals_the_loops(kind, size, groups):
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(size=(3, *size)), (0, *(1.5,) * len(size)))
    logits = (100 * noise).astype(np.float32)
    before = logits.argmax(0)
    given = logits.copy() if kind is np.float32 else torch.from_numpy(logits).to(kind)
    found = keep_largest_components(given, groups)
    after = np.asarray(found.argmax(0))
    np.testing.assert_array_equal(after, slow(before, groups))
    same = after == before
    found = np.asarray(found, np.float32)
    np.testing.assert_allclose(found[:, same], logits[:, same], rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(np.sort(found, 0), np.sort(logits, 0), rtol=1e-2, atol=1e-2)  # a softmax stays one


def test_nothing_found_stays_nothing():
    logits = np.zeros((3, 8, 8), np.float32)
    logits[0] = 1
    np.testing.assert_array_equal(keep_largest_components(logits.copy(), [[1, 2]]), logits)


# -- in a training and in prediction -----------------------------------------------------------------------------------


def export(trainer, logits: np.ndarray, probabilities: bool = False):
    properties = {
        "spacing": [1.0, 1.0, 1.0], "shape_before_cropping": logits.shape[1:],
        "shape_after_cropping_and_before_resampling": logits.shape[1:],
        "bbox_used_for_cropping": [[0, length] for length in logits.shape[1:]],
    }  # fmt: skip
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.copy(), trainer.plans_manager, trainer.configuration_manager, trainer.label_manager, properties,
        probabilities, 1,
    )  # fmt: skip


def two_pieces(trainer) -> np.ndarray:
    logits = np.zeros((trainer.label_manager.num_segmentation_heads, 2, 20, 20), np.float32)
    logits[1, :, 2:10, 2:10] = logits[1, :, 14:17, 14:17] = 4
    return logits


def test_a_training_finds_it_and_its_predictions_keep_it(in_workspace, monkeypatch):
    monkeypatch.setattr("nnunet_uda.data.components.ENOUGH", 1)
    trainer = make_trainer("SourceOnlyTrainer", num_epochs=1, quality_volumes=0)
    trainer.on_train_start()
    assert [1] in trainer.plans_manager.plans[KEY]
    written = json.loads(Path(trainer.output_folder_base, "plans.json").read_text(encoding="utf-8"))
    assert written[KEY] == trainer.plans_manager.plans[KEY]
    logits = two_pieces(trainer)
    found, probabilities = export(trainer, logits, True)
    assert (found == 1).sum() == 2 * 8 * 8 and probabilities[:, 0, 15, 15].argmax() == 0
    assert (logits.argmax(0) == 1).sum() > (found == 1).sum()

    without = make_trainer("SourceOnlyTrainer", keep_largest_component=False)
    without.initialize()
    start.find_components(without)
    assert without.plans_manager.plans[KEY] == []
    assert (export(without, logits) == 1).sum() == (logits.argmax(0) == 1).sum()


def test_the_quality_estimate_is_of_what_is_predicted(monkeypatch):
    plans = SimpleNamespace(plans={KEY: [[1]]})
    predictor = SimpleNamespace(plans_manager=plans, allowed_mirroring_axes=None,
                                configuration_manager=SimpleNamespace(patch_size=[20, 20]))  # fmt: skip
    asked = Asked(predictor, {"fold 0": {}}, {})
    scores = torch.zeros(2, 2, 20, 20)
    scores[1, :, 2:10, 2:10] = scores[1, :, 14:17, 14:17] = 4
    shrunk = lambda volume: torch.nn.functional.interpolate(scores[None], volume.shape[1:])[0]  # noqa: E731
    monkeypatch.setattr(asked, "logits", shrunk)
    seen, label, _ = asked.look(torch.randn(1, 2, 20, 20))
    for one in (label, *(softmax.argmax(0).numpy() for softmax in seen.values())):
        assert one[0, 5, 5] == 1 and one[0, 15, 15] == 0


def test_a_version_of_nnunet_that_goes_another_way_is_refused(in_workspace, monkeypatch):
    trainer = make_trainer("SourceOnlyTrainer")
    trainer.initialize()
    plans = trainer.plans_manager.plans | {KEY: [[1]]}
    check = lambda: check_prediction("SourceOnlyTrainer", trainer.network, plans, "2d", trainer.dataset_json)  # noqa: E731
    check()
    stock = PlansManager(plans).get_configuration("2d").resampling_fn_probabilities
    monkeypatch.setattr(new_scans.NewScansConfiguration, "resampling_fn_probabilities", stock)
    with pytest.raises(UDAError, match="does not let predictions keep as one piece.*keep_largest_component=false"):
        check()


@pytest.mark.parametrize("broken", ["LV", [1, 2], [["LV"]], {"1": 2}])
def test_plans_of_others_that_say_something_else_are_refused(in_workspace, broken):
    plans = make_trainer("SourceOnlyTrainer").plans_manager.plans | {KEY: broken}
    with pytest.raises(UDAError, match=f"plans.json: '{KEY}' is .*; expected lists of labels"):
        check_plans(plans, "plans.json")
