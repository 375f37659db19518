"""Convolutions that keep what their input was made from, and make it again for the gradient.

A convolution keeps its input for the gradient of its weights. Where cheap steps (norm, activation, padding,
interpolation) make that input from a tensor that is kept anyway, they are repeated in the backward pass and their
results are not kept (Chen et al. 2016, arXiv 1604.06174; Rota Bulò, Porzi and Kontschieder 2018, arXiv 1712.02616). No
convolution is computed twice, and the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from nnunet_uda.networks.instance_norm import FASTER, instance_norm

Network = TypeVar("Network", bound=nn.Module)
Convolution = nn.Conv2d | nn.Conv3d


SMALL = 4 * 2**20
"""Bytes of tensors below which what they make is kept: at patches of 64 x 64 making it again took a tenth of a step."""


def conv_of(conv: Convolution, prepare: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``conv(prepare(*tensors))``, of which only ``tensors`` are kept for the gradient.

    Where no gradient is recorded or ``tensors`` are ``SMALL`` it is just that. Under ``torch.compile``, too, which
    decides by itself what to repeat.

    Args:
        conv: ``Conv2d`` or ``Conv3d`` with padding by zeros.
        prepare: a function of nothing but ``tensors``, weights included, that gives ``(B, C, *S)`` and changes none of
            them; it is called a second time in the backward pass.
        tensors: of floating point.
    """
    at_once = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    if at_once or sum(tensor.nbytes for tensor in tensors) < SMALL:  # Dynamo is not to trace this sum
        return conv(prepare(*tensors))
    return _ConvOf.apply(conv, prepare, conv.weight, conv.bias, *tensors)


class _ConvOf(torch.autograd.Function):
    """What :func:`conv_of` says."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, conv: Convolution, prepare: Callable[..., Tensor], weight: Tensor, bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        device = weight.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        ctx.conv, ctx.prepare = conv, prepare
        ctx.save_for_backward(weight, *tensors)
        return conv(prepare(*tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        of_weight, of_bias, *of_tensors = ctx.needs_input_grad[2:]
        again = [t.detach().requires_grad_(wanted) for t, wanted in zip(tensors, of_tensors, strict=True)]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            made = ctx.prepare(*again)
        conv, dtype = ctx.conv, gradient.dtype
        dimension = len(conv.stride)
        to_made, to_weight, to_bias = torch.ops.aten.convolution_backward(
            gradient, made.detach().to(dtype), weight.to(dtype), [conv.out_channels] if of_bias else None, conv.stride,
            conv.padding, conv.dilation, False, [0] * dimension, conv.groups, [any(of_tensors), of_weight, of_bias],
        )  # fmt: skip
        if any(of_tensors):
            made.backward(to_made.to(made.dtype))
        to_weight, to_bias = (g if g is None else g.to(weight.dtype) for g in (to_weight, to_bias))
        return None, None, to_weight, to_bias, *(t.grad for t in again)


class SlimConvBlocks(StackedConvBlocks):
    """nnU-Net's stack of blocks (convolution, instance norm, activation) that keeps no activation inside the stack."""

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.convs
        x, before = first.conv(x), first
        for block in others:
            x = conv_of(block.conv, _norm_and_activation(before), x, *_weights(before.norm))
            before = block
        return before.nonlin(before.norm(x))


def _weights(norm: nn.Module) -> list[Tensor]:
    return [norm.weight, norm.bias] if norm.affine else []


def _norm_and_activation(block: ConvDropoutNormReLU) -> Callable[..., Tensor]:
    norm, activation = block.norm, block.nonlin

    def prepare(x: Tensor, *weights: Tensor) -> Tensor:
        return activation(instance_norm(x, *weights, eps=norm.eps))

    return prepare


NORMS = {*FASTER, *FASTER.values()}


def use_slim_blocks(network: Network) -> Network:
    """Give nnU-Net's stacks of several blocks inside ``network`` the ``forward`` of :class:`SlimConvBlocks`.

    Weights and their names stay. Stacks with dropout, other norms or the activation first are left alone. Returns
    ``network``.
    """
    for module in network.modules():
        if type(module) is StackedConvBlocks and all(_is_plain(block) for block in module.convs):
            module.__class__ = SlimConvBlocks
    return network


def _is_plain(block: nn.Module) -> bool:
    """Whether it is convolution, instance norm without running statistics, activation, in this order."""
    if type(block) is not ConvDropoutNormReLU or len(block.all_modules) != 3:
        return False
    conv, norm, activation = block.all_modules
    return (
        isinstance(conv, Convolution)
        and type(norm) in NORMS
        and not norm.track_running_stats
        and isinstance(activation, (nn.LeakyReLU, nn.ReLU))
    )
