"""From a phantom to a table of lower bound, CISFA and upper bound, by a user's commands."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from nnunet_uda.errors import UDAError
from nnunet_uda.methods import trainers_folder
from nnunet_uda.workers import tied

PLANS = "nnUNetPlansDemo"
NETWORK = ["-patch_size", "64", "64", "-batch_size", "4", "-base_features", "16", "-max_features", "128"]
SETTINGS = ["num_epochs=14", "iterations_per_epoch=100", "val_iterations_per_epoch=10", "picture_every=5",
            "mirror=false", "foreground_oversampling=0", "cisfa.generator_width=16", "cisfa.generator_blocks=4",
            "cisfa.discriminator_width=32"]  # fmt: skip
RUNS = (("lower_bound", "SourceOnlyTrainer", "501"), ("CISFA", "CISFATrainer", "501"),
        ("upper_bound", "SupervisedTrainer", "511"))  # fmt: skip


class Demo:
    """Runs commands in a folder of its own, printing each before it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = time.monotonic()
        names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        self.variables = {name: str(folder / name) for name in names}
        self.variables |= {"nnUNet_extTrainer": str(trainers_folder()), "nnUNet_def_n_proc": "1"}
        scripts = str(Path(sys.executable).parent)
        self.environment = {**os.environ, **self.variables, "PATH": os.pathsep.join([scripts, os.environ["PATH"]])}

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        print(f"\n=== [{minutes:2d}:{seconds:02d}] {text}", flush=True)

    def run(self, *words: str | int | Path, **variables: str) -> None:
        """Print a command as a user would type it, then run it; its output goes to the screen. A training ends with
        this process."""
        command = [str(word) for word in words]
        prefix = "".join(f"{name}={value} " for name, value in variables.items())
        print(f"$ {prefix}{shlex.join(command)}", flush=True)
        done = subprocess.run(command, env=tied(self.environment | variables), check=False)
        if done.returncode != 0:
            raise UDAError(f"the command above ended with status {done.returncode}; its files are in {self.folder}")


def run_demo(folder: Path, seed: int, device: str) -> None:
    """All steps, in a folder that is new or empty.

    Raises:
        UDAError: if a command fails.
    """
    demo = Demo(folder)

    demo.say(f"A phantom, seed {seed}: 20 MR patients and 20 other CT patients")
    for name, value in demo.variables.items():
        print(f"$ export {name}={value}")
    vendor = folder / "vendor"
    demo.run(sys.executable, "-m", "nnunet_uda.demo.phantom", "-o", vendor, "-seed", seed, "-num_mr", 20,
             "-num_ct", 20)  # fmt: skip

    demo.say("Convert: labelled MR (source), unlabelled CT (target), held-out CT for the test")
    convert = ("nnUNetUDA_convert", "mmwhs", "-i", vendor, "-source", "mr", "-target", "ct")
    demo.run(*convert, "-d", "501", "-name", "Phantom")
    demo.say("The upper bound's dataset: the same CT training scans with their labels")
    demo.run(*convert, "-d", "511", "-name", "PhantomSupervised", "--upper_bound")

    demo.say("Plan and preprocess")
    demo.run("nnUNetv2_plan_and_preprocess", "-d", "501", "511", "-c", "2d", "--verify_dataset_integrity", "-npfp", "1",
             "-np", "1", nnUNet_n_proc_DA="1")  # fmt: skip
    demo.run("nnUNetUDA_preprocess", "-d", "501", "-c", "2d", "-np", "1")
    for dataset in ("501", "511"):
        demo.run("nnUNetUDA_configure", "-d", dataset, "-p", PLANS, *NETWORK, "-set", *SETTINGS, f"seed={seed}")

    predictions = folder / "predictions"
    for name, trainer, dataset in RUNS:
        demo.say(f"Train {name} ({trainer})")
        demo.run("nnUNetUDA_train", dataset, "2d", "0", "-tr", trainer, "-p", PLANS, "-device", device,
                 nnUNet_n_proc_DA="0")  # fmt: skip
        demo.run("nnUNetv2_predict", "-i", folder / "nnUNet_raw/Dataset501_Phantom/imagesTs", "-o", predictions / name,
                 "-d", dataset, "-c", "2d", "-f", "0", "-tr", trainer, "-p", PLANS, "-device", device,
                 "-npp", "0", "-nps", "0")  # fmt: skip

    demo.say("Evaluate the held-out CT scans")
    demo.run("nnUNetUDA_evaluate", "-d", "501", "-pred", *(f"{name}={predictions / name}" for name, *_ in RUNS),
             "-lower", "lower_bound", "-upper", "upper_bound", "-o", folder / "evaluation")  # fmt: skip
    demo.say("Pictures")
    demo.run(sys.executable, "-m", "nnunet_uda.demo.figure", "-i", folder, "-p", PLANS)
    demo.say(f"Done. Tables, plots and overlays: {folder / 'evaluation' / 'evaluation.html'}")
