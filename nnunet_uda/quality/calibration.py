r"""From signals to an estimate of Dice with a range, calibrated on source volumes whose Dice is known.

The estimate is :math:`\sigma(b_0 + \sum_i b_i f_i)`: every feature f is made so that more of it is better, and every
b_i is at least 0. So no signal can speak for a segmentation by being bad, not even where calibration has seen nothing
like it. The b_i are fitted on pairs of features and true Dice of source volumes in random styles, and drawn towards
those of ``PRIOR``, of many models, the more so the fewer pairs there are. What a Dice can hardly exceed caps the
estimate: the bound that the volume gives, and the Dice with the segmentation of another fold or checkpoint.

The range is that of calibration's pairs with estimates near this one, each estimated by a fit without its own volume
(a conformal quantile of their residuals).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from nnunet_uda.errors import UDAError

VERSION = 1
SHAPE = ("size", "whole", "roundness", "contacts", "place")
CERTAINTY = ("expected", "certain")
VIEWS = ("agreement", "least")
FEATURES = (*VIEWS, *CERTAINTY, *SHAPE, "edges")
KINDS = {"views": FEATURES, "probabilities": (*CERTAINTY, *SHAPE, "edges"), "segmentation": SHAPE}
"""By what is at hand, from most to least: the features that an estimate uses."""
GOOD, FAILED = 0.7, 0.5
COVERAGE = 0.9
SHRINKAGE = 8.0
"""Pairs that the prior counts as."""
NEAR = 24
"""Pairs whose residuals make a range, at least."""

PRIOR: dict[str, dict[str, float]] = {
    "views": {
        "constant": -0.74, "agreement": 0.22, "least": 0.46, "expected": 0.16, "certain": 0.35, "size": 0.21,
        "whole": 0.17, "roundness": 0.05, "contacts": 0.1, "place": 0.2, "edges": 0.31,
    },
    "probabilities": {
        "constant": -0.44, "expected": 0.79, "certain": 0.41, "size": 0.2, "whole": 0.3, "roundness": 0.05,
        "contacts": 0.1, "place": 0.2, "edges": 0.52,
    },
    "segmentation": {
        "constant": -0.8, "size": 0.56, "whole": 0.89, "roundness": 0.05, "contacts": 0.1, "place": 0.2,
    },
}  # fmt: skip
"""Fitted together on source volumes in random styles of models of hearts, spinal cords and brains (docs/quality.md), no
target label among them; those of roundness and contacts came out as 0 and are held above it."""


def features(signals: Mapping[str, Any]) -> dict[str, float]:
    """Features of a present structure, more is better, from ``case_signals``.

    What the signals do not hold is left out. Where the source knows no shape of the structure, its shape counts as
    usual. How far a scan's intensities lie from training's is no feature: all target scans' do, and what comes of it is
    for the others to say.
    """
    found: dict[str, float] = {}
    if signals.get("agreement"):
        dices = list(signals["agreement"].values())
        found |= {"agreement": _logit(float(np.mean(dices))), "least": _logit(min(dices))}
    if "expected_dice" in signals:
        found |= {"expected": _logit(signals["expected_dice"]), "certain": -4 * signals["entropy_inside"]}
    shape = signals.get("deviations") or {}
    found |= {
        "size": _logit(shape.get("size_bound", 1.0)),
        "whole": -4 * shape.get("pieces", 0.0),
        "roundness": -_over(shape.get("roundness", 0.0)),
        "contacts": -4 * shape.get("contacts", 0.0),
        "place": -_over(shape.get("place", 0.0)),
    }
    if "edges" in signals:
        found["edges"] = math.log2(min(max(signals["edges"], 0.25), 4.0))
    return found


def _logit(value: float) -> float:
    return float(logit(min(max(value, 0.02), 0.98)))


def _over(units: float) -> float:
    """0 within two spreads, growing slowly beyond."""
    return math.log1p(max(0.0, units - 2))


def kind_of(found: Mapping[str, float]) -> str:
    """The best of ``KINDS`` that the features allow."""
    return next(kind for kind, names in KINDS.items() if all(name in found for name in names))


@dataclass(frozen=True)
class Pair:
    """Features of one structure of one calibration volume, its true Dice, and the volume that it is of."""

    features: dict[str, float]
    dice: float
    volume: str
    cap: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """What is to be expected of one structure of a case, or of a case as a whole.

    Attributes:
        dice: the estimate; NaN where the structure is absent and the source's labels lack it at times, too.
        low, high: its range, which holds nine of ten in calibration.
        verdict: ``good``, ``look at it`` or ``failed``.
        reasons: in words, the weightiest first.
    """

    dice: float
    low: float
    high: float
    verdict: str
    reasons: list[str] = field(default_factory=list)


@dataclass
class Calibration:
    """What ``quality.json`` beside a model holds.

    Attributes:
        structures: names, in the order of their values.
        shapes: ``source_shapes``; scans: ``known_scans``.
        weights: of each of ``KINDS``, ``constant`` and one a feature.
        residuals: of each of ``KINDS``: ``[estimate, true Dice]`` of every pair, estimated without its own volume.
        about: how it was made, for the reader.
    """

    structures: list[str]
    shapes: list[dict[str, Any]]
    scans: dict[str, Any]
    weights: dict[str, dict[str, float]]
    residuals: dict[str, list[list[float]]]
    about: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: Any, where: str) -> Calibration:
        """The calibration that a file holds.

        Raises:
            UDAError: for a file that is no calibration, or one of another version.
        """
        names = cls.__dataclass_fields__
        if not isinstance(content, dict) or content.get("version") != VERSION or not set(names) <= set(content):
            version = content.get("version") if isinstance(content, dict) else type(content).__name__
            raise UDAError(
                f"{where} is no calibration that this version reads (version {version!r}, expected {VERSION}): remove "
                "it, and nnUNetUDA_quality makes it again from the source's preprocessed cases"
            )
        return cls(**{name: content[name] for name in names})

    def value(self, found: Mapping[str, float], kind: str, cap: float = 1.0) -> float:
        """The estimate of Dice for features of a kind, at most ``cap``."""
        return min(_value(self.weights[kind], found, KINDS[kind]), cap)

    def around(self, estimate: float, kind: str) -> tuple[float, float]:
        """Lowest and highest Dice to expect at an estimate, by the pairs nearest to it; 0 to 1 where there is none."""
        return interval(np.array(self.residuals[kind], dtype=float).reshape(-1, 2), estimate)


def interval(residuals: np.ndarray, estimate: float) -> tuple[float, float]:
    """The conformal range at ``estimate`` of pairs ``(N, 2)`` of estimate and truth."""
    if not len(residuals):
        return 0.0, 1.0
    number = min(len(residuals), max(NEAR, len(residuals) // 3))
    nearest = np.argsort(np.abs(residuals[:, 0] - estimate), kind="stable")[:number]
    errors = np.sort(residuals[nearest, 1] - residuals[nearest, 0])
    outside = (1 - COVERAGE) / 2
    rank = math.floor((number + 1) * outside)
    low = errors[rank - 1] if rank >= 1 else -1.0
    high = errors[number - rank] if rank >= 1 else 1.0
    return float(np.clip(estimate + min(low, 0), 0, 1)), float(np.clip(estimate + max(high, 0), 0, 1))


def _value(weights: Mapping[str, float], found: Mapping[str, float], names: Sequence[str]) -> float:
    return float(expit(weights["constant"] + sum(weights[name] * found[name] for name in names)))


def fit_weights(pairs: Sequence[Pair], kind: str, prior: Mapping[str, float] | None = None,
                shrinkage: float = SHRINKAGE) -> dict[str, float]:  # fmt: skip
    """The weights of a kind that fit the pairs, drawn towards ``prior`` (``PRIOR``'s of the kind)."""
    names = ["constant", *KINDS[kind]]
    prior = PRIOR[kind] if prior is None else prior
    start = np.array([prior[name] for name in names])
    if not pairs:
        return dict(zip(names, start.tolist(), strict=True))
    matrix = np.array([[1.0, *(pair.features[name] for name in KINDS[kind])] for pair in pairs])
    truth = np.array([pair.dice for pair in pairs])
    caps = np.array([pair.cap for pair in pairs])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value = expit(matrix @ weights)
        error = np.minimum(value, caps) - truth
        slope = np.where(value < caps, value * (1 - value), 0.0)
        pull = weights - start
        # a Dice's error of 0.1 weighs as much as a weight's of 0.5
        total = (error**2).sum() + shrinkage * 0.04 * (pull**2).sum()
        return total, 2 * (matrix.T @ (error * slope) + shrinkage * 0.04 * pull)

    bounds = [(None, None)] + [(0.0, None)] * (len(names) - 1)
    found = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B").x
    return {name: round(float(weight), 5) for name, weight in zip(names, found, strict=True)}


def calibrate(
    structures: list[str],
    shapes: list[dict[str, Any]],
    scans: dict[str, Any],
    pairs: Sequence[Pair],
    about: dict[str, Any],
) -> Calibration:
    """Fit every kind on ``pairs``; ranges come from fits that leave out a volume at a time."""
    weights: dict[str, Any] = {}
    residuals: dict[str, list[list[float]]] = {}
    for kind, names in KINDS.items():
        usable = [pair for pair in pairs if all(name in pair.features for name in names)]
        weights[kind] = fit_weights(usable, kind)
        residuals[kind] = []
        for volume in sorted({pair.volume for pair in usable}):
            without = fit_weights([pair for pair in usable if pair.volume != volume], kind)
            for pair in usable:
                if pair.volume == volume:
                    value = min(_value(without, pair.features, names), pair.cap)
                    residuals[kind].append([round(value, 4), round(pair.dice, 4)])
    return Calibration(structures, shapes, scans, weights, residuals, about)


def cap_of(signals: Mapping[str, Any]) -> float:
    """What the Dice of a structure can hardly exceed: the bound of its volume, and other models' agreement."""
    bound = (signals.get("deviations") or {}).get("size_bound", 1.0)
    return min([bound, *signals.get("others", {}).values()])


def verdict_of(dice: float, low: float) -> str:
    """``good`` where the estimate is high and even its range's lower end is no failure."""
    if dice < FAILED:
        return "failed"
    return "good" if dice >= GOOD and low >= FAILED else "look at it"  # NaN, too


def estimate_structure(
    calibration: Calibration, index: int, signals: Mapping[str, Any], scan: Mapping[str, float] | None
) -> Estimate:
    """The estimate of the ``index``-th structure from its ``case_signals`` and the case's ``scan_deviations``."""
    name, known = calibration.structures[index], calibration.shapes[index]
    if not signals["present"]:
        if known["present"] == 1.0:
            text = f"no {name} was found, and all {known['cases']} labels of the source have it"
            return Estimate(0.0, 0.0, 0.0, "failed", [text])
        text = f"no {name} was found"
        if known["cases"]:
            text += f"; {known['present']:.0%} of the source's labels have it"
        return Estimate(math.nan, 0.0, 1.0, "look at it", [text])
    found = features(signals)
    kind = kind_of(found)
    dice = calibration.value(found, kind, cap_of(signals))
    low, high = calibration.around(dice, kind)
    return Estimate(dice, low, high, verdict_of(dice, low), reasons(calibration, index, signals, scan))


def estimate_case(structures: Sequence[Estimate]) -> Estimate:
    """A case: the mean of its structures' Dice and ranges, and the worst of their verdicts."""
    known = [each for each in structures if not math.isnan(each.dice)]
    order = ("failed", "look at it", "good")
    verdict = min((each.verdict for each in structures), key=order.index)
    if not known:
        return Estimate(math.nan, 0.0, 1.0, verdict)
    dice, low, high = (float(np.mean([getattr(each, part) for each in known])) for part in ("dice", "low", "high"))
    return Estimate(dice, low, high, verdict)


def reasons(
    calibration: Calibration, index: int, signals: Mapping[str, Any], scan: Mapping[str, float] | None
) -> list[str]:
    """Say what speaks against a structure, the weightiest reason first, or that nothing does."""
    known = calibration.shapes[index]
    found: list[tuple[float, str]] = []
    agreement = signals.get("agreement") or {}
    if agreement and (least := min(agreement.values())) < 0.8:
        view = min(agreement, key=agreement.__getitem__)
        found.append(
            (1 - least, f"the same scan {VIEW_WORDS[view]} is segmented otherwise (Dice {least:.2f} with this)")
        )
    for other, dice in (signals.get("others") or {}).items():
        if dice < 0.8:
            found.append((1 - dice, f"{other.replace('_', ' ')} segments it otherwise (Dice {dice:.2f} with this)"))
    if signals.get("entropy_inside", 0.0) > 0.2:
        found.append((signals["entropy_inside"], f"uncertain inside (entropy {signals['entropy_inside']:.2f} of 1)"))
    shape = signals.get("deviations")
    if shape is not None:
        found += _shape_reasons(signals, shape, known)
    if signals.get("edges", 2.0) < 1.1:
        found.append((0.3, "its contour follows no edge of the image"))
    for key, what in (("intensities", "intensities"), ("field", "field of view")):
        units = (scan or {}).get(key, 0.0)
        if units > 4:
            found.append((0.1, f"the scan's {what} lie {units:.0f} spreads from those of the training"))
    words = [text for _, text in sorted(found, key=lambda item: -item[0])]
    if words:
        return words
    agreeing = [f"views agree (Dice {np.mean(list(agreement.values())):.2f})"] if agreement else []
    usual = "nothing is known of its shape" if shape is None else "volume and shape are as in the source's labels"
    return [", ".join([*agreeing, usual])]


VIEW_WORDS = {"mirrored": "mirrored", "darkened": "darkened", "restyled": "in another style", "smaller": "made smaller"}


def _shape_reasons(
    signals: Mapping[str, Any], shape: Mapping[str, float], known: Mapping[str, Any]
) -> list[tuple[float, str]]:
    found = []
    if shape["size_bound"] < 0.95:
        low, high = (volume / 1000 for volume in known["volume_range"])
        way = "large" if shape["size"] > 0 else "small"
        text = f"too {way}: {signals['volume'] / 1000:.3g} ml, the source's labels have {low:.3g} to {high:.3g} ml"
        if any(known["open"]):
            text = f"too {way} in cross-section ({abs(shape['size']):.0f} spreads from the source's labels)"
        found.append((2 * (1 - shape["size_bound"]), text))
    if shape["pieces"] > 0.05:
        text = f"in {signals['components']} pieces, the source's labels in at most {known['components']}"
        if signals["components"] <= known["components"]:
            text = f"only {signals['largest_share']:.0%} of it are one piece"
        found.append((2 * shape["pieces"], text))
    for key, what in (("roundness", "surface beside its volume"), ("place", "place in the field of view")):
        if shape[key] > 4:
            found.append((0.3, f"unusual {what} ({shape[key]:.0f} spreads from the source's labels)"))
    if shape["contacts"] > 0.1:
        found.append((2 * shape["contacts"], f"unusual neighbours ({shape['contacts']:.0%} of its surface)"))
    return found
