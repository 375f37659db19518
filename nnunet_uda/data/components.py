"""A structure that is one piece in every label of the source is one piece in a prediction.

On another modality a network finds a second heart in a stomach and a second spine in a vessel. nnU-Net removes all
but the largest component where that raises the Dice of its cross-validation, which says nothing here: on the source
there is nothing to remove. What the labels themselves show holds in both domains, because it is anatomy.

Which structures are one piece is found from the source's labels at the start of a training, as nnU-Net finds its
fingerprint, and kept in the ``plans.json`` of the results (``KEY``); ``data.new_scans`` applies it where nnU-Net turns
logits into a segmentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from acvl_utils.morphology.morphology_helper import (
    cc3d_label_with_component_sizes,
    remove_all_but_largest_component_cc3d,
)
from scipy import ndimage

KEY = "single_components"
ENOUGH = 5
"""Labels that show it. Fewer say little: the second tumour of a fourth patient is not false because three had one."""
LARGEST_SHARE = 0.99
"""Of a structure's voxels in its largest component: what is beside it are specks of drawing and resampling."""
LOOKED_AT = 50
"""Labels, evenly chosen."""


def find_single_components(labels: Iterable[np.ndarray], structures: Sequence[int]) -> list[list[int]]:
    """Groups of structures that form one connected component in every label that holds them: all of them together, and
    each alone.

    Args:
        labels: integer segmentations of any shape.
        structures: their foreground values.

    Returns:
        Lists of values, those of all structures together first; empty where there are too few labels.
    """
    values = [int(each) for each in structures]  # for JSON
    groups = [values, *([each] for each in values if len(values) > 1)]
    seen = [0] * len(groups)
    candidates = set(range(len(groups)))
    for label in labels:
        boxes = dict(enumerate(ndimage.find_objects(np.maximum(label, 0)), 1))
        for index in sorted(candidates):
            found = [box for value in groups[index] if (box := boxes.get(value)) is not None]
            if not found:
                continue
            seen[index] += 1
            around = tuple(
                slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*found, strict=True)
            )
            sizes = cc3d_label_with_component_sizes(_volume(np.isin(label[around], groups[index])), 26)[1]
            if max(sizes.values()) < LARGEST_SHARE * sum(sizes.values()):
                candidates.discard(index)
        if not candidates:
            break
    return [groups[index] for index in sorted(candidates) if seen[index] >= ENOUGH]


def keep_largest_components(scores: Any, groups: Sequence[Sequence[int]]) -> Any:
    """Change logits or probabilities ``(K, *S)`` so that each group of classes is one component, the rest background.

    There the background and the class that was the greatest exchange their values. Array or tensor, changed in place.
    """
    if not groups:
        return scores
    is_tensor = isinstance(scores, torch.Tensor)
    segmentation = np.asarray(scores.argmax(0).cpu() if is_tensor else scores.argmax(0))
    for group in groups:
        mask = np.isin(segmentation, group)
        removed = mask & ~largest_component(mask)
        for value in np.unique(segmentation[removed]).tolist():
            where = removed & (segmentation == value)
            where = torch.from_numpy(where).to(scores.device) if is_tensor else where
            scores[0, where], scores[value, where] = scores[value, where], scores[0, where]
        segmentation[removed] = 0
    return scores


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest component of a 2D or 3D mask (corners touch); several if they are equally large."""
    kept = np.zeros_like(mask)
    if mask.any():
        box = ndimage.find_objects(mask.astype(np.uint8))[0]
        kept[box] = remove_all_but_largest_component_cc3d(_volume(mask[box]), 26).reshape(kept[box].shape)
    return kept


def _volume(mask: np.ndarray) -> np.ndarray:
    """A 2D or 3D mask as a volume."""
    return mask.reshape((1,) * (3 - mask.ndim) + mask.shape)
