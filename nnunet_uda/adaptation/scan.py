"""A network adapted to one scan, of which nothing is kept: its segmentation should not depend on how it is looked at.

Two views of a patch, each moved by a random affine map and in a random style, are segmented; both segmentations, moved
back, should be one (as in DG-TTA, Weihsbach et al. 2023). A few steps, then the scan is predicted.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nnunet_uda.adaptation.model import Model, Weights
from nnunet_uda.adaptation.patches import Patches
from nnunet_uda.adaptation.views import inverse, random_affine, restyled, warp
from nnunet_uda.data.random_style import StyleAugmentationSettings, style_transforms
from nnunet_uda.losses.consistency import consistency_loss
from nnunet_uda.settings import require
from nnunet_uda.training.checkpoint import seed_everything

NORMS = (nn.modules.instancenorm._InstanceNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class ScanSettings:
    """``what`` learns (all weights, or the norms' alone), in ``steps`` with Adam at ``learning_rate``; ``runs`` of
    other random numbers are averaged."""

    what: str = "norms"
    steps: int = 20
    learning_rate: float = 1e-3
    runs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.what in ("norms", "all"), "what", "norms or all", self.what)
        for name in ("steps", "runs"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(0 < self.learning_rate < 1, "learning_rate", "over 0 and under 1", self.learning_rate)
        require(0 <= self.seed < 2**32, "seed", f"from 0 to {2**32 - 1}", self.seed)


def learning(network: nn.Module, what: str) -> list[nn.Parameter]:
    """The parameters that learn; gradients of the others are not computed."""
    chosen = {
        id(parameter)
        for module in network.modules()
        if what == "all" or isinstance(module, NORMS)
        for parameter in module.parameters(recurse=what == "all")
    }
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 where CUDA has it, whose range needs no scaling of gradients."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def adapt_to_scan(
    model: Model, volume: np.ndarray, mask: np.ndarray, segmentation: np.ndarray, settings: ScanSettings
) -> list[Weights]:
    """The weights of ``settings.runs`` runs of each fold, each from the model's own.

    Args:
        volume: ``(C, Z, Y, X)`` preprocessed.
        mask: ``(Z, Y, X)``, -1 outside of nnU-Net's nonzero mask.
        segmentation: ``(Z, Y, X)``, the model's own.
    """
    styles = style_transforms(StyleAugmentationSettings())
    device, adapted = model.predictor.device, []
    network = copy.deepcopy(model.network).to(device).eval()  # no dropout, no statistics of batches
    for weights in model.weights:
        for run in range(settings.runs):
            seed_everything(settings.seed + run)
            generator = torch.Generator().manual_seed(settings.seed + run)
            patches = Patches([volume], [mask], [segmentation], model.patch_size, settings.seed + run)
            network.load_state_dict(weights)
            optimizer = torch.optim.Adam(learning(network, settings.what), settings.learning_rate)
            for _ in range(settings.steps):
                images = torch.stack([image for image, _, _ in patches.draw(model.batch_size)]).to(device)
                maps = [random_affine(len(images), model.patch_size, generator) for _ in range(2)]
                outputs = []
                for one in maps:
                    view = restyled(warp(images, one), styles, model.masked)
                    with autocast(device):
                        logits = network(view)
                    outputs.append(warp(logits.float().softmax(1), inverse(one)))
                seen = [warp(warp(torch.ones_like(images[:, :1]), one), inverse(one)) for one in maps]
                loss = consistency_loss(outputs[0], outputs[1], (seen[0] * seen[1] > 0.99).float())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            adapted.append({name: value.detach().cpu().clone() for name, value in network.state_dict().items()})
    return adapted
