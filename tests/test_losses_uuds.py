"""The equations of UUDS against slow references, and the readings of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from nnunet_uda.losses.domain_discrepancy import domain_discrepancy_loss
from nnunet_uda.losses.structure import shared_information
from nnunet_uda.losses.supervised_contrastive import supervised_contrastive_loss
from nnunet_uda.losses.uncertainty import (
    certain_pseudo_label,
    normalised_entropy,
    uncertain_segmentation_loss,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


# -- equations 1 and 2 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_domain_loss_is_a_softmax_over_similarities(tau):
    near, far, prompt = normal(3, 8), normal(3, 8, seed=1), normal(8, seed=2)
    expected = 0.0
    for a, b in zip(near.tolist(), far.tolist(), strict=True):
        s, t = (math.exp(cosine(x, prompt.tolist()) / tau) for x in (a, b))
        expected += -math.log(s / (s + t)) / 3
    assert domain_discrepancy_loss(near, far, prompt, tau).item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0


def test_the_printed_domain_loss_is_the_logarithm_of_a_softmax_over_distances():
    near, far, prompt, tau = normal(3, 8), normal(3, 8, seed=1), normal(8, seed=2), 0.3
    expected = 0.0
    for a, b in zip(near.tolist(), far.tolist(), strict=True):
        s, t = (math.exp((1 - cosine(x, prompt.tolist())) / tau) for x in (a, b))
        expected += math.log(s / (s + t)) / 3
    assert expected < 0
    assert domain_discrepancy_loss(near, far, prompt, tau, "printed").item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", ["similarity", "printed"])
def test_a_step_down_moves_source_to_the_prompt_and_target_away(form):
    source, target, prompt = (x.requires_grad_() for x in (normal(4, 8), normal(4, 8, seed=1), normal(8, seed=2)))
    domain_discrepancy_loss(source, target, prompt, form=form).backward()
    for vectors, sign in ((source, 1), (target, -1)):
        before = F.cosine_similarity(vectors, prompt[None])
        after = F.cosine_similarity(vectors - 0.01 * vectors.grad, prompt[None])
        moved = vectors.grad.norm(dim=1) > 1e-4
        assert moved.any() and (sign * (after - before)[moved] > 0).all()
    assert prompt.grad.abs().sum() > 0, "T^d learns the source's domain"


def test_the_default_domain_loss_rests_where_it_has_succeeded_and_the_printed_one_pulls_on():
    prompt = F.normalize(normal(8), dim=0)
    gradients = {}
    for form in ("similarity", "printed"):
        near = (prompt + 0.1 * normal(8, seed=1))[None].requires_grad_()
        domain_discrepancy_loss(near, -prompt[None], prompt, form=form).backward()
        gradients[form] = near.grad.norm().item()
    assert gradients["similarity"] < 1e-6 < gradients["printed"]


# -- equation 4 ----------------------------------------------------------------------------------------------------


def reference_contrast(z, labels, tau) -> list[float]:
    """-1/|P(i)| sum over P(i), pair by pair, for every i that counts."""
    z = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in z]
    dot = [[sum(a * b for a, b in zip(u, v, strict=True)) for v in z] for u in z]
    losses = []
    for i, label in enumerate(labels):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == label]
        if positives:
            total = sum(math.exp(dot[i][a] / tau) for a in others)
            losses.append(-sum(math.log(math.exp(dot[i][p] / tau) / total) for p in positives) / len(positives))
    return losses


@pytest.mark.parametrize("labels", [(1, 1, 0, 0), (1, 0, 0, 1, 0), (1, 1, 1, 0), (1, 1, 1, 1)])
def test_contrast_enumerated_by_hand(labels):
    z, tau = 3 * normal(len(labels), 6), 0.4
    expected = reference_contrast(z.tolist(), labels, tau)
    loss = supervised_contrastive_loss(z, torch.tensor(labels).bool(), tau)
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    alone = labels.count(0) == 1
    assert len(expected) == len(labels) - alone, "a slice that is the only one of its kind is skipped"


@pytest.mark.parametrize("labels", [(1, 0), (0,), ()])
def test_without_any_positive_pair_the_contrast_is_zero_with_a_graph(labels):
    z = normal(len(labels), 6).requires_grad_()
    loss = supervised_contrastive_loss(z, torch.tensor(labels).bool())
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_contrast_pulls_slices_of_one_kind_together():
    z, labels = normal(6, 4).requires_grad_(), torch.tensor([1, 1, 1, 0, 0, 0]).bool()
    before = supervised_contrastive_loss(z, labels, 0.5)
    (gradient,) = torch.autograd.grad(before, z)
    assert supervised_contrastive_loss(z - 0.1 * gradient, labels, 0.5) < before
    same = labels.float() * 2 - 1
    perfect = same[:, None] * F.normalize(normal(4, seed=3), dim=0)
    assert supervised_contrastive_loss(perfect, labels, 0.07).item() == pytest.approx(math.log(2), rel=1e-4)
    assert supervised_contrastive_loss(perfect, ~labels, 0.07).item() == pytest.approx(math.log(2), rel=1e-4)
    assert supervised_contrastive_loss(perfect.flip(0).roll(1, 0), labels, 0.07) > 2


# -- equations 5 to 8 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
def test_entropy_runs_from_0_to_1_for_any_number_of_classes(classes):
    certain = F.one_hot(torch.tensor([[0, classes - 1]]), classes).float().movedim(-1, 1)
    assert normalised_entropy(certain).abs().max() < 1e-6
    assert normalised_entropy(torch.full((1, classes, 3), 1 / classes)) == pytest.approx(torch.ones(1, 1, 3), abs=1e-5)
    p = normal(2, classes, 4).softmax(1)
    for b in range(2):
        for i in range(4):
            values = p[b, :, i].tolist()
            expected = -sum(v * math.log(v) for v in values) / math.log(classes)
            assert normalised_entropy(p)[b, 0, i].item() == pytest.approx(expected, abs=1e-5)


def test_nothing_is_certain_at_0_and_all_but_the_uniform_at_1():
    p = torch.cat([normal(1, 3, 5, 5).softmax(1), torch.full((1, 3, 5, 5), 1 / 3)])
    p[0, :, 0, 0] = torch.tensor([1.0, 0, 0])
    assert not certain_pseudo_label(p, 0.0)[1].any()
    label, mask = certain_pseudo_label(p, 1.0)
    assert mask[0].all()
    assert torch.equal(label.argmax(1), p.argmax(1)) and set(label.unique().tolist()) == {0, 1}
    some = certain_pseudo_label(p, 0.8)[1]
    assert torch.equal(some[:, :1], normalised_entropy(p) < 0.8) and some.any() and not some.all()


def test_the_printed_uncertainty_is_each_class_alone_and_its_label_soft():
    p = normal(1, 3, 4).softmax(1)
    label, mask = certain_pseudo_label(p, 0.3, "printed")
    assert torch.equal(label, p)
    for c in range(3):
        for i in range(4):
            y = p[0, c, i].item()
            assert mask[0, c, i].item() == (-y * math.log(y + 1e-9) < 0.3)


def reference_useg(logits, chi) -> float:
    p = logits.softmax(1)
    losses = []
    for c in range(1, p.shape[1]):
        overlap = size = predicted = 0.0
        for b in range(p.shape[0]):
            for i in range(p.shape[2]):
                values = p[b, :, i].tolist()
                if -sum(v * math.log(v) for v in values) / math.log(len(values)) < chi:
                    y = float(max(range(len(values)), key=values.__getitem__) == c)
                    overlap, size, predicted = overlap + y * values[c], size + y, predicted + values[c]
        if size:
            losses.append(1 - (2 * overlap + 1e-5) / (size + predicted + 1e-5))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("chi", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_useg_is_dice_inside_the_certain_mask(chi, classes):
    logits = 2.5 * normal(2, classes, 30)
    expected = reference_useg(logits, chi)
    assert uncertain_segmentation_loss(logits, chi).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert expected > 0


def test_useg_is_zero_with_a_graph_where_no_foreground_is_certain():
    background = torch.tensor([9.0, -9.0])[None, :, None].expand(1, 2, 6)
    for values, chi in ((normal(1, 2, 6), 0.0), (background, 0.5)):
        logits = values.clone().requires_grad_()
        loss = uncertain_segmentation_loss(logits, chi)
        loss.backward()
        assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_the_pseudo_label_is_detached_and_uncertain_positions_teach_nothing():
    logits = (2.5 * normal(1, 3, 40)).requires_grad_()
    chi = 0.5
    uncertain_segmentation_loss(logits, chi).backward()
    p = logits.detach().softmax(1).requires_grad_()
    label, mask = certain_pseudo_label(p, chi)
    assert not label.requires_grad and not mask.requires_grad
    uncertain = ~mask[0, 0]
    assert uncertain.any() and logits.grad[0][:, uncertain].abs().max() == 0
    assert logits.grad[0][:, ~uncertain].abs().max() > 0
    label, mask = label[:, 1:], mask[:, 1:]  # the gradient is that of Dice against a constant
    overlap, size = (label * mask * p[:, 1:]).sum((0, 2)), (label * mask).sum((0, 2))
    constant = (1 - (2 * overlap + 1e-5) / (size + (p[:, 1:] * mask).sum((0, 2)) + 1e-5)).mean()
    (of_p,) = torch.autograd.grad(constant, p)
    expected = p * (of_p - (of_p * p).sum(1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected.detach(), atol=1e-6, rtol=1e-4)


def test_the_printed_useg_has_a_soft_label_without_gradient():
    logits = normal(1, 2, 30).requires_grad_()
    p = logits.detach().softmax(1)[:, 1]
    mask = -p * (p + 1e-9).log() < 0.3
    expected = 1 - 2 * (p * p * mask).sum() / (2 * (p * mask).sum())
    loss = uncertain_segmentation_loss(logits, 0.3, "printed")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    y = p.clone().requires_grad_()
    (-2 * (p * y * mask).sum() / ((p * mask).sum() + (y * mask).sum())).backward()
    torch.testing.assert_close(logits.grad[:, 1], y.grad * p * (1 - p), atol=1e-6, rtol=1e-3)


# -- what is watched -----------------------------------------------------------------------------------------------


def smooth(seed: int = 0) -> torch.Tensor:
    return F.interpolate(normal(2, 1, 6, 6, seed=seed), size=(64, 64), mode="bilinear")


def test_structure_is_kept_by_any_contrast_and_lost_by_other_images():
    image = smooth()
    assert shared_information(image, image).item() == pytest.approx(1, abs=1e-5)
    assert shared_information(image, 3 - 2 * image).item() == pytest.approx(1, abs=1e-2), "bins' edges fall otherwise"
    assert shared_information(image, torch.ones_like(image)).item() == 0
    assert shared_information(image, smooth(seed=1)).item() < 0.2
    assert shared_information(image, normal(2, 1, 64, 64, seed=1)).item() < 0.1
    folded = shared_information(image, (image - image.mean()).abs()).item()
    noisy = shared_information(image, image + 0.1 * normal(2, 1, 64, 64, seed=2)).item()
    assert 0.4 < folded < 1 and 0.4 < noisy < 1


@pytest.mark.parametrize("size", [(64, 64), (24, 40)])
def test_shared_information_is_scikit_learns(size):
    from sklearn.metrics import normalized_mutual_info_score

    image, other = normal(2, 3, *size), normal(2, 3, *size, seed=1)
    other = other + image
    image[:, :, :8] = -1.0  # ties, as air has
    number = min(16, int((size[0] * size[1] / 4) ** 0.5) // 2)
    expected = []
    for a, b in zip(F.avg_pool2d(image, 2).flatten(0, 1), F.avg_pool2d(other, 2).flatten(0, 1), strict=True):
        bins = []
        for x in (a.flatten().tolist(), b.flatten().tolist()):
            ordered = sorted(x)
            edges = []
            for step in range(1, number):
                place = step / number * (len(x) - 1)
                low = int(place)
                edges.append(ordered[low] + (place - low) * (ordered[low + 1] - ordered[low]))
            bins.append([sum(value > edge + 1e-7 for edge in edges) for value in x])
        expected.append(normalized_mutual_info_score(*bins, average_method="geometric"))
    assert shared_information(image, other).item() == pytest.approx(sum(expected) / len(expected), abs=2e-3)


def test_losses_are_float32_and_finite_for_half_precision_logits():
    half = torch.bfloat16
    values = [
        domain_discrepancy_loss(normal(2, 4).to(half), normal(2, 4, seed=1).to(half), normal(4).to(half)),
        supervised_contrastive_loss(normal(4, 4).to(half), torch.tensor([1, 1, 0, 0]).bool()),
        uncertain_segmentation_loss((80 * normal(1, 2, 8)).to(half), 0.5),
    ]
    for value in values:
        assert value.dtype == torch.float32 and torch.isfinite(value)
