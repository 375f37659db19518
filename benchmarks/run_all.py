"""Every benchmark of speed, memory and scale by one command: FOLDER/benchmarks.md with tables, and a picture of them.

Without ``-d`` a phantom is made, converted, planned and preprocessed first (``tasks.py``). Otherwise the dataset must
be planned and preprocessed, target too, and nnU-Net's folders set. From the plans ``-p`` four others are written
beside them: ``nnUNetPlansBenchmark``, with small translation networks and a small CLIP at random weights where ``-p``
does not set them, and ``nnUNetPlansCISFA64`` and ``nnUNetPlansCISFA160``, which have the sizes of CISFA's own code.
``nnUNetPlansBenchmarkWide`` is ``nnUNetPlansBenchmark`` with the patch, batch and features that nnU-Net's own planner
gives the phantom.

A part that is done, with the same command, is not run again (FOLDER/parts): a second start goes on where the first one
stopped. 40 to 80 minutes on 2 CPU cores with nothing else running.

    OMP_WAIT_POLICY=passive python benchmarks/run_all.py -o benchmark
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_time import draw_steps
from table import CLIP
from tasks import PLANS, TASKS, make_task

from nnunet_uda.commands.configure import main as configure
from nnunet_uda.commands.demo import Demo
from nnunet_uda.data.convention import dataset_name, environment_folder, read_json
from nnunet_uda.errors import UDAError, command
from nnunet_uda.files import whole_file, write_json

BENCHMARK, WIDE, CISFA = "nnUNetPlansBenchmark", "nnUNetPlansBenchmarkWide", "nnUNetPlansCISFA"
TRAINERS = ("nnUNetTrainer", "SourceOnlyTrainer", "RandomStyleTrainer", "EntMinTrainer", "ADVENTTrainer", "CUTTrainer",
            "CISFATrainer", "SimilarityPrototypesTrainer", "UUDSTrainer", "UUDSAdversarialTrainer",
            "CASTTrainer")  # fmt: skip
SMALL = {
    **{f"{method}.{name}": value for method in ("cisfa", "cut")
       for name, value in (("generator_width", 16), ("generator_blocks", 4), ("discriminator_width", 32))},
    "advent.discriminator_width": 32, "similarity_prototypes.discriminator_width": 32, "uuds.clip_weights": "random",
    "uuds.clip_config": CLIP,
}  # fmt: skip
"""Settings of ``nnUNetPlansBenchmark``, where its base has none of its own."""
WIDE_SIZES = ("-patch_size", "80", "80", "-batch_size", "20", "-base_features", "32", "-max_features", "512")
"""Of ``nnUNetPlansBenchmarkWide``: nnU-Net's planner for the phantom."""
CISFA_SIZES = ("-batch_size", "4", "-base_features", "64", "-max_features", "1024", "-stages", "5", "-set",
               "deep_supervision=false", "segmentation_loss=dice", "cisfa.generator_width=64",
               "cisfa.generator_blocks=9", "cisfa.discriminator_width=64", "cisfa.discriminator_layers=3",
               "cisfa.patches=256")  # fmt: skip
CISFA_EDGES = (64, 160)


@dataclass(frozen=True)
class Part:
    """One table: its title, the script and its words, and what is to be said below it."""

    title: str
    words: tuple[str, ...]

    @property
    def shown(self) -> str:
        return f"python benchmarks/{shlex.join(self.words)}"


def parts(dataset: str) -> dict[str, Part]:
    """All parts by name, in their order."""
    plans = ("-d", dataset, "-p", BENCHMARK)
    beside = ("-tr", "CISFACodeTrainer", "CISFATrainer", "--passes", "--resident")
    sizes = {
        f"cisfa{edge}": Part(
            f"CISFA at the sizes of its own code, {edge} x {edge}",
            ("step_time.py", "-d", dataset, "-p", f"{CISFA}{edge}", *beside, "-steps", steps),
        )
        for edge, steps in zip(CISFA_EDGES, ("7", "3"), strict=True)
    }
    return {
        "steps": Part(
            "Step times, last epoch of the schedule",
            ("step_time.py", *plans, "-tr", *TRAINERS, "-epoch", "last", "-steps", "30", "-live", "25"),
        ),
        "steps_wide": Part(
            "Step times at the size of nnU-Net's own plans, last epoch of the schedule",
            ("step_time.py", "-d", dataset, "-p", WIDE, "-tr", *TRAINERS, "-epoch", "last", "-steps", "12"),
        ),
        "steps_first": Part(
            "Step times, first epoch, where a schedule has parts",
            ("step_time.py", *plans, "-tr", "nnUNetTrainer", "CUTTrainer", "CASTTrainer", "-steps", "15"),
        ),
        **sizes,
        "prediction": Part(
            "Prediction",
            ("prediction_time.py", *plans, "-tr", "nnUNetTrainer", "CISFATrainer", "SimilarityPrototypesTrainer",
             "UUDSTrainer", "CASTTrainer", "-rounds", "9"),
        ),
        "prediction_cisfa": Part(
            "Prediction at the sizes of CISFA's own code, 64 x 64",
            ("prediction_time.py", "-d", dataset, "-p", f"{CISFA}64", "-rounds", "5", "-slices", "4"),
        ),
        "cases": Part("More cases", ("growth.py", "cases", *plans)),
        "patches": Part("Larger patches", ("growth.py", "patches", *plans, "-steps", "9")),
        "volumes": Part("More target volumes to preprocess", ("growth.py", "volumes", *plans)),
    }  # fmt: skip


