"""The base of every trainer here: nnU-Net's trainer with a second, unlabelled data stream and several networks."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.utilities.file_and_folder_operations import join
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from nnunet_uda.data.convention import (
    check_dataset_json,
    environment_folder,
    labelled_target,
    mend_results,
    normalisation_warning,
    read_domains,
    read_json,
)
from nnunet_uda.data.damage import refuse_damaged
from nnunet_uda.data.new_scans import check_prediction, treating_new_scans
from nnunet_uda.data.slices import refuse_mixed_slices
from nnunet_uda.data.target import (
    LabelledTargetDataset,
    TargetDataset,
    labelled_identifiers,
    preprocess_target,
    target_identifiers,
)
from nnunet_uda.devices import open_device
from nnunet_uda.errors import UDAError, print_without_traceback
from nnunet_uda.files import write_json
from nnunet_uda.foreign_plans import check_before_building, check_plans
from nnunet_uda.losses.dice import soft_dice_loss
from nnunet_uda.losses.prototypes import IGNORED
from nnunet_uda.methods import settings_of
from nnunet_uda.networks.instance_norm import use_fast_instance_norm
from nnunet_uda.networks.recomputed import use_slim_blocks
from nnunet_uda.quality.cases import FILE as QUALITY
from nnunet_uda.training.background import outside_mask
from nnunet_uda.training.checkpoint import (
    PREVIOUS,
    plain,
    random_state,
    read_checkpoint,
    seed_everything,
    set_former_aside,
    set_random_state,
    write_checkpoint,
)
from nnunet_uda.training.cpu import keep_freed_memory, without_denormals
from nnunet_uda.training.expectation import calibrate_trainer, expectation, seconds_for
from nnunet_uda.training.log import in_columns, settings_table
from nnunet_uda.training.model_choice import ModelChoice
from nnunet_uda.training.pictures import plot_curves
from nnunet_uda.training.preview import preview_rows, write_trainers_panels
from nnunet_uda.training.progress import Progress
from nnunet_uda.training.stoppable_trainer import StoppableTrainer
from nnunet_uda.training.streams import (
    Unlabelled,
    allowed_mirroring,
    check_source_fold,
    make_loader,
    reduced,
    refuse_empty_labels,
)
from nnunet_uda.training.trainer_state import check_checkpoint, checkpoint_of, restore
from nnunet_uda.training.translated_dataset import translated_validation
from nnunet_uda.training.updates import Updates, adam, frozen
from nnunet_uda.workers import environment

__all__ = ["NonFiniteLossError", "UDATrainer", "adam", "frozen", "middle_slice"]


class NonFiniteLossError(UDAError):
    """A loss term became NaN or infinite."""


class UDATrainer(StoppableTrainer):
    """Two data streams, several networks, one segmenter that predicts.

    ``self.network`` is nnU-Net's auto-configured network: its checkpoints are nnU-Net checkpoints. A method adds
    ``build_networks`` and ``build_optimizers`` for everything else, and ``train_on``, which makes named ``update``
    calls. What lives in ``self.networks`` (buffers such as memory banks included) and ``self.optimizers`` is saved,
    restored and put into training or evaluation mode here.

    Settings come from the plans' ``uda`` object (``nnunet_uda.settings``); a subclass fixes some of its method's own
    in ``fixed_settings``.
    """

    method: str | None = None
    method_settings: type | None = None
    fixed_settings: dict[str, Any] = {}
    needs_target = True
    uses_labelled_target = True
    """Whether the labels of the target scans that ``dataset.json`` names are learned beside the source's."""
    network_update = "segmenter"
    """The name of the update that ``self.optimizer``, which owns ``self.network``, makes."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ):
        sys.excepthook = print_without_traceback
        for variable in ("nnUNet_preprocessed", "nnUNet_results"):
            environment_folder(variable)
        open_device(str(device))
        check_plans(plans, "the plans file")
        check_dataset_json(dataset_json, f"dataset.json of {plans['dataset_name']}")
        self.settings, self.own_settings = settings_of(type(self), plans)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.adopt_settings()
        self.networks = nn.ModuleDict()
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.dataloader_target = None
        self.dataloader_labelled = None
        self.progress: Progress | None = None
        self.loss_history: dict[str, list[float]] = {}
        self.model_choice = ModelChoice(self.settings)
        self._restored_random_state: dict[str, Any] | None = None
        self._begins_anew = True
        self._labelled_due = False

    def adopt_settings(self) -> None:
        """Settings that nnU-Net keeps as attributes of its own."""
        self.initial_lr = self.settings.segmenter_learning_rate
        self.weight_decay = self.settings.segmenter_weight_decay
        self.num_epochs = self.settings.num_epochs
        self.num_iterations_per_epoch = self.settings.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.val_iterations_per_epoch
        self.oversample_foreground_percent = self.settings.foreground_oversampling
        self.enable_deep_supervision = self.settings.deep_supervision
        self.save_every = self.settings.save_every

    # -- what a method overrides ---------------------------------------------------------------------------------

    def build_networks(self) -> dict[str, nn.Module]:
        """Networks beside the segmenter, by name."""
        return {}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimisers beside the segmenter's, by the name of the update they make."""
        return {}

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        """One training step: forward passes and ``update`` calls.

        Args:
            source: ``(B, C, *patch)`` z-scored source images.
            label: ``(B, 1, *patch)`` integer labels; with deep supervision a list from fine to coarse. The dataset's
                ignore label, if any, is in there: ``self.loss`` leaves it out, other losses take ``self.known(label)``.
            target: ``(B, C, *patch)`` z-scored target images without labels, unrelated to ``source``.
        """
        raise NotImplementedError

    def labelled_target_loss(self, images: Tensor, label: Tensor | list[Tensor]) -> Tensor:
        """The segmentation loss of labelled target images, a term of every update of the segmenter.

        Args:
            images: ``(b, C, *patch)`` z-scored; b follows from the setting ``labelled_target_share``.
            label: as ``train_on`` gets it.
        """
        return self.loss(self.study(images), label)

    def study(self, images: Tensor) -> list[Tensor] | Tensor:
        """Logits of the network that the segmenter's update trains; it is another one than ``segment``'s where a
        teacher predicts."""
        return self.segment(images)

    def reads_target(self) -> bool:
        """Whether ``train_on`` gets a target batch in the present epoch; a schedule may need none in a part of it."""
        return self.needs_target

    def translate(self, source: Tensor) -> Tensor:
        """Source images as the segmenter is to see them at validation; here unchanged. ``(B, C, *patch)``."""
        return source

    def outside_mask(self, reference: Tensor) -> Tensor | None:
        """Where ``reference``, images as ``train_on`` gets them, lies outside of nnU-Net's nonzero mask (see there)."""
        return outside_mask(reference, self.configuration_manager.use_mask_for_norm)

    def restore_background(self, images: Tensor, reference: Tensor) -> Tensor:
        """``images``, made of ``reference`` by a restyling or translation, with 0 where that lies outside of the mask.

        At prediction these voxels are 0, in source and target alike, so a segmenter must see them so in training. Call
        it last: on what a generator or ``RandomStyle`` returns, and behind every shift, scale and clip of it, before
        the image is segmented or discriminated, and in ``translate``. Gradients flow through the other voxels.

        Args:
            images: ``(B, C, *patch)``.
            reference: the images that they were made of, see ``outside_mask``; of the same grid.
        """
        outside = self.outside_mask(reference)
        return images if outside is None else images.masked_fill(outside, 0)

    @property
    def translates(self) -> bool:
        """Whether ``translate`` changes images."""
        return type(self).translate is not UDATrainer.translate

    # -- set-up --------------------------------------------------------------------------------------------------

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("build_network_architecture")
        if isinstance(own, staticmethod | classmethod):
            cls.build_network_architecture = type(own)(treating_new_scans(own.__func__))

    @staticmethod
    @treating_new_scans
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """nnU-Net's network from the plans, for training and prediction; its instance norms faster on the CPU, and with
        fewer maps kept for the gradient. Prediction comes here with plans that no trainer has looked at."""
        check_before_building(plans_manager.plans)
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        return use_slim_blocks(use_fast_instance_norm(network))

    def initialize(self):
        self._refuse_unsupported()
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.settings.seed is not None:
            seed_everything(self.settings.seed)
        super().initialize()
        self.networks = use_fast_instance_norm(nn.ModuleDict(self.build_networks()).to(self.device))
        self.optimizers = {self.network_update: self.optimizer, **self.build_optimizers()}
        self.updates = self._new_updates()
        self.prepare_network()
        if self._do_i_compile():
            for network in self.networks.values():
                network.compile()
        own = {self.method: dataclasses.asdict(self.method_settings())} if self.method_settings is not None else {}
        defaults = dataclasses.asdict(type(self.settings)()) | own
        self.print_to_log_file(settings_table(self.settings_dict(), defaults))

    def prepare_network(self) -> None:
        """Make the passes that training steps call: here the segmenter's encoder and decoder, each compiled."""
        module = self.plain_network
        self.encoder, self.decoder = module.encoder, module.decoder
        if self._do_i_compile():
            self.encoder, self.decoder = torch.compile(module.encoder), torch.compile(module.decoder)

    def _refuse_unsupported(self) -> None:
        name = type(self).__name__
        if self.is_cascaded:
            raise UDAError(f"{name} does not support cascades: train the configuration 2d or 3d_fullres")
        where = f"dataset.json of {self.plans_manager.dataset_name}"
        refuse_mixed_slices(self.dataset_json, self.configuration_manager.patch_size, where)
        if self.label_manager.has_regions:
            raise UDAError(
                f"{name} does not support region-based labels (dataset.json, 'labels'): give each structure one integer"
            )

    def settings_dict(self) -> dict[str, Any]:
        """All settings in force, defaults included."""
        own = {self.method: dataclasses.asdict(self.own_settings)} if self.own_settings is not None else {}
        return dataclasses.asdict(self.settings) | own

    @property
    def plain_network(self) -> nn.Module:
        """The segmenter without torch.compile's wrapper."""
        return self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network

    def configure_optimizers(self):
        optimizer, scheduler = super().configure_optimizers()
        scheduler.optimizer = self.network_optimizer() or optimizer
        return scheduler.optimizer, scheduler

    def network_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimiser of ``self.network``, under nnU-Net's schedule; None is nnU-Net's own SGD."""
        if self.settings.segmenter_optimizer == "sgd":
            return None
        return adam(self.network.parameters(), self.initial_lr, 0.5, weight_decay=self.weight_decay)

    def adam_for(self, *names: str, learning_rate: float, beta1: float, beta2: float = 0.999) -> torch.optim.Optimizer:
        """Adam for the networks of these names."""
        return adam([p for name in names for p in self.networks[name].parameters()], learning_rate, beta1, beta2)

    def set_rate(self, rate: float, *names: str) -> None:
        """Let the optimisers of these names go on with the learning rate ``rate``."""
        for name in names:
            for group in self.optimizers[name].param_groups:
                group["lr"] = rate

    def _build_loss(self):
        if self.settings.segmentation_loss == "dice_ce":
            return super()._build_loss()
        loss = partial(soft_dice_loss, ignore_label=self.label_manager.ignore_label)
        if not self.enable_deep_supervision:
            return loss
        weights = np.array([1 / 2**level for level in range(len(self._get_deep_supervision_scales()))])
        weights[-1] = 0
        return DeepSupervisionWrapper(loss, weights / weights.sum())

    # -- data ----------------------------------------------------------------------------------------------------

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        mirror_axes = self.inference_allowed_mirroring_axes = allowed_mirroring(
            self.settings.mirror, mirror_axes, self.structures, self.plans_manager.plans,
            len(self.configuration_manager.patch_size), self.print_to_log_file,
        )  # fmt: skip
        if self.settings.augmentation == "none":
            initial_patch_size = np.array(self.configuration_manager.patch_size)
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def get_training_transforms(self, *args, **kwargs):
        """nnU-Net's pipeline, less what the setting ``augmentation`` turns off; reproducible where a seed is set."""
        pipeline = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        return reduced(pipeline, self.settings.augmentation, self.settings.seed is not None)

    @property
    def target_batch_size(self) -> int:
        """Unlabelled target patches in a step."""
        return self.batch_size

    def get_target_transforms(self, *args, **kwargs):
        """The pipeline of unlabelled target patches; takes what ``get_training_transforms`` takes."""
        return self.get_training_transforms(*args, **kwargs)

    def do_split(self):
        """nnU-Net's split, but a fold outside the splits, cases that do not exist and too few cases are refused."""
        check_source_fold(
            Path(self.preprocessed_dataset_folder_base, "splits_final.json"), self.fold,
            lambda: set(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)),
            self.dataset_json["numTraining"],
        )  # fmt: skip
        return super().do_split()

    def get_dataloaders(self):
        labelled = self.uses_labelled_target and self.settings.labelled_target_share > 0
        dataset = self.prepare_labelled_target() if labelled else None
        if not (self.needs_target or dataset):
            return super().get_dataloaders()
        workers = get_allowed_n_proc_DA()  # one budget for all streams
        shares = [max(1, workers // part) if workers and stream else 0 for part, stream in
                  ((2, self.needs_target), (4, dataset))]  # fmt: skip
        with environment("nnUNet_n_proc_DA", str(max(1, workers - sum(shares)) if workers else 0)):
            loaders = super().get_dataloaders()
        if self.needs_target:
            self.dataloader_target = self._target_loader(shares[0])
        if dataset is not None:
            self.dataloader_labelled = self._labelled_target_loader(dataset, shares[1])
        return loaders

    def get_tr_and_val_datasets(self):
        self.training_dataset, self.validation_dataset = super().get_tr_and_val_datasets()
        refuse_damaged((self.training_dataset, self.validation_dataset), self._source_remedy)
        labels = self.label_manager.foreground_labels
        refuse_empty_labels(self.training_dataset, labels, self.preprocessed_dataset_folder, self.fold)
        return self.training_dataset, self.validation_dataset

    @property
    def _source_remedy(self) -> str:
        plans = self.plans_manager
        return (
            f"Preprocess the source again: nnUNetv2_preprocess -d {plans.dataset_name} -plans_name {plans.plans_name} "
            f"-c {self.configuration_name}, then the same command with --c"
        )

    @property
    def _target_remedy(self) -> str:
        return "Remove the files of these cases: the same command with --c preprocesses them again"

    def refuse_damaged_cases(self) -> None:
        refuse_damaged((self.training_dataset, self.validation_dataset), self._source_remedy, voxels=True)
        if self.needs_target:
            refuse_damaged((self.target_dataset,), self._target_remedy, voxels=True)
        if self.dataloader_labelled is not None:
            refuse_damaged((self.labelled_target_dataset,), self._target_remedy, voxels=True)

    def prepare_target(self) -> TargetDataset:
        """The fold's target training cases, preprocessed now if they are missing or stale."""
        domains = read_domains(self.dataset_json)
        warning = normalisation_warning(self.dataset_json, domains)
        if warning:
            self.print_to_log_file(f"WARNING: {warning}")
        folder = self.on_first_rank(
            lambda: preprocess_target(
                self.plans_manager,
                self.configuration_name,
                self.dataset_json,
                default_num_processes,
                self.print_to_log_file,
            )
        )
        identifiers = target_identifiers(folder, self.fold)
        here = " here" if labelled_target(self.dataset_json) else ""
        self.print_to_log_file(
            f"Unlabelled target: {len(identifiers)} {domains.target} case(s) from {folder}. No target label is read"
            f"{here}; pseudo Dice comes from {domains.source} validation cases"
        )
        return TargetDataset(str(folder), identifiers)

    def prepare_labelled_target(self) -> LabelledTargetDataset | None:
        """The fold's labelled target training cases, preprocessed now if they are missing or stale; mostly None.

        Raises:
            UDAError: a scan that ``dataset.json`` names cannot be had with its label.
        """
        listed = labelled_target(self.dataset_json)
        if not listed:
            return None
        folder = self.on_first_rank(
            lambda: preprocess_target(
                self.plans_manager, self.configuration_name, self.dataset_json, default_num_processes,
                self.print_to_log_file, labelled=True,
            )
        )  # fmt: skip
        identifiers = labelled_identifiers(folder, self.fold, listed)
        self.print_to_log_file(
            f"Labelled target: {', '.join(identifiers) or 'no case in this fold'}, from {folder}. No other target "
            "label is read"
        )
        dataset = LabelledTargetDataset(str(folder), identifiers)
        refuse_damaged((dataset,), self._target_remedy)
        return dataset if identifiers else None

    def get_labelled_target_transforms(self, *args, **kwargs):
        """The pipeline of labelled target patches, as they are at prediction: without a method's changes of style."""
        return UDATrainer.get_training_transforms(self, *args, **kwargs)

    def _labelled_target_loader(self, dataset: LabelledTargetDataset, num_processes: int) -> Iterator[dict]:
        self.labelled_target_dataset = dataset
        share = self.settings.labelled_target_share
        number = max(1, round(self.batch_size * share / (1 - share)))
        return self._further_loader(
            dataset, number, self.label_manager, self.oversample_foreground_percent,
            self.get_labelled_target_transforms, self._get_deep_supervision_scales(), num_processes,
        )  # fmt: skip

    def _target_loader(self, num_processes: int) -> Iterator[dict]:
        self.target_dataset = self.prepare_target()
        refuse_damaged((self.target_dataset,), self._target_remedy)
        return self._further_loader(
            self.target_dataset,
            self.target_batch_size,
            Unlabelled(),
            0.0,
            self.get_target_transforms,
            None,
            num_processes,
        )

    def _further_loader(
        self,
        dataset: nnUNetBaseDataset,
        batch_size: int,
        label_manager: Any,
        oversampling: float,
        get_transforms: Callable[..., ComposeTransforms],
        scales: list | None,
        num_processes: int,
    ) -> Iterator[dict]:
        """A stream beside nnU-Net's own two, as these are made."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        transforms = get_transforms(
            self.configuration_manager.patch_size, rotation, scales, mirror_axes, dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
        )  # fmt: skip
        sizes = initial_patch_size, self.configuration_manager.patch_size
        return make_loader(
            dataset,
            batch_size,
            sizes,
            transforms,
            num_processes,
            self.device.type == "cuda",
            label_manager,
            oversampling,
        )

    # -- the loop ------------------------------------------------------------------------------------------------

    def run_training(self):
        with without_denormals() if self.device.type == "cpu" else nullcontext():
            super().run_training()

    def on_train_start(self):
        self._began = time.monotonic()
        self.on_first_rank(self.mend_results)
        self._refuse_other_settings()
        if not self.was_initialized:
            self.initialize()
        self.on_first_rank(self._check_prediction)
        self.start_together(self.plain_network, self.networks)
        super().on_train_start()
        if self.needs_target:
            self.model_choice.open_target(self.target_dataset, self.configuration_manager.patch_size, self.batch_size)
        self.print_to_log_file(f"checkpoint_best follows {self.model_choice.criterion}, without target labels")
        self.progress = self._new_progress()
        if self._restored_random_state is not None:
            set_random_state(self._restored_random_state)  # last: opening the loaders has drawn random numbers

    def _new_progress(self) -> Progress:
        """Warns on the CPU, and says what to do against a training that is too long."""
        plans = self.plans_manager
        shorter = (
            f"nnUNetUDA_configure -d {plans.dataset_name} -c {self.configuration_name} -p NEW_NAME -from "
            f"{plans.plans_name}"
        )
        remedy = f"{shorter} -set num_epochs=... (and -preset cpu on a CPU), then train with -p NEW_NAME"
        if self.device.type == "cpu":
            self.print_to_log_file(
                f"WARNING: training on the CPU, with {torch.get_num_threads()} thread(s); nnU-Net makes its plans for "
                f"a GPU. Plans for a CPU: {shorter} -preset cpu"
            )
        steps = self.num_iterations_per_epoch
        return Progress(self.num_epochs, steps, self.device.type, remedy, self.print_to_log_file)

    def mend_results(self) -> None:
        """Write what describes the results again where a start was killed in the middle, or the disk was full."""
        if self.local_rank == 0:
            for path in mend_results(Path(self.output_folder_base), self.plans_manager.plans, self.dataset_json):
                self.print_to_log_file(f"WARNING: {path} was cut short: written again from the preprocessed folder's")

    def _refuse_other_settings(self) -> None:
        """The output folder's plans describe every fold in it, so another ``uda`` object must not go there."""
        written = Path(self.output_folder_base, "plans.json")
        if written.exists() and read_json(written).get("uda", {}) != self.plans_manager.plans.get("uda", {}):
            raise UDAError(
                f"{written} was written by a training with other settings (its 'uda' differs from that of plans "
                f"{self.plans_manager.plans_name!r}). Save the new settings under a plans name of their own: "
                "nnUNetUDA_configure -p NEW_NAME"
            )

    def _check_prediction(self) -> None:
        """Refuse now what would only show, or not even that, when new scans are predicted."""
        state = random_state()
        arguments = (self.plans_manager.plans, self.configuration_name, self.dataset_json)
        check_prediction(type(self).__name__, self.plain_network, *arguments)
        set_random_state(state)  # a network was made

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.networks.train()
        if self.progress is not None:
            self.progress.epoch_begins(self.current_epoch, self.steps_before)
        if self.settings.segmenter_schedule == "constant":
            for group in self.optimizer.param_groups:
                group["lr"] = self.initial_lr

    def train_step(self, batch: dict) -> dict:
        source, label = self._to_device(batch["data"]), self._to_device(batch["target"])
        target = self._to_device(next(self.dataloader_target)["data"]) if self.reads_target() else None
        self.in_step = True
        self.updates = self._new_updates()
        self._labelled_due = self.dataloader_labelled is not None
        self.train_on(source, label, target)
        losses = self.updates.finish(self.mean_over_ranks)
        for name, value in losses.items():
            if not np.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss term '{name}' became {value} in epoch {self.current_epoch}; all terms: {losses}. "
                    f"Training stops; the checkpoints in {self.output_folder} are from before it. Lower the learning "
                    "rate or the term's weight"
                )
        first = losses.get("segmentation", next(iter(losses.values())))  # epochs may leave the segmenter as it is
        outputs = {"loss": first, **losses}
        self.step_done(outputs)
        if self.progress is not None:
            self.progress.step_done()
        return outputs

    def _new_updates(self) -> Updates:
        def share(optimizer: torch.optim.Optimizer) -> None:
            self.share_gradients(optimizer)

        return Updates(self.optimizers, self.grad_scaler, share)

    def update(self, name: str, terms: dict[str, Tensor], max_norm: float | None = None) -> None:
        """One step of the optimiser ``name`` on the sum of ``terms``, each of which is logged under its own name."""
        with self.updating(name, max_norm) as add:
            add(terms)

    @contextmanager
    def updating(self, name: str, max_norm: float | None = None) -> Iterator[Callable[[dict[str, Tensor]], None]]:
        """As ``update``, of terms given in parts: what a part's gradient needs is free before the next one is computed.

        Yields:
            A function that takes a part's terms; a term of several parts is their sum.
        """
        with self.updates.updating(name, max_norm) as add:
            yield add
            if name == self.network_update and self._labelled_due:
                self._labelled_due = False  # once a step, whatever updates there are
                batch, share = next(self.dataloader_labelled), self.settings.labelled_target_share
                with self.autocast():
                    loss = self.labelled_target_loss(self._to_device(batch["data"]), self._to_device(batch["target"]))
                add({"labelled_target": share / (1 - share) * loss})

    def autocast(self):
        """Mixed precision where CUDA has it, nothing elsewhere."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def _to_device(self, data: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(data, list):
            return [item.to(self.device, non_blocking=True) for item in data]
        return data.to(self.device, non_blocking=True)

    def on_train_epoch_end(self, train_outputs: list[dict]):
        train_outputs = self.whole_epoch(train_outputs)
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        for name in train_outputs[0]:
            if name != "loss":
                mean = float(np.mean([output[name] for output in train_outputs]))
                before = [math.nan] * self.current_epoch  # of a term that appears late
                self.loss_history.setdefault(name, before).append(mean)
        shown = {name: self.loss_history[name][-1] for name in train_outputs[0] if name != "loss"}
        self.print_to_log_file(in_columns("losses", shown), add_timestamp=False)

    def on_validation_epoch_start(self):
        super().on_validation_epoch_start()
        self.networks.eval()

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's step on source validation images as ``translate`` returns them: no target label is needed."""
        translated = self.translate_images(self._to_device(batch["data"]))
        return super().validation_step(batch | {"data": translated.float()})

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        super().on_validation_epoch_end(val_outputs)
        for logged in self.logger.get_checkpoint().values():
            logged[:] = plain(logged)  # as a checkpoint has them: float32's running mean would be another after --c
        values = self.model_choice.add(
            self.logger.get_value("mean_fg_dice", -1), self._predict, batch_size=self.batch_size, device=self.device,
            mirror_axes=self.inference_allowed_mirroring_axes, num_classes=self.label_manager.num_segmentation_heads,
        )  # fmt: skip
        self.model_choice.history = self.on_first_rank(lambda: self.model_choice.history)  # devices differ in last bits
        self.print_to_log_file(in_columns("criteria", values), add_timestamp=False)

    def _predict(self, images: Tensor) -> Tensor:
        with self.autocast():
            return self.finest(self.network(images))

    def on_epoch_end(self):
        epoch = self.current_epoch
        self._best_ema = math.inf  # nnU-Net chooses no checkpoint_best: model_choice does
        super().on_epoch_end()
        self.current_epoch = epoch  # what these checkpoints are of
        for name in self.model_choice.checkpoints():
            self.print_to_log_file(
                f"Writing {name}: mean {self.model_choice.criterion} {self.model_choice.means[-1]:.4f}"
            )
            self.save_checkpoint(join(self.output_folder, name))
        self.current_epoch = epoch + 1
        last = epoch == self.num_epochs - 1
        if self.local_rank == 0 and (last or epoch % self.settings.picture_every == 0):
            plot_curves(join(self.output_folder, "losses.png"), self.loss_history)
            self.model_choice.plot(join(self.output_folder, "criteria.png"))
            self.draw_pictures(Path(self.output_folder, f"pictures/epoch_{epoch:04d}.png"))

    def on_train_end(self):
        super().on_train_end()
        if warning := self.model_choice.warning(self.translates):
            self.print_to_log_file(warning)
        if self.local_rank == 0:
            Path(self.output_folder, PREVIOUS).unlink(missing_ok=True)
        if self.settings.quality_volumes:
            self.on_first_rank(self._write_quality)

    def _write_quality(self) -> None:
        """Calibrate what is to be expected of the final weights, and say it of the target's training scans."""
        if self.stop is not None:
            self.stop.at_once = True  # the final checkpoint is written: with --c this is done again
        self.print_to_log_file(f"Calibrating the quality estimate ({QUALITY}); setting quality_volumes=0 leaves it out")
        self.network.eval()
        self.networks.eval()
        self.set_deep_supervision_enabled(False)
        seconds = seconds_for(time.monotonic() - self._began)
        try:
            asked, calibration = calibrate_trainer(self, self.print_to_log_file, seconds)
            write_json(calibration.to_json(), join(self.output_folder, QUALITY))
            if self.needs_target:
                self.print_to_log_file(expectation(asked, calibration, self.target_dataset, seconds))
        except (UDAError, RuntimeError, ValueError) as error:  # the training is done, and is worth more than this
            self.print_to_log_file(f"WARNING: no quality estimate was made: {error}. nnUNetUDA_quality makes it later")
        finally:
            self.set_deep_supervision_enabled(self.enable_deep_supervision)

    def draw_pictures(self, path: Path) -> None:
        """Always the same whole slices: source | translated | label | prediction | target | prediction.

        Where nothing is translated there is no such panel.
        """
        path.parent.mkdir(exist_ok=True)
        self.network.eval()
        self.networks.eval()
        write_trainers_panels(self, path, preview_rows(self))

    def _whole_patch(self, dataset: nnUNetBaseDataset, by_label: bool) -> tuple[Tensor, Tensor]:
        """The patch around the middle of the first case, or around its slice with most label: ``(1, C, *patch)``."""
        data, seg, _, _ = dataset.load_case(dataset.identifiers[0])
        seg = seg[:]
        held = np.isin(seg[0], self.label_manager.foreground_labels)
        index = int(held.sum((1, 2)).argmax()) if by_label else seg.shape[1] // 2
        patch = [1, *self.configuration_manager.patch_size][-3:]
        centre = [index, seg.shape[2] // 2, seg.shape[3] // 2]
        box = [[c - size // 2, c - size // 2 + size] for c, size in zip(centre, patch, strict=True)]
        tensors = [torch.from_numpy(crop_and_pad_nd(array, box, 0)).float()[None] for array in (data[:], seg)]
        if len(self.configuration_manager.patch_size) == 2:
            tensors = [tensor[:, :, 0] for tensor in tensors]
        return tensors[0].to(self.device), self.known(tensors[1].to(self.device))

    # -- checkpoints and validation ------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with everything else under the key ``uda``, written whole or not at all."""
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        position = self.within_epoch or self.position()
        position = position | {"random_state": self.states_of_ranks(position["random_state"])}
        self.on_first_rank(lambda: self._write_checkpoint(filename, position))

    def _write_checkpoint(self, filename: str, position: dict[str, Any]) -> None:
        if self._begins_anew and (former := set_former_aside(Path(self.output_folder))):
            self.print_to_log_file(f"An earlier training of this fold lay here; its checkpoint is now {former}")
        if self._begins_anew:
            Path(self.output_folder, QUALITY).unlink(missing_ok=True)  # it is of other weights
        self._begins_anew = False
        epochs = self.current_epoch + (self.within_epoch is None)
        write_checkpoint(checkpoint_of(self, epochs, position), filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Restore everything ``save_checkpoint`` wrote, as ``read_checkpoint`` reads it: as data alone.

        nnU-Net's own method would read the file once more, and run what is pickled in it.

        Raises:
            UDAError: unreadable file, a checkpoint of another trainer, other plans or other settings.
        """
        checkpoint = read_checkpoint(filename_or_checkpoint)
        check_checkpoint(self, checkpoint, filename_or_checkpoint)
        if not self.was_initialized:
            self.initialize()
        self._begins_anew = False
        self._restored_random_state = self.state_of_rank(restore(self, checkpoint))

    def perform_actual_validation(self, save_probabilities: bool = False):
        """nnU-Net's final validation; where the method translates, on translated source volumes."""
        self.mend_results()
        with translated_validation(self) if self.translates else nullcontext():
            super().perform_actual_validation(save_probabilities)

    def translate_images(self, source: Tensor) -> Tensor:
        with self.autocast():
            return self.translate(source)

    @property
    def structures(self) -> list[str]:
        """The names of the foreground classes, in the order of their values."""
        names = {value: name for name, value in self.dataset_json["labels"].items()}
        return [str(names[label]) for label in self.label_manager.foreground_labels]

    # -- segmenter -----------------------------------------------------------------------------------------------

    def segment(self, images: Tensor) -> list[Tensor] | Tensor:
        """Logits of the segmenter, a list from fine to coarse with deep supervision."""
        return self.decoder(self.encoder(images))

    def finest(self, outputs: list[Tensor] | Tensor) -> Tensor:
        """The full-resolution map of what ``segment`` or the loader's labels hold."""
        return outputs[0] if isinstance(outputs, (list, tuple)) else outputs

    def known(self, label: Tensor | list[Tensor]) -> Tensor:
        """The loader's label at full resolution, ``IGNORED`` (-1) where it is the dataset's ignore label."""
        label, ignored = self.finest(label), self.label_manager.ignore_label
        return label if ignored is None else label.masked_fill(label == ignored, IGNORED)


def middle_slice(images: Tensor) -> np.ndarray:
    """``(1, C, *patch)`` to its first channel's (middle) slice, ``(H, W)``."""
    image = images[0, 0].float().cpu().numpy()
    return image[image.shape[0] // 2] if image.ndim == 3 else image
