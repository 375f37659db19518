"""The generator with a style code, and the term that keeps the code from being ignored."""

from __future__ import annotations

import pytest
import torch

from nnunet_uda.losses.style_diversity import style_diversity_loss
from nnunet_uda.networks.resnet_generator import ResnetGenerator
from nnunet_uda.networks.style_generator import StyleResnetGenerator


def generator_of(dims: int = 2, num_blocks: int = 3, **options) -> StyleResnetGenerator:
    torch.manual_seed(0)
    return StyleResnetGenerator(1, dims, 4, num_blocks, style_dim=5, **options)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 1, 16, 12), {}),
        ((2, 1, 15, 13), {"num_blocks": 1}),
        ((2, 1, 4, 8, 8), {"dims": 3, "strides": ((1, 2, 2), (2, 2, 2))}),
    ],
)
def test_a_code_changes_the_translation_and_not_the_features(shape, options):
    generator, images = generator_of(**options), torch.randn(shape)
    features = generator.encode(images)
    codes = generator.draw_codes(2)
    assert codes.shape == (2, 5)
    first, second = generator.decode(features, codes), generator.decode(features, codes.flip(0))
    assert first.shape == shape
    assert not torch.allclose(first, second, atol=1e-3)
    torch.testing.assert_close(generator(images, codes), first)
    alone = generator(images[:1], codes[:1])
    torch.testing.assert_close(alone, first[:1])  # each image has its own code
    torch.testing.assert_close(generator(images), generator(images, torch.zeros(2, 5)))


def test_every_late_stage_listens_to_the_code():
    generator, images = generator_of(num_blocks=5), torch.randn(1, 1, 16, 16)
    assert len(generator.modulations) == 2 + 2
    generator(images, generator.draw_codes(1)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in generator.modulations.parameters())


def test_with_modulations_of_0_it_is_the_plain_generator():
    generator = generator_of(num_blocks=5)
    for parameter in generator.modulations.parameters():
        torch.nn.init.zeros_(parameter)
    plain = ResnetGenerator(1, 2, 4, 5)
    plain.load_state_dict({name: value for name, value in generator.state_dict().items() if name in plain.state_dict()})
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(generator(images, generator.draw_codes(2)), plain(images))


# -- diversity -------------------------------------------------------------------------------------------------------


def test_diversity_equals_its_definition():
    first, second = torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    second[0], second[1], second[2] = 0.1, 0.02, 5.0
    codes = torch.zeros(3, 4)
    others = torch.tensor([[1.0, -1, 1, -1], [0.5] * 4, [1.0] * 4])
    expected = (0.5 + 0.8 + 0) / 3  # ratios 0.1, 0.04 and 5 over the margin 0.2
    assert style_diversity_loss(first, second, codes, others, 0.2).item() == pytest.approx(expected)


def test_its_gradient_drives_translations_apart_up_to_the_margin():
    codes = torch.randn(2, 1, 4)
    for gap, moves in ((0.01, True), (10.0, False)):
        first = torch.zeros(1, 1, 3, 3, requires_grad=True)
        second = torch.full((1, 1, 3, 3), gap, requires_grad=True)
        style_diversity_loss(first, second, *codes, 0.1).backward()
        assert bool((first.grad > 0).all() and (second.grad < 0).all()) == moves
        assert bool(first.grad.any()) == moves


def test_equal_codes_are_no_division_by_0():
    images, code = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.ones(1, 4)
    loss = style_diversity_loss(images, images.detach() + 1, code, code, 0.1)
    loss.backward()
    assert loss == 0 and images.grad.isfinite().all()
