"""Instance norm by PyTorch's group norm with one channel a group, which on the CPU is the same several times as fast.

PyTorch's instance norm repeats its weights for every sample and goes through batch norm. On CUDA nothing is changed:
there batch norm is cuDNN's, and autocast takes group norm in float32.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Network = TypeVar("Network", bound=nn.Module)


def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Every channel of every sample to mean 0 and variance 1 over its positions, then ``weight * x + bias``.

    As ``torch.nn.functional.instance_norm`` without running statistics, rounding aside; as there a map of one single
    position is a ValueError.

    Args:
        x: ``(B, C, *S)``.
        weight, bias: ``(C,)``, or None.
        eps: added to the variance.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[2:].numel() > 1:
        return F.group_norm(x, x.shape[1], weight, bias, eps)
    return F.instance_norm(x, weight=weight, bias=bias, eps=eps)


def _forward(module: nn.modules.instancenorm._InstanceNorm, x: Tensor) -> Tensor:
    """What PyTorch's module does, with its check of the dimension and a sample without a batch axis."""
    module._check_input_dim(x)
    if x.dim() == module._get_no_batch_dim():
        return instance_norm(x[None], module.weight, module.bias, module.eps)[0]
    return instance_norm(x, module.weight, module.bias, module.eps)


class InstanceNorm2d(nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` by :func:`instance_norm`; ``(B, C, H, W)``, no running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input)


class InstanceNorm3d(nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` by :func:`instance_norm`; ``(B, C, D, H, W)``, no running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input)


FASTER = {nn.InstanceNorm2d: InstanceNorm2d, nn.InstanceNorm3d: InstanceNorm3d}


def use_fast_instance_norm(network: Network) -> Network:
    """Give PyTorch's instance norms inside ``network`` the faster ``forward``; weights and their names stay.

    Those with running statistics and subclasses of others are left alone. Returns ``network``.
    """
    for module in network.modules():
        if type(module) in FASTER and not module.track_running_stats:
            module.__class__ = FASTER[type(module)]
    return network
