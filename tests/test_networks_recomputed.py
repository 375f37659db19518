"""Convolutions that make their input again: the same numbers as without, and less that is kept."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import make_trainer
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import nn
from torch.nn import functional as F

from nnunet_uda.networks import recomputed
from nnunet_uda.networks.recomputed import SlimConvBlocks, conv_of, use_slim_blocks
from nnunet_uda.networks.resnet_generator import ResnetGenerator, reflect_pad


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(recomputed, "SMALL", 0)


class Kept:
    """Bytes of the different tensors that a graph keeps for its gradients, weights left out."""

    def __init__(self, network: nn.Module) -> None:
        self.known = {p.data_ptr() for p in network.parameters()}
        self.tensors: list[torch.Tensor] = []

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors.append(tensor)
        return tensor

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        self.bytes = sum(size for place, size in storages.items() if place not in self.known)


def gradients(value: torch.Tensor, tensors) -> list[torch.Tensor]:
    torch.manual_seed(5)
    return list(torch.autograd.grad((value * torch.randn(value.shape).to(value)).sum(), tensors))


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_value_and_gradients_are_those_of_the_plain_convolution(dimension, groups):
    torch.manual_seed(0)
    kind = nn.Conv2d if dimension == 2 else nn.Conv3d
    conv = kind(4, 6, 3, stride=2, padding=1, dilation=2, groups=groups)
    low, high = (torch.randn(2, 2, *(size,) * dimension, requires_grad=True) for size in (4, 8))

    def prepare(low, high):
        return F.leaky_relu(torch.cat([F.interpolate(low, scale_factor=2), high], 1), 0.1)

    wanted = [low, high, conv.weight, conv.bias]
    expected = conv(prepare(low, high))
    found = conv_of(conv, prepare, low, high)
    assert torch.equal(found, expected)
    for one, other in zip(gradients(found, wanted), gradients(expected, wanted), strict=True):
        assert torch.equal(one, other)


def test_the_gradient_is_the_difference_quotient_s():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3).double()
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def value(x, *weights):  # which are changed in place
        return conv_of(conv, lambda x: reflect_pad(x.tanh(), (1, 1)), x)

    assert torch.autograd.gradcheck(value, (x, conv.weight, conv.bias))


def test_nothing_is_computed_for_what_needs_no_gradient():
    conv, calls = nn.Conv2d(1, 2, 3), []

    def prepare(x):
        calls.append(torch.is_grad_enabled())
        return x.exp()

    x = torch.randn(1, 1, 5, 5)
    for parameter in conv.parameters():
        parameter.requires_grad_(False)
    assert not conv_of(conv, prepare, x).requires_grad
    of_input = conv_of(conv, prepare, x.requires_grad_())
    conv.weight.requires_grad_(True)  # as a frozen network's after its forward pass
    of_input.sum().backward()
    assert x.grad is not None and conv.weight.grad is None and conv.bias.grad is None
    x = x.detach()
    conv_of(conv, prepare, x).sum().backward()
    assert conv.weight.grad is not None and x.grad is None
    calls.clear()
    with torch.no_grad():
        conv_of(conv, prepare, x)
    assert calls == [False]


def test_small_maps_are_kept(monkeypatch):
    conv, calls = nn.Conv2d(1, 2, 3), []

    def prepare(x):
        calls.append(x.shape)
        return x.exp()

    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    for limit, expected in ((4 * 64, 2), (4 * 64 + 1, 1)):
        calls.clear()
        monkeypatch.setattr(recomputed, "SMALL", limit)
        conv_of(conv, prepare, x).sum().backward()
        assert len(calls) == expected


def test_under_autocast_gradients_have_the_tensors_own_precision():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    x, modes = torch.randn(2, 3, 8, 8, requires_grad=True), []

    def prepare(x):
        modes.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return torch.relu(x - 1)

    with torch.autocast("cpu", torch.bfloat16):
        found = conv_of(conv, prepare, x)
        expected = conv(torch.relu(x - 1))
    assert found.dtype == expected.dtype == torch.bfloat16 and torch.equal(found, expected)
    wanted = [x, conv.weight, conv.bias]
    for one, other in zip(gradients(found, wanted), gradients(expected, wanted), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert modes == 2 * [(True, torch.bfloat16)]  # in the backward pass, outside of autocast, as well


@pytest.mark.parametrize("dimension", [2, 3])
def test_generators_keep_less_for_the_same_gradients(dimension, monkeypatch):
    torch.manual_seed(0)
    network = ResnetGenerator(1, dimension, 4, 3)
    x, kept, found = torch.randn(2, 1, *(16,) * dimension), [], []
    for small in (0, math.inf):
        monkeypatch.setattr(recomputed, "SMALL", small)
        image = x.clone().requires_grad_()
        with Kept(network) as keeping:
            features = network.encode(image)
            value = network.decode(features)
        found.append([value, *gradients(value, [image, *network.parameters()])])
        kept.append(keeping.bytes)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert kept[0] < 0.7 * kept[1]


def unet(dimension: int, **options) -> PlainConvUNet:
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dimension == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    given = {"norm_op": norm, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU,
             "nonlin_kwargs": {"inplace": True}} | options  # fmt: skip
    return PlainConvUNet(
        1, 3, (4, 8, 16), conv, 3, (1, 2, 2), (2, 3, 2), 3, (2, 2), True, deep_supervision=True, **given
    )


@pytest.mark.parametrize("dimension", [2, 3])
def test_nnunets_network_keeps_less_for_the_same_gradients(dimension):
    torch.manual_seed(0)
    plain = unet(dimension)
    slim = use_slim_blocks(copy.deepcopy(plain))
    assert list(slim.state_dict()) == list(plain.state_dict())
    assert sum(type(module) is SlimConvBlocks for module in slim.modules()) == 5
    x, kept, found = torch.randn(2, 1, *(16,) * dimension), [], []
    for network in (slim, plain):
        with Kept(network) as keeping:
            outputs = network(x)
        found.append([*outputs, *gradients(sum(o.square().mean() for o in outputs), list(network.parameters()))])
        kept.append(keeping.bytes)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # the norm is another function
    assert kept[0] < 0.9 * kept[1]


@pytest.mark.parametrize(
    "options",
    [
        {"dropout_op": nn.Dropout2d, "dropout_op_kwargs": {"p": 0.1}},
        {"norm_op": nn.BatchNorm2d},
        {"nonlin_first": True},
        {"norm_op_kwargs": {"affine": True, "track_running_stats": True}},
        {"nonlin": nn.GELU, "nonlin_kwargs": {}},
    ],
    ids=", ".join,
)
def test_other_blocks_are_left_alone(options):
    network = use_slim_blocks(unet(2, **options))
    assert {type(m) for m in network.modules() if isinstance(m, StackedConvBlocks)} == {StackedConvBlocks}


def test_trainers_have_it_in_training_and_prediction(in_workspace):
    trainer = make_trainer("SourceOnlyTrainer")
    trainer.initialize()
    built = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    for network in (trainer.network, built):
        assert any(type(module) is SlimConvBlocks for module in network.modules())
