"""What the values in reference files mean: the dataset's classes, or the values of the files that were converted.

``nnUNetUDA_convert`` numbers structures as they are named (``-labels liver=2 spleen=1`` makes liver 1) and keeps the
mapping in ``dataset.json``. References that still hold the former values are read through it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.optimize import linear_sum_assignment

from nnunet_uda.data.convention import LABEL_VALUES, OTHER_LABEL_VALUES
from nnunet_uda.errors import UDAError, shown
from nnunet_uda.evaluation.metrics import integer_values, parallel, read_reference
from nnunet_uda.evaluation.runs import Labels
from nnunet_uda.evaluation.tables import Volume, summarise
from nnunet_uda.images.listing import files_in
from nnunet_uda.images.reading import LabelMap, parse_labels

NEAR_ZERO, MATCH = 0.1, 0.5
"""Dice below which a structure is not found, and from which another one is found in its place."""
MOST_COMPARED = 10
"""Labelled cases of the dataset whose volumes are looked at."""


@dataclass(frozen=True)
class Reading:
    """How the references are read.

    Attributes:
        maps: of each case whose values are not the dataset's classes.
        notes: what is to be said about it.
    """

    maps: dict[str, LabelMap]
    notes: list[str]


def describe(values: LabelMap) -> str:
    """Structures with their values, as in ``liver 2, spleen 1``."""
    texts: dict[str, list[str]] = {}
    for value in sorted(values.values):
        texts.setdefault(values.names.get(value, "background"), []).append(str(value))
    texts.pop("background", None)
    return ", ".join(f"{name} {' and '.join(listed)}" for name, listed in texts.items())


def option(values: LabelMap, names: Sequence[str]) -> str:
    """``-labels`` for these values."""
    by_name = {name: [str(v) for v in sorted(values.values) if values.names.get(v) == name] for name in names}
    return "-labels " + " ".join(f"{name}={','.join(listed)}" for name, listed in by_name.items() if listed)


def dataset_values(labels: Labels) -> LabelMap:
    """The dataset's own classes, as a map."""
    own = {value: value for value in labels.structures.values()}
    if labels.ignore is not None:
        own[labels.ignore] = labels.ignore
    return LabelMap(own, names={value: name for name, value in labels.structures.items()})


def named_values(words: Sequence[str], labels: Labels) -> LabelMap:
    """What the references' values mean, from the option ``-labels``.

    Raises:
        UDAError: a structure that the dataset lacks, or one without a value.
    """
    given = parse_labels(words)
    unlike = sorted(set(given) ^ set(labels.structures))
    if unlike:
        raise UDAError(
            f"-labels {' '.join(words)}: expected a value for each structure of the dataset and no other: "
            f"{', '.join(labels.structures)}. Of one alone: {', '.join(unlike)}"
        )
    return _make(given, labels, False)


def recorded_values(dataset_json: dict[str, Any], labels: Labels, where: Path | str) -> LabelMap | None:
    """The mapping that the conversion kept, that of the target's label files if there is one; None without any.

    Raises:
        UDAError: for a mapping of another form, or of other structures than ``labels``.
    """
    uda = dataset_json.get("uda")
    place = uda if isinstance(uda, dict) and LABEL_VALUES in uda else dataset_json
    if LABEL_VALUES not in place:
        return None
    by_domain = place[LABEL_VALUES]
    target = str(uda.get("target_domain")) if isinstance(uda, dict) else None
    if not isinstance(by_domain, dict) or not by_domain:
        raise UDAError(
            f"{where}: '{LABEL_VALUES}' must hold the values of each domain's label files, found {shown(by_domain)}"
        )
    values = by_domain[target] if target in by_domain else next(iter(by_domain.values()))
    known = {"background", *labels.structures}
    if not isinstance(values, dict) or not all(
        name in known and isinstance(listed, list) and all(_is_value(v) for v in listed)
        for name, listed in values.items()
    ):
        raise UDAError(
            f"{where}: '{LABEL_VALUES}' must hold lists of whole numbers for {', '.join(labels.structures)} and "
            f"background, found {shown(values)}. Correct it, remove it, or use -labels"
        )
    return _make(values, labels, place.get(OTHER_LABEL_VALUES) == "background")


