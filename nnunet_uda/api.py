"""The road from two folders of scans to scored predictions, in Python: what the commands do, as functions.

    from nnunet_uda import configure, convert, evaluate, predict, train

They need nnU-Net's three folders (``nnUNet_raw``, ``nnUNet_preprocessed``, ``nnUNet_results``) in the environment
before anything of nnU-Net is imported. What a user can mend is a ``UDAError``, whose text says how.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import dataset_name, environment_folder, read_json, results_folder
from nnunet_uda.devices import choose_device
from nnunet_uda.errors import UDAError
from nnunet_uda.training.checkpoint import FINAL


def convert(converter: str, *, dataset_id: int, **options: Any) -> Path:
    """Make an nnU-Net raw dataset with an unlabelled target: ``nnUNetUDA_convert``.

    Args:
        converter: ``folders`` for data of any kind, or a dataset (``nnUNetUDA_convert -h``): ``mmwhs``, ...
        dataset_id: nnU-Net's number of the dataset, 1 to 999.
        options: the command's, without the dash: ``source="CT"``, ``source_images="ct/"``, ``labels={"liver": 1}``.

    Returns:
        The raw dataset's folder.

    Raises:
        UDAError: an unknown, missing or bad option; input that is refused.
    """
    from nnunet_uda.commands.convert import make_parser, run

    given = {name: _as_words(value) for name, value in options.items()}
    arguments = _arguments(make_parser(converter), f"convert({converter!r})", {"d": dataset_id, **given})
    arguments.dataset = converter
    run(arguments)
    return environment_folder("nnUNet_raw") / dataset_name(dataset_id)


def plan(dataset: int | str, *configurations: str, num_processes: int = 2) -> Path:
    """Plan and preprocess: ``nnUNetv2_plan_and_preprocess --verify_dataset_integrity``.

    Args:
        dataset: id or name.
        configurations: ``2d`` unless others are given.

    Returns:
        The preprocessed dataset's folder.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    from nnunet_uda.plans import planning

    name = dataset_name(str(dataset))
    number = int(name[7:10])
    chosen = configurations or ("2d",)
    extract_fingerprints([number], num_processes=num_processes, check_dataset_integrity=True)
    with planning():
        plan_experiments([number])
    preprocess([number], configurations=chosen, num_processes=[num_processes] * len(chosen))
    return environment_folder("nnUNet_preprocessed") / name


def configure(
    dataset: int | str,
    plans: str,
    settings: Mapping[str, Any] | None = None,
    *,
    base: str = "nnUNetPlans",
    configuration: str = "2d",
    **options: Any,
) -> Path:
    """Write a plans file of its own name with settings: ``nnUNetUDA_configure``.

    Args:
        dataset: id or name.
        plans: name of the new plans.
        settings: by their names in ``nnUNetUDA_configure --list``: ``{"num_epochs": 50, "cisfa.generator_width": 16}``.
        base: plans to start from.
        configuration: the configuration that ``options`` change.
        options: ``preset="cpu"``, ``protocol``, ``plane``, ``patch_size``, ``batch_size``, ``base_features``,
            ``max_features``, ``stages``, ``slice_size``, ``overwrite``.

    Returns:
        The plans file.
    """
    from nnunet_uda.commands.configure import make_parser, run

    given = {"d": str(dataset), "p": plans, "base": base, "c": configuration, **options}
    return run(_arguments(make_parser(), "configure()", given), dict(settings or {}))


def train(
    dataset: int | str,
    configuration: str = "2d",
    fold: int | str = 0,
    *,
    trainer: str = "CASTTrainer",
    plans: str = "nnUNetPlans",
    device: str | None = None,
    **options: Any,
) -> Path:
    """Train one fold in this process: ``nnUNetUDA_train``.

    Args:
        dataset: id or name.
        fold: its number, or ``"all"``.
        device: ``cpu``, ``cuda`` or ``mps``; CUDA where there is one, else the CPU.
        options: the command's: ``c=True`` continues, ``val``, ``val_best``, ``npz``, ``pretrained_weights``,
            ``disable_checkpointing``.

    Returns:
        The fold's folder in ``nnUNet_results``.

    Raises:
        UDAError: bad input, or a signal (Ctrl-C) that ended training with a checkpoint.
    """
    from nnunet_uda.commands.train import make_parser, train_here

    given = {"dataset": str(dataset), "configuration": configuration, "fold": str(fold), "tr": trainer, "p": plans,
             "device": device, **options}  # fmt: skip
    try:
        return train_here(_arguments(make_parser(), "train()", given))
    except SystemExit as stop:
        raise UDAError(f"training was ended (status {stop.code}): train(..., c=True) goes on from here") from stop


