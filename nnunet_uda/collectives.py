"""Several processes, one training: what a loss and a trainer say to the others, and nothing where there is one process.

The convention: a step's loss is the mean over ranks of what each rank computes, and ``average_gradients`` makes its
gradient. Batches have the same size on every rank, so a plain mean over a batch needs nothing. A loss that mixes
samples (a Dice over the batch, contrasts between images, a mean over a number of positions that differs) is built from
``global_sum``, ``global_mean`` and ``gather_rows``: every rank then computes the global batch's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from nnunet_uda.errors import UDAError

BUCKET_BYTES = 64 * 2**20
PATIENCE = timedelta(days=7)
"""How long ranks wait for one that works alone, as for the preprocessing of the target."""

Result = TypeVar("Result")


class StoppedWithOthersError(UDAError):
    """Rank 0 has stopped, or all ranks have, and rank 0 says why."""


def world_size() -> int:
    """Number of processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


# --- losses ----------------------------------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """Sum over ranks. Each rank's loss depends on every rank's ``x``: backward sums their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient


def global_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, elementwise, with a gradient; ``x`` itself where there is one process.

    Args:
        x: any shape, the same on every rank.
    """
    return x if world_size() == 1 else _Sum.apply(x)


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Sum of ``total`` over ranks by that of ``count``; 0 with a graph where nothing is counted anywhere.

    Args:
        total: float, sum over this rank's valid entries.
        count: integer or bool, their number, the shape of ``total``.
    """
    count = global_sum(count.long())
    return global_sum(total) / count.clamp(min=1)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks in rank order, with a gradient; ``rows`` itself where there is one process.

    Args:
        rows: ``(N, ...)``; N may differ between ranks, also be 0, the other sizes may not.
    """
    if world_size() == 1:
        return rows
    number = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    number[rank()] = len(rows)
    numbers = global_sum(number).tolist()
    before = sum(numbers[: rank()])
    placed = rows.new_zeros(sum(numbers), *rows.shape[1:])
    placed = placed.index_copy(0, torch.arange(before, before + len(rows), device=rows.device), rows)
    if rows.dtype == torch.bool:
        return global_sum(placed.to(torch.uint8)).bool()
    return global_sum(placed)


# --- trainers: collective calls, made where there are several processes ----------------------------------------------


def patient_group() -> distributed.ProcessGroup:
    """A group over gloo for small things on the CPU, whose members wait for each other for ``PATIENCE``."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def broadcast_modules(modules: Iterable[nn.Module]) -> None:
    """Rank 0's parameters and buffers on every rank."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            value = tensor.detach().contiguous()
            distributed.broadcast(value, 0)
            tensor.detach().copy_(value)


def average_gradients(parameters: Iterable[nn.Parameter], group: distributed.ProcessGroup) -> None:
    """Replace every gradient by its mean over ranks.

    A parameter with a gradient on one rank at least has one on all of them, 0 where it had none; one without any
    gradient is left without, so that optimisers skip it everywhere.

    Args:
        parameters: the same ones in the same order on every rank.
        group: of ``patient_group``, over which ranks agree on the set without waiting for the device.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    distributed.all_reduce(present, distributed.ReduceOp.MAX, group)
    gradients = []
    for parameter in (p for p, somewhere in zip(parameters, present.tolist(), strict=True) if somewhere):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    pending = []
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        pending.append((bucket, flat, distributed.all_reduce(flat, async_op=True)))
    for bucket, flat, work in pending:
        work.wait()
        means = (flat / world_size()).split([gradient.numel() for gradient in bucket])
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Runs of tensors of one type, of at most ``BUCKET_BYTES`` where a tensor is no larger by itself."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        bytes_of = tensor.numel() * tensor.element_size()
        if not buckets or buckets[-1][0].dtype != tensor.dtype or size + bytes_of > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += bytes_of
    return buckets


def on_first_rank(function: Callable[[], Result], group: distributed.ProcessGroup) -> Result:
    """What ``function`` returns on rank 0, which alone calls it while the others wait, on every rank.

    Raises:
        Exception: on rank 0, what ``function`` raises; on the others ``StoppedWithOthersError`` with its text.
    """
    outcome: list[Any] = [None, None]
    error = None
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as caught:  # told to the others, then raised
            error, outcome[1] = caught, str(caught)
    distributed.broadcast_object_list(outcome, 0, group)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise StoppedWithOthersError(outcome[1])
    return outcome[0]
