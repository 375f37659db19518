"""Trainers in anybody's folder: the examples of docs/, configured, trained, swept and compared like those here."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, TRAINERS, Workspace, batch, changed, make_trainer, parameters

from nnunet_uda.commands import configure
from nnunet_uda.errors import UDAError
from nnunet_uda.experiments import compare
from nnunet_uda.experiments.job import find_trainer
from nnunet_uda.experiments.sweep import plan_runs
from nnunet_uda.methods import check_trainer, check_uda, find_methods
from nnunet_uda.training.uda_trainer import UDATrainer

DATASET = "Dataset501_Blobs"
OTHER_DEFAULT = """
from dataclasses import dataclass
from nnunet_uda.trainers.cisfa import CISFASettings, CISFATrainer

@dataclass(frozen=True)
class LoudSettings(CISFASettings):
    foreground_weight: float = 7.0
    loudness: int = 3

class LoudTrainer(CISFATrainer):
    method_settings = LoudSettings
"""


def documented_examples() -> list[str]:
    """The code of "Write a method of your own", in its order."""
    text = (REPOSITORY / "docs" / "howto" / "new_trainer.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.fixture
def folder(in_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of trainers, on ``nnUNet_extTrainer`` behind this package's; it holds those of docs/."""
    own = tmp_path / "mine"
    own.mkdir()
    for name, code in zip(("entropy", "features"), documented_examples(), strict=True):
        (own / f"{name}.py").write_text(code)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(TRAINERS), str(own)]))
    return own


def configured(workspace: Workspace, *settings: str) -> dict[str, Any]:
    """The ``uda`` object that ``nnUNetUDA_configure -set`` writes."""
    path = workspace.preprocessed / DATASET / "mine.json"
    try:
        configure.main(["-d", "501", "-from", "tiny", "-p", "mine", "--overwrite", "-set", *settings])
        return json.loads(path.read_text())["uda"]
    finally:
        path.unlink(missing_ok=True)


def test_the_documented_trainer_is_configured_listed_and_trained(folder, in_workspace, capsys):
    uda = configured(in_workspace, "entropy.entropy_weight=0.25", "cisfa.patches=8")
    assert uda["entropy"] == {"entropy_weight": 0.25} and uda["cisfa"]["patches"] == 8
    configure.main(["--list"])
    assert "Settings of entropy:\n  entropy.entropy_weight = 0.01  (a number)\n" in capsys.readouterr().out

    trainer = make_trainer("EntropyTrainer", entropy__entropy_weight=0.25)
    trainer.on_train_start()
    first, second = trainer.train_step({"data": (drawn := batch(trainer))[0], "target": drawn[1]}), trainer.own_settings
    assert second.entropy_weight == 0.25 and 0 < first["entropy"] <= 0.25 * 1.1, "log 3 at most"


def test_the_documented_trainer_with_an_opponent_trains_both(folder, in_workspace):
    trainer = make_trainer("FeatureTrainer")
    trainer.on_train_start()
    before = {
        name: parameters(network) for name, network in (("segmenter", trainer.network), *trainer.networks.items())
    }
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert set(losses) == {"loss", "segmentation", "alignment", "judge"}
    assert changed(before["segmenter"], trainer.network) and changed(before["judge"], trainer.networks["judge"])
    with pytest.raises(UDAError, match="'alignment_weight' must be at least 0"):
        make_trainer("FeatureTrainer", features__alignment_weight=-1.0)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("entropy.entropy_wieght=1", ["unknown setting 'entropy_wieght'", "entropy_weight"]),
        ("entropy.entropy_weight=high", ["'entropy_weight' must be a number", "high"]),
        ("entrpy.entropy_weight=1", ["unknown method 'entrpy'", "entropy,", "nnUNet_extTrainer"]),
    ],
)
def test_mistakes_are_explained_as_for_the_methods_here(folder, in_workspace, capsys, setting, words):
    with pytest.raises(SystemExit):
        configured(in_workspace, setting)
    error = capsys.readouterr().err
    assert all(word in error for word in [*words, "'uda'"]) and "Traceback" not in error
    with pytest.raises(UDAError, match="unknown method 'entrpy'"):
        make_trainer("EntropyTrainer", entrpy__entropy_weight=1.0)


def test_the_documented_trainer_is_swept_and_compared(folder, in_workspace, tmp_path):
    base = json.loads((in_workspace.preprocessed / DATASET / "tiny.json").read_text())
    trainer = find_trainer("EntropyTrainer")
    sweeps, runs = plan_runs(base, "tiny", "2d", trainer, [["entropy.entropy_weight", "0.01", "0.1"]], None)
    assert [value.in_plans for value in sweeps["entropy.entropy_weight"]] == [True, False]
    assert [run.plans["uda"].get("entropy") for run in runs.values()] == [None, {"entropy_weight": 0.1}]
    with pytest.raises(UDAError, match="EntropyTrainer does not read it"):
        plan_runs(base, "tiny", "2d", trainer, [["cisfa.patches", "8"]], None)

    methods = compare.find_methods(["501"], ["EntropyTrainer", "CISFATrainer"])
    planned = compare.plan_comparison(tmp_path / "out", methods, "tiny", "2d", ["0"], None, "cpu", 1)
    assert [row.job.trainer for row in planned.rows] == ["EntropyTrainer", "CISFATrainer"]


