"""Criteria without labels against loops over single pixels."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_uda.training.criteria import (
    HIGHER_IS_BETTER,
    TargetCriteria,
    agreement,
    entropy,
    foreground_entropy,
    mutual_information,
    sample_pixels,
    snd,
)


def random_probabilities(*shape: int, seed: int = 0, sharpness: float = 2.0) -> torch.Tensor:
    return (sharpness * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).softmax(1)


def certain(segmentation: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(segmentation, num_classes).movedim(-1, 1).float()


def pixels(probabilities: torch.Tensor) -> list[list[float]]:
    return probabilities.flatten(2).transpose(1, 2).flatten(0, 1).tolist()


def plain_entropy(p: list[float]) -> float:
    return -sum(value * math.log(value) for value in p if value > 0) / math.log(len(p))


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 4, 3, 5)])
def test_entropies_equal_loops_over_pixels(shape: tuple[int, ...]) -> None:
    probabilities = random_probabilities(*shape)
    every = [plain_entropy(p) for p in pixels(probabilities)]
    found = [plain_entropy(p) for p in pixels(probabilities) if max(p) != p[0]]
    shares = [sum(p[k] for p in pixels(probabilities)) / len(every) for k in range(shape[1])]
    mean = sum(every) / len(every)
    assert entropy(probabilities).item() == pytest.approx(mean, rel=1e-5)
    assert foreground_entropy(probabilities).item() == pytest.approx(sum(found) / len(found), rel=1e-5)
    assert mutual_information(probabilities).item() == pytest.approx(plain_entropy(shares) - mean, rel=1e-4)


def test_entropies_of_certain_uniform_and_empty_predictions() -> None:
    segmentation = torch.tensor([[[0, 1], [2, 1]]])
    sure, uniform = certain(segmentation, 3), torch.full((1, 3, 2, 2), 1 / 3)
    assert entropy(sure).item() == pytest.approx(0, abs=1e-6)
    assert foreground_entropy(sure).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information(sure).item() == pytest.approx(plain_entropy([0.25, 0.5, 0.25]), abs=1e-5)
    assert entropy(uniform).item() == pytest.approx(1) and mutual_information(uniform).item() < 1e-6
    nothing = certain(torch.zeros_like(segmentation), 3)
    assert entropy(nothing).item() == pytest.approx(0, abs=1e-6)  # why the others exist
    assert foreground_entropy(nothing).item() == 1
    assert mutual_information(nothing).item() < 1e-6


def test_agreement_equals_a_loop_over_classes() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randint(0, 4, (3, 5, 6), generator=generator) for _ in range(2))
    expected = []
    for k in (1, 2, 3):
        a, b = ({i for i, value in enumerate(x.flatten().tolist()) if value == k} for x in (first, second))
        expected.append(2 * len(a & b) / (len(a) + len(b)))
    assert agreement(first, second, 4).item() == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert agreement(first, first, 4).item() == 1


def test_finding_nothing_is_no_agreement() -> None:
    nothing = torch.zeros(2, 4, 4, dtype=torch.long)
    one = nothing.clone()
    one[:, :2] = 1
    assert agreement(nothing, nothing, 3).item() == 0
    assert agreement(one, nothing, 3).item() == 0
    assert agreement(one, one, 3).item() == pytest.approx(0.5)  # class 2 is found by neither
    assert agreement(one, one, 2).item() == 1


def slow_snd(vectors: list[list[float]], temperature: float) -> float:
    """Eqs 1 to 3 of the paper, one pixel and one exponential at a time."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    total = 0.0
    for i, vector in enumerate(vectors):
        raised = [math.exp(cosine(vector, v) / temperature) for j, v in enumerate(vectors) if j != i]
        total -= sum(e / sum(raised) * math.log(e / sum(raised)) for e in raised)
    return total / len(vectors) / math.log(len(vectors) - 1)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_snd_equals_its_equations(temperature: float) -> None:
    vectors = random_probabilities(9, 4)
    assert snd(vectors, temperature).item() == pytest.approx(slow_snd(vectors.tolist(), temperature), rel=1e-4)
    pair = torch.stack([vectors, random_probabilities(9, 4, seed=1)])
    expected = sum(slow_snd(v.tolist(), temperature) for v in pair) / 2
    assert snd(pair, temperature).item() == pytest.approx(expected, rel=1e-4)


def test_snd_prefers_dense_neighbourhoods_and_falls_for_a_collapse() -> None:
    clustered = torch.eye(3).repeat_interleave(10, 0)
    collapsed = torch.eye(3)[:1].expand(30, 3)
    scattered = random_probabilities(30, 16, sharpness=4)
    assert snd(clustered).item() == pytest.approx(math.log(9) / math.log(29), abs=1e-5)
    assert snd(scattered) < snd(clustered) < snd(collapsed)
    assert snd(collapsed).item() == pytest.approx(1, abs=1e-5)


def test_pixels_are_drawn_the_same_way_each_time_and_leave_the_random_state_alone() -> None:
    probabilities = random_probabilities(2, 3, 8, 9)
    before = torch.get_rng_state()
    drawn = sample_pixels(probabilities, 20)
    assert torch.equal(drawn, sample_pixels(probabilities, 20)) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(drawn, sample_pixels(probabilities, 20, seed=1))
    assert drawn.shape == (2, 20, 3) and sample_pixels(probabilities, 1000).shape == (2, 72, 3)
    flat = probabilities.flatten(2).transpose(1, 2)
    places = [(flat[0] == vector).all(1).nonzero().item() for vector in drawn[0]]
    assert len(set(places)) == 20 and torch.equal(flat[1][places], drawn[1])


def test_gathering_batches_equals_one_pass_over_all_images() -> None:
    probabilities, again = random_probabilities(5, 3, 20, 30), random_probabilities(5, 3, 20, 30, seed=1).argmax(1)
    gathered = TargetCriteria(3)
    for part, part_again in zip(probabilities.split(2), again.split(2), strict=True):
        gathered.add(part, part_again)
    values = gathered.values()
    expected = {
        "entropy": entropy(probabilities),
        "foreground_entropy": foreground_entropy(probabilities),
        "mutual_information": mutual_information(probabilities),
        "agreement": agreement(probabilities.argmax(1), again, 3),
        "snd": snd(sample_pixels(probabilities)),
    }
    assert values.keys() == expected.keys() == HIGHER_IS_BETTER.keys()
    for name, value in values.items():
        assert value == pytest.approx(expected[name].item(), rel=1e-4), name


def test_a_network_that_finds_nothing_is_not_praised_for_it() -> None:
    nothing = torch.zeros(2, 8, 8, dtype=torch.long)
    gathered = TargetCriteria(3)
    gathered.add(certain(nothing, 3), nothing)
    values = gathered.values()
    assert (values["foreground_entropy"], values["agreement"]) == (1, 0) and values["mutual_information"] < 1e-6
    assert values["entropy"] < 1e-6 and values["snd"] == pytest.approx(1, abs=1e-5)  # these two do fall for it
