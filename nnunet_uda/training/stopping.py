"""Signals that end a training behind any step, the lock on its fold, and what else stopped it, explained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nnunet_uda.errors import UDAError, system_fault
from nnunet_uda.files import remove_leftovers
from nnunet_uda.training.checkpoint import LATEST
from nnunet_uda.training.interruption import StopSignals, fold_lock
from nnunet_uda.training.streams import end_loaders, refuse_damaged_cases

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer

_DEAD_WORKERS = "background workers"  # in batchgenerators' message


class Stopping:
    """Lets SIGTERM and SIGINT end a training within a step; ``--c`` then does the rest of the epoch.

    Args:
        trainer: its ``record`` says where training stands, and ``save_checkpoint`` writes that.
    """

    def __init__(self, trainer: UDATrainer) -> None:
        self.trainer = trainer
        self.signals: StopSignals | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the training is alone on its fold, and a signal is obeyed where ``obey`` is called.

        Raises:
            UDAError: another training on this fold, a damaged case, a dead process, a full disk.
            SystemExit: after a signal, with status 128 + its number.
        """
        trainer, folder = self.trainer, Path(self.trainer.output_folder)
        with ExitStack() as stack, self._faults_explained():
            if trainer.local_rank == 0:
                stack.enter_context(fold_lock(folder))
                remove_leftovers(folder)
            signals = stack.enter_context(StopSignals("The same command with --c goes on from the last checkpoint"))
            self.signals = signals
            stack.callback(end_loaders, trainer)
            try:
                yield
            except RuntimeError as error:
                if signals.received is None or trainer.record.in_step or _DEAD_WORKERS not in str(error):
                    raise
                if not trainer.ranks.several:  # else the others may be anywhere, and a checkpoint needs them
                    self._save()  # the signal reached the loaders' processes too, and they obeyed first
                self._leave(signals)
            signals.received = trainer.ranks.signal_of_any(signals.received)
            if signals.received is not None:
                self._leave(signals)

    def wait_for_steps(self) -> None:
        """From now on a signal waits for ``obey``."""
        if self.signals is not None:
            self.signals.at_once = False

    def end_at_once(self) -> None:
        """From now on a signal ends the process there and then: ``--c`` does again what is being done."""
        if self.signals is not None:
            self.signals.at_once = True

    def obey(self) -> None:
        """A step is whole: write a checkpoint and end if a signal has come, to this rank or to another."""
        if self.signals is None:
            return
        received = self.trainer.ranks.signal_of_any(self.signals.received)
        if received is not None:
            self.signals.received = received
            self._save()
            self._leave(self.signals)

    def _save(self) -> None:
        self.trainer.record.within_epoch = True  # also where not even its first batch has been loaded
        self.trainer.save_checkpoint(str(Path(self.trainer.output_folder, LATEST)))

    def _leave(self, signals: StopSignals) -> NoReturn:
        assert signals.received is not None
        self.trainer.print_to_log_file(f"{signals.received.name}: ended. The same command with --c goes on from here")
        raise SystemExit(128 + signals.received)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Inside is the final validation, which a signal ends at once."""
        goes_on = "The training is complete: the same command with --c, or with --val, repeats the final validation"
        with self._system_explained(), StopSignals(goes_on):
            yield

    @contextmanager
    def _system_explained(self) -> Iterator[None]:
        """A full disk, missing permissions and the like, as one message that says how to go on."""
        try:
            yield
        except (OSError, MemoryError) as error:
            if (fault := system_fault(error)) is None:
                raise
            raise UDAError(
                f"training stopped: {fault}. The checkpoints in {self.trainer.output_folder} are intact: then continue "
                "with --c"
            ) from error

    @contextmanager
    def _faults_explained(self) -> Iterator[None]:
        """What nnU-Net and the loaders raise for a damaged case or a dead process, as one message."""
        trainer = self.trainer
        try:
            with self._system_explained():
                yield
        except UDAError:
            raise
        except (RuntimeError, ValueError) as error:
            if trainer.record.in_step or trainer.dataloader_train is None:
                raise
            trainer.print_to_log_file(f"The training data could not be loaded ({error}): looking for damaged cases")
            refuse_damaged_cases(trainer)
            if _DEAD_WORKERS not in str(error):
                raise
            raise UDAError(
                "a process that loads training data was killed, most often for lack of memory, or failed with the "
                "error printed above; all preprocessed cases can be read. Continue with --c, and with fewer processes "
                "if it was memory (nnUNet_n_proc_DA=4)"
            ) from error
