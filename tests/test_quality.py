"""The quality estimate: shapes, signals, calibration, and what a training writes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from nnunet_uda.errors import UDAError
from nnunet_uda.quality.calibration import (
    FEATURES,
    KINDS,
    PRIOR,
    Calibration,
    Estimate,
    Pair,
    calibrate,
    estimate_case,
    estimate_structure,
    features,
    fit_weights,
    interval,
    verdict_of,
)
from nnunet_uda.quality.cases import block, quality_of_probabilities, read_calibration
from nnunet_uda.quality.degrade import degrade
from nnunet_uda.quality.shapes import contact_areas, describe_shapes, robust, shape_deviations, source_shapes
from nnunet_uda.quality.signals import case_signals, describe_scan, known_scans, scan_deviations, views

SPACING = (4.0, 2.0, 2.0)


def ball(radius: float, centre: tuple[float, float, float] = (8, 16, 16), size=(16, 32, 32)) -> np.ndarray:
    """A ball of ``radius`` mm around a voxel."""
    places = np.meshgrid(*(np.arange(length) for length in size), indexing="ij")
    distance = sum(((place - c) * step) ** 2 for place, c, step in zip(places, centre, SPACING, strict=True))
    return (distance <= radius**2).astype(np.int16)


def known_balls() -> list[dict]:
    cases = [describe_shapes(ball(radius), SPACING, 1) for radius in (17, 18, 19, 20)]
    return source_shapes(cases, 1)


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_contacts_are_areas_in_mm2_between_the_classes_that_touch():
    label = np.zeros((2, 3, 4), int)
    label[:, :, :2] = 1
    label[1, :, 1] = 2
    areas = contact_areas(label, (4.0, 2.0, 1.0), 3)
    assert areas[0, 1] == areas[1, 0] == 3 * 8  # z = 0: three faces across x of 4 mm x 2 mm
    assert areas[0, 2] == 3 * 8
    assert areas[1, 2] == 3 * 8 + 3 * 2  # across x in z = 1, and across z
    assert not areas.diagonal().any()


def test_shapes_are_described_in_mm():
    label = ball(18)
    label[0, 0, :2] = 1  # an island
    (shape,) = describe_shapes(label, SPACING, 1)
    assert shape["volume"] == label.sum() * 16
    assert shape["components"] == 1 and shape["largest_share"] == pytest.approx(1 - 2 / label.sum())
    assert shape["touches"] == [True, True, True] or shape["touches"][:2] == [True, True]
    assert describe_shapes(ball(18) * 0, SPACING, 2) == [None, None]
    (whole,) = describe_shapes(ball(18), SPACING, 1)
    assert whole["touches"] == [False, False, False]
    assert whole["place"] == pytest.approx([8.5 / 16, 16.5 / 32, 16.5 / 32])
    assert 4.8 < whole["roundness"] < 8 and whole["contacts"] == [1.0, 0.0]


def test_a_spread_never_vanishes_and_is_larger_for_few_values():
    assert robust([2.0, 2.0, 2.0, 2.0], 0.1) == [2.0, pytest.approx(0.125)]
    assert robust([2.0], 0.1)[1] == pytest.approx(0.2)


def test_deviations_bound_the_dice_by_the_volume():
    known = known_balls()[0]
    usual = shape_deviations(describe_shapes(ball(18.5), SPACING, 1)[0], known)
    large = shape_deviations(describe_shapes(ball(28), SPACING, 1)[0], known)
    small = shape_deviations(describe_shapes(ball(8), SPACING, 1)[0], known)
    assert usual["size_bound"] == 1 and usual["pieces"] == 0 and usual["place"] < 1
    assert large["size"] > 3 and small["size"] < -3
    assert large["size_bound"] < 0.85 and small["size_bound"] < 0.4
    moved = shape_deviations(describe_shapes(ball(18, (8, 11, 21)), SPACING, 1)[0], known)
    assert moved["size_bound"] == 1 and moved["place"] > 1.5


def test_a_structure_that_the_source_shows_cut_off_is_measured_in_cross_section():
    def cord(length: int, radius: float) -> dict:
        rows, columns = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
        disc = ((rows - 16) ** 2 + (columns - 16) ** 2 <= radius**2).astype(np.int16)
        return describe_shapes(np.repeat(disc[None], length, 0), SPACING, 1)[0]

    (known,) = source_shapes([[cord(20, 5)], [cord(24, 5.2)], [cord(18, 4.9)]], 1)
    assert known["open"] == [True, False, False]
    assert shape_deviations(cord(60, 5), known)["size_bound"] == 1
    assert shape_deviations(cord(20, 10), known)["size_bound"] < 0.6


def test_a_structure_cut_off_by_the_scan_may_be_small():
    known = known_balls()[0]
    cut = describe_shapes(ball(18)[7:], SPACING, 1)[0]
    inside = describe_shapes(ball(9), SPACING, 1)[0]
    assert shape_deviations(cut, known)["size_bound"] == 1 > shape_deviations(inside, known)["size_bound"]
    assert shape_deviations(cut, known)["roundness"] == shape_deviations(cut, known)["place"] == 0
    assert shape_deviations(inside, known)["roundness"] > 0


# -- signals -----------------------------------------------------------------------------------------------------------


def softmax_of(label: np.ndarray, certainty: float = 0.95) -> torch.Tensor:
    two = torch.tensor(np.stack([label == 0, label == 1])).float()
    return two * certainty + (1 - two) * (1 - certainty)


def test_views_are_put_back_into_place():
    volume = torch.rand(1, 4, 16, 12, generator=torch.Generator().manual_seed(0))

    def predict(image: torch.Tensor) -> torch.Tensor:  # follows the image: any view in the wrong place would show
        return torch.cat([torch.zeros_like(image), 8 * (image - image.mean())])

    seen = views(volume, predict, [1, 2], slices=True)
    assert list(seen) == ["plain", "mirrored", "darkened", "restyled", "smaller"]
    assert torch.allclose(seen["plain"], seen["mirrored"], atol=1e-5)
    assert all(view.shape == (2, 4, 16, 12) for view in seen.values())
    correlation = np.corrcoef(seen["plain"][1].ravel(), seen["smaller"][1].ravel())[0, 1]
    assert correlation > 0.6
    assert list(views(volume, predict, None, slices=False)) == ["plain", "darkened", "smaller"]


def test_signals_of_a_certain_and_of_a_doubtful_segmentation():
    label, known = ball(18), known_balls()
    image = torch.from_numpy(label.astype(np.float32))[None] + 0.01 * torch.randn(1, *label.shape)
    views_agree = {"plain": softmax_of(label), "darkened": softmax_of(label)}
    (good,) = case_signals(label, SPACING, known, views_agree, image)
    assert good["agreement"] == {"darkened": 1.0} and good["expected_dice"] > 0.6
    assert good["entropy_inside"] == pytest.approx(0.286, abs=0.01)
    assert good["edges"] > 2
    views_differ = {"plain": softmax_of(label), "darkened": softmax_of(ball(10), 0.6)}
    flat = torch.zeros(1, *label.shape)
    (bad,) = case_signals(label, SPACING, known, views_differ, flat, {"fold_1": ball(12)})
    assert bad["agreement"]["darkened"] < 0.5 and bad["others"]["fold_1"] < 0.6
    assert bad["expected_dice"] < good["expected_dice"] and bad["entropy_inside"] > good["entropy_inside"]
    assert bad["edges"] == 1
    (absent,) = case_signals(label * 0, SPACING, known, views_agree, image)
    assert absent["present"] is False and absent["agreement"] == {"darkened": 0.0}


def test_scans_of_other_intensities_and_fields_lie_far_off():
    generator = torch.Generator().manual_seed(0)
    usual = [torch.randn(1, 8, 32, 32, generator=generator) for _ in range(4)]
    known = known_scans([describe_scan(volume, SPACING) for volume in usual])
    near = scan_deviations(describe_scan(torch.randn(1, 8, 32, 32, generator=generator), SPACING), known)
    far = scan_deviations(describe_scan(usual[0].abs() ** 3, (4.0, 8.0, 8.0)), known)
    assert near["intensities"] < 1 and near["field"] < 1
    assert far["intensities"] > 3 and far["field"] > 4


# -- styles ------------------------------------------------------------------------------------------------------------


def test_styles_keep_label_and_image_together_and_grow_wilder():
    label = ball(18)
    volume = torch.from_numpy(np.where(label, 2.0, 0.0).astype(np.float32))[None]
    volume = (volume - volume.mean()) / volume.std()
    same, same_label, spacing = degrade(volume, label, SPACING, 0.0, 3)
    assert torch.equal(same, volume) and same_label is label and spacing == list(SPACING)

    def contrast(strength: float, seed: int) -> float:
        image, truth, step = degrade(volume, label, SPACING, strength, seed)
        assert image.shape[1:] == truth.shape and torch.isfinite(image).all()
        field = np.multiply(truth.shape, step)
        assert (field <= np.multiply(label.shape, SPACING) + 1).all()
        inside = image[0].numpy()[truth == 1]
        return abs(float(inside.mean()) - float(image[0].numpy()[truth == 0].mean())) / float(inside.std() + 1e-6)

    mild, wild = (np.median([contrast(strength, seed) for seed in range(12)]) for strength in (0.2, 1.0))
    assert mild > 1.5 * wild
    first, again = (degrade(volume, label, SPACING, 0.7, 5)[0] for _ in range(2))
    assert torch.equal(first, again)


# -- calibration -------------------------------------------------------------------------------------------------------


def made_up_pairs(number: int = 60) -> list[Pair]:
    """Dice follows agreement and size alone."""
    rng = np.random.default_rng(0)
    pairs = []
    for index in range(number):
        found = {name: float(rng.uniform(-2, 2)) for name in FEATURES}
        score = 1.5 * found["agreement"] + 0.8 * found["size"]
        pairs.append(Pair(found, 1 / (1 + math.exp(-score)), f"case{index % 6}"))
    return pairs


def test_the_fit_finds_what_dice_follows_and_no_weight_is_negative():
    weights = fit_weights(made_up_pairs(), "views", shrinkage=0.01)
    assert weights["agreement"] == pytest.approx(1.5, abs=0.15) and weights["size"] == pytest.approx(0.8, abs=0.15)
    assert all(weights[name] >= 0 for name in FEATURES)
    upside_down = [Pair(pair.features, 1 - pair.dice, pair.volume) for pair in made_up_pairs()]
    assert all(weight >= 0 for name, weight in fit_weights(upside_down, "views").items() if name != "constant")
    assert fit_weights([], "views") == pytest.approx(PRIOR["views"])


def test_few_pairs_stay_near_the_prior_and_many_leave_it():
    few, many = (fit_weights(made_up_pairs(number), "views") for number in (4, 200))
    prior = PRIOR["views"]["agreement"]
    assert abs(few["agreement"] - prior) < abs(many["agreement"] - prior)


def test_a_range_holds_nine_of_ten():
    rng = np.random.default_rng(1)
    estimates = rng.uniform(0, 1, 300)
    residuals = np.stack([estimates, np.clip(estimates + rng.normal(0, 0.1, 300), 0, 1)], 1)
    low, high = interval(residuals, 0.6)
    assert 0.38 < low < 0.5 and 0.7 < high < 0.82
    assert interval(residuals[:0], 0.6) == (0.0, 1.0)
    assert interval(residuals[:5], 0.6) == (0.0, 1.0)  # five pairs say nothing of the twentieth part


def small_calibration(**changes) -> Calibration:
    scans = {"source": known_scans([describe_scan(torch.randn(1, *ball(18).shape), SPACING) for _ in range(3)])}
    made = calibrate(["ball"], known_balls(), scans, made_up_pairs(), {"volumes": []})
    return Calibration(**{**made.__dict__, **changes})


def test_calibration_goes_through_json_and_refuses_another_file():
    made = small_calibration()
    again = Calibration.from_json(json.loads(json.dumps(made.to_json())), "quality.json")
    assert again == made
    for strange in ([], {"version": 99}, {"version": 1}):
        with pytest.raises(UDAError, match=r"here/quality.json is no calibration"):
            Calibration.from_json(strange, "here/quality.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structures": ["cube"]}, r"is of the structures \['cube'\], the model's are ball"),
        ({"shapes": []}, "is damaged"),
        ({"shapes": "x"}, "is damaged"),
        ({"shapes": [{"present": 1.0, "cases": 3}]}, r"is damaged \(KeyError: 'open'\)"),
        ({"weights": {}}, "is damaged"),
        ({"residuals": "x"}, "is damaged"),
        ({"residuals": {"views": [[1], [2, 3]], "probabilities": [], "segmentation": []}}, "is damaged"),
        ({"scans": []}, "is damaged"),
        ({"scans": {"source": {"quantiles": [[1]], "field": []}}}, "is damaged"),
        ({"about": "x"}, "is damaged"),
        ({"about": {}}, "is damaged"),
    ],
)
def test_a_damaged_calibration_and_one_of_other_structures_are_refused_by_name(tmp_path, change, message):
    path = tmp_path / "quality.json"
    whole = small_calibration(about={"volumes": [], "pairs": 3})
    path.write_text(json.dumps(whole.to_json()))
    assert read_calibration(path, ["ball"]) == whole
    path.write_text(json.dumps(whole.to_json() | change))
    with pytest.raises(UDAError, match=rf"quality.json {message}.*Remove it"):
        read_calibration(path, ["ball"])


def test_a_calibration_that_is_cut_short_is_to_be_removed(tmp_path):
    path = tmp_path / "quality.json"
    path.write_text('{"version": 1, "struc')
    with pytest.raises(UDAError, match=r"quality.json is not valid JSON.*Remove it"):
        read_calibration(path, ["ball"])


def test_verdicts_are_good_only_where_the_range_holds_no_failure():
    assert verdict_of(0.9, 0.6) == "good" and verdict_of(0.9, 0.4) == "look at it"
    assert verdict_of(0.6, 0.55) == "look at it" and verdict_of(0.3, 0.1) == "failed"
    worst = estimate_case([Estimate(0.9, 0.8, 1, "good"), Estimate(0.2, 0, 0.4, "failed")])
    assert worst.verdict == "failed" and worst.dice == pytest.approx(0.55)


def test_an_impossible_volume_caps_the_estimate_whatever_views_say():
    made, label = small_calibration(), ball(8)
    signals = case_signals(
        label, SPACING, made.shapes, {name: softmax_of(label, 0.999) for name in ("plain", "darkened")}
    )
    found = estimate_structure(made, 0, signals[0], None)
    assert found.dice <= signals[0]["deviations"]["size_bound"] < 0.5
    assert found.verdict == "failed" and "too small" in found.reasons[0] and "ml" in found.reasons[0]


def test_other_folds_cap_the_estimate_too():
    made, label = small_calibration(), ball(18)
    seen = {name: softmax_of(label, 0.999) for name in ("plain", "darkened")}
    alone = estimate_structure(made, 0, case_signals(label, SPACING, made.shapes, seen)[0], None)
    beside = case_signals(label, SPACING, made.shapes, seen, None, {"fold_1": ball(18, (8, 24, 16))})
    doubted = estimate_structure(made, 0, beside[0], None)
    assert doubted.dice <= beside[0]["others"]["fold_1"] < alone.dice
    assert any("fold 1 segments it otherwise" in reason for reason in doubted.reasons)


def test_what_was_not_found_has_failed_unless_the_source_lacks_it_too():
    made = small_calibration()
    (absent,) = case_signals(ball(18) * 0, SPACING, made.shapes)
    missing = estimate_structure(made, 0, absent, None)
    assert missing.dice == 0 and missing.verdict == "failed" and "no ball was found" in missing.reasons[0]
    made.shapes[0]["present"] = 0.5
    perhaps = estimate_structure(made, 0, absent, None)
    assert math.isnan(perhaps.dice) and perhaps.verdict == "look at it"


def test_any_other_models_segmentation_is_judged_by_what_there_is():
    made = small_calibration()
    shape_only = quality_of_probabilities("a", made, ball(18), SPACING)
    probabilities = quality_of_probabilities("a", made, ball(18), SPACING, softmax_of(ball(18)).numpy())
    assert set(KINDS) == {"views", "probabilities", "segmentation"}
    assert "expected_dice" not in shape_only.signals["ball"] and "expected_dice" in probabilities.signals["ball"]
    for quality in (shape_only, probabilities):
        assert 0 <= quality.overall.low <= quality.overall.dice <= quality.overall.high <= 1
    wrong = quality_of_probabilities("a", made, ball(9), SPACING)
    assert wrong.overall.dice < shape_only.overall.dice


def test_features_say_nothing_of_what_is_not_there():
    assert set(features({"deviations": None})) == {"size", "whole", "roundness", "contacts", "place"}


def test_a_long_volume_is_calibrated_on_the_slices_around_its_label():
    label = np.zeros((100, 8, 8), np.int16)
    label[70:80] = 1
    volume, part, _ = block(torch.zeros(1, 100, 8, 8), label, [1.0, 1.0, 1.0])
    assert part.shape[0] == volume.shape[1] == 32 and part.any(axis=(1, 2)).sum() == 10
