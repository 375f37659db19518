"""Make, convert, plan and preprocess the tasks that trainers are compared on, each with its upper bound's dataset.

    python benchmarks/tasks.py -o FOLDER -seeds 0 1 2 -data $NNUNET_UDA_TEST_DATA \
        -tasks phantom_mr2ct phantom_ct2mr totalseg totalseg_back vs vs_back brain_t12t2 brain_t22t1

FOLDER/seed_N holds nnU-Net's three folders. The phantom is made for every seed: other patients, and the seed of the
networks. The other tasks have fixed scans and lie in FOLDER/seed_0 alone. Every dataset gets the plans
``nnUNetPlansSmall``, whose network trains in minutes on a CPU; schedules are for those who compare.

A task that is whole has FOLDER/seed_N/TASK.json, with its datasets, fold and commands, and is not made again: the same
command goes on where it was stopped. ``-data`` is needed for totalseg, vs and the brains, which read third-party scans
where they lie.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunet_uda.commands.demo import Demo
from nnunet_uda.data.convention import read_json
from nnunet_uda.demo.brain import convert_command
from nnunet_uda.errors import UDAError, command
from nnunet_uda.files import write_json

PLANS = "nnUNetPlansSmall"
NETWORK = ("-batch_size", "4", "-base_features", "16", "-max_features", "128")


@dataclass(frozen=True)
class Task:
    """A pair of domains on scans of one kind.

    Attributes:
        dataset: id of the dataset with labelled source and unlabelled target.
        upper_bound: id of the target's dataset with labels; None where no labelled target scan is left to train on.
        fold: to be trained; ``all`` where one labelled scan makes a validation meaningless.
        test: folder of the dataset with the target scans to predict, whose labels are in its ``labelsTs``.
        patch: edge of the square patch in voxels.
        settings: of the plans, besides the seed.
        scans: what ``make_scans`` makes, or None where the scans lie in ``-data``.
        source: source domain, as the converter calls it.
        target: target domain.
    """

    dataset: int
    upper_bound: int | None
    fold: str
    test: str
    patch: int
    settings: tuple[str, ...]
    scans: str | None
    source: str
    target: str


SCHWANNOMAS = {"vs": ("98", "95"), "vs_back": ("98", "95", "9")}
"""Patients whose labelled hrT2 scans are trained on: by the upper bound, and as the source."""
PHANTOM = ("mirror=false", "foreground_oversampling=0")
TASKS = {
    "phantom_mr2ct": Task(501, 511, "0", "imagesTs", 64, PHANTOM, "phantom", "mr", "ct"),
    "phantom_ct2mr": Task(502, 512, "0", "imagesTs", 64, PHANTOM, "phantom", "ct", "mr"),
    "totalseg": Task(521, None, "all", "imagesTu", 96, ("mirror=false",), None, "CT", "MR"),
    "totalseg_back": Task(524, None, "all", "imagesTu", 96, ("mirror=false",), None, "MR", "CT"),
    "vs": Task(522, 523, "all", "imagesTs", 96, ("mirror=false",), None, "ceT1", "hrT2"),
    "vs_back": Task(525, None, "all", "imagesTu", 96, ("mirror=false",), None, "hrT2", "ceT1"),
    "brain_t12t2": Task(531, 533, "0", "imagesTs", 96, ("mirror=false",), "brains", "T1", "T2"),
    "brain_t22t1": Task(532, 534, "0", "imagesTs", 96, ("mirror=false",), "brains", "T2", "T1"),
}


def make_scans(demo: Demo, scans: str, seed: int, data: Path | None) -> None:
    """Phantom or rendered brains below the task's folder, unless they are there and whole."""
    folder = demo.folder / scans
    if scans == "brains":
        if not folder.exists():
            words = ["nnunet_uda.demo.brain", "-i", data / "synthseg_2mm", "-o", folder, "-seed", seed]
            demo.run(sys.executable, "-m", *words)
    elif not all((folder / f"{modality}_train").exists() for modality in ("mr", "ct")):
        shutil.rmtree(folder, ignore_errors=True)  # its two halves appear one after the other
        words = ["nnunet_uda.demo.phantom", "-o", folder, "-seed", seed, "-num_mr", "20", "-num_ct", "20"]
        demo.run(sys.executable, "-m", *words)


def labels_by_image(name: str, folder: Path, data: Path) -> Path:
    """Links to the labels of the hrT2 scans that a task trains on, under their images' names."""
    links = folder / f"{name}_labels"
    links.mkdir(exist_ok=True)
    for patient in SCHWANNOMAS[name]:
        link = links / f"vs_gk_{patient}_t2.nii.gz"
        link.unlink(missing_ok=True)
        link.symlink_to((data / "vs" / f"vs_gk_{patient}_t2_seg.nii.gz").absolute())
    return links


