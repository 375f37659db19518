"""nnU-Net finds every trainer from a clone, an editable install and a wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import REPOSITORY, TRAINERS

NAMES = sorted(
    name for path in TRAINERS.glob("*.py") for name in re.findall(r"^class (\w+Trainer)\(", path.read_text(), re.M)
)
FIND = f"""
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
import nnunet_uda
for name in {NAMES}:
    assert recursive_find_trainer_class_by_name(name).__name__ == name
print("FOUND", nnunet_uda.__file__)
"""


def find(python: Path | str, folder: str, cwd: Path, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "nnUNet_extTrainer")}
    environment |= {"nnUNet_extTrainer": folder, **variables}
    done = subprocess.run(
        [str(python), "-c", FIND], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("FOUND ")[1].strip()


@pytest.fixture(scope="module")
def base_environment(tmp_path_factory):
    """An environment with the dependencies of this one and without this package."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "venv"
        venv.create(folder, with_pip=False)
        site = next((folder / "lib").glob("python*")) / "site-packages"
        here = [Path(path) for path in sys.path if path.endswith("site-packages")]
        for folder_of_packages in here:
            for entry in folder_of_packages.iterdir():
                if "nnunet_uda" not in entry.name and not (site / entry.name).exists() and entry.suffix != ".pth":
                    (site / entry.name).symlink_to(entry)
        return folder / "bin" / "python"

    return make


def install(python: Path, *source: str) -> None:
    options = ["--no-deps", "--no-build-isolation", "-q"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options]
    done = subprocess.run([*command, *source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def copy_of_repository(folder: Path) -> Path:
    ignore = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "__pycache__", "demo_run*", "docs")
    shutil.copytree(REPOSITORY, folder, ignore=ignore)
    return folder


@pytest.mark.slow
def test_from_a_clone(tmp_path, base_environment):
    clone = copy_of_repository(tmp_path / "clone")
    where = find(base_environment("clone"), str(clone / "trainers"), tmp_path, PYTHONPATH=str(clone))
    assert where.startswith(str(clone))


@pytest.mark.slow
def test_from_an_editable_install(tmp_path, base_environment):
    clone = copy_of_repository(tmp_path / "clone")
    python = base_environment("editable")
    install(python, "-e", str(clone))
    folder = subprocess.run([python.parent / "nnUNetUDA_trainers"], capture_output=True, text=True, check=True)
    assert folder.stdout.strip() == str(clone / "trainers")
    assert find(python, folder.stdout.strip(), tmp_path).startswith(str(clone))


@pytest.mark.slow
def test_from_a_wheel(tmp_path, base_environment):
    clone = copy_of_repository(tmp_path / "clone")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*command, str(clone)], check=True, capture_output=True)
    python = base_environment("wheel")
    install(python, str(next(tmp_path.glob("*.whl"))))
    shutil.rmtree(clone)
    folder = subprocess.run([python.parent / "nnUNetUDA_trainers"], capture_output=True, text=True, check=True)
    assert folder.stdout.strip().endswith(os.path.join("nnunet_uda", "trainers"))
    where = find(python, folder.stdout.strip(), tmp_path)
    assert "site-packages" in where
    help_text = subprocess.run(
        [python.parent / "nnUNetUDA_convert", "mmwhs", "-h"], capture_output=True, text=True, check=True
    )
    assert "VENDOR_TREE" in help_text.stdout


def test_on_windows_every_command_says_in_one_line_that_it_is_not_supported(tmp_path):
    """Windows has no ``fcntl`` and no ``resource``; here Python is told that there are none."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['fcntl'] = sys.modules['resource'] = None\n")
    scripts = {entry.value.partition(":")[0] for entry in entry_points(group="console_scripts")}
    modules = {module for module in scripts if module.startswith("nnunet_uda.")}
    assert len(modules) >= 12
    for module in (*sorted(modules), "nnunet_uda.trainers.cisfa", "nnunet_uda.experiments.job"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and "Windows is not supported: use WSL" in done.stderr, module


def test_every_package_is_declared():
    """What is not listed is missing in a wheel, which a slow test builds."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    declared = set(re.findall(r'"(nnunet_uda[\w.]*)"', re.search(r"^packages = \[(.*?)\]", text, re.M | re.S)[1]))
    folders = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "nnunet_uda").rglob("*.py")}
    assert declared == {".".join(folder.parts) for folder in folders} | {
        "nnunet_uda.trainers", "nnunet_uda.dataset_conversion", "nnunet_uda.evaluation.templates",
    }  # fmt: skip
