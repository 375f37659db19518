"""``nnUNetUDA_sweep``: train at several values of settings, and show how the target's scores depend on them."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_uda.commands import fold_images
from nnunet_uda.commands.configure import parse_assignment
from nnunet_uda.commands.trainers import trainers_folder
from nnunet_uda.data.convention import SPLITS_TARGET, case_files, environment_folder, read_json
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.metrics import METRICS, evaluate_folder, list_cases
from nnunet_uda.evaluation.report import DIGITS, jsonable, markdown_table
from nnunet_uda.evaluation.runs import Labels, cases_of_folds, find_raw_dataset, read_labels
from nnunet_uda.evaluation.sweep_plot import OverSeeds, Point, draw_sweeps, over_seeds
from nnunet_uda.evaluation.tables import MEAN, Volume, summarise
from nnunet_uda.files import exclusive, whole_file, write_json
from nnunet_uda.plans import check_uda, derive_plans, merge_uda
from nnunet_uda.settings import UDASettings, parse_settings, split_settings

SWEEP = "sweep.json"
WARNING = (
    "Dice and ASSD here are measured with the labels of the target's test cases. Do not choose a setting by them: the "
    "result would no longer be unsupervised, and its score on these cases no longer a test."
)
PSEUDO_DICE = (
    "Validation pseudo Dice needs no target label: it is what training itself sees in its last epoch, on source "
    "validation patches as the trainer shows them to the segmenter (translated, where it translates). A setting may be "
    "chosen by it; it is an estimate, and need not follow the target's Dice."
)
CELLS = (
    "Every run's figure is the mean over structures and then over test cases, as in nnUNetUDA_evaluate. Cells: mean ± "
    "sample standard deviation over seeds; n: seeds. ASSD is undefined, and missing from its mean, where exactly one "
    "of prediction and reference is empty: such distances are counted beside it."
)


@dataclass(frozen=True)
class Run:
    """Plans of their own name, the settings' differences from the sweep's plans, and the seed."""

    name: str
    plans: dict[str, Any]
    seed: int | None


@dataclass(frozen=True)
class Value:
    """One value of a swept setting and the names of its runs, one a seed."""

    value: Any
    text: str
    in_plans: bool
    runs: list[str]


class TargetTest(NamedTuple):
    """The target's test cases; ``fold`` is that of ``splits_target.json``, or None where they lie in ``imagesTs``."""

    cases: list[str]
    reference: Path
    labels: Labels
    fold: int | None


@dataclass(frozen=True)
class Score:
    """What the tables show of one run: scores of each test case, and the last epoch's validation pseudo Dice."""

    volumes: list[Volume]
    pseudo_dice: float


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_sweep",
        description="Train a trainer at several values of settings, predict the target's test images, and write "
        "sweep.csv, sweep.md and sweep.png. Each -vary is a sweep of its own: all other settings are as in the plans "
        "-p. Runs with the same settings are trained once. The same command again goes on where it stopped. "
        f"{WARNING} {PSEUDO_DICE}",
        epilog="Example: nnUNetUDA_sweep -d 501 -c 2d -f 0 -tr SimilarityPrototypesTrainer -p nnUNetPlansShort -vary "
        "similarity_prototypes.confidence 0.7 0.75 0.8 0.85 0.9 0.95 -vary similarity_prototypes.dictionary_size 200 "
        "400 600 -seeds 0 1 2 -o sweep",
    )
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument("-p", required=True, help="plans with all settings that do not vary (nnUNetUDA_configure)")
    parser.add_argument("-tr", required=True, help="trainer")
    parser.add_argument("-c", default="2d", help="configuration [2d]")
    parser.add_argument("-f", default="0", help="fold; where imagesTs is empty, its 'val' in splits_target.json is "
                        "the test [0]")  # fmt: skip
    parser.add_argument("-vary", nargs="+", action="append", required=True, metavar=("NAME", "VALUE"),
                        help="a setting and its values; see nnUNetUDA_configure --list")  # fmt: skip
    parser.add_argument("-seeds", nargs="+", type=int, help="train every setting with each seed [that of the plans]")
    parser.add_argument("-o", type=Path, required=True, help="output folder: new, empty, or of the same sweep before")
    parser.add_argument("-device", default="cuda", help="device of training and prediction: cpu, cuda or mps [cuda]")
    parser.add_argument("-np", type=int, default=min(8, os.cpu_count() or 1), help="processes that score predictions "
                        "[%(default)s]")  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.f != "all" and not arguments.f.isdigit():
        raise UDAError(f"-f takes a fold's number or 'all', found {arguments.f!r}")
    for name in (words[0] for words in arguments.vary if len(words) == 1):
        raise UDAError(f"-vary {name} has no value: give NAME VALUE [VALUE ...]")
    seeds = arguments.seeds or []
    if len(set(seeds)) != len(seeds):
        raise UDAError(f"-seeds: a seed is given twice in {seeds}; the same seed gives the same run")
    return arguments


