"""Pictures of always the same slices: source, translation, label and prediction, target and prediction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from torch import Tensor

from nnunet_uda.training.pictures import Panel, plot_curves, write_panels
from nnunet_uda.training.translated_dataset import translate_volume, translated

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer

SLICES = 3
"""Of each domain; one where a patch is 3D, since each takes a whole slab."""
REORIENTED = "SimpleITKIOWithReorient"
_PLANES = {0: ("Axial", "anterior"), 1: ("Coronal", "superior"), 2: ("Sagittal", "superior")}


def orientation(reader: str, slice_axis: int) -> str | None:
    """How slices lie in the pictures, in words; None where files keep an order of their own.

    Args:
        reader: the plans' ``image_reader_writer``.
        slice_axis: the plans' ``transpose_forward[0]``: of (S, A, R), the axis across the slices.
    """
    if reader != REORIENTED:
        return None
    plane, up = _PLANES[slice_axis]
    side = "anterior" if slice_axis == 2 else "the patient's right"
    return f"{plane}: {up} is up, {side} is on the left, as in quicklook.png"


def as_seen(cut: np.ndarray, reader: str) -> np.ndarray:
    """Preprocessed slices ``(..., H, W)``, whose axes grow towards S, A or R, as ``quicklook.png`` shows them."""
    return cut[..., ::-1, ::-1] if reader == REORIENTED else cut


def shown_slices(label: np.ndarray, number: int) -> list[int]:
    """``number`` slices of ``(Z, H, W)``, evenly over those with foreground; over the middle half where none has."""
    held = np.flatnonzero((label > 0).any((1, 2)))
    if len(held):
        return sorted({int(held[int((i + 0.5) / number * len(held))]) for i in range(number)})
    depth = label.shape[0]
    return sorted({int(depth * (0.25 + 0.5 * (i + 0.5) / number)) for i in range(number)})


def cut_slab(data: np.ndarray, index: int, depth: int) -> Tensor:
    """``depth`` slices of ``(C, Z, H, W)`` around ``index``, zeros outside: ``(C, depth, H, W)`` float32."""
    start = index - depth // 2
    box = [[start, start + depth], [0, data.shape[2]], [0, data.shape[3]]]
    return torch.from_numpy(crop_and_pad_nd(data, box, 0)).float()


def write_trainers_panels(trainer: UDATrainer, path: Path, rows: list[list[Panel]]) -> None:
    """Write rows of a trainer's preprocessed slices in anatomical orientation, with its structures and epoch."""
    plans = trainer.plans_manager
    turned = [
        [(title, *(cut if cut is None else as_seen(cut, plans.image_reader_writer_class.__name__) for cut in cuts))
         for title, *cuts in row]
        for row in rows
    ]  # fmt: skip
    height, width = trainer.configuration_manager.spacing[-2:]
    lines = [f"{type(trainer).__name__}, epoch {max(0, trainer.current_epoch - 1)}"]
    how = orientation(plans.image_reader_writer_class.__name__, plans.transpose_forward[0])
    title = "\n".join([*lines, *([how] if how else [])])
    write_panels(path, turned, trainer.structures, title, float(height / width))


@torch.no_grad()
def preview_rows(trainer: UDATrainer) -> list[list[Panel]]:
    """One row for each slice: whole slices of the first validation case, beside them of the first target case. Without
    translation there is no panel of it; without target images no target.
    """
    patch = list(trainer.configuration_manager.patch_size)
    depth, number = (1, SLICES) if len(patch) == 2 else (patch[0], 1)

    def probabilities(images: Tensor) -> Tensor:
        with trainer.autocast():
            return trainer.finest(trainer.segment(images)).float().softmax(1)

    def over(slab: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return translate_volume(slab.to(trainer.device), function, patch, overlap=0.25).float().cpu()

    def middle(volume: Tensor) -> np.ndarray:
        return volume[0, depth // 2].numpy()

    def segmented(slab: Tensor) -> np.ndarray:
        return middle(over(slab, probabilities).argmax(0, keepdim=True))

    case, data, label = _first(trainer.validation_dataset)
    known = np.where(np.isin(label, trainer.label_manager.foreground_labels), label, 0)
    rows: list[list[Panel]] = []
    for index in shown_slices(known, number):
        slab = cut_slab(data, index, depth)
        shown = over(slab, partial(translated, trainer)) if trainer.translates else slab
        seen = middle(shown)
        row: list[Panel] = [(f"source: {case}, slice {index}", middle(slab), None)]
        row += [("translated", seen, None)] if trainer.translates else []
        rows.append([*row, ("label", seen, known[index]), ("prediction", seen, segmented(shown))])
    if trainer.needs_target:
        case, data, _ = _first(trainer.target_dataset)
        for place, index in enumerate(shown_slices(np.zeros(data.shape[1:]), number)):
            slab = cut_slab(data, index, depth)
            cut = middle(slab)
            panels: list[Panel] = [(f"target: {case}, slice {index}", cut, None), ("prediction", cut, segmented(slab))]
            if place < len(rows):
                rows[place] += panels
            else:
                rows.append(panels)
    return rows


def draw_epoch(trainer: UDATrainer, epoch: int) -> None:
    """Write the curves of losses and criteria, and the trainer's pictures, if they are due after ``epoch``."""
    if epoch != trainer.num_epochs - 1 and epoch % trainer.settings.picture_every:
        return
    folder = Path(trainer.output_folder)
    plot_curves(folder / "losses.png", trainer.record.history)
    trainer.model_choice.plot(str(folder / "criteria.png"))
    trainer.draw_pictures(folder / f"pictures/epoch_{epoch:04d}.png")


def draw_preview(trainer: UDATrainer, path: Path) -> None:
    """Always the same whole slices: source | translated | label | prediction | target | prediction."""
    path.parent.mkdir(exist_ok=True)
    trainer.network.eval()
    trainer.networks.eval()
    write_trainers_panels(trainer, path, preview_rows(trainer))


def whole_patch(trainer: UDATrainer, dataset: nnUNetBaseDataset, by_label: bool) -> tuple[Tensor, Tensor]:
    """The patch around the middle of the first case, or around its slice with most label.

    Returns:
        Image ``(1, C, *patch)`` and label ``(1, 1, *patch)``, -1 where it is not known.
    """
    data, seg, _, _ = dataset.load_case(dataset.identifiers[0])
    seg = seg[:]
    held = np.isin(seg[0], trainer.label_manager.foreground_labels)
    index = int(held.sum((1, 2)).argmax()) if by_label else seg.shape[1] // 2
    patch_size = trainer.configuration_manager.patch_size
    centre = [index, seg.shape[2] // 2, seg.shape[3] // 2]
    box = [[c - size // 2, c - size // 2 + size] for c, size in zip(centre, [1, *patch_size][-3:], strict=True)]
    tensors = [torch.from_numpy(crop_and_pad_nd(array, box, 0)).float()[None] for array in (data[:], seg)]
    image, label = (tensor[:, :, 0] if len(patch_size) == 2 else tensor for tensor in tensors)
    return image.to(trainer.device), trainer.known(label.to(trainer.device))


def middle_slice(images: Tensor) -> np.ndarray:
    """``(1, C, *patch)`` to its first channel's (middle) slice, ``(H, W)``."""
    image = images[0, 0].float().cpu().numpy()
    return image[image.shape[0] // 2] if image.ndim == 3 else image


def _first(dataset: nnUNetBaseDataset) -> tuple[str, np.ndarray, np.ndarray]:
    case = dataset.identifiers[0]
    data, seg, _, _ = dataset.load_case(case)
    return case, data[:], seg[:][0]
