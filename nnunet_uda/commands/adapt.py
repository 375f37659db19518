"""``nnUNetUDA_adapt``: a trained model on scans of another domain, without the data that it was trained on."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_uda.commands.model_options import check_model_options
from nnunet_uda.data.convention import results_folder
from nnunet_uda.devices import DEVICE_HELP, choose_device
from nnunet_uda.errors import UDAError, command
from nnunet_uda.files import exclusive, sha256
from nnunet_uda.images.reading import check_path
from nnunet_uda.settings import parse_settings


@command
def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    from nnunet_uda.adaptation.folder import FolderSettings
    from nnunet_uda.adaptation.model import open_model
    from nnunet_uda.adaptation.run import Adaptation, open_record
    from nnunet_uda.adaptation.scan import ScanSettings
    from nnunet_uda.evaluation.prediction import unlabelled_images

    kind: type[ScanSettings] | type[FolderSettings] = ScanSettings if args.mode == "scan" else FolderSettings
    given = {name: value for name in ("what", "steps", "learning_rate", "runs", "confidence", "seed")
             if (value := getattr(args, name)) is not None}  # fmt: skip
    settings: ScanSettings | FolderSettings = parse_settings(kind, given, f"-mode {args.mode}")
    model = open_model(_model_folder(args), args.f, args.chk, choose_device(args.device), args.trusted)
    if not args.i.is_dir():
        raise UDAError(f"{args.i} (-i) is no folder; expected one that holds the scans, CASE_0000.nii.gz")
    cases = unlabelled_images(args.i, model.dataset_json)
    if args.o.resolve() == args.i.resolve():
        raise UDAError(f"-o is the folder of the scans, {args.i}: give another one")
    described = {
        "model": str(model.folder.resolve()), "folds": model.folds, "mode": args.mode,
        "checkpoints": [sha256(model.folder / f"fold_{fold}" / args.chk) for fold in model.folds],
        "settings": dataclasses.asdict(settings),
    }  # fmt: skip
    adaptation = Adaptation(model, cases, args.o, open_record(args.o, described))
    check_path(args.o)
    with exclusive(args.o):
        if isinstance(settings, ScanSettings):
            adaptation.each_scan(settings)
        else:
            adaptation.whole_folder(settings)
    _say_what_came_of_it(adaptation.state["scans"], args.o)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_adapt",
        description="Adapt a trained nnU-Net v2 model (of any trainer here or of nnU-Net's own; 2D or 3D, plain or "
        "residual) to unlabelled scans of another domain, without its training data, and predict these scans. Where "
        "the label-free estimate of a scan's Dice is lower after adapting than before, the unadapted prediction stays. "
        "A second start of the same command goes on where it stopped.",
        epilog="Example: nnUNetUDA_adapt -m Dataset501_X/nnUNetTrainer__nnUNetPlans__2d -i scans/ -o adapted/",
    )
    parser.add_argument("-m", type=Path, metavar="FOLDER", help="the model's folder, TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("-d", help="or in nnUNet_results: dataset id or name")
    parser.add_argument("-tr", default="nnUNetTrainer", help="with -d: trainer [nnUNetTrainer]")
    parser.add_argument("-p", default="nnUNetPlans", help="with -d: plans identifier [nnUNetPlans]")
    parser.add_argument("-c", default="2d", help="with -d: configuration [2d]")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds [all that are finished]")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint [checkpoint_final.pth]")
    parser.add_argument("-i", required=True, type=Path, metavar="FOLDER", help="scans, CASE_0000.nii.gz")
    parser.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="predictions and what was adapted")
    parser.add_argument(
        "-mode", choices=("scan", "folder"), default="folder",
        help="scan: anew for each scan, nothing is kept; folder: one model for all scans, which is written [folder]",
    )  # fmt: skip
    parser.add_argument("-device", help=DEVICE_HELP)
    parser.add_argument("-steps", type=int, help="steps [scan: 20, folder: 240]")
    parser.add_argument("-learning_rate", type=float, help="at the start [scan: 0.001 (Adam), folder: 0.001 (SGD)]")
    parser.add_argument("-what", choices=("norms", "all"), help="scan: weights that learn [norms]")
    parser.add_argument("-runs", type=int, help="scan: runs whose predictions are averaged [1]")
    parser.add_argument("-confidence", type=float, help="folder: threshold of the surest class [0.9]")
    parser.add_argument("-seed", type=int, help="of all random numbers [0]")
    parser.add_argument(
        "--trusted", action="store_true", help="run code that is pickled in the checkpoint; only if you know its origin"
    )
    return parser.parse_args(argv)


def _model_folder(args: argparse.Namespace) -> Path:
    if (args.m is None) == (args.d is None):
        raise UDAError("give either -m FOLDER, or -d DATASET with -tr, -p and -c as they were trained.")
    check_model_options(args)
    if args.m is not None:
        return args.m
    return results_folder(args.d, args.tr, args.p, args.c)


def _say_what_came_of_it(scans: dict[str, dict[str, Any]], out: Path) -> None:
    before, after = (float(np.mean([scan[key] for scan in scans.values()])) for key in ("before", "after"))
    kept = sum(scan["kept"] == "adapted" for scan in scans.values())
    print(f"{out}: {len(scans)} scan(s); mean estimated Dice {before:.3f} before, {after:.3f} after. Adapted "
          f"predictions of {kept}, unadapted ones of {len(scans) - kept}")  # fmt: skip
    print("The estimate reads no label and may be wrong, and adapting works towards a part of it: look at predictions")
    if models := [path.parent.parent for path in sorted(out.glob("Dataset*/*/fold_*/checkpoint_final.pth"))]:
        trainer, plans, configuration = models[0].name.split("__")
        print(f"More scans of this domain: nnUNet_results={out.resolve()} nnUNetv2_predict -d {models[0].parent.name} "
              f"-tr {trainer} -p {plans} -c {configuration} -f ... -i scans/ -o predictions/")  # fmt: skip
        if after < before:
            print("WARNING: by this estimate the adapted model is worse in the mean: use the model as it was")


if __name__ == "__main__":
    main()
