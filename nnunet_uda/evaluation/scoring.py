"""Runs scored against references, drawn beside them, and written as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_uda.evaluation.metrics import evaluate_case, parallel
from nnunet_uda.evaluation.output import REPORT, whole_folder
from nnunet_uda.evaluation.overlays import OverlayTask, draw_cases
from nnunet_uda.evaluation.reference_values import Reading, exchanged
from nnunet_uda.evaluation.report import (
    markdown_table,
    summary_markdown,
    summary_tables,
    volume_table,
    write_csv,
    write_html,
    write_scores,
)
from nnunet_uda.evaluation.runs import Labels, Run
from nnunet_uda.evaluation.tables import Volume, compare_runs
from nnunet_uda.files import write_text


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
        """Warn of runs whose structures seem to have each other's values."""
        found = (
            exchanged(run.name, scores[run.name], self._files(run), self.labels, reading, self.num_processes)
            for run in self.runs
        )
        return [f"WARNING: {warning}" for warning in found if warning]

    def draw(
        self, folder: Path, images: Mapping[str, Path], reading: Reading, plane: str | None, n_slices: int
    ) -> list[dict[str, Any]]:
        """Write the overlays' PNG files to ``folder``; return what the page shows of each volume.

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
                reading.maps.get(case),
            )  # fmt: skip
        return draw_cases(tasks, self.num_processes)

    def write(
        self,
        out: Path,
        reading: Reading,
        lower: str | None,
        upper: str | None,
        about: Mapping[str, Any],
        images: Mapping[str, Path],
        note: str,
        *,
        n_slices: int,
        plane: str | None = None,
    ) -> str:
        """Score the runs and write the report into ``out``, whole or not at all; return the tables as Markdown.

        Args:
            lower, upper: the runs that are bounds, if any.
            about: name of the dataset, and the folds scored.
            images: of each case, for the overlays; empty: none is drawn.
            note: on the overlays.
        """
        with whole_folder(out) as folder:
            scores = self.score(reading)
            comparison = compare_runs(scores, lower, upper)
            setup = {
                **about,
                "reference": str(self.reference),
                "runs": {run.name: run.folder for run in self.runs},
                "structures": self.labels.structures,
                "notes": [*reading.notes, *self.exchanged(reading, scores)],
            }
            overlays = self.draw(folder / "overlays", images, reading, plane, n_slices) if images else []
            tables = summary_tables(scores, comparison)
            text = summary_markdown(setup, tables)
            write_scores(folder / REPORT, setup, scores, comparison)
            write_csv(folder / "evaluation.csv", scores)
            write_text(f"{text}\n{markdown_table(volume_table(scores))}\n", folder / "evaluation.md")
            write_html(folder / "evaluation.html", setup, scores, tables, overlays, self.labels.structures, note)
        return text
