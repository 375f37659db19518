"""The search for contrasts in which a network is surer, against slow references and a network whose taste is known."""

import numpy as np
import pytest
import torch

from nnunet_uda.data.cluster_contrast import lowest_positions
from nnunet_uda.training import contrast_search
from nnunet_uda.training.contrast_search import (
    EVALUATIONS,
    SHARES,
    ContrastSearch,
    bred,
    expected_dice,
    look_up_between,
    number_of_evaluations,
    random_curves,
)

KNOWN = torch.tensor([-1.2, 0.0, 1.2])
"""Intensities of the three classes in the contrast that the network knows."""


def thirds(width: int) -> torch.Tensor:
    """[width]: 0, 1 and 2 in a third each."""
    return torch.arange(width).mul(3).div(width, rounding_mode="floor").long()


def knows_one_contrast(images: torch.Tensor) -> torch.Tensor:
    """Logits ``(B, 3, *S)`` of ``(B, C, *S)``, by intensity and, roughly, by place: sure only where the two agree."""
    intensities = KNOWN.view(1, 3, *[1] * (images.ndim - 2))
    by_intensity = -((images.mean(1, keepdim=True) - intensities) ** 2)
    place = torch.nn.functional.one_hot(thirds(images.shape[-1]), 3).T.float()
    return by_intensity + place.view(1, 3, *[1] * (images.ndim - 3), -1)


def domain(order: list[float], shape: tuple[int, ...], channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Four images whose classes lie in thirds along the last axis and have the intensities of ``order``; labels."""
    labels = thirds(shape[-1]).expand(4, 1, *shape)
    images = torch.tensor(order)[labels] + 0.15 * torch.randn(4, 1, *shape, generator=torch.Generator().manual_seed(0))
    return images.expand(4, channels, *shape).clone(), labels[:, 0]


def share_right(images: torch.Tensor, labels: torch.Tensor) -> float:
    return (knows_one_contrast(images).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("shape", [(24, 24), (6, 12, 12)])
@pytest.mark.parametrize("channels", [1, 2])
def test_it_finds_the_contrast_that_the_network_knows(shape, channels):
    images, labels = domain([0.3, 1.0, -1.3], shape, channels)
    search = ContrastSearch(4, [False] * channels)
    assert not search.searched and search(images) == []
    own, *better = search.search(knows_one_contrast, images.split(2), 60)
    assert search.searched and better == sorted(better, reverse=True) and 1 <= len(better) <= 4 and better[-1] > own
    views = search(images)
    assert len(views) == len(better) and all(view.shape == images.shape for view in views)
    assert share_right(images, labels) < 0.7 and share_right(views[0], labels) > 0.85
    assert expected_dice(knows_one_contrast, [views[0]]) == pytest.approx(better[0], abs=1e-5)


def test_breeding_finds_better_curves_than_drawing_as_many(monkeypatch):
    """On the average: one domain's best curve may be drawn by chance."""
    domains = [domain(order, (24, 24), channels)[0] for order in ([0.3, 1.0, -1.3], [1.2, -1.2, 0.0])
               for channels in (1, 2)]  # fmt: skip

    def mean_best() -> float:
        searches = [(ContrastSearch(1, [False] * images.shape[1]), images) for images in domains]
        return np.mean([search.search(knows_one_contrast, [images], 60)[1] for search, images in searches])

    bred_best = mean_best()
    monkeypatch.setattr(
        contrast_search, "bred", lambda parents, generator: random_curves(len(parents[0]), generator)
    )  # fmt: skip
    assert bred_best > mean_best() + 0.01


def test_a_network_that_knows_the_domain_as_it_is_gets_no_other_contrast():
    images, labels = domain([-1.2, 0.0, 1.2], (24, 24))
    search = ContrastSearch(4, [False])
    always = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float().log()
    assert search.search(lambda _: always, [images], 20) == [pytest.approx(1.0)]
    assert search.searched and search(images) == []


def test_curves_that_are_worth_no_more_than_the_image_are_let_go():
    images, _ = domain([0.3, 1.0, -1.3], (24, 24))
    search = ContrastSearch(3, [False])
    search.search(knows_one_contrast, [images], 60)
    before = search(images)
    search.review(knows_one_contrast, images.split(1))  # the network has not changed
    assert len(before) == 3 and all(map(torch.equal, before, search(images)))
    worth = [expected_dice(knows_one_contrast, [view]) for view in before]
    between = (worth[0] + worth[1]) / 2  # of the images as they are, once the network has learned them in part
    own = torch.zeros(1, 3, 1, 2)
    own[:, 1, :, 0] = own[:, 2, :, 1] = between / (2 - between)
    own[:, 0] = 1 - own.sum(1)
    own = own.log()
    search.review(lambda batch: own if torch.equal(batch, images) else knows_one_contrast(batch), [images])
    kept = [view for view, each in zip(before, worth, strict=True) if each > expected_dice(lambda _: own, [images])]
    assert len(kept) == len(search(images)) == 1 and all(map(torch.equal, kept, search(images)))
    search.review(lambda batch: torch.zeros(4, 3, 2, 2), [images])  # as sure of any image
    assert search.searched and search(images) == []


def test_expected_dice_against_a_loop():
    probabilities = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).mul(4).softmax(1)
    dice = []
    for k in (1, 2):
        overlap = expected = size = 0.0
        for p in probabilities.movedim(1, -1).reshape(-1, 3):
            expected += p[k].item()
            if p.argmax() == k:
                size, overlap = size + 1, overlap + p[k].item()
        dice.append(2 * overlap / (expected + size))
    found = expected_dice(torch.log, probabilities.split((1, 3)))
    assert found == pytest.approx(np.mean(dice), abs=1e-5)
    without = probabilities.clone()
    without[:, 2] = 0
    assert expected_dice(torch.log, [without]) < found  # a structure found nowhere counts 0