@pytest.mark.slow
def test_the_real_commands(folder, in_workspace, tmp_path):
    variables = {"nnUNet_results": str(tmp_path / "results"), "nnUNet_extTrainer": os.environ["nnUNet_extTrainer"]}
    listed = in_workspace.run("nnUNetUDA_configure", "--list", **variables).stdout
    assert "entropy.entropy_weight = 0.01" in listed
    common = ("-d", "501", "-p", "tiny", "-device", "cpu", "-np", "1")
    in_workspace.run_apart("nnUNetUDA_sweep", *common, "-tr", "EntropyTrainer", "-o", str(tmp_path / "sweep"), "-vary",
                     "entropy.entropy_weight", "0.1", **variables)  # fmt: skip
    lines = (tmp_path / "sweep" / "sweep.md").read_text(encoding="utf-8").splitlines()
    assert next(line.split() for line in lines if line.startswith("| 0.1 "))[-2] == "1"  # run
    in_workspace.run_apart("nnUNetUDA_compare", *common, "-tr", "EntropyTrainer", "-o",
                     str(tmp_path / "compared"), **variables)  # fmt: skip
    assert "EntropyTrainer" in (tmp_path / "compared" / "compare.md").read_text()


def test_a_trainer_may_share_a_method_and_have_settings_of_its_own(folder, in_workspace, capsys):
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").touch()
    (folder / "package" / "loud.py").write_text(OTHER_DEFAULT)
    assert configured(in_workspace, "cisfa.loudness=5")["cisfa"]["loudness"] == 5
    with pytest.raises(UDAError, match="unknown setting 'loundess'"):
        check_uda({"cisfa": {"loundess": 1}}, "x")
    configure.main(["--list"])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("      ")]  # no remarks
    start = lines.index("Settings of cisfa as LoudTrainer has them, where they differ:")
    assert lines[start + 1 : start + 3] == [
        "  cisfa.foreground_weight = 7.0  (a number)",
        "  cisfa.loudness = 3  (an integer)",
    ]
    assert not lines[start + 3].startswith("  ")
    with pytest.raises(UDAError, match="unknown setting 'loudness'"):
        make_trainer("CISFATrainer", cisfa__loudness=5)
    assert make_trainer("LoudTrainer", cisfa__loudness=5).own_settings.loudness == 5


def test_a_broken_file_beside_it_is_named_where_it_may_be_missed(folder, capsys):
    (folder / "broken.py").write_text("import no_such_package\n")
    assert "entropy" in find_methods().names()
    configure.main(["--list"])
    assert f"Could not be imported: {folder / 'broken'}: ModuleNotFoundError: No module" in capsys.readouterr().out
    with pytest.raises(UDAError, match=r"unknown method 'broken'.*mine/broken could not be imported \(ModuleNotFound"):
        check_uda({"broken": {"weight": 1}}, "x")


def test_searching_leaves_no_module_behind(folder):
    import sys

    before = set(sys.modules)
    find_methods()
    assert "entropy" not in set(sys.modules) - before and str(folder) not in sys.path


@dataclass(frozen=True)
class Whole:
    weight: float = 1.0
    sizes: list[int] = field(default_factory=lambda: [1])


@dataclass(frozen=True)
class WithoutDefault:
    weight: float


@dataclass(frozen=True)
class OddType:
    path: Path = Path()


@dataclass(frozen=True)
class UnknownType:
    weight: Wieght = 1.0  # noqa: F821


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        (None, Whole, "'method' is None"),
        ("my.method", Whole, "'method' is 'my.method'"),
        ("seed", Whole, "name of a shared setting"),
        ("mine", {"weight": 1}, "must be a dataclass"),
        ("mine", WithoutDefault, "no default for weight"),
        ("mine", OddType, "Path.* no type that a plans file can hold"),
        ("mine", UnknownType, "settings of UnknownType cannot be read: name 'Wieght'"),
    ],
)
def test_settings_that_no_plans_file_can_hold_are_refused(method, settings, words):
    check_trainer(type("FineTrainer", (UDATrainer,), {"method": "mine", "method_settings": Whole}))
    with pytest.raises(UDAError, match=f"OddTrainer: .*{words}"):
        check_trainer(type("OddTrainer", (UDATrainer,), {"method": method, "method_settings": settings}))
