"""What a trainer's checkpoint holds, whether one fits a trainer, and how it is put back."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from nnunet_uda.errors import UDAError
from nnunet_uda.settings import UDASettings
from nnunet_uda.training.checkpoint import plain
from nnunet_uda.training.updates import load_optimizer

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer


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
            "settings": trainer.settings_dict(),
            "networks": trainer.networks.state_dict(),
            "optimizers": {n: o.state_dict() for n, o in trainer.optimizers.items() if n != trainer.network_update},
            **position,
            "criteria": {name: values[:epochs] for name, values in trainer.model_choice.history.items()},
        },
    }


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
    trainer.loss_history = extra["loss_history"]
    trainer.model_choice.history = extra["criteria"]
    trainer.steps = extra.get("steps", [])
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
    old, new = _completed(trainer, checkpoint["uda"]["settings"]), trainer.settings_dict()
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        before, now = ({key: settings.get(key) for key in changed} for settings in (old, new))
        raise UDAError(f"{path} was written with other settings: {before}, now {now}. {advice}")


def _completed(trainer: UDATrainer, written: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, with the defaults of those that came later."""
    completed = dataclasses.asdict(UDASettings()) | written
    if trainer.own_settings is not None:
        own = dataclasses.asdict(trainer.method_settings(**trainer.fixed_settings))
        completed[trainer.method] = own | written.get(trainer.method, {})
    if completed["mirror"] is True and trainer.settings.mirror == "auto":
        completed["mirror"] = "auto"  # the default was true
    return completed
