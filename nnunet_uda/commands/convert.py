"""``nnUNetUDA_convert``: a vendor's tree, or folders of scans, become an nnU-Net dataset with an unlabelled target."""

from __future__ import annotations

import argparse

from nnunet_uda.dataset_conversion import abdomen, acdc, amos, brats, btcv, chaos, cine_lge, emidec, folders, mmwhs, vs
from nnunet_uda.dataset_conversion.options import add_common_arguments
from nnunet_uda.dataset_conversion.options import run as check_and_convert
from nnunet_uda.errors import UDAError, command

CONVERTERS = {
    module.__name__.rpartition(".")[2]: module
    for module in (mmwhs, abdomen, chaos, btcv, amos, cine_lge, acdc, emidec, brats, vs, folders)
}


def make_parser(converter: str) -> argparse.ArgumentParser:
    """The options of one converter.

    Raises:
        UDAError: no such converter.
    """
    if converter not in CONVERTERS:
        raise UDAError(f"there is no converter {converter!r}. There are: {', '.join(CONVERTERS)}")
    parser = argparse.ArgumentParser()
    CONVERTERS[converter].add_arguments(parser)
    add_common_arguments(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say what comes next."""
    check_and_convert(CONVERTERS[arguments.dataset].convert, arguments)
    print(f"Next: nnUNetv2_plan_and_preprocess -d {arguments.d} -c 2d --verify_dataset_integrity")
    print(f"Then: nnUNetUDA_train {arguments.d} 2d 0 -tr CASTTrainer")
    print(f"      on a CPU before it: nnUNetUDA_configure -d {arguments.d} -p nnUNetPlansCPU -preset cpu")


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_convert",
        description="Make an nnU-Net raw dataset with an unlabelled target: imagesTr + labelsTr (source), imagesTu "
        "(target), imagesTs + labelsTs (target test). It appears in nnUNet_raw whole or not at all. "
        "`nnUNetUDA_convert DATASET -h` shows the expected input.",
        epilog=f"Example: {folders.EXAMPLE}",
    )
    datasets = parser.add_subparsers(dest="dataset", metavar="DATASET", required=True)
    for name, module in CONVERTERS.items():
        text = (module.__doc__ or "").strip()
        subparser = datasets.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            epilog=f"Example:\n    {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        add_common_arguments(subparser)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
