"""Make, convert, plan and preprocess the tasks that trainers are compared on, each with its upper bound's dataset(s).

    python -m benchmarks.accuracy.tasks -o FOLDER -data $NNUNET_UDA_TEST_DATA -tasks heart brain cord_t1w

FOLDER holds nnU-Net's three folders. Tasks are real scans, read where they lie in ``-data``; those called phantom_* are
made: a phantom, and brains rendered from label maps. Every dataset gets the plans ``nnUNetPlansSmall``, whose network
trains in minutes on a CPU; schedules are for those who compare.

The upper bound is trained on labelled target scans. Where the target has a part for the test, these are its others.
Where it has not, the test is on the scans that training saw without their labels, and the upper bound leaves one out: a
dataset for each of them, tested on that one. Two scans would leave one to train on, which bounds nothing: there the
source's labelled scans are added. With a single target scan there is no upper bound.

A task that is whole has FOLDER/TASK.json, with its commands, and is not made again: the same command goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.accuracy.brain import convert_command
from nnunet_uda.data.convention import read_json
from nnunet_uda.demo.road import Demo
from nnunet_uda.errors import UDAError, command
from nnunet_uda.files import write_json

PLANS = "nnUNetPlansSmall"


@dataclass(frozen=True)
class Task:
    """A pair of domains on scans of one kind.

    Attributes:
        dataset: id of the dataset with labelled source and unlabelled target.
        bounds: ids of the upper bound's datasets, one for each target scan where one is left out.
        source: source domain, as the converter calls it.
        target: target domain.
        scans: folder in ``-data``, or what ``make_scans`` makes.
        structures: ``-labels`` of the converter; empty where its command is a ready one.
        fold: to be trained; ``all`` where a validation part would leave too few labelled scans.
        side: ending of the folders of the target's images and labels.
        seeds: of the table.
        configuration: nnU-Net's.
        settings: of the plans, besides the seed.
        few: so many target training scans are labelled for training, those of a smaller number among them.
    """

    dataset: int
    bounds: tuple[int, ...]
    source: str
    target: str
    scans: str
    structures: tuple[str, ...] = ()
    fold: str = "all"
    side: str = ""
    seeds: tuple[int, ...] = (0, 1)
    configuration: str = "2d"
    settings: tuple[str, ...] = ("mirror=false",)
    few: int = 0

    @property
    def made(self) -> bool:
        """Whether the scans are made here."""
        return self.scans in ("phantom", "rendered")

    @property
    def width(self) -> int:
        """First channels of the network."""
        return 16 if self.configuration == "2d" else 8

    @property
    def network(self) -> list[str]:
        """Options of ``nnUNetUDA_configure``: patch and batch, and a network that trains in minutes on a CPU."""
        patch = "64 64" if self.scans == "phantom" else "96 96"
        shape = f"{patch} -batch_size 4" if self.configuration == "2d" else "32 32 32 -batch_size 2"
        return f"-patch_size {shape} -base_features {self.width} -max_features {8 * self.width}".split()


HEART, TISSUE, CORD = ("cavity=1", "myocardium=2"), ("CSF=1", "grey=2", "white=3"), ("cord=1",)
ORGANS, TUMOUR = ("spleen=1", "right_kidney=2", "left_kidney=3", "liver=5"), ("tumour=1",)
BRAIN = {"source": "T1", "target": "T2", "scans": "brain_tissue_t1_to_t2", "structures": TISSUE, "fold": "0"}
CORDS = {"source": "T2star", "scans": "spinal_cord_t2star_to_t1w", "structures": CORD}
PHANTOM = {"scans": "phantom", "fold": "0", "settings": ("mirror=false", "foreground_oversampling=0")}
TASKS = {
    "heart": Task(541, (542,), "cine", "LGE", "cardiac_cine_to_lge", HEART, seeds=(0, 1, 2)),
    "brain": Task(551, (552, 553, 554), **BRAIN, seeds=(0, 1, 2)),
    "cord_t1w": Task(561, (562, 563), target="T1w", **CORDS),
    "cord_t2w": Task(565, (566, 567), target="T2w", side="_t2w", **CORDS),
    "tumour": Task(571, (572, 573, 574), "T1c", "FLAIR", "brain_tumour_t1c_to_flair", TUMOUR),
    "totalseg": Task(521, (), "CT", "MR", "totalseg", ORGANS),
    "totalseg_back": Task(524, (), "MR", "CT", "totalseg", ORGANS),
    "vs": Task(522, (523,), "ceT1", "hrT2", "vs", TUMOUR),
    "vs_back": Task(525, (), "hrT2", "ceT1", "vs", TUMOUR),
    "brain_3d": Task(581, (582, 583, 584), **BRAIN, configuration="3d_fullres"),
    "phantom_mr2ct": Task(501, (511,), "mr", "ct", **PHANTOM),
    "phantom_ct2mr": Task(502, (512,), "ct", "mr", **PHANTOM),
    "phantom_t12t2": Task(531, (533,), "T1", "T2", "rendered", fold="0"),
    "phantom_t22t1": Task(532, (534,), "T2", "T1", "rendered", fold="0"),
}
GROUPS = {
    "real": tuple(name for name, task in TASKS.items() if not task.made),
    "phantom": tuple(name for name, task in TASKS.items() if task.made),
}


def make_scans(demo: Demo, scans: str, seed: int, data: Path | None) -> None:
    """Phantom or rendered brains below the task's folder, unless they are there and whole."""
    folder = demo.folder / scans
    if scans == "rendered":
        if not folder.exists():
            script = Path(__file__).with_name("brain.py")
            demo.run(sys.executable, script, "-i", data / "synthseg_2mm", "-o", folder, "-seed", seed)
    elif not all((folder / f"{modality}_train").exists() for modality in ("mr", "ct")):
        shutil.rmtree(folder, ignore_errors=True)  # its two halves appear one after the other
        words = ["nnunet_uda.demo.phantom", "-o", folder, "-seed", seed, "-num_mr", "20", "-num_ct", "20"]
        demo.run(sys.executable, "-m", *words)


