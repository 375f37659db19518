"""Soft Dice against a loop over classes and one-hot masks."""

from __future__ import annotations

import pytest
import torch

from nnunet_uda.losses.dice import soft_dice_loss


def reference(logits, target, smooth=1e-5) -> float:
    exponentials = logits.double().exp()
    probabilities = exponentials / exponentials.sum(1, keepdim=True)
    scores = []
    for c in range(1, logits.shape[1]):
        p, y = probabilities[:, c], (target[:, 0] == c).double()
        scores.append((2 * float((p * y).sum()) + smooth) / (float(p.sum()) + float(y.sum()) + smooth))
    return 1 - sum(scores) / len(scores)


@pytest.mark.parametrize("shape", [(7, 6), (3, 7, 6)])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_equals_the_loop(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(2, 4, *shape), torch.randint(0, 4, (2, 1, *shape), dtype=dtype)
    loss = soft_dice_loss(logits, target)
    assert loss.item() == pytest.approx(reference(logits, target), rel=1e-5)


def test_sums_run_over_the_batch() -> None:
    # class 1 fills image 0 (found) and is absent from image 1 (predicted nowhere): batch Dice is 1
    logits = torch.zeros(2, 2, 4, 4)
    logits[0, 1], logits[1, 0] = 50, 50
    target = torch.zeros(2, 1, 4, 4, dtype=torch.long)
    target[0] = 1
    assert soft_dice_loss(logits, target).item() == pytest.approx(0, abs=1e-6)
    target[1, 0, :, :] = 1  # half of the class is missed: Dice = 2 * 16 / (16 + 32)
    assert soft_dice_loss(logits, target).item() == pytest.approx(1 / 3, abs=1e-4)


def test_absent_class() -> None:
    target = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    target[..., :4] = 1
    logits = torch.zeros(1, 3, 8, 8)
    logits.scatter_(1, target, 200.0)  # classes 0 and 1 perfect, class 2 exactly nowhere
    assert soft_dice_loss(logits, target).item() == pytest.approx(0, abs=1e-5)
    logits = torch.zeros(1, 3, 8, 8, requires_grad=True)  # class 2 predicted with 1/3 everywhere
    loss = soft_dice_loss(logits, target)
    assert loss.item() == pytest.approx(reference(logits.detach(), target), rel=1e-5)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    empty = soft_dice_loss(torch.zeros(0, 3, 4, 4), torch.zeros(0, 1, 4, 4, dtype=torch.long))
    assert torch.isfinite(empty)


@pytest.mark.parametrize("shape", [(7, 6), (3, 7, 6)])
def test_ignored_positions_take_no_part(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 4, *shape)).requires_grad_()
    target = torch.randint(0, 5, (2, 1, *shape), dtype=torch.int16)  # 4 is the ignore label
    loss = soft_dice_loss(logits, target, ignore_label=4)
    known = (target != 4)[:, 0]
    rest = [logits.detach().movedim(1, -1)[known].T[None], target[:, 0][known][None, None]]  # the others as one line
    assert loss.item() == pytest.approx(reference(*rest), rel=1e-5)
    loss.backward()
    where = logits.grad.abs().sum(1)
    assert not where[~known].any() and (where[known] > 0).all()
    nothing = soft_dice_loss(logits, torch.full_like(target, 4), ignore_label=4)
    assert nothing.item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(RuntimeError, match="out of bounds"):  # a value that is neither
        soft_dice_loss(logits, target + 1, ignore_label=4)


def test_gradient_raises_the_right_class() -> None:
    torch.manual_seed(0)
    target = torch.randint(0, 3, (2, 1, 6, 6))
    logits = torch.zeros(2, 3, 6, 6, requires_grad=True)
    before = soft_dice_loss(logits, target)
    before.backward()
    foreground = target > 0
    assert (logits.grad.gather(1, target)[foreground] < 0).all()
    assert soft_dice_loss(logits - 10 * logits.grad, target) < before


def test_half_precision() -> None:
    logits = torch.zeros(1, 2, 300, 300, dtype=torch.float16)  # a sum of 90000 exceeds float16
    target = torch.ones(1, 1, 300, 300, dtype=torch.int16)
    assert soft_dice_loss(logits, target).item() == pytest.approx(1 - 2 / 3, rel=1e-4)
