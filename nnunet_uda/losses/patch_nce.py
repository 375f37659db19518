"""Weighted patch-wise contrastive loss of CISFA (equations 2 to 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
            queries: [B, P, C] float, L2-normalised vectors of the translated image at P positions.
            keys: [B, P, C] float, L2-normalised vectors of the input image at the same positions.
            weights: [B, P] float, w_p of eq 3 (see :func:`position_weights`); None is 1 everywhere.

        Returns:
            Scalar, float32, also under autocast; 0 with a graph where B or P is 0, and 0 where P is 1 (no negatives).
        """
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = queries.float(), keys.detach().float()
            batch, positions, _ = queries.shape
            if batch * positions == 0:
                return queries.sum()
            weights = queries.new_ones(batch, positions) if weights is None else weights.float()
            return _WeightedPatchNCE.apply(queries, keys, weights, self.temperature, self.negatives == "both")


class _WeightedPatchNCE(torch.autograd.Function):
    """The mean over B and P of w * L_pcl, whose gradient is made in the forward pass.

    With p the softmax of u . v / tau over all v, dL/du is (sum of p v - u+) / tau, and what u receives as a negative of
    the other vectors of its image; autograd would keep and pass through a dozen P x 2P maps for the same.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, queries: Tensor, keys: Tensor, weights: Tensor, temperature: float,
        both: bool,
    ) -> Tensor:  # fmt: skip
        scaled = queries / temperature
        between = torch.bmm(scaled, keys.transpose(1, 2))  # the diagonal holds u . u+ / tau
        positive = between.diagonal(dim1=1, dim2=2).clone()
        parts = [between]
        if both:  # eq 2: v runs over F^l without u itself
            within = torch.bmm(scaled, queries.transpose(1, 2))
            within.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
            parts.append(within)
        largest = torch.stack([part.amax(2) for part in parts]).amax(0)
        sums = torch.stack([part.sub_(largest[..., None]).exp_().sum(2) for part in parts]).sum(0)
        share = weights / weights.numel()
        loss = (share * (sums.log() + largest - positive)).sum()  # eq 4
        if ctx.needs_input_grad[0]:
            for part in parts:
                part.mul_((share / sums)[..., None])
            between.diagonal(dim1=1, dim2=2).sub_(share)
            gradient = torch.bmm(between, keys)
            if both:
                gradient.baddbmm_(within + within.transpose(1, 2), queries)
            ctx.save_for_backward(gradient.div_(temperature))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return of_loss * gradient, None, None, None, None


def position_weights(
    label: Tensor, feature_shape: Sequence[int], positions: Tensor, foreground_weight: float
) -> Tensor:
    """w_p of eq 3: 1 where the label, downsampled by nearest to the feature map, is background, else w.

    Args:
        label: [B, 1, *S] integer classes of the input image; background, or negative where nothing is known, is <= 0.
        feature_shape: spatial shape *s of the layer's feature map.
        positions: [P] int64, flat positions in ``feature_shape``, last axis fastest.
        foreground_weight: w, 2 in the paper.

    Returns:
        [B, P] float32.
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
        features: one [B, C, *s] map per layer, of the input image.
        of_translated: the same layers of its translation.
        label: [B, 1, *S] integer classes of the input image, see :func:`position_weights`.
        foreground_weight: w of eq 3.

    Returns:
        Scalar, float32.
    """
    positions = projector.sample_positions(features)
    keys, queries = projector(features, positions), projector(of_translated, positions)
    losses = []
    for feature, position, key, query in zip(projector.chosen(features), positions, keys, queries, strict=True):
        weights = position_weights(label, feature.shape[2:], position, foreground_weight)
        losses.append(loss(query, key, weights))
    return torch.stack(losses).mean()
