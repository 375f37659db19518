"""What a training says at its end of the quality of its segmentations: ``quality.json`` and one line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_uda.errors import UDAError
from nnunet_uda.files import write_json
from nnunet_uda.quality.asked import Asked
from nnunet_uda.quality.calibration import Calibration
from nnunet_uda.quality.cases import FILE, CaseQuality, evenly, load, make_calibration, quality_of_volume
from nnunet_uda.training.translated_dataset import TranslatedDataset, translated

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer

SHARE, SHORTEST, LONGEST = 0.05, 30.0, 600.0
"""Of the training's time, and in seconds: after it no further calibration volume or target scan is begun."""
TARGETS = 6
"""Target scans that the line at the end is of, at most."""


def seconds_for(training: float) -> float:
    """How many seconds may be spent behind a training of ``training`` seconds."""
    return min(LONGEST, max(SHORTEST, SHARE * training))


def conclude(trainer: UDATrainer) -> None:
    """What is done behind the final checkpoint: a warning where nothing has adapted, and the estimate of quality."""
    if warning := trainer.model_choice.warning(trainer.translates):
        trainer.print_to_log_file(warning)
    trainer.checkpoints.training_is_done()
    if trainer.settings.quality_volumes:
        write_quality(trainer)


def write_quality(trainer: UDATrainer) -> None:
    """Calibrate what is to be expected of the final weights, and say it of the target's training scans."""
    log, seconds = trainer.print_to_log_file, seconds_for(time.monotonic() - trainer.record.began)
    log(f"Calibrating the quality estimate ({FILE}); setting quality_volumes=0 leaves it out")
    trainer.network.eval()
    trainer.networks.eval()
    trainer.set_deep_supervision_enabled(False)
    try:
        asked, calibration = calibrate_trainer(trainer, log, seconds)
        write_json(calibration.to_json(), Path(trainer.output_folder, FILE))
        if trainer.needs_target:
            log(expectation(asked, calibration, trainer.target_dataset, seconds))
    except (UDAError, RuntimeError, ValueError) as error:  # the training is done, and is worth more than this
        log(f"WARNING: no quality estimate was made: {error}. nnUNetUDA_quality makes it later")
    finally:
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)


def calibrate_trainer(
    trainer: UDATrainer, log: Callable[[str], None], seconds: float = LONGEST
) -> tuple[Asked, Calibration]:
    """Calibrate a trainer's network on its source validation cases, half of them translated where it translates.

    The network must be in evaluation mode, with deep supervision off. After ``seconds`` no further case is begun.
    """
    asked = Asked(_predictor(trainer), {}, {})
    held_out: list[Any] = [trainer.validation_dataset]
    if trainer.translates:
        held_out.append(_translated(trainer))
    calibration = make_calibration(
        asked,
        trainer.structures,
        trainer.training_dataset,
        held_out,
        trainer.target_dataset if trainer.needs_target else None,
        volumes=trainer.settings.quality_volumes,
        seconds=seconds,
        log=log,
    )
    seen = "that it has trained on" if trainer.fold == "all" else "that it has not trained on"
    calibration.about["calibrated_on"] = f"{len(calibration.about['volumes'])} labelled cases {seen}"
    return asked, calibration


def expectation(asked: Asked, calibration: Calibration, targets: Any, seconds: float = LONGEST) -> str:
    """One line of what is to be expected of ``targets``, a preprocessed dataset whose labels nobody reads.

    After ``seconds`` no further scan is begun.
    """
    begin = time.monotonic()
    found = []
    for case in evenly(targets.identifiers, TARGETS):
        volume, _, spacing = load(asked, targets, case, len(calibration.structures))
        found.append(quality_of_volume(case, asked, calibration, volume, spacing)[0])
        if time.monotonic() - begin > seconds:
            break
    return expectation_line(found)


def expectation_line(found: list[CaseQuality]) -> str:
    """The mean estimate and range, how many are doubtful, and where to look first."""
    known = [each for each in found if not math.isnan(each.overall.dice)]
    if not known:
        return f"Expected on the target: nothing is found in {len(found)} training scan(s)"
    dice, low, high = (np.mean([getattr(each.overall, part) for each in known]) for part in ("dice", "low", "high"))
    doubtful = sum(each.overall.verdict != "good" for each in found)
    worst = min(known, key=lambda each: each.overall.dice)
    first = f": {worst.reasons[0]}" if worst.reasons else ""
    return (
        f"Expected on the target, without its labels: Dice {dice:.2f} ({low:.2f} to {high:.2f}), {doubtful} of "
        f"{len(found)} training scan(s) in doubt. Look first at {worst.case}{first}"
    )


def _predictor(trainer: UDATrainer) -> nnUNetPredictor:
    predictor = nnUNetPredictor(use_mirroring=False, device=trainer.device, perform_everything_on_device=False,
                                allow_tqdm=False)  # fmt: skip
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        type(trainer).__name__, trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    return predictor


def _translated(trainer: UDATrainer) -> TranslatedDataset:
    patch_size = trainer.configuration_manager.patch_size
    dataset = TranslatedDataset(trainer.dataset_class, partial(translated, trainer), patch_size, trainer.device)
    return dataset(trainer.preprocessed_dataset_folder, list(trainer.validation_dataset.identifiers))
