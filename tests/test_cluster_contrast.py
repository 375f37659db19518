"""Cluster contrasts: the order of tissues changes, anatomy and background stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_uda.data.cluster_contrast import cluster_centres, cluster_contrast, gaussian_blur


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def three_tissues(*size: int, background: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """An image [1, *size] of three bands with a little noise, and the band of each position [*size]."""
    band = (torch.arange(size[-1]) * 3 // size[-1]).expand(size)
    image = band + 0.05 * torch.randn(size, generator=seeded(0))
    if background is not None:
        image[:, : size[1] // 3] = background
        band = band.clone()
        band[:, : size[1] // 3] = -1
    return image[None].float(), band


@pytest.mark.parametrize("size", [(24, 30), (10, 12, 18)])
def test_the_order_of_three_tissues_becomes_any_of_the_six(size):
    image, band = three_tissues(*size)
    before = image.clone()
    orders = set()
    for seed in range(60):
        drawn = cluster_contrast(image, generator=seeded(seed))
        assert drawn.shape == image.shape and drawn.dtype == image.dtype and drawn.isfinite().all()
        orders.add(tuple(np.argsort([float(drawn[0][band == tissue].mean()) for tissue in range(3)])))
    assert len(orders) == 6
    assert torch.equal(image, before)


def test_edges_stay_where_they_are():
    """Within a tissue, away from its edges, values stay close together: nothing is moved."""
    image, band = three_tissues(24, 60)
    for seed in range(10):
        drawn = cluster_contrast(image, (3, 3), generator=seeded(seed))[0]
        inner = [drawn[4:-4, 20 * tissue + 5 : 20 * tissue + 15] for tissue in range(3)]
        between = torch.stack([part.mean() for part in inner]).std()
        within = torch.stack([part.std() for part in inner]).max()
        assert within < between or between < 0.1, "anatomy is lost"
    assert band.shape == drawn.shape


@pytest.mark.parametrize("value", [-1.5, 0.0])
def test_a_constant_background_stays_constant_and_the_darkest(value):
    image, band = three_tissues(24, 30, background=value)
    image[0][band >= 0] += 0.5 - image[0][band >= 0].min() + value
    for seed in range(10):
        drawn = cluster_contrast(image, generator=seeded(seed))[0]
        outside = drawn[band < 0]
        assert (outside == outside[0]).all() and outside[0] <= drawn[band >= 0].min()


def test_dark_air_with_noise_is_a_tissue_like_any_other():
    image, band = three_tissues(24, 30)
    brightest = {int(torch.stack([cluster_contrast(image, generator=seeded(seed))[0][band == tissue].mean()
                                  for tissue in range(3)]).argmax()) for seed in range(30)}  # fmt: skip
    assert 0 in brightest


def test_channels_are_drawn_by_themselves():
    image, _ = three_tissues(24, 30)
    drawn = cluster_contrast(image.repeat(2, 1, 1), generator=seeded(0))
    assert not torch.allclose(drawn[0], drawn[1])


def test_only_the_given_generator_is_used():
    image, _ = three_tissues(24, 30)
    state = torch.get_rng_state()
    first, second = (cluster_contrast(image, generator=seeded(5)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, cluster_contrast(image, generator=seeded(6)))


@pytest.mark.parametrize("image", [torch.full((1, 8, 8), 3.0), torch.zeros(2, 4, 4, 4)])
def test_images_without_contrast_stay(image):
    assert torch.equal(cluster_contrast(image, generator=seeded(0)), image)


def test_half_precision_keeps_its_type():
    image, _ = three_tissues(24, 30)
    assert cluster_contrast(image.half(), generator=seeded(0)).dtype == torch.float16


def test_centres_are_the_means_of_separate_groups():
    values = torch.cat([torch.randn(500, generator=seeded(1)) * 0.01 + centre for centre in (-2.0, 0.0, 5.0)])
    found = [cluster_centres(values, 3, seeded(seed)) for seed in range(10)]
    assert any(torch.allclose(centres, torch.tensor([-2.0, 0.0, 5.0]), atol=0.02) for centres in found)
    assert all((centres[1:] >= centres[:-1]).all() for centres in found)


@pytest.mark.parametrize("size", [(9, 11), (5, 7, 6)])
def test_the_blur_is_a_gaussian_of_its_width(size):
    point = torch.zeros(1, *[2 * side + 1 for side in size])
    point[(0, *size)] = 1.0
    blurred = gaussian_blur(point, 0.8)[0]
    assert blurred.sum().item() == pytest.approx(1.0, abs=1e-5)
    for axis, side in enumerate(size):
        profile = blurred.sum([other for other in range(len(size)) if other != axis])
        places = torch.arange(2 * side + 1) - side
        assert (profile * places).sum().item() == pytest.approx(0, abs=1e-5)
        assert (profile * places**2).sum().sqrt().item() == pytest.approx(0.8, abs=0.05)
    flat = torch.full((2, *size), 4.0)
    torch.testing.assert_close(gaussian_blur(flat, 0.8), flat)
    assert gaussian_blur(point, 0.1) is point
