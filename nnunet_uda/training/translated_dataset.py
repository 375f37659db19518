"""Source validation volumes, translated on the fly, for nnU-Net's final validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunet_uda.data.convention import read_domains
from nnunet_uda.files import write_json

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer


def translate_volume(
    volume: torch.Tensor,
    translate: Callable[[torch.Tensor], torch.Tensor],
    patch_size: list[int],
    batch_size: int = 4,
    overlap: float = 0.5,
) -> torch.Tensor:
    """Translate (or segment) a whole preprocessed volume by sliding window (Gaussian weights).

    Args:
        volume: ``(C, Z, Y, X)``, normalised intensities.
        translate: maps patches ``(B, C, *patch_size)`` to patches of as many voxels, in any number of channels.
        patch_size: two numbers (each slice along the first axis on its own) or three.

    Returns:
        ``(C or other channels, Z, Y, X)``, on the device of ``volume``.
    """
    if len(patch_size) == 2:
        slices = volume.transpose(0, 1)
        parts = [_slide(part, translate, patch_size, batch_size, overlap) for part in slices.split(batch_size)]
        return torch.cat(parts).transpose(0, 1)
    return _slide(volume[None], translate, patch_size, batch_size, overlap)[0]


def _slide(
    images: torch.Tensor, translate: Callable, patch_size: list[int], batch_size: int, overlap: float
) -> torch.Tensor:
    from monai.inferers import sliding_window_inference  # takes as long to import as all else together

    return sliding_window_inference(images, patch_size, batch_size, translate, overlap=overlap, mode="gaussian")


class TranslatedDataset:
    """Stands in for a preprocessed dataset: the same cases with their images translated.

    Made for ``nnUNetTrainer.perform_actual_validation``, which only builds it, lists ``identifiers`` and calls
    ``load_case``; ``source_folder`` is for messages.
    """

    def __init__(
        self,
        dataset_class: type[nnUNetBaseDataset],
        translate: Callable[[torch.Tensor], torch.Tensor],
        patch_size: list[int],
        device: torch.device,
    ) -> None:
        self.dataset_class = dataset_class
        self.translate = translate
        self.patch_size = patch_size
        self.device = device

    def __call__(
        self, folder: str, identifiers: list[str] | None = None, folder_with_segs_from_previous_stage: str | None = None
    ) -> TranslatedDataset:
        """What calling a dataset class does: open ``folder``."""
        self.dataset = self.dataset_class(folder, identifiers, folder_with_segs_from_previous_stage)
        self.identifiers, self.source_folder = self.dataset.identifiers, self.dataset.source_folder
        return self

    def get_identifiers(self, folder: str) -> list[str]:
        return self.dataset_class.get_identifiers(folder)

    def load_case(self, identifier: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, dict]:
        data, seg, previous, properties = self.dataset.load_case(identifier)
        volume = torch.from_numpy(np.asarray(data[:], dtype=np.float32)).to(self.device)
        with torch.no_grad():
            translated = translate_volume(volume, self.translate, self.patch_size)
        return translated.float().cpu().numpy(), seg, previous, properties


def translated(trainer: UDATrainer, images: torch.Tensor) -> torch.Tensor:
    """Source images ``(B, C, *patch)`` as the trainer's segmenter sees them at validation."""
    with trainer.autocast():
        return trainer.translate(images)


@contextmanager
def translated_validation(trainer: UDATrainer) -> Iterator[None]:
    """Inside, nnU-Net's final validation is on translated source volumes; ``about.json`` says so in the results."""
    trainer.networks.eval()
    domains = read_domains(trainer.dataset_json)
    note = (
        f"{domains.source} validation cases translated to {domains.target} by the generator, against their own "
        f"{domains.source} labels: no {domains.target} label was read"
    )
    trainer.print_to_log_file(f"Final validation: {note}")
    stored, patch_size = trainer.dataset_class, trainer.configuration_manager.patch_size
    trainer.dataset_class = TranslatedDataset(stored, partial(translated, trainer), patch_size, trainer.device)
    try:
        yield
    finally:
        trainer.dataset_class = stored
    if trainer.local_rank == 0:
        write_json({"validated_on": note}, Path(trainer.output_folder, "validation", "about.json"))
