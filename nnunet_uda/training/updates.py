"""The updates of a training step by name: gradients and their bound, mixed precision, and the terms that are logged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Updates:
    """The updates of one training step.

    Args:
        optimizers: by the names of their updates.
        scaler: of mixed precision; None without.
        share_gradients: replaces an optimiser's gradients by their means over processes.

    Attributes:
        terms: every loss term so far, detached, by its name.
    """

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        scaler: torch.amp.GradScaler | None,
        share_gradients: Callable[[Optimizer], None],
    ) -> None:
        self.optimizers = optimizers
        self.scaler = scaler
        self.share_gradients = share_gradients
        self.terms: dict[str, Tensor] = {}
        self._stepped: set[str] = set()

    @contextmanager
    def updating(self, name: str, max_norm: float | None = None) -> Iterator[Callable[[dict[str, Tensor]], None]]:
        """See ``UDATrainer.updating``."""
        optimizer, sums = self.optimizers[name], {}
        optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None and name in self._stepped:  # it refuses a second step of an optimiser else
            self.scaler.update()
            self._stepped.clear()

        def add(terms: dict[str, Tensor]) -> None:
            loss = torch.stack([value.float() for value in terms.values()]).sum()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            sums.update({key: sums.get(key, 0.0) + value.detach() for key, value in terms.items()})

        yield add
        self.terms.update(sums)
        self.share_gradients(optimizer)
        if self.scaler is not None:
            self._stepped.add(name)
            self.scaler.unscale_(optimizer)
        if max_norm is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
        if self.scaler is not None:
            self.scaler.step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # they would lie beside the next network's activations

    def finish(self, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The step is over. Returns its terms as ``mean``, over processes, makes them of this process's."""
        if self.scaler is not None:
            self.scaler.update()
        values = mean(torch.stack([value.float() for value in self.terms.values()])).cpu()
        return dict(zip(self.terms, values.tolist(), strict=True))


def adam(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    beta1: float,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Adam, fused: its loop over the weights took a fifth of a step on a CPU."""
    return torch.optim.Adam(parameters, learning_rate, (beta1, beta2), weight_decay=weight_decay, fused=True)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimiser, fused or not as it is now: earlier versions wrote checkpoints with a plain Adam."""
    groups = [group | {"fused": optimizer.defaults.get("fused")} for group in state["param_groups"]]
    optimizer.load_state_dict(state | {"param_groups": groups})


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """No gradients for the weights of ``networks`` inside: gradients flow through them, none is computed for them."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
