"""Tiny datasets, made on the fly, and nnU-Net's folders in a temporary place."""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import entry_points
from multiprocessing.context import SpawnContext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

os.environ["nnUNet_def_n_proc"] = "1"  # read once: eight processes would import torch for four tiny scans

from nnunetv2.training.dataloading import data_loader
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.utilities import find_objects
from nnunetv2.utilities.find_class_by_name import temporarily_cleanup_imports_from_path, temporarily_extend_syspath

from nnunet_uda.files import locked

STARTED = time.monotonic()
OVER = "the time given by --minutes is over"
LEFT_OUT = pytest.StashKey[Counter]()
REPOSITORY = Path(__file__).parent.parent
TRAINERS = REPOSITORY / "trainers"


RAS = (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)
LPS = (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)


def write_volume(
    path: Path,
    array: np.ndarray,
    spacing: tuple[float, ...] = (2.0, 2.0, 4.0),
    direction: Iterable[float] = RAS,
    origin: tuple[float, ...] = (0.0, 0.0, 0.0),
) -> Path:
    """Write a ``(Z, Y, X)`` array, or a ``(Y, X)`` one without direction."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[: array.ndim])
    image.SetOrigin(origin[: array.ndim])
    if array.ndim == 3:
        image.SetDirection(direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def two_geometries(path: Path) -> Path:
    """The scan at ``path`` with an sform that is its qform mirrored."""
    image = nibabel.load(path)
    mirrored = image.affine.copy()
    mirrored[0] *= -1
    array = np.asanyarray(image.dataobj)
    changed = nibabel.Nifti1Image(array, image.affine)
    changed.set_qform(image.affine, 1)
    changed.set_sform(mirrored, 2)
    nibabel.save(changed, path)
    return path


def litter(tree: Path) -> None:
    """What macOS, Windows and network storage leave beside people's files, in every folder of ``tree``."""
    apple = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(60)
    for path in [tree, *tree.rglob("*")]:
        if path.is_dir():
            for name in (".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r"):
                (path / name).write_bytes(b"\0\0\0\1Bud1")
            (path / "@eaDir").mkdir()
        else:
            path.with_name(f"._{path.name}").write_bytes(apple)
            (path.parent / "@eaDir" / path.name).write_bytes(apple)
            archive = tree / "__MACOSX" / path.relative_to(tree)
            archive.parent.mkdir(parents=True, exist_ok=True)
            archive.with_name(f"._{path.name}").write_bytes(apple)


