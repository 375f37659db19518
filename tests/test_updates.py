"""An update of a training step: its gradient is bounded where that is asked, and its terms are logged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_uda.training.ranks import Ranks
from nnunet_uda.training.updates import Updates


@pytest.mark.parametrize(("max_norm", "moved"), [(None, 50.0), (12.0, 12.0), (100.0, 50.0)])
def test_a_gradient_is_bounded_where_that_is_asked(max_norm, moved):
    weights = nn.Parameter(torch.zeros(2))
    updates = Updates({"segmenter": torch.optim.SGD([weights], lr=1.0)}, None, Ranks(False))
    with updates.updating("segmenter", max_norm=max_norm) as add:
        add({"first": 30 * weights[0]})
        add({"second": 40 * weights[1] + 7})
    assert weights.detach().norm().item() == pytest.approx(moved, rel=1e-4)
    assert torch.allclose(weights.detach(), -torch.tensor([0.6, 0.8]) * moved, rtol=1e-4)
    assert updates.finish(0, "") == {"first": 0, "second": 7, "loss": 0} and weights.grad is None
