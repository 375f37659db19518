"""Estimates of cases, and a network's calibration, from volumes on its grid."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_uda.data.convention import read_json
from nnunet_uda.errors import UDAError, printable, shown
from nnunet_uda.images.reading import readable
from nnunet_uda.quality.asked import Asked, as_label
from nnunet_uda.quality.calibration import (
    KINDS,
    Calibration,
    Estimate,
    Pair,
    calibrate,
    cap_of,
    estimate_case,
    estimate_structure,
    features,
)
from nnunet_uda.quality.degrade import degrade
from nnunet_uda.quality.shapes import describe_shapes, shape_deviations, source_shapes
from nnunet_uda.quality.signals import LEVELS, case_signals, describe_scan, known_scans, scan_deviations

FILE = "quality.json"
"""Beside a fold's checkpoints."""
SHAPES_OF = 60
"""Labelled cases whose shapes are looked at, at most."""
BLOCK = 32
"""Slices along the first axis of a calibration volume, at most."""


@dataclass(frozen=True)
class CaseQuality:
    """What is to be expected of one case.

    Attributes:
        case: its id.
        overall: the mean over structures, and the worst verdict.
        structures: by name.
        signals: by structure, as ``case_signals`` has them. scan: as ``scan_deviations``.
    """

    case: str
    overall: Estimate
    structures: dict[str, Estimate]
    signals: dict[str, dict[str, Any]]
    scan: dict[str, float]

    @property
    def reasons(self) -> list[str]:
        """The weightiest reason of each structure that is not good, with the structure's name."""
        doubtful = [(name, each) for name, each in self.structures.items() if each.verdict != "good"]
        return [f"{name}: {each.reasons[0]}" for name, each in doubtful if each.reasons]

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["reasons"] = self.reasons
        return content


# -- calibration -------------------------------------------------------------------------------------------------------


def make_calibration(asked: Asked, structures: list[str], *datasets: Any, **options: Any) -> Calibration:
    """Calibrate on labelled volumes in random styles; ``datasets`` and ``options`` are ``calibration_pairs``'s."""
    return calibrate(structures, *calibration_pairs(asked, len(structures), *datasets, **options))


def calibration_pairs(
    asked: Asked,
    num_structures: int,
    labelled: Any,
    held_out: Sequence[Any],
    targets: Any | None = None,
    *,
    volumes: int = 4,
    styles: int = 6,
    seconds: float = math.inf,
    log: Callable[[str], None] = print,
) -> tuple[list[dict[str, Any]], dict[str, Any], list[Pair], dict[str, Any]]:
    """What is usual in training, and pairs of features and Dice of volumes in random styles, from mild to wild.

    No target label is read.

    Args:
        asked: the network.
        labelled: nnU-Net's dataset of labelled cases, whose shapes are what is usual.
        held_out: datasets of labelled cases for the styles, each with the same cases: as they are, and translated.
        targets: dataset of unlabelled target cases seen in training, whose intensities are usual too.
        volumes, styles: how many of ``held_out``, and of styles of each.
        seconds: no further volume is begun after that time.

    Returns:
        Usual shapes, usual scans, the pairs, and what they were made of.
    """
    shapes, scans = [], []
    for case in evenly(labelled.identifiers, SHAPES_OF):
        volume, label, spacing = load(asked, labelled, case, num_structures)
        shapes.append(describe_shapes(label, spacing, num_structures))
        scans.append(describe_scan(volume, spacing))
    known, usual = source_shapes(shapes, num_structures), {"source": known_scans(scans)}
    if targets is not None and targets.identifiers:
        seen = (load(asked, targets, case, num_structures) for case in evenly(targets.identifiers, SHAPES_OF))
        usual["target"] = known_scans([describe_scan(volume, spacing) for volume, _, spacing in seen])
    begin, pairs, used = time.monotonic(), [], []
    chosen = evenly(held_out[0].identifiers, volumes)
    for place, case in enumerate(chosen):
        if time.monotonic() - begin > seconds:
            log(f"Calibration stops after {place} of {len(chosen)} volumes, to take no longer")
            break
        used.append(case)
        for style in range(styles):
            dataset = held_out[style % len(held_out)]
            volume, label, spacing = block(*load(asked, dataset, case, num_structures))
            strength = style / max(1, styles - 1)
            volume, label, spacing = degrade(volume, label, spacing, strength, 1000 * place + style)
            pairs += pairs_of(asked, volume, label, spacing, known, case)
    return known, usual, pairs, {"volumes": used, "styles": styles, "pairs": len(pairs)}


