"""Random styles of an image, its anatomy kept: transforms of nnU-Net's kind (batchgeneratorsv2), 2D and 3D.

GIN and interventional pseudo-correlation are of Ouyang et al. 2022 (Causality-inspired Single-source Domain
Generalization for Medical Image Segmentation), location-scale augmentation of Su et al., AAAI 2023 (SLAug, Rethinking
Data Augmentation for Single-source Domain Generalization in Medical Image Segmentation), cluster contrasts are our own,
after SynthSeg. Any trainer may use them::

    pipeline = nnUNetTrainer.get_training_transforms(...)
    pipeline.transforms.insert(1, RandomConvolutionTransform())  # after SpatialTransform

They draw from numpy's global state, which nnU-Net seeds anew in each worker (torch's it does not).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor

from nnunet_uda.data.cluster_contrast import cluster_contrast
from nnunet_uda.data.random_convolution import random_convolution
from nnunet_uda.settings import require

CURVE_POINTS = 256
SAMPLED_POSITIONS = 2**16
GAMMA = 1.5


@dataclass(frozen=True)
class StyleAugmentationSettings:
    """Which random styles a training image gets, one after the other; each part is off at probability 0.

    ``pseudo_correlation_probability`` is the share of random convolutions that blend two networks. Layers and channels
    of the random networks are the authors'. SLAug's curves by class are not here: they paint the label into the image,
    and on real scans segmenters were better without (docs/results.md).
    """

    cluster_contrast_probability: float = 0.75
    """0 to 1: share of images whose tissues get random intensities. More for another modality."""
    global_location_scale_probability: float = 0.5
    """0 to 1: share with a random curve over all intensities."""
    random_convolution_probability: float = 0.5
    """0 to 1: share with a random convolution: other textures."""
    pseudo_correlation_probability: float = 0.5
    """0 to 1: share of random convolutions that blend two networks."""
    removed = {"random_convolution_layers": 4, "random_convolution_channels": 2, "keep_statistics": True}

    def __post_init__(self) -> None:
        for name in (
            "cluster_contrast_probability", "global_location_scale_probability", "random_convolution_probability",
            "pseudo_correlation_probability",
        ):  # fmt: skip
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))


def style_transforms(settings: StyleAugmentationSettings) -> ComposeTransforms:
    """The chain that ``settings`` describe: cluster contrasts, a random curve, random convolutions."""
    convolution = RandomConvolutionTransform(p_pseudo_correlation=settings.pseudo_correlation_probability)
    chain = [
        (settings.cluster_contrast_probability, ClusterContrastTransform()),
        (settings.global_location_scale_probability, LocationScaleTransform()),
        (settings.random_convolution_probability, convolution),
    ]
    return ComposeTransforms([RandomTransform(transform, share) for share, transform in chain if share > 0])


class _StyleTransform(BasicTransform):
    """Changes the image within the scan, and can keep each channel's mean and deviation.

    Where the segmentation is negative (nnU-Net's padding, and the outside of its non-zero mask) the image stays as it
    is, for it does so at prediction.

    Args:
        keep_statistics: give each channel its mean and standard deviation back; scans are z-scored at prediction too.
    """

    def __init__(self, keep_statistics: bool = True):
        super().__init__()
        self.keep_statistics = keep_statistics

    def restyle(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """``(C, *S)`` to ``(C, *S)``."""
        raise NotImplementedError

    def apply(self, data_dict: dict, **params: Any) -> dict:
        image, segmentation = data_dict["image"], data_dict.get("segmentation")
        generator = torch.Generator().manual_seed(int(np.random.randint(2**31)))
        inside = None if segmentation is None or (segmentation[0] >= 0).all() else segmentation[0] >= 0
        styled = self.restyle(image, generator)
        if self.keep_statistics:
            styled = with_statistics_of(image, styled, inside)
        return data_dict | {"image": styled if inside is None else torch.where(inside, styled, image)}


class RandomConvolutionTransform(_StyleTransform):
    """GIN: the image through a random shallow network (:func:`random_convolution`), a new one each time.

    Args:
        layers: convolutions of the network.
        hidden_channels: channels between them.
        p_pseudo_correlation: how often two networks are blended by a smooth random map (interventional
            pseudo-correlation) instead of one being used.
        keep_statistics: give each channel its mean and standard deviation back; scans are z-scored at prediction too.
    """

    def __init__(
        self,
        layers: int = 4,
        hidden_channels: int = 2,
        p_pseudo_correlation: float = 0.0,
        keep_statistics: bool = True,
    ):
        super().__init__(keep_statistics)
        self.layers, self.hidden_channels = layers, hidden_channels
        self.p_pseudo_correlation = p_pseudo_correlation

    def restyle(self, image: Tensor, generator: torch.Generator) -> Tensor:
        blend = torch.rand(1, generator=generator).item() < self.p_pseudo_correlation
        images = image[None].expand(2 if blend else 1, *image.shape)
        styled = random_convolution(
            images, layers=self.layers, hidden_channels=self.hidden_channels, generator=generator
        )
        if not blend:
            return styled[0]
        share = smooth_random_map(image.shape[1:], generator=generator).to(image.device)
        return (share * styled[0] + (1 - share) * styled[1]).to(image.dtype)


class LocationScaleTransform(_StyleTransform):
    """SLAug's global location-scale augmentation (:func:`location_scale`)."""

    def restyle(self, image: Tensor, generator: torch.Generator) -> Tensor:
        return location_scale(image, generator=generator)


class ClusterContrastTransform(_StyleTransform):
    """The tissues that an image shows in new, random contrasts (:func:`cluster_contrast`)."""

    def restyle(self, image: Tensor, generator: torch.Generator) -> Tensor:
        return cluster_contrast(image, generator=generator)


def location_scale(image: Tensor, *, generator: torch.Generator) -> Tensor:
    """Each channel along a random rising curve, times N(1, 0.1) in [0.9, 1.1], plus N(0, 0.5).

    Numbers are in units of the channel's range (its 0.5 and 99.5 percentiles). The shift is limited so that the 20th
    percentile does not fall under the range nor the 80th over it, and the result is clipped to the channel's least and
    greatest value.

    Args:
        image: ``(C, *S)`` float.
        generator: source of randomness.

    Returns:
        ``(C, *S)``, of the type of ``image``.
    """
    result = image.float().clone()
    for channel in result:
        low, high = quantiles(channel, (0.005, 0.995))
        if low < high:
            unit = (channel - low) / (high - low)
            moved = _moved(unit.flatten(), generator).view_as(unit).clamp(unit.min(), unit.max())
            channel.copy_(moved * (high - low) + low)
    return result.to(image.dtype)


def _moved(values: Tensor, generator: torch.Generator) -> Tensor:
    """Values ``(N,)``, in units of the channel's range, along a curve and to another place."""

    def normal() -> float:
        return torch.randn(1, generator=generator).item()

    low, high = values.min(), values.max()
    curve = bezier_curve(generator).to(values.device)
    values = low + (high - low) * look_up(curve, (values - low) / (high - low))
    scale = min(max(1 + 0.1 * normal(), 0.9), 1.1)
    lower, upper = quantiles(values, (0.2, 0.8))
    shift = min(max(0.5 * normal(), -lower), 1 - upper)
    return values * scale + shift


def bezier_curve(generator: torch.Generator) -> Tensor:
    """A random rising curve from (0, 0) to (1, 1): its values at ``CURVE_POINTS`` places, evenly from 0 to 1.

    A cubic Bezier curve whose two inner control points are uniform in the unit square; both of its coordinates can only
    rise then.
    """
    inner = torch.rand(2, 2, generator=generator).double().numpy()
    t = np.linspace(0, 1, CURVE_POINTS)[:, None]
    points = 3 * t * (1 - t) ** 2 * inner[0] + 3 * t**2 * (1 - t) * inner[1] + t**3
    return torch.from_numpy(np.interp(t[:, 0], points[:, 0], points[:, 1])).float()


def look_up(curve: Tensor, x: Tensor) -> Tensor:
    """Linear interpolation of ``curve`` ``(P,)``, given at even places from 0 to 1, at ``x`` in [0, 1]."""
    place = x.clamp(0, 1) * (len(curve) - 1)
    index = place.long().clamp(max=len(curve) - 2)
    return torch.lerp(curve[index], curve[index + 1], place - index)


def smooth_random_map(shape: Collection[int], control_points: int = 4, *, generator: torch.Generator) -> Tensor:
    """A cubic B-spline through uniform random control points, scaled to [0, 1].

    Args:
        shape: *S, 2D or 3D.
        control_points: intervals between control points along the longest axis, the authors' 4. Shorter axes
            have the same distance between them.
        generator: source of randomness.

    Returns:
        [*S] float32 on the CPU.
    """
    spacing = max(shape) / control_points
    intervals = [max(1, round(size / spacing)) for size in shape]
    field = torch.rand([number + 3 for number in intervals], generator=generator)
    for axis, (size, number) in enumerate(zip(shape, intervals, strict=True)):
        places = torch.linspace(0, number, size)[:, None]
        distance = (places - torch.arange(-1, number + 2)).abs()
        near = 2 / 3 - distance**2 + distance**3 / 2
        weights = torch.where(distance < 1, near, (2 - distance).clamp(min=0) ** 3 / 6)
        field = torch.tensordot(field, weights, dims=([axis], [1])).movedim(-1, axis)
    field = field - field.min()
    return field / field.max().clamp(min=1e-12)


def with_statistics_of(reference: Tensor, image: Tensor, where: Tensor | None = None) -> Tensor:
    """``image`` scaled and shifted to each channel's mean and deviation in ``reference``; both ``(C, *S)``.

    With ``where``, [*S] bool, both are taken there and the rest of ``image`` stays.
    """
    old, new = ((tensor.flatten(1) if where is None else tensor[:, where]).float() for tensor in (reference, image))
    if new.shape[1] == 0:
        return image
    deviation, mean = torch.std_mean(old, 1, keepdim=True, correction=0)
    own_deviation, own_mean = torch.std_mean(new, 1, keepdim=True, correction=0)
    matched = ((new - own_mean) * (deviation / own_deviation.clamp(min=1e-6)) + mean).to(image.dtype)
    if where is None:
        return matched.view_as(image)
    image = image.clone()
    image[:, where] = matched
    return image


def change_looks(images: Tensor, gamma: float = GAMMA) -> Tensor:
    """Gamma on the range of each image and channel, whose mean and deviation stay as they were: ``(B, C, *S)``.

    1.5 is the strongest darkening of nnU-Net's own augmentation.
    """
    axes = tuple(range(2, images.ndim))
    low, high = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
    changed = ((images - low) / (high - low).clamp(min=1e-6)) ** gamma
    changed = (changed - changed.mean(axes, keepdim=True)) / changed.std(axes, keepdim=True).clamp(min=1e-6)
    return changed * images.std(axes, keepdim=True) + images.mean(axes, keepdim=True)


def quantiles(values: Tensor, shares: tuple[float, ...]) -> list[float]:
    """Quantiles of ``values`` of any shape, from an even sample of at most ``2 * SAMPLED_POSITIONS`` of them."""
    flat = values.flatten()
    sample = flat[:: max(1, len(flat) // SAMPLED_POSITIONS)].float()
    return torch.quantile(sample, torch.tensor(shares, device=sample.device)).tolist()


class ViewsTransform(BasicTransform):
    """An image as it is, and changed by each of n ``transforms``: ``(C, *S)`` to ``((1 + n) C, *S)``."""

    def __init__(self, *transforms: Callable[..., dict]):
        super().__init__()
        self.transforms = transforms

    def apply(self, data_dict: dict, **params: Any) -> dict:
        image = data_dict["image"]  # nnU-Net's transforms work in place: each gets a copy
        changed = [transform(**data_dict | {"image": image.clone()})["image"] for transform in self.transforms]
        return data_dict | {"image": torch.cat((image, *changed))}


def insert_after_spatial(pipeline: ComposeTransforms, transform: Callable[..., dict]) -> None:
    """Put ``transform`` behind nnU-Net's spatial augmentation, before its noise, blur and gamma."""
    names = [type(step).__name__ for step in pipeline.transforms]
    last = max(names.index(name) for name in ("SpatialTransform", "Convert2DTo3DTransform") if name in names)
    pipeline.transforms.insert(last + 1, transform)


def show_views(
    pipeline: ComposeTransforms, styles: Callable[..., dict], student_share: float, teacher_views: int
) -> None:
    """Let nnU-Net's ``pipeline`` make views for self-training, one behind the other: ``(2 + n) C`` channels.

    First the patch moved alone, then augmented for the student, a share of patches in a random style, then
    ``teacher_views`` (n) times in a random style for the teacher.
    """
    changes = [step for step in pipeline.transforms if isinstance(step, RandomTransform | MaskImageTransform)]
    pipeline.transforms = [step for step in pipeline.transforms if not isinstance(step, RandomTransform)]
    students = ComposeTransforms([RandomTransform(styles, student_share), *changes])
    insert_after_spatial(pipeline, ViewsTransform(students, *[styles] * teacher_views))