# --- what to train ---------------------------------------------------------------------------------------------------


def find_trainer(name: str) -> type:
    """The trainer class, found as ``nnUNetv2_train`` will find it.

    Raises:
        UDAError: no such trainer, or one that does not read the settings in the plans.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_uda.training.uda_trainer import UDATrainer

    os.environ.setdefault("nnUNet_extTrainer", str(trainers_folder()))
    try:
        trainer = recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise UDAError(f"-tr {name}: {error}") from error
    if not issubclass(trainer, UDATrainer):
        raise UDAError(f"-tr {name}: it does not read the settings under 'uda' in the plans, so none can be varied")
    return trainer


def settings_in_force(trainer: type, uda: dict[str, Any], where: str) -> dict[str, Any]:
    """All settings that ``trainer`` reads, defaults included, by their names in ``-vary``."""
    shared, own = split_settings(uda, trainer.method, where)
    settings = dataclasses.asdict(parse_settings(UDASettings, shared, where))
    if trainer.method_settings is not None:
        where = f"{where}.{trainer.method}"
        parsed = dataclasses.asdict(parse_settings(trainer.method_settings, own | trainer.fixed_settings, where))
        settings |= {f"{trainer.method}.{name}": value for name, value in parsed.items()}
    return settings


def value_text(value: Any) -> str:
    """A value for tables and names: 1.0 and 1 are the same."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def plan_runs(
    base: dict[str, Any], name: str, configuration: str, trainer: type, vary: list[list[str]], seeds: list[int] | None
) -> tuple[dict[str, list[Value]], dict[str, Run]]:
    """The values of every sweep, by setting, and the runs that they need, by name and in the order of training.

    A run's plans state only what differs from ``base``, so that equal settings are one run, in every sweep.

    Raises:
        UDAError: for everything ``nnUNetUDA_configure`` refuses, a setting that the trainer does not read or fixes,
            a setting or a value given twice.
    """
    uda = base.get("uda", {})
    check_uda(uda, f"plans {name!r}, key 'uda'")
    before = settings_in_force(trainer, uda, f"plans {name!r}, key 'uda'")
    sweeps: dict[str, list[Value]] = {}
    for setting, *texts in vary:
        method, _, key = setting.rpartition(".")
        if setting in sweeps:
            raise UDAError(f"-vary {setting} is given twice: put all its values behind one -vary")
        if setting == "seed":
            raise UDAError("-vary seed: give the seeds with -seeds")
        if method not in ("", trainer.method):
            raise UDAError(f"-vary {setting}: {trainer.__name__} does not read it. Its settings: {', '.join(before)}")
        if method and key in trainer.fixed_settings:
            raise UDAError(f"-vary {setting}: {trainer.__name__} fixes it to {trainer.fixed_settings[key]}")
        sweeps[setting] = values = []
        for text in texts:
            where = f"-vary {setting} {text}"
            changed = merge_uda(uda, dict([parse_assignment(f"{setting}={text}")]))
            check_uda(changed, where)
            value = settings_in_force(trainer, changed, where)[setting]
            if value in [other.value for other in values]:
                raise UDAError(f"{where}: this value is given twice")
            values.append(Value(value, value_text(value), value == before[setting], []))

    runs: dict[str, Run] = {}
    for seed in seeds if seeds is not None else [before["seed"]]:
        for setting, values in sweeps.items():
            for value in values:
                changes = {} if value.in_plans else {setting: value.value}
                parts = [name, *(f"{key.rpartition('.')[2]}_{_safe(value.text)}" for key in changes)]
                if seed is not None:
                    parts.append(f"seed_{seed}")
                elif not changes:
                    parts.append("unchanged")
                if seed != before["seed"]:
                    changes["seed"] = seed
                run_name = "_".join(parts)
                run = Run(run_name, derive_plans(base, configuration, run_name, merge_uda(uda, changes)), seed)
                if runs.setdefault(run_name, run) != run:
                    raise UDAError(f"-vary {setting}: two runs would both be called {run_name}; leave one value out")
                value.runs.append(run_name)
    return sweeps, runs


