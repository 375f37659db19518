"""Every trainer on every task: tasks made, networks trained and tested, one table and one plot.

    python benchmarks/table.py -o FOLDER -data $NNUNET_UDA_TEST_DATA -jobs 2 -device cpu

Makes the tasks (``tasks.py``), writes plans with one schedule for all trainers, and starts ``nnUNetUDA_compare`` for
each group of tasks and each seed; the phantom has the seeds of ``-seeds``, everything else one. In 3D
(``phantom_3d`` and the others that end so) a step takes several times as long, so the networks are half as wide and the
schedule half as long, a quarter on the brains. ``phantom_long`` gives CAST more steps, ``phantom_3d_long`` CAST, the
prototypes and the bounds in 3D; ``phantom_styles``, ``brain_styles`` and ``totalseg_styles`` give RandomStyle,
whose step is the cheapest, about CISFA's time. Then table.md, table.csv and table.png in FOLDER. The same command goes
on where it was stopped; ``--only_table`` puts together what is finished, at any time. Each run keeps a checkpoint of
every epoch, which is what ``criteria.py`` needs.

table.json in FOLDER records every finished run with the scores of each test case. ``-with RECORDED.json`` adds the
runs of such a file, which another machine may have written, to the tables, and trains what is not in it. A run that
FOLDER holds itself counts instead of its record. So the next machine goes on where this one was left:

    python benchmarks/table.py -o FOLDER -with docs/all_trainers.json -groups vs totalseg -device cpu
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from criteria import correlation
from tasks import TASKS, Task, add_data_argument, make_task

from nnunet_uda.commands.compare import (
    LOWER,
    RULES,
    UPPER,
    Cells,
    Method,
    Row,
    bars,
    dice_of,
    summarise_methods,
    test_tables,
    write_runs,
)
from nnunet_uda.commands.demo import Demo
from nnunet_uda.commands.evaluate_unsupervised import COLUMNS
from nnunet_uda.data.convention import read_json
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.compare_plot import draw_comparison
from nnunet_uda.evaluation.report import DIGITS, jsonable, markdown_table
from nnunet_uda.evaluation.runs import Labels
from nnunet_uda.experiments.job import Job, Score, TargetTest
from nnunet_uda.files import whole_file, write_json

LOWER_TRAINER, UPPER_TRAINER = "SourceOnlyTrainer", "SupervisedTrainer"
TRAINERS = ("RandomStyleTrainer", "CUTTrainer", "EntMinTrainer", "ADVENTTrainer", "CISFATrainer",
            "SimilarityPrototypesTrainer", "UUDSAdversarialTrainer", "CASTTrainer")  # fmt: skip
FLAT = ("UUDSTrainer", "UUDSAdversarialTrainer")
"""2D only."""
CLIP = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@dataclass(frozen=True)
class Group:
    """Tasks that are compared at once, with one schedule.

    Attributes:
        tasks: names in ``TASKS``.
        iterations: of each of the 6 epochs.
        configuration: nnU-Net's.
        patch: its patch, in voxels.
        width: the segmenter's and the generators' first channels.
        plans: name of the plans to be written.
        trainers: of those between the bounds; others that the command names always are.
        every_seed: whether it has all seeds, or the first one.
        bounds: whether it has its own; not where it gives a trainer another schedule than the group without suffix.
        suffix: of the tasks' names in the table.
    """

    tasks: tuple[str, ...]
    iterations: int = 50
    configuration: str = "2d"
    patch: tuple[int, ...] = (64, 64)
    width: int = 16
    plans: str = "nnUNetPlansTable"
    trainers: tuple[str, ...] = TRAINERS
    every_seed: bool = False
    bounds: bool = True
    suffix: str = ""

    @property
    def tests(self) -> list[str]:
        """The tasks' names in the table."""
        return [name + self.suffix for name in self.tasks]

    def among(self, trainers: Sequence[str]) -> list[str]:
        """Those of ``trainers`` that this group has."""
        return [name for name in trainers if name in self.trainers or name not in TRAINERS]


