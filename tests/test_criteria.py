"""Criteria without labels against loops over single pixels."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_uda.training.criteria import HIGHER_IS_BETTER, TargetCriteria
from nnunet_uda.training.neighbourhood import sample_pixels, snd


def random_probabilities(*shape: int, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).softmax(1)


def certain(segmentation: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(segmentation, num_classes).movedim(-1, 1).float()


def gathered(*batches: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    criteria = TargetCriteria(batches[0][0].shape[1])
    for probabilities, again in batches:
        criteria.add(probabilities, again)
    values = criteria.values()
    assert values.keys() == HIGHER_IS_BETTER.keys()
    return values


def plain_entropy(p: list[float]) -> float:
    return -sum(value * math.log(value) for value in p if value > 0) / math.log(len(p))


@pytest.mark.parametrize("shape", [(5, 4, 5, 6), (3, 3, 4, 3, 5)])
def test_entropies_of_batches_equal_loops_over_the_pixels_of_all(shape: tuple[int, ...]) -> None:
    probabilities = random_probabilities(*shape)
    pixels = probabilities.flatten(2).transpose(1, 2).flatten(0, 1).tolist()
    mean = sum(map(plain_entropy, pixels)) / len(pixels)
    found = [plain_entropy(p) for p in pixels if max(p) != p[0]]
    shares = [sum(p[k] for p in pixels) / len(pixels) for k in range(shape[1])]
    values = gathered(*((part, part.argmax(1)) for part in probabilities.split(2)))
    assert values["entropy"] == pytest.approx(mean, rel=1e-5)
    assert values["foreground_entropy"] == pytest.approx(sum(found) / len(found), rel=1e-5)
    assert values["mutual_information"] == pytest.approx(plain_entropy(shares) - mean, rel=1e-4)
    assert values["agreement"] == 1
    density = sum(snd(sample_pixels(image[None])).item() for image in probabilities) / len(probabilities)
    assert values["snd"] == pytest.approx(density, rel=1e-4)


def test_certain_and_uniform_predictions() -> None:
    segmentation = torch.tensor([[[0, 1], [2, 1]]])
    sure = gathered((certain(segmentation, 3), segmentation))
    assert sure["entropy"] == pytest.approx(0, abs=1e-6) == sure["foreground_entropy"]
    assert sure["mutual_information"] == pytest.approx(plain_entropy([0.25, 0.5, 0.25]), abs=1e-5)
    uniform = gathered((torch.full((1, 3, 2, 2), 1 / 3), segmentation))
    assert uniform["entropy"] == pytest.approx(1) and uniform["mutual_information"] < 1e-6


def test_agreement_of_batches_equals_a_loop_over_classes() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randint(0, 4, (3, 5, 6), generator=generator) for _ in range(2))
    expected = []
    for k in (1, 2, 3):
        a, b = ({i for i, value in enumerate(x.flatten().tolist()) if value == k} for x in (first, second))
        expected.append(2 * len(a & b) / (len(a) + len(b)))
    values = gathered(*((certain(a, 4), b) for a, b in zip(first.split(2), second.split(2), strict=True)))
    assert values["agreement"] == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_finding_nothing_is_no_agreement() -> None:
    nothing = torch.zeros(2, 4, 4, dtype=torch.long)
    one = nothing.clone()
    one[:, :2] = 1
    pairs = [(3, nothing, nothing, 0), (3, one, nothing, 0), (3, one, one, 0.5), (2, one, one, 1)]
    for num_classes, first, second, expected in pairs:  # of three classes, class 2 is found by neither
        assert gathered((certain(first, num_classes), second))["agreement"] == pytest.approx(expected)


def test_a_network_that_finds_nothing_is_not_praised_for_it() -> None:
    nothing = torch.zeros(2, 8, 8, dtype=torch.long)
    values = gathered((certain(nothing, 3), nothing))
    assert (values["foreground_entropy"], values["agreement"]) == (1, 0) and values["mutual_information"] < 1e-6
    assert values["entropy"] < 1e-6 and values["snd"] == pytest.approx(1, abs=1e-5)  # these two do fall for it
