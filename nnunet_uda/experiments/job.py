"""One training, its predictions of the target's test images, and their scores; each part is done once.

``python -m nnunet_uda.experiments.job JOB.json`` does what is missing of a job, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_uda.data.convention import (
    SPLITS_TARGET,
    TARGET_FOLDER,
    case_files,
    environment_folder,
    json_or_none,
    mend_results,
    read_json,
)
from nnunet_uda.data.fold_images import lay_out_fold
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.metrics import METRICS, evaluate_folder, list_cases
from nnunet_uda.evaluation.prediction import predict_folder
from nnunet_uda.evaluation.report import jsonable
from nnunet_uda.evaluation.runs import Labels, cases_of_folds, read_labels
from nnunet_uda.evaluation.tables import Volume
from nnunet_uda.files import exclusive, whole_folder, write_json
from nnunet_uda.methods import find_any_trainer, let_find
from nnunet_uda.training.checkpoint import FINAL, read_checkpoint
from nnunet_uda.training.fold import COST
from nnunet_uda.training.interruption import wait_for_fold
from nnunet_uda.training.model_choice import running_means
from nnunet_uda.workers import end_with_starter, tied

TRANSDUCTIVE = (
    "Transductive: this dataset has no target test images (imagesTs), so the runs are tested on target images that "
    "training saw, without their labels."
)


@dataclass(frozen=True)
class TargetTest:
    """The target's test cases.

    Attributes:
        fold: that of ``splits_target.json`` whose ``val`` they are, else None.
        transductive: they lie in ``imagesTu``, so that training sees the images (never their labels), and not in
            ``imagesTs``.
    """

    cases: list[str]
    reference: Path
    labels: Labels
    fold: int | None
    transductive: bool = False

    @property
    def images(self) -> str:
        """The raw dataset's folder that holds their images."""
        return TARGET_FOLDER if self.transductive or self.fold is not None else "imagesTs"


@dataclass(frozen=True)
class Score:
    """What the tables show of one run.

    Attributes:
        volumes: scores of each test case.
        pseudo_dice: the last epoch's validation pseudo Dice.
        seconds: sum over epochs of their duration.
        memory: peak resident memory of the training process in GiB, NaN where ``nnUNetUDA_train`` did not train it.
        device_memory: peak memory allocated on a CUDA device in GiB, NaN without one.
        criteria: the running means of the criteria without labels after the last epoch, which ``checkpoint_best``
            follows; those that training measured.
    """

    volumes: list[Volume]
    pseudo_dice: float
    seconds: float = math.nan
    memory: float = math.nan
    device_memory: float = math.nan
    criteria: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def parse(content: dict[str, Any]) -> Score:
        """Read what ``Job.measure`` writes."""
        volumes = [Volume(case, {s: {m: _nan(value) for m, value in scores.items()} for s, scores in by.items()})
                   for case, by in content["metrics"].items()]  # fmt: skip
        pseudo_dice, seconds, memory, device_memory = (
            _nan(content.get(name))
            for name in ("validation_pseudo_dice", "training_seconds", "peak_memory_gib", "peak_device_memory_gib")
        )
        criteria = {name: _nan(value) for name, value in content.get("criteria", {}).items()}
        return Score(volumes, pseudo_dice, seconds, memory, device_memory, criteria)