@dataclass(frozen=True)
class Domain:
    """Images and labels of a domain, in the same order; ``test`` is the part for the test."""

    images: list[Path]
    labels: list[Path]
    test: Domain | None = None


def files(folder: Path, *stems: str) -> list[Path]:
    """The files of these stems, or all of a folder.

    Raises:
        UDAError: there is none.
    """
    found = [folder / f"{stem}.nii.gz" for stem in stems] or sorted(folder.glob("*.nii.gz"))
    if not found or not all(path.exists() for path in found):
        raise UDAError(f"{folder} does not hold {', '.join(stems) or 'any scan'}: check -data")
    return found


def shortest(paths: Sequence[Path]) -> list[Path]:
    """The folder where ``paths`` are all that it holds, else themselves."""
    folders = {path.parent for path in paths}
    return list(folders) if len(folders) == 1 and set(paths) == set(next(iter(folders)).glob("*.nii.gz")) else [*paths]


def labels_by_image(links: Path, images: Sequence[Path]) -> list[Path]:
    """Links to the labels that lie beside their images as NAME_seg, under their images' names."""
    links.mkdir(exist_ok=True, parents=True)
    for image in images:
        link = links / image.name
        link.unlink(missing_ok=True)
        link.symlink_to(image.with_name(image.name.replace(".nii.gz", "_seg.nii.gz")).absolute())
    return [links / image.name for image in images]


def domains(name: str, folder: Path, data: Path) -> tuple[Domain, Domain]:
    """The scans of a task's source and target in ``data``; links to labels of another name go into ``folder``."""
    task = TASKS[name]
    place = data / task.scans
    if task.scans == "totalseg":
        ct, mr = (Domain(files(place, image), files(place, label)) for image, label in (
            ("example_ct_sm", "example_seg"), ("example_mr_sm", "example_seg_mr")))  # fmt: skip
        return (ct, mr) if task.source == "CT" else (mr, ct)
    if task.scans == "vs":
        t1 = Domain(files(place, "vs_gk_99_t1"), files(place, "vs_gk_99_t1_seg"))
        images = files(place, *(f"vs_gk_{patient}_t2" for patient in (98, 95, 9)))
        labels = labels_by_image(folder / "vs_labels", images)
        if name == "vs_back":
            return Domain(images, labels), t1
        return t1, Domain(images[:2], labels[:2], Domain(images[2:], labels[2:]))
    source = Domain(files(place / "source_images"), files(place / "source_labels"))
    images, labels = (files(place / f"target_{part}{task.side}") for part in ("images", "labels"))
    if not (place / "test_images").is_dir():
        return source, Domain(images, labels)
    return source, Domain(images, labels, Domain(files(place / "test_images"), files(place / "test_labels")))