def draw_case(rng: np.random.Generator, target: bool, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A body with two blobs, 1 and 2; tissue intensities differ between the domains."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    body = x**2 + y**2 < 0.85
    label = np.zeros(size, np.uint8)
    for value, centre in ((1, -0.35), (2, 0.35)):
        shift = rng.uniform(-0.08, 0.08, 2)
        radius = rng.uniform(0.22, 0.3)
        label[(x - centre - shift[0]) ** 2 + (y - shift[1]) ** 2 + (0.4 * z) ** 2 < radius**2] = value
    values = (-900.0, 40.0, 300.0, 120.0) if target else (5.0, 250.0, 700.0, 500.0)
    image = np.where(body, values[1], values[0])
    image[label == 1], image[label == 2] = values[2], values[3]
    return (image + rng.normal(0, 20, size)).astype(np.float32), label


def make_raw_dataset(
    raw: Path,
    name: str = "Dataset501_Blobs",
    num_source: int = 5,
    num_target: int = 4,
    num_test: int = 2,
    size: tuple[int, int, int] = (10, 36, 36),
    seed: int = 0,
) -> Path:
    """A raw dataset in the target convention, MR to CT."""
    rng = np.random.default_rng(seed)
    folder = raw / name
    groups = [("Tr", num_source, False, True), ("Tu", num_target, True, False), ("Ts", num_test, True, True)]
    for group, number, target, labelled in groups:
        for index in range(number):
            case = f"{'ct' if target else 'mr'}_{group}{index:02d}"
            image, label = draw_case(rng, target, size)
            write_volume(folder / f"images{group}" / f"{case}_0000.nii.gz", image)
            if labelled:
                write_volume(folder / f"labels{group}" / f"{case}.nii.gz", label)
    dataset = {
        "channel_names": {"0": "intensity"},
        "labels": {"background": 0, "left": 1, "right": 2},
        "numTraining": num_source,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIOWithReorient",
        "uda": {
            "source_domain": "MR",
            "target_domain": "CT",
            "numSource": num_source,
            "numTarget": num_target,
            "numTest": num_test,
        },
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


class Serial:
    """Stands in for a pool of spawned processes, each of which would import torch: it does every task at once."""

    _pool: list = []

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *error: object) -> None: ...

    def starmap(self, function: Callable, tasks: Iterable[tuple]) -> list:
        return [function(*task) for task in tasks]

    def starmap_async(self, function: Callable, tasks: Iterable[tuple]) -> SimpleNamespace:
        done = self.starmap(function, tasks)
        return SimpleNamespace(ready=lambda: True, get=lambda: done)


@functools.cache
def trainer_modules() -> list[ModuleType]:
    """The files of ``TRAINERS`` as nnU-Net's finder imports them, in its order."""
    with temporarily_extend_syspath(str(TRAINERS)), temporarily_cleanup_imports_from_path(str(TRAINERS)):
        return [importlib.import_module(name) for _, name, _ in pkgutil.iter_modules([str(TRAINERS)])]


DRAWING = ("plot_curves", "write_panels", "write_embedding_picture", "write_domain_map", "write_prompt_maps")
"""What draws a training's pictures, in whatever module of the package it is called."""


def draw_nothing(path: Path | str, *_: object, **__: object) -> None:
    Path(path).write_bytes(b"\x89PNG")


def lighten(patch: pytest.MonkeyPatch, pictures: bool = False) -> None:
    """Leave out of trainings what takes longer than all else in an epoch of the tests' and is not what they test.

    Pictures are empty files, and libraries are not asked for their threads in each batch: the environment says one.

    Args:
        pictures: whether this package draws its own all the same.
    """
    patch.setattr(data_loader, "threadpool_limits", lambda **_: nullcontext())
    patch.setattr(LocalLogger, "plot_progress_png", lambda _, folder: draw_nothing(Path(folder, "progress.png")))
    if not pictures:
        importlib.import_module("nnunet_uda.training.uda_trainer")
        ours = [module for name, module in sys.modules.items() if name.startswith("nnunet_uda.")] + trainer_modules()
        for module, name in itertools.product(ours, DRAWING):
            if hasattr(module, name):
                patch.setattr(module, name, draw_nothing)


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's pools of spawned processes do their work in this one."""
    monkeypatch.setattr(SpawnContext, "Pool", lambda self, processes=None: Serial())


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """``refused(main, words)``: the one message of a command that must end by it, with status 1."""

    def message(main: Callable, words: Iterable[object]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        error = capsys.readouterr().err
        messages = [line for line in error.splitlines() if line.startswith("ERROR: ")]
        assert stopped.value.code == 1 and len(messages) == 1 and "Traceback" not in error, error
        return error

    return message


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes begin as copies of this one, which has imported everything, not anew."""
    monkeypatch.setattr("nnunet_uda.workers.get_context", lambda _: multiprocessing.get_context("fork"))


@contextmanager
def changed_environment(variables: dict[str, str]) -> Iterator[None]:
    """``os.environ`` is ``variables`` inside."""
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def call(name: str, command: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """An installed command's ``main`` called in this process, which it leaves as it was, as if it were another.

    Trainings are lightened.
    """
    [entry] = entry_points(group="console_scripts", name=name)
    output, errors, status = io.StringIO(), io.StringIO(), 0
    threads, hook, argv = torch.get_num_threads(), sys.excepthook, sys.argv
    with pytest.MonkeyPatch.context() as patch, changed_environment(environment):
        patch.setattr(SpawnContext, "Pool", lambda self, processes=None: Serial())
        lighten(patch)
        patch.setattr(sys, "argv", list(command))
        with redirect_stdout(output), redirect_stderr(errors):
            try:
                entry.load()()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=errors)
            except Exception:
                status = 1
                sys.excepthook(*sys.exc_info())
    torch.set_num_threads(threads)
    sys.excepthook, sys.argv = hook, argv
    return subprocess.CompletedProcess(command, status, output.getvalue(), errors.getvalue())


@dataclass
class Workspace:
    """nnU-Net's three folders, and commands run in them."""

    root: Path

    @property
    def raw(self) -> Path:
        return self.root / "raw"

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def environment(self) -> dict[str, str]:
        variables = {"nnUNet_raw": self.raw, "nnUNet_preprocessed": self.preprocessed, "nnUNet_results": self.results}
        threads = {"OMP_WAIT_POLICY": "passive", "nnUNet_def_n_proc": "1"}
        paths = {name: str(path) for name, path in variables.items()}
        scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**os.environ, **paths, **threads, "nnUNet_extTrainer": str(TRAINERS), "PATH": scripts}

    def run(self, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
        """Run an installed command in this process, which has imported torch; with ``check`` a failure is an error."""
        return self._done(command, functools.partial(call, command[0]), check, variables)

    def run_apart(self, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
        """``run`` in a process of its own, where that is what is tested."""
        start = functools.partial(subprocess.run, capture_output=True, text=True, check=False, timeout=900)
        return self._done(command, lambda words, environment: start(words, env=environment), check, variables)

    def _done(self, command: tuple[str, ...], start: Callable, check: bool, variables: dict[str, str]):
        done = start(command, self.environment | variables)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def plan(self, dataset: str = "501", *configurations: str) -> None:
        self.run(
            "nnUNetv2_plan_and_preprocess", "-d", dataset, "-c", *(configurations or ("2d",)), "-npfp", "1", "-np", "1",
            "--verify_dataset_integrity",
        )  # fmt: skip

    def configure(
        self,
        name: str,
        *settings: str,
        configuration: str = "2d",
        options: tuple[str, ...] = (),
        patch: tuple[str, ...] = ("32", "32"),
    ) -> None:
        """Write plans of a network that trains in seconds."""
        patch = patch if configuration == "2d" else ("8", *patch)
        self.run(
            "nnUNetUDA_configure", "-d", "501", "-p", name, "-c", configuration, "-patch_size", *patch,
            "-batch_size", "2", "-base_features", "4", "-max_features", "8", "-stages", "3", *options, "-set",
            "num_epochs=2", "iterations_per_epoch=2", "val_iterations_per_epoch=1", "save_every=1", "seed=7",
            "quality_volumes=0", "criterion_patches=4",
            "cisfa.generator_width=4", "cisfa.generator_blocks=2", "cisfa.discriminator_width=4", "cisfa.patches=16",
            *settings,
        )  # fmt: skip

    def train(
        self, trainer: str, plans: str, *options: str, configuration: str = "2d", fold: str = "0", check: bool = True
    ) -> subprocess.CompletedProcess:
        return self.run(
            "nnUNetv2_train", "501", configuration, fold, "-tr", trainer, "-p", plans, "-device", "cpu", *options,
            check=check, nnUNet_n_proc_DA="0",
        )  # fmt: skip

    def fold_folder(self, trainer: str, plans: str, configuration: str = "2d", fold: str = "0") -> Path:
        return self.results / "Dataset501_Blobs" / f"{trainer}__{plans}__{configuration}" / f"fold_{fold}"


def sampled(name: str, values: Iterable[str], *fast: str) -> pytest.MarkDecorator:
    """The parameter ``name``, of whose values ``make test`` takes ``fast`` alone."""
    slow = pytest.mark.slow
    marked = [value if value in fast else pytest.param(value, marks=slow) for value in values]
    return pytest.mark.parametrize(name, marked)


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remember what the markers leave out."""
    for item in items:
        item.config.stash.setdefault(LEFT_OUT, Counter())[item.path.name] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist, which tells the one that prints
        session.config.workeroutput["left_out"] = dict(session.config.stash.get(LEFT_OUT, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    left_out = getattr(node, "workeroutput", {}).get("left_out", {})  # the same in every process
    node.config.stash[LEFT_OUT] = Counter(left_out)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=math.inf, help="skip what has not begun after so many minutes")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - STARTED > 60 * item.config.getoption("--minutes"):
        pytest.skip(OVER)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which tests did not run, and how they are run."""
    late = [report.nodeid for report in terminalreporter.stats.get("skipped", []) if OVER in str(report.longrepr)]
    if late:
        terminalreporter.write_line(f"{len(late)} tests had not begun in time: {', '.join(late)}")
    left_out = config.stash.get(LEFT_OUT, Counter())
    if left_out:
        listed = ", ".join(f"{name} {number}" for name, number in sorted(left_out.items()))
        terminalreporter.write_line(f"{left_out.total()} tests were left out (make test-all runs them): {listed}")


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    """The parameter ``count``: a sample for ``make test``, and the whole among the slow tests."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test session that all processes of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def trainers_found_once() -> Iterator[None]:
    """nnU-Net's finder imports a folder's files anew for every trainer that it looks for there: this one's stay."""
    find = find_objects.recursive_find_python_class

    def found(folder: str, name: str, *arguments: object, **options: object) -> type | None:
        if Path(folder) != TRAINERS:
            return find(folder, name, *arguments, **options)
        return next((vars(module)[name] for module in trainer_modules() if name in vars(module)), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(find_objects, "recursive_find_python_class", found)
        yield


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """``folder``, which the first process that asks for it fills with ``make`` while the others wait."""
    with locked(folder.with_suffix(".lock"), wait=True):
        if not folder.exists():
            half = folder.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            make(half)
            half.rename(folder)
    return folder


def make_planned(root: Path) -> None:
    """The dataset that all tests share: planned, preprocessed, its target too."""
    workspace = Workspace(root)
    make_raw_dataset(workspace.raw)
    workspace.plan("501", "2d", "3d_fullres")
    workspace.configure("tiny")
    workspace.run("nnUNetUDA_preprocess", "-d", "501", "-c", "2d", "-np", "1")


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A planned dataset with the plans ``tiny``; tests must not change its raw data or these plans."""
    made = made_once(shared_folder(tmp_path_factory) / "planned", make_planned)
    return Workspace(shutil.copytree(made, tmp_path_factory.mktemp("workspace") / "own"))


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions, whose quicklook takes longer than all else in them, leave an empty file but in tests that draw."""
    converter = sys.modules.get("nnunet_uda.dataset_conversion.dataset")
    if converter is not None and request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(converter, "draw_quicklook", lambda rows, structures, path: draw_nothing(path))


@pytest.fixture
def in_workspace(
    planned: Workspace, serial: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Workspace:
    """``planned`` as this process's nnU-Net folders, with results of the test's own and no worker processes.

    Trainings are lightened, but those of tests marked ``draws`` draw.
    """
    for name, value in planned.environment.items():
        if name.startswith("nnUNet"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    lighten(monkeypatch, pictures=request.node.get_closest_marker("draws") is not None)
    return planned


def make_trainer(
    name: str,
    plans: str = "tiny",
    configuration: str = "2d",
    fold: int | str = 0,
    labels: dict[str, int] | None = None,
    **uda: object,
):
    """A trainer of this process, found as nnU-Net finds it; ``uda`` changes settings of the plans on the way.

    ``labels`` takes the place of those in dataset.json.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_uda.plans import merge_uda

    folder = Path(os.environ["nnUNet_preprocessed"], "Dataset501_Blobs")
    content = json.loads((folder / f"{plans}.json").read_text())
    content["uda"] = merge_uda(content.get("uda", {}), {key.replace("__", "."): value for key, value in uda.items()})
    content["continue_training"] = False
    dataset = json.loads((folder / "dataset.json").read_text())
    if labels is not None:
        dataset["labels"] = labels
    trainer_class = recursive_find_trainer_class_by_name(name)
    return trainer_class(content, configuration, fold, dataset, torch.device("cpu"))


def written_model(trainer) -> Path:
    """The folder of a trainer's model, complete for prediction, with its present weights as the final ones."""
    folder = Path(trainer.output_folder_base)
    for name, content in (("plans", trainer.plans_manager.plans), ("dataset", trainer.dataset_json)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    trainer.save_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    return folder


def weights(trainer) -> dict[str, torch.Tensor]:
    """All weights of a trainer: the segmenter's and every other network's."""
    return {**trainer.plain_network.state_dict(), **trainer.networks.state_dict()}


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def differences(first: object, second: object, where: str = "") -> list[str]:
    """Where two checkpoints differ, by key, in type or in any bit; not where they say when epochs began and ended."""
    if type(first) is not type(second):
        return [f"{where}: {type(first).__name__} and {type(second).__name__}"]
    if isinstance(first, dict):
        keys = [key for key in {**first, **second} if key not in ("epoch_start_timestamps", "epoch_end_timestamps")]
        missing = [f"{where}.{key} is in one" for key in keys if key not in first or key not in second]
        return missing or [line for key in keys for line in differences(first[key], second[key], f"{where}.{key}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{where}: {len(first)} and {len(second)} items"]
        pairs = enumerate(zip(first, second, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{where}[{index}]")]
    if isinstance(first, torch.Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
    else:
        same = repr(first) == repr(second)  # NaN is NaN, and floats show every digit
    return [] if same else [f"{where}: {first!r} and {second!r}"[:300]]


def batch(trainer) -> tuple:
    """Source images, their labels and target images of the next training step."""
    source = next(trainer.dataloader_train)
    return source["data"], source["target"], next(trainer.dataloader_target)["data"]


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a module's parameters by name."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    """Names of the parameters that differ from ``parameters`` of before."""
    return {name for name, value in module.named_parameters() if not torch.equal(before[name], value)}