PHANTOMS, BRAINS = ("phantom_mr2ct", "phantom_ct2mr"), ("brain_t12t2", "brain_t22t1")
PAIR = ("totalseg", "totalseg_back")
DEEP = tuple(name for name in TRAINERS if name not in FLAT)
THIN, CUBE = (16, 48, 48), (32, 32, 32)
"""Patches in 3D: where slices are few or thick, and where voxels are cubes."""


def deep(tasks: tuple[str, ...], iterations: int, **changes: Any) -> Group:
    """Tasks in 3D."""
    usual = {"patch": THIN, "plans": "nnUNetPlansTable3D", "trainers": DEEP, "suffix": "_3d"}
    return Group(tasks, iterations, "3d_fullres", width=8, **usual | changes)


GROUPS = {
    "phantom": Group(PHANTOMS, 100, every_seed=True),
    "phantom_long": Group(
        PHANTOMS, 180, plans="nnUNetPlansTableLong", trainers=("CASTTrainer",), every_seed=True, bounds=False,
        suffix="_long",
    ),
    "phantom_styles": Group(
        PHANTOMS, 500, plans="nnUNetPlansTableStyles", trainers=("RandomStyleTrainer",), every_seed=True,
        bounds=False, suffix="_styles",
    ),
    "phantom_3d": deep(PHANTOMS, 50, every_seed=True),
    "phantom_3d_long": deep(
        PHANTOMS, 100, plans="nnUNetPlansTable3DLong", trainers=("CASTTrainer", "SimilarityPrototypesTrainer"),
        suffix="_3d_long",
    ),
    "brain": Group(BRAINS, 200),  # after 100 the lower bound lacked structures on its source
    "brain_styles": Group(
        BRAINS, 1000, plans="nnUNetPlansTableStyles", trainers=("RandomStyleTrainer",), bounds=False,
        suffix="_styles",
    ),
    "brain_3d": deep(BRAINS[:1], 50, patch=CUBE),
    "brain_back_3d": deep(BRAINS[1:], 50, patch=CUBE),
    "vs": Group(("vs",)),
    "vs_back": Group(("vs_back",)),
    "vs_3d": deep(("vs",), 25),
    "vs_back_3d": deep(("vs_back",), 25),
    "totalseg": Group(PAIR),
    "totalseg_3d": deep(PAIR[:1], 25),
    "totalseg_back_3d": deep(PAIR[1:], 25),
    "totalseg_styles": Group(
        PAIR, 250, plans="nnUNetPlansTableStyles", trainers=("RandomStyleTrainer",), bounds=False,
        suffix="_styles",
    ),
}  # fmt: skip
TESTS = [name for group in GROUPS.values() for name in group.tests]
SETTINGS = (
    "num_epochs=6", "keep_every=1", "val_iterations_per_epoch=5", "picture_every=1000", "mirror=false",
    *(f"{method}.generator_blocks=4" for method in ("cisfa", "cut", "cast")),
    *(f"{method}.discriminator_width=32" for method in ("cisfa", "cut", "cast")), "advent.discriminator_width=32",
    "similarity_prototypes.discriminator_width=32", "similarity_prototypes.warmup_epochs=1",
    "similarity_prototypes.generator_learning_rate=1e-3", "uuds.clip_weights=random", "uuds.warmup_epochs=2",
    "uuds.learning_rate=5e-4", "uuds.optimizer=adamw", f"uuds.clip_config={json.dumps(CLIP)}",
)  # fmt: skip
"""Sizes and rates for networks this small and schedules this short; everything else is every trainer's default."""


