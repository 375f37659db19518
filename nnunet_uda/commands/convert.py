"""``nnUNetUDA_convert``: a vendor's tree, or folders of scans, become an nnU-Net dataset with an unlabelled target."""

from __future__ import annotations

import argparse

from nnunet_uda.dataset_conversion import (
    abdomen,
    acdc,
    amos,
    brats,
    btcv,
    chaos,
    cine_lge,
    emidec,
    folders,
    mmwhs,
    vs,
)
from nnunet_uda.dataset_conversion.dataset import recover
from nnunet_uda.dataset_conversion.options import check_arguments
from nnunet_uda.errors import command

CONVERTERS = {
    "mmwhs": mmwhs,
    "abdomen": abdomen,
    "chaos": chaos,
    "btcv": btcv,
    "amos": amos,
    "cine_lge": cine_lge,
    "acdc": acdc,
    "emidec": emidec,
    "brats": brats,
    "vs": vs,
    "folders": folders,
}


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_convert",
        description="Make an nnU-Net raw dataset with an unlabelled target: imagesTr + labelsTr (source), imagesTu "
        "(target), imagesTs + labelsTs (target test). It appears in nnUNet_raw whole or not at all. "
        "`nnUNetUDA_convert DATASET -h` shows the expected input.",
    )
    datasets = parser.add_subparsers(dest="dataset", metavar="DATASET", required=True)
    for name, module in CONVERTERS.items():
        text = (module.__doc__ or "").strip()
        subparser = datasets.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
    args = parser.parse_args(argv)
    check_arguments(args)
    recover(args.d)
    CONVERTERS[args.dataset].convert(args)


if __name__ == "__main__":
    main()
