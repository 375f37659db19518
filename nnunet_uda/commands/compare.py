"""``nnUNetUDA_compare``: methods x directions x folds x seeds, trained and scored, to one table and a plot."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnunet_uda.commands.grid_options import add_grid_arguments, check_grid_arguments, make_engine
from nnunet_uda.errors import UDAError, command
from nnunet_uda.experiments.compare import find_methods, plan_comparison, run_comparison
from nnunet_uda.experiments.grid import refuse_failures


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_compare",
        description="Train every trainer on every dataset, fold and seed, predict the target's test images, score "
        "them, and write compare.md, compare.csv, compare.json, compare.png and a page for each dataset. The same "
        "command again goes on where it stopped, and may name more trainers, datasets, folds or seeds. A run that "
        "fails is listed with its log, and stops no other.",
        epilog="Example: nnUNetUDA_compare -d 501 502 -tr CISFATrainer SimilarityPrototypesTrainer -f 0 -seeds 0 1 2 "
        "-p nnUNetPlansShort -lower SourceOnlyTrainer -upper SupervisedTrainer:511 SupervisedTrainer:512 -o compared",
    )
    parser.add_argument("-d", nargs="+", required=True, help="dataset ids or names, one for each direction or task")
    parser.add_argument("-tr", nargs="+", required=True, help="trainers")
    parser.add_argument("-p", required=True, help="plans of this name in every dataset (nnUNetUDA_configure)")
    parser.add_argument("-f", nargs="+", default=["0"], help="folds; where imagesTs is empty, the fold's 'val' in "
                        "splits_target.json is the test [0]")  # fmt: skip
    parser.add_argument("-seeds", nargs="+", type=int, help="train with each seed, in plans named PLANS_seed_N [the "
                        "plans as they are]")  # fmt: skip
    bound = (
        "bound, for the gap closed: one of -tr, or one more, trained on DATASET [that of -d]; one for all -d, or one "
        "for each in their order"
    )
    parser.add_argument("-lower", nargs="+", default=[], metavar="TRAINER[:DATASET]", help=f"lower {bound}")
    parser.add_argument("-upper", nargs="+", default=[], metavar="TRAINER[:DATASET]", help=f"upper {bound}")
    add_grid_arguments(parser, "this command")
    arguments = parser.parse_args(argv)
    check_grid_arguments(arguments, arguments.f, ("d", "tr", "f", "seeds"))
    for name in ("lower", "upper"):
        if len(getattr(arguments, name)) not in (0, 1, len(arguments.d)):
            raise UDAError(
                f"-{name} takes one bound for all datasets or one for each of {arguments.d}, found "
                f"{getattr(arguments, name)}"
            )
    return arguments


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    out = Path(os.path.realpath(arguments.o))
    methods = find_methods(arguments.d, arguments.tr, arguments.lower, arguments.upper)
    comparison = plan_comparison(
        out, methods, arguments.p, arguments.c, arguments.f, arguments.seeds, arguments.device, arguments.np
    )
    pages, failed = run_comparison(comparison, make_engine(arguments, out))
    print((out / "compare.md").read_text(encoding="utf-8"))
    print(f"Written to {out}: {', '.join(['compare.md', 'compare.csv', 'compare.json', 'compare.png', *pages])}")
    refuse_failures(failed, len(comparison.jobs))


if __name__ == "__main__":
    main()