def configurations(dataset: str, base: str, content: dict[str, Any]) -> list[list[str]]:
    """``nnUNetUDA_configure``'s words for the four plans, from the plans ``base`` with this content."""
    given = content.get("uda", {})
    method_of = {name: name.split(".") for name in SMALL}
    settings = {
        name: value for name, value in SMALL.items() if method_of[name][1] not in given.get(method_of[name][0], {})
    }
    words = ["-d", dataset, "-from", base, "--overwrite", "-p"]
    small = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
    small = ["-set", *small] if small else []
    return [
        [*words, BENCHMARK, *small],
        [*words, WIDE, *WIDE_SIZES, *small],
        *([*words, f"{CISFA}{edge}", "-patch_size", str(edge), str(edge), *CISFA_SIZES] for edge in CISFA_EDGES),
    ]


def finished(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a part, where it was made by the same commands."""
    if not path.exists():
        return None
    record = read_json(path)
    return record if {name: record.get(name) for name in key} == key else None


def run_part(words: tuple[str, ...]) -> dict[str, Any]:
    """Run a script: what it printed, and its figures.

    Raises:
        UDAError: where it fails; its messages are on the screen.
    """
    with tempfile.TemporaryDirectory() as place:
        figures = Path(place, "figures.json")
        program = [sys.executable, str(Path(__file__).parent / words[0]), *words[1:], "-o", str(figures)]
        done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise UDAError(f"the command above ended with status {done.returncode}. What was finished before it is "
                           "kept: the same command goes on from here")  # fmt: skip
        return {"output": done.stdout, "figures": read_json(figures)}


def against_cisfa_code(records: dict[str, dict[str, Any]]) -> str:
    """What a step takes of one with the passes of CISFA's own code, as Markdown; nothing where none was measured."""
    lines = []
    for edge in CISFA_EDGES:
        if f"cisfa{edge}" in records:
            code, ours = records[f"cisfa{edge}"]["figures"]["runs"]
            time = statistics.median(one / other for one, other in zip(ours["seconds"], code["seconds"], strict=True))
            cells = [f"{code['median']:.2f}, {ours['median']:.2f} ({time:.2f})"]
            for key, digits in (("flops", 0), ("peak_bytes", 2), ("resident_bytes", 2)):
                of_code, of_ours = code[key] / 1e9, ours[key] / 1e9
                cells.append(f"{of_code:.{digits}f}, {of_ours:.{digits}f} ({of_ours / of_code:.2f})")
            lines.append(f"| {edge} x {edge} | " + " | ".join(cells) + " |")
    if not lines:
        return ""
    header = ["patch", "s a step", "GFLOP", "GB of tensors", "GB of the process"]
    table = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines]
    note = ("Its passes, ours (share). Time: the median of the rounds' shares. Its passes are those of its authors' "
            "code on our networks (benchmarks/cisfa_code.py).")  # fmt: skip
    return "\n".join(["## CISFA beside the passes of its own code", "", *table, "", note, ""])


def report(plans: list[str], all_parts: dict[str, Part], records: dict[str, dict[str, Any]]) -> str:
    """All tables, each with its command, as Markdown; ``plans`` are the commands that wrote these."""
    blocks = ["# Benchmarks", "", "The plans:", "", "```bash", *plans, "```", "", against_cisfa_code(records)]
    for name, record in records.items():
        blocks += [f"## {all_parts[name].title}", "", f"`{record['command']}`", "", record["output"].strip(), ""]
    return "\n".join(blocks)


