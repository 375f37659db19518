"""Prototypes, L_sc and L_dc against loops over images, classes and positions."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch

from nnunet_uda.losses.prototypes import (
    IGNORED,
    class_prototypes,
    confident_labels,
    inter_class_loss,
    intra_class_loss,
    labels_at,
)

SHAPES = [(6, 5), (3, 6, 5)]


def embedding_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(batch: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Classes 0 to 3 with ignored positions; class 1 is rare and class 2 absent in image 0, class 3 absent in all."""
    labels = torch.randint(IGNORED, 3, (batch, *shape), generator=torch.Generator().manual_seed(1))
    labels[0][labels[0] > 0] = 0
    labels[0].flatten()[torch.tensor([4, 11])] = 1
    return labels


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


def reference_prototypes(embedding, labels, num_classes, min_positions) -> dict[tuple[int, int], list[float]]:
    """Unit vectors by (image, class)."""
    prototypes = {}
    for b, k in product(range(len(embedding)), range(num_classes)):
        places = [p for p in product(*map(range, labels.shape[1:])) if labels[(b, *p)] == k]
        if len(places) < max(min_positions, 1):
            continue
        mean = [sum(embedding[(b, d, *p)].item() for p in places) / len(places) for d in range(embedding.shape[1])]
        length = math.sqrt(sum(x * x for x in mean))
        prototypes[b, k] = [x / length for x in mean]
    return prototypes


@pytest.mark.parametrize("shape", SHAPES)
def test_confident_labels_equal_the_loop(shape: tuple[int, ...]) -> None:
    probabilities = embedding_of(2, 3, *shape).mul(2).softmax(1).requires_grad_()
    for threshold in (0.4, 0.7, 0.95):
        labels = confident_labels(probabilities, threshold)
        assert labels.dtype == torch.int64
        assert not labels.requires_grad
        for place in product(range(2), *map(range, shape)):
            values = [probabilities[(place[0], k, *place[1:])].item() for k in range(3)]
            expected = values.index(max(values)) if max(values) > threshold else IGNORED
            assert labels[place] == expected
        assert {IGNORED, 0, 1, 2} >= set(labels.unique().tolist()) > {IGNORED}


def test_thresholds_0_and_1() -> None:
    probabilities = embedding_of(2, 3, 6, 5).softmax(1)
    probabilities[0, :, 0, 0] = torch.tensor([0.0, 1.0, 0.0])  # even certainty is not over 1
    probabilities[0, :, 0, 1] = torch.full((3,), 1 / 3)
    assert torch.equal(confident_labels(probabilities, 0), probabilities.argmax(1))
    assert (confident_labels(probabilities, 1) == IGNORED).all()


def test_a_probability_equal_to_the_threshold_is_not_over_it() -> None:
    probabilities = torch.tensor([[0.25, 0.5], [0.75, 0.5]])[None]
    assert confident_labels(probabilities, 0.75).tolist() == [[IGNORED, IGNORED]]
    assert confident_labels(probabilities, 0.5).tolist() == [[1, IGNORED]]


@pytest.mark.parametrize(("patch", "size"), [((16, 12), (4, 3)), ((9, 7), (5, 4)), ((4, 9, 8), (4, 3, 2))])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_labels_at_take_the_nearest_voxel(patch: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype) -> None:
    label = torch.randint(-3, 5, (2, 1, *patch), generator=torch.Generator().manual_seed(0), dtype=dtype)
    small = labels_at(label, size)
    assert small.shape == (2, *size)
    assert small.dtype == torch.int64
    for place in product(range(2), *map(range, size)):
        voxel = [i * n // m for i, n, m in zip(place[1:], patch, size, strict=True)]
        value = label[(place[0], 0, *voxel)].item()
        assert small[place] == (value if value >= 0 else IGNORED)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("min_positions", [1, 3, 8])
def test_prototypes_equal_the_loop(shape: tuple[int, ...], min_positions: int) -> None:
    embedding, labels = embedding_of(3, 4, *shape), labels_of(3, shape)
    prototypes, present = class_prototypes(embedding, labels, 4, min_positions)
    expected = reference_prototypes(embedding, labels, 4, min_positions)
    assert prototypes.shape == (3, 4, 4)
    for b, k in product(range(3), range(4)):
        assert present[b, k] == ((b, k) in expected)
        assert prototypes[b, k].tolist() == pytest.approx(expected.get((b, k), [0, 0, 0, 0]), abs=1e-6)
    assert present[0].tolist() == [True, min_positions == 1, False, False]


def test_min_positions_is_the_least_that_counts() -> None:
    labels = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])
    embedding = embedding_of(1, 4, 8)
    for least, expected in ((3, [1, 1, 0]), (4, [0, 1, 0]), (5, [0, 0, 0]), (1, [1, 1, 1]), (0, [1, 1, 1])):
        assert class_prototypes(embedding, labels, 3, least)[1].tolist() == [[bool(e) for e in expected]]
    assert class_prototypes(embedding, labels, 4, 0)[1].tolist() == [[True, True, True, False]]


