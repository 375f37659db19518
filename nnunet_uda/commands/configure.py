"""``nnUNetUDA_configure``: write a plans file with settings of its own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import dataset_name
from nnunet_uda.data.slices import plane_warning
from nnunet_uda.errors import UDAError, command
from nnunet_uda.methods import default_settings, list_settings
from nnunet_uda.plans import PLANES, PROTOCOLS, write_plans
from nnunet_uda.settings import parse_assignment
from nnunet_uda.training.log import settings_table

CHANGES = ("patch_size", "batch_size", "base_features", "max_features", "stages", "slice_size")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_configure",
        description="Write a plans file of its own name: another plan's configuration with settings for the trainers "
        "here. Train with it by nnUNetUDA_train ... -p NAME.",
        epilog="Example: nnUNetUDA_configure -d 501 -p nnUNetPlansSmall -patch_size 128 128 -set num_epochs=100 "
        "cisfa.generator_width=32. Settings of trainers of your own are found in the folders of nnUNet_extTrainer.",
    )
    parser.add_argument("-d", help="dataset id or name")
    parser.add_argument("-p", help="name of the new plans")
    parser.add_argument("-from", dest="base", default="nnUNetPlans", help="plans to start from [nnUNetPlans]")
    parser.add_argument("-c", default="2d", help="configuration to change [2d]")
    parser.add_argument("-set", nargs="+", default=[], metavar="NAME=VALUE", help="settings; see --list")
    parser.add_argument("-protocol", choices=sorted(PROTOCOLS), help="a paper's own schedule and network")
    parser.add_argument("-preset", choices=["cpu"], help="cpu: small patch, narrow networks and a short schedule, by "
                        "the number of cores (OMP_NUM_THREADS, else all)")  # fmt: skip
    parser.add_argument("-plane", choices=sorted(PLANES), help="slice plane; plans and data are made anew for it")
    parser.add_argument("-patch_size", nargs="+", type=int, help="voxels an axis")
    parser.add_argument("-batch_size", type=int)
    parser.add_argument("-base_features", type=int, help="channels of the segmenter's first stage")
    parser.add_argument("-max_features", type=int, help="most channels of a stage of the segmenter")
    parser.add_argument("-stages", type=int, help="at most so many resolution stages of the segmenter")
    parser.add_argument("-slice_size", nargs=2, type=int, help="2D: resample so that the median slice has this size")
    parser.add_argument("--overwrite", action="store_true", help="replace plans of that name")
    parser.add_argument("--list", action="store_true", help="list all settings and their defaults, then stop")
    return parser


def run(args: argparse.Namespace, settings: dict[str, Any]) -> Path:
    """Write the plans file.

    Args:
        settings: over all others, by the names that ``-set`` takes.
    """
    if args.preset and args.protocol:
        raise UDAError("-preset and -protocol exclude each other: each is a schedule and a network")
    changes = {key: value for key in CHANGES if (value := getattr(args, key)) is not None}
    for key, value in changes.items():
        if min(value if isinstance(value, list) else [value]) < 1:
            raise UDAError(f"-{key} must be at least 1, found {value}")
    settings = dict(parse_assignment(text) for text in args.set) | settings
    path, plans, other_images = write_plans(
        dataset_name(args.d), args.base, args.p, args.c, settings, changes, args.plane, args.protocol, args.preset,
        args.overwrite,
    )  # fmt: skip
    chosen = plans["configurations"][args.c]
    if warning := plane_warning(plans, args.c):
        print(f"WARNING: {warning}")
    patch = " x ".join(map(str, chosen["patch_size"]))
    print(f"Wrote {path} ({args.c}: patch {patch}, batch {chosen['batch_size']})")
    print(settings_table(plans.get("uda", {}), default_settings()))
    device = " -device cpu" if args.preset == "cpu" else ""
    steps = [f"nnUNetUDA_train {args.d} {args.c} 0 -tr CASTTrainer -p {args.p}{device}"]
    if other_images:
        print("Its images are preprocessed differently")
        steps.insert(0, f"nnUNetv2_preprocess -d {args.d} -plans_name {args.p} -c {args.c} -np 8")
    for word, step in zip(("Next", "Then"), steps, strict=False):
        print(f"{word}: {step}")
    return path


@command
def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.list:
        print(list_settings())
        return
    if args.d is None or args.p is None:
        parser.error("-d and -p are required")
    run(args, {})


if __name__ == "__main__":
    main()
