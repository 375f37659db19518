"""Random convolutions against one image, one pixel at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from nnunet_uda.data.random_convolution import random_convolution


def images_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference(images, kernel_sizes, layers, hidden, generator) -> torch.Tensor:
    """The same random numbers, used in loops."""
    batch, channels, *shape = images.shape
    dims = len(shape)
    choices = torch.randint(len(kernel_sizes), (layers,), generator=generator)
    widths = [channels] + [hidden] * (layers - 1) + [channels]
    maps = images.double().tolist()
    maps = [{(c, *p): images[(b, c, *p)].item() for c in range(channels) for p in product(*map(range, shape))}
            for b in range(batch)]  # fmt: skip
    for layer in range(layers):
        size, wide_in, wide_out = kernel_sizes[choices[layer]], widths[layer], widths[layer + 1]
        kernel = torch.randn(batch, wide_out, wide_in, *[size] * dims, generator=generator)
        bias = torch.randn(batch, wide_out, generator=generator)
        for b in range(batch):
            new = {}
            for o, p in product(range(wide_out), product(*map(range, shape))):
                value = bias[b, o].item()
                for c, offset in product(range(wide_in), product(*[range(size)] * dims)):
                    place = (c, *(i + d - size // 2 for i, d in zip(p, offset, strict=True)))
                    value += kernel[(b, o, c, *offset)].item() * maps[b].get(place, 0.0)
                new[(o, *p)] = value if value > 0 or layer == layers - 1 else 0.01 * value
            maps[b] = new
    shares = torch.rand(batch, generator=generator).tolist()
    expected = torch.empty_like(images, dtype=torch.float64)
    for b in range(batch):
        places = list(product(range(channels), *map(range, shape)))
        blended = {p: shares[b] * maps[b][p] + (1 - shares[b]) * images[(b, *p)].item() for p in places}
        before = sum(images[(b, *p)].item() ** 2 for p in places) ** 0.5
        after = sum(value**2 for value in blended.values()) ** 0.5
        for p in places:
            expected[(b, *p)] = blended[p] * before / after
    return expected


@pytest.mark.parametrize("shape", [(3, 1, 5, 4), (2, 2, 5, 4), (2, 1, 3, 4, 3)])
@pytest.mark.parametrize(("kernel_sizes", "layers"), [((1, 3), 4), ((3,), 2), ((1,), 1)])
def test_equals_the_loop(shape: tuple[int, ...], kernel_sizes: tuple[int, ...], layers: int) -> None:
    images = images_of(*shape)
    found = random_convolution(images, kernel_sizes=kernel_sizes, layers=layers, generator=seeded(4))
    assert found.shape == images.shape
    expected = reference(images, kernel_sizes, layers, 2, seeded(4))
    assert torch.allclose(found.double(), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 1, 16, 12), (8, 3, 16, 12), (8, 2, 4, 8, 8)])
def test_norm_is_kept_and_each_image_has_its_own_network(shape: tuple[int, ...]) -> None:
    images = images_of(1, *shape[1:]).expand(shape)
    found = random_convolution(images, generator=seeded(1))
    assert torch.allclose(found.flatten(1).norm(dim=1), images.flatten(1).norm(dim=1), rtol=1e-4)
    for first in range(8):
        assert not torch.allclose(found[first], images[first], atol=1e-3)
        for second in range(first):
            assert not torch.allclose(found[first], found[second], atol=1e-3)


def test_kernels_of_1_change_intensities_alone() -> None:
    images = torch.randint(0, 3, (4, 1, 9, 8), generator=seeded(0)).float()
    found = random_convolution(images, kernel_sizes=(1,), generator=seeded(1))
    for image, result in zip(images, found, strict=True):
        for value in range(3):
            assert result[image == value].std() < 1e-5


def test_several_layers_bend_the_intensities() -> None:
    images = images_of(1, 1, 9, 8).expand(8, 1, 9, 8)
    for layers, straight in ((1, True), (4, False)):
        found = random_convolution(images, kernel_sizes=(1,), layers=layers, generator=seeded(1))
        correlations = torch.stack(
            [torch.corrcoef(torch.stack((f.flatten(), images[0].flatten())))[0, 1] for f in found]
        )
        assert bool((correlations.abs() > 0.999).all()) is straight


def test_reproducible_from_a_generator_or_the_global_seed() -> None:
    images = images_of(2, 1, 8, 8)
    first = random_convolution(images, generator=seeded(3))
    assert torch.equal(first, random_convolution(images, generator=seeded(3)))
    assert not torch.allclose(first, random_convolution(images, generator=seeded(4)), atol=1e-3)
    state = torch.get_rng_state()
    random_convolution(images, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    found = random_convolution(images)
    assert torch.equal(found, first)
    assert not torch.allclose(random_convolution(images), first, atol=1e-3)


def test_kernel_sizes_vary_by_call() -> None:
    images = torch.zeros(1, 1, 25, 25)
    images[..., 12, 12] = 1
    reaches = set()
    for seed in range(30):
        found = random_convolution(images, layers=2, generator=seeded(seed))[0, 0]
        inner = found[4:21, 4:21]  # out of reach of the padding
        reaches.add(int(((inner - inner[0, 0]).abs() > 1e-4).any(0).sum()))
    assert reaches == {1, 3, 5}  # two kernels of 1, one of each, two of 3


def test_no_graph_and_the_input_is_left_alone() -> None:
    images = images_of(2, 1, 8, 8).requires_grad_()
    before = images.detach().clone()
    assert not random_convolution(images).requires_grad
    assert torch.equal(images, before)


def test_a_share_of_0_gives_the_image_and_one_of_zeros_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(2, 1, 8, 8)
    images[1] = 0
    assert not random_convolution(images)[1].any()
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    assert torch.allclose(random_convolution(images), images, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_type_is_kept_and_the_work_is_float32(dtype: torch.dtype) -> None:
    images = images_of(2, 1, 8, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = random_convolution(images, generator=seeded(3))
    assert found.dtype == dtype
    assert torch.equal(found, random_convolution(images.float(), generator=seeded(3)).to(dtype))


@pytest.mark.parametrize(
    "wrong", [{"layers": 0}, {"kernel_sizes": ()}, {"kernel_sizes": (1, 2)}, {"kernel_sizes": (-1,)}]
)
def test_wrong_arguments_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="odd kernel sizes"):
        random_convolution(images_of(1, 1, 8, 8), **wrong)