def _safe(text: str) -> str:
    """For a file's name: not too long, and without ``_``, since nnU-Net splits names at ``__``."""
    if len(text) > 60:
        text = f"{text[:50]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return re.sub(r"[^A-Za-z0-9.+-]", "-", text)


def find_target_test(raw: Path, fold: str) -> TargetTest:
    """The target's test cases: those of ``imagesTs``, or in a fold protocol the fold's ``val``.

    Raises:
        UDAError: no test image, or test images and references that do not belong together.
    """
    labels = read_labels(raw / "dataset.json")
    images, reference, splits = raw / "imagesTs", raw / "labelsTs", raw / SPLITS_TARGET
    cases, test_fold = sorted(case_files(images, labels.file_ending)), None
    if not cases:
        if not splits.exists() or fold == "all":
            raise UDAError(f"{images} holds no image, and fold {fold} has no test images in {splits} either: a sweep "
                           "needs target images that the runs are not trained on, and their labels")  # fmt: skip
        test_fold = int(fold)
        cases = cases_of_folds(splits, [test_fold])[test_fold]
    references = set(list_cases(reference, labels.file_ending))
    missing, extra = sorted(set(cases) - references), sorted(references - set(cases))
    if missing:
        raise UDAError(f"no reference in {reference} for the test case(s) {', '.join(missing[:10])}: add it")
    if extra and test_fold is None:
        raise UDAError(f"no image in {images} for the reference(s) {', '.join(extra[:10])}: none is left out silently")
    return TargetTest(cases, reference, labels, test_fold)


def check_ground(runs: dict[str, Run], out: Path, setup: dict[str, Any]) -> None:
    """Refuse to go on from anything that was made otherwise, before anything is written or trained.

    Raises:
        UDAError: a foreign output folder, images not preprocessed, plans or results of a run's name with other content.
    """
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    if out.exists() and not out.is_dir():
        raise UDAError(f"{out} is a file: give a folder with -o")
    if (out / SWEEP).exists():
        former = read_json(out / SWEEP)
        if former != setup:
            raise UDAError(f"{out} holds a sweep of {former}, this one is of {setup}: give another folder with -o")
    elif out.exists() and any(path.name != ".lock" for path in out.iterdir()):
        raise UDAError(f"{out} is not empty and holds no former sweep ({SWEEP}): give another folder with -o")
    preprocessed = environment_folder("nnUNet_preprocessed") / setup["dataset"]
    identifier = next(iter(runs.values())).plans["configurations"][setup["configuration"]]["data_identifier"]
    if not (preprocessed / identifier).is_dir():
        raise UDAError(f"{preprocessed / identifier} does not exist. First: nnUNetv2_preprocess -d {setup['dataset']} "
                       f"-plans_name {setup['plans']} -c {setup['configuration']}")  # fmt: skip
    for run in runs.values():
        results = get_output_folder(setup["dataset"], setup["trainer"], run.name, setup["configuration"])
        for path in (preprocessed / f"{run.name}.json", Path(results, "plans.json")):
            if path.exists() and read_json(path) != run.plans:
                raise UDAError(
                    f"{path} exists, and differs from what {setup['plans']} now gives: those plans have changed, or "
                    "the name was taken. Sweep plans of another name, or remove that file and the results trained by it"
                )