@dataclass(frozen=True)
class Comparison:
    """One start of ``nnUNetUDA_compare``: a group of tasks with one seed."""

    name: str
    seed: int
    folder: Path

    @property
    def group(self) -> Group:
        return GROUPS[self.name]

    @property
    def tasks(self) -> list[Task]:
        return [TASKS[name] for name in self.group.tasks]

    def lacking(
        self, trainers: Sequence[str], known: Collection[tuple[str, str, int]] = ()
    ) -> dict[tuple[str, ...], list[str]]:
        """The tasks by what they lack, labels of bounds and trainers, in the order of the group.

        Args:
            trainers: between the bounds.
            known: test, label and seed of the runs that there are.
        """
        bounded = self.group.bounds and all(task.upper_bound is not None for task in self.tasks)
        lower, upper = [LOWER] if self.group.bounds else [], [UPPER] if bounded else []
        labels = [*lower, *self.group.among(trainers), *upper]
        found: dict[tuple[str, ...], list[str]] = {}
        for name, test in zip(self.group.tasks, self.group.tests, strict=True):
            found.setdefault(tuple(x for x in labels if (test, x, self.seed) not in known), []).append(name)
        found.pop((), None)
        return found

    @property
    def out(self) -> Path:
        return self.folder / f"compare_{self.name}"

    @property
    def settings(self) -> list[str]:
        widths = [f"{method}.generator_width={self.group.width}" for method in ("cisfa", "cut", "cast")]
        whole = self.group.tasks == PHANTOMS and self.group.configuration == "2d"  # a patch holds the whole slice
        own = ["foreground_oversampling=0"] if whole else []
        return [f"seed={self.seed}", f"iterations_per_epoch={self.group.iterations}", *SETTINGS, *widths, *own]

    def prepare(self, demo: Demo, names: Sequence[str]) -> None:
        """Preprocess the tasks' datasets for another configuration than their own, 2D, unless that was done."""
        configuration = self.group.configuration
        for name in names if configuration != "2d" else []:
            done = self.folder / f"{name}_{configuration}.json"
            if not done.exists():
                datasets = dataset_ids([TASKS[name]])
                demo.run("nnUNetv2_preprocess", "-d", *datasets, "-c", configuration, "-np", "1", nnUNet_n_proc_DA="1")
                demo.run("nnUNetUDA_preprocess", "-d", datasets[0], "-c", configuration, "-np", "1")
                write_json({"datasets": datasets}, done)

    def commands(self, labels: Sequence[str], names: Sequence[str], more: Sequence[str]) -> list[list[str]]:
        """Plans for every dataset of the tasks, then the comparison of what they lack."""
        group, tasks = self.group, [TASKS[name] for name in names]
        network = ["-c", group.configuration, "-patch_size", *map(str, group.patch), "-batch_size", "2",
                   "-base_features", str(group.width), "-max_features", str(8 * group.width)]  # fmt: skip
        plans = [["nnUNetUDA_configure", "-d", dataset, "-p", group.plans, "--overwrite", *network, "-set",
                  *self.settings] for dataset in dataset_ids(tasks, UPPER in labels)]  # fmt: skip
        trainers = [label for label in labels if label not in (LOWER, UPPER)]
        lower = ["-lower", LOWER_TRAINER] if LOWER in labels and trainers else []
        upper = ["-upper", *(f"{UPPER_TRAINER}:{task.upper_bound}" for task in tasks)] if UPPER in labels else []
        compare = ["nnUNetUDA_compare", "-d", *(str(task.dataset) for task in tasks), "-tr",
                   *(trainers or [LOWER_TRAINER]), "-f", tasks[0].fold, "-p", group.plans, "-c", group.configuration,
                   *lower, *upper, "-o", str(self.out), *more]  # fmt: skip
        return [*plans, compare]


def dataset_ids(tasks: Sequence[Task], with_bounds: bool = True) -> list[str]:
    """The tasks' ids, then those of their upper bounds."""
    ids = [*(task.dataset for task in tasks), *(task.upper_bound for task in tasks if with_bounds)]
    return [str(dataset) for dataset in ids if dataset is not None]


def comparisons(folder: Path, groups: Sequence[str], seeds: Sequence[int]) -> list[Comparison]:
    """All of them, the first seed of every group before the others."""
    pairs = [(seed, group) for seed in seeds for group in groups if GROUPS[group].every_seed or seed == seeds[0]]
    return [Comparison(group, seed, folder / f"seed_{seed if group.startswith('phantom') else 0}")
            for seed, group in pairs]  # fmt: skip