@dataclass(frozen=True)
class Job:
    """A training and its test.

    Attributes:
        name: unique in its output folder.
        folder: where log, predictions and scores go.
        images: the target's test images.
    """

    name: str
    folder: Path
    dataset: str
    configuration: str
    fold: str
    trainer: str
    plans: str
    test: TargetTest
    images: Path
    device: str
    num_processes: int

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def trained(self) -> Path:
        """nnU-Net's folder of the fold."""
        from nnunetv2.utilities.file_path_utilities import get_output_folder

        return Path(get_output_folder(self.dataset, self.trainer, self.plans, self.configuration, self.fold))

    def write(self) -> Path:
        """The job as a file for ``main``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "job.json"
        write_json(jsonable(dataclasses.asdict(self)), path)
        return path

    @staticmethod
    def read(path: Path) -> Job:
        content = read_json(path)
        test = content.pop("test")
        labels = Labels(**test.pop("labels"))
        test = TargetTest(**test | {"reference": Path(test["reference"]), "labels": labels})
        return Job(**content | {"folder": Path(content["folder"]), "images": Path(content["images"]), "test": test})

    def finish(self) -> None:
        """Train, predict and score what is missing.

        Raises:
            UDAError: if training fails or predictions cannot be scored.
        """
        checkpoint = self.trained / FINAL
        with exclusive(self.trained):
            wait_for_fold(self.trained)
            if not checkpoint.exists():
                more = ["--c"] if (self.trained / "checkpoint_latest.pth").exists() else []
                self.call("nnUNetUDA_train", self.dataset, self.configuration, self.fold, "-tr", self.trainer,
                          "-p", self.plans, "-device", self.device, *more)  # fmt: skip
        if not self.predicted():
            origin = {"checkpoint": _stamp(checkpoint)}
            preprocessed = environment_folder("nnUNet_preprocessed") / self.dataset
            described = (read_json(preprocessed / name) for name in (f"{self.plans}.json", "dataset.json"))
            mend_results(self.trained.parent, *described)
            with whole_folder(self.folder / "predictions") as output:
                self.predict(output)
                write_json(origin, output / "made_from.json")
        if self.score() is None:
            self.measure(checkpoint)

    def call(self, *words: str) -> None:
        """Run a command whose output goes to this process's own, the log.

        SIGTERM is passed on, and its end waited for: SLURM kills what a job's first process leaves behind.
        """
        print(f"$ {shlex.join(words)}", flush=True)
        scripts = str(Path(sys.executable).parent)
        environment = tied({**os.environ, "PATH": os.pathsep.join([scripts, os.environ["PATH"]])})
        process = subprocess.Popen(words, env=environment)
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            status = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
        if status in (128 + signal.SIGTERM, -signal.SIGTERM):
            raise UDAError(f"{words[0]} was asked to end (SIGTERM); a new start goes on from its last checkpoint")
        if status != 0:
            raise UDAError(f"{words[0]} ended with status {status}")

    def predict(self, output: Path) -> None:
        """As ``nnUNetv2_predict`` with ``checkpoint_final.pth``, in this process."""
        import torch

        print(f"[{time.ctime()}] predicting {len(self.test.cases)} test case(s) with {self.trained}", flush=True)
        predict_folder(self.trained.parent, (self.fold,), self.images, output, torch.device(self.device))

    def predicted(self) -> bool:
        """Whether the present checkpoint has predicted every test case."""
        checkpoint, predictions = self.trained / FINAL, self.folder / "predictions"
        if not checkpoint.exists():
            return False
        files = (predictions / f"{case}{self.test.labels.file_ending}" for case in self.test.cases)
        made_from = json_or_none(predictions / "made_from.json")
        return made_from == {"checkpoint": _stamp(checkpoint)} and all(file.exists() for file in files)

    def _origin(self) -> dict[str, Any]:
        reference, ending = self.test.reference, self.test.labels.file_ending
        references = {case: _stamp(reference / f"{case}{ending}") for case in self.test.cases}
        return {"checkpoint": _stamp(self.trained / FINAL), "references": references}

    def score(self) -> Score | None:
        """The scores, if they are those of the present checkpoint, predictions and references."""
        content = json_or_none(self.folder / "score.json") if self.predicted() else None
        if not isinstance(content, dict) or content.get("made_from") != self._origin():
            return None
        try:
            score = Score.parse(content)
        except (AttributeError, KeyError, TypeError, ValueError):  # no other program writes this file: it is made again
            return None
        whole = sorted(volume.case for volume in score.volumes) == sorted(self.test.cases) and all(
            set(METRICS) <= set(volume.metrics.get(structure, ()))
            for volume in score.volumes
            for structure in self.test.labels.structures
        )
        return score if whole else None

    def measure(self, checkpoint: Path) -> None:
        """Write ``score.json``."""
        labels = self.test.labels
        metrics = evaluate_folder(
            self.test.reference, self.folder / "predictions", labels.structures, labels.file_ending, self.test.cases,
            labels.ignore, self.num_processes,
        )  # fmt: skip
        content = read_checkpoint(checkpoint)
        logging, history = content["logging"], content.get("uda", {}).get("criteria", {})
        times = zip(logging["epoch_start_timestamps"], logging["epoch_end_timestamps"], strict=True)
        cost = json_or_none(self.trained / COST)
        content = {
            "made_from": self._origin(),
            "validation_pseudo_dice": float(logging["mean_fg_dice"][-1]),
            "training_seconds": float(sum(end - start for start, end in times)),
            **(cost if isinstance(cost, dict) else {}),
            "criteria": {name: running_means(name, values)[-1] for name, values in history.items() if values},
            "metrics": metrics,
        }
        write_json(jsonable(content), self.folder / "score.json")


def find_target_test(raw: Path, fold: str) -> TargetTest:
    """The target's test cases: those of ``imagesTs``, or in a fold protocol the fold's ``val``.

    Without either the test is transductive: the target's training images that have a reference.

    Raises:
        UDAError: no test image, or test images and references that do not belong together.
    """
    labels = read_labels(raw / "dataset.json")
    images, reference, splits = raw / "imagesTs", raw / "labelsTs", raw / SPLITS_TARGET
    cases, test_fold = sorted(case_files(images, labels.file_ending)), None
    references = set(list_cases(reference, labels.file_ending)) if reference.is_dir() or cases else set()
    transductive = not cases and not splits.exists() and bool(references)
    if transductive:
        cases = sorted(references & set(case_files(raw / TARGET_FOLDER, labels.file_ending)))
    elif not cases:
        if not splits.exists() or fold == "all":
            raise UDAError(f"{images} holds no image, and fold {fold} has no test images in {splits} either: target "
                           "images are needed that the runs are not trained on, and their labels")  # fmt: skip
        test_fold = int(fold)
        cases = cases_of_folds(splits, [test_fold])[test_fold]
    missing, extra = sorted(set(cases) - references), sorted(references - set(cases))
    if missing:
        raise UDAError(f"no reference in {reference} for the test case(s) {', '.join(missing[:10])}: add it")
    if extra and test_fold is None:
        folder = raw / TARGET_FOLDER if transductive else images
        raise UDAError(f"no image in {folder} for the reference(s) {', '.join(extra[:10])}: none is left out silently")
    return TargetTest(cases, reference, labels, test_fold, transductive)


def lay_out_images(raw: Path, test: TargetTest, folder: Path) -> Path:
    """Return the folder of the test images; in a fold protocol, fill ``folder`` with exactly the fold's."""
    if test.fold is None:
        return raw / test.images
    if sorted(case_files(folder, test.labels.file_ending)) != test.cases:  # else jobs may be reading them
        shutil.rmtree(folder, ignore_errors=True)
        lay_out_fold(raw, test.fold, folder)
    return folder


def find_trainer(name: str) -> type[Any]:
    """The trainer class, found as ``nnUNetv2_train`` will find it.

    Raises:
        UDAError: no such trainer, or one that does not read the settings in the plans.
    """
    from nnunet_uda.training.uda_trainer import UDATrainer

    trainer = find_any_trainer(name)
    if not issubclass(trainer, UDATrainer):
        raise UDAError(f"-tr {name}: it does not read the settings under 'uda' in the plans, so none can be varied")
    return trainer


def last_error(log: Path, start: int, otherwise: str) -> str:
    """The last line of a log from byte ``start`` that names an error, else its last line, else ``otherwise``."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"ERROR:|[\w.]*(Error|Exception)\b", line)]
    causes = [line for line in errors if not re.match(r"ERROR: \S+ ended with status", line)]
    return (causes or errors or lines or [otherwise])[-1]


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


@command
def main(argv: list[str] | None = None) -> None:
    end_with_starter()
    [path] = sys.argv[1:] if argv is None else argv
    job = Job.read(Path(path))
    with open(job.log, "ab", buffering=0) as log:  # also what C code and child processes say
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    let_find()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        import torch

        torch.set_num_threads(int(threads))
    job.finish()


if __name__ == "__main__":
    main()
