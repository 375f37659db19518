"""LSGAN: values by hand, and opposite aims of the two players."""

from __future__ import annotations

import pytest
import torch

from nnunet_uda.losses.adversarial import lsgan_loss


def test_values() -> None:
    logits = torch.tensor([[0.0, 1.0], [3.0, -2.0]])
    assert lsgan_loss(logits, True).item() == pytest.approx((1 + 0 + 4 + 9) / 4)
    assert lsgan_loss(logits, False).item() == pytest.approx((0 + 1 + 9 + 4) / 4)
    assert lsgan_loss(torch.ones(2, 1, 3, 3, 3), True).item() == 0
    assert lsgan_loss(torch.zeros(2, 1, 3), False).item() == 0


def test_the_players_pull_a_fake_logit_in_opposite_directions() -> None:
    gradients = []
    for is_real in (True, False):
        logits = torch.full((2, 1, 3, 3), 0.5, requires_grad=True)
        lsgan_loss(logits, is_real).backward()
        gradients.append(logits.grad)
    assert (gradients[0] < 0).all()
    assert torch.equal(gradients[0], -gradients[1])


def test_half_precision_logits_do_not_overflow() -> None:
    logits = torch.full((4,), 300.0, dtype=torch.float16)  # 300^2 exceeds float16
    loss = lsgan_loss(logits, False)
    assert loss.dtype == torch.float32 and loss.item() == 90000


@pytest.mark.parametrize("is_real", [True, False])
def test_weights_multiply_the_images_losses(is_real):
    logits = torch.arange(2 * 3 * 4.0).view(2, 1, 3, 4)
    each = [lsgan_loss(image, is_real) for image in logits]
    weighted = lsgan_loss(logits, is_real, torch.tensor([0.5, 1.5]))
    assert weighted.item() == pytest.approx(float(0.5 * each[0] + 1.5 * each[1]) / 2)
    assert torch.equal(lsgan_loss(logits, is_real, torch.tensor([2.0, 0.0])), each[0])
