"""Weighted patch-wise contrastive loss of CISFA (equations 2 to 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_uda.errors import UDAError
from nnunet_uda.networks.patch_projector import PatchProjector


class PatchNCELoss(nn.Module):
    r"""Patch-wise contrastive loss of one layer, averaged over its sampled positions.

    .. math:: L_{pcl}(l, u) = -\log \frac{\exp(u \cdot u^+ / \tau)}{\sum_{v \in F^l - u} \exp(u \cdot v / \tau)}

    u is a vector of the translated image and u+ that of the input image at the same position (the direction in which
    a gradient reaches the generator; CUT, Park et al. 2020). Vectors of other images are never negatives.
    The expectation over layers in eq 4 is the mean of this loss over the layers, taken by the caller.

    Args:
        temperature: tau, 0.2 in the paper.
        negatives: ``"both"``, eq 2's set F^l: the other positions of the translated AND of the input image; or
            ``"input"``, as in CUT: the other positions of the input image only.
    """

    def __init__(self, temperature: float = 0.2, negatives: str = "both") -> None:
        super().__init__()
        if negatives not in ("both", "input"):
            raise UDAError(f'PatchNCE negatives is {negatives!r}; set it to "both" (the paper) or "input" (CUT).')
        if temperature <= 0:
            raise UDAError(f"PatchNCE temperature is {temperature}; set it to a number above 0 (0.2 in the paper).")
        self.temperature = temperature
        self.negatives = negatives

    def forward(self, queries: Tensor, keys: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over B and P of weight * loss (divided by their count, not by the sum of the weights).

        Keys are detached here. Translated vectors that serve as negatives keep their gradient: repulsion between two
        of them is symmetric, so detaching would only halve it.

        Args:
            queries: ``(B, P, C)`` float, L2-normalised vectors of the translated image at P positions.
            keys: ``(B, P, C)`` float, L2-normalised vectors of the input image at the same positions.
            weights: ``(B, P)`` float, w_p of eq 3 (see :func:`position_weights`); None is 1 everywhere.

        Returns:
            Scalar, float32, also under autocast; 0 with a graph where B or P is 0, and 0 where P is 1 (no negatives).
        """
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = queries.float(), keys.detach().float()
            if queries.shape[:2].numel() == 0:
                return queries.sum()
            vectors = queries / self.temperature
            similarities = vectors @ keys.transpose(1, 2)  # (B, P, P), the diagonal holds u . u+ / tau
            positive = similarities.diagonal(dim1=1, dim2=2)
            if self.negatives == "both":  # eq 2: v runs over F^l without u itself
                itself = torch.eye(queries.shape[1], dtype=torch.bool, device=queries.device)
                within = (vectors @ queries.transpose(1, 2)).masked_fill(itself, -torch.inf)
                similarities = torch.cat([similarities, within], 2)
            losses = similarities.logsumexp(2) - positive
            return (losses if weights is None else weights.float() * losses).mean()


def position_weights(
    label: Tensor, feature_shape: Sequence[int], positions: Tensor, foreground_weight: float
) -> Tensor:
    """w_p of eq 3: 1 where the label, downsampled by nearest to the feature map, is background, else w.

    Args:
        label: ``(B, 1, *S)`` integer classes of the input image; 0 is background, negative is not known.
        feature_shape: spatial shape *s of the layer's feature map.
        positions: ``(P,)`` int64, flat positions in ``feature_shape``, last axis fastest.
        foreground_weight: w, 2 in the paper.

    Returns:
        ``(B, P)`` float32.
    """
    index, stride = torch.zeros_like(positions), 1
    rest = positions
    for size, feature_size in zip(reversed(label.shape[2:]), reversed(feature_shape), strict=True):
        index = index + rest % feature_size * size // feature_size * stride  # nearest: floor(i * size / feature_size)
        rest = rest // feature_size
        stride *= size
    foreground = label.flatten(1).index_select(1, index) > 0
    return torch.where(foreground, float(foreground_weight), 1.0)


def layers_patch_nce(
    loss: PatchNCELoss,
    projector: PatchProjector,
    features: Sequence[Tensor],
    of_translated: Sequence[Tensor],
    label: Tensor,
    foreground_weight: float,
) -> Tensor:
    """Mean over the layers that ``projector`` takes of the weighted loss at freshly drawn positions (eqs 2 to 4).

    Args:
        loss: PatchNCE of one layer.
        projector: samples and projects vectors.
        features: one ``(B, C, *s)`` map per layer, of the input image.
        of_translated: the same layers of its translation.
        label: ``(B, 1, *S)`` integer classes of the input image, see :func:`position_weights`.
        foreground_weight: w of eq 3.

    Returns:
        Scalar, float32.
    """
    positions = projector.sample_positions(features)
    keys, queries = projector(features, positions), projector(of_translated, positions)
    losses = []
    for feature, position, key, query in zip(features, positions, keys, queries, strict=True):
        weights = position_weights(label, feature.shape[2:], position, foreground_weight)
        losses.append(loss(query, key, weights))
    return torch.stack(losses).mean()