def finished(one: Comparison) -> list[tuple[Row, Score]]:
    """The finished runs of a comparison, bounds labelled as ``nnUNetUDA_compare`` does."""
    found = []
    os.environ.update(Demo(one.folder).variables)  # where a job looks for its training
    names = {task.dataset: name for name, task in zip(one.group.tests, one.tasks, strict=True)}
    for path in sorted(one.out.glob("runs/*/job.json")):
        job = Job.read(path)
        score = job.score()
        if score is None:
            continue
        test = job.name.split("__")[0]
        label = {LOWER_TRAINER: LOWER, UPPER_TRAINER: UPPER}.get(job.trainer, job.trainer)
        name = names[int(test[len("Dataset") : len("Dataset") + 3])]
        method = Method(label, job.trainer, name if job.dataset == test else job.dataset, name)
        found.append((Row(method, job.fold, one.seed, replace(job, name=f"seed_{one.seed}/{job.name}")), score))
    return found


def overview(cells: Sequence[Cells], labels: Sequence[str], tests: Sequence[str]) -> dict:
    """A row a trainer, a column a task: Dice and percent of the gap closed."""

    def cell(label: str, test: str) -> str:
        for entry in cells:
            if (entry.method.label, entry.method.test) == (label, test) and entry.figures["Dice"].n:
                dice, gap = entry.figures["Dice"], entry.figures["gap"]
                text = f"{dice.mean:.{DIGITS['Dice']}f}"
                text += f" ± {dice.std:.{DIGITS['Dice']}f}" if dice.n > 1 else ""
                return text + (f" ({gap.mean:.0f} %)" if gap.n else "")
        return "–"

    rows = [[label, *(cell(label, test) for test in tests)] for label in labels]
    return {"caption": "Dice (gap closed)", "header": ["trainer", *tests], "rows": rows}


def as_record(row: Row, score: Score) -> dict:
    """A finished run as ``from_record`` reads it: no folder of this machine is in it."""
    job, labels = row.job, row.job.test.labels
    metrics = {volume.case: {name: {metric: round(value, 4) for metric, value in of.items()}
                             for name, of in volume.metrics.items()} for volume in score.volumes}  # fmt: skip
    return jsonable({
        "test": row.method.test, "label": row.method.label, "seed": row.seed, "trainer": job.trainer,
        "dataset": row.method.dataset, "plans": job.plans, "configuration": job.configuration, "fold": job.fold,
        "device": job.device, "labels": labels.structures, "transductive": job.test.transductive,
        "validation_pseudo_dice": score.pseudo_dice, "training_seconds": score.seconds,
        "peak_memory_gib": score.memory, "peak_device_memory_gib": score.device_memory, "criteria": score.criteria,
        "metrics": metrics,
    })  # fmt: skip


def from_record(record: dict) -> tuple[Row, Score]:
    """A run of another machine, from its record."""
    method = Method(record["label"], record["trainer"], record["dataset"], record["test"])
    test = TargetTest(list(record["metrics"]), Path(), Labels(record["labels"], None, ""), None, record["transductive"])
    name = f"recorded/seed_{record['seed']}/{record['test']}/{record['trainer']}"
    job = Job(name, Path(name), record["dataset"], record["configuration"], record["fold"], record["trainer"],
              record["plans"], test, Path(), record["device"], 1)  # fmt: skip
    return Row(method, record["fold"], record["seed"], job), Score.parse(record)


