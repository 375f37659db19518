"""Random styles: what they change, what they must leave, and where their randomness comes from."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from nnunet_uda.data.random_convolution import random_convolution
from nnunet_uda.data.random_style import (
    ClusterContrastTransform,
    LocationScaleTransform,
    RandomConvolutionTransform,
    StyleAugmentationSettings,
    ViewsTransform,
    bezier_curve,
    location_scale,
    look_up,
    quantiles,
    smooth_random_map,
    style_transforms,
    with_statistics_of,
)

TRANSFORMS = {
    "gin": RandomConvolutionTransform(),
    "pseudo-correlation": RandomConvolutionTransform(p_pseudo_correlation=1.0),
    "clusters": ClusterContrastTransform(),
    "global": LocationScaleTransform(),
    "all": style_transforms(StyleAugmentationSettings()),
}
SHAPES = [(1, 24, 20), (3, 24, 20), (2, 8, 16, 12)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A z-scored image [C, *S] and a segmentation [1, *S] with the labels 0, 1, 2."""
    image = torch.randn(shape, generator=seeded(seed))
    segmentation = torch.zeros((1, *shape[1:]), dtype=torch.int16)
    half = shape[-1] // 2
    segmentation[..., 2:8, 2:half] = 1
    segmentation[..., 2:8, half:-2] = 2
    image = image * 0.2 + segmentation - segmentation.float().mean()
    return image / image.std(), segmentation


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_changes_the_image_alone_and_anew_each_time(name, shape):
    image, segmentation = sample(*shape)
    before, label = image.clone(), segmentation.clone()
    np.random.seed(0)
    torch.manual_seed(0)
    results = []
    for _ in range(6):
        done = TRANSFORMS[name](image=image, segmentation=segmentation)
        assert torch.equal(done["segmentation"], label) and torch.equal(image, before)
        assert done["image"].shape == image.shape and done["image"].dtype == image.dtype
        assert done["image"].isfinite().all()
        results.append(done["image"])
    for first in range(6):
        for second in range(first):
            assert not torch.allclose(results[first], results[second], atol=1e-2)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_global_seeds_decide_everything_also_after_pickling(name):
    image, segmentation = sample(1, 24, 20)

    def styled(transform, seed: int) -> torch.Tensor:
        np.random.seed(seed)
        torch.manual_seed(seed)
        return torch.stack([transform(image=image, segmentation=segmentation)["image"] for _ in range(3)])

    copy = pickle.loads(pickle.dumps(TRANSFORMS[name]))
    assert torch.equal(styled(TRANSFORMS[name], 3), styled(copy, 3))
    assert not torch.allclose(styled(TRANSFORMS[name], 3), styled(copy, 4), atol=1e-2)


def test_numpy_alone_decides_what_is_drawn():
    """In nnU-Net's workers only numpy's state differs; torch's is the parent's in all of them."""
    image, _ = sample(1, 24, 20)
    results = []
    for seed in (1, 2):
        torch.manual_seed(0)
        np.random.seed(seed)
        results.append(RandomConvolutionTransform()(image=image)["image"])
    assert not torch.allclose(*results, atol=1e-2)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["gin", "pseudo-correlation", "clusters", "global"])
def test_statistics_are_kept_where_asked(name, keep):
    image, segmentation = sample(2, 24, 20)
    transform = pickle.loads(pickle.dumps(TRANSFORMS[name]))
    transform.keep_statistics = keep
    np.random.seed(0)
    same = []
    for _ in range(5):
        done = transform(image=image, segmentation=segmentation)["image"]
        same += [torch.allclose(function(done), function(image), atol=1e-4)
                 for function in (lambda x: x.mean((1, 2)), lambda x: x.std((1, 2)))]  # fmt: skip
    assert all(same) if keep else not any(same)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_foreground_keeps_its_place(dims):
    """Away from edges a flat structure stays flat, and where it was."""
    shape = (1, *[32] * dims)
    segmentation = torch.zeros(shape, dtype=torch.int16)
    segmentation[(0, *[slice(9, 23)] * dims)] = 1
    image = torch.where(segmentation > 0, 2.0, -0.5)
    inside, outside = (0, *[slice(14, 18)] * dims), (0, *[slice(5, 6)] * dims)
    np.random.seed(0)
    for name, transform in TRANSFORMS.items():
        for _ in range(4):
            done = transform(image=image, segmentation=segmentation)["image"]
            if name not in ("pseudo-correlation", "all"):  # a smooth map is not flat
                assert done[inside].std() < 1e-4 and done[0, 1:2].std() < done.std()
            if name == "gin":  # curves and clusters may bring two flat structures together
                assert (done[inside].mean() - done[outside].mean()).abs() > 1e-4
            gradient = (done[0].diff(dim=0).abs() > 0.2 * (done.max() - done.min())).nonzero()[:, 0]
            assert all(min(abs(int(row) - edge) for edge in (0, 8, 22, 31)) <= 4 for row in gradient)


