"""Generator, discriminator and projection heads: shapes, features, receptive field, random positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunet_uda.errors import UDAError
from nnunet_uda.networks.patch_discriminator import PatchDiscriminator
from nnunet_uda.networks.patch_projector import PatchProjector
from nnunet_uda.networks.projection_head import ProjectionHead
from nnunet_uda.networks.resnet_generator import ResnetGenerator, reflect_pad

ANISOTROPIC = ((1, 2, 2), (2, 2, 2))


@pytest.mark.parametrize(
    ("strides", "size"),
    [
        (None, (32, 32)),
        (None, (37, 45)),
        (None, (50, 19)),
        (None, (3, 4)),
        (None, (1, 1)),
        (None, (16, 16, 16)),
        (None, (9, 17, 13)),
        (ANISOTROPIC, (8, 32, 32)),
        (ANISOTROPIC, (5, 21, 18)),
        (ANISOTROPIC, (1, 21, 18)),
        (((2, 1),), (9, 9)),
        (((2, 2), (2, 2), (2, 2)), (21, 30)),
    ],
)
def test_generator_keeps_any_size_and_encode_is_its_own_encoder(strides, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    generator = ResnetGenerator(2, len(size), width=4, num_blocks=3, strides=strides)
    x = torch.randn(2, 2, *size)
    output, features = generator.forward_with_features(x)
    assert output.shape == x.shape
    assert torch.equal(output, generator(x))
    encoded = generator.encode(x)
    assert features[0] is x and len(encoded) == len(features) == (len(strides) if strides else 2) + 3
    assert all(torch.equal(a, b) for a, b in zip(encoded, features, strict=True))
    assert [f.shape[1] for f in features] == generator.feature_channels
    expected = list(size)
    for feature, stride in zip(features[2:-1], strides or [(2,) * len(size)] * 2, strict=True):
        expected = [-(-n // s) for n, s in zip(expected, stride, strict=True)]
        assert list(feature.shape[2:]) == expected
    assert features[-1].shape == features[-2].shape


def test_generator_of_the_paper() -> None:
    generator = ResnetGenerator(1, 2)
    assert generator.feature_channels == [1, 64, 128, 256, 256]
    assert sum(p.numel() for p in generator.parameters()) == pytest.approx(11.37e6, rel=0.002)
    convolutions = [m for m in generator.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 2 + 2 * 9 + 2 + 1
    assert convolutions[0].kernel_size == convolutions[-1].kernel_size == (7, 7)
    for convolution in convolutions:
        assert convolution.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_generator_kernel_of_a_thin_axis() -> None:
    generator = ResnetGenerator(1, 3, width=4, num_blocks=1, strides=ANISOTROPIC)
    assert generator.stem[0].conv.kernel_size == generator.head.conv.kernel_size == (3, 7, 7)


def test_generator_encode_stops_at_the_middle_block() -> None:
    generator = ResnetGenerator(1, 2, width=4, num_blocks=9)
    calls: list[int] = []
    for index, block in enumerate(generator.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    for module in (*(stage[0] for stage in generator.up), generator.head):
        module.register_forward_hook(lambda *_: calls.append(-1))
    features = generator.encode(torch.randn(1, 1, 16, 16))
    assert calls == [0, 1, 2, 3, 4]
    hidden = features[3]
    for block in generator.blocks[:5]:
        hidden = block(hidden)
    assert torch.equal(features[-1], hidden)
    calls.clear()
    generator.forward_with_features(torch.randn(1, 1, 16, 16))
    assert calls == [*range(9), -1, -1, -1]


def test_generator_output_is_unbounded_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    generator = ResnetGenerator(1, 2, width=4, num_blocks=2)
    nn.init.constant_(generator.head.conv.bias, 5.0)
    output = generator(torch.randn(2, 1, 16, 16))
    assert output.max() > 4
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())


def test_generator_learns_a_map_of_intensities() -> None:
    torch.manual_seed(0)
    generator = ResnetGenerator(1, 2, width=8, num_blocks=1)
    optimiser = torch.optim.Adam(generator.parameters(), 2e-3)
    x = F.interpolate(torch.randn(2, 1, 6, 6), scale_factor=4.0, mode="bilinear")
    losses = []
    for _ in range(60):
        loss = F.l1_loss(generator(x), 2 - 3 * x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_reflect_pad_replicates_only_short_axes() -> None:
    x = torch.randn(1, 2, 2, 9, 8)
    padded = reflect_pad(x, (3, 3, 1))
    expected = F.pad(F.pad(x, (0, 0, 0, 0, 3, 3), mode="replicate"), (1, 1, 3, 3, 0, 0), mode="reflect")
    assert torch.equal(padded, expected)
    assert torch.equal(reflect_pad(x[:, :, 0], (3, 3)), F.pad(x[:, :, 0], (3, 3, 3, 3), mode="reflect"))


def test_generator_refuses_what_it_cannot_build() -> None:
    for arguments in (
        {"dimension": 1},
        {"dimension": 3, "strides": ((2, 2), (2, 2))},
        {"dimension": 2, "strides": ()},
        {"dimension": 2, "num_blocks": 0},
    ):
        with pytest.raises(UDAError, match="ResnetGenerator"):
            ResnetGenerator(1, **arguments)


def without_norm(network: nn.Module) -> nn.Module:
    for name, child in network.named_children():
        if isinstance(child, nn.InstanceNorm2d):
            setattr(network, name, nn.Identity())
        else:
            without_norm(child)
    return network


@pytest.mark.parametrize(("num_layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_discriminator_receptive_field(num_layers: int, field: int) -> None:
    torch.manual_seed(0)
    network = without_norm(PatchDiscriminator(1, 2, (256, 256), width=4, num_layers=num_layers)).double()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)
    x = torch.ones(1, 1, 192, 192, dtype=torch.double, requires_grad=True)
    logits = network(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows, columns = torch.nonzero(x.grad[0, 0], as_tuple=True)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == field


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ((256, 256), (30, 30)),
        ((64, 64), (8, 8)),
        ((32, 32), (8, 8)),
        ((4, 7), (4, 7)),
        ((8, 64, 64), (8, 8, 8)),
        ((1, 40, 40), (1, 10, 10)),
        ((33, 20), (8, 10)),
    ],
)
def test_discriminator_maps(patch: tuple[int, ...], expected: tuple[int, ...]) -> None:
    network = PatchDiscriminator(3, len(patch), patch, width=4)
    logits = network(torch.randn(2, 3, *patch))
    assert logits.shape == (2, 1, *expected)
    logits.mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    if min(patch) > 7:  # fully convolutional
        assert network(torch.randn(1, 3, *(n + 8 for n in patch))).shape[:2] == (1, 1)


def test_discriminator_of_the_paper_and_refusals() -> None:
    network = PatchDiscriminator(1, 2, (160, 160))
    assert [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)] == [64, 128, 256, 512, 1]
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(2.763e6, rel=0.002)
    with pytest.raises(UDAError, match="PatchDiscriminator"):
        PatchDiscriminator(1, 3, (64, 64))
    with pytest.raises(UDAError, match="num_layers"):
        PatchDiscriminator(1, 2, (64, 64), num_layers=0)


def test_positions_are_random_distinct_and_repeatable() -> None:
    projector = PatchProjector([1, 4, 4], dim=8, num_patches=20)
    features = [torch.randn(2, 1, 16, 16), torch.randn(2, 4, 5, 8, 8), torch.randn(2, 4, 3, 4)]
    positions = projector.sample_positions(features, torch.Generator().manual_seed(7))
    assert [len(p) for p in positions] == [20, 20, 12]
    for feature, where in zip(features, positions, strict=True):
        assert where.dtype == torch.int64
        assert len(where.unique()) == len(where)
        assert 0 <= where.min() and where.max() < feature[0, 0].numel()
    assert positions[2].sort().values.tolist() == list(range(12))
    again = projector.sample_positions(features, torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(positions, again, strict=True))
    other = projector.sample_positions(features, torch.Generator().manual_seed(8))
    assert not torch.equal(positions[0], other[0])
    torch.manual_seed(3)  # without a generator: torch's global state
    first = projector.sample_positions(features)
    second = projector.sample_positions(features)
    torch.manual_seed(3)
    assert torch.equal(projector.sample_positions(features)[0], first[0]) and not torch.equal(first[0], second[0])


def test_positions_are_uniform() -> None:
    projector = PatchProjector([1], num_patches=4)
    feature, counts = [torch.zeros(1, 1, 2, 8)], torch.zeros(16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        counts[projector.sample_positions(feature, generator)[0]] += 1
    assert (counts / 2000 - 0.25).abs().max() < 0.05  # 5 standard deviations


def test_projector_reads_the_same_positions_of_both_images_and_of_the_batch() -> None:
    torch.manual_seed(0)
    projector = PatchProjector([1, 3], dim=8, num_patches=6)
    features = [torch.randn(2, 1, 4, 5, 6), torch.randn(2, 3, 2, 3, 3)]
    positions = projector.sample_positions(features)
    vectors = projector(features, positions)
    assert [v.shape for v in vectors] == [(2, 6, 8), (2, 6, 8)]
    assert all(torch.allclose(v.norm(dim=-1), torch.ones(2, 6), atol=1e-5) for v in vectors)
    changed = [f.clone() for f in features]
    for feature, where in zip(changed, positions, strict=True):
        flat = feature.flatten(2)
        kept = torch.zeros(flat.shape[2], dtype=torch.bool)
        kept[where] = True
        flat[:, :, ~kept] += 1  # elsewhere: no effect
    assert not torch.equal(changed[0], features[0])
    assert all(torch.equal(a, b) for a, b in zip(vectors, projector(changed, positions), strict=True))
    changed[1].flatten(2)[1, :, positions[1][2]] += 1  # one image, one position: that vector alone
    difference = (projector(changed, positions)[1] - vectors[1]).abs().sum(-1) > 0
    assert difference.nonzero().tolist() == [[1, 2]]


def test_projector_weights_exist_from_the_start_and_learn() -> None:
    torch.manual_seed(0)
    projector = PatchProjector([1, 4, 8], dim=16)
    assert len(list(projector.parameters())) == 3 * 4
    assert all(p.std().item() == pytest.approx(0.02, rel=0.6) for p in projector.parameters())
    features = [torch.randn(1, c, 4, 4) for c in (1, 4, 8)]
    sum(v[..., 0].sum() for v in projector(features, projector.sample_positions(features))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


def test_projector_on_a_masked_background_of_zeros() -> None:
    torch.manual_seed(0)
    projector = PatchProjector([1], dim=16)
    feature = torch.zeros(1, 1, 6, 6, requires_grad=True)
    vectors = projector([feature], projector.sample_positions([feature]))[0]
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(1, 36), atol=1e-5)
    vectors[..., 0].mean().backward()
    assert max(p.grad.abs().max().item() for p in projector.parameters()) < 1e4


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)])
def test_projection_head(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    head = ProjectionHead(7, dim=4)
    features = torch.randn(3, 7, *shape)
    z = head(features)
    expected = F.normalize(head.mlp(features.mean(tuple(range(2, features.ndim)))), dim=1)
    assert z.shape == (3, 4) and torch.allclose(z, expected, atol=1e-6)
    assert head.mlp[0].out_features == 7 and ProjectionHead(7, hidden=11).mlp[0].out_features == 11
    z[:, 0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(features).dtype == torch.float32
