"""Checks before a training starts, so that a fault is not found hours later, or never."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_uda.data import convention
from nnunet_uda.data.components import KEY, LOOKED_AT, find_single_components
from nnunet_uda.data.damage import refuse_damaged
from nnunet_uda.data.new_scans import check_prediction, treat_new_scans
from nnunet_uda.data.slices import refuse_mixed_slices
from nnunet_uda.devices import open_device
from nnunet_uda.errors import UDAError
from nnunet_uda.foreign_plans import check_plans
from nnunet_uda.plans import fits_cpu
from nnunet_uda.settings import UDASettings
from nnunet_uda.training.checkpoint import random_state, seed_everything, set_random_state
from nnunet_uda.training.log import settings_table
from nnunet_uda.training.progress import Progress
from nnunet_uda.training.streams import source_remedy
from nnunet_uda.training.trainer_state import settings_in_force
from nnunet_uda.workers import check_numbers

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer


def check_arguments(plans: dict[str, Any], dataset_json: dict[str, Any], device: torch.device) -> None:
    """Refuse unset variables, a device that is not there, broken plans or dataset.json, and regions for labels."""
    check_numbers()
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        convention.environment_folder(variable)
    open_device(str(device))
    check_plans(plans, "the plans file")
    where = f"dataset.json of {plans['dataset_name']}"
    convention.check_dataset_json(dataset_json, where)
    if any(isinstance(value, list) for value in dataset_json["labels"].values()):
        raise UDAError(f"{where}: region-based labels are not supported: give each structure one integer")


def adopt_settings(trainer: UDATrainer) -> None:
    """Copy the settings that nnU-Net keeps as attributes of its own."""
    settings = trainer.settings
    trainer.initial_lr = settings.segmenter_learning_rate
    trainer.weight_decay = settings.segmenter_weight_decay
    trainer.num_epochs = settings.num_epochs
    trainer.num_iterations_per_epoch = settings.iterations_per_epoch
    trainer.num_val_iterations_per_epoch = settings.val_iterations_per_epoch
    trainer.oversample_foreground_percent = settings.foreground_oversampling
    trainer.enable_deep_supervision = settings.deep_supervision
    trainer.save_every = settings.save_every


def say_settings(trainer: UDATrainer) -> None:
    """Write a table of the settings that differ from their defaults into the log."""
    defaults = dataclasses.asdict(UDASettings())
    if trainer.method is not None and trainer.method_settings is not None:
        defaults[trainer.method] = dataclasses.asdict(trainer.method_settings())
    trainer.print_to_log_file(settings_table(settings_in_force(trainer), defaults))


def refuse_unsupported(trainer: UDATrainer) -> None:
    """Refuse cascades, and slices that do not fit the patch."""
    name = type(trainer).__name__
    if trainer.is_cascaded:
        raise UDAError(f"{name} does not support cascades: train the configuration 2d or 3d_fullres")
    where = f"dataset.json of {trainer.plans_manager.dataset_name}"
    refuse_mixed_slices(trainer.dataset_json, trainer.configuration_manager.patch_size, where)


def set_up_process(trainer: UDATrainer) -> None:
    """Seed this process, if the settings ask for it."""
    if trainer.settings.seed is not None:
        seed_everything(trainer.settings.seed)


def refuse_other_settings(trainer: UDATrainer) -> None:
    """The results' ``plans.json`` describes every fold beside it: a training with another ``uda`` must not go there."""
    written, plans = Path(trainer.output_folder_base, "plans.json"), trainer.plans_manager.plans
    if written.exists() and convention.read_json(written).get("uda", {}) != plans.get("uda", {}):
        raise UDAError(
            f"{written} was written by a training with other settings (its 'uda' differs from that of plans "
            f"{plans['plans_name']!r}). Save the new settings under a plans name of their own: "
            "nnUNetUDA_configure -p NEW_NAME"
        )


def mend_results(trainer: UDATrainer) -> None:
    """Write the files that describe the results again if a killed start or a full disk cut them short."""
    if trainer.local_rank == 0:
        folder = Path(trainer.output_folder_base)
        for path in convention.mend_results(folder, trainer.plans_manager.plans, trainer.dataset_json):
            trainer.print_to_log_file(f"WARNING: {path} was cut short: written again from the preprocessed folder's")


def find_components(trainer: UDATrainer) -> None:
    """Find what is one piece in the labels of all folds, and note it in these plans and in those of the results."""
    plans = trainer.plans_manager.plans
    if KEY in plans:
        return
    plans[KEY] = []
    if trainer.settings.keep_largest_component:
        folder = trainer.preprocessed_dataset_folder
        source = infer_dataset_class(folder)(folder)
        cases = source.identifiers[:: -(-len(source.identifiers) // LOOKED_AT)]
        labels = (source.load_case(case)[1][0] for case in cases)
        try:
            plans[KEY] = find_single_components(labels, trainer.label_manager.foreground_labels)
        except Exception:  # a damaged file raises whatever its bytes make of it
            refuse_damaged((source,), source_remedy(trainer), voxels=True)
            raise
    treat_new_scans(trainer.configuration_manager, trainer.plans_manager)
    if plans[KEY]:
        names = dict(zip(trainer.label_manager.foreground_labels, trainer.structures, strict=True))
        pieces = "; ".join(" with ".join(names[value] for value in group) for group in plans[KEY])
        trainer.print_to_log_file(f"One piece in every source label, so predictions keep the largest alone: {pieces}")


def try_prediction(trainer: UDATrainer) -> None:
    """Predict a made-up scan, so that a fault shows now, not with the first new scan. Draws no random number."""
    state = random_state()
    arguments = (trainer.plans_manager.plans, trainer.configuration_name, trainer.dataset_json)
    check_prediction(type(trainer).__name__, trainer.plain_network, *arguments)
    set_random_state(state)  # a network was made


def make_ready(trainer: UDATrainer) -> None:
    """Refuse what can be refused, initialise the trainer, and let all ranks begin with the same network.

    Raises:
        UDAError: for whatever would fail, or go wrong unseen, later.
    """
    trainer.ranks.on_first(lambda: mend_results(trainer))
    refuse_other_settings(trainer)
    if not trainer.was_initialized:
        trainer.initialize()
    find_components(trainer)
    trainer.ranks.on_first(lambda: try_prediction(trainer))
    networks = trainer.plain_network, trainer.networks
    trainer.ranks.start_together(networks, trainer.settings.seed, trainer.current_epoch)
    if trainer.ranks.several:
        trainer.ranks.on_first(lambda: trainer.do_split() and None)  # writes splits_final.json where there is none


def new_progress(trainer: UDATrainer) -> Progress:
    """The progress of this training. Warns of large plans on a CPU, and says how to shorten a training."""
    plans = trainer.plans_manager
    shorter = (
        f"nnUNetUDA_configure -d {plans.dataset_name} -c {trainer.configuration_name} -p NEW_NAME -from "
        f"{plans.plans_name}"
    )
    remedy = f"{shorter} -set num_epochs=... (and -preset cpu on a CPU), then train with -p NEW_NAME"
    if trainer.device.type == "cpu":
        where = f"on the CPU, with {torch.get_num_threads()} thread(s)"
        trainer.print_to_log_file(
            f"Training {where}"
            if fits_cpu(trainer.configuration_manager.configuration)
            else f"WARNING: training {where}; nnU-Net makes its plans for a GPU. Plans for a CPU: {shorter} -preset cpu"
        )
    steps = trainer.num_iterations_per_epoch
    return Progress(trainer.num_epochs, steps, trainer.device.type, remedy, trainer.print_to_log_file)