def test_the_same_network_and_patches_give_the_same_curves_whatever_was_drawn_before():
    images, _ = domain([0.3, 1.0, -1.3], (24, 24))
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        search = ContrastSearch(2, [False])
        search.search(knows_one_contrast, [images], 20)
        found.append(search.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    again = ContrastSearch(2, [False])
    again.load_state_dict(found[0])
    assert again.searched and all(map(torch.equal, again(images), search(images)))


def test_checkpoints_of_before_are_searched_anew():
    holder = torch.nn.ModuleDict({"contrasts": ContrastSearch(4, [False]), "rest": torch.nn.Linear(1, 1)})
    holder.load_state_dict({f"rest.{name}": value for name, value in holder["rest"].state_dict().items()})
    assert not holder["contrasts"].searched


def test_statistics_stay_the_lowest_stays_the_lowest_and_masked_channels_stay_0():
    images, _ = domain([0.3, 1.0, -1.3], (24, 24), 2)
    images[:, :, :6] = -3.0  # air
    images[:, 1, :, :5] = 0.0  # outside of the mask of the second channel
    search = ContrastSearch(1, [False, True])
    search.search(knows_one_contrast, [images], 40)
    assert int(search.number) == 1
    (view,) = search(images)
    torch.testing.assert_close(view[:, 0].mean((1, 2)), images[:, 0].mean((1, 2)), atol=1e-4, rtol=0)
    torch.testing.assert_close(view[:, 0].std((1, 2)), images[:, 0].std((1, 2)), atol=1e-3, rtol=0)
    for changed, image in zip(view[:, 0], images[:, 0], strict=True):
        lowest = lowest_positions(image)
        assert lowest[:6].all() and changed[lowest].max() < changed[~lowest].min()
    assert (view[:, 1][images[:, 1] == 0] == 0).all() and (view[:, 1] != 0).any()


def test_what_is_outside_of_the_mask_does_not_count():
    images, _ = domain([0.3, 1.0, -1.3], (24, 24))
    images[:, :, :6] = -3.0  # air
    padded = torch.nn.functional.pad(images, (30, 30))
    curve = torch.rand(1, len(SHARES), generator=torch.Generator().manual_seed(0))
    alone, within = (ContrastSearch(1, [True]) for _ in range(2))
    alone._set_places([images])
    within._set_places([padded])
    torch.testing.assert_close(within.places, alone.places)
    torch.testing.assert_close(within._along(curve, padded)[..., 30:-30], alone._along(curve, images))


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_constant_images_stay_finite(value, masked):
    images = torch.full((2, 1, 8, 8), value)
    search = ContrastSearch(2, [masked])
    search.search(knows_one_contrast, [images], 10)
    assert all(torch.isfinite(view).all() for view in search(images))
    assert torch.isfinite(search._along(torch.rand(1, len(SHARES)), images)).all()


def test_lookup_is_linear_between_places_and_flat_beyond():
    places, nodes = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 2.0, 1.0])
    values = torch.tensor([[-5.0, 0.0, 0.5], [1.0, 2.0, 9.0]])
    expected = np.interp(values.numpy(), places.numpy(), nodes.numpy())
    torch.testing.assert_close(look_up_between(nodes, places, values), torch.from_numpy(expected).float())


def test_curves_are_drawn_and_bred_within_0_and_1():
    generator = torch.Generator().manual_seed(0)
    drawn = [random_curves(2, generator) for _ in range(20)]
    children = [bred(drawn, generator) for _ in range(20)]
    for curve in (*drawn, *children):
        assert curve.shape == (2, len(SHARES)) and 0 <= curve.min() and curve.max() <= 1
    assert any((curve.diff(dim=1) < 0).any() and (curve.diff(dim=1) > 0).any() for curve in drawn)
    one = [drawn[0]]
    assert len({tuple(bred(one, generator).flatten().tolist()) for _ in range(5)}) == 5


def test_a_short_schedule_tries_fewer():
    assert number_of_evaluations(1) == EVALUATIONS[0] and number_of_evaluations(10**6) == EVALUATIONS[1]
    assert number_of_evaluations(1000) == 40
