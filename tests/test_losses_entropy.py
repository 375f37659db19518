"""Entropy, weighted self-information and domain cross-entropy against slow references, in 2D and 3D."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from nnunet_uda.losses.entropy import domain_cross_entropy, entropy_loss, weighted_self_information
from nnunet_uda.losses.uncertainty import normalised_entropy

SHAPES = [(2, 3, 4, 5), (1, 2, 3, 2, 4), (2, 5, 3)]


def draw(*shape: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_and_loss_are_their_definition(shape: tuple[int, ...]) -> None:
    logits = draw(*shape)
    maps, total = weighted_self_information(logits), 0.0
    for image, *place in itertools.product(range(shape[0]), *map(range, shape[2:])):
        values = [math.exp(logits[(image, c, *place)]) for c in range(shape[1])]
        for c, value in enumerate(values):
            p = value / sum(values)
            expected = -p * math.log(p) / math.log(shape[1])
            assert maps[(image, c, *place)].item() == pytest.approx(expected, abs=1e-6)
            total += expected
    assert entropy_loss(logits).item() == pytest.approx(total / (shape[0] * math.prod(shape[2:])), rel=1e-5)
    torch.testing.assert_close(maps.sum(1, keepdim=True), normalised_entropy(logits.softmax(1)))


def test_range() -> None:
    assert entropy_loss(torch.zeros(2, 4, 3, 3)).item() == pytest.approx(1)
    certain = torch.zeros(1, 4, 3, 3)
    certain[:, 1] = 200  # probabilities of exactly 0 and 1
    certain.requires_grad_()
    loss = entropy_loss(certain)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert torch.isfinite(certain.grad).all()
    assert (weighted_self_information(draw(2, 3, 9, scale=30)) >= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_down_makes_the_likeliest_class_likelier(shape: tuple[int, ...]) -> None:
    logits = draw(*shape).requires_grad_()
    entropy_loss(logits).backward()
    stepped = (logits - 10 * logits.grad).detach()
    assert torch.equal(stepped.argmax(1), logits.argmax(1))
    assert (stepped.softmax(1).amax(1) > logits.softmax(1).amax(1)).all()


@pytest.mark.parametrize("shape", [(7,), (2, 1, 3, 4), (2, 1, 2, 3, 4)])
def test_domain_cross_entropy_is_that_of_a_sigmoid(shape: tuple[int, ...]) -> None:
    logits = draw(*shape)
    for is_source in (True, False):
        values = [1 / (1 + math.exp(-v)) for v in logits.flatten().tolist()]
        expected = -sum(math.log(v if is_source else 1 - v) for v in values) / len(values)
        assert domain_cross_entropy(logits, is_source).item() == pytest.approx(expected, rel=1e-5)
    assert domain_cross_entropy(torch.zeros(shape), True).item() == pytest.approx(math.log(2))


def test_the_players_pull_in_opposite_directions_and_large_logits_stay_finite() -> None:
    for is_source, sign in ((True, -1), (False, 1)):
        logits = torch.tensor([-300.0, -1.0, 0.0, 1.0, 300.0], requires_grad=True)
        loss = domain_cross_entropy(logits, is_source)
        loss.backward()
        assert torch.isfinite(loss) and (logits.grad * sign >= 0).all() and logits.grad[2] * sign > 0


def test_float32_inside_autocast() -> None:
    logits = draw(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = entropy_loss(logits), domain_cross_entropy(logits, True)
    assert all(loss.dtype == torch.float32 for loss in losses)
    assert losses == (entropy_loss(logits), domain_cross_entropy(logits, True))
    assert entropy_loss(logits.half()).dtype == torch.float32


def test_weights_multiply_the_images_losses_of_a_domain_classifier():
    logits = torch.tensor([[[[0.5, -1.0]]], [[[2.0, 3.0]]]])
    each = [domain_cross_entropy(image, True) for image in logits]
    weighted = domain_cross_entropy(logits, True, torch.tensor([0.5, 1.5]))
    assert weighted.item() == pytest.approx(float(0.5 * each[0] + 1.5 * each[1]) / 2)