def conversions(name: str, folder: Path, data: Path | None) -> list[list[str]]:
    """The commands that make the task's dataset and, where it has one, its upper bound's."""
    task = TASKS[name]
    if task.scans == "brains":
        ids = ((task.dataset, False), (task.upper_bound, True))
        return [convert_command(folder / "brains", task.source, task.target, i, upper) for i, upper in ids]
    if task.scans == "phantom":
        words = ["nnUNetUDA_convert", "mmwhs", "-i", folder / "phantom", "-source", task.source, "-target", task.target]
        title = "Phantom" if task.source == "mr" else "PhantomBack"
        commands = [
            [*words, "-d", task.dataset, "-name", title],
            [*words, "-d", task.upper_bound, "-name", f"{title}Supervised", "--upper_bound"],
        ]
    elif name in ("totalseg", "totalseg_back"):
        scans = {"CT": ("example_ct_sm", "example_seg"), "MR": ("example_mr_sm", "example_seg_mr")}
        source, target = ([data / "totalseg" / f"{stem}.nii.gz" for stem in scans[modality]]
                          for modality in (task.source, task.target))  # fmt: skip
        commands = [[
            "nnUNetUDA_convert", "folders", "-d", task.dataset, "-name", f"TotalSeg{task.source}2{task.target}",
            "-source", task.source, "-target", task.target, "-source_images", source[0], "-source_labels", source[1],
            "-target_images", target[0], "-target_labels", target[1], "-labels", "spleen=1", "right_kidney=2",
            "left_kidney=3", "liver=5", "--ignore_other_labels",
        ]]  # fmt: skip
    else:
        scans = data / "vs"
        t1, t1_label, *t2 = (scans / f"vs_gk_{scan}.nii.gz" for scan in (
            "99_t1", "99_t1_seg", *(f"{patient}_t2" for patient in SCHWANNOMAS[name])))  # fmt: skip
        labels = folder / f"{name}_labels"
        words = ["nnUNetUDA_convert", "folders", "-source", task.source, "-target", task.target, "-labels", "tumour=1"]
        named = ["-d", task.dataset, "-name", f"VS{task.source}2{task.target}"]
        if name == "vs":
            words += ["-source_images", t1, "-source_labels", t1_label, "-target_images", *t2, "-target_test_images",
                      scans / "vs_gk_9_t2.nii.gz", "-target_test_labels", scans / "vs_gk_9_t2_seg.nii.gz"]  # fmt: skip
            supervised = ["-d", task.upper_bound, "-name", "VShrT2Supervised", "--upper_bound"]
            commands = [[*words, *named], [*words, *supervised, "-target_labels", labels]]
        else:
            words += ["-source_images", *t2, "-source_labels", labels, "-target_images", t1, "-target_labels", t1_label]
            commands = [[*words, *named]]
    return [[str(word) for word in words] for words in commands]


def preparations(name: str, seed: int) -> list[list[str]]:
    """The commands that plan and preprocess the task's datasets and write ``PLANS``."""
    task = TASKS[name]
    ids = [str(dataset) for dataset in (task.dataset, task.upper_bound) if dataset is not None]
    plan = ["nnUNetv2_plan_and_preprocess", "-d", *ids, "-c", "2d", "--verify_dataset_integrity", "-npfp", "1"]
    network = ["-patch_size", str(task.patch), str(task.patch), *NETWORK]
    return [
        [*plan, "-np", "1"],
        ["nnUNetUDA_preprocess", "-d", str(task.dataset), "-c", "2d", "-np", "1"],
        *(
            ["nnUNetUDA_configure", "-d", dataset, "-p", PLANS, "--overwrite", *network, "-set", *task.settings,
             f"seed={seed}"]
            for dataset in ids
        ),
    ]  # fmt: skip


def make_task(name: str, folder: Path, seed: int, data: Path | None, processes: int) -> bool:
    """Make a task below ``folder``, unless it is there and whole. Returns whether it was made.

    Raises:
        UDAError: ``data`` is missing, a command failed, or the whole task there was made by other commands.
    """
    task = TASKS[name]
    if data is None and task.scans != "phantom":
        raise UDAError(f"{name} needs third-party scans: give their folder with -data, or set NNUNET_UDA_TEST_DATA")
    converting, preparing = conversions(name, folder, data), preparations(name, seed)
    places = ((str(folder), "FOLDER"), (str(data), "DATA"))
    commands = [" ".join(words) for words in converting + preparing]
    for place, word in places:
        commands = [text.replace(place, word) for text in commands]
    manifest, content = folder / f"{name}.json", {"seed": seed, "plans": PLANS, **asdict(task), "commands": commands}
    content["settings"] = list(task.settings)
    if manifest.exists():
        if read_json(manifest) != content:
            raise UDAError(
                f"{manifest} was written for another form of this task (settings or commands differ). Remove it to "
                "make the task again, whose trained networks are then void, or give another folder with -o"
            )
        return False
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(folder)
    demo.say(f"{name}, seed {seed}")
    if task.scans is not None:
        make_scans(demo, task.scans, seed, data)
    if name in SCHWANNOMAS:
        labels_by_image(name, folder, data)
    for words in converting:
        demo.run(*words, "--overwrite", "-np", processes)
    demo.run(*preparing[0], nnUNet_n_proc_DA="1")  # nnU-Net cannot plan with 0
    for words in preparing[1:]:
        demo.run(*words)
    write_json(content, manifest)
    return True


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-data", type=Path, default=os.environ.get("NNUNET_UDA_TEST_DATA") or None,
                        help="folder of third-party scans [NNUNET_UDA_TEST_DATA]")  # fmt: skip


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="where FOLDER/seed_N are made")
    parser.add_argument("-tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("-seeds", nargs="+", type=int, default=[0, 1, 2], help="of the phantoms [0 1 2]")
    add_data_argument(parser)
    parser.add_argument("-np", type=int, default=2, help="processes of a conversion [2]")
    args = parser.parse_args(argv)
    for name in args.tasks:
        for seed in args.seeds if TASKS[name].scans == "phantom" else [0]:
            made = make_task(name, args.o.resolve() / f"seed_{seed}", seed, args.data and args.data.resolve(), args.np)
            print(f"{name}, seed {seed}: {'made' if made else 'whole already'}", flush=True)


if __name__ == "__main__":
    main()
