"""``nnUNetUDA_evaluate --unsupervised`` and the benchmark of the criteria, on networks with random weights."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import REPOSITORY, make_trainer, written_model
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from support.pages import read_csv

from nnunet_uda.commands.evaluate import main
from nnunet_uda.evaluation import unsupervised
from nnunet_uda.evaluation.metrics import evaluate_case
from nnunet_uda.training.criteria import HIGHER_IS_BETTER, TargetCriteria, look_twice

FOLDER = "SourceOnlyTrainer__tiny__2d"


@pytest.fixture
def models(in_workspace) -> Path:
    """The results folder of a network that was never trained, with three checkpoints of other random weights."""
    trainer = make_trainer("SourceOnlyTrainer")
    trainer.initialize()
    folder = written_model(trainer) / "fold_0"
    trainer.inference_allowed_mirroring_axes = (0, 1)
    for epoch, name in enumerate(("epoch_0001", "epoch_0002", "final")):
        torch.manual_seed(epoch)
        for parameter in trainer.plain_network.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        trainer.logger.log("mean_fg_dice", 0.1 * (epoch + 1), epoch)
        trainer.model_choice.add(0.1 * (epoch + 1), trainer.network)
        trainer.current_epoch = epoch
        trainer.save_checkpoint(str(folder / f"checkpoint_{name}.pth"))
    assert folder.parent.name == FOLDER
    return folder


def arguments(output: Path, *more: str) -> list[str]:
    return ["-d", "501", "-tr", "SourceOnlyTrainer", "-p", "tiny", "-device", "cpu", "-o", str(output), *more]


def evaluate(output: Path, *more: str) -> dict:
    main(["--unsupervised", *arguments(output, *more)])
    return json.loads((output / "criteria.json").read_text())


def by_hand(folder: Path, checkpoint: str, images: list[Path]) -> dict[str, float]:
    """Preprocess with nnU-Net, segment slice by slice with its predictor, and gather."""
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), (0,), checkpoint)
    manager = predictor.configuration_manager
    gathered = TargetCriteria(3)
    for path in images:
        data = manager.preprocessor_class(verbose=False).run_case(
            [str(path)], None, predictor.plans_manager, manager, predictor.dataset_json
        )[0]
        volume = torch.from_numpy(data.astype(np.float32))[None]

        def predict(images: torch.Tensor) -> torch.Tensor:
            return predictor.predict_sliding_window_return_logits(images[0])[None].float()

        gathered.add(*look_twice(predict, volume, (1, 2)))  # rows and columns, never slices
    return gathered.values()


def test_checkpoints_are_compared_without_labels(models, in_workspace, tmp_path, capsys) -> None:
    output = tmp_path / "out"
    checkpoints = ["checkpoint_epoch_0002.pth", "checkpoint_final.pth"]
    content = evaluate(output, "-chk", *checkpoints)
    printed = capsys.readouterr().out
    images = sorted((in_workspace.raw / "Dataset501_Blobs" / "imagesTu").glob("*.nii.gz"))
    assert content["cases"] == [path.name[: -len("_0000.nii.gz")] for path in images]
    assert content["images"].endswith("imagesTu")
    for row, name, dice in zip(content["checkpoints"], checkpoints, (0.2, 0.3), strict=True):
        assert (row["trainer"], row["plans"], row["fold"], row["checkpoint"]) == (
            "SourceOnlyTrainer", "tiny", "0", name)  # fmt: skip
        assert row["pseudo_dice"] == pytest.approx(dice)
        expected = by_hand(models, name, images)
        assert {key: row[key] for key in HIGHER_IS_BETTER} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert (output / "criteria.md").read_text() in printed
    rows = read_csv(output / "criteria.csv")
    assert [float(row["entropy"]) for row in rows] == [row["entropy"] for row in content["checkpoints"]]
    values = [row["entropy"] for row in content["checkpoints"]]
    assert f"**{min(values):.4f}**" in printed and f"**{max(values):.4f}**" not in printed
    assert "entropy ↓" in printed and "agreement ↑" in printed

    again = evaluate(output, "-i", str(in_workspace.raw / "Dataset501_Blobs" / "imagesTs"))  # replaces the former one
    assert again["cases"] == ["ct_Ts00", "ct_Ts01"] and len(again["checkpoints"]) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("-chk", "checkpoint_best.pth"), "best.pth does not exist. There are checkpoint_cut.pth, checkpoint_epoch_00"),
        (("-tr", "CISFATrainer"), "CISFATrainer__tiny__2d does not exist: no such model has been trained"),
        (("-f", "3"), r"fold_3/checkpoint_final.pth does not exist. There is no checkpoint .*, but in fold_0: "),
        (("-device", "gpu"), "-device gpu is not available; it may be cpu"),
        (("-i", "EMPTY"), "holds no image: expected files named like CASE_0000.nii.gz"),
        (("-i", "CHANNELS"), r"case ct has the file\(s\) ct_0000.nii.gz, ct_0001.nii.gz, but the network reads 1 ch"),
        (("-o", "TAKEN"), "exists and holds no former evaluation"),
        (("-chk", "checkpoint_cut.pth"), "checkpoint_cut.pth cannot be read as a checkpoint"),
    ],
)
def test_errors_are_one_message_and_leave_nothing(models, tmp_path, refused, more, words) -> None:
    for name in ("EMPTY", "CHANNELS", "TAKEN"):
        (tmp_path / name).mkdir()
    for name in ("ct_0000.nii.gz", "ct_0001.nii.gz"):
        (tmp_path / "CHANNELS" / name).write_bytes(b"")
    (tmp_path / "TAKEN" / "mine.txt").write_text("mine")
    (models / "checkpoint_cut.pth").write_bytes((models / "checkpoint_final.pth").read_bytes()[:3000])
    before = sorted(tmp_path.iterdir())
    places = [str(tmp_path / word) if word.isupper() else word for word in more]
    error = refused(main, ["--unsupervised", *arguments(tmp_path / "out", *places)])
    assert re.search(words, error), error
    assert sorted(tmp_path.iterdir()) == before


# --- the benchmark -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    path = REPOSITORY / "benchmarks" / "accuracy" / "criteria.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_criteria", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_correlation_and_regret(benchmark) -> None:
    dice, nan = np.array([0.1, 0.5, 0.9, 0.7]), math.nan
    assert benchmark.correlation(np.array([1, 3, 9, 4.0]), dice, True) == pytest.approx(1)
    assert benchmark.correlation(np.array([1, 3, 9, 4.0]), dice, False) == pytest.approx(-1)
    # ranks 1 2 4 3 against 2 1 4 3: rho = 1 - 6 * 2 / (4 * 15)
    assert benchmark.correlation(np.array([2, 1, 4, 3.0]), dice, True) == pytest.approx(0.8)
    assert benchmark.correlation(np.array([nan, 3, 9, 4]), dice, True) == pytest.approx(1)
    assert math.isnan(benchmark.correlation(np.array([nan, nan, 9, 4]), dice, True))
    assert math.isnan(benchmark.correlation(np.ones(4), dice, True))
    assert benchmark.regret(np.array([1, 2, 3, 4.0]), dice, True) == pytest.approx(0.2)
    assert benchmark.regret(np.array([1, 2, 3, 4.0]), dice, False) == pytest.approx(0.8)
    assert benchmark.regret(np.array([4, 2, 4, nan]), dice, True) == 0  # of equal ones the latest
    assert math.isnan(benchmark.regret(np.full(4, nan), dice, True))


def test_dice_of_a_volume_is_that_of_the_evaluation(benchmark, in_workspace) -> None:
    labels = in_workspace.raw / "Dataset501_Blobs" / "labelsTs"
    paths = [labels / f"ct_Ts0{i}.nii.gz" for i in range(2)]
    arrays = [sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in paths]
    scores = evaluate_case(*paths, {"left": 1, "right": 2})
    expected = np.mean([score["Dice"] for score in scores.values()])
    assert benchmark.mean_dice(*arrays, [1, 2]) == pytest.approx(expected) and 0.5 < expected < 1
    assert benchmark.mean_dice(*arrays, [1, 2, 3]) == pytest.approx(expected)
    assert benchmark.mean_dice(arrays[0], 0 * arrays[1], [1, 2]) == 0
    assert math.isnan(benchmark.mean_dice(*arrays, [3]))


def test_the_table_takes_runs_apart(benchmark) -> None:
    rows = []
    for plans, dices in (("a", [0.2, 0.4, 0.6]), ("b", [0.5, 0.3, 0.1])):
        for epoch, dice in enumerate(dices):
            row = dict.fromkeys(benchmark.CRITERIA, math.nan)
            row |= {"output": "o", "trainer": "T", "plans": plans, "fold": "0", "dice": dice, "agreement": float(epoch)}
            rows.append(row)
    table = benchmark.summarise(rows)
    cells = {line[0]: line[1:] for line in table["rows"]}
    assert cells["agreement"][0] == "0.000 ± 1.414" and cells["agreement"][3:] == ["0.200 ± 0.283", "0.400"]
    assert cells["the last checkpoint"][3:] == ["0.200 ± 0.283", "0.400"]
    assert cells["snd"] == ["–"] * 5 and table["caption"] == "6 checkpoints of 2 run(s)"


@pytest.mark.slow
def test_the_benchmark_runs_and_goes_on(benchmark, models, tmp_path, capsys, refused) -> None:
    output = tmp_path / "bench"
    benchmark.main(arguments(output, "-n", "2"))
    rows = read_csv(output / "criteria.csv")
    assert [row["checkpoint"] for row in rows] == [f"checkpoint_{n}.pth" for n in ("epoch_0001", "epoch_0002", "final")]
    assert [float(row["pseudo_dice (training)"]) for row in rows] == pytest.approx([0.1, 0.11, 0.129])
    assert all(0 <= float(row["dice"]) < 0.6 for row in rows) and len({row["dice"] for row in rows}) > 1
    assert "| pseudo_dice (training)" in (output / "criteria.md").read_text()
    assert (output / "criteria.png").read_bytes()[:4] == b"\x89PNG"
    table = (output / "criteria.md").read_text()
    assert capsys.readouterr().out.count("fold 0 checkpoint_") == 3

    other = tmp_path / "other"
    benchmark.main([*arguments(other, "-n", "2"), "-with", str(output)])
    assert "6 checkpoints of 2 run(s)" in (other / "criteria.md").read_text()
    assert (other / "criteria.csv").read_text() == (output / "criteria.csv").read_text().replace("bench,", "other,")
    absent = refused(benchmark.main, [*arguments(other, "-n", "2"), "-with", tmp_path / "none"])
    assert "criteria.csv does not exist: give an output folder of this command" in absent

    (output / "checkpoints" / f"{FOLDER}__fold_0__checkpoint_final.json").unlink()
    benchmark.main(arguments(output, "-n", "2"))
    assert capsys.readouterr().out.count("fold 0 checkpoint_") == 1 and (output / "criteria.md").read_text() == table

    (models / "checkpoint_epoch_0001.pth").unlink()
    (models / "checkpoint_epoch_0002.pth").unlink()
    assert "holds 1 kept checkpoint(s), at least 2 are needed" in refused(benchmark.main, arguments(output))


def test_the_best_is_bold_and_equal_values_are_not_all() -> None:
    row = {"trainer": "T", "plans": "P", "fold": "0", "checkpoint": "c", "epochs": 1}
    names = dict.fromkeys(unsupervised.COLUMNS, 0.5)
    values = [names | {"agreement": 0.9}, names | {"agreement": 0.7, "snd": math.nan}, names | {"agreement": 0.90001}]
    cells = [[cell.strip() for cell in line.split("|")[6:-1]]
             for line in unsupervised.table([row | value for value in values]).splitlines()[4:]]  # fmt: skip
    by_name = dict(zip(unsupervised.COLUMNS, zip(*cells, strict=True), strict=True))
    assert by_name["entropy"] == ("0.5000",) * 3, "nothing to choose by"
    assert by_name["agreement"] == ("**0.9000**", "0.7000", "**0.9000**"), "as good as it looks"
    assert by_name["snd"] == ("**0.5000**", "–", "**0.5000**")
    assert "**0" not in unsupervised.table([row | values[0]]), "alone it is not the best of anything"