# --- training, predicting, scoring -----------------------------------------------------------------------------------


class Sweeper:
    """Brings runs to their scores, each from where it stands."""

    def __init__(self, setup: dict[str, Any], out: Path, test: TargetTest, device: str, num_processes: int) -> None:
        self.setup, self.out, self.test, self.device, self.num_processes = setup, out, test, device, num_processes
        self.images = environment_folder("nnUNet_raw") / setup["dataset"] / "imagesTs"
        scripts = str(Path(sys.executable).parent)
        self.environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ["PATH"]])}

    def lay_out_images(self) -> None:
        """In a fold protocol: exactly the fold's test images, in a folder of their own."""
        if self.test.fold is not None:
            self.images = self.out / "images"
            shutil.rmtree(self.images, ignore_errors=True)
            fold_images.main(["-d", self.setup["dataset"], "-f", str(self.test.fold), "-o", str(self.images)])

    def finish(self, run: Run) -> Score:
        """Train, predict and score what is missing.

        Raises:
            UDAError: if a command fails or predictions cannot be scored.
        """
        from nnunetv2.utilities.file_path_utilities import get_output_folder

        setup, folder = self.setup, self.out / "runs" / run.name
        folder.mkdir(parents=True, exist_ok=True)
        trained = Path(
            get_output_folder(setup["dataset"], setup["trainer"], run.name, setup["configuration"], setup["fold"])
        )
        checkpoint = trained / "checkpoint_final.pth"
        shared = ("-tr", setup["trainer"], "-p", run.name, "-device", self.device)
        with exclusive(trained):
            if not checkpoint.exists():
                more = ["--c"] if (trained / "checkpoint_latest.pth").exists() else []
                self.call(folder, "nnUNetv2_train", setup["dataset"], setup["configuration"], setup["fold"], *shared,
                          *more)  # fmt: skip
        predictions, origin = folder / "predictions", {"checkpoint": _stamp(checkpoint)}
        if not self.is_whole(predictions, origin):
            partial = folder / "predictions.partial"
            for stale in (partial, predictions):
                shutil.rmtree(stale, ignore_errors=True)
            self.call(folder, "nnUNetv2_predict", "-i", str(self.images), "-o", str(partial), "-d", setup["dataset"],
                      "-c", setup["configuration"], "-f", setup["fold"], *shared, "-npp", "0", "-nps", "0",
                      "--disable_progress_bar")  # fmt: skip
            write_json(origin, partial / "made_from.json")
            partial.rename(predictions)
        return self.score(folder / "score.json", predictions, checkpoint, origin)

    def is_whole(self, predictions: Path, origin: dict[str, Any]) -> bool:
        """Whether every case is there and comes from the present checkpoint."""
        if not (predictions / "made_from.json").exists() or read_json(predictions / "made_from.json") != origin:
            return False
        return all((predictions / f"{case}{self.test.labels.file_ending}").exists() for case in self.test.cases)

    def score(self, path: Path, predictions: Path, checkpoint: Path, origin: dict[str, Any]) -> Score:
        """The run's scores, kept in ``path`` until checkpoint or references change."""
        import torch

        cases, reference, labels, _ = self.test
        references = {case: _stamp(reference / f"{case}{labels.file_ending}") for case in cases}
        origin = origin | {"references": references}
        content = read_json(path) if path.exists() else {}
        if content.get("made_from") != origin:
            metrics = evaluate_folder(
                reference, predictions, labels.structures, labels.file_ending, cases, labels.ignore, self.num_processes
            )
            logging = torch.load(checkpoint, map_location="cpu", weights_only=False)["logging"]
            pseudo_dice = float(logging["mean_fg_dice"][-1])
            content = jsonable({"made_from": origin, "validation_pseudo_dice": pseudo_dice, "metrics": metrics})
            write_json(content, path)
        volumes = [Volume(case, {s: {m: _nan(value) for m, value in scores.items()} for s, scores in by.items()})
                   for case, by in content["metrics"].items()]  # fmt: skip
        return Score(volumes, _nan(content["validation_pseudo_dice"]))

    def call(self, folder: Path, *words: str) -> None:
        """Run a command, with its output at the end of the run's log."""
        log = folder / "log.txt"
        with open(log, "a+", encoding="utf-8", errors="replace") as file:
            file.write(f"$ {shlex.join(words)}\n")
            file.flush()
            start = file.tell()
            done = subprocess.run(words, env=self.environment, stdout=file, stderr=subprocess.STDOUT, check=False)
            file.seek(start)
            lines = [line.strip() for line in file if line.strip()]
        if done.returncode != 0:
            errors = [line for line in lines if re.match(r"ERROR:|[\w.]*(Error|Exception)\b", line)]
            last = (errors or lines or ["it said nothing"])[-1]
            raise UDAError(f"{words[0]} ended with status {done.returncode} (log: {log}): {last}")


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


