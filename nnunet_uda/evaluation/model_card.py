"""The model card of an exported model, from ``templates/model_card.md``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_uda.data.components import KEY as COMPONENTS
from nnunet_uda.data.convention import Domains, read_domains, read_json
from nnunet_uda.evaluation.page import filled
from nnunet_uda.evaluation.prediction import TrainedModel
from nnunet_uda.files import sha256
from nnunet_uda.images.intensities import Intensities, read_intensities
from nnunet_uda.quality.cases import FILE as QUALITY
from nnunet_uda.training.checkpoint import FINAL, configuration_of, read_model

TRAINER = "nnUNetTrainer"
POSTPROCESSING = "postprocessing.pkl"


def what_to_clip(dataset_json: dict[str, Any]) -> Intensities | None:
    """The clipping that this package's trainers apply to new target scans, and nnU-Net's own trainer does not."""
    return read_intensities(dataset_json, "dataset.json of the model", "target")


def clipping_words(intensities: Intensities) -> str:
    """Explain to the receiver how to clip scans, with code that does it."""
    bottom, top = intensities.scale or (0.0, 0.0)
    return filled("clipping.md", intensities=intensities, bottom=bottom, top=top)


def model_card(
    folder: Path, place: Path, folds: Sequence[str], checkpoint: str, check: str, quality: dict[str, Any] | None = None
) -> str:
    """Markdown: what the model is, what it was trained on, how well it is expected to do, and how to use it.

    Args:
        folder: the trained model.
        place: the exported one.
        check: what was compared, in words.
        quality: content of a quality report of ``nnUNetUDA_quality``.
    """
    plans, dataset_json = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    content = read_model(path := TrainedModel(folder, folds[0], checkpoint).path)
    configuration = configuration_of(content, path, plans)
    uda = dataset_json.get("uda")
    uda = uda if isinstance(uda, dict) else {}
    domains = read_domains(dataset_json) if {"source_domain", "target_domain"} <= set(uda) else Domains("", "")
    schedule = f"{content.get('current_epoch', 'not recorded:')} epochs"
    if steps := content.get("uda", {}).get("settings", {}).get("iterations_per_epoch"):
        schedule += f" of {steps} steps"
    clip = what_to_clip(dataset_json)
    card = filled(
        "model_card.md",
        name=plans["dataset_name"],
        source=domains.source,
        target=domains.target,
        labels=", ".join(f"{value} {label}" for label, value in dataset_json["labels"].items()),
        channels=", ".join(dataset_json["channel_names"].values()),
        num_source=dataset_json.get("numTraining", "not recorded"),
        num_target=uda.get("numTarget", "not recorded"),
        trainer=content["trainer_name"],
        folds=folds,
        checkpoint=checkpoint,
        schedule=schedule,
        configuration=configuration,
        network={key: plans["configurations"][configuration].get(key) for key in ("spacing", "patch_size")},
        today=date.today().isoformat(),
        check=check,
        stock_trainer=TRAINER,
        plans=plans["plans_name"],
        postprocessing=f"{place.parent.name}/{place.name}/{POSTPROCESSING}" if plans.get(COMPONENTS) else None,
        clipping=clipping_words(clip) if clip else "Scans go in as they are.",
        validation=_validation(folder, folds, domains),
        expected=_expected(folder, folds, quality),
        checkpoints={fold: sha256(place / f"fold_{fold}" / FINAL) for fold in folds},
    )
    return card + "\n"


def _inside(path: Path, *keys: str) -> Any:
    """The value behind ``keys`` in a JSON file, None where it has none or there is no such file."""
    content = read_json(path) if path.is_file() else None
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _validation(folder: Path, folds: Sequence[str], domains: Domains) -> str:
    lines = []
    for fold in folds:
        summary = folder / f"fold_{fold}" / "validation" / "summary.json"
        if summary.is_file():
            mean = _inside(summary, "foreground_mean", "Dice")
            shown = f"{mean:.3f}" if isinstance(mean, float) else "not defined"
            otherwise = f"{domains.source or 'source'} validation cases, not the domain to predict"
            on = _inside(summary.with_name("about.json"), "validated_on") or otherwise
            lines.append(f"- fold {fold}: Dice {shown} on {on}")
    return "\n".join(lines) or "No final validation was run."


def _expected(folder: Path, folds: Sequence[str], quality: dict[str, Any] | None) -> str:
    blocks = []
    overall = [case["overall"] for case in quality["cases"]] if quality else []
    if known := [each for each in overall if all(each.get(key) is not None for key in ("dice", "low", "high"))]:
        verdicts = [each.get("verdict") for each in overall]
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("good", "look at it", "failed"))
        dice, low, high = (float(np.mean([each[key] for each in known])) for key in ("dice", "low", "high"))
        blocks.append(
            f"Estimated without labels on {len(overall)} scan(s) of the target: Dice {dice:.2f} ({low:.2f} to "
            f"{high:.2f}); {counts}."
        )
    path = folder / f"fold_{folds[0]}" / QUALITY
    if path.is_file():
        made_on = _inside(path, "about", "calibrated_on") or "source cases"
        blocks.append(
            f"{QUALITY} in the fold's folder is the calibration of nnUNetUDA_quality (nnunet_uda), which estimates the "
            f"Dice of each case; made on {made_on} in random styles."
        )
    return "\n\n".join(blocks) or "Not estimated: see nnUNetUDA_quality of nnunet_uda."
