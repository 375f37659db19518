"""``nnUNetUDA_configure``: write a plans file with settings of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import dataset_name, environment_folder, read_json
from nnunet_uda.data.slices import plane_warning, refuse_mixed_slices
from nnunet_uda.errors import UDAError, command
from nnunet_uda.files import write_json
from nnunet_uda.foreign_plans import read_plans
from nnunet_uda.methods import find_methods
from nnunet_uda.names import check_name
from nnunet_uda.plans import (
    PLANES,
    PROTOCOLS,
    cpu_preset,
    derive_plans,
    merge_presets,
    merge_uda,
    replan_plane,
    training_share,
)
from nnunet_uda.settings import UDASettings, describe_settings, parse_assignment, setting_notes
from nnunet_uda.workers import wished_threads


def list_settings() -> str:
    """All settings with type, default and meaning, as text: shared ones, then those of every method that is found."""

    def line(name: str, kind: str, default: Any, notes: dict[str, str]) -> str:
        note = notes.get(name.rpartition(".")[2])
        return f"  {name} = {json.dumps(default)}  ({kind})" + (f"\n      {note}" if note else "")

    found = find_methods()
    notes = setting_notes(UDASettings)
    lines = ["Shared by all trainers:", *(line(*setting, notes) for setting in describe_settings(UDASettings))]
    first: dict[str, list[tuple[str, str, Any]]] = {}
    for method in found.methods:
        settings, before = describe_settings(method.settings), first.get(method.name, [])
        heading = f" as {', '.join(method.trainers)} has them, where they differ" if before else ""
        first.setdefault(method.name, settings)
        notes = setting_notes(method.settings)
        own = [line(f"{method.name}.{each[0]}", *each[1:], notes) for each in settings if each not in before]
        lines += [f"Settings of {method.name}{heading}:", *own] if own else []
    lines += [f"Could not be imported: {path}: {error}" for path, error in found.unreadable.items()]
    return "\n".join(lines)


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
    dataset = dataset_name(args.d)
    folder = environment_folder("nnUNet_preprocessed") / dataset
    path = folder / f"{check_name(args.p, '-p', file=True)}.json"
    if args.p == args.base:
        raise UDAError(f"-p must be a new name: planning again would drop settings from {args.base}.json")
    if "__" in args.p:
        raise UDAError(f"-p {args.p}: nnU-Net tells trainer, plans and configuration apart at '__'. Take another name")
    former = read_json(path) if path.exists() and not args.overwrite else None
    base = read_plans(folder, args.base)
    given = {
        "patch_size": args.patch_size,
        "batch_size": args.batch_size,
        "base_features": args.base_features,
        "max_features": args.max_features,
        "stages": args.stages,
        "slice_size": args.slice_size,
    }
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if min(value if isinstance(value, list) else [value]) < 1:
            raise UDAError(f"-{key} must be at least 1, found {value}")
    settings = dict(parse_assignment(text) for text in args.set) | settings
    # planning for another plane takes minutes: what is wrong with the rest is said before
    trial = derive_plans(base, args.c, args.p, merge_uda(base.get("uda", {}), settings), **given)
    patch_size = trial["configurations"][args.c]["patch_size"]
    refuse_mixed_slices(read_json(folder / "dataset.json"), patch_size, f"{folder / 'dataset.json'}, -c {args.c}")
    plans = replan_plane(dataset, base, args.plane, args.p) if args.plane else base
    uda = base.get("uda", {})
    options: dict[str, Any] = {}
    if args.protocol:
        fingerprint = read_json(folder / "dataset_fingerprint.json")
        share = training_share(folder, fingerprint)
        protocol, options = PROTOCOLS[args.protocol](fingerprint, plans["transpose_forward"][0], share)
        uda = uda | protocol
    if args.preset:
        preset, options = cpu_preset(plans, args.c, wished_threads())
        uda = merge_presets(uda, preset)
    uda, options = merge_uda(uda, settings), options | given
    plans = derive_plans(plans, args.c, args.p, uda, **options)
    if former not in (None, plans):
        raise UDAError(f"{path} exists, with other content: choose another name, or replace it with --overwrite")
    write_json(plans, path)

    chosen = plans["configurations"][args.c]
    if warning := plane_warning(plans, args.c):
        print(f"WARNING: {warning}")
    print(f"Wrote {path}: patch {chosen['patch_size']}, batch {chosen['batch_size']}, uda {json.dumps(uda)}")
    if chosen["data_identifier"] != base["configurations"][args.c]["data_identifier"]:
        print(f"Its images are preprocessed differently. Next: nnUNetv2_preprocess -d {args.d} -plans_name {args.p} -c "
              f"{args.c} -np 8")  # fmt: skip
    device = " -device cpu" if args.preset == "cpu" else ""
    print(f"Train with it: nnUNetUDA_train {args.d} {args.c} 0 -tr CASTTrainer -p {args.p}{device}")
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
