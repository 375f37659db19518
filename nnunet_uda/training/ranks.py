"""This process among those that share each batch, on CPUs or CUDA devices, on any machines."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from nnunet_uda.collectives import (
    average_gradients,
    broadcast_modules,
    global_sum,
    on_first_rank,
    patient_group,
    rank,
    world_size,
)
from nnunet_uda.errors import UDAError
from nnunet_uda.files import whole_file
from nnunet_uda.training.checkpoint import seed_everything

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer

Result = TypeVar("Result")


class Ranks:
    """The processes of one training. With one process every method does nothing, or what a single process needs.

    nnU-Net wraps its network in torch's DistributedDataParallel, which averages gradients where the wrapper itself is
    called. Methods with several networks call parts of them, so nothing is wrapped here: ``share_gradients`` averages
    an optimiser's gradients before its step, and all ranks take the same step.

    Each rank has random numbers of its own, so it draws its own cases, augmentation and positions. Only rank 0 writes,
    except for the predictions of the final validation, which all ranks share.

    Args:
        several: whether torch.distributed is initialised.
    """

    def __init__(self, several: bool) -> None:
        self.control = patient_group() if several else None

    @property
    def several(self) -> bool:
        return self.control is not None

    def device(self, asked: torch.device, nnunets: torch.device) -> torch.device:
        """This process's device; ``nnunets`` is nnU-Net's choice, which takes the rank for a CUDA device's number."""
        if not self.several:
            return nnunets
        return torch.device("cuda", torch.cuda.current_device()) if asked.type == "cuda" else asked

    def share_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace the gradients of an optimiser's parameters by their means over ranks."""
        if self.control is not None:
            average_gradients((p for group in optimizer.param_groups for p in group["params"]), self.control)

    def mean(self, values: Tensor) -> Tensor:
        """Elementwise mean over ranks; a value that is not finite on one rank is not finite on any."""
        return global_sum(values) / world_size()

    def signal_of_any(self, received: signal.Signals | None) -> signal.Signals | None:
        """The signal that this rank or another has received; every rank asks after each step."""
        if self.control is None:
            return received
        number = torch.tensor(int(received or 0))
        distributed.all_reduce(number, distributed.ReduceOp.MAX, self.control)
        return signal.Signals(int(number)) if number else None

    def on_first(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns; with several processes rank 0 alone calls it, and an error there stops all."""
        return on_first_rank(function, self.control) if self.control is not None else function()

    def start_together(self, networks: Sequence[nn.Module], seed: int | None, epoch: int) -> None:
        """Give all ranks rank 0's weights and each its own random numbers; a batch norm sees the batch of all ranks.

        Raises:
            UDAError: batch norm with batch statistics on the CPU, where torch cannot share them.
        """
        if not self.several:
            return
        for network in networks:
            network.train()
            share_batch_norm(network)
        broadcast_modules(networks)
        seed = seed if seed is not None else int.from_bytes(os.urandom(4), "little")
        seed_everything(int(np.random.SeedSequence((seed, rank(), epoch)).generate_state(1)[0]))

    def gathered(self, state: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """This rank's random state, or with several processes the list of all, for a checkpoint."""
        if self.control is None:
            return state
        states: list[Any] = [None] * world_size()
        distributed.all_gather_object(states, state, self.control)
        return states

    def own_part(
        self, saved: dict[str, Any] | list[dict[str, Any]], log: Callable[[str], object]
    ) -> dict[str, Any] | None:
        """This rank's part of what ``gathered`` returned; None where the number of processes has changed."""
        states = saved if isinstance(saved, list) else [saved]
        if len(states) == world_size():
            return states[rank()]
        log(
            f"The checkpoint is of {len(states)} process(es), now there are {world_size()}: training goes on with "
            "other random numbers than it would have"
        )
        return None


def share_batch_norm(network: nn.Module) -> None:
    """Let the batch norms of ``network`` see the batch of all ranks; see ``Ranks.start_together``."""
    live = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if live and next(network.parameters()).device.type != "cuda":
        raise UDAError(
            f"the trainer has {len(live)} batch norm layers, whose statistics of the batch several processes can share "
            "on CUDA devices only. Use one process, or frozen statistics where the method has that setting "
            "(uuds.clip_batch_statistics=frozen)"
        )
    if live:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)


@contextmanager
def seen_as_ddp(trainer: UDATrainer, seen: bool) -> Iterator[None]:
    """Inside, nnU-Net's code sees DDP or not. Where it does it takes ``network`` for a DistributedDataParallel."""
    before, trainer.is_ddp = trainer.is_ddp, seen
    try:
        yield
    finally:
        trainer.is_ddp = before


def share_batch(trainer: UDATrainer, by_nnunets_rule: Callable[[], None]) -> None:
    """Give the trainer this rank's share of the batch.

    Raises:
        UDAError: unless all shares are equal: means over a rank's share would not add up to the batch's mean.
    """
    whole, ranks = trainer.configuration_manager.batch_size, world_size()
    if whole % ranks:
        raise UDAError(
            f"plans {trainer.plans_manager.plans_name!r}: the batch size {whole} cannot be shared equally by {ranks} "
            f"processes. Start another number of processes, or make plans with a multiple of {ranks} "
            "(nnUNetUDA_configure -batch_size)"
        )
    with seen_as_ddp(trainer, trainer.ranks.several):
        by_nnunets_rule()


@contextmanager
def described_once(trainer: UDATrainer) -> Iterator[None]:
    """nnU-Net writes plans and dataset.json in place, and on every rank: inside, they go elsewhere first.

    At the end rank 0 puts each of them whole where it belongs.
    """
    folder = trainer.output_folder_base
    with TemporaryDirectory() as elsewhere:
        trainer.output_folder_base = elsewhere
        try:
            yield
        finally:
            trainer.output_folder_base = folder
        for file in Path(elsewhere).iterdir() if rank() == 0 else []:
            with whole_file(Path(folder, file.name)) as temporary:
                shutil.copyfile(file, temporary)