def conversions(name: str, folder: Path, data: Path | None) -> list[list[str]]:
    """The commands that make the task's dataset and its upper bound's."""
    task = TASKS[name]
    if task.scans == "rendered":
        ids = ((task.dataset, False), (task.bounds[0], True))
        return [convert_command(folder / "rendered", task.source, task.target, i, upper) for i, upper in ids]
    if task.scans == "phantom":
        words = ["nnUNetUDA_convert", "mmwhs", "-i", folder / "phantom", "-source", task.source, "-target", task.target]
        title = "Phantom" if task.source == "mr" else "PhantomBack"
        commands = [
            [*words, "-d", task.dataset, "-name", title],
            [*words, "-d", task.bounds[0], "-name", f"{title}Supervised", "--upper_bound"],
        ]
    else:
        source, target = domains(name, folder, data)
        title = "".join(word.capitalize() for word in name.split("_"))

        def convert(number: int, title: str, target: Domain, *more: str) -> list:
            test = target.test
            given = {"source_images": source.images, "source_labels": source.labels, "target_images": target.images}
            given |= {"target_labels": target.labels} if test is None or more else {}
            if task.few and not more:
                order = np.random.RandomState(0).permutation(len(target.labels))[: task.few]
                given |= {"target_few_labels": sorted(target.labels[index] for index in order)}
            given |= {"target_test_images": test.images, "target_test_labels": test.labels} if test else {}
            words = [word for option, paths in given.items() for word in (f"-{option}", *shortest(paths))]
            others = ["--ignore_other_labels"] if task.scans == "totalseg" else []
            return ["nnUNetUDA_convert", "folders", "-d", number, "-name", title, "-source", task.source, "-target",
                    task.target, *words, "-labels", *task.structures, *others, *more]  # fmt: skip

        commands = [convert(task.dataset, title, target)]
        for number, bound in zip(task.bounds, bounds(source, target) if task.bounds else [], strict=True):
            commands.append(convert(number, f"{title}Supervised", bound, "--upper_bound"))
    return [[str(word) for word in words] for words in commands]


def bounds(source: Domain, target: Domain) -> list[Domain]:
    """What the upper bound is trained and tested on: one target with a part for the test, or one for each scan."""
    if target.test is not None:
        return [target]
    added = source if len(target.images) == 2 else Domain([], [])
    found = []
    for out in range(len(target.images) if len(target.images) > 1 else 0):
        images, labels = (list(paths) for paths in (target.images, target.labels))
        test = Domain([images.pop(out)], [labels.pop(out)])
        found.append(Domain(added.images + images, added.labels + labels, test))
    return found


def preparations(name: str, seed: int) -> list[list[str]]:
    """The commands that plan and preprocess the task's datasets and write ``PLANS``."""
    task = TASKS[name]
    ids, configuration = [str(dataset) for dataset in (task.dataset, *task.bounds)], ["-c", task.configuration]
    return [
        ["nnUNetv2_plan_and_preprocess", "-d", *ids, *configuration, "--verify_dataset_integrity", "-npfp", "1", "-np",
         "1"],
        ["nnUNetUDA_preprocess", "-d", ids[0], *configuration, "-np", "1"],
        *(["nnUNetUDA_configure", "-d", dataset, "-p", PLANS, *configuration, "--overwrite", *task.network, "-set",
           *task.settings, f"seed={seed}"] for dataset in ids),
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
    manifest, content = folder / f"{name}.json", {"commands": commands}
    if manifest.exists():
        if read_json(manifest) != content:
            raise UDAError(
                f"{manifest} was written for another form of this task (its commands differ). Remove it to "
                "make the task again, whose trained networks are then void, or give another folder with -o"
            )
        return False
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(folder)
    demo.say(name)
    if task.made:
        make_scans(demo, task.scans, seed, data)
    for words in converting:
        demo.run(*words, "--overwrite", "-np", processes)
    demo.run(*preparing[0], nnUNet_n_proc_DA="1")  # nnU-Net cannot plan with 0
    for words in preparing[1:]:
        demo.run(*words)
    write_json(content, manifest)
    return True


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of what is made: ``chosen_tasks`` reads them."""
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="for everything")
    parser.add_argument("-groups", "-tasks", dest="tasks", nargs="+", choices=[*GROUPS, *TASKS], default=["real"],
                        metavar="TASK", help=f"'real', 'phantom' or any of {', '.join(TASKS)} [real]")  # fmt: skip
    parser.add_argument("-data", type=Path, default=os.environ.get("NNUNET_UDA_TEST_DATA") or None,
                        help="folder of third-party scans [NNUNET_UDA_TEST_DATA]")  # fmt: skip
    parser.add_argument("-np", type=int, default=2, help="processes of a conversion [2]")


def chosen_tasks(args: argparse.Namespace) -> list[str]:
    """The tasks' names, in the order of ``TASKS``."""
    chosen = {name for word in args.tasks for name in GROUPS.get(word, (word,))}
    return [name for name in TASKS if name in chosen]


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    parser.add_argument("-seed", type=int, default=0, help="of what is made: other patients [0]")
    args = parser.parse_args(argv)
    for name in chosen_tasks(args):
        made = make_task(name, args.o.resolve(), args.seed, args.data and args.data.resolve(), args.np)
        print(f"{name}: {'made' if made else 'whole already'}", flush=True)


if __name__ == "__main__":
    main()
