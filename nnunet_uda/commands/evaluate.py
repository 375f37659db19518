"""``nnUNetUDA_evaluate``: score predictions, compare runs, write tables and a page with overlays."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunet_uda.data.convention import read_json
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.output import REPORT, check_output
from nnunet_uda.evaluation.overlays import PLANES
from nnunet_uda.evaluation.reference_values import Reading, describe, named_values, read_by, recorded_values
from nnunet_uda.evaluation.runs import (
    Labels,
    cases_of_folds,
    choose_volumes,
    find_images,
    find_raw_dataset,
    image_folders,
    parse_runs,
    read_labels,
    runs_and_bound,
)
from nnunet_uda.evaluation.scoring import Evaluation
from nnunet_uda.evaluation.tables import check_bounds
from nnunet_uda.images.nifti import add_geometry_argument, nifti_geometry
from nnunet_uda.workers import usual_processes

MAX_PANELS = 1000
"""Panels in the folder of overlays at most: with more volumes or runs, fewer slices of each are drawn."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_evaluate",
        description="Dice, ASSD (mm) and HD95 (mm) of one or several runs against references: evaluation.json, .csv, "
        ".md and .html (tables, a plot of every volume, overlays), and the tables on the screen.",
        epilog="Example: nnUNetUDA_evaluate -d 501 -f 0 1 2 3 -pred CISFA=preds/fold_{fold} "
        "-lower source=source_only/fold_{fold} -upper target=supervised/fold_{fold} -o evaluation",
    )
    parser.add_argument("-d", metavar="DATASET", help="dataset id or name: gives labels, references and images")
    parser.add_argument("-pred", dest="predictions", metavar="[NAME=]FOLDER", nargs="+", help="runs: folders of "
                        "predictions; {fold} in FOLDER stands for the fold's number")  # fmt: skip
    parser.add_argument("-p", dest="former", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("-o", metavar="FOLDER", type=Path, required=True, help="output folder; a former evaluation is "
                        "replaced")  # fmt: skip
    parser.add_argument("-r", metavar="FOLDER", type=Path, help="references [the dataset's labelsTs]")
    parser.add_argument("-labels", metavar="NAME=VALUE", nargs="+", help="what the references' values mean, as in "
                        "nnUNetUDA_convert folders, and for a dataset that it has not made [the dataset's "
                        "classes, or what dataset.json says of the files that were converted]")  # fmt: skip
    parser.add_argument("-i", metavar="FOLDER", type=Path, help="images for the overlays [the dataset's imagesTs, or "
                        "imagesTu]")  # fmt: skip
    parser.add_argument("-djfile", metavar="FILE", type=Path, help="dataset.json with the labels [the dataset's]")
    parser.add_argument("-f", metavar="FOLD", nargs="+", type=int, help="score exactly the 'val' cases of these folds")
    parser.add_argument("-splits", metavar="FILE", type=Path, help="splits for -f [the dataset's splits_target.json]")
    bound = "bound, for the gap closed: one of the runs by its name, or one more as in -pred"
    parser.add_argument("-lower", metavar="NAME|[NAME=]FOLDER", help=f"lower {bound}")
    parser.add_argument("-upper", metavar="NAME|[NAME=]FOLDER", help=f"upper {bound}")
    parser.add_argument("-slices", metavar="N", type=int, default=5, help="overlays of each volume, at most [5]")
    parser.add_argument("-plane", choices=list(PLANES), help="plane of the overlays [the thick-slice plane]")
    parser.add_argument("-np", metavar="N", type=int, default=usual_processes(), help="number of processes "
                        "[%(default)s]")  # fmt: skip
    add_geometry_argument(parser)
    parser.add_argument("--unsupervised", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no_overlays", action="store_true", help="draw no overlays")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ``UDAError`` for what the parser let through; take ``-p``, a former name, as ``-pred``."""
    if arguments.former:
        print(
            "-p means plans in every other command: the predictions of nnUNetUDA_evaluate are now -pred",
            file=sys.stderr,
        )
        arguments.predictions = [*(arguments.predictions or []), *arguments.former]
    if not arguments.predictions:
        raise UDAError("-pred is missing: give folders of predictions, -pred NAME=FOLDER")
    if arguments.slices < 1 or arguments.np < 1:
        raise UDAError(f"-slices and -np must be at least 1, found {arguments.slices} and {arguments.np}")


def given_or_own(given: Path | None, raw: Path | None, name: str, needed: str) -> Path:
    """The file or folder that an option gives, else the dataset's own of that name.

    Raises:
        UDAError: ``needed``, where there is neither.
    """
    if given is not None:
        return given
    if raw is None:
        raise UDAError(f"without -d, {needed}")
    return raw / name


def read_references(
    arguments: argparse.Namespace,
    dataset_json: Path,
    labels: Labels,
    cases: Sequence[str],
    reference: Path,
    raw: Path | None,
) -> Reading:
    """Find out what the references' values mean: from ``-labels``, else from the values and ``dataset.json``."""
    if arguments.labels:
        named = named_values(arguments.labels, labels)
        return Reading(dict.fromkeys(cases, named), [f"The references are read as -labels says: {describe(named)}."])
    recorded = recorded_values(read_json(dataset_json), labels, dataset_json)
    if recorded is None:
        return Reading({}, [])
    return read_by(recorded, labels, cases, reference, raw, arguments.np)


@command
def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if "--unsupervised" in words:
        from nnunet_uda.commands import evaluate_unsupervised

        print("--unsupervised has become a command of its own: nnUNetUDA_checkpoints", file=sys.stderr)
        evaluate_unsupervised.main([word for word in words if word != "--unsupervised"])
        return
    run(make_parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> None:
    """Score the runs and write the report."""
    check_arguments(arguments)
    with nifti_geometry(arguments.nifti_geometry):
        _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    check_output(arguments.o)
    raw = find_raw_dataset(arguments.d) if arguments.d else None
    both = "is needed too: -d DATASET, or -r REFERENCES -djfile dataset.json"
    reference = given_or_own(arguments.r, raw, "labelsTs", f"-r {both}")
    dataset_json = given_or_own(arguments.djfile, raw, "dataset.json", f"-djfile {both}")
    labels = read_labels(dataset_json)
    words, lower = runs_and_bound(arguments.predictions, arguments.lower)
    words, upper = runs_and_bound(words, arguments.upper)
    runs = parse_runs(words)
    check_bounds([run.name for run in runs], lower, upper)
    fold_cases = None
    if arguments.f is not None:
        need = "-f needs the splits file too: -splits splits_target.json"
        splits = given_or_own(arguments.splits, raw, "splits_target.json", need)
        fold_cases = cases_of_folds(splits, arguments.f)
    elif arguments.splits:
        raise UDAError("-splits is of use with -f only: add the folds to score, as in -f 0 1 2 3")
    volumes = choose_volumes(runs, reference, labels.file_ending, fold_cases)
    cases = sorted({case for _, case in volumes})

    images: dict[str, Path] = {}
    n_slices = max(1, min(arguments.slices, MAX_PANELS // (len(volumes) * (len(runs) + 2))))
    folders = [arguments.i] if arguments.i else image_folders(raw, fold_cases is not None) if raw else []
    if arguments.no_overlays:
        note = "No overlays were drawn (--no_overlays)."
    elif not folders:
        note = "No overlays were drawn: without a dataset (-d) they need the images' folder (-i)."
        print(note)
    else:
        images = find_images(cases, folders, labels.file_ending)
        note = (
            "Axial slices as seen from the feet, all others with the head up. Chosen slices lie evenly over the "
            "reference's extent; one is the slice where the runs together have the most wrong voxels. These "
            f"({n_slices} of a volume at most) lie as pictures in the folder overlays, and are printed of the volume "
            "that is shown."
        )

    evaluation = Evaluation(runs, volumes, reference, labels, arguments.np)
    reading = read_references(arguments, dataset_json, labels, cases, reference, raw)
    about = {"dataset": raw.name if raw else None, "scored_folds": None if fold_cases is None else list(fold_cases)}
    text = evaluation.write(
        arguments.o, reading, lower, upper, about, images, note, n_slices=n_slices, plane=arguments.plane
    )
    print(text)
    print(f"Written to {arguments.o}: {REPORT}, evaluation.csv, evaluation.md, evaluation.html (open it in a browser)")


if __name__ == "__main__":
    main()
