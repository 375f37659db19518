"""Runs scored against references, and drawn beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_uda.evaluation.metrics import evaluate_case, parallel
from nnunet_uda.evaluation.overlays import MAX_PIXELS, OverlayTask, draw_cases
from nnunet_uda.evaluation.reference_values import Reading, exchanged
from nnunet_uda.evaluation.runs import Labels, Run
from nnunet_uda.evaluation.tables import Volume


@dataclass(frozen=True)
class Evaluation:
    """What is scored.

    Attributes:
        volumes: ``choose_volumes``'s.
        reference: folder of the references.
    """

    runs: Sequence[Run]
    volumes: Sequence[tuple[int | None, str]]
    reference: Path
    labels: Labels
    num_processes: int

    def _files(self, run: Run) -> list[tuple[Path, Path]]:
        """Reference and prediction of each volume."""
        names = [(fold, f"{case}{self.labels.file_ending}") for fold, case in self.volumes]
        return [(self.reference / name, run.folder_of(fold) / name) for fold, name in names]

    def score(self, reading: Reading) -> dict[str, list[Volume]]:
        """Scores of every run's volumes, in the order of ``volumes``."""
        tasks = [
            (*files, self.labels.structures, self.labels.ignore, reading.maps.get(case))
            for run in self.runs
            for files, (_, case) in zip(self._files(run), self.volumes, strict=True)
        ]
        scores = iter(parallel(evaluate_case, tasks, self.num_processes, "Scores"))
        return {run.name: [Volume(case, next(scores), fold) for fold, case in self.volumes] for run in self.runs}

    def exchanged(self, reading: Reading, scores: dict[str, list[Volume]]) -> list[str]:
        """Warnings for runs whose structures would be found under each other's values."""
        found = (
            exchanged(run.name, scores[run.name], self._files(run), self.labels, reading, self.num_processes)
            for run in self.runs
        )
        return [f"WARNING: {warning}" for warning in found if warning]

    def draw(
        self, folder: Path, images: Mapping[str, Path], reading: Reading, plane: str | None, n_slices: int
    ) -> list[dict[str, Any]]:
        """Write the overlays' PNG files to ``folder``; what the page shows of each volume.

        Args:
            images: of each case.
        """
        folder.mkdir()
        tasks = {}
        for fold, case in self.volumes:
            file = f"{case}{self.labels.file_ending}"
            segmentations = {"reference": self.reference / file}
            for run in self.runs:
                title = run.name if run.name not in ("image", "reference") else f"run {run.name}"
                segmentations[title] = run.folder_of(fold) / file
            shown, name = (case, case) if fold is None else (f"{case} (fold {fold})", f"fold_{fold}_{case}")
            tasks[shown] = OverlayTask(
                name, images[case], segmentations, self.labels.structures, folder, n_slices, plane,
                reading.maps.get(case), MAX_PIXELS // len(self.volumes),
            )  # fmt: skip
        return draw_cases(tasks, self.num_processes)