def pairs_of(
    asked: Asked,
    volume: Tensor,
    truth: np.ndarray,
    spacing: Sequence[float],
    known: Sequence[dict[str, Any]],
    name: str,
) -> list[Pair]:
    """Features and true Dice of the structures that the network finds in a volume ``(C, Z, Y, X)``."""
    seen, label, others = asked.look(volume)
    pairs = []
    for value, signals in enumerate(case_signals(label, spacing, known, seen, volume, others), 1):
        if signals["present"]:
            found, real = label == value, truth == value
            dice = 2 * int((found & real).sum()) / int(found.sum() + real.sum())
            pairs.append(Pair(features(signals), dice, name, cap_of(signals)))
    return pairs


def scan_distance(scan: dict[str, Any], usual: dict[str, Any]) -> dict[str, float]:
    """``scan_deviations`` from the nearer domain: a scan like the target scans of training is nothing new."""
    distances = [scan_deviations(scan, known) for known in usual.values()]
    return {key: min(distance[key] for distance in distances) for key in ("intensities", "field")} if distances else {}


def load(asked: Asked, dataset: Any, case: str, num_structures: int) -> tuple[Tensor, np.ndarray, list[float]]:
    """Image ``(C, Z, Y, X)``, label ``(Z, Y, X)`` and mm of each axis of a preprocessed case."""
    with readable(Path(dataset.source_folder, case), "a whole preprocessed case"):
        data, seg, _, properties = dataset.load_case(case)
        volume = torch.from_numpy(np.asarray(data[:], dtype=np.float32))
        return volume, as_label(seg[:], num_structures), asked.spacing(properties)


