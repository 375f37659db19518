"""What each speed trick is worth alone: a step with it and without, in turn, at a size that nnU-Net plans.

The networks are nnU-Net's 2D U-Net (6 stages, 32 to 512 features, deep supervision) and CISFA's generator (width 64,
9 blocks), the losses are plain means. Processor time of one thread, so that other programs on the machine count
little; memory is the most that tensors hold, weights left out.

    python -m benchmarks.speed.tricks                        # all, patch 160, batch 4
    python -m benchmarks.speed.tricks -patch 256 -only generator parts
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from benchmarks.speed.step_time import most_held, print_table
from nnunet_uda.networks.resnet_generator import ResnetGenerator
from nnunet_uda.training.updates import adam

FEATURES = (32, 64, 128, 256, 512, 512)
Step = Callable[[], None]


def unet() -> PlainConvUNet:
    torch.manual_seed(0)
    return PlainConvUNet(
        1, len(FEATURES), FEATURES, nn.Conv2d, 3, (1, 2, 2, 2, 2, 2), 2, 5, (2,) * 5, True, nn.InstanceNorm2d,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, deep_supervision=True,
    )  # fmt: skip


def training(network: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Step:
    def step() -> None:
        sum(output.square().mean() for output in network(images)).backward()
        if optimizer is not None:
            optimizer.step()
        network.zero_grad(set_to_none=True)

    return step


def generator(images: Tensor) -> tuple[Step, Step]:
    """Maps of the generator made again in the backward pass, batch halved."""
    half = images[: len(images) // 2]
    return translation(half, 1), translation(half, 1, leaner=False)


def parts(images: Tensor) -> tuple[Step, Step]:
    """The generator's update on half a batch at a time."""
    return translation(images, 2), translation(images, 1)


def early(images: Tensor) -> tuple[Step, Step]:
    """The decoder's gradient taken before another image is encoded."""
    network, other = unet(), images.flip(2)

    def with_it() -> None:
        skips = network.encoder(images)
        leaves = [skip.detach().requires_grad_() for skip in skips]
        sum(output.square().mean() for output in network.decoder(leaves)).backward()
        (network.encoder(other)[-1] - leaves[-1]).square().mean().backward()
        torch.autograd.backward(skips, [leaf.grad for leaf in leaves])
        network.zero_grad(set_to_none=True)

    def without() -> None:
        skips = network.encoder(images)
        loss = sum(output.square().mean() for output in network.decoder(skips))
        (loss + (network.encoder(other)[-1] - skips[-1]).square().mean()).backward()
        network.zero_grad(set_to_none=True)

    return with_it, without


def fused(images: Tensor) -> tuple[Step, Step]:
    """Adam in one loop over the weights."""
    networks = unet(), unet()
    return (
        training(networks[0], images, adam(networks[0].parameters(), 1e-3, 0.5)),
        training(networks[1], images, torch.optim.Adam(networks[1].parameters(), 1e-3, (0.5, 0.999))),
    )


TRICKS = {one.__name__: one for one in (generator, parts, early, fused)}


def translation(images: Tensor, number: int, leaner: bool = True) -> Step:
    """CISFA's update of the generator, on the batch in so many parts."""
    torch.manual_seed(0)
    network = ResnetGenerator(1, 2, 64, 9, lean=leaner)

    def step() -> None:
        for part in images.chunk(number):
            translated, features = network.forward_with_features(part)
            pairs = zip(features[1:], network.encode(translated)[1:], strict=True)
            (translated.square().mean() + sum((a * b).mean() for a, b in pairs)).backward()
        network.zero_grad(set_to_none=True)

    return step


def seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def row(name: str, on: tuple[float, float], off: tuple[float, float]) -> list[str]:
    cells = [f"{value:.2f}, {other:.2f} ({value / other:.2f})" for value, other in zip(on, off, strict=True)]
    return [name, *cells]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-patch", type=int, default=160, help="edge [160]")
    parser.add_argument("-batch", type=int, default=4)
    parser.add_argument("-steps", type=int, default=4, help="of each, after one that does not count [4]")
    parser.add_argument("-only", nargs="+", choices=list(TRICKS), default=list(TRICKS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    images = torch.randn(args.batch, 1, args.patch, args.patch, generator=torch.Generator().manual_seed(0))
    print(f"patch {args.patch}, batch {args.batch}, torch {torch.__version__}, {os.uname().machine}\n", flush=True)
    rows = []
    for name in args.only:
        pair = TRICKS[name](images)
        for step in pair:
            step()
        times = [[seconds(step) for step in pair] for _ in range(args.steps)]
        medians = [statistics.median(of) for of in zip(*times, strict=True)]
        held = [most_held(step, torch.device("cpu")) / 2**30 for step in pair]
        rows.append(row(TRICKS[name].__doc__, *zip(medians, held, strict=True)))
        print(rows[-1], file=sys.stderr, flush=True)
    print_table(["trick", "s a step: with it, without (share)", "GiB: with it, without (share)"], rows)


if __name__ == "__main__":
    main()
