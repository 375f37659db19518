"""PatchNCE against loops written from CISFA's equations 2 to 4."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from nnunet_uda.errors import UDAError
from nnunet_uda.losses.patch_nce import PatchNCELoss, layers_patch_nce, position_weights
from nnunet_uda.networks.patch_projector import PatchProjector


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def reference(translated, source, weights=None, tau=0.2, negatives="both") -> float:
    """Eqs 2 to 4, one vector and one exponential at a time."""
    terms = []
    for b in range(translated.shape[0]):
        count = translated.shape[1]
        for i in range(count):
            u = translated[b, i]
            others = [source[b, j] for j in range(count) if j != i]
            if negatives == "both":
                others += [translated[b, j] for j in range(count) if j != i]
            positive = math.exp(float(u @ source[b, i]) / tau)
            total = positive + sum(math.exp(float(u @ v) / tau) for v in others)
            weight = 1.0 if weights is None else float(weights[b, i])
            terms.append(weight * -math.log(positive / total))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("negatives", ["both", "input"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tau", [0.2, 0.07])
def test_equals_the_equations(negatives: str, weighted: bool, tau: float) -> None:
    translated, source = unit(3, 7, 5), unit(3, 7, 5, seed=1)
    weights = torch.randint(1, 4, (3, 7), generator=torch.Generator().manual_seed(2)).float() if weighted else None
    loss = PatchNCELoss(tau, negatives)(translated, source, weights)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(reference(translated, source, weights, tau, negatives), rel=1e-5)


@pytest.mark.parametrize("shape", [(9, 6), (3, 9, 6)])
@pytest.mark.parametrize("negatives", ["both", "input"])
def test_through_the_projector_in_2d_and_3d(shape: tuple[int, ...], negatives: str) -> None:
    torch.manual_seed(0)
    projector = PatchProjector([2, 3], dim=8, num_patches=10)
    coarse = tuple((n + 1) // 2 for n in shape)
    source = [torch.randn(2, 2, *shape), torch.randn(2, 3, *coarse)]
    translated = [torch.randn_like(f) for f in source]
    label = torch.randint(0, 3, (2, 1, *shape))
    positions = projector.sample_positions(source)
    queries, keys = projector(translated, positions), projector(source, positions)
    for layer, where in enumerate(positions):
        size = source[layer].shape[2:]
        weights = position_weights(label, size, where, 2.0)
        # the same, by hand: index the maps with coordinates, apply that layer's MLP, weigh by the label of the position
        small = F.interpolate(label.float(), size=tuple(size), mode="nearest")
        slow_q, slow_k = torch.zeros(2, len(where), 8), torch.zeros(2, len(where), 8)
        slow_w = torch.zeros(2, len(where))
        for b in range(2):
            for i, flat in enumerate(where.tolist()):
                at = tuple(int(n) for n in torch.unravel_index(torch.tensor(flat), tuple(size)))
                slow_q[b, i] = F.normalize(projector.heads[layer](translated[layer][(b, slice(None), *at)]), dim=0)
                slow_k[b, i] = F.normalize(projector.heads[layer](source[layer][(b, slice(None), *at)]), dim=0)
                slow_w[b, i] = 2.0 if small[(b, 0, *at)] > 0 else 1.0
        assert torch.equal(weights, slow_w) and 1 < float(weights.mean()) < 2
        loss = PatchNCELoss(0.2, negatives)(queries[layer], keys[layer], weights)
        expected = reference(slow_q.detach(), slow_k.detach(), slow_w, 0.2, negatives)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_foreground_weight_adds_the_foreground_terms_once_more() -> None:
    translated, source = unit(1, 6, 4), unit(1, 6, 4, seed=1)
    weights = torch.tensor([[1.0, 2, 1, 2, 2, 1]])
    loss = PatchNCELoss()
    per_position = [loss(translated, source, 6 * torch.eye(6)[i : i + 1]).item() for i in range(6)]
    plain = sum(per_position) / 6
    assert loss(translated, source).item() == pytest.approx(plain, rel=1e-5)
    expected = (
        plain + (per_position[1] + per_position[3] + per_position[4]) / 6
    )  # divided by 6, not by sum(weights) = 9
    assert loss(translated, source, weights).item() == pytest.approx(expected, rel=1e-5)


def test_both_counts_the_translated_vectors_and_not_the_query_itself() -> None:
    u = torch.eye(4)[None, :2]  # two orthogonal queries, each equal to its own key
    e = math.exp(1 / 0.2)
    assert PatchNCELoss(0.2, "both")(u, u).item() == pytest.approx(-math.log(e / (e + 2)), rel=1e-4)
    assert PatchNCELoss(0.2, "input")(u, u).item() == pytest.approx(-math.log(e / (e + 1)), rel=1e-4)


def test_images_of_a_batch_are_not_each_others_negatives() -> None:
    translated, source = unit(2, 5, 4), unit(2, 5, 4, seed=1)
    loss = PatchNCELoss()
    halves = [loss(translated[i : i + 1], source[i : i + 1]).item() for i in range(2)]
    assert loss(translated, source).item() == pytest.approx(sum(halves) / 2, rel=1e-5)


@pytest.mark.parametrize("negatives", ["both", "input"])
def test_a_gradient_step_brings_positives_together(negatives: str) -> None:
    raw = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    keys = unit(2, 8, 6, seed=1).requires_grad_()
    queries = F.normalize(raw, dim=-1)
    before = PatchNCELoss(0.2, negatives)(queries, keys)
    before.backward()
    assert keys.grad is None
    moved = F.normalize(raw.detach() - 0.5 * raw.grad, dim=-1)
    assert PatchNCELoss(0.2, negatives)(moved, keys.detach()) < before
    assert (moved * keys).sum(-1).mean() > (queries * keys).sum(-1).mean()


def test_translated_negatives_carry_gradient() -> None:
    # only position 0 has weight: a gradient at the other queries can come from their role as negatives alone
    weights = torch.tensor([[1.0, 0, 0]])
    for negatives, flows in (("both", True), ("input", False)):
        queries = unit(1, 3, 4).requires_grad_()
        PatchNCELoss(0.2, negatives)(queries, unit(1, 3, 4, seed=1), weights).backward()
        assert bool(queries.grad[0, 1:].abs().sum() > 0) is flows
        assert torch.isfinite(queries.grad).all()


@pytest.mark.parametrize("negatives", ["both", "input"])
@pytest.mark.parametrize("tau", [0.2, 0.005])  # exp(1 / 0.005) is no float32
def test_the_gradient_is_that_of_the_equations(negatives: str, tau: float) -> None:
    weights = torch.tensor([[1.0, 2, 1, 3, 0], [2, 2, 1, 1, 1]])
    keys = unit(2, 5, 4, seed=1)
    queries, slow = unit(2, 5, 4).requires_grad_(), unit(2, 5, 4).double().requires_grad_()
    terms = []
    for b in range(2):
        for i in range(5):
            others = [keys[b, j].double() for j in range(5) if j != i]
            others += [slow[b, j] for j in range(5) if j != i] if negatives == "both" else []
            similarities = torch.stack([slow[b, i] @ v for v in (keys[b, i].double(), *others)]) / tau
            terms.append(weights[b, i] * (similarities.logsumexp(0) - similarities[0]))
    expected = 3 * torch.stack(terms).mean()
    loss = 3 * PatchNCELoss(tau, negatives)(queries, keys, weights)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(queries.grad.double(), slow.grad, rtol=1e-4, atol=1e-4 / tau)


@pytest.mark.parametrize("negatives", ["both", "input"])
@pytest.mark.parametrize("shape", [(2, 1, 4), (0, 5, 4), (2, 0, 4)])
def test_without_negatives_or_without_vectors_it_is_zero(negatives: str, shape: tuple[int, ...]) -> None:
    queries = unit(*shape).requires_grad_()
    loss = PatchNCELoss(0.2, negatives)(queries, unit(*shape, seed=1), torch.ones(shape[:2]))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert torch.isfinite(queries.grad).all()


def test_float32_inside_autocast() -> None:
    translated, source = unit(2, 9, 16), unit(2, 9, 16, seed=1)
    expected = PatchNCELoss()(translated, source)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = PatchNCELoss()(translated, source)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("size", "feature_shape"), [((8, 8), (4, 4)), ((9, 7), (5, 4)), ((5, 9, 7), (5, 5, 4)), ((7, 13), (7, 13))]
)
def test_position_weights_follow_the_nearest_label(size: tuple[int, ...], feature_shape: tuple[int, ...]) -> None:
    label = torch.randint(-1, 3, (3, 1, *size), generator=torch.Generator().manual_seed(0))
    positions = torch.randperm(math.prod(feature_shape))
    small = F.interpolate(label.float(), size=feature_shape, mode="nearest").flatten(1)
    expected = torch.where(small[:, positions] <= 0, 1.0, 2.5)
    assert torch.equal(position_weights(label, feature_shape, positions, 2.5), expected)


def test_what_is_not_labelled_has_no_foreground_weight() -> None:
    label = torch.tensor([[[[0, 1, 2, -1]]]])
    assert position_weights(label, (1, 4), torch.arange(4), 2.0).tolist() == [[1.0, 2.0, 2.0, 1.0]]


def test_layers_have_equal_shares_and_the_gradient_reaches_the_translation_alone() -> None:
    torch.manual_seed(0)
    projector = PatchProjector([2, 3], dim=8, num_patches=100)  # every position of both maps
    source = [torch.randn(2, 2, 4, 4, requires_grad=True), torch.randn(2, 3, 2, 2, requires_grad=True)]
    translated = [torch.randn_like(feature, requires_grad=True) for feature in source]
    label = torch.randint(-1, 2, (2, 1, 4, 4))
    loss = layers_patch_nce(PatchNCELoss(), projector, source, translated, label, 3.0)
    expected = []
    for layer, size in enumerate([(4, 4), (2, 2)]):
        everywhere = torch.arange(size[0] * size[1])
        positions = [everywhere if i == layer else torch.zeros(1, dtype=torch.int64) for i in range(2)]
        queries, keys = (projector(maps, positions)[layer].detach() for maps in (translated, source))
        expected.append(reference(queries, keys, position_weights(label, size, everywhere, 3.0)))
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-4)
    loss.backward()
    assert all(feature.grad is None for feature in source) and all(feature.grad.any() for feature in translated)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UDAError, match='"both"'):
        PatchNCELoss(negatives="all")
    with pytest.raises(UDAError, match="temperature"):
        PatchNCELoss(temperature=0.0)
