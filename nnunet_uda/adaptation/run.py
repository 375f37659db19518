"""A model adapted to scans, one by one or once for the folder, with a record from which a second start goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from nnunet_uda.adaptation.folder import LABELLED_ALONG, FolderSettings, adapt_to_folder, known_volumes
from nnunet_uda.adaptation.model import Model, Weights
from nnunet_uda.adaptation.patches import Scan
from nnunet_uda.adaptation.scan import ScanSettings, adapt_to_scan
from nnunet_uda.data.convention import read_json
from nnunet_uda.errors import UDAError
from nnunet_uda.files import is_free, write_json
from nnunet_uda.training.checkpoint import FINAL, read_checkpoint

STATE = "adapt.json"
"""In the output: what was adapted how, and each scan that is finished."""
ESTIMATE_PASSES = 4
"""What an estimate of a scan takes, in passes of a prediction without mirroring, about."""


def open_record(out: Path, described: dict[str, Any]) -> dict[str, Any]:
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
    if not is_free(out):
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


@dataclass
class Adaptation:
    """One call of the command.

    Attributes:
        cases: files of each scan, one a channel.
        state: ``open_record``'s; a scan is noted in it when its prediction is written.
    """

    model: Model
    cases: dict[str, list[Path]]
    out: Path
    state: dict[str, Any]

    def each_scan(self, settings: ScanSettings) -> None:
        """Adapt to each scan anew, and predict it."""
        model, waiting = self.model, self._waiting()
        networks = len(model.weights)
        for number, (case, files) in enumerate(tqdm(waiting.items(), desc="Adapting", unit="scan")):
            volume, mask, properties = model.preprocess(files)
            if number == 0:
                passes = (ESTIMATE_PASSES + model.mirrored_passes) * networks * (1 + settings.runs)
                steps = 2 * networks * settings.runs * settings.steps  # two views
                self._say_time(len(waiting) * model.seconds(volume.shape[1:], passes, steps), len(waiting))
            own = model.logits(volume, model.weights)
            adapted = adapt_to_scan(model, volume, mask, own.argmax(0).numpy(), settings)
            self._finish(case, volume, properties, adapted, own)

    def whole_folder(self, settings: FolderSettings) -> None:
        """Adapt once to all scans, write the model, and predict them.

        Raises:
            UDAError: an earlier start was given other scans.
        """
        model = self.model
        if self.state.setdefault("of", sorted(self.cases)) != sorted(self.cases):
            raise UDAError(
                f"{self.out / STATE} is of other scans than those in -i now: one model is for all. Give a new folder "
                "(-o)"
            )
        waiting = self._waiting()
        if not waiting and all(self._adapted(fold).exists() for fold in model.folds):
            return
        known = known_volumes(model)
        if known is None:
            print("The model's folder does not say how large its structures are (validation/summary.json, "
                  "dataset_fingerprint.json): sizes are not looked at")  # fmt: skip
        with self._preprocessed() as scans:
            views = 2 + min(LABELLED_ALONG, settings.teacher_views)
            passes = len(model.weights) * (model.mirrored_passes + 2 * ESTIMATE_PASSES + views)
            seconds = sum(model.seconds(scan.volume.shape[1:], passes, 0) for scan in scans)
            steps = (1 + settings.teacher_views // 2) * settings.steps * len(model.weights)  # views take a pass each
            self._say_time(seconds + model.seconds(scans[0].volume.shape[1:], 0, steps), len(self.cases))
            weights = self._adapt_folds(scans, settings, known)
            for scan in tqdm(scans, desc="Predicting", unit="scan"):
                if scan.case in waiting:
                    self._finish(scan.case, np.array(scan.volume), scan.properties, weights)

    def _waiting(self) -> dict[str, list[Path]]:
        """Scans that are not predicted yet."""
        left = {
            case: files
            for case, files in self.cases.items()
            if case not in self.state["scans"] or not self._prediction(case).exists()
        }
        if len(left) < len(self.cases):
            print(f"{len(self.cases) - len(left)} of {len(self.cases)} scan(s) are finished already")
        return left

    def _prediction(self, case: str) -> Path:
        return self.out / f"{case}{self.model.dataset_json['file_ending']}"

    def _adapted(self, fold: str) -> Path:
        return self.model.results_folder(self.out) / f"fold_{fold}" / FINAL

    def _say_time(self, seconds: float, scans: int) -> None:
        words = f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} s"
        device = self.model.predictor.device
        print(f"This takes about {words} on {device} for {scans} scan(s), by the time of a step", flush=True)

    def _finish(
        self,
        case: str,
        volume: np.ndarray,
        properties: dict[str, Any],
        weights: Sequence[Weights],
        own: Tensor | None = None,
    ) -> None:
        """Predict a scan by what the estimate prefers, and note it.

        Args:
            weights: the adapted ones.
            own: logits of the unadapted ones, where they are there.
        """
        model = self.model
        before, after = (model.estimate(volume, properties, each) for each in (model.weights, weights))
        adapted = after >= before
        if adapted or own is None:
            own = model.logits(volume, weights if adapted else model.weights)
        model.write_prediction(own, properties, self._prediction(case))
        kept = "adapted" if adapted else "unadapted"
        self.state["scans"][case] = {"before": before, "after": after, "kept": kept}
        write_json(self.state, self.out / STATE)
        tqdm.write(f"{case}: estimated Dice {before:.3f} before, {after:.3f} after: {kept}")

    @contextmanager
    def _preprocessed(self) -> Iterator[list[Scan]]:
        """All scans, in temporary files."""
        with TemporaryDirectory() as name:
            found = []
            for case, files in tqdm(self.cases.items(), desc="Preprocessing", unit="scan"):
                *arrays, properties = self.model.preprocess(files)
                paths = [Path(name, f"{case}.{kind}.npy") for kind in ("volume", "mask")]
                for path, array in zip(paths, arrays, strict=True):
                    np.save(path, array)
                volume, mask = (np.load(path, mmap_mode="r") for path in paths)
                found.append(Scan(case, volume, mask, properties))
            yield found

    def _adapt_folds(self, scans: Sequence[Scan], settings: FolderSettings, known: np.ndarray | None) -> list[Weights]:
        """The weights of each fold, adapted now unless an earlier start has done it."""
        model = self.model
        adapted: list[Weights] = []
        for fold, weights in zip(model.folds, model.weights, strict=True):
            if self._adapted(fold).exists():
                adapted.append(read_checkpoint(self._adapted(fold))["network_weights"])
                continue
            with tqdm(total=settings.steps, desc=f"Fold {fold}", unit="step") as progress:

                def said(step: int, loss: float, progress: Any = progress) -> None:
                    progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    progress.update()

                new = adapt_to_folder(model, weights, scans, known, settings, said)
            model.write_fold(
                self.out, fold, new, {key: self.state[key] for key in ("model", "settings", "checkpoints")}
            )
            write_json(self.state, self.out / STATE)
            adapted.append(new)
        return adapted
