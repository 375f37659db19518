"""Attention of a text prompt over a feature map: the DAM and the SAM of UUDS (equation 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nnunet_uda.networks.resnet_generator import InstanceNorm


class PromptAttention(nn.Module):
    r"""Weighs a normalised feature map by its positions' agreement with a prompt.

    .. math:: a = \mathrm{softmax}_p(q \cdot k_p / d), \qquad x_p = h w \, a_p \, \mathrm{Nor}(V)_p

    Three 1 x 1 convolutions give Q, K and V. The softmax runs over the h w positions and keeps the map: summing over
    them would leave one vector. With the factor h w, attention that is the same everywhere gives Nor(V). d is
    learnable, positive (its logarithm is what is learned) and starts at sqrt(c). Nor is instance norm without affine:
    it takes the domain's mean and variance out.

    Several prompts (one a class) attend apart, and their maps are averaged. Without prompts (ablation) attention is
    the same everywhere.

    Args:
        prompt_channels: length of a prompt's vector.
        key_channels, value_channels: channels of the maps that keys and values are made from.
        channels: c, of Q, K, V and the output.
    """

    def __init__(self, prompt_channels: int, key_channels: int, value_channels: int, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(prompt_channels, channels, 1)
        self.key = nn.Conv2d(key_channels, channels, 1)
        self.value = nn.Conv2d(value_channels, channels, 1)
        self.normalise = InstanceNorm()
        self.log_scale = nn.Parameter(torch.tensor(0.5 * math.log(channels)))

    def forward(self, prompts: Tensor | None, keys: Tensor | None, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            prompts: ``(K, prompt_channels)`` float; None: attention is the same everywhere, ``keys`` is not read.
            keys: ``(B, key_channels, h, w)`` float.
            values: ``(B, value_channels, h, w)`` float.

        Returns:
            All float32: the map, ``(B, channels, h, w)``, the mean over prompts; the attention a, ``(B, K, h, w)``,
            which sums to 1 (K = 1 without prompts); and sum_p a_p Nor(V)_p of each prompt, ``(B, K, channels)``.
        """
        with torch.autocast(values.device.type, enabled=False):
            value = self.normalise(self.value(values.float()))
            shape = value.shape[2:]
            if prompts is None:
                attention = value.new_full((value.shape[0], 1, *shape), 1 / shape.numel())
            else:
                assert keys is not None
                query = self.query(prompts.float()[:, :, None, None])[:, :, 0, 0]
                scores = torch.einsum("kc,bchw->bkhw", query, self.key(keys.float())) / self.log_scale.exp()
                attention = scores.flatten(2).softmax(2).unflatten(2, shape)
            attended = shape.numel() * attention.mean(1, keepdim=True) * value  # eq. 3
            return attended, attention, torch.einsum("bkhw,bchw->bkc", attention, value)
