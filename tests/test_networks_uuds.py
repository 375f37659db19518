"""DAM and SAM, the decoders, and the roads through the network of UUDS."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_uda.networks.prompt_attention import PromptAttention
from nnunet_uda.networks.residual_decoder import ResidualDecoder
from nnunet_uda.networks.uuds_network import UUDSNetwork

SHAPE = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
}


def network(**options) -> UUDSNetwork:
    torch.manual_seed(0)
    channels, classes = options.pop("channels", 1), options.pop("classes", 3)
    made = UUDSNetwork(SHAPE, channels, classes, [4, 8, 8], **options)
    made.set_prompts("A photo of a source domain", ["left ventricle", "aorta", "spleen"][: classes - 1], None)
    for module in made.encoder.visual.modules():  # a fresh ResNet's blocks are identities
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    made.refresh_prompts()
    return made.eval()


# -- DAM and SAM ---------------------------------------------------------------------------------------------------


def test_attention_on_a_2x2_map_is_its_definition():
    torch.manual_seed(0)
    attention = PromptAttention(3, 4, 5, 6)
    with torch.no_grad():
        attention.log_scale.fill_(math.log(1.7))
    prompt, keys, values = torch.randn(1, 3), torch.randn(2, 4, 2, 2), torch.randn(2, 5, 2, 2)
    attended, weights, pooled = attention(prompt, keys, values)
    assert attended.shape == (2, 6, 2, 2) and weights.shape == (2, 1, 2, 2) and pooled.shape == (2, 1, 6)

    matrices = {name: (m.weight[:, :, 0, 0], m.bias) for name, m in attention.named_children() if hasattr(m, "weight")}
    q = matrices["query"][0] @ prompt[0] + matrices["query"][1]
    for b in range(2):
        places = [(0, 0), (0, 1), (1, 0), (1, 1)]
        k = [matrices["key"][0] @ keys[b, :, i, j] + matrices["key"][1] for i, j in places]
        v = torch.stack([matrices["value"][0] @ values[b, :, i, j] + matrices["value"][1] for i, j in places])
        v = (v - v.mean(0)) / (v.var(0, unbiased=False) + 1e-5).sqrt()
        scores = [math.exp((q @ key).item() / 1.7) for key in k]
        total = torch.zeros(6)
        for p, (i, j) in enumerate(places):
            a = scores[p] / sum(scores)
            assert weights[b, 0, i, j].item() == pytest.approx(a, rel=1e-4)
            torch.testing.assert_close(attended[b, :, i, j], 4 * a * v[p], atol=1e-5, rtol=1e-4)
            total += a * v[p]
        torch.testing.assert_close(pooled[b, 0], total, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (1, 1), (8, 7)])
def test_attention_keeps_height_and_width(size):
    attention = PromptAttention(3, 4, 5, 6)
    attended, weights, pooled = attention(torch.randn(2, 3), torch.randn(2, 4, *size), torch.randn(2, 5, *size))
    assert attended.shape == (2, 6, *size) and weights.shape == (2, 2, *size) and pooled.shape == (2, 2, 6)
    assert torch.allclose(weights.sum((2, 3)), torch.ones(2, 2), atol=1e-5)


def test_several_prompts_are_averaged_and_none_attends_to_all_alike():
    torch.manual_seed(0)
    attention = PromptAttention(3, 4, 5, 6)
    prompts, keys, values = 5 * torch.randn(2, 3), torch.randn(1, 4, 3, 3), torch.randn(1, 5, 3, 3)
    both, weights, _ = attention(prompts, keys, values)
    alone = [attention(prompts[i : i + 1], keys, values)[0] for i in range(2)]
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)
    assert not torch.allclose(weights[:, 0], weights[:, 1])
    plain, weights, _ = attention(None, None, values)
    torch.testing.assert_close(plain, attention.normalise(attention.value(values)))
    assert torch.equal(weights, torch.full((1, 1, 3, 3), 1 / 9))


def test_the_scale_is_positive_starts_at_the_root_and_learns():
    attention = PromptAttention(3, 4, 5, 36)
    assert attention.log_scale.exp().item() == pytest.approx(6)
    attention(torch.randn(1, 3), torch.randn(1, 4, 2, 2), torch.randn(1, 5, 2, 2))[0].square().sum().backward()
    assert attention.log_scale.grad != 0


def test_normalisation_takes_the_domains_mean_and_scale_out():
    attention = PromptAttention(3, 4, 5, 6)
    prompt, keys, values = torch.randn(1, 3), torch.randn(1, 4, 4, 4), torch.randn(1, 5, 4, 4)
    torch.nn.init.zeros_(attention.value.bias)
    torch.testing.assert_close(
        attention(prompt, keys, values)[0], attention(prompt, keys, 3 * values)[0], atol=1e-4, rtol=1e-3
    )


# -- decoders ------------------------------------------------------------------------------------------------------


def test_a_decoder_doubles_the_size_at_every_level():
    decoder = ResidualDecoder(6, [8, 5, 4], [0, 3, 2])
    sides = [None, torch.randn(1, 3, 4, 8), torch.randn(1, 2, 8, 16)]
    maps = decoder(torch.randn(1, 6, 2, 4), sides)
    assert [tuple(m.shape) for m in maps] == [(1, 8, 2, 4), (1, 5, 4, 8), (1, 4, 8, 16)]
    other = decoder(torch.randn(1, 6, 2, 4), [None, sides[1] + 1, sides[2]])
    assert not torch.allclose(maps[1], other[1])


def test_both_decoders_have_the_same_shape():
    made = network()
    image, segmentation = made.image_decoder, made.segmentation_decoder
    widths = [[block.output_channels for block in decoder.blocks] for decoder in (image, segmentation)]
    assert widths[0] == widths[1] == [8, 8, 8, 8, 8, 4], "the plans' widths, coarse to fine, the last one repeated"
    assert [type(block) for block in image.blocks] == [type(block) for block in segmentation.blocks]


# -- roads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (40, 52)])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_size_and_number_of_channels(size, channels):
    made = network(channels=channels, num_outputs=3)
    images = torch.randn(2, channels, *size)
    assert made(images).shape == (2, 3, *size)
    made.deep_supervision = True
    assert [tuple(o.shape[2:]) for o in made(images)] == [(size[0] >> i, size[1] >> i) for i in range(3)]
    encoded = made.encode(images)
    assert made.generate(encoded, made.domain_embedding).image.shape == images.shape


def test_prediction_reads_the_prompts_from_buffers_that_training_refreshes():
    made = network()
    images = torch.randn(1, 1, 64, 64)
    domain, classes = made.prompts()
    encoded = made.encode(images)
    fresh = made.segment(encoded, made.generate(encoded, domain), classes).logits
    torch.testing.assert_close(made(images), fresh)
    made.prompts.forward = None  # no text encoder may run
    before = made(images)
    torch.testing.assert_close(before, fresh)
    del made.prompts.forward
    with torch.no_grad():
        made.prompts.text_projection.mul_(-50)
    assert torch.equal(made(images), before)
    made.refresh_prompts()
    assert not torch.allclose(made(images), before)


def test_the_prompts_steer_what_they_are_for():
    made = network()
    images = torch.randn(1, 1, 96, 96)
    encoded = made.encode(images)
    domain, classes = made.prompts()
    generated = made.generate(encoded, domain)
    assert not torch.allclose(generated.image, made.generate(encoded, -50 * domain).image)
    logits = made.segment(encoded, generated, classes).logits
    assert not torch.allclose(logits, made.segment(encoded, generated, -50 * classes).logits)


@pytest.mark.parametrize("which", ["domain_prompt", "segmentation_prompt"])
def test_ablations_do_not_read_their_prompt(which):
    made = network(**{which: False})
    images = torch.randn(1, 1, 96, 96)
    before = made(images)
    buffer = made.domain_embedding if which == "domain_prompt" else made.class_embeddings
    buffer.mul_(-50)
    assert torch.equal(made(images), before)
    assert (made.encode(images).tokens is None) == (which == "domain_prompt")


def test_the_segmentation_sees_the_raw_image_only_through_the_generator_and_the_sam():
    made = network()
    encoded = made.encode(torch.randn(1, 1, 64, 64))
    generated = made.generate(encoded, made.domain_embedding)
    logits = made.segment(encoded, generated, made.class_embeddings).logits
    blind = encoded._replace(levels=[torch.zeros_like(x) for x in encoded.levels[:-1]] + [encoded.levels[-1]])
    assert torch.equal(made.segment(blind, generated, made.class_embeddings).logits, logits)
    assert torch.equal(made.generate(blind, made.domain_embedding).image, generated.image)
    for level in range(6):
        maps = [torch.zeros_like(m) if i == level else m for i, m in enumerate(generated.maps)]
        other = made.segment(encoded, generated._replace(maps=maps), made.class_embeddings).logits
        assert not torch.allclose(other, logits), f"the image decoder's map of level {level} is used"


def test_normalised_skips_reach_the_image_decoder():
    made = network(normalised_skips=True)
    encoded = made.encode(torch.randn(1, 1, 64, 64))
    generated = made.generate(encoded, made.domain_embedding)
    for level, used in enumerate([False, True, True, True]):
        levels = [torch.zeros_like(x) if i == level else x for i, x in enumerate(encoded.levels)]
        other = made.generate(encoded._replace(levels=levels), made.domain_embedding).image
        assert torch.allclose(other, generated.image) != used