def predict(
    dataset: int | str,
    images: Path | str,
    output: Path | str,
    *,
    trainer: str = "CASTTrainer",
    plans: str = "nnUNetPlans",
    configuration: str = "2d",
    folds: Sequence[int | str] = (0,),
    checkpoint: str = FINAL,
    device: str | None = None,
) -> Path:
    """Segment a folder of scans, ``CASE_0000.nii.gz``, as ``nnUNetv2_predict`` does, one after the other.

    Returns:
        ``output``.
    """
    from nnunet_uda.evaluation.prediction import predict_folder

    trained = _trained(dataset, trainer, plans, configuration)
    chosen = choose_device(device)
    predict_folder(trained, folds, Path(images), Path(output), chosen, checkpoint)
    return Path(output)


def _trained(dataset: int | str, trainer: str, plans: str, configuration: str) -> Path:
    folder = results_folder(str(dataset), trainer, plans, configuration)
    if not folder.is_dir():
        raise UDAError(f"{folder} does not exist: train({dataset!r}, trainer={trainer!r}, plans={plans!r}) first")
    return folder


def evaluate(
    runs: Mapping[str, Path | str], output: Path | str, *, dataset: int | str | None = None, **options: Any
) -> dict:
    """Score predictions and write tables and a page: ``nnUNetUDA_evaluate``.

    Args:
        runs: folders of predictions by the run's name.
        output: folder for the report; a former evaluation there is replaced.
        dataset: id or name: gives labels, references and images.
        options: the command's: ``r`` (references), ``i`` (images), ``djfile``, ``f`` (folds), ``lower``, ``upper``,
            ``labels``, ``slices``, ``plane``, ``np``, ``no_overlays``.

    Returns:
        What ``evaluation.json`` holds: scores of every volume, means, gap closed, paired tests.
    """
    from nnunet_uda.commands.evaluate import make_parser, run

    given: dict[str, Any] = {
        "predictions": [f"{name}={folder}" for name, folder in runs.items()], "o": str(output)
    }  # fmt: skip
    given |= {"d": None if dataset is None else str(dataset)}
    given |= {name: _as_words(value) for name, value in options.items()}
    run(_arguments(make_parser(), "evaluate()", given))
    return read_json(Path(output) / "evaluation.json")


def _as_words(value: Any) -> Any:
    """``{"liver": 5}`` as the command's ``["liver=5"]``, and paths as text."""
    if isinstance(value, Mapping):
        return [f"{name}={','.join(map(str, v)) if isinstance(v, (list, tuple)) else v}" for name, v in value.items()]
    return str(value) if isinstance(value, Path) else value


def _arguments(parser: argparse.ArgumentParser, where: str, given: Mapping[str, Any]) -> argparse.Namespace:
    """What the parser would make of ``given``: its defaults, checked names and choices, nothing missing.

    Raises:
        UDAError: an option that the command does not have, a value that is not among its choices, or a missing one.
    """
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    unknown = sorted(set(given) - set(actions))
    if unknown:
        raise UDAError(f"{where}: no option {', '.join(unknown)}. There are: {', '.join(sorted(actions))}")
    values = {}
    for name, action in actions.items():
        value = given.get(name)
        if value is None:
            if action.required and name not in given:
                raise UDAError(f"{where}: give {name} ({action.help})")
            value = action.default
        elif action.choices is not None and value not in action.choices:
            raise UDAError(f"{where}: {name} may be {', '.join(map(str, action.choices))}, found {value!r}")
        elif action.nargs in ("+", "*") and isinstance(value, (str, int, float)):
            value = [value]
        if name in given and value is not None and callable(action.type):
            value = [action.type(item) for item in value] if isinstance(value, list) else action.type(value)
        values[name] = value
    return argparse.Namespace(**values)