# --- tables ----------------------------------------------------------------------------------------------------------


def collect_points(values: list[Value], scores: dict[str, Score]) -> list[Point]:
    """A sweep's values with means and deviations over the seeds whose runs have finished."""
    points = []
    for value in values:
        done = [scores[name] for name in value.runs if name in scores]
        means = [summarise(score.volumes)[MEAN] for score in done]
        dice, assd = (over_seeds([mean[metric]["mean"] for mean in means]) for metric in ("Dice", "ASSD"))
        undefined = sum(mean["ASSD"]["n_undefined"] for mean in means)
        pseudo_dice = over_seeds([score.pseudo_dice for score in done])
        points.append(Point(value.value, value.text, dice, assd, pseudo_dice, undefined))
    return points


def _cell(cell: OverSeeds, metric: str, n_expected: int, undefined: int = 0) -> str:
    if not cell.n:
        text = "–"
    else:
        text = f"{cell.mean:.{DIGITS[metric]}f}"
        text += "" if math.isnan(cell.std) else f" ± {cell.std:.{DIGITS[metric]}f}"
    remarks = [f"n = {cell.n}"] if cell.n != n_expected else []
    remarks += [f"{undefined} undefined"] if undefined else []
    return text + (f" ({', '.join(remarks)})" if remarks else "")


def sweep_table(setting: str, values: list[Value], points: list[Point], scores: dict[str, Score]) -> dict[str, Any]:
    """One sweep as a table for ``markdown_table``."""
    rows = []
    for value, point in zip(values, points, strict=True):
        n = sum(name in scores for name in value.runs)
        rows.append(
            [
                value.text + (" (as in the plans)" if value.in_plans else ""),
                _cell(point.dice, "Dice", n),
                _cell(point.assd, "ASSD", n, point.undefined),
                _cell(point.pseudo_dice, "Dice", n),
                str(n) if n == len(value.runs) else f"{n} of {len(value.runs)}",
            ]
        )
    header = ["value", "target Dice", "target ASSD (mm)", "validation pseudo Dice", "n"]
    return {"caption": setting, "header": header, "rows": rows}