def _is_value(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 999999


def _make(by_name: Mapping[str, Sequence[int]], labels: Labels, others: bool) -> LabelMap:
    classes = {"background": 0, **labels.structures}
    if max(classes.values()) > 254:
        raise UDAError(f"the dataset's classes reach {max(classes.values())}; references are mapped to 254 at most")
    values = {value: classes[name] for name, listed in by_name.items() for value in listed}
    names = {value: name for name, listed in by_name.items() for value in listed}
    if labels.ignore is not None and labels.ignore <= 254:
        values.setdefault(labels.ignore, labels.ignore)
    advice = "Say what the values mean with nnUNetUDA_evaluate -labels NAME=VALUE ..., or correct the file."
    return LabelMap(values, others, names, advice)


# --- which of both the files hold -------------------------------------------------------------------------------------


def read_by(
    label_map: LabelMap, labels: Labels, cases: Sequence[str], reference: Path, raw: Path | None, num_processes: int
) -> Reading:
    """Decide over all files whether they hold the dataset's classes or the values that ``label_map`` maps to them.

    Args:
        label_map: ``recorded_values``.
        cases: files of ``reference`` to look at.
        raw: the raw dataset, whose own labels tell where the values alone do not.

    Raises:
        UDAError: a file whose values fit neither, or files of both kinds beside one that fits both.
    """
    own = dataset_values(labels)
    if not label_map.ignore_other and all(own.values.get(value) == index for value, index in label_map.values.items()):
        return Reading({}, [])
    files = {case: reference / f"{case}{labels.file_ending}" for case in cases}
    found = dict(zip(files, parallel(integer_values, [(path,) for path in files.values()], num_processes, "Values"),
                     strict=True))  # fmt: skip
    mapped: list[str] = []
    original: list[str] = []
    both: list[str] = []
    for case, values in found.items():
        as_classes = all(value in own.values or value == 0 for value in values)
        as_values = label_map.ignore_other or all(value in label_map.values or value == 0 for value in values)
        if not as_classes and not as_values:
            raise UDAError(
                f"{files[case]} holds the values {', '.join(map(str, values[:20]))}; expected 0 and the dataset's "
                f"classes ({describe(own)}), or 0 and the values of the files that were converted "
                f"({describe(label_map)}). {label_map.hint}"
            )
        if as_classes and as_values and all(label_map.values.get(value, 0) == value for value in values):
            continue  # both readings are the same
        (both if as_classes and as_values else mapped if as_classes else original).append(case)
    meaning = f"({describe(label_map)}) and are read as the dataset's classes ({describe(own)})"
    if both and mapped and original:
        raise UDAError(
            f"{files[original[0]]} holds the values of the files that were converted ({describe(label_map)}), "
            f"{files[mapped[0]]} the dataset's classes ({describe(own)}), and {files[both[0]]} may hold either. "
            f"Evaluate files of one kind at a time"
        )
    if not original and not both:
        return Reading({}, [])
    if original:
        which = "The references hold" if not mapped else f"{len(original)} of {len(cases)} references hold"
        return Reading({case: label_map for case in (*original, *both)},
                       [f"{which} the values of the files that were converted {meaning}."])  # fmt: skip
    if mapped:
        return Reading({}, [])
    as_own, why = _decide(label_map, labels, both, files, raw)
    chosen, other = (own, label_map) if as_own else (label_map, own)
    kind = "the dataset's classes" if as_own else "the values of the files that were converted"
    note = (
        f"The references' values fit both the dataset's classes ({describe(own)}) and the values of the files that "
        f"were converted ({describe(label_map)}). They are read as {kind}, because {why}. If that is wrong: "
        f"{option(other, list(labels.structures))}; to say that it is right: {option(chosen, list(labels.structures))}."
    )
    return Reading({} if as_own else dict.fromkeys(both, label_map), [note])


def _decide(
    label_map: LabelMap, labels: Labels, cases: Sequence[str], files: dict[str, Path], raw: Path | None
) -> tuple[bool, str]:
    """Whether files that fit both hold the dataset's classes, and why. No prediction is looked at."""
    default = False, "files given with -r are most often those that were converted"
    if raw is None:
        return default
    if Path(os.path.realpath(raw)) in Path(os.path.realpath(files[cases[0]].parent)).parents:
        return True, "they lie in the dataset's own folder"
    for case in cases:
        for folder in ("labelsTs", "labelsTr"):
            twin = raw / folder / files[case].name
            if not twin.is_file():
                continue
            theirs, mine = (sitk.GetArrayFromImage(read_reference(path)) for path in (twin, files[case]))
            if theirs.shape == mine.shape and (theirs == mine).all():
                return True, f"{files[case].name} is equal to the dataset's in {folder}"
            classes = label_map.apply(read_reference(files[case]), files[case])
            if theirs.shape == classes.shape and (theirs == classes).all():
                return False, f"so read, {files[case].name} is equal to the dataset's in {folder}"
    return _by_volume(label_map, labels, [files[case] for case in cases], raw) or default


def _by_volume(label_map: LabelMap, labels: Labels, files: Sequence[Path], raw: Path) -> tuple[bool, str] | None:
    """Decide by the structures' volumes in the dataset's labelled cases; None where these do not tell."""
    listed = files_in(raw / "labelsTr") if (raw / "labelsTr").is_dir() else []
    known = _mean_volumes([path for path in listed if path.name.endswith(labels.file_ending)], None, labels)
    differences = []
    for one_map in (None, label_map):
        volumes = _mean_volumes(files, one_map, labels)
        compared = [abs(np.log(volumes[name] / known[name])) for name in volumes if volumes[name] and known.get(name)]
        differences.append(float(np.mean(compared)) if compared else np.inf)
    if not np.isfinite(differences).all() or abs(differences[0] - differences[1]) < np.log(1.1):
        return None
    return differences[0] < differences[1], "their volumes are then nearer to those in labelsTr"


def _mean_volumes(files: Sequence[Path], label_map: LabelMap | None, labels: Labels) -> dict[str, float]:
    """Mean volume of each structure in cubic mm over some of the files."""
    number = min(MOST_COMPARED, len(files))
    volumes: dict[str, list[float]] = {name: [] for name in labels.structures}
    for path in (files[i * len(files) // number] for i in range(number)):
        image = read_reference(path, label_map)
        array = sitk.GetArrayViewFromImage(image)
        for name, value in labels.structures.items():
            volumes[name].append(float((array == value).sum() * np.prod(image.GetSpacing())))
    return {name: float(np.mean(listed)) if listed else 0.0 for name, listed in volumes.items()}


# --- structures that were exchanged -----------------------------------------------------------------------------------


def overlaps(reference: Path, prediction: Path, values: Sequence[int], label_map: LabelMap | None) -> np.ndarray:
    """``(n, n)`` Dice of each structure of a reference (rows) with each of its prediction (columns); NaN if both are
    empty."""
    mine = sitk.GetArrayFromImage(read_reference(reference, label_map))
    theirs = sitk.GetArrayFromImage(read_reference(prediction))
    dice = np.full((len(values), len(values)), np.nan)
    for row, value in enumerate(values):
        mask = mine == value
        for column, other in enumerate(values):
            found = theirs == other
            if total := int(mask.sum()) + int(found.sum()):
                dice[row, column] = 2 * int((mask & found).sum()) / total
    return dice


def exchanged(
    run: str, volumes: Sequence[Volume], files: Sequence[tuple[Path, Path]], labels: Labels, reading: Reading,
    num_processes: int,
) -> str | None:  # fmt: skip
    """Warn where structures of a run are found only in each other's place, as if their values were exchanged.

    Args:
        volumes: scores of the run.
        files: reference and prediction of each volume.
    """
    means = summarise(volumes)
    lost = [name for name in labels.structures if means[name]["Dice"]["mean"] < NEAR_ZERO]
    if len(lost) < 2:
        return None
    values = [labels.structures[name] for name in lost]
    tasks = [
        (reference, prediction, values, reading.maps.get(volume.case))
        for volume, (reference, prediction) in zip(volumes, files, strict=True)
    ]
    stack = np.array(parallel(overlaps, tasks, num_processes, "Looking for exchanged structures"))
    counts = (~np.isnan(stack)).sum(axis=0)
    dice = np.nansum(stack, axis=0) / np.maximum(counts, 1)
    rows, columns = linear_sum_assignment(dice, maximize=True)
    pairs = [(r, c) for r, c in zip(rows, columns, strict=True) if r != c and dice[r, c] >= MATCH]
    if len(pairs) < 2:
        return None
    told = [f"{lost[r]} of the references is {lost[c]} of the predictions (Dice {dice[r, c]:.2f})" for r, c in pairs]
    return (
        f"Run {run}: {', '.join(lost)} have a Dice below {NEAR_ZERO} each, but are found in each other's place: "
        f"{'; '.join(told)}. The values of references and predictions seem to mean different structures. Say what the "
        "references' values mean with -labels NAME=VALUE ..., or find out which of both is wrong"
    )
