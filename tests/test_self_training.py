"""The teacher and its pseudo labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunet_uda.losses.prototypes import IGNORED
from nnunet_uda.losses.pseudo_label import class_thresholds, confident_labels, pseudo_label_loss
from nnunet_uda.training.self_training import Average, SelfTraining


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
def test_labels_are_where_the_class_is_sure_enough(shape):
    probabilities, thresholds = logits_of(*shape).softmax(1), torch.tensor([0.8, 0.5, 0.6])
    labels = confident_labels(probabilities, thresholds)
    assert labels.shape == (shape[0], *shape[2:]) and labels.dtype == torch.int64
    known = 0
    for place in torch.cartesian_prod(*(torch.arange(size) for size in labels.shape)).tolist():
        values = probabilities[(place[0], slice(None), *place[1:])].tolist()
        best = max(range(3), key=values.__getitem__)
        expected = best if values[best] > thresholds[best] else IGNORED
        assert labels[tuple(place)] == expected
        known += expected != IGNORED
    assert 0 < known < labels.numel()


def test_a_confidence_equal_to_the_threshold_is_not_over_it():
    probabilities = torch.tensor([[0.25, 0.5], [0.75, 0.5]])[None]
    assert confident_labels(probabilities, torch.tensor([0.5, 0.75])).tolist() == [[IGNORED, IGNORED]]
    assert confident_labels(probabilities, torch.tensor([0.4, 0.7])).tolist() == [[1, 0]]


def test_a_threshold_of_1_labels_nothing_and_0_everything():
    probabilities = logits_of(1, 3, 8, 8).softmax(1)
    assert (confident_labels(probabilities, torch.ones(3)) == IGNORED).all()
    assert torch.equal(confident_labels(probabilities, torch.zeros(3)), probabilities.argmax(1))


def test_a_class_that_is_never_sure_is_labelled_all_the_same():
    """Without thresholds of their own the small structures would be left out and become background."""
    state = SelfTraining(3, confidence=0.9)
    probabilities = torch.zeros(1, 3, 4, 8)
    probabilities[:, 0, :2], probabilities[:, 1, :2] = 0.99, 0.01
    probabilities[:, 1, 2:], probabilities[:, 0, 2:] = 0.7, 0.3
    assert (state.label(probabilities)[:, 2:] == IGNORED).all()
    for _ in range(300):
        state.observe(probabilities)
    labels = state.label(probabilities)
    assert (labels[:, :2] == 0).all() and (labels[:, 2:] == 1).all()
    torch.testing.assert_close(
        state.class_confidence, torch.tensor([0.99, 0.7, 1.0])
    )  # 2 is never seen: as at the start


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


def test_a_state_dict_holds_everything():
    first, second = (SelfTraining(3, 0.9) for _ in range(2))
    first.observe(logits_of(2, 3, 8, 8).softmax(1))
    second.load_state_dict(first.state_dict())
    probabilities = logits_of(2, 3, 8, 8, seed=1).softmax(1)
    assert torch.equal(first.label(probabilities), second.label(probabilities))
    assert not torch.equal(first.class_confidence, torch.ones(3))
