"""Labels by a network's opinion and by the intensities of domain and image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.ndimage import gaussian_filter

from nnunet_uda.losses.prototypes import IGNORED
from nnunet_uda.training.intensity_posterior import (
    BINS,
    DEGREES,
    DOMAIN_SHARE,
    FLOOR,
    MOMENTUM,
    PERCENTILES,
    ROUNDS,
    SMALLEST_SCALE,
    SMOOTHING,
    IntensityPosterior,
)


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


def fitted(images: torch.Tensor, num_classes: int = 3) -> IntensityPosterior:
    """A posterior whose range is that of ``images`` [B, C, *S]."""
    posterior = IntensityPosterior(num_classes, images.shape[1])
    assert not posterior.has_range
    posterior.set_range(image.numpy() for image in images)
    assert posterior.has_range
    return posterior


class Slow:
    """The same by loops over channels, classes and positions."""

    def __init__(self, images: np.ndarray, classes: int):
        flat = np.moveaxis(images, 1, 0).reshape(images.shape[1], -1)
        self.ranges = [np.percentile(channel, PERCENTILES) for channel in flat]
        self.domain = np.zeros((len(flat), classes, BINS))

    def bins(self, channel: np.ndarray, index: int) -> np.ndarray:
        low, high = self.ranges[index]
        return np.clip((channel.ravel() - low) / (high - low) * BINS, 0, BINS - 1).astype(int)

    def histogram(self, bins: np.ndarray, weights: np.ndarray) -> np.ndarray:
        reach = round(3 * SMOOTHING)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTHING) ** 2)
        counts = np.bincount(bins, weights=weights, minlength=BINS)
        return np.convolve(np.pad(counts, reach, mode="edge"), kernel / kernel.sum(), mode="valid")

    def student_t(self, shares: np.ndarray) -> np.ndarray:
        lower, median, upper = (np.searchsorted(shares.cumsum(), share) for share in (0.16, 0.5, 0.84))
        found = stats.t.pdf(np.arange(BINS), DEGREES, loc=median, scale=max(SMALLEST_SCALE, (upper - lower) / 2))
        return found / found.sum()

    def observe(self, labels: np.ndarray, images: np.ndarray) -> None:
        new = np.zeros_like(self.domain)
        for label, image in zip(labels, images, strict=True):
            for c, channel in enumerate(image):
                for k in range(new.shape[1]):
                    new[c, k] += self.histogram(self.bins(channel, c), (label.ravel() == k).astype(float))
        self.domain = MOMENTUM * self.domain + (1 - MOMENTUM) * new

    def __call__(self, probabilities: np.ndarray, image: np.ndarray) -> np.ndarray:
        """[K, *S] and [C, *S] to [K, *S]."""
        classes = len(probabilities)
        prior = np.clip(probabilities.reshape(classes, -1), 1e-6, None)
        prior = prior / prior.sum(0)
        posterior = prior
        for _ in range(ROUNDS):
            new = np.log(prior)
            for c, channel in enumerate(image):
                found = self.bins(channel, c)
                for k in range(classes):
                    histogram = self.histogram(found, posterior[k])
                    if self.domain[c, k].sum() > 0:
                        histogram = histogram + DOMAIN_SHARE * len(found) * self.domain[c, k] / self.domain[c, k].sum()
                    histogram = histogram + (FLOOR * histogram.sum() + FLOOR) / BINS
                    shares = histogram / histogram.sum()
                    new[k] += np.log(shares if k == 0 else self.student_t(shares))[found] / len(image)
            posterior = np.exp(new - new.max(0))
            posterior = posterior / posterior.sum(0)
        return posterior.reshape(probabilities.shape)


@pytest.mark.parametrize("size", [(24, 20), (10, 14, 12)])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("observed", [False, True])
def test_it_equals_the_loops(size, channels, observed):
    image, label, opinion = scene(*size)
    other = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    images = torch.cat([image, other][:channels], 1)
    images = torch.cat([images, images * 0.7 - 1])
    posterior, slow = fitted(images), Slow(images.numpy(), 3)
    if observed:
        labels = torch.stack([label, label.clone().fill_(2)])
        labels[:, :5] = IGNORED
        for _ in range(2):
            posterior.observe(labels, images)
            slow.observe(labels.numpy(), images.numpy())
        np.testing.assert_allclose(posterior.domain.numpy(), slow.domain, rtol=1e-4, atol=1e-4)
    found = posterior(torch.cat([opinion, opinion.flip(2)]), images)
    assert found.shape == (2, 3, *size) and found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(2, *size))
    np.testing.assert_allclose(found[0].numpy(), slow(opinion[0].numpy(), images[0].numpy()), atol=1e-3)
    np.testing.assert_allclose(found[1].numpy(), slow(opinion[0].flip(1).numpy(), images[1].numpy()), atol=1e-3)


@pytest.mark.parametrize("contrast", [4.0, -4.0])
@pytest.mark.parametrize("size", [(48, 48), (16, 24, 24)])
def test_edges_move_from_where_the_network_has_them_to_where_the_image_has_them(size, contrast):
    image, label, opinion = scene(*size, contrast=contrast)
    before = (opinion.argmax(1)[0] == label).float().mean()
    after = (fitted(image)(opinion, image).argmax(1)[0] == label).float().mean()
    assert before < 0.95 and after > 0.99


def test_a_false_label_grows_by_the_image_alone_and_not_once_the_domain_is_known():
    """An image without the structure, in which the network calls a few positions it: everything that has their
    intensity would follow, unless the domain knows which intensity the structure has."""
    generator = torch.Generator().manual_seed(0)
    image = 0.3 * torch.randn(1, 1, 48, 48, generator=generator)  # background around 0
    image[..., 24:] += 2  # other background, around 2: no structure
    opinion = torch.full((1, 2, 48, 48), 0.02)
    opinion[:, 0] = 0.98
    opinion[:, 0, :, 36:], opinion[:, 1, :, 36:] = 0.6, 0.4  # unsure; a few are called the structure
    opinion[:, 0, :12, 36:], opinion[:, 1, :12, 36:] = 0.4, 0.6
    with_structure = 0.3 * torch.randn(1, 1, 48, 48, generator=generator)
    with_structure[..., 24:] += 2
    with_structure[..., :12, :12] += 5
    label = torch.zeros(1, 48, 48, dtype=torch.int64)
    label[:, :12, :12] = 1
    posterior = fitted(torch.cat([image, with_structure]), 2)
    assert (posterior(opinion, image).argmax(1) == 1).sum() > 300
    for _ in range(3):
        posterior.observe(label, with_structure)
    assert (posterior(opinion, image).argmax(1) == 1).sum() == 0
    sees = torch.full((1, 2, 48, 48), 0.5)
    assert (posterior(sees, with_structure).argmax(1) == label).float().mean() > 0.97


def test_an_error_that_is_a_second_mode_goes():
    """A fifth of what the network calls the rim has the intensity of the inside: a rim has one intensity."""
    generator = torch.Generator().manual_seed(0)
    label = torch.ones(1, 64, 64, dtype=torch.int64)
    label[:, 4:-4, 4:-4] = 2
    image = (torch.where(label == 1, 3.0, 1.0) + 0.3 * torch.randn(1, 64, 64, generator=generator))[:, None]
    wide = torch.full((1, 64, 64), 1)
    wide[:, 5:-5, 5:-5] = 2
    opinion = torch.nn.functional.one_hot(wide, 3).movedim(-1, 1) * 0.8 + torch.tensor([0.0, 0.1, 0.1])[:, None, None]
    found = fitted(image)(opinion / opinion.sum(1, keepdim=True), image).argmax(1)
    assert (wide == label).float().mean() < 0.95 and (found == label).float().mean() > 0.99


def test_a_brighter_scan_still_has_its_own_intensities():
    image, label, opinion = scene(48, 48)
    brighter = image + 1.5
    posterior = fitted(torch.cat([image, brighter]))
    for _ in range(3):
        posterior.observe(label[None], image)
    assert (posterior(opinion, brighter).argmax(1)[0] == label).float().mean() > 0.97


def test_an_image_that_shows_nothing_leaves_the_opinion():
    _, _, opinion = scene(24, 24)
    posterior = IntensityPosterior(3, 1)
    posterior.set_range([np.linspace(-1, 1, 100)[None]])
    for image in (torch.zeros(1, 1, 24, 24), torch.full((1, 1, 24, 24), 5.0)):
        torch.testing.assert_close(posterior(opinion, image), opinion, atol=0.1, rtol=0)
    constant = IntensityPosterior(3, 1)
    constant.set_range([np.zeros((1, 4, 4))])
    torch.testing.assert_close(constant(opinion, torch.zeros(1, 1, 24, 24)), opinion, atol=0.1, rtol=0)


def test_a_class_that_the_network_does_not_see_does_not_appear():
    image, _, opinion = scene(32, 32)
    opinion[:, 2] = 1e-7
    found = fitted(image)(opinion / opinion.sum(1, keepdim=True), image)
    assert found.isfinite().all() and (found.argmax(1) != 2).all()


def test_images_of_a_batch_do_not_mix():
    image, _, opinion = scene(32, 32)
    posterior = fitted(torch.cat([image, -image]))
    beside = posterior(opinion.repeat(2, 1, 1, 1), torch.cat([image, -image]))
    torch.testing.assert_close(beside[0], posterior(opinion, image)[0])


def test_half_precision_and_gradients():
    image, _, opinion = scene(16, 16)
    found = fitted(image)(opinion.half().requires_grad_(), image.half())
    assert found.dtype == torch.float32 and not found.requires_grad and found.isfinite().all()


def test_large_patches_are_counted_at_some_positions(monkeypatch):
    image, label, opinion = scene(20, 48, 48)
    posterior = fitted(image)
    posterior.observe(label[None], image)
    whole, domain = posterior(opinion, image), posterior.domain.clone()
    monkeypatch.setattr("nnunet_uda.training.intensity_posterior.POSITIONS", 4000)
    found = posterior(opinion, image)
    assert (found.argmax(1) == whole.argmax(1)).float().mean() > 0.99 and not torch.equal(found, whole)
    posterior.observe(label[None], image)
    shares = [each / each.sum(2, keepdim=True) for each in (posterior.domain - MOMENTUM * domain, domain)]
    torch.testing.assert_close(*shares, atol=0.02, rtol=0)
    assert (posterior.domain - MOMENTUM * domain).sum() < 0.2 * domain.sum()


def test_nothing_trusted_changes_nothing():
    image, label, _ = scene(16, 16)
    posterior = fitted(image)
    posterior.observe(torch.full_like(label, IGNORED)[None], image)
    assert (posterior.domain == 0).all()


def test_a_checkpoint_holds_the_domain_and_one_of_before_begins_anew():
    image, label, opinion = scene(16, 16)
    posterior, other = fitted(image), IntensityPosterior(3, 1)
    posterior.observe(label[None], image)
    other.load_state_dict(posterior.state_dict())
    assert other.has_range and torch.equal(other(opinion, image), posterior(opinion, image))
    whole = torch.nn.ModuleDict({"intensities": IntensityPosterior(3, 1), "rest": torch.nn.Linear(1, 1)})
    whole.load_state_dict({f"rest.{name}": value for name, value in whole["rest"].state_dict().items()})
    assert not whole["intensities"].has_range
