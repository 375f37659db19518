"""Labels by a network's opinion and the image's intensities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nnunet_uda.training.intensity_posterior import BINS, FLOOR, PERCENTILES, ROUNDS, SMOOTHING, intensity_posterior


def scene(*size: int, contrast: float = 4.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image [1, 1, *S] of two structures, their labels [*S], and a blurred, shifted opinion [1, 3, *S]."""
    rng = np.random.default_rng(seed)
    label = np.zeros(size, int)
    label[tuple(slice(n // 6, n // 2) for n in size)] = 1
    label[tuple(slice(n // 2, 5 * n // 6) for n in size)] = 2
    image = contrast * np.array([0.0, 2.0, 1.0])[label] + rng.normal(0, 0.5, size)
    opinion = np.stack([gaussian_filter(np.roll(label == k, 2, 0).astype(float), 3) for k in range(3)])
    opinion = (opinion + 0.02) / (opinion + 0.02).sum(0)
    return torch.from_numpy(image)[None, None].float(), torch.from_numpy(label), torch.from_numpy(opinion)[None].float()


def slow(probabilities: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The same by loops over classes and positions: [K, *S] and [C, *S] to [K, *S]."""
    classes = len(probabilities)
    prior = np.clip(probabilities.reshape(classes, -1), 1e-6, None)
    prior = prior / prior.sum(0)
    bins = []
    for channel in image.reshape(len(image), -1):
        low, high = np.quantile(channel, PERCENTILES)
        bins.append(np.clip(((channel - low) / (high - low) * BINS), 0, BINS - 1).astype(int))
    reach = round(3 * SMOOTHING)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTHING) ** 2)
    posterior = prior
    for _ in range(ROUNDS):
        new = np.log(prior)
        for found in bins:
            for k in range(classes):
                histogram = np.bincount(found, weights=posterior[k], minlength=BINS)
                histogram = np.convolve(np.pad(histogram, reach, mode="edge"), kernel / kernel.sum(), mode="valid")
                histogram = histogram + (FLOOR * histogram.sum() + FLOOR) / BINS
                new[k] += np.log(histogram / histogram.sum())[found] / len(bins)
        posterior = np.exp(new - new.max(0))
        posterior = posterior / posterior.sum(0)
    return posterior.reshape(probabilities.shape)


@pytest.mark.parametrize("size", [(24, 20), (10, 14, 12)])
@pytest.mark.parametrize("channels", [1, 2])
def test_it_equals_the_loops(size, channels):
    image, _, opinion = scene(*size)
    images = torch.cat([image, torch.randn_like(image)][:channels], 1)
    found = intensity_posterior(torch.cat([opinion, opinion.flip(2)]), torch.cat([images, images * 3 - 7]))
    assert found.shape == (2, 3, *size) and found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(2, *size))
    np.testing.assert_allclose(found[0].numpy(), slow(opinion[0].numpy(), images[0].numpy()), atol=1e-3)
    np.testing.assert_allclose(found[1].numpy(), slow(opinion[0].flip(1).numpy(), images[0].numpy()), atol=1e-3)


@pytest.mark.parametrize("contrast", [4.0, -4.0])
@pytest.mark.parametrize("size", [(48, 48), (16, 24, 24)])
def test_edges_move_from_where_the_network_has_them_to_where_the_image_has_them(size, contrast):
    image, label, opinion = scene(*size, contrast=contrast)
    before = (opinion.argmax(1)[0] == label).float().mean()
    after = (intensity_posterior(opinion, image).argmax(1)[0] == label).float().mean()
    assert before < 0.95 and after > 0.99


def test_an_image_that_shows_nothing_leaves_the_opinion():
    _, _, opinion = scene(24, 24)
    for image in (torch.zeros(1, 1, 24, 24), torch.full((1, 1, 24, 24), 5.0)):
        torch.testing.assert_close(intensity_posterior(opinion, image), opinion, atol=1e-3, rtol=1e-3)


def test_a_class_that_the_network_does_not_see_does_not_appear():
    image, _, opinion = scene(32, 32)
    opinion[:, 2] = 1e-7
    found = intensity_posterior(opinion / opinion.sum(1, keepdim=True), image)
    assert found.isfinite().all() and (found.argmax(1) != 2).all()


def test_each_image_has_its_own_intensities():
    image, _, opinion = scene(32, 32)
    alone = intensity_posterior(opinion, image)
    beside = intensity_posterior(opinion.repeat(2, 1, 1, 1), torch.cat([image, -image]))
    torch.testing.assert_close(beside[0], alone[0])


def test_half_precision_and_gradients():
    image, _, opinion = scene(16, 16)
    found = intensity_posterior(opinion.half().requires_grad_(), image.half())
    assert found.dtype == torch.float32 and not found.requires_grad and found.isfinite().all()
