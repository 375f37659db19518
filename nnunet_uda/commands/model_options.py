"""The options that name trained models, and their checks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnunet_uda.data.convention import results_folder
from nnunet_uda.devices import DEVICE_HELP
from nnunet_uda.errors import UDAError
from nnunet_uda.names import check_name


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name one trained model, and the device."""
    parser.add_argument("-d", metavar="DATASET", help="dataset id or name (or -m)")
    parser.add_argument("-tr", metavar="TRAINER", help="trainer (or -m)")
    parser.add_argument("-p", metavar="PLANS", help="plans [nnUNetPlans]")
    parser.add_argument("-plans", default="nnUNetPlans", help=argparse.SUPPRESS)  # a former name
    parser.add_argument("-c", metavar="CONFIGURATION", default="2d", help="configuration [2d]")
    parser.add_argument("-m", metavar="FOLDER", type=Path, help="the model's folder, TRAINER__PLANS__CONFIGURATION, "
                        "in place of -d, -tr, -p and -c")  # fmt: skip
    parser.add_argument("-f", metavar="FOLD", nargs="+", default=["0"], help="folds that predict together ["
                        "0]; of several it counts, too, how far they agree")  # fmt: skip
    parser.add_argument("-chk", metavar="FILE", default="checkpoint_final.pth", help="checkpoint ["
                        "checkpoint_final.pth]")  # fmt: skip
    parser.add_argument("-device", help=DEVICE_HELP)


def check_model_options(arguments: argparse.Namespace) -> None:
    """Raise ``UDAError`` if an option that names trained models holds a bad name, or one twice."""
    for option in ("f", "chk", "tr", "p", "c"):
        given = getattr(arguments, option, None)  # a command need not have all of them
        names = given if isinstance(given, list) else [] if given is None else [given]
        for name in names:
            check_name(name, f"-{option}", file=True)
            if names.count(name) > 1:
                raise UDAError(f"-{option}: {name} is given twice; name each once")


def model_folder(arguments: argparse.Namespace) -> Path:
    """The model's folder of ``-m``, or of ``-d``, ``-tr``, ``-p`` and ``-c``.

    Raises:
        UDAError: where neither is given, or for a bad name.
    """
    check_model_options(arguments)
    if arguments.m is not None:
        return Path(os.path.abspath(arguments.m))
    if arguments.d is None or arguments.tr is None:
        raise UDAError("-d and -tr are needed, or the model's folder: -m .../TRAINER__PLANS__CONFIGURATION")
    return results_folder(arguments.d, arguments.tr, arguments.p or arguments.plans, arguments.c)
