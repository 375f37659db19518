"""The teacher, its pseudo labels, and when self-training starts."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunet_uda.losses.prototypes import IGNORED
from nnunet_uda.losses.pseudo_label import agreed_labels, class_thresholds, pseudo_label_loss
from nnunet_uda.training.self_training import Average, SelfTraining, class_shares, seen_in_views


def logits_of(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def likeness(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1].item()


# -- the teacher -----------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_exponential_average_of_parameters_and_buffers():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)) for _ in range(2))
    average = Average(0.6)
    expected = {name: value.clone() for name, value in teacher.state_dict().items()}
    for step in range(40):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        student(torch.randn(2, 1, 6, 6))
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in student.state_dict().items():
            floating = value.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * value if floating else value.clone()
        average.update(teacher, student)
    assert average.steps == 40 and teacher[1].num_batches_tracked == 40
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_weights_that_have_two_names_are_averaged_once():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(1, 1)
            self.second = self.first

    teacher, student = Shared(), Shared()
    nn.init.zeros_(teacher.first.weight)
    nn.init.ones_(student.first.weight)
    average = Average(0.5)
    average.steps.fill_(100)
    average.update(teacher, student)
    assert teacher.first.weight.item() == 0.5


# -- pseudo labels ---------------------------------------------------------------------------------------------------


def test_thresholds_are_lower_for_classes_that_are_less_sure():
    found = class_thresholds(torch.tensor([0.98, 0.49, 0.735]), 0.9)
    torch.testing.assert_close(found, torch.tensor([0.9, 0.5, 0.675]))  # 0.45 would be less than a majority
    torch.testing.assert_close(class_thresholds(torch.tensor([1.0, 0.5]), 0.3), torch.tensor([0.3, 0.3]))


@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (2, 3, 4, 6, 5)])
def test_labels_are_where_views_agree_and_the_class_is_sure_enough(shape):
    probabilities = logits_of(*shape).requires_grad_().softmax(1)
    agreed = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(1)) < 0.7
    thresholds = torch.tensor([0.9, 0.5, 0.6])
    labels = agreed_labels(probabilities, agreed, thresholds)
    assert not labels.requires_grad and labels.dtype == torch.int64
    kept = 0
    for index in torch.ones_like(labels).nonzero().tolist():
        batch, *place = index
        values = [probabilities[(batch, k, *place)].item() for k in range(3)]
        best = max(range(3), key=values.__getitem__)
        good = agreed[tuple(index)].item() and values[best] > thresholds[best].item()
        assert labels[tuple(index)] == (best if good else IGNORED)
        kept += good
    assert 0 < kept < labels.numel()


def test_a_threshold_of_1_labels_nothing_and_0_all_that_is_agreed_upon():
    probabilities = logits_of(1, 3, 8, 8).softmax(1)
    everywhere = torch.ones(1, 8, 8, dtype=torch.bool)
    assert (agreed_labels(probabilities, everywhere, torch.ones(3)) == IGNORED).all()
    assert torch.equal(agreed_labels(probabilities, everywhere, torch.zeros(3)), probabilities.argmax(1))
    assert (agreed_labels(probabilities, ~everywhere, torch.zeros(3)) == IGNORED).all()


def test_a_class_that_is_never_sure_is_labelled_all_the_same():
    """Without thresholds of their own the small structures would be left out and become background."""
    state = SelfTraining(3, confidence=0.9, start=0.7, ramp_epochs=2)
    probabilities = torch.zeros(1, 3, 4, 8)
    probabilities[:, 0, :2], probabilities[:, 1, :2] = 0.99, 0.01
    probabilities[:, 1, 2:], probabilities[:, 0, 2:] = 0.7, 0.3
    agreed = torch.ones(1, 4, 8, dtype=torch.bool)
    assert (state.label(probabilities, agreed)[:, 2:] == IGNORED).all()
    for _ in range(300):
        state.observe_target(probabilities)
    labels = state.label(probabilities, agreed)
    assert (labels[:, :2] == 0).all() and (labels[:, 2:] == 1).all()
    assert state.class_confidence[2] == 1  # never seen: as at the start


def test_the_loss_equals_its_definition_and_reads_labelled_places_alone():
    logits = logits_of(2, 3, 5, 4)
    labels = torch.full((2, 5, 4), IGNORED)
    labels[0, :2], labels[1, 3, 1:3] = 0, 2
    places = (labels != IGNORED).nonzero().tolist()
    probabilities = logits.softmax(1)
    entropy = sum(-probabilities[b, labels[b, y, x], y, x].log() for b, y, x in places) / len(places)
    predicted = sum(probabilities[b, 2, y, x] for b, y, x in places)
    overlap = sum(probabilities[b, 2, y, x] for b, y, x in places if labels[b, y, x] == 2)
    dice = (2 * overlap + 1e-5) / (2 + predicted + 1e-5)  # class 1 is in no label
    found = pseudo_label_loss(logits.requires_grad_(), labels)
    torch.testing.assert_close(found, 0.5 * (entropy + 1 - dice))
    found.backward()
    assert (logits.grad.movedim(1, -1)[labels == IGNORED] == 0).all()
    assert (logits.grad[1, 2, 3, 1:3] < 0).all() and (logits.grad[0, 0, :2] < 0).all()


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 3, 2, 5, 4)])
def test_without_labels_the_loss_is_0_with_a_graph(shape):
    logits = logits_of(*shape).requires_grad_()
    loss = pseudo_label_loss(logits, torch.full((shape[0], *shape[2:]), IGNORED))
    assert loss == 0
    loss.backward()
    assert (logits.grad == 0).all()


def test_small_classes_count_as_much_as_large_ones_in_the_dice():
    labels = torch.zeros(1, 20, 20, dtype=torch.int64)
    labels[0, :10], labels[0, 15, 15] = 1, 2
    sure = 20 * F.one_hot(labels, 3).movedim(-1, 1).float()
    values = []
    for missed in (1, 2):
        logits = sure.masked_fill((labels == missed)[:, None], 0)
        logits[:, 0] += 20 * (labels == missed)
        values.append(pseudo_label_loss(logits, labels).item() - 0.5 * F.cross_entropy(logits, labels).item())
    assert values == pytest.approx([0.25, 0.25], abs=0.01)


# -- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_views_are_mirrored_back_and_their_mean_is_taken(dims):
    torch.manual_seed(0)
    images = torch.randn(2, 1, *[6] * dims)
    seen = []

    def predict(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.cat([x, -x], 1) * 3

    probabilities, agreed = seen_in_views(predict, images, 4, list(range(dims)))
    assert torch.equal(seen[0], images) and len(seen) == 4
    expected, classes = [], []
    for view in seen:  # undo the mirroring by trying all of them
        subsets = [axes for n in range(dims + 1) for axes in combinations(range(2, dims + 2), n)]
        back = max((view.flip(axes) for axes in subsets), key=lambda x: likeness(x, images))
        expected.append((torch.cat([back, -back], 1) * 3).softmax(1))
        classes.append(expected[-1].argmax(1))
    torch.testing.assert_close(probabilities, sum(expected) / 4)
    assert torch.equal(agreed, torch.stack([c == classes[0] for c in classes]).all(0))
    assert not agreed.all() and agreed.float().mean() > 0.7
    assert any(not torch.allclose(view, images, atol=0.05) for view in seen[1:])


def test_one_view_is_the_image_and_draws_nothing():
    state = torch.get_rng_state()
    images = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    probabilities, agreed = seen_in_views(lambda x: torch.cat([x, -x], 1), images, 1, None)
    assert torch.equal(torch.get_rng_state(), state) and agreed.all()
    torch.testing.assert_close(probabilities, torch.cat([images, -images], 1).softmax(1))


def test_without_mirroring_nothing_is_mirrored():
    torch.manual_seed(0)
    images = torch.arange(36.0).view(1, 1, 6, 6)
    views = []
    seen_in_views(lambda x: views.append(x) or torch.cat([x, -x], 1), images, 5, None)
    for view in views:
        assert likeness(view, images) > 0.99


# -- when it starts --------------------------------------------------------------------------------------------------


def state_with(shares: list[float], **options: float) -> SelfTraining:
    state = SelfTraining(len(shares), **{"confidence": 0.9, "start": 0.7, "ramp_epochs": 2} | options)
    state.source_shares.copy_(torch.tensor(shares))
    return state


def test_it_starts_after_some_good_epochs_and_rises_step_by_step():
    state, shares = state_with([0.8, 0.1, 0.1]), torch.tensor([0.7, 0.2, 0.1])
    weights = []
    for _ in range(5):
        assert state.judge(0.9, shares, 10.0) == pytest.approx(0.9)
        weights.append(state.weight)
    assert weights == [0.0, 0.0, 0.5, 1.0, 1.0]  # the mean is 0.45, 0.675, 0.79
    for _ in range(5):
        state.judge(0.1, shares, 10.0)
    assert state.weight == 0.0


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1.0, 0.0, 0.0], 0.0),  # background everywhere agrees with itself
        ([0.0, 1.0, 0.0], 0.5),  # 10 times as much as in the source is still plausible
        ([0.9, 0.1, 0.0], 0.5),
        ([0.979, 0.02, 0.001], 0.5),  # 100 times less is not
        ([0.8, 0.1, 0.1], 1.0),
    ],
)
def test_structures_must_be_there_in_plausible_amounts(shares, expected):
    state = state_with([0.8, 0.1, 0.1])
    assert state.judge(1.0, torch.tensor(shares), 10.0) == pytest.approx(expected)


def test_one_class_everywhere_never_starts_it():
    state = state_with([0.8, 0.1, 0.1])
    for _ in range(20):
        state.judge(1.0, torch.tensor([0.0, 1.0, 0.0]), 10.0)
    assert state.weight == 0


def test_shares_and_what_the_source_holds():
    assert class_shares(torch.tensor([[0, 0, 1, -1]]), 3).tolist() == [0.5, 0.25, 0.0]
    state = SelfTraining(3, confidence=0.9, start=0.7, ramp_epochs=2)
    state.observe_source(torch.tensor([[[[0, 1], [0, 2]]]]))
    assert state.source_shares.tolist() == [0.5, 0.25, 0.25]
    state.observe_source(torch.tensor([[[[0, 0], [0, 0]]]]))
    torch.testing.assert_close(state.source_shares, torch.tensor([0.525, 0.2375, 0.2375]))
    state.observe_source(torch.tensor([[[[-1, -1], [-1, -1]]]]))  # nothing is known
    torch.testing.assert_close(state.source_shares, torch.tensor([0.525, 0.2375, 0.2375]))
    state = SelfTraining(3, confidence=0.9, start=0.7, ramp_epochs=2)
    state.observe_source(torch.tensor([[[[0, -1], [-1, 2]]]]))
    assert state.source_shares.tolist() == [0.5, 0.0, 0.5]


def test_a_state_dict_holds_everything():
    state = state_with([0.8, 0.1, 0.1])
    for _ in range(4):
        state.judge(1.0, torch.tensor([0.8, 0.1, 0.1]), 10.0)
    state.observe_target(logits_of(1, 3, 4, 4).softmax(1))
    other = SelfTraining(3, confidence=0.9, start=0.7, ramp_epochs=2)
    other.load_state_dict(state.state_dict())
    assert other.weight == state.weight > 0 and torch.equal(other.thresholds(), state.thresholds())
    assert other.judge(0.5, torch.tensor([0.8, 0.1, 0.1]), 10.0) == 0.5 and other.score != state.score
