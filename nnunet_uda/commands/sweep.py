"""``nnUNetUDA_sweep``: train at several values of settings, and show how the target's scores depend on them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnunet_uda.commands.grid_options import add_grid_arguments, check_grid_arguments, make_engine
from nnunet_uda.errors import UDAError, command
from nnunet_uda.experiments.grid import refuse_failures
from nnunet_uda.experiments.sweep import CRITERIA, WARNING, plan_sweep, run_sweep


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_sweep",
        description="Train a trainer at several values of settings, predict the target's test images, and write "
        "sweep.csv, sweep.md and sweep.png. Each -vary is a sweep of its own: all other settings are as in the plans "
        "-p. Runs with the same settings are trained once. The same command again goes on where it stopped. "
        f"{WARNING} {CRITERIA}",
        epilog="Example: nnUNetUDA_sweep -d 501 -c 2d -f 0 -tr SimilarityPrototypesTrainer -p nnUNetPlansShort -vary "
        "similarity_prototypes.confidence 0.7 0.75 0.8 0.85 0.9 0.95 -vary similarity_prototypes.dictionary_size 200 "
        "400 600 -seeds 0 1 2 -o sweep",
    )
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-p", required=True, help="plans with all settings that do not vary (nnUNetUDA_configure)")
    parser.add_argument("-tr", required=True, help="trainer")
    parser.add_argument("-f", default="0", help="fold; where imagesTs is empty, its 'val' in splits_target.json is "
                        "the test [0]")  # fmt: skip
    parser.add_argument("-vary", nargs="+", action="append", required=True, metavar=("NAME", "VALUE"),
                        help="a setting and its values; see nnUNetUDA_configure --list")  # fmt: skip
    parser.add_argument("-seeds", nargs="+", type=int, help="train every setting with each seed [that of the plans]")
    add_grid_arguments(parser, "the same sweep")
    arguments = parser.parse_args(argv)
    check_grid_arguments(arguments, [arguments.f], ["seeds"])
    for name in (words[0] for words in arguments.vary if len(words) == 1):
        raise UDAError(f"-vary {name} has no value: give NAME VALUE [VALUE ...]")
    return arguments


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    out = Path(os.path.realpath(arguments.o))
    sweep = plan_sweep(
        out, arguments.d, arguments.tr, arguments.p, arguments.c, arguments.f, arguments.vary, arguments.seeds
    )
    failed = run_sweep(sweep, make_engine(arguments, out), arguments.device, arguments.np)
    print((out / "sweep.md").read_text(encoding="utf-8"))
    print(f"Written to {out}: sweep.md, sweep.csv, sweep.png")
    refuse_failures(failed, len(sweep.runs))


if __name__ == "__main__":
    main()
