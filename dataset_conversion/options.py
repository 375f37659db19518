"""The command line that all converters share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nnunet_uda.data.convention import environment_folder
from nnunet_uda.dataset_conversion.dataset import check_options, recover
from nnunet_uda.dataset_conversion.windows import IntensityRequest
from nnunet_uda.errors import UDAError, command
from nnunet_uda.images.intensities import DEFAULT, FORMS, Intensities, parse_intensities
from nnunet_uda.images.nifti import add_geometry_argument
from nnunet_uda.names import check_name
from nnunet_uda.workers import usual_processes


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every converter has, behind its own."""
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="dataset id, 1 to 999")
    parser.add_argument("-name", help="dataset name: DatasetXXX_NAME")
    parser.add_argument(
        "-channel",
        nargs="+",
        metavar="NAME",
        help="channel name(s) [intensity, which nnU-Net z-scores per image]; CT only if both domains are CT in HU",
    )
    for domain in ("source", "target"):
        parser.add_argument(
            f"-{domain}_intensities", nargs="+", metavar="WORD",
            help=f"what the {domain}'s images are clipped at: {FORMS} [CT: a window, else percentiles 0.5 99.5]",
        )  # fmt: skip
    parser.add_argument(
        "-few", nargs="+", metavar="N",
        help="target training scans to train on with their labels: a number, taken by -seed, or case ids [none]",
    )  # fmt: skip
    parser.add_argument("-seed", type=int, default=12345, help="seed of the folds and of -few [12345]")
    parser.add_argument("-np", type=int, default=usual_processes(), metavar="N", help="processes [%(default)s here]")
    add_geometry_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset of this id and name")
    parser.add_argument(
        "--strict", action="store_true", help="refuse what is otherwise a warning: a case that lacks a needed file"
    )


def add_upper_bound(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--upper_bound", action="store_true", help="write the supervised dataset of the target, WITH target labels"
    )


def add_directions(
    parser: argparse.ArgumentParser, names: Iterable[str], word: str = "modality", required: bool = True
) -> None:
    """Options -source and -target, two of ``names``, and --upper_bound; ``check_arguments`` looks at them.

    Args:
        word: what the names are of.
        required: else the first two names are source and target.
    """
    names = tuple(names)
    parser.set_defaults(domains=names)
    for option, does, default in (("-source", "whose labels are used", names[0]), ("-target", "to adapt to", names[1])):
        more = {"required": True} if required else {"default": default}
        text = f"{word} {does}" + ("" if required else f" [{default}]")
        parser.add_argument(option, type=str.lower, choices=names, help=text, **more)
    add_upper_bound(parser)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ``UDAError`` for what these options let through, before any file is listed or read."""
    check_options(args.d, args.name, args.channel or (), args.np)
    for identifier in args.few or ():
        check_name(identifier, "-few")
    intensity_request(args)
    domains = getattr(args, "domains", ())
    if domains and args.source == args.target:
        raise UDAError(f"-source and -target are both {args.source}; expected two of {', '.join(domains)}.")
    if not 0 <= args.seed < 2**32:
        raise UDAError(f"-seed {args.seed}: expected a number from 0 to {2**32 - 1}.")
    environment_folder("nnUNet_raw")


def dataset_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that ``write_dataset`` takes as they are."""
    return {"overwrite": args.overwrite, "strict": args.strict, "processes": args.np, "geometry": args.nifti_geometry,
            "few": args.few, "seed": args.seed}  # fmt: skip


def intensity_request(
    args: argparse.Namespace, preset: str = "soft_tissue", otherwise: Intensities | str | None = DEFAULT
) -> IntensityRequest:
    """What ``-source_intensities`` and ``-target_intensities`` ask for.

    Args:
        preset: see ``IntensityRequest``.
        otherwise: of a domain whose option is not given; a paper's protocol has its own.
    """
    source, target = (
        parse_intensities(getattr(args, f"{domain}_intensities"), f"-{domain}_intensities")
        for domain in ("source", "target")
    )
    return IntensityRequest(
        otherwise if source == DEFAULT else source, otherwise if target == DEFAULT else target, preset
    )


def channel_names(given: Sequence[str] | None, count: int) -> list[str]:
    """``-channel``, or its default for ``count`` channels."""
    if given and len(given) != count:
        raise UDAError(f"-channel {' '.join(given)}: {len(given)} name(s), but the source has {count} channel(s).")
    return list(given) if given else ["intensity"] if count == 1 else [f"intensity_{i}" for i in range(count)]


Conversion = Callable[[argparse.Namespace, list[str]], None]
"""A converter's ``convert(args, warnings)``, which adds to the warnings."""


def run(convert: Conversion, args: argparse.Namespace) -> None:
    """Check what is asked for, and convert; the warnings so far are printed where an error stops it."""
    check_arguments(args)
    recover(args.d)
    warnings: list[str] = []
    try:
        convert(args, warnings)
    except UDAError:
        for warning in warnings:
            print(f"WARNING: {warning}", file=sys.stderr)
        raise


def run_alone(
    description: str | None, add_arguments: Callable[[argparse.ArgumentParser], None], convert: Conversion
) -> None:
    """A converter's file as a command of its own."""

    @command
    def main(argv: list[str] | None) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        add_arguments(parser)
        add_common_arguments(parser)
        run(convert, parser.parse_args(argv))

    main()
