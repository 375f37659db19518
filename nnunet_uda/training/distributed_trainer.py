"""nnU-Net's trainer as one of several processes that share each batch, on CPUs or CUDA devices, on any machines."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, distributed, nn

from nnunet_uda.collectives import (
    average_gradients,
    broadcast_modules,
    global_sum,
    on_first_rank,
    patient_group,
    world_size,
)
from nnunet_uda.errors import UDAError
from nnunet_uda.files import whole_file
from nnunet_uda.training.checkpoint import plain, seed_everything

Result = TypeVar("Result")


class DistributedTrainer(nnUNetTrainer):
    """What a trainer needs to be one of several; with one process every method does nothing, or what it always did.

    nnU-Net wraps its network in torch's DistributedDataParallel, which averages gradients where the wrapper itself is
    called. Methods with several networks call parts of them, so nothing is wrapped here: ``share_gradients`` averages
    an optimiser's gradients before its step, and all ranks take the same one. nnU-Net's names stay: ``is_ddp`` says
    that there are several processes, ``local_rank`` is this one's number among all, on all machines.

    What is per rank by nature: random numbers, so every rank draws cases, augmentation and positions of its own. Only
    rank 0 writes, but for the predictions of the final validation, which all share.

    The subclass calls ``start_together`` when weights are as training begins with them.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.control: distributed.ProcessGroup | None = None
        if self.is_ddp:  # nnU-Net takes the rank for a CUDA device's number
            self.control = patient_group()
            self.device = device
            if device.type == "cuda":
                self.device = torch.device("cuda", torch.cuda.current_device())
            else:
                self.grad_scaler = None

    # -- networks ------------------------------------------------------------------------------------------------

    def _set_batch_size_and_oversample(self):
        """This rank's share of the batch, by nnU-Net's rule.

        Raises:
            UDAError: unless all shares are equal: means over a rank's share would not add up to the batch's mean.
        """
        whole, ranks = self.configuration_manager.batch_size, world_size()
        if whole % ranks:
            raise UDAError(
                f"plans {self.plans_manager.plans_name!r}: the batch size {whole} cannot be shared equally by {ranks} "
                f"processes. Start another number of processes, or make plans with a multiple of {ranks} "
                "(nnUNetUDA_configure -batch_size)"
            )
        with self._seen_as_ddp(self.several):
            super()._set_batch_size_and_oversample()

    def initialize(self):
        with self._seen_as_ddp(False):
            super().initialize()

    @property
    def several(self) -> bool:
        """Whether there are several processes, whatever nnU-Net's code is made to see."""
        return self.control is not None

    @contextmanager
    def _seen_as_ddp(self, seen: bool) -> Iterator[None]:
        """Where nnU-Net's code in here sees DDP, it takes ``self.network`` for a DistributedDataParallel."""
        before, self.is_ddp = self.is_ddp, seen
        try:
            yield
        finally:
            self.is_ddp = before

    def _build_loss(self):
        """nnU-Net's loss with a Dice over the batch of all ranks, and the weights that it has with one."""
        with self._seen_as_ddp(self.several):
            loss = super()._build_loss()
        if self.several and isinstance(loss, DeepSupervisionWrapper):  # for its wrapper, nnU-Net keeps a trace
            weights = np.array(loss.weight_factors)
            weights[-1] = 0
            loss.weight_factors = tuple(weights / weights.sum())
        return loss

    def set_deep_supervision_enabled(self, enabled: bool):
        with self._seen_as_ddp(False):
            super().set_deep_supervision_enabled(enabled)

    def start_together(self, *networks: nn.Module) -> None:
        """Give all ranks rank 0's weights and each its own random numbers; a batch norm sees the batch of all ranks.

        Raises:
            UDAError: batch norm with batch statistics on the CPU, where torch cannot share them.
        """
        if not self.several:
            return
        for network in networks:
            network.train()
            self._share_batch_norm(network)
        broadcast_modules(networks)
        seed = self.settings.seed if self.settings.seed is not None else int.from_bytes(os.urandom(4), "little")
        entropy = np.random.SeedSequence((seed, self.local_rank, self.current_epoch))
        seed_everything(int(entropy.generate_state(1)[0]))

    def _share_batch_norm(self, network: nn.Module) -> None:
        live = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        if live and self.device.type != "cuda":
            raise UDAError(
                f"{type(self).__name__} has {len(live)} batch norm layers, whose statistics of the batch several "
                "processes can share on CUDA devices only. Use one process, or frozen statistics where the method has "
                "that setting (uuds.clip_batch_statistics=frozen)"
            )
        if live:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)

    # -- steps ---------------------------------------------------------------------------------------------------

    def share_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace the gradients of an optimiser's parameters by their means over ranks."""
        if self.several:
            average_gradients((p for group in optimizer.param_groups for p in group["params"]), self.control)

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise mean; what is not finite on one rank is not finite on any."""
        return global_sum(values) / world_size()

    def signal_of_any_rank(self, received: signal.Signals | None) -> signal.Signals | None:
        """The signal that this rank or another has received; every rank asks after each step."""
        if not self.several:
            return received
        number = torch.tensor(int(received or 0))
        distributed.all_reduce(number, distributed.ReduceOp.MAX, self.control)
        return signal.Signals(int(number)) if number else None

    # -- files ---------------------------------------------------------------------------------------------------

    def on_first_rank(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns; with several processes rank 0 alone calls it, and an error there stops all."""
        return on_first_rank(function, self.control) if self.several else function()

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True):
        """nnU-Net's, of rank 0 alone; numpy's numbers as Python's, and shown at once where the output is a pipe."""
        if self.local_rank == 0:
            shown = [plain(each) for each in args]
            super().print_to_log_file(*shown, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)
            sys.stdout.flush()

    def on_train_start(self):
        if self.several:
            self.on_first_rank(lambda: self.do_split() and None)  # nnU-Net writes splits_final.json where there is none
        folder = self.output_folder_base
        with TemporaryDirectory() as elsewhere:  # nnU-Net writes plans and dataset.json in place, and on every rank
            self.output_folder_base = elsewhere
            try:
                super().on_train_start()
            finally:
                self.output_folder_base = folder
            for file in Path(elsewhere).iterdir() if self.local_rank == 0 else []:
                with whole_file(Path(folder, file.name)) as temporary:
                    shutil.copyfile(file, temporary)

    def states_of_ranks(self, state: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """This rank's random state, or with several processes the list of all, for a checkpoint."""
        if not self.several:
            return state
        states: list[Any] = [None] * world_size()
        distributed.all_gather_object(states, state, self.control)
        return states

    def state_of_rank(self, saved: dict[str, Any] | list[dict[str, Any]]) -> dict[str, Any] | None:
        """This rank's part of what ``states_of_ranks`` returned; None where the number of processes has changed."""
        states = saved if isinstance(saved, list) else [saved]
        if len(states) == world_size():
            return states[self.local_rank]
        self.print_to_log_file(
            f"The checkpoint is of {len(states)} process(es), now there are {world_size()}: training goes on with "
            "other random numbers than it would have"
        )
        return None
