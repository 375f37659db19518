"""Maps that are made again in the backward pass: the same numbers as without, and less that is held."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nnunet_uda.networks import lean
from nnunet_uda.networks.lean import recomputed
from nnunet_uda.networks.resnet_generator import ResnetGenerator


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(lean, "SMALL", 0)


def held_by(run: Callable[[], object]) -> tuple[object, int]:
    """What ``run`` returns, and the bytes of tensors that are held when it is over."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    return result, sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_results_and_gradients_are_the_plain_generator_s_and_less_is_held(dimension, autocast):
    torch.manual_seed(0)
    plain, ours = (ResnetGenerator(1, dimension, 4, 3, lean=lean) for lean in (False, True))
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    x, held, found = torch.randn(2, 1, *((64,) if dimension == 2 else (16,)) * dimension), [], []
    for network in (ours, plain):
        image = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            made, kept = held_by(lambda forward=network.forward_with_features, image=image: forward(image))
        loss = sum((one.float() - 1).square().mean() for one in (made[0], *made[1]))
        found.append([made[0], *torch.autograd.grad(loss, [image, *network.parameters()])])
        held.append(kept)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert held[0] < 0.75 * held[1]


def test_no_convolution_is_made_again_and_small_maps_are_kept(monkeypatch):
    convolution, calls = nn.Conv2d(1, 2, 3), []
    x = torch.randn(1, 1, 8, 8, requires_grad=True)

    def function(x):
        calls.append(torch.is_grad_enabled())
        return convolution(x).exp()

    with torch.profiler.profile() as profiler:
        recomputed(function, x).sum().backward()
    kernels = {"aten::mkldnn_convolution", "aten::thnn_conv2d"}
    assert len(calls) == 2 and sum(one.count for one in profiler.key_averages() if one.key in kernels) == 1
    calls.clear()
    with torch.no_grad():
        recomputed(function, x)
    assert calls == [False]
    calls.clear()
    monkeypatch.setattr(lean, "SMALL", x.nbytes + 1)
    recomputed(function, x).sum().backward()
    assert calls == [True]
