"""What a training step computes: every pass through a network, and what those passes cost by themselves.

A pass is the outermost call of one of a trainer's networks: the network itself, one of its parts (an encoder, a
decoder) or a public method of it. ``record_passes`` watches one step. ``Pass.run`` repeats a pass alone, on the inputs
it had, with the same gradients kept: forward, and backward from everything it gave out. Their sum is the bare work that
a step's time is compared with.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Pass:
    """One call of a network in a step.

    Attributes:
        name: network and method, such as ``generator.encode``.
        call: the method itself.
        inputs: its arguments, tensors detached, those that carried a gradient marked to do so again.
        trained: the network's parameters that were being trained (none where it was frozen).
        grad: whether gradients were recorded.
        autocast: whether mixed precision was on.
    """

    name: str
    call: Callable
    inputs: tuple[tuple, dict[str, Any]]
    parameters: list[nn.Parameter]
    trained: list[bool]
    grad: bool
    autocast: bool
    device: torch.device

    @property
    def shape(self) -> str:
        sizes = [tuple(t.shape) for t in tree_leaves(self.inputs) if isinstance(t, Tensor)]
        return "x".join(map(str, sizes[0])) if sizes else ""

    @property
    def kind(self) -> str:
        """Which gradients the pass keeps."""
        if not self.grad:
            return "forward"
        to_inputs = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(self.inputs))
        kept = [word for word, there in (("weights", any(self.trained)), ("inputs", to_inputs)) if there]
        return f"forward, backward to {' and '.join(kept)}" if kept else "forward"

    def run(self) -> tuple[float, float]:
        """Seconds of the forward and of the backward pass (0 where there is none)."""
        before = [p.requires_grad for p in self.parameters]
        for parameter, trained in zip(self.parameters, self.trained, strict=True):
            parameter.requires_grad_(trained)
            parameter.grad = None
        arguments, keywords = tree_map(_fresh, self.inputs)
        try:
            synchronise(self.device)
            start = time.perf_counter()
            with torch.set_grad_enabled(self.grad), torch.autocast(self.device.type, enabled=self.autocast):
                outputs = self.call(*arguments, **keywords)
            synchronise(self.device)
            forward = time.perf_counter() - start
            ends = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
            if not ends:
                return forward, 0.0
            gradients = [torch.ones_like(t) for t in ends]
            synchronise(self.device)
            start = time.perf_counter()
            torch.autograd.backward(ends, gradients)
            synchronise(self.device)
            return forward, time.perf_counter() - start
        finally:
            for parameter, wanted in zip(self.parameters, before, strict=True):
                parameter.requires_grad_(wanted)
                parameter.grad = None

    def flops(self) -> int:
        """Floating-point operations of convolutions and matrix products, a multiplication and an addition each."""
        with FlopCounterMode(display=False) as counter:
            self.run()
        return counter.get_total_flops()


def record_passes(trainer, batch: dict) -> list[Pass]:
    """The passes of one training step of ``trainer`` on ``batch``, in their order."""
    passes: list[Pass] = []
    with _watched(trainer, passes):
        trainer.train_step(batch)
    return passes


@contextmanager
def _watched(trainer, passes: list[Pass]) -> Iterator[None]:
    depth = [0]
    replaced: list[tuple[nn.Module, str, Callable | None]] = []

    def watch(module: nn.Module, method: str, name: str) -> None:
        own = module.__dict__.get(method)  # a trainer may have put a compiled method there
        call = getattr(module, method)

        @functools.wraps(call)
        def watched(*arguments, **keywords):
            if depth[0] == 0:
                parameters = list(module.parameters())
                passes.append(
                    Pass(
                        name, call, tree_map(_kept, (arguments, keywords)), parameters,
                        [p.requires_grad for p in parameters], torch.is_grad_enabled(),
                        torch.is_autocast_enabled(trainer.device.type), trainer.device,
                    )
                )  # fmt: skip
            depth[0] += 1
            try:
                return call(*arguments, **keywords)
            finally:
                depth[0] -= 1

        replaced.append((module, method, own))
        module.__dict__[method] = watched

    for module, method, name in _entrances(trainer):
        watch(module, method, name)
    try:
        yield
    finally:
        for module, method, own in reversed(replaced):
            if own is None:
                del module.__dict__[method]
            else:
                module.__dict__[method] = own


def _entrances(trainer) -> Iterator[tuple[nn.Module, str, str]]:
    """Where a trainer may call a network: (module, method, name)."""
    network = getattr(trainer, "plain_network", trainer.network)
    for name, module in {"network": network, **dict(getattr(trainer, "networks", {}))}.items():
        for method in _public_methods(module):
            yield module, method, name if method == "forward" else f"{name}.{method}"
        for part, child in module.named_children():
            if not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                yield child, "forward", f"{name}.{part}"


def _public_methods(module: nn.Module) -> list[str]:
    """``forward``, and the methods of the network's own class that take and give tensors."""
    own = [
        name
        for kind in type(module).__mro__
        if issubclass(kind, nn.Module) and kind.__module__.startswith("nnunet_uda")
        for name, value in vars(kind).items()
        if callable(value) and not isinstance(value, (staticmethod, classmethod)) and not name.startswith("_")
    ]
    without = {"train", "set_prompts", "refresh_prompts", "sample_positions", "extra_repr"}
    return sorted({"forward", *own} - without)


def _kept(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return item
    return item.detach().requires_grad_(item.requires_grad)


def _fresh(item: Any) -> Any:
    """A tensor of its own, so that an in-place operation of one repetition does not reach the next."""
    if not isinstance(item, Tensor):
        return item
    copy = item.detach().clone()
    return copy.requires_grad_(item.requires_grad)


def convolution_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Most operations a second that 3 x 3 convolutions reach here, forward and backward, over some common sizes."""
    best = 0.0
    for channels, edge in ((64, 64), (128, 64), (256, 32), (512, 16)):
        layer = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)
        images = torch.randn(4, channels, edge, edge, device=device, dtype=dtype, requires_grad=True)
        operations = 3 * 2 * 9 * channels**2 * 4 * edge**2
        for _ in range(5):
            synchronise(device)
            start = time.perf_counter()
            layer(images).sum().backward()
            synchronise(device)
            best = max(best, operations / (time.perf_counter() - start))
    return best