def test_labels_beyond_the_classes_belong_to_none() -> None:
    embedding, labels = embedding_of(2, 4, 6, 5), labels_of(2, (6, 5))
    beyond = labels.masked_fill(labels == IGNORED, 7)
    prototypes, present = class_prototypes(embedding, labels, 3, 1)
    assert torch.equal(class_prototypes(embedding, beyond, 3, 1)[0], prototypes)
    assert torch.equal(
        intra_class_loss(embedding, beyond, prototypes, present),
        intra_class_loss(embedding, labels, prototypes, present),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("min_positions", [1, 3])
def test_l_sc_equals_the_loop(shape: tuple[int, ...], min_positions: int) -> None:
    embedding, labels = embedding_of(3, 4, *shape), labels_of(3, shape)
    own = reference_prototypes(embedding, labels, 4, min_positions)
    terms = []
    for place in product(range(3), *map(range, shape)):
        key = (place[0], labels[place].item())
        if key in own:
            terms.append(1 - cosine(embedding[(place[0], slice(None), *place[1:])].tolist(), own[key]))
    assert len(terms) < labels.numel()
    loss = intra_class_loss(embedding, labels, *class_prototypes(embedding, labels, 4, min_positions))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_l_sc_by_hand() -> None:
    # class 0 at a right angle around its prototype, cos 45 degrees each; class 1 exactly at its prototype
    embedding = torch.tensor([[[1.0, 0, -3, -5], [0, 1, 0, 0]]])
    labels = torch.tensor([[0, 0, 1, 1]])
    prototypes, present = class_prototypes(embedding, labels, 2, 1)
    assert torch.allclose(prototypes[0], torch.tensor([[0.5**0.5, 0.5**0.5], [-1, 0]]))
    loss = intra_class_loss(embedding, labels, prototypes, present)
    assert loss.item() == pytest.approx((1 - 0.5**0.5) * 2 / 4, rel=1e-5)


@pytest.mark.parametrize("min_positions", [1, 3])
def test_l_dc_equals_the_loop(min_positions: int) -> None:
    embedding, labels = embedding_of(3, 4, 6, 5), labels_of(3, (6, 5))
    own = reference_prototypes(embedding, labels, 4, min_positions)
    terms = []
    for b in range(3):
        for i, j in combinations([k for k in range(4) if (b, k) in own], 2):
            terms.append(max(0.0, cosine(own[b, i], own[b, j])))
    assert len(terms) == (7 if min_positions == 1 else 6)
    assert 0.0 in terms
    loss = inter_class_loss(*class_prototypes(embedding, labels, 4, min_positions))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_l_dc_by_hand() -> None:
    prototypes = torch.tensor([[[1.0, 0], [0.6, 0.8], [-1, 0]], [[1, 0], [0, 0], [1, 0]]])
    present = torch.tensor([[True, True, True], [True, False, True]])
    assert inter_class_loss(prototypes, present).item() == pytest.approx((0.6 + 0 + 0 + 1) / 4)
    # the same classes in two images are no pair
    assert inter_class_loss(prototypes[:, :1], present[:, :1]).item() == 0


def test_gradients_reach_the_embedding_at_classes_that_are_present() -> None:
    embedding, labels = embedding_of(2, 4, 6, 5).requires_grad_(), labels_of(2, (6, 5))
    prototypes, present = class_prototypes(embedding, labels, 4, 3)
    (intra_class_loss(embedding, labels, prototypes, present) + inter_class_loss(prototypes, present)).backward()
    assert torch.isfinite(embedding.grad).all()
    takes_part = (labels >= 0) & present[torch.arange(2)[:, None, None], labels.clamp(min=0)]
    assert 0 < takes_part.sum() < labels.numel()
    assert torch.equal(embedding.grad.abs().sum(1) > 0, takes_part)


@pytest.mark.parametrize("loss", ["l_sc", "l_dc"])
def test_each_loss_reaches_the_prototypes(loss: str) -> None:
    embedding, labels = embedding_of(1, 3, 4).abs(), torch.tensor([[0, 0, 1, 1]])  # abs: l_dc is above 0
    prototypes, present = class_prototypes(embedding, labels, 2, 1)
    prototypes.requires_grad_()
    if loss == "l_sc":
        intra_class_loss(embedding, labels, prototypes, present).backward()
    else:
        inter_class_loss(prototypes, present).backward()
    assert (prototypes.grad.abs().sum(2) > 0).all()


def test_l_sc_reaches_the_embedding_beside_the_prototypes() -> None:
    embedding, labels = embedding_of(1, 3, 4).requires_grad_(), torch.tensor([[0, 0, 1, IGNORED]])
    prototypes, present = class_prototypes(embedding_of(1, 3, 4, seed=1), labels, 2, 1)
    intra_class_loss(embedding, labels, prototypes, present).backward()
    assert (embedding.grad.abs().sum(1) > 0).tolist() == [[True, True, True, False]]


def test_no_gradient_through_pseudo_labels() -> None:
    logits = embedding_of(2, 3, 6, 5).requires_grad_()
    embedding = embedding_of(2, 4, 6, 5, seed=2).requires_grad_()
    labels = confident_labels(logits.softmax(1), 0.4)
    prototypes, present = class_prototypes(embedding, labels, 3, 1)
    (intra_class_loss(embedding, labels, prototypes, present) + inter_class_loss(prototypes, present)).backward()
    assert logits.grad is None
    assert embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("step", ["l_sc", "l_dc"])
def test_a_gradient_step_gathers_a_class_and_parts_the_classes(step: str) -> None:
    labels = labels_of(2, (6, 5))
    raw = embedding_of(2, 4, 6, 5).requires_grad_()

    def losses(embedding: torch.Tensor) -> torch.Tensor:
        prototypes, present = class_prototypes(embedding, labels, 4, 1)
        if step == "l_sc":
            return intra_class_loss(embedding, labels, prototypes, present)
        return inter_class_loss(prototypes, present)

    before = losses(raw)
    before.backward()
    assert losses(raw.detach() - raw.grad) < before


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_labels_or_images_everything_is_zero(batch: int, shape: tuple[int, ...]) -> None:
    embedding = embedding_of(batch, 4, *shape).requires_grad_()
    labels = torch.full((batch, *shape), IGNORED)
    prototypes, present = class_prototypes(embedding, labels, 3)
    assert prototypes.shape == (batch, 3, 4)
    assert not present.any()
    assert not prototypes.any()
    loss = intra_class_loss(embedding, labels, prototypes, present) + inter_class_loss(prototypes, present)
    assert loss.item() == 0
    loss.backward()
    assert not embedding.grad.any()  # NaN would be True
    assert confident_labels(torch.zeros(batch, 3, *shape), 0.5).shape == (batch, *shape)
    assert labels_at(labels[:, None], shape).shape == (batch, *shape)


def test_embedding_of_zeros_has_finite_gradients() -> None:
    embedding = torch.zeros(1, 4, 6, 5, requires_grad=True)
    labels = torch.zeros(1, 6, 5, dtype=torch.long)
    labels[:, 3:] = 1
    prototypes, present = class_prototypes(embedding, labels, 2)
    (intra_class_loss(embedding, labels, prototypes, present) + inter_class_loss(prototypes, present)).backward()
    assert torch.isfinite(embedding.grad).all()


def test_float32_inside_autocast() -> None:
    embedding, labels = embedding_of(2, 4, 6, 5), labels_of(2, (6, 5))
    prototypes, present = class_prototypes(embedding, labels, 4)
    expected = (
        prototypes,
        intra_class_loss(embedding, labels, prototypes, present),
        inter_class_loss(prototypes, present),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prototypes, present = class_prototypes(embedding, labels, 4)
        found = (
            prototypes,
            intra_class_loss(embedding, labels, prototypes, present),
            inter_class_loss(prototypes, present),
        )
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))
    half = embedding.bfloat16()
    assert class_prototypes(half, labels, 4)[0].dtype == torch.float32
    assert intra_class_loss(half, labels, prototypes, present).dtype == torch.float32