def read_records(path: Path) -> list[tuple[Row, Score]]:
    """The runs of a table.json.

    Raises:
        UDAError: no such file, or another one.
    """
    content = read_json(path)
    try:
        return [from_record(record) for record in content["runs"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UDAError(
            f"{path} is no table.json of this command ({type(error).__name__}: {error}): check -with"
        ) from error


def criteria_table(rows: Sequence[Row], scores: dict[str, Score], tests: Sequence[str]) -> dict:
    """How the criteria without labels order a test's runs, by Spearman's correlation with the Dice on the target.

    The upper bound's runs are left out: they are trained on target labels.
    """

    def cell(name: str, test: str) -> str:
        found = [scores[row.job.name] for row in rows if row.method.test == test and row.method.label != UPPER]
        values = np.array([score.criteria.get(name, math.nan) for score in found])
        rho = correlation(values, np.array([dice_of(score) for score in found]), COLUMNS[name])
        return "–" if math.isnan(rho) else f"{rho:.2f} ({np.isfinite(values).sum()} runs)"

    lines = [[name, *(cell(name, test) for test in tests)] for name in COLUMNS]
    return {
        "caption": "Rank correlation of the criteria with the Dice, over last checkpoints",
        "header": ["criterion", *tests],
        "rows": lines,
        "notes": ["Running means that training measured on fixed target patches; pseudo_dice on (translated) source "
                  "validation patches. 1 is a perfect criterion; upper bounds are left out."],
    }  # fmt: skip


def write_table(
    folder: Path, every: Sequence[Comparison], trainers: Sequence[str], recorded: Sequence[tuple[Row, Score]] = ()
) -> str:
    """table.md, table.csv, table.json and table.png from what is finished; returns the Markdown.

    Raises:
        UDAError: nothing is finished.
    """
    labels = [LOWER, *trainers, UPPER]
    own = [pair for one in every for pair in finished(one)]
    known = {(row.method.test, row.method.label, row.seed): (row, score) for row, score in [*recorded, *own]}
    found = [pair for (_, label, _), pair in known.items() if label in labels]
    if not found:
        raise UDAError(f"{folder} holds no finished run yet")
    named = {row.job.name: score for row, score in found}
    rows = sorted((row for row, _ in found), key=lambda row: (
        TESTS.index(row.method.test), labels.index(row.method.label), row.seed))  # fmt: skip
    tests = list(dict.fromkeys(row.method.test for row in rows))
    planned = {(name, one.seed) for one in every for name in one.group.tests}
    planned |= {(row.method.test, row.seed) for row in rows}
    seeds = {name: sum(test == name for test, _ in planned) for name in tests}
    cells = [replace(entry, planned=seeds[entry.method.test]) for entry in summarise_methods(rows, named)]
    blocks = [markdown_table(overview(cells, [label for label in labels if any(
        entry.method.label == label for entry in cells)], tests))]  # fmt: skip
    blocks += [*test_tables(rows, cells), markdown_table(criteria_table(rows, named, tests))]
    text = "\n\n".join([*blocks, *RULES]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_runs(folder / "table.csv", rows, named, {})
    records = ",\n".join(json.dumps(as_record(row, named[row.job.name])) for row in rows)
    with whole_file(folder / "table.json") as temporary:
        temporary.write_text(f'{{"runs": [\n{records}\n]}}\n', encoding="utf-8")
    draw_comparison(folder / "table.png", bars(rows, cells, named), "all trainers")
    return text


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="for everything")
    parser.add_argument("-groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="of tasks [all]")
    parser.add_argument("-seeds", nargs="+", type=int, default=[0, 1, 2], help="of the phantoms [0 1 2]")
    parser.add_argument("-tr", nargs="+", default=list(TRAINERS), metavar="TRAINER", help="between the bounds [all]")
    add_data_argument(parser)
    parser.add_argument("-device", default="cuda", help="cpu, cuda or mps [cuda]")
    parser.add_argument("-jobs", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("-np", type=int, default=2, help="processes of conversion and scoring [2]")
    parser.add_argument("--only_table", action="store_true", help="train nothing")
    parser.add_argument("-with", dest="recorded", nargs="+", type=Path, default=[], metavar="RECORDED.json",
                        help="table.json of other machines, whose runs are not trained again")  # fmt: skip
    args = parser.parse_args(argv)
    folder = args.o.resolve()
    every = [one for one in comparisons(folder, args.groups, args.seeds) if one.group.among(args.tr)]
    data = args.data and args.data.resolve()
    recorded = [pair for path in args.recorded for pair in read_records(path)]
    more = ["-device", args.device, "-jobs", str(args.jobs), "-np", str(args.np)]
    known = {(row.method.test, row.method.label, row.seed) for row, _ in recorded}
    for one in every if not args.only_table else []:
        for labels, names in one.lacking(args.tr, known).items():
            for name in names:
                make_task(name, one.folder, int(one.folder.name.removeprefix("seed_")), data, args.np)
            demo = Demo(one.folder)
            one.prepare(demo, names)
            for words in one.commands(labels, names, more):
                demo.run(*words)
            write_table(folder, every, args.tr, recorded)
    print(write_table(folder, every, args.tr, recorded))


if __name__ == "__main__":
    main()
