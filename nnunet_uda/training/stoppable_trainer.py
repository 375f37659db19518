"""nnU-Net's training loop, alone on its fold, that a signal may end at any step and that explains what stopped it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from nnunet_uda.errors import UDAError, system_fault
from nnunet_uda.files import remove_leftovers
from nnunet_uda.training.checkpoint import LATEST, random_state
from nnunet_uda.training.distributed_trainer import DistributedTrainer
from nnunet_uda.training.interruption import StopSignals, fold_lock

_DEAD_WORKERS = "background workers"  # in batchgenerators' message


class StoppableTrainer(DistributedTrainer):
    """What a trainer needs so that SIGTERM and SIGINT end it within a step, and ``--c`` does the rest of the epoch.

    The subclass sets ``in_step`` where weights begin to change and calls ``step_done`` when a step is whole, calls
    ``whole_epoch`` first thing in ``on_train_epoch_end``, writes ``within_epoch`` (or, where that is None,
    ``position()`` and the epoch as done) into its checkpoints, and puts the steps in them back into ``steps``.
    """

    stop: StopSignals | None = None
    in_step = False
    steps: list[dict[str, float]] = []
    """Losses of the epoch's training steps so far."""
    steps_before = 0
    """How many of them an earlier process made."""
    within_epoch: dict[str, Any] | None = None
    """While a checkpoint within an epoch is written: the ``position`` that it is of."""
    before_validation: dict[str, Any] | None = None
    loss_history: dict[str, list[float]]

    def run_training(self):
        """nnU-Net's loop. A signal within an epoch is obeyed after the step under way, with a checkpoint.

        Raises:
            UDAError: another training on this fold, a damaged case, a dead process, a full disk.
            SystemExit: after a signal, with status 128 + its number.
        """
        folder = Path(self.output_folder)
        with ExitStack() as stack, self._faults_explained():
            if self.local_rank == 0:
                stack.enter_context(fold_lock(folder))
                remove_leftovers(folder)
            self.stop = stack.enter_context(StopSignals("The same command with --c goes on from the last checkpoint"))
            stack.callback(self.end_loaders)
            try:
                super().run_training()
            except RuntimeError as error:
                if self.stop.received is None or self.in_step or _DEAD_WORKERS not in str(error):
                    raise
                if self.several:
                    self._leave()  # the others may be anywhere, and a checkpoint needs them
                self._leave_epoch()  # the signal reached the loaders' processes too, and they obeyed first
            self.stop.received = self.signal_of_any_rank(self.stop.received)
            if self.stop.received is not None:
                self._leave()

    def perform_actual_validation(self, save_probabilities: bool = False):
        goes_on = "The training is complete: the same command with --c, or with --val, repeats the final validation"
        with self._system_explained(), StopSignals(goes_on):
            super().perform_actual_validation(save_probabilities)

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        if self.stop is not None:
            self.stop.at_once = False
        self.steps_before = len(self.steps)
        self.num_iterations_per_epoch -= self.steps_before

    def step_done(self, outputs: dict[str, float]) -> None:
        self.steps = [*self.steps, outputs]
        self.in_step = False
        self._obey()

    def whole_epoch(self, train_outputs: list[dict[str, float]]) -> list[dict[str, float]]:
        """The outputs of all of the epoch's steps, those of an earlier process included."""
        self.before_validation = self.position()
        train_outputs = self.steps[: self.steps_before] + train_outputs
        self.num_iterations_per_epoch += self.steps_before
        self.steps, self.steps_before = [], 0
        return train_outputs

    def validation_step(self, batch: dict) -> dict:
        outputs = super().validation_step(batch)
        self._obey()
        return outputs

    def on_epoch_end(self):
        self.before_validation = None
        super().on_epoch_end()

    def position(self) -> dict[str, Any]:
        """Where an epoch's training stands, as far as networks, optimisers and nnU-Net's log do not say it."""
        history = {name: list(values) for name, values in self.loss_history.items()}
        return {"steps": self.steps, "random_state": random_state(), "loss_history": history}

    def end_loaders(self) -> None:
        further = (self.dataloader_target, self.dataloader_labelled)
        for loader in (self.dataloader_train, self.dataloader_val, *further):
            if isinstance(loader, NonDetMultiThreadedAugmenter):
                loader._finish()

    def refuse_damaged_cases(self) -> None:
        """Read every voxel of the cases in use; raise ``UDAError`` naming those that cannot be read."""

    def _obey(self) -> None:
        received = self.signal_of_any_rank(self.stop.received) if self.stop is not None else None
        if received is not None:
            self.stop.received = received
            self._leave_epoch()

    def _leave_epoch(self) -> None:
        self.within_epoch = self.before_validation or self.position()
        self.save_checkpoint(str(Path(self.output_folder, LATEST)))
        self._leave()

    def _leave(self) -> None:
        self.print_to_log_file(f"{self.stop.received.name}: ended. The same command with --c goes on from here")
        raise SystemExit(128 + self.stop.received)

    @contextmanager
    def _system_explained(self) -> Iterator[None]:
        """A full disk, missing permissions and the like, as one message that says how to go on."""
        try:
            yield
        except (OSError, MemoryError) as error:
            if (fault := system_fault(error)) is None:
                raise
            raise UDAError(
                f"training stopped: {fault}. The checkpoints in {self.output_folder} are intact: then continue with --c"
            ) from error

    @contextmanager
    def _faults_explained(self) -> Iterator[None]:
        """What nnU-Net and the loaders raise for a damaged case or a dead process, as one message."""
        try:
            with self._system_explained():
                yield
        except UDAError:
            raise
        except (RuntimeError, ValueError) as error:
            if self.in_step or self.dataloader_train is None:
                raise
            self.print_to_log_file(f"The training data could not be loaded ({error}): looking for damaged cases")
            self.refuse_damaged_cases()
            if _DEAD_WORKERS not in str(error):
                raise
            raise UDAError(
                "a process that loads training data was killed, most often for lack of memory, or failed with the "
                "error printed above; all preprocessed cases can be read. Continue with --c, and with fewer processes "
                "if it was memory (nnUNet_n_proc_DA=4)"
            ) from error