def draw(path: Path, records: dict[str, dict[str, Any]]) -> None:
    """Step times, their overheads, and growth; a panel without figures stays empty."""
    from nnunet_uda.figures import plt, save_figure

    figure, (times, overheads, cases, patches) = plt.subplots(1, 4, figsize=(20, 5))
    if "steps" in records:
        runs = records["steps"]["figures"]["runs"]
        draw_steps(times, runs)
        places = range(len(runs))
        overheads.barh(places, [100 * run["overhead"] for run in runs], color="C0", alpha=0.6,
                       label="overhead over its passes")  # fmt: skip
        overheads.plot([100 * run["loader_wait"] for run in runs], places, "kx", label="wait for batches")
        overheads.set_yticks(places, [run["trainer"] for run in runs], fontsize=8)
        overheads.invert_yaxis()
        overheads.set_xlabel("%")
        overheads.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    if "cases" in records:
        for index, (trainer, runs) in enumerate(_by_trainer(records["cases"]).items()):
            factors = [run["times"] for run in runs]
            for key, style, what in (("median", "o-", "step time"), ("resident_bytes", "s--", "memory")):
                values = [run[key] / runs[0][key] for run in runs]
                cases.plot(factors, values, style, color=f"C{index}", label=f"{trainer}, {what}")
        cases.set(xscale="log", xlabel="times the cases", ylabel="times the first")
        cases.xaxis.set_major_formatter("{x:g}")
        cases.set_ylim(0, 1.2 * cases.get_ylim()[1])
        cases.legend(fontsize=8)
    if "patches" in records:
        for index, (trainer, runs) in enumerate(_by_trainer(records["patches"]).items()):
            edges = [run["edge"] for run in runs]
            patches.plot(edges, [1e3 * run["median"] for run in runs], "o-", color=f"C{index}", label=trainer)
            last = 1e3 * runs[-1]["median"]
            patches.plot(edges, [last * (edge / edges[-1]) ** 2 for edge in edges], ":", color=f"C{index}")
        patches.set(xscale="log", yscale="log", xlabel="patch edge (dotted: 4 times for twice the edge)", ylabel="ms")
        patches.yaxis.set_major_formatter("{x:g}")
        patches.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        patches.set_xticks(edges, [str(edge) for edge in edges])
        patches.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def _by_trainer(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in record["figures"]["runs"]:
        grouped.setdefault(run["trainer"], []).append(run)
    return grouped


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", help="dataset id or name (default: a phantom, made in FOLDER)")
    parser.add_argument("-p", help="plans to start from [nnUNetPlans; of the phantom its own]")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="output folder")
    parser.add_argument("-only", nargs="+", choices=parts("501"), metavar="PART", help=", ".join(parts("501")))
    args = parser.parse_args(argv)
    folder = args.o.resolve()
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    dataset, base = args.d, args.p or "nnUNetPlans"
    if dataset is None:
        task, phantom = "phantom_mr2ct", folder / "phantom"
        make_task(task, phantom, 0, None, 1)
        os.environ.update(Demo(phantom).variables)
        dataset, base = str(TASKS[task].dataset), args.p or PLANS
    os.environ.pop("nnUNet_def_n_proc", None)  # it would bound the threads of a prediction

    plans = environment_folder("nnUNet_preprocessed") / dataset_name(dataset) / f"{base}.json"
    configured = configurations(dataset, base, read_json(plans))
    for words in configured:
        configure(words)
    plans_commands = [f"nnUNetUDA_configure {shlex.join(words)}" for words in configured]
    all_parts = parts(dataset)
    records = {}
    try:
        for name, part in all_parts.items():
            path, key = folder / "parts" / f"{name}.json", {"command": part.shown, "plans": plans_commands}
            record = finished(path, key)
            if args.only is None or name in args.only:
                print(f"{name}: {'done already' if record else part.shown}", flush=True)
                if record is None:
                    start = time.monotonic()
                    record = key | run_part(part.words)
                    write_json(record, path)
                    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
            if record is not None:
                records[name] = record
    finally:  # what is finished is shown, whatever stops the rest
        with whole_file(folder / "benchmarks.md") as temporary:
            temporary.write_text(report(plans_commands, all_parts, records), encoding="utf-8")
        draw(folder / "benchmarks.png", records)
    print(f"{folder / 'benchmarks.md'}, {folder / 'benchmarks.png'}")


if __name__ == "__main__":
    main()