# -- random convolutions ---------------------------------------------------------------------------------------------


def test_a_smooth_map_blends_two_random_networks():
    image, _ = sample(2, 24, 20)
    transform = RandomConvolutionTransform(p_pseudo_correlation=1.0, keep_statistics=False)
    found = transform.restyle(image, seeded(5))
    generator = seeded(5)
    torch.rand(1, generator=generator)
    first, second = random_convolution(torch.stack([image, image]), generator=generator)
    share = smooth_random_map((24, 20), generator=generator)
    torch.testing.assert_close(found, share * first + (1 - share) * second)
    at_most = torch.maximum(first, second) + 1e-5
    assert (found <= at_most).all() and not torch.allclose(first, second, atol=0.1)


@pytest.mark.parametrize("shape", [(64, 48), (8, 40, 40), (5, 5)])
def test_the_map_is_smooth_and_spans_0_to_1(shape):
    for seed in range(3):
        share = smooth_random_map(shape, generator=seeded(seed))
        assert share.shape == shape
        assert share.min() == 0 and share.max() == 1
        spacing = max(shape) / 4
        for axis in range(len(shape)):
            assert share.diff(dim=axis).abs().max() < 2 / spacing


def test_the_map_is_a_cubic_b_spline(monkeypatch):
    """Such a spline gives a straight line back where its control points lie on one."""
    ramp = torch.arange(7.0)[:, None].expand(7, 7)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: ramp)
    share = smooth_random_map((31, 31), generator=seeded(0))
    torch.testing.assert_close(share, torch.linspace(0, 1, 31)[:, None].expand(31, 31))


# -- location and scale ----------------------------------------------------------------------------------------------


def test_curves_are_bezier_curves_that_rise_from_0_to_1():
    curves = torch.stack([bezier_curve(seeded(seed)) for seed in range(50)])
    assert (curves[:, 0] == 0).all() and torch.allclose(curves[:, -1], torch.ones(50))
    assert (curves.diff(dim=1) >= 0).all()
    assert curves[:, 128].std() > 0.1
    (x1, y1), (x2, y2) = torch.rand(2, 2, generator=seeded(7)).tolist()
    for t in (0.1, 0.35, 0.5, 0.8):
        x, y = (3 * t * (1 - t) ** 2 * a + 3 * t**2 * (1 - t) * b + t**3 for a, b in ((x1, x2), (y1, y2)))
        assert look_up(curves[7], torch.tensor([x])).item() == pytest.approx(y, abs=0.01)


def test_look_up_is_linear_interpolation():
    curve = torch.tensor([0.0, 4.0, 5.0])
    found = look_up(curve, torch.tensor([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 2.0, 4.0, 4.5, 5.0, 5.0]))


def test_order_is_kept_and_the_range_is_not_left():
    image = torch.linspace(-2, 3, 400).view(1, 20, 20)
    for seed in range(10):
        found = location_scale(image, generator=seeded(seed)).flatten()
        steps = found.diff()
        assert (steps >= -1e-6).all() and steps.max() > 0
        assert found.min() >= -2 - 1e-5 and found.max() <= 3 + 1e-5


