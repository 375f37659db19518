"""CISFA's step with the passes that its authors' code makes (github.com/xhu248/cisfa_da), to compare ours with.

Networks, weights, loss terms and their order are ``CISFATrainer``'s. What differs is what their code does otherwise:
PatchNCE's features of both images, and the segmenter's of both images for the global contrast, are computed anew; the
generator translates once more before the discriminators, with the weights it had before; the target is segmented, with
a graph, before the segmenter's update, too; instance norms and PatchNCE are PyTorch's own, through autograd;
convolutions keep their inputs, and gradients stay from one step to the next. What their networks have on top
(antialiased convolutions before every halving) is left out, which favours their code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_uda.losses.adversarial import lsgan_loss
from nnunet_uda.networks.instance_norm import FASTER
from nnunet_uda.networks.recomputed import SlimConvBlocks
from nnunet_uda.networks.resnet_generator import InstanceNorm, ReflectConv, reflect_pad
from nnunet_uda.trainers.cisfa import CISFATrainer
from nnunet_uda.training.uda_trainer import frozen


class PlainInstanceNorm(InstanceNorm):
    """The generator's instance norm by PyTorch's function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x) if x.shape[2:].numel() > 1 else x


class PlainReflectConv(ReflectConv):
    """The generator's convolution, which keeps its padded input."""

    def forward(self, *tensors: Tensor, before: Callable[..., Tensor] | None = None) -> Tensor:
        return self.conv(reflect_pad(tensors[0] if before is None else before(*tensors), self.padding))


PLAIN = {
    **{faster: slower for slower, faster in FASTER.items()},
    InstanceNorm: PlainInstanceNorm,
    ReflectConv: PlainReflectConv,
    SlimConvBlocks: StackedConvBlocks,
}
"""What stands where we have something faster or smaller."""


class PlainPatchNCE(nn.Module):
    """``PatchNCELoss`` written down as it is defined: logits, a mask, cross-entropy; ``(B, P, C)`` to a scalar."""

    def __init__(self, temperature: float, negatives: str) -> None:
        super().__init__()
        self.temperature, self.negatives = temperature, negatives

    def forward(self, queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        keys = keys.detach()
        itself = torch.eye(queries.shape[1], dtype=torch.bool, device=queries.device)
        others = [torch.bmm(queries, keys.transpose(1, 2))]
        if self.negatives == "both":
            others.append(torch.bmm(queries, queries.transpose(1, 2)))
        negative = [logits.masked_fill(itself, float("-inf")) for logits in others]
        positive = (queries * keys).sum(2, keepdim=True)
        logits = torch.cat([positive, *negative], 2).flatten(0, 1) / self.temperature
        first = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return (weights.flatten() * F.cross_entropy(logits, first, reduction="none")).mean()


class CISFACodeTrainer(CISFATrainer):
    """``CISFATrainer`` with the passes of its authors' code, in float32. To be timed, not to train with."""

    def initialize(self) -> None:
        super().initialize()
        self.grad_scaler = None
        for module in (*self.network.modules(), *self.networks.modules()):
            module.__class__ = PLAIN.get(type(module), type(module))
        settings = self.own_settings
        self.patch_contrastive = PlainPatchNCE(
            settings.patch_contrastive_temperature, settings.patch_contrastive_negatives
        )

    def update(self, name: str, terms: dict[str, Tensor], max_norm: float | None = None) -> None:
        """Gradients stay where they are until the next update of the same name."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
        optimizer.step()
        self.updates.terms.update({key: value.detach() for key, value in terms.items()})

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor) -> None:
        settings, networks, generator = self.own_settings, self.networks, self.networks["generator"]
        with frozen(networks["image_discriminator"]):
            translated = generator(source)
            judged = lsgan_loss(networks["image_discriminator"](translated), is_real=True)
            of_translated, features = generator.encode(translated), generator.encode(source)
            contrast = self.patch_contrastive_loss(features, of_translated, self.finest(label))
        terms = {
            "patch_contrastive": settings.patch_contrastive_weight * contrast,
            "generator_adversarial": settings.image_adversarial_weight * judged,
        }
        self.update("generator", terms)

        maps, head = networks["segmentation_discriminator"], networks["projection_head"]
        with frozen(generator, maps):
            translated, of_target = generator(source), self.segment(target)
            outputs = self.segment(translated)
            judged = lsgan_loss(maps(self.segmentation_maps(outputs)), is_real=True)
            vectors = [head(self.encoder(images)[-1]) for images in (source, translated)]
        terms = {
            "segmentation": self.loss(outputs, label),
            "global_contrastive": settings.global_contrastive_weight * self.global_contrastive(*vectors),
            "segmenter_adversarial": settings.segmenter_adversarial_weight * judged,
        }
        self.update("segmenter", terms, max_norm=12)

        with frozen(generator, self.network):
            translated = generator(source)
            of_target, of_translated = (self.segmentation_maps(self.segment(one)) for one in (target, translated))
        for name, real, false in (
            ("image_discriminator", target, translated),
            ("segmentation_discriminator", of_target, of_translated),
        ):
            loss = lsgan_loss(networks[name](real), is_real=True) + lsgan_loss(networks[name](false), is_real=False)
            self.update(name, {name: 0.5 * loss})
