"""The updates of a training step by name: gradients and their bound, mixed precision, and the terms that are logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nnunet_uda.errors import UDAError
from nnunet_uda.training.ranks import Ranks
from nnunet_uda.training.streams import to_device

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer

Terms = dict[str, Tensor]
"""Scalar loss terms by the names under which they are logged."""


class NonFiniteLossError(UDAError):
    """A loss term became NaN or infinite."""


class Updates:
    """The updates of one training step.

    Args:
        optimizers: by the names of their updates.
        scaler: of mixed precision; None without.
        ranks: which share gradients and means.
        further: by the name of an update, terms that are added to its first call in the step.

    Attributes:
        terms: every loss term so far, detached, by its name.
    """

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        scaler: torch.amp.GradScaler | None,
        ranks: Ranks,
        further: Mapping[str, Callable[[], Terms]] | None = None,
    ) -> None:
        self.optimizers = optimizers
        self.scaler = scaler
        self.ranks = ranks
        self.further = dict(further or {})
        self.terms: Terms = {}
        self._stepped: set[str] = set()

    @contextmanager
    def updating(self, name: str, max_norm: float | None = None) -> Iterator[Callable[[Terms], None]]:
        """See ``UDATrainer.updating``."""
        optimizer = self.optimizers[name]
        sums: Terms = {}
        optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None and name in self._stepped:  # it refuses a second step of an optimiser else
            self.scaler.update()
            self._stepped.clear()

        def add(terms: Terms) -> None:
            loss = torch.stack([value.float() for value in terms.values()]).sum()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            for key, value in terms.items():
                sums[key] = sums[key] + value.detach() if key in sums else value.detach()

        yield add
        if name in self.further:
            add(self.further.pop(name)())
        self.terms.update(sums)
        self.ranks.share_gradients(optimizer)
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

    def finish(self, epoch: int, folder: str) -> dict[str, float]:
        """End the step; return the means over ranks of its terms, and nnU-Net's ``loss``.

        Args:
            epoch, folder: of the training, for the message.

        Raises:
            NonFiniteLossError: on all ranks, for a term that is not finite on one of them.
        """
        if self.scaler is not None:
            self.scaler.update()
        values = self.ranks.mean(torch.stack([value.float() for value in self.terms.values()])).cpu()
        losses = dict(zip(self.terms, values.tolist(), strict=True))
        for name, value in losses.items():
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss term '{name}' became {value} in epoch {epoch}; all terms: {losses}. Training stops; "
                    f"the checkpoints in {folder} are from before it. Lower the learning rate or the term's weight"
                )
        return {
            "loss": losses.get("segmentation", values[0].item()),
            **losses,
        }  # some epochs do not train the segmenter


def updates_of_step(trainer: UDATrainer) -> Updates:
    """A step's updates. The segmenter's first one also takes the loss of labelled target images, if there are any."""
    further = {} if trainer.dataloader_labelled is None else {trainer.network_update: partial(_labelled_terms, trainer)}
    return Updates(trainer.optimizers, trainer.grad_scaler, trainer.ranks, further)


def _labelled_terms(trainer: UDATrainer) -> Terms:
    assert trainer.dataloader_labelled is not None
    batch, share = next(trainer.dataloader_labelled), trainer.settings.labelled_target_share
    images, label = (to_device(batch[key], trainer.device) for key in ("data", "target"))
    with trainer.autocast():
        loss = trainer.labelled_target_loss(images, label)
    return {"labelled_target": share / (1 - share) * loss}


def adam(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    beta1: float,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Fused Adam. The unfused loop over the weights took a fifth of a step on a CPU."""
    return torch.optim.Adam(parameters, learning_rate, (beta1, beta2), weight_decay=weight_decay, fused=True)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimiser's state, but not whether it is fused: earlier versions wrote checkpoints of a plain Adam."""
    groups = [group | {"fused": optimizer.defaults.get("fused")} for group in state["param_groups"]]
    optimizer.load_state_dict(state | {"param_groups": groups})


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Inside, no gradients are computed for the weights of ``networks``; gradients still flow through the networks."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
