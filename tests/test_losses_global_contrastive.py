"""Global contrastive loss against loops written from CISFA's equation 5."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from nnunet_uda.errors import UDAError
from nnunet_uda.losses.global_contrastive import GlobalContrastiveLoss


def reference(z_source: torch.Tensor, z_translated: torch.Tensor, tau: float) -> float:
    """Eq 5; the pair of vector i is found by its (image, domain) name, not by arithmetic on indices."""
    z = {(i, "source"): v / v.norm() for i, v in enumerate(z_source)}
    z.update({(i, "translated"): v / v.norm() for i, v in enumerate(z_translated)})
    total = 0.0
    for (image, domain), vector in z.items():
        pair = z[image, "translated" if domain == "source" else "source"]
        denominator = 0.0
        for name, other in z.items():
            if name != (image, domain):
                denominator += math.exp(sum(float(a) * float(b) for a, b in zip(vector, other, strict=True)) / tau)
        total += math.log(math.exp(float(vector @ pair) / tau) / denominator)
    return -total / len(z)


@pytest.mark.parametrize("t", [1, 2, 5])
@pytest.mark.parametrize("tau", [0.2, 0.5])
def test_equals_the_equation(t: int, tau: float) -> None:
    torch.manual_seed(t)
    source, translated = 3 * torch.randn(t, 6), torch.randn(t, 6)
    loss = GlobalContrastiveLoss(tau)(source, translated)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(reference(source, translated, tau), rel=1e-5, abs=1e-6)


def test_pairs_are_rows_of_the_same_index() -> None:
    source = torch.eye(4)
    loss = GlobalContrastiveLoss()
    aligned = loss(source, source).item()
    e = math.exp(1 / 0.2)
    assert aligned == pytest.approx(-math.log(e / (e + 6)), rel=1e-4)
    assert loss(source, source.roll(1, 0)).item() > aligned + 3
    permutation = torch.tensor([2, 0, 3, 1])
    assert loss(source[permutation], source[permutation]).item() == pytest.approx(aligned, rel=1e-5)


def test_a_gradient_step_brings_pairs_together_from_both_sides() -> None:
    torch.manual_seed(0)
    source, translated = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    loss = GlobalContrastiveLoss()
    before = loss(source, translated)
    before.backward()
    assert source.grad.abs().sum() > 0 and translated.grad.abs().sum() > 0
    moved = source.detach() - 0.5 * source.grad, translated.detach() - 0.5 * translated.grad
    assert loss(*moved) < before
    assert F.cosine_similarity(*moved).mean() > F.cosine_similarity(source, translated).mean()


@pytest.mark.parametrize("t", [0, 1])
def test_without_negatives_it_is_zero(t: int) -> None:
    source = torch.ones(t, 3, requires_grad=True)
    loss = GlobalContrastiveLoss()(source, torch.rand(t, 3))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert torch.isfinite(source.grad).all()


def test_float32_inside_autocast() -> None:
    torch.manual_seed(0)
    source, translated = torch.randn(4, 32), torch.randn(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = GlobalContrastiveLoss()(source, translated)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, GlobalContrastiveLoss()(source, translated))


def test_wrong_temperature_is_named() -> None:
    with pytest.raises(UDAError, match="temperature"):
        GlobalContrastiveLoss(-1.0)