def test_at_least_a_fifth_of_the_image_stays_within_the_range():
    """The limit of the shift: the 20th percentile at 0 or above, the 80th at 1 or below, before scaling."""
    image = torch.linspace(-2, 3, 400).view(1, 20, 20)
    for seed in range(30):
        found = location_scale(image, generator=seeded(seed))
        assert (found < 3 - 1e-4).float().mean() > 0.15 and (found > -2 + 1e-4).float().mean() > 0.15


def test_flat_images_and_patches_outside_of_the_scan_stay():
    flat = torch.full((1, 8, 8), 3.0)
    outside = torch.full((1, 8, 8), -1, dtype=torch.int16)
    image = torch.randn(1, 8, 8)
    for name in ("global", "clusters"):
        assert torch.equal(TRANSFORMS[name](image=flat, segmentation=outside + 1)["image"], flat)
    for transform in TRANSFORMS.values():
        assert torch.equal(transform(image=image, segmentation=outside)["image"], image)


# -- parts -----------------------------------------------------------------------------------------------------------


def test_statistics_of_a_part():
    reference, image = torch.randn(2, 6, 6) * 3 + 1, torch.randn(2, 6, 6)
    where = torch.arange(6)[:, None].expand(6, 6) < 3
    found = with_statistics_of(reference, image, where)
    assert torch.equal(found[:, 3:], image[:, 3:])
    torch.testing.assert_close(found[:, :3].mean((1, 2)), reference[:, :3].mean((1, 2)))
    torch.testing.assert_close(found[:, :3].std((1, 2)), reference[:, :3].std((1, 2)))
    torch.testing.assert_close(with_statistics_of(reference, 7 * reference - 2), reference)


def test_quantiles_of_many_values_come_from_an_even_sample():
    values = torch.linspace(0, 1, 1_000_000)
    assert quantiles(values, (0.2, 0.8)) == pytest.approx([0.2, 0.8], abs=1e-4)


def test_settings_choose_the_transforms():
    def names(**settings: float) -> list[str]:
        chain = style_transforms(StyleAugmentationSettings(**settings)).transforms
        return [f"{type(step.transform).__name__} {step.apply_probability}" for step in chain]

    off = {f"{part}_probability": 0.0
           for part in ("cluster_contrast", "random_convolution", "global_location_scale")}  # fmt: skip
    assert names(**off) == []
    assert names(**off | {"random_convolution_probability": 0.3}) == ["RandomConvolutionTransform 0.3"]
    assert len(names()) == 3
    with pytest.raises(ValueError, match="pseudo_correlation_probability"):
        StyleAugmentationSettings(pseudo_correlation_probability=1.5)


def test_two_views_are_the_image_and_what_the_transform_makes_of_it():
    image, segmentation = sample(2, 24, 20)
    np.random.seed(2)
    views = ViewsTransform(TRANSFORMS["clusters"])(image=image, segmentation=segmentation)
    assert views["image"].shape == (4, 24, 20) and torch.equal(views["image"][:2], image)
    assert torch.equal(views["segmentation"], segmentation)
    np.random.seed(2)
    alone = TRANSFORMS["clusters"](image=image, segmentation=segmentation)["image"]
    assert torch.equal(views["image"][2:], alone) and not torch.equal(alone, image)


def test_a_transform_that_works_in_place_leaves_the_first_view():
    image, segmentation = sample(2, 24, 20)
    before = image.clone()
    views = ViewsTransform(lambda image, segmentation: {"image": image.add_(1.0)})(
        image=image, segmentation=segmentation
    )["image"]
    torch.testing.assert_close(views, torch.cat((before, before + 1)))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_outside_of_the_scan_nothing_changes(name):
    """nnU-Net's padding, and the outside of its mask, are 0 at prediction."""
    image, segmentation = sample(2, 24, 20)
    segmentation[:, :5], image[:, :5] = -1, 0
    np.random.seed(0)
    for _ in range(5):
        found = TRANSFORMS[name](image=image, segmentation=segmentation)["image"]
        background = segmentation[0] == 0
        assert (found[:, :5] == 0).all() and not torch.allclose(found[:, background], image[:, background], atol=1e-2)