def write_tables(
    out: Path,
    setup: dict[str, Any],
    test: TargetTest,
    sweeps: dict[str, list[Value]],
    runs: dict[str, Run],
    scores: dict[str, Score],
    failed: dict[str, str],
) -> dict[str, list[Point]]:
    """Write ``sweep.md`` (a table a sweep) and ``sweep.csv`` (a row a run); return the points of every sweep."""
    points = {setting: collect_points(values, scores) for setting, values in sweeps.items()}
    where = "imagesTs" if test.fold is None else f"fold {test.fold} of {SPLITS_TARGET}"
    blocks = [
        f"# {setup['trainer']} on {setup['dataset']}: sweep",
        f"Plans {setup['plans']}, configuration {setup['configuration']}, fold {setup['fold']}; {len(test.cases)} "
        f"target test case(s), {where}; structures: {', '.join(test.labels.structures)}.",
        f"**{WARNING}**",
        PSEUDO_DICE,
        *(markdown_table(sweep_table(setting, sweeps[setting], points[setting], scores)) for setting in sweeps),
        CELLS,
    ]
    missing = [f"- {name}: {failed.get(name, 'not finished yet')}" for name in runs if name not in scores]
    if missing:
        blocks.append("\n".join(["**Runs that are missing from these tables**", "", *missing]))
    with whole_file(out / "sweep.md") as temporary:
        temporary.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")

    with whole_file(out / "sweep.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        rows_of = {"": MEAN} | {f"_{structure}": structure for structure in test.labels.structures}
        columns = [(f"{short}{suffix}", row, metric) for suffix, row in rows_of.items()
                   for short, metric in zip(("dice", "assd_mm", "hd95_mm"), METRICS, strict=True)]  # fmt: skip
        writer.writerow(["setting", "value", "seed", "plans", "validation_pseudo_dice", *(c[0] for c in columns),
                         "distances_undefined"])  # fmt: skip
        for setting, value, name in _rows(sweeps):
            cells: list[Any] = [""] * (len(columns) + 2)
            if name in scores:
                summary = summarise(scores[name].volumes)
                numbers = [scores[name].pseudo_dice, *(summary[row][metric]["mean"] for _, row, metric in columns)]
                cells = ["" if math.isnan(number) else repr(number) for number in numbers]
                cells.append(summary[MEAN]["ASSD"]["n_undefined"])
            seed = runs[name].seed
            writer.writerow([setting, value.text, "" if seed is None else seed, name, *cells])
    return points


def _rows(sweeps: dict[str, list[Value]]) -> Iterator[tuple[str, Value, str]]:
    return ((setting, value, name) for setting, values in sweeps.items() for value in values for name in value.runs)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises ``SystemExit``, so that the command under way ends too: a new start would not be alone with it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    environment_folder("nnUNet_results")
    raw = find_raw_dataset(arguments.d)
    path = environment_folder("nnUNet_preprocessed") / raw.name / f"{arguments.p}.json"
    if not path.exists():
        raise UDAError(f"{path} does not exist: make the plans {arguments.p} first, with nnUNetUDA_configure")
    base = read_json(path)
    trainer = find_trainer(arguments.tr)
    sweeps, runs = plan_runs(base, arguments.p, arguments.c, trainer, arguments.vary, arguments.seeds)
    test = find_target_test(raw, arguments.f)
    setup = {"dataset": raw.name, "configuration": arguments.c, "fold": arguments.f, "trainer": arguments.tr,
             "plans": arguments.p}  # fmt: skip
    out = arguments.o.resolve()
    check_ground(runs, out, setup)

    scores: dict[str, Score] = {}
    failed: dict[str, str] = {}
    with exclusive(out), _ended_by_sigterm():
        write_json(setup, out / SWEEP)
        for run in runs.values():
            write_json(run.plans, path.with_name(f"{run.name}.json"))
        sweeper = Sweeper(setup, out, test, arguments.device, arguments.np)
        sweeper.lay_out_images()
        for number, run in enumerate(runs.values(), 1):
            print(f"[{number}/{len(runs)}] {run.name} (log: {out / 'runs' / run.name / 'log.txt'})", flush=True)
            try:
                scores[run.name] = sweeper.finish(run)
            except UDAError as error:
                failed[run.name] = str(error)
                print(f"FAILED: {error}", flush=True)
            points = write_tables(out, setup, test, sweeps, runs, scores, failed)
        title = f"{arguments.tr} on {raw.name}, plans {arguments.p}, fold {arguments.f}"
        seeds = len(next(iter(sweeps.values()))[0].runs)
        bars = f" Error bars: sample standard deviation over {seeds} seeds." if seeds > 1 else ""
        draw_sweeps(out / "sweep.png", points, title, WARNING + bars)
    print((out / "sweep.md").read_text(encoding="utf-8"))
    print(f"Written to {out}: sweep.md, sweep.csv, sweep.png")
    if failed:
        listed = "".join(f"\n  {name}: {text}" for name, text in failed.items())
        raise UDAError(
            f"{len(failed)} of {len(runs)} runs failed; the same command tries them again, and only them:{listed}"
        )


if __name__ == "__main__":
    main()
