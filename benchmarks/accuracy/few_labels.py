"""What a few labelled target scans are worth: Dice over their number, with adaptation and without.

    python -m benchmarks.accuracy.few_labels -o FOLDER -data $NNUNET_UDA_TEST_DATA -device cpu -budget 1000 [-jobs 2]

On the heart task: CAST and random styles with 0, 1, 2, 4 and 8 labelled target scans, and training on these alone;
those of a smaller number are among those of a greater. The bounds are those of the task without labels. Everything is
trained, tested and recorded by table.py (equal time, plans, test scans), in whose FOLDER finished trainings are found
again: the same command goes on where it stopped. Writes few_labels.md and few_labels.png into FOLDER; ``--only_table``
from what is finished.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.accuracy.table import figures_of, read_records
from benchmarks.accuracy.table import main as make_table
from benchmarks.accuracy.tasks import TASKS
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.report import markdown_table
from nnunet_uda.experiments.compare import LOWER, UPPER
from nnunet_uda.files import whole_file

NUMBERS = (1, 2, 4, 8)
ADAPTING, ALONE = ("CASTTrainer", "RandomStyleTrainer"), "LabelledTargetTrainer"
WORDS = {"CASTTrainer": "CAST", "RandomStyleTrainer": "random styles", ALONE: "these scans alone"}
NAMES = {0: "heart", **{number: f"heart_few{number}" for number in NUMBERS}}
FEW_TASKS = {
    NAMES[number]: replace(TASKS["heart"], dataset=543 + place, bounds=(), few=number)
    for place, number in enumerate(NUMBERS)
}


def curves(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean Dice by trainer (rows) and number of labelled scans (columns), with the bounds' rows; NaN where missing."""
    figures = pd.DataFrame([figures_of(record) for record in records])
    found = figures[figures.task.isin(NAMES.values())].copy()
    found["number"] = found.task.map({name: number for number, name in NAMES.items()})
    whole = found.pivot_table(values="dice", index="label", columns="number", aggfunc="mean")
    order = [label for label in (*ADAPTING, ALONE, LOWER, UPPER) if label in whole.index]
    return whole.reindex(index=order, columns=list(NAMES))


def draw(whole: pd.DataFrame, path: Path) -> None:
    """The curves, and the bounds as lines."""
    from nnunet_uda.figures import plt, save_figure

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, row in whole.iterrows():
        if label in (LOWER, UPPER):
            axis.axhline(row[0], color="grey", linestyle=":", label=label.replace("_", " "))
        else:
            axis.plot(range(len(row)), row, marker="o", label=WORDS[label])
    axis.set_xticks(range(len(NAMES)), [str(number) for number in NAMES])
    axis.set(xlabel="labelled target scans", ylabel="Dice", ylim=(0, 1))
    axis.legend()
    save_figure(figure, path)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="table.py's folder")
    parser.add_argument("-data", help="folder of third-party scans [NNUNET_UDA_TEST_DATA]")
    parser.add_argument("-budget", default="1000", help="in steps of a plain network [1000]")
    parser.add_argument("-seeds", nargs="+", default=["0"], help="[0]")
    parser.add_argument("-device", default="cuda", help="cpu, cuda or mps [cuda]")
    parser.add_argument("-jobs", default="1", help="trainings at a time [1]")
    parser.add_argument("--only_table", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    TASKS.update(FEW_TASKS)
    words = [
        "-o",
        str(args.o),
        "-budget",
        args.budget,
        "-seeds",
        *args.seeds,
        "-device",
        args.device,
        "-jobs",
        args.jobs,
    ]
    words += ["-data", args.data] if args.data else []
    if not args.only_table:
        make_table([*words, "-tasks", "heart", "-tr", *ADAPTING])
        make_table([*words, "-tasks", *(NAMES[number] for number in NUMBERS), "-tr", *ADAPTING, ALONE])
    whole = curves(read_records(args.o / "table.json"))
    if not len(whole):
        raise UDAError(f"{args.o / 'table.json'} holds no finished run of the heart task yet")
    rows = [[WORDS.get(label, label.replace("_", " ")), *("–" if pd.isna(dice) else f"{dice:.3f}" for dice in row)]
            for label, row in zip(whole.index, whole.to_numpy(), strict=True)]  # fmt: skip
    header = ["Dice with so many labelled target scans", *map(str, NAMES)]
    text = markdown_table({"caption": "Hearts, cine to late enhancement", "header": header, "rows": rows}) + "\n"
    with whole_file(args.o / "few_labels.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    draw(whole, args.o / "few_labels.png")
    print(text)


if __name__ == "__main__":
    main()
