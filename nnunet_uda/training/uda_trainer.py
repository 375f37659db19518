"""The base of every trainer here: nnU-Net's trainer with a second, unlabelled data stream and several networks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch.optim import Optimizer

from nnunet_uda.data.target import LabelledTargetDataset, TargetDataset
from nnunet_uda.errors import print_without_traceback
from nnunet_uda.losses.prototypes import IGNORED
from nnunet_uda.methods import settings_of
from nnunet_uda.training import background, start, streams
from nnunet_uda.training.checkpoint import plain
from nnunet_uda.training.denormals import without_denormals
from nnunet_uda.training.expectation import conclude
from nnunet_uda.training.log import in_columns
from nnunet_uda.training.model_choice import ModelChoice
from nnunet_uda.training.preview import draw_epoch, draw_preview
from nnunet_uda.training.ranks import Ranks, described_once, seen_as_ddp, share_batch
from nnunet_uda.training.record import Record
from nnunet_uda.training.segmenter import Networks, build_segmenter, prepare_builder_of, segmentation_loss
from nnunet_uda.training.stopping import Stopping
from nnunet_uda.training.trainer_state import CheckpointFiles
from nnunet_uda.training.translated_dataset import translated, translated_validation
from nnunet_uda.training.updates import NonFiniteLossError, Terms, adam, frozen, updates_of_step

__all__ = ["NonFiniteLossError", "UDATrainer", "adam", "frozen"]

Settings = TypeVar("Settings")  # a method's own, a frozen dataclass; None where it has none


class UDATrainer(nnUNetTrainer, Generic[Settings]):
    """The order of a training with two data streams, several networks and one segmenter; parts do each thing.

    What a method overrides and calls is listed in docs/reference/trainer.md. ``self.network`` is nnU-Net's
    auto-configured network: its checkpoints are nnU-Net checkpoints. ``self.networks`` (with buffers such as memory
    banks) and ``self.optimizers`` are saved, restored and put into training or evaluation mode here.
    """

    method: str | None = None
    method_settings: type[Settings] | None = None
    fixed_settings: dict[str, Any] = {}
    needs_target = True
    target_share = 1.0  # unlabelled patches in a step for each source patch, rounded up
    uses_labelled_target = True  # learn the labels of target scans that dataset.json names
    network_update = "segmenter"  # the name of the update that self.optimizer makes
    target_dataset: TargetDataset
    labelled_target_dataset: LabelledTargetDataset

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device("cuda")):  # fmt: skip # noqa: B008 - nnU-Net's signature
        sys.excepthook = print_without_traceback
        start.check_arguments(plans, dataset_json, device)
        self.settings, self.own_settings = settings_of(type(self), plans)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.ranks = Ranks(self.is_ddp)
        self.device = self.ranks.device(device, self.device)
        self.grad_scaler = self.grad_scaler if self.device.type == "cuda" else None
        self.adopt_settings()
        self.networks = Networks()
        self.optimizers: dict[str, Optimizer] = {}
        self.dataloader_target: Iterator[dict] | None = None
        self.dataloader_labelled: Iterator[dict] | None = None
        self.record = Record()
        self.stopping = Stopping(self)
        self.checkpoints = CheckpointFiles(self)
        self.model_choice = ModelChoice(self.settings)

    def adopt_settings(self) -> None:
        start.adopt_settings(self)

    # -- what a method overrides ---------------------------------------------------------------------------------

    def build_networks(self) -> dict[str, nn.Module]:
        """Networks beside the segmenter, by name."""
        return {}

    def build_optimizers(self) -> dict[str, Optimizer]:
        """Optimisers beside the segmenter's, by the name of the update they make."""
        return {}

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        """One training step: forward passes and ``update`` calls.

        Args:
            source, target: ``(B, C, *patch)`` z-scored images, unrelated to each other.
            label: ``(B, 1, *patch)`` integer labels; with deep supervision a list from fine to coarse. The dataset's
                ignore label, if any, is in there: ``self.loss`` leaves it out, other losses take ``self.known(label)``.
        """
        raise NotImplementedError

    def reads_target(self) -> bool:
        """Whether ``train_on`` gets a target batch in the present epoch; a schedule may need none in a part of it."""
        return self.needs_target

    def translate(self, source: Tensor) -> Tensor:
        """Source images as the segmenter is to see them at validation; here unchanged. ``(B, C, *patch)``."""
        return source

    def labelled_target_loss(self, images: Tensor, label: Tensor | list[Tensor]) -> Tensor:
        """The segmentation loss of ``(b, C, *patch)`` labelled target images; ``label`` is as ``train_on`` gets it."""
        return self.loss(self.segment(images), label)

    def get_target_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """The pipeline of unlabelled target patches; takes what ``get_training_transforms`` takes."""
        return self.get_training_transforms(*args, **kwargs)

    def draw_pictures(self, path: Path) -> None:
        draw_preview(self, path)

    # -- networks and data ---------------------------------------------------------------------------------------

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        prepare_builder_of(cls)

    build_network_architecture = staticmethod(build_segmenter)
    """The network of training and prediction. A method with one of its own also overrides ``segment`` and
    ``prepare_network``; the attribute ``deep_supervision`` says whether its logits are a list, from fine to coarse."""

    def initialize(self) -> None:
        start.refuse_unsupported(self)
        start.set_up_process(self)
        with seen_as_ddp(self, False):
            super().initialize()
        self.networks = Networks(self.build_networks()).to(self.device)
        self.optimizers = {self.network_update: self.optimizer, **self.build_optimizers()}
        self.updates = updates_of_step(self)
        self.prepare_network()
        for network in self.networks.values() if self._do_i_compile() else ():
            network.compile()
        start.say_settings(self)

    def prepare_network(self) -> None:
        """Prepare what training steps call: here the segmenter's encoder and decoder, each compiled."""
        module = self.plain_network
        compiled = torch.compile if self._do_i_compile() else lambda part: part
        self.encoder, self.decoder = compiled(module.encoder), compiled(module.decoder)

    @property
    def plain_network(self) -> Any:
        """The segmenter without torch.compile's wrapper. The plans decide its class."""
        return getattr(self.network, "_orig_mod", self.network)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        network = self.plain_network
        (network if hasattr(network, "deep_supervision") else network.decoder).deep_supervision = enabled

    def configure_optimizers(self) -> tuple[Optimizer, Any]:
        optimizer, scheduler = super().configure_optimizers()
        scheduler.optimizer = self.network_optimizer() or optimizer
        return scheduler.optimizer, scheduler

    def network_optimizer(self) -> Optimizer | None:
        """The optimiser of ``self.network``, under nnU-Net's schedule; None is nnU-Net's own SGD."""
        if self.settings.segmenter_optimizer == "sgd":
            return None
        return adam(self.network.parameters(), self.initial_lr, 0.5, weight_decay=self.weight_decay)

    def _build_loss(self) -> Any:
        return segmentation_loss(self, super()._build_loss)

    def _set_batch_size_and_oversample(self) -> None:
        share_batch(self, super()._set_batch_size_and_oversample)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, Any, Any, Any]:
        return streams.moved(self, super().configure_rotation_dummyDA_mirroring_and_inital_patch_size())

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        return streams.plain_transforms(self, *args, **kwargs)

    def do_split(self) -> tuple[list[str], list[str]]:
        streams.check_source_fold(self)
        return super().do_split()

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        self.training_dataset, self.validation_dataset = streams.checked_source(self, super().get_tr_and_val_datasets())
        return self.training_dataset, self.validation_dataset

    def get_dataloaders(self) -> tuple[Any, Any]:
        return streams.open_streams(self, super().get_dataloaders)

    # -- the loop ------------------------------------------------------------------------------------------------

    def run_training(self) -> None:
        """nnU-Net's loop; after a checkpoint within an epoch it begins at that step."""
        with without_denormals() if self.device.type == "cpu" else nullcontext(), self.stopping.watched():
            self.on_train_start()
            for _ in range(self.current_epoch, self.num_epochs):
                self.on_epoch_start()
                self.on_train_epoch_start()
                for _ in range(len(self.record.steps), self.num_iterations_per_epoch):
                    self.train_step(next(self.dataloader_train))
                self.on_train_epoch_end(self.record.steps)
                with torch.no_grad():
                    self.on_validation_epoch_start()
                    batches = (next(self.dataloader_val) for _ in range(self.num_val_iterations_per_epoch))
                    self.on_validation_epoch_end([self.validation_step(batch) for batch in batches])
                self.on_epoch_end()
            self.on_train_end()

    def on_train_start(self) -> None:
        start.make_ready(self)
        with described_once(self):
            super().on_train_start()
        self.model_choice.open(self)
        self.record.progress = start.new_progress(self)
        self.checkpoints.restore_random_state()  # last: opening the loaders has drawn random numbers

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.networks.train()
        self.record.begin_epoch(self.current_epoch)
        self.stopping.wait_for_steps()
        if self.settings.segmenter_schedule == "constant":
            self.set_rate(self.initial_lr, self.network_update)

    def train_step(self, batch: dict) -> dict:
        source, label = streams.to_device(batch["data"], self.device), streams.to_device(batch["target"], self.device)
        target = streams.next_target(self) if self.reads_target() else None
        self.record.in_step = True
        self.updates = updates_of_step(self)
        self.train_on(source, label, target)
        losses = self.updates.finish(self.current_epoch, self.output_folder)
        self.record.add_step(losses)
        self.stopping.obey()
        return losses

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        means = self.record.end_steps(self.current_epoch, train_outputs)
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        self.print_to_log_file(in_columns("losses", means), add_timestamp=False)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.networks.eval()

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's step on source validation images as ``translate`` returns them: no target label is needed."""
        images = translated(self, batch["data"].to(self.device, non_blocking=True))
        outputs = super().validation_step(batch | {"data": images.float()})
        self.stopping.obey()
        return outputs

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        self.print_to_log_file(in_columns("criteria", self.model_choice.measure(self)), add_timestamp=False)

    def on_epoch_end(self) -> None:
        epoch = self.current_epoch
        self.record.end_epoch()
        self._best_ema = float("inf")  # nnU-Net chooses no checkpoint_best: model_choice does
        super().on_epoch_end()
        self.checkpoints.save_chosen(epoch)
        if self.local_rank == 0:
            draw_epoch(self, epoch)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.stopping.end_at_once()  # the final checkpoint is written: with --c the rest is done again
        self.ranks.on_first(lambda: conclude(self))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's final validation; where the method translates, on translated source volumes."""
        start.mend_results(self)
        start.find_components(self)
        with self.stopping.validating(), translated_validation(self) if self.translates else nullcontext():
            super().perform_actual_validation(save_probabilities)

    def save_checkpoint(self, filename: str) -> None:
        self.checkpoints.save(filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        self.checkpoints.load(filename_or_checkpoint)

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """nnU-Net's, of rank 0 alone; numpy's numbers as Python's, and shown at once where the output is a pipe."""
        if self.local_rank == 0:
            shown = [plain(each) for each in args]
            super().print_to_log_file(*shown, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)
            sys.stdout.flush()

    # -- what a method calls -------------------------------------------------------------------------------------

    def segment(self, images: Tensor) -> list[Tensor] | Tensor:
        """Logits of the segmenter, a list from fine to coarse with deep supervision."""
        return self.decoder(self.encoder(images))

    def update(self, name: str, terms: Terms, max_norm: float | None = None) -> None:
        """One step of the optimiser ``name`` on the sum of ``terms``, each of which is logged under its own name."""
        with self.updating(name, max_norm) as add:
            add(terms)

    def updating(self, name: str, max_norm: float | None = None) -> AbstractContextManager[Callable[[Terms], None]]:
        """Like ``update``, but yield a function that takes terms in parts; a term given several times is summed. The
        memory of a part's gradient is free before the next part is computed."""
        return self.updates.updating(name, max_norm)

    def autocast(self) -> AbstractContextManager:
        """Mixed precision where CUDA has it, nothing elsewhere."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def adam_for(self, *names: str, learning_rate: float, beta1: float, beta2: float = 0.999) -> Optimizer:
        """Adam for the networks of these names."""
        return adam([p for name in names for p in self.networks[name].parameters()], learning_rate, beta1, beta2)

    def set_rate(self, rate: float, *names: str) -> None:
        """Let the optimisers of these names go on with the learning rate ``rate``."""
        for group in (group for name in names for group in self.optimizers[name].param_groups):
            group["lr"] = rate

    def _predict(self, images: Tensor) -> Tensor:
        """Logits at full resolution, as at prediction."""
        with self.autocast():
            return self.finest(self.network(images))

    @property
    def translates(self) -> bool:
        """Whether ``translate`` changes images."""
        return type(self).translate is not UDATrainer.translate

    def finest(self, outputs: list[Tensor] | Tensor) -> Tensor:
        """The full-resolution map of what ``segment`` or the loader's labels hold."""
        return outputs[0] if isinstance(outputs, list | tuple) else outputs

    def known(self, label: Tensor | list[Tensor]) -> Tensor:
        """The loader's label at full resolution, ``IGNORED`` (-1) where it is the dataset's ignore label."""
        label, ignored = self.finest(label), self.label_manager.ignore_label
        return label if ignored is None else label.masked_fill(label == ignored, IGNORED)

    def restore_background(self, images: Tensor, reference: Tensor) -> Tensor:
        """``images`` with 0 where ``reference``, that they were made of, lies outside of nnU-Net's mask (see there)."""
        return background.restore_background(images, reference, self.configuration_manager.use_mask_for_norm)

    @property
    def structures(self) -> list[str]:
        """The names of the foreground classes, in the order of their values."""
        names = {value: name for name, value in self.dataset_json["labels"].items()}
        return [str(names[label]) for label in self.label_manager.foreground_labels]
