"""``nnUNetUDA_intensities``: give scans the intensities that a dataset got when it was converted.

``nnUNetv2_predict`` with a trainer of this package does so by itself; this is for other tools and for nnU-Net's own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnunet_uda.data.clipped_scans import find_scans, write_clipped
from nnunet_uda.data.convention import dataset_name, environment_folder, read_json
from nnunet_uda.errors import UDAError, command
from nnunet_uda.files import is_free, whole_folder
from nnunet_uda.images.intensities import PRESETS, Intensities, parse_intensities, read_intensities
from nnunet_uda.images.nifti import add_geometry_argument, nifti_geometry
from nnunet_uda.images.reading import check_path


def clip(argv: list[str] | None = None) -> None:
    """The command under its former name."""
    print("nnUNetUDA_clip is now called nnUNetUDA_intensities, and this name will go.", file=sys.stderr)
    main(argv)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_intensities",
        description="Clip scans at a window, or at percentiles of their nonzero voxels (and scale them), exactly as "
        "nnUNetUDA_convert did with the scans of dataset -d. nnUNetv2_predict does it by itself where a trainer of "
        "this package made the model; clipping twice changes nothing. The output is CASE_0000.nii.gz.",
        epilog="Example: nnUNetUDA_intensities -d 505 -i scans/ -o clipped/",
    )
    parser.add_argument("-i", required=True, type=Path, metavar="FOLDER", help="scans, CASE_0000.nii.gz, .mha, ...")
    parser.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="output folder, new or empty")
    parser.add_argument("-d", help="dataset id or name: clip as its dataset.json says")
    parser.add_argument(
        "-domain",
        choices=("source", "target"),
        default="target",
        help="with -d: of which domain the scans are [target]",
    )
    parser.add_argument(
        "-window", nargs="+", metavar="HU", help=f"instead of -d, two numbers or one of {', '.join(PRESETS)}"
    )
    parser.add_argument("-percentiles", nargs=2, type=float, metavar=("LOW", "HIGH"), help="instead of -d, as 5 95")
    parser.add_argument("-range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="with -percentiles, as -1 1")
    add_geometry_argument(parser)
    args = parser.parse_args(argv)
    intensities = _intensities(args)
    cases = find_scans(args.i)
    check_path(args.o)
    if not is_free(args.o):
        raise UDAError(f"{args.o} exists and is not an empty folder: give a new folder. Nothing was written.")
    with nifti_geometry(args.nifti_geometry), whole_folder(args.o) as folder:
        write_clipped(cases, intensities, folder)
    print(f"{len(cases)} scan(s) clipped into {args.o}")


def _intensities(args: argparse.Namespace) -> Intensities:
    if sum(given is not None for given in (args.d, args.percentiles, args.window)) != 1:
        raise UDAError(
            "give either -d DATASET, whose dataset.json says how to clip, or -percentiles LOW HIGH, or -window."
        )
    if args.range and args.d is None and args.percentiles is None:
        raise UDAError("-range goes with -percentiles.")
    if args.window:
        window = parse_intensities(args.window, "-window")
        if not isinstance(window, Intensities) or window.window is None:
            raise UDAError(f"-window {' '.join(args.window)}: expected two numbers, or one of {', '.join(PRESETS)}.")
        return window
    if args.d is None:
        return Intensities(tuple(args.percentiles), tuple(args.range) if args.range else None)
    if args.range:
        raise UDAError("-range goes with -percentiles; with -d the dataset says it.")
    where = environment_folder("nnUNet_raw") / dataset_name(args.d) / "dataset.json"
    intensities = read_intensities(read_json(where), where, args.domain)
    if intensities is None:
        raise UDAError(
            f"{where} holds no uda.intensities of the {args.domain}: this dataset keeps the vendor's intensities, so "
            "new scans are predicted as they are. To clip all the same, give -percentiles or -window instead of -d."
        )
    return intensities


if __name__ == "__main__":
    main()
