"""What a trainer's checkpoint holds, whether one fits a trainer, and how it is put back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_uda.errors import UDAError
from nnunet_uda.quality.cases import FILE as QUALITY
from nnunet_uda.settings import UDASettings
from nnunet_uda.training.checkpoint import (
    PREVIOUS,
    plain,
    read_checkpoint,
    set_former_aside,
    set_random_state,
    write_checkpoint,
)
from nnunet_uda.training.updates import load_optimizer

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer


def settings_in_force(trainer: UDATrainer) -> dict[str, Any]:
    """All settings, defaults included."""
    settings = dataclasses.asdict(trainer.settings)
    if trainer.method is not None and trainer.own_settings is not None:
        settings[trainer.method] = dataclasses.asdict(trainer.own_settings)
    return settings


def checkpoint_of(trainer: UDATrainer, epochs: int, position: dict[str, Any]) -> dict[str, Any]:
    """nnU-Net's checkpoint after ``epochs`` whole epochs, with everything else under the key ``uda``."""
    log = trainer.logger
    return {
        "network_weights": trainer.plain_network.state_dict(),
        "optimizer_state": trainer.optimizer.state_dict(),
        "grad_scaler_state": trainer.grad_scaler.state_dict() if trainer.grad_scaler is not None else None,
        "logging": {name: plain(values[:epochs]) for name, values in log.get_checkpoint().items()},
        "_best_ema": plain(max(log.get_value("ema_fg_dice", None)[:epochs], default=None)),
        "current_epoch": epochs,
        "init_args": trainer.my_init_kwargs,
        "trainer_name": type(trainer).__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        "uda": {
            "settings": settings_in_force(trainer),
            "networks": trainer.networks.state_dict(),
            "optimizers": {n: o.state_dict() for n, o in trainer.optimizers.items() if n != trainer.network_update},
            **position,
            "criteria": {name: values[:epochs] for name, values in trainer.model_choice.history.items()},
        },
    }


class CheckpointFiles:
    """The checkpoints of a training in its output folder."""

    def __init__(self, trainer: UDATrainer) -> None:
        self.trainer = trainer
        self.begins_anew = True
        """Whether nothing was written or loaded yet: what lies there is of an earlier training."""
        self.random_state: dict[str, Any] | None = None
        """Of the checkpoint that was loaded, and of this rank."""

    def save(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with everything else under the key ``uda``, whole or not at all.

        The first one of a training begun anew puts those of an earlier one aside.
        """
        trainer = self.trainer
        if trainer.disable_checkpointing:
            trainer.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        position = trainer.record.position()
        position = position | {"random_state": trainer.ranks.gathered(position["random_state"])}
        trainer.ranks.on_first(lambda: self._write(filename, position))

    def save_chosen(self, epoch: int) -> None:
        """Write the checkpoints that ``epoch``, the last one before the trainer's present one, has earned."""
        trainer, choice = self.trainer, self.trainer.model_choice
        trainer.current_epoch = epoch
        for name in choice.checkpoints():
            trainer.print_to_log_file(f"Writing {name}: mean {choice.criterion} {choice.means[-1]:.4f}")
            trainer.save_checkpoint(str(Path(trainer.output_folder, name)))
        trainer.current_epoch = epoch + 1

    def load(self, filename: str) -> None:
        """Restore what ``save`` wrote; nothing that is pickled in the file is run, as nnU-Net would do.

        Raises:
            UDAError: unreadable file, a checkpoint of another trainer, other plans or other settings.
        """
        trainer = self.trainer
        checkpoint = read_checkpoint(filename)
        check_checkpoint(trainer, checkpoint, filename)
        if not trainer.was_initialized:
            trainer.initialize()
        self.begins_anew = False
        self.random_state = trainer.ranks.own_part(restore(trainer, checkpoint), trainer.print_to_log_file)

    def restore_random_state(self) -> None:
        """Let random numbers go on where they were; nothing without a checkpoint that was loaded."""
        if self.random_state is not None:
            set_random_state(self.random_state)

    def _write(self, filename: str, position: dict[str, Any]) -> None:
        trainer, folder = self.trainer, Path(self.trainer.output_folder)
        if self.begins_anew:
            if former := set_former_aside(folder):
                trainer.print_to_log_file(f"An earlier training of this fold lay here; its checkpoint is now {former}")
            (folder / QUALITY).unlink(missing_ok=True)  # it is of other weights
            self.begins_anew = False
        epochs = trainer.current_epoch + (not trainer.record.within_epoch)
        write_checkpoint(checkpoint_of(trainer, epochs, position), filename)

    def training_is_done(self) -> None:
        """Remove the checkpoint that was kept for the case that the last one could not be read."""
        Path(self.trainer.output_folder, PREVIOUS).unlink(missing_ok=True)


def restore(trainer: UDATrainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Put networks, optimisers and logs back; returns the ``random_state`` of the checkpoint."""
    trainer.my_init_kwargs = checkpoint["init_args"]
    trainer.current_epoch = checkpoint["current_epoch"]
    trainer.logger.load_checkpoint(checkpoint["logging"])
    trainer._best_ema = checkpoint["_best_ema"]
    trainer.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
    trainer.plain_network.load_state_dict(checkpoint["network_weights"])
    load_optimizer(trainer.optimizer, checkpoint["optimizer_state"])
    if trainer.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
        trainer.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
    extra = checkpoint["uda"]
    trainer.networks.load_state_dict(extra["networks"])
    for name, state in extra["optimizers"].items():
        load_optimizer(trainer.optimizers[name], state)
    trainer.record.history = extra["loss_history"]
    trainer.model_choice.history = extra["criteria"]
    trainer.record.steps = extra.get("steps", [])
    return extra["random_state"]


def check_checkpoint(trainer: UDATrainer, checkpoint: dict[str, Any], path: str) -> None:
    """Refuse a checkpoint of another trainer, of other plans or of other settings.

    Raises:
        UDAError: it says what differs, and what to do.
    """
    name = type(trainer).__name__
    advice = "Use the trainer and plans that wrote it, or start anew (-pretrained_weights takes a segmenter only)"
    if checkpoint.get("trainer_name") != name or "uda" not in checkpoint:
        raise UDAError(f"{path} was written by {checkpoint.get('trainer_name')}, not by {name}. {advice}")
    written, chosen, plans = checkpoint["init_args"], trainer.configuration_name, trainer.plans_manager
    theirs, ours = written["plans"]["configurations"], plans.plans["configurations"]
    if written["configuration"] != chosen or theirs.get(chosen) != ours[chosen]:
        raise UDAError(
            f"{path} was written with other plans ({written['plans']['plans_name']}, {written['configuration']}) "
            f"than the present ones ({plans.plans_name}, {chosen}). {advice}"
        )
    old, new = _completed(trainer, checkpoint["uda"]["settings"]), settings_in_force(trainer)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        before, now = ({key: settings.get(key) for key in changed} for settings in (old, new))
        raise UDAError(f"{path} was written with other settings: {before}, now {now}. {advice}")


def _completed(trainer: UDATrainer, written: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, with the defaults of those that came later and without those that are gone."""
    completed = dataclasses.asdict(UDASettings()) | written
    if trainer.method is not None and trainer.method_settings is not None:
        own = dataclasses.asdict(trainer.method_settings(**trainer.fixed_settings))
        of_method = {name: value for name, value in written.get(trainer.method, {}).items() if name in own}
        completed[trainer.method] = own | of_method
    if completed["mirror"] is True and trainer.settings.mirror == "auto":
        completed["mirror"] = "auto"  # the default was true
    return completed
