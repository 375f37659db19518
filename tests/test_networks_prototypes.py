"""ASPP and the prototype network against their definitions."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_uda.errors import UDAError
from nnunet_uda.networks.aspp import ASPP, clamped_rates
from nnunet_uda.networks.image_decoder import ImageDecoder
from nnunet_uda.networks.prototype_network import PrototypeNetwork, SegmentingGenerator, decoder_maps, mean_of_softmax


def unet(dimension: int = 2, residual: bool = False, stages: int = 4, channels: int = 1) -> nn.Module:
    options = {
        "input_channels": channels,
        "n_stages": stages,
        "features_per_stage": [4, 6, 8, 10, 12][:stages],
        "conv_op": nn.Conv2d if dimension == 2 else nn.Conv3d,
        "kernel_sizes": 3,
        "strides": [1] + [2] * (stages - 1),
        "num_classes": 3,
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm2d if dimension == 2 else nn.InstanceNorm3d,
        "norm_op_kwargs": {"affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": True,
    }
    return ResidualEncoderUNet(n_blocks_per_stage=1, **options) if residual else PlainConvUNet(
        n_conv_per_stage=1, **options
    )  # fmt: skip


def generator(dimension: int = 2, channels: int = 1, **options) -> SegmentingGenerator:
    shape = options.pop("patch_size", (32,) * dimension)
    return SegmentingGenerator(unet(dimension, channels=channels, **options), channels, shape, embedding_dim=32)


def test_rates_stay_below_half_of_the_map_and_come_once():
    assert clamped_rates((1, 6, 12, 18), (40, 40)) == [(1, 1), (6, 6), (12, 12), (18, 18)]
    assert clamped_rates((1, 6, 12, 18), (16, 16)) == [(1, 1), (6, 6), (7, 7)]
    assert clamped_rates((1, 6, 12, 18), (13, 5, 1)) == [(1, 1, 1), (6, 2, 1)]
    assert clamped_rates((1, 6), (4, 4)) == [(1, 1)]
    for rates in (clamped_rates((1, 6, 12, 18), (n, n)) for n in range(3, 60)):
        assert len(set(rates)) == len(rates)


@pytest.mark.parametrize("size", [(9, 9), (3, 10, 12), (4, 4)])
def test_aspp_keeps_shape_and_sees_as_far_as_its_rate(size):
    torch.manual_seed(0)
    aspp = ASPP(4, size)
    features = torch.randn(2, 4, *size, requires_grad=True)
    assert aspp(features).shape == features.shape
    widest = aspp.branches[-1][0](features)
    centre = tuple(length // 2 for length in size)
    widest[(0, 0, *centre)].backward()
    seen = features.grad[0, 0].nonzero()
    reach = [int((seen[:, axis] - centre[axis]).abs().max()) for axis in range(len(size))]
    assert reach == [min(rate, centre[axis]) if length > rate else 0
                     for axis, (rate, length) in enumerate(zip(aspp.rates[-1], size, strict=True))]  # fmt: skip


def test_aspp_refuses_nonsense():
    with pytest.raises(UDAError, match="ASPP"):
        ASPP(4, (8,))
    with pytest.raises(UDAError, match="ASPP"):
        ASPP(4, (8, 8), (0, 6))


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_generator_shapes(dimension, residual):
    shape = (16,) * dimension
    network = generator(dimension, channels=2, residual=residual, patch_size=shape)
    images = torch.randn(2, 2, *shape)
    output = network(images, deep_supervision=True)
    assert output.image.shape == images.shape
    assert [tuple(x.shape[1:]) for x in output.segmentation] == [
        (3, *(16 // step for _ in shape)) for step in (1, 2, 4)
    ]
    assert output.embedding.shape == (2, 32, *(4 for _ in shape))
    torch.testing.assert_close(output.embedding.norm(dim=1), torch.ones(2, *(4 for _ in shape)))
    assert network(images).segmentation.shape == (2, 3, *shape)
    assert network(images, image=False, embedding=False).image is None
    assert network(images, segmentation=False, embedding=False).segmentation is None


def test_a_residual_translation_starts_as_the_identity():
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(generator()(images).image, images)
    plain = SegmentingGenerator(unet(), 1, (32, 32), embedding_dim=32, residual=False)
    assert (plain(images).image - images).abs().mean() > 0.1
    network = generator()
    network(images).image.square().mean().backward()
    assert network.image_decoder.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_the_image_decoder_gives_an_image_of_the_input(dimension, residual):
    encoder = unet(dimension, residual, channels=2).encoder
    decoder = ImageDecoder(encoder, 2)
    assert decoder(encoder(torch.randn(2, 2, *(16,) * dimension))).shape == (2, 2, *(16,) * dimension)
    widths = [stage.convs[0].conv.out_channels for stage in decoder.stages]
    assert widths == [max(1, round(skip / 2)) for skip in encoder.output_channels[-2::-1]]


def test_averaged_inference_costs_little_more_than_two_segmentations():
    plain = PlainConvUNet(
        1, 5, [16, 32, 64, 128, 128], nn.Conv2d, 3, [1, 2, 2, 2, 2], 2, 3, 2, True, nn.InstanceNorm2d,
        {"affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, False,
    )  # fmt: skip
    two = PrototypeNetwork(*(SegmentingGenerator(copy.deepcopy(plain), 1, (64, 64)) for _ in range(2)))
    counts = []
    for network in (plain, two):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.randn(1, 1, 64, 64))
        counts.append(counter.get_total_flops())
    assert 2 < counts[1] / counts[0] < 2.25


def test_a_network_of_three_stages_embeds_its_bottleneck():
    network = generator(stages=3)
    assert network(torch.randn(1, 1, 32, 32)).embedding.shape == (1, 32, 8, 8)


def test_an_anisotropic_3d_network_embeds_where_the_fine_axes_reach_stride_4():
    thin = PlainConvUNet(
        1, 4, [4, 6, 8, 10], nn.Conv3d, 3, [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]], 1, 3, 1, True,
        nn.InstanceNorm3d, {"affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, True,
    )  # fmt: skip
    network = SegmentingGenerator(thin, 1, (6, 32, 32), embedding_dim=32)
    assert network(torch.randn(1, 1, 6, 32, 32)).embedding.shape == (1, 32, 6, 8, 8)


@pytest.mark.parametrize("residual", [False, True])
def test_the_decoder_is_walked_as_nnunet_walks_it(residual):
    torch.manual_seed(0)
    plain = unet(residual=residual)
    skips = plain.encoder(torch.randn(1, 1, 32, 32))
    expected = plain.decoder(skips)
    maps = decoder_maps(plain.decoder, skips)
    heads = list(plain.decoder.seg_layers)[::-1]
    for ours, theirs in zip([head(m) for head, m in zip(heads, maps, strict=False)], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert maps[-1] is skips[-1]


def test_prediction_is_the_average_of_both_branches():
    torch.manual_seed(0)
    network = PrototypeNetwork(generator(), generator()).eval()
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        direct = network.target_generator(images)
        back = network.source_generator(direct.image)
        expected = (direct.segmentation.softmax(1) + back.segmentation.softmax(1)) / 2
        torch.testing.assert_close(network(images).softmax(1), expected)
        network.deep_supervision = True
        outputs = network(images)
    assert [output.shape[-1] for output in outputs] == [32, 16, 8]
    torch.testing.assert_close(outputs[0].softmax(1), expected)


def test_averaging_is_exact_where_a_probability_underflows():
    sure, other = torch.tensor([[[200.0]], [[-200.0]]]).transpose(0, 1), torch.tensor([[[-200.0]], [[200.0]]])
    mean = mean_of_softmax(sure, other.transpose(0, 1))
    torch.testing.assert_close(mean.exp(), torch.full_like(mean, 0.5))
    assert torch.isfinite(mean_of_softmax(sure, sure)).all()


def test_the_decoders_do_not_list_the_encoder_again():
    assert not [key for key in PrototypeNetwork(generator(), generator()).state_dict() if "decoder.encoder" in key]
