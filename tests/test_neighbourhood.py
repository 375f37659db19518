"""Soft neighbourhood density against its equations, and where it fails."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_uda.training.neighbourhood import sample_pixels, snd


def random_probabilities(*shape: int, seed: int = 0, sharpness: float = 2.0) -> torch.Tensor:
    return (sharpness * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).softmax(1)


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
