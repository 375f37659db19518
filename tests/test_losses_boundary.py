"""Boundary loss against a loop over windows."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from nnunet_uda.losses.boundary import boundary_loss


def reference(probabilities, label, width) -> float:
    classes, shape = probabilities.shape[1], label.shape[2:]
    scores = []
    for k in range(1, classes):
        overlap = total = length = 0.0
        for b in range(len(label)):
            for place in product(*map(range, shape)):
                window = list(
                    product(
                        *(range(max(0, i - width), min(n, i + width + 1)) for i, n in zip(place, shape, strict=True))
                    )
                )
                soft = [probabilities[(b, k, *p)].item() for p in window]
                hard = [float(label[(b, 0, *p)] == k) for p in window]
                if any(label[(b, 0, *p)] < 0 for p in window):
                    continue
                p, y = max(soft) - min(soft), max(hard) - min(hard)
                overlap, total, length = overlap + p * y, total + p + y, length + y
        if length > 0:
            scores.append(1 - 2 * overlap / total)
    return sum(scores) / len(scores) if scores else 0.0


def blobs(shape: tuple[int, ...], batch: int = 2) -> torch.Tensor:
    """Class 1 in all images, class 3 in the last one, no class 2."""
    label = torch.zeros(batch, 1, *shape, dtype=torch.int64)
    label[..., 1:4, 2:5] = 1
    label[-1, ..., 5:7, :3] = 3
    return label


@pytest.mark.parametrize("shape", [(8, 7), (3, 8, 7)])
@pytest.mark.parametrize("width", [1, 2])
def test_equals_the_loop(shape: tuple[int, ...], width: int) -> None:
    probabilities = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(0)).softmax(1)
    loss = boundary_loss(probabilities, blobs(shape), width)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(reference(probabilities, blobs(shape), width), rel=1e-5)


def one_hot(label: torch.Tensor, classes: int = 4) -> torch.Tensor:
    return torch.nn.functional.one_hot(label[:, 0], classes).movedim(-1, 1).float()


@pytest.mark.parametrize("shape", [(8, 7), (3, 8, 7)])
def test_perfect_shifted_and_missing(shape: tuple[int, ...]) -> None:
    label = blobs(shape)
    perfect = boundary_loss(one_hot(label), label).item()
    near = boundary_loss(one_hot(label.roll(1, -1)), label).item()
    far = boundary_loss(one_hot(label.roll(3, -1)), label).item()
    assert perfect == pytest.approx(0, abs=1e-6)
    assert 0 < near < far < 1
    assert boundary_loss(one_hot(torch.zeros_like(label)), label).item() == pytest.approx(1)


def test_sums_run_over_the_batch() -> None:
    label = torch.zeros(2, 1, 8, 8, dtype=torch.int64)
    label[:, 0, 2:5, 2:5] = 1
    found = label.clone()
    found[1] = 0  # one of two equal boundaries is missed
    assert boundary_loss(one_hot(found, 2), label).item() == pytest.approx(1 - 2 * 1 / (1 + 2), rel=1e-5)


def test_classes_without_a_boundary_take_no_part() -> None:
    label = blobs((8, 7))
    probabilities = torch.randn(2, 4, 8, 7, generator=torch.Generator().manual_seed(0)).softmax(1)
    other = probabilities.clone()
    other[:, 2] = 0.5  # no label has class 2
    assert torch.equal(boundary_loss(probabilities, label), boundary_loss(other, label))
    for value in (0, 1, -1):  # everywhere the same class: the patch's edge is no boundary
        assert boundary_loss(probabilities, torch.full_like(label, value)).item() == 0


def test_values_above_the_classes_belong_to_none() -> None:
    label = blobs((8, 7))
    probabilities = torch.randn(2, 4, 8, 7, generator=torch.Generator().manual_seed(0)).softmax(1)
    other = torch.where(label == 0, torch.tensor([0, 0, 9, 0, 0, 0, 0]), label)
    assert torch.equal(boundary_loss(probabilities, label), boundary_loss(probabilities, other))


@pytest.mark.parametrize("shape", [(8, 7), (3, 8, 7)])
@pytest.mark.parametrize("width", [1, 2])
def test_where_nothing_is_known_nothing_counts(shape: tuple[int, ...], width: int) -> None:
    logits = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = blobs(shape)
    label[..., 5:, 4:] = -1
    loss = boundary_loss(logits.softmax(1), label, width)
    assert loss.item() == pytest.approx(reference(logits.detach().softmax(1), label, width), rel=1e-5)
    loss.backward()
    assert not logits.grad[..., 5:, 4:].any() and logits.grad[..., :2, :2].any()
    cut = torch.where(label == 1, -1, torch.zeros_like(label))  # the structure's own edge is that of what is labelled
    assert boundary_loss(logits.softmax(1), cut, width).item() == 0


def test_gradient_lowers_it_and_is_finite() -> None:
    label = blobs((8, 7))
    logits = torch.randn(2, 4, 8, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = boundary_loss(logits.softmax(1), label)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert boundary_loss((logits.detach() - logits.grad).softmax(1), label) < loss


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("predicted", [0.0, 0.25])
def test_without_foreground_it_is_zero_with_a_graph(batch: int, predicted: float) -> None:
    probabilities = torch.full((batch, 4, 8, 7), predicted, requires_grad=True)
    loss = boundary_loss(probabilities, torch.zeros(batch, 1, 8, 7, dtype=torch.int64))
    assert loss.item() == 0
    loss.backward()
    assert not probabilities.grad.any()


def test_float32_whatever_comes_in() -> None:
    label = blobs((8, 7))
    half = torch.randn(2, 4, 8, 7, generator=torch.Generator().manual_seed(0)).softmax(1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = boundary_loss(half, label.to(torch.int16))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, boundary_loss(half.float(), label))
