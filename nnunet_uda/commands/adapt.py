"""``nnUNetUDA_adapt``: a trained model on scans of another domain, without the data that it was trained on."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_uda.data.convention import check_model_options, dataset_name, environment_folder, read_json
from nnunet_uda.errors import UDAError, command
from nnunet_uda.files import exclusive, sha256, write_json
from nnunet_uda.settings import parse_settings

STATE = "adapt.json"
"""In the output: what was adapted how, and each scan that is finished."""
ESTIMATE_PASSES = 4
"""What an estimate of a scan takes, in passes of a prediction without mirroring, about."""


@command
def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    from nnunet_uda.adaptation.folder import FolderSettings
    from nnunet_uda.adaptation.model import open_model
    from nnunet_uda.adaptation.scan import ScanSettings
    from nnunet_uda.devices import open_device
    from nnunet_uda.evaluation.unsupervised import unlabelled_images

    kind: type[ScanSettings] | type[FolderSettings] = ScanSettings if args.mode == "scan" else FolderSettings
    given = {name: value for name in ("what", "steps", "learning_rate", "runs", "confidence", "seed")
             if (value := getattr(args, name)) is not None}  # fmt: skip
    settings: ScanSettings | FolderSettings = parse_settings(kind, given, f"-mode {args.mode}")
    model = open_model(_model_folder(args), args.f, args.chk, open_device(args.device), args.trusted)
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
    state = _state(args.o, described)
    with exclusive(args.o):
        run = _adapt_scans if args.mode == "scan" else _adapt_folder
        run(model, cases, settings, args.o, state)
    _say_what_came_of_it(state["scans"], args.o)


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
    parser.add_argument("-device", default="cuda", help="cpu, cuda or mps [cuda]")
    parser.add_argument("-steps", type=int, help="steps [scan: 20, folder: 400]")
    parser.add_argument("-learning_rate", type=float, help="of Adam [scan: 0.001, folder: 0.0003]")
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
    return environment_folder("nnUNet_results") / dataset_name(args.d) / f"{args.tr}__{args.p}__{args.c}"


def _state(out: Path, described: dict[str, Any]) -> dict[str, Any]:
    """What an earlier start of the same command has finished, or a new record.

    Raises:
        UDAError: the folder holds something else.
    """
    path = out / STATE
    if path.exists():
        state = read_json(path)
        if not _is_state(state):
            raise UDAError(f"{path} is no record of this command: give a new folder (-o)")
        changed = sorted(key for key, value in described.items() if state.get(key) != value)
        if changed:
            raise UDAError(
                f"{path} is of another model or other settings ({', '.join(changed)}): give a new folder (-o)"
            )
        return state
    if out.exists() and (not out.is_dir() or any(entry.name != ".lock" for entry in out.iterdir())):
        raise UDAError(f"{out} (-o) is not empty, or no folder: give a new folder")
    return {**described, "scans": {}}


def _is_state(content: Any) -> bool:
    scans = content.get("scans") if isinstance(content, dict) else None
    return isinstance(scans, dict) and all(
        isinstance(scan, dict)
        and all(isinstance(scan.get(key), (int, float)) for key in ("before", "after"))
        and scan.get("kept") in ("adapted", "unadapted")
        for scan in scans.values()
    )


def _finish(model: Any, case: str, out: Path, state: dict[str, Any], before: float, after: float, logits: Any) -> None:
    """Predict a scan by what the estimate prefers and note it; ``logits`` is called with whether that is adapted."""
    adapted = after >= before
    values, properties = logits(adapted)
    model.write_prediction(values, properties, out / f"{case}{model.dataset_json['file_ending']}")
    state["scans"][case] = {"before": before, "after": after, "kept": "adapted" if adapted else "unadapted"}
    write_json(state, out / STATE)
    tqdm.write(f"{case}: estimated Dice {before:.3f} before, {after:.3f} after: {state['scans'][case]['kept']}")


def _waiting(cases: dict[str, list[Path]], out: Path, state: dict[str, Any], ending: str) -> dict[str, list[Path]]:
    """Scans that are not predicted yet."""
    left = {
        case: files
        for case, files in cases.items()
        if case not in state["scans"] or not (out / f"{case}{ending}").exists()
    }
    if len(left) < len(cases):
        print(f"{len(cases) - len(left)} of {len(cases)} scan(s) are finished already")
    return left


def _say_time(model: Any, seconds: float, scans: int) -> None:
    words = f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} s"
    print(
        f"This takes about {words} on {model.predictor.device} for {scans} scan(s), by the time of a step", flush=True
    )


def _adapt_scans(model: Any, cases: dict[str, list[Path]], settings: Any, out: Path, state: dict[str, Any]) -> None:
    from nnunet_uda.adaptation.scan import adapt_to_scan

    waiting = _waiting(cases, out, state, model.dataset_json["file_ending"])
    networks = len(model.weights)
    for number, (case, files) in enumerate(tqdm(waiting.items(), desc="Adapting", unit="scan")):
        volume, properties = model.preprocess(files)
        if number == 0:
            passes = (ESTIMATE_PASSES + model.mirrored_passes) * networks * (1 + settings.runs)
            steps = 2 * networks * settings.runs * settings.steps  # two views
            _say_time(model, len(waiting) * model.seconds(volume.shape[1:], passes, steps), len(waiting))
        own = model.logits(volume, model.weights)
        adapted = adapt_to_scan(model, volume, own.argmax(0).numpy(), settings)
        before, after = (model.estimate(volume, properties, weights) for weights in (model.weights, adapted))

        def logits(better: bool, own: Any = own, adapted: Any = adapted, v: Any = volume, p: Any = properties) -> tuple:
            return (model.logits(v, adapted) if better else own), p

        _finish(model, case, out, state, before, after, logits)


@contextmanager
def _preprocessed(model: Any, cases: dict[str, list[Path]]) -> Iterator[list[tuple[str, np.ndarray, dict[str, Any]]]]:
    """All scans, in files of a while."""
    with TemporaryDirectory() as name:
        found = []
        for case, files in tqdm(cases.items(), desc="Preprocessing", unit="scan"):
            volume, properties = model.preprocess(files)
            np.save(Path(name, f"{case}.npy"), volume)
            found.append((case, np.load(Path(name, f"{case}.npy"), mmap_mode="r"), properties))
        yield found


def _adapt_folder(model: Any, cases: dict[str, list[Path]], settings: Any, out: Path, state: dict[str, Any]) -> None:
    from nnunet_uda.adaptation.folder import known_volumes

    if "of" in state and state["of"] != sorted(cases):
        raise UDAError(
            f"{out / STATE} is of other scans than those in -i now: one model is for all. Give a new folder (-o)"
        )
    state["of"] = sorted(cases)
    waiting = _waiting(cases, out, state, model.dataset_json["file_ending"])
    results = model.results_folder(out)
    if not waiting and all((results / f"fold_{fold}" / "checkpoint_final.pth").exists() for fold in model.folds):
        return
    known = known_volumes(model)
    if known is None:
        print("The model's folder does not say how large its structures are (validation/summary.json, "
              "dataset_fingerprint.json): sizes are not looked at")  # fmt: skip
    with _preprocessed(model, cases) as scans:
        passes = len(model.weights) * 2 * (model.mirrored_passes + ESTIMATE_PASSES)
        seconds = sum(model.seconds(volume.shape[1:], passes, 0) for _, volume, _ in scans)
        steps = 2 * settings.steps * len(model.weights)  # the teacher's pass, and restyling
        _say_time(model, seconds + model.seconds(scans[0][1].shape[1:], 0, steps), len(cases))
        adapted = _adapted_folds(model, scans, settings, known, out, state)
        for case, volume, properties in tqdm(scans, desc="Predicting", unit="scan"):
            if case not in waiting:
                continue
            whole = np.array(volume)
            before, after = (model.estimate(whole, properties, weights) for weights in (model.weights, adapted))

            def logits(better: bool, whole: np.ndarray = whole, properties: Any = properties) -> tuple:
                return model.logits(whole, adapted if better else model.weights), properties

            _finish(model, case, out, state, before, after, logits)


def _adapted_folds(
    model: Any, scans: Sequence[tuple], settings: Any, known: np.ndarray | None, out: Path, state: dict[str, Any]
) -> list[dict[str, Any]]:
    """The weights of each fold, adapted now unless an earlier start has done it."""
    from nnunet_uda.adaptation.folder import adapt_to_folder, distrusted
    from nnunet_uda.training.checkpoint import read_checkpoint

    volumes = [volume for _, volume, _ in scans]
    adapted: list[dict[str, Any]] = []
    segmentations: list[np.ndarray] | None = None
    left_out: Sequence[Sequence[int]] = ()
    for fold, weights in zip(model.folds, model.weights, strict=True):
        path = model.results_folder(out) / f"fold_{fold}" / "checkpoint_final.pth"
        if path.exists():
            adapted.append(read_checkpoint(path)["network_weights"])
            continue
        if segmentations is None:
            segmentations = [model.logits(np.array(v), model.weights).argmax(0).numpy().astype(np.int16)
                             for v in tqdm(volumes, desc="First labels", unit="scan")]  # fmt: skip
            spacings = [model.spacing(properties) for _, _, properties in scans]
            left_out = distrusted(segmentations, spacings, known, len(model.structures))
            for (case, _, _), classes in zip(scans, left_out, strict=True):
                if classes:
                    names = ", ".join(model.structures[value - 1] for value in classes)
                    print(f"{case}: labels of {names} are not learned there: not the size of any labelled scan's")
        with tqdm(total=settings.steps, desc=f"Fold {fold}", unit="step") as progress:

            def said(step: int, loss: float, progress: Any = progress) -> None:
                progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
                progress.update()

            new = adapt_to_folder(model, weights, volumes, segmentations, left_out, settings, said)
        model.write_fold(out, fold, new, {key: state[key] for key in ("model", "settings", "checkpoints")})
        write_json(state, out / STATE)
        adapted.append(new)
    return adapted


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
