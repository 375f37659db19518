"""The page of ``nnUNetUDA_compare``: that of ``nnUNetUDA_evaluate``, with methods in place of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_uda.evaluation.overlays import OverlayTask, draw_cases
from nnunet_uda.evaluation.report import summary_tables, write_html
from nnunet_uda.evaluation.runs import Labels
from nnunet_uda.evaluation.tables import Volume, compare_runs, spread

SLICES = 5
NOTE = (
    "Each volume's scores are means over the runs (seeds, folds) of a method that hold it; deviations and tests are "
    "over volumes. The slices show the first of these runs. These are test scores: no setting, method or checkpoint is "
    "to be chosen by them without saying so."
)


@dataclass(frozen=True)
class MethodRuns:
    """One method's results on a test: the volumes of each finished run, and one prediction of each case."""

    runs: Sequence[Sequence[Volume]]
    predictions: Mapping[str, Path]


def pool_runs(runs: Sequence[Sequence[Volume]]) -> dict[str, Volume]:
    """Average the runs: one ``Volume`` for each case, with the mean of the defined scores (NaN without any)."""
    found: dict[str, list[Volume]] = {}
    for run in runs:
        for volume in run:
            found.setdefault(volume.case, []).append(volume)
    return {
        case: Volume(
            case,
            {
                structure: {name: spread([v.metrics[structure][name] for v in volumes]).mean for name in scores}
                for structure, scores in volumes[0].metrics.items()
            },
        )
        for case, volumes in found.items()
    }


def write_compare_page(
    path: Path,
    test: str,
    methods: Mapping[str, MethodRuns],
    bounds: tuple[str, str],
    images: Mapping[str, Path],
    reference: Path,
    labels: Labels,
    num_processes: int,
) -> bool:
    """Write the page of one test, and its chosen slices as pictures into ``NAME_overlays`` beside it.

    Args:
        methods: by their labels in the tables; those without a finished run are left out.
        bounds: labels of the lower and the upper bound, which may be missing.
        images: of every case.
        reference: folder of references.

    Returns:
        Whether there was a case that every method has.
    """
    pooled = {label: pool_runs(method.runs) for label, method in methods.items() if method.runs}
    cases = [case for case in next(iter(pooled.values()), {}) if all(case in volumes for volumes in pooled.values())]
    if not cases:
        return False
    scores = {label: [volumes[case] for case in cases] for label, volumes in pooled.items()}
    lower, upper = bounds if all(bound in scores for bound in bounds) else (None, None)
    comparison = compare_runs(scores, lower, upper)
    folder = path.with_name(f"{path.stem}_overlays")
    folder.mkdir(exist_ok=True)
    tasks = {}
    for case in cases:
        segmentations = {"reference": reference / f"{case}{labels.file_ending}"}
        segmentations |= {label: methods[label].predictions[case] for label in scores}
        tasks[case] = OverlayTask(case, images[case], segmentations, labels.structures, folder, SLICES)
    overlays = draw_cases(tasks, num_processes)
    runs = dict.fromkeys(scores, "")
    setup = {"dataset": test, "reference": reference, "runs": runs, "scored_folds": None, "notes": [NOTE]}
    note = (
        f"The chosen slices ({SLICES} of a volume at most) lie as pictures in {folder.name}, and are printed of the "
        "volume that is shown."
    )
    write_html(path, setup, scores, summary_tables(scores, comparison), overlays, labels.structures, note)
    return True