def block(volume: Tensor, label: np.ndarray, spacing: list[float]) -> tuple[Tensor, np.ndarray, list[float]]:
    """The ``BLOCK`` slices around the middle of the label, of a volume that has more."""
    length = label.shape[0]
    if length <= BLOCK:
        return volume, label, spacing
    held = np.flatnonzero((label > 0).any(axis=(1, 2)))
    middle = int(held.mean()) if len(held) else length // 2
    start = min(max(0, middle - BLOCK // 2), length - BLOCK)
    return volume[:, start : start + BLOCK], label[start : start + BLOCK], spacing


def evenly(items: Sequence[Any], number: int) -> list[Any]:
    """``number`` of ``items`` at most, at equal distances."""
    number = min(number, len(items))
    return [items[index * len(items) // number] for index in range(number)]


def structure_names(dataset_json: dict[str, Any]) -> list[str]:
    """Names of the foreground classes, in the order of their values.

    Raises:
        UDAError: for region-based labels.
    """
    labels = {name: value for name, value in dataset_json["labels"].items() if name != "ignore" and value != 0}
    if not all(isinstance(value, int) for value in labels.values()):
        raise UDAError("the quality estimate needs plain labels, this model's dataset.json has regions")
    return [str(name) for name in sorted(labels, key=labels.__getitem__)]


def read_calibration(path: Path, structures: Sequence[str]) -> Calibration:
    """Read the calibration of a model that finds ``structures``, and try it on a made-up scan.

    Raises:
        UDAError: for a file that is no calibration, a damaged one, or one of other structures.
    """
    remedy = "Remove it: it is made again where that is possible"
    try:
        content = read_json(path)
    except UDAError as error:
        raise UDAError(f"{error}. {remedy}") from error
    found = Calibration.from_json(content, str(path))
    if found.structures != list(structures):
        raise UDAError(
            f"{path} is of the structures {shown(found.structures)}, the model's are {', '.join(structures)}. {remedy}"
        )
    number = len(structures)
    shape = {
        "volume": 1e9, "extent": [10.0] * 3, "touches": [False] * 3, "components": 1, "largest_share": 1.0,
        "roundness": 6.0, "contacts": [1 / (number + 1)] * (number + 1), "place": [0.5] * 3,
    }  # fmt: skip
    try:
        for usual in found.scans.values():
            scan = {"quantiles": [[0.0] * len(LEVELS)] * len(usual["quantiles"]), "field": [100.0] * 3}
            scan_deviations(scan, usual)
        for index, known in enumerate(found.shapes[:number]):
            own = shape_deviations(shape, known) if known["present"] else None
            signals = {"present": True, "agreement": {"darkened": 1.0}, "expected_dice": 1.0, "entropy_inside": 0.0,
                       "edges": 1.0, "deviations": own, **shape}  # fmt: skip
            sure = [estimate_structure(found, index, signals, None)]
            sure += [estimate_structure(found, index, {"present": False}, None)]
            sure += [Estimate(found.value(dict.fromkeys(names, 0.0), kind), *found.around(0.5, kind), "")
                     for kind, names in KINDS.items()]  # fmt: skip
            if not all(math.isfinite(each.low + each.high) for each in sure):
                raise ValueError("NaN")
        if len(found.shapes) != number or not isinstance(found.about["pairs"], int):
            raise ValueError("other structures")
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UDAError(f"{path} is damaged ({type(error).__name__}: {printable(str(error))}). {remedy}") from error
    return found


def uncalibrated(structures: list[str]) -> Calibration:
    """What is known without a single labelled case."""
    shapes = [{"present": 0.0, "cases": 0} for _ in structures]
    return calibrate(structures, shapes, {}, [], {"volumes": [], "styles": 0, "pairs": 0})


# -- estimates ---------------------------------------------------------------------------------------------------------


def quality_of_volume(
    case: str,
    asked: Asked,
    calibration: Calibration,
    volume: Tensor,
    spacing: Sequence[float],
    label: np.ndarray | None = None,
) -> tuple[CaseQuality, np.ndarray]:
    """Estimate a scan's ``(C, Z, Y, X)`` segmentation, ``label`` or else the networks' own; return both."""
    seen, own, others = asked.look(volume)
    label = own if label is None else label
    signals = case_signals(label, spacing, calibration.shapes, seen, volume, others)
    scan = scan_distance(describe_scan(volume, spacing), calibration.scans)
    return quality_of_signals(case, calibration, signals, scan), label


def quality_of_signals(
    case: str, calibration: Calibration, signals: Sequence[dict[str, Any]], scan: dict[str, float]
) -> CaseQuality:
    """Estimate a case from its ``case_signals`` and its ``scan_distance``."""
    names = calibration.structures
    estimates = {name: estimate_structure(calibration, index, signals[index], scan) for index, name in enumerate(names)}
    return CaseQuality(
        case, estimate_case(list(estimates.values())), estimates, dict(zip(names, signals, strict=True)), scan
    )


def quality_of_probabilities(
    case: str,
    calibration: Calibration,
    label: np.ndarray,
    spacing: Sequence[float],
    probabilities: np.ndarray | None = None,
    volume: Tensor | None = None,
) -> CaseQuality:
    """The estimates of a segmentation by any other model: from its shapes, and its probabilities where there are any.

    Args:
        calibration: of a model that was trained for the same structures on the same source.
        label: ``(Z, Y, X)``, structures 1 .. S, its axes those of the model's preprocessed volumes.
        spacing: mm for each axis of ``label``.
        probabilities: ``(S + 1, Z, Y, X)``.
        volume: the image ``(C, Z, Y, X)``, z-scored.
    """
    seen = None if probabilities is None else {"plain": torch.from_numpy(np.asarray(probabilities, dtype=np.float32))}
    signals = case_signals(label, spacing, calibration.shapes, seen, volume)
    scan = {} if volume is None else scan_distance(describe_scan(volume, spacing), calibration.scans)
    return quality_of_signals(case, calibration, signals, scan)
