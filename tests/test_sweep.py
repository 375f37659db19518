"""``nnUNetUDA_sweep``: real tiny runs, going on after a stop, what is refused, and the tables' arithmetic."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_raw_dataset
from matplotlib.image import imread
from support.jobs import DATASET
from support.pages import read_csv

from nnunet_uda import figures
from nnunet_uda.commands.sweep import main
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation import sweep_plot
from nnunet_uda.evaluation.metrics import evaluate_folder
from nnunet_uda.evaluation.runs import Labels
from nnunet_uda.evaluation.sweep_plot import Point
from nnunet_uda.evaluation.tables import Spread, Volume, spread
from nnunet_uda.experiments import sweep
from nnunet_uda.experiments.grid import check_run
from nnunet_uda.experiments.job import Score, TargetTest, find_target_test, find_trainer, lay_out_images
from nnunet_uda.experiments.sweep import Value, collect_points, plan_runs, sweep_table, write_tables

LABELS = {"left": 1, "right": 2}


WORDS = ["-d", "501", "-tr", "SourceOnlyTrainer", "-p", "tiny", "-device", "cpu", "-np", "1"]


def calls(out: Path) -> dict[str, list[str]]:
    """The commands of each run so far, from its log."""
    logs = {path.parent.name: path.read_text() for path in (out / "runs").glob("*/log.txt")}
    wanted = r"^\$ nnUNetUDA_(train)|^\[.+\] (predict)ing"
    return {name: ["".join(words) for words in re.findall(wanted, text, re.M)] for name, text in logs.items()}


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped_and_a_failing_run_stops_no_other(
    in_workspace, tmp_path, monkeypatch, refused
):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    out = tmp_path / "out"
    words = [*WORDS, "-o", str(out), "-vary", "segmentation_loss", "dice_ce", "dice"]
    error = refused(main, [*words[:-4], "-vary", "segmenter_learning_rate", "1e38", "0.001", *words[-4:]])
    bad, base, dice = "tiny_segmenter_learning_rate_1e+38_seed_7", "tiny_seed_7", "tiny_segmentation_loss_dice_seed_7"
    assert "1 of 3 runs failed" in error and str(out / "runs" / bad / "log.txt") in error and "became nan" in error
    assert calls(out) == {bad: ["train"], base: ["train", "predict"], dice: ["train", "predict"]}

    rows = read_csv(out / "sweep.csv")
    assert [(row["setting"], row["value"], row["plans"]) for row in rows] == [
        ("segmenter_learning_rate", "1e+38", bad), ("segmenter_learning_rate", "0.001", base),
        ("segmentation_loss", "dice_ce", base), ("segmentation_loss", "dice", dice),
    ]  # fmt: skip
    assert rows[0]["dice"] == rows[0]["validation_pseudo_dice"] == ""
    reference = in_workspace.raw / DATASET / "labelsTs"
    for row in rows[1:]:
        scores = evaluate_folder(reference, out / "runs" / row["plans"] / "predictions", LABELS).values()
        expected = sum(case[name]["Dice"] for case in scores for name in LABELS) / 4
        assert float(row["dice"]) == pytest.approx(expected)
        fold = tmp_path / "results" / DATASET / f"SourceOnlyTrainer__{row['plans']}__2d" / "fold_0"
        logging = torch.load(fold / "checkpoint_final.pth", weights_only=False)["logging"]
        assert float(row["validation_pseudo_dice"]) == pytest.approx(logging["mean_fg_dice"][-1])
    assert imread(out / "sweep.png").std() > 0
    text = (out / "sweep.md").read_text()
    assert sweep.WARNING in text and sweep.CRITERIA in text and f"- {bad}: ERROR: the loss term" in text

    results = tmp_path / "results" / DATASET
    fold = results / f"SourceOnlyTrainer__{base}__2d" / "fold_0"
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
    whole = (out / "runs" / dice / "predictions" / "ct_Ts01.nii.gz").read_bytes()
    (out / "runs" / dice / "predictions" / "ct_Ts01.nii.gz").unlink()
    (out / "runs" / dice / "predictions.partial").mkdir()
    (out / "runs" / dice / "predictions.partial" / "cut.nii.gz").touch()
    main(words)
    assert calls(out)[base] == ["train", "predict", "train", "predict"]
    assert f"-p {base} -device cpu --c\n" in (out / "runs" / base / "log.txt").read_text()
    assert calls(out)[dice] == ["train", "predict", "predict"]
    assert (out / "runs" / dice / "predictions" / "ct_Ts01.nii.gz").read_bytes() == whole
    assert not (out / "runs" / dice / "predictions.partial").exists()

    before, numbers = calls(out), read_csv(out / "sweep.csv")
    assert numbers == rows[2:]
    main(words)
    assert calls(out) == before and read_csv(out / "sweep.csv") == numbers


def test_nothing_made_otherwise_is_taken_for_a_part_of_the_sweep(in_workspace, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(sweep, "run_jobs", lambda *_: pytest.fail("nothing must be trained"))
    plans = in_workspace.preprocessed / DATASET / "tiny_mirror_false_seed_7.json"

    def message(out: str, *options: str) -> str:
        return refused(main, [*WORDS, "-o", tmp_path / out, "-vary", "mirror", "false", *options])

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "is not empty and holds no former sweep" in message("full")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sweep.json").write_text('{"fold": "1"}')
    assert "holds a sweep of {'fold': '1'}" in message("other")

    tiny = json.loads((plans.parent / "tiny.json").read_text())
    plans.write_text(json.dumps(tiny))
    assert f"{plans} exists, and differs from what tiny now gives" in message("new")
    plans.unlink()
    trained = tmp_path / "results" / DATASET / "SourceOnlyTrainer__tiny_mirror_false_seed_7__2d" / "plans.json"
    trained.parent.mkdir(parents=True)
    trained.write_text(json.dumps(tiny))
    assert f"{trained} exists, and differs" in message("new")
    assert not plans.exists() and not (tmp_path / "new").exists()

    tiny["configurations"]["2d"]["data_identifier"] = "elsewhere"
    (plans.parent / "moved.json").write_text(json.dumps(tiny))
    assert "elsewhere does not exist. First: nnUNetv2_preprocess" in message("new", "-p", "moved")
    (plans.parent / "moved.json").unlink()


def test_plans_in_results_that_a_kill_cut_short_are_mended(in_workspace, tmp_path):
    tiny = json.loads((in_workspace.preprocessed / DATASET / "tiny.json").read_text())
    trained = tmp_path / "results" / DATASET / "SourceOnlyTrainer__tiny__2d" / "plans.json"
    trained.parent.mkdir(parents=True)
    trained.write_text("{")
    check_run(DATASET, "SourceOnlyTrainer", tiny, "2d", "tiny")
    assert json.loads(trained.read_text()) == tiny


def test_equal_settings_are_one_run(in_workspace):
    base = json.loads((in_workspace.preprocessed / DATASET / "tiny.json").read_text())
    vary = [["cisfa.foreground_weight", "1", "2.0"], ["segmenter_optimizer", "sgd", "adam"]]
    sweeps, runs = plan_runs(base, "tiny", "2d", find_trainer("CISFATrainer"), vary, [7, 8])
    assert list(runs) == [
        "tiny_foreground_weight_1_seed_7", "tiny_seed_7", "tiny_segmenter_optimizer_sgd_seed_7",
        "tiny_foreground_weight_1_seed_8", "tiny_seed_8", "tiny_segmenter_optimizer_sgd_seed_8",
    ]  # fmt: skip
    assert runs["tiny_seed_7"].plans == base | {"plans_name": "tiny_seed_7"}, "defaults and PLANS' own values"
    assert runs["tiny_seed_8"].plans["uda"] == base["uda"] | {"seed": 8}
    uda = runs["tiny_foreground_weight_1_seed_7"].plans["uda"]
    assert uda == base["uda"] | {"cisfa": base["uda"]["cisfa"] | {"foreground_weight": 1.0}}
    assert [(v.text, v.in_plans, v.runs) for v in sweeps["segmenter_optimizer"]] == [
        ("sgd", False, ["tiny_segmenter_optimizer_sgd_seed_7", "tiny_segmenter_optimizer_sgd_seed_8"]),
        ("adam", True, ["tiny_seed_7", "tiny_seed_8"]),
    ]
    assert sweeps["cisfa.foreground_weight"][1].runs == ["tiny_seed_7", "tiny_seed_8"], "the default, stated or not"

    del base["uda"]["seed"]
    _, runs = plan_runs(base, "tiny", "2d", find_trainer("CISFATrainer"), [["mirror", "auto", "false"]], None)
    assert list(runs) == ["tiny_unchanged", "tiny_mirror_false"]

    def prompts(*texts: str) -> list[str]:
        return list(
            plan_runs(base, "tiny", "2d", find_trainer("UUDSTrainer"), [["uuds.domain_prompt", *texts]], None)[1]
        )

    assert prompts("a CT/scan") == ["tiny_domain_prompt_a-CT-scan"]
    with pytest.raises(UDAError, match="two runs would both be called tiny_domain_prompt_a-b"):
        prompts("a b", "a/b")
    long = prompts("w" * 300 + "1", "w" * 300 + "2")
    assert len(set(long)) == 2 and max(map(len, long)) < 100


def volume(case: str, left: tuple[float, float], right: tuple[float, float]) -> Volume:
    scores = zip(LABELS, (left, right), strict=True)
    return Volume(case, {name: {"Dice": dice, "ASSD": assd, "HD95": assd} for name, (dice, assd) in scores})


def test_tables_against_values_by_hand(tmp_path):
    nan = math.nan
    scores = {
        # volumes' means: Dice 0.7 and 0.9, ASSD 3 and 1; over cases 0.8 and 2
        "a_1": Score(
            [volume("x", (0.6, 4), (0.8, 2)), volume("y", (0.9, 1), (0.9, 1))], 0.5, criteria={"agreement": 0.8}
        ),
        # an empty prediction: Dice 0, no distance. Volumes' means: 0.4 and 0.8, 2 and 4; over cases 0.6 and 3
        "a_2": Score(
            [volume("x", (0, nan), (0.8, 2)), volume("y", (0.8, 4), (0.8, 4))], 0.7, criteria={"agreement": 0.6}
        ),
        # nothing found anywhere: no distance at all
        "b_1": Score([volume("x", (0, nan), (0, nan)), volume("y", (0, nan), (0, nan))], nan, criteria={"snd": 1.5}),
    }
    values = {"method.setting": [Value(0.7, "0.7", False, ["a_1", "a_2"]), Value(0.9, "0.9", True, ["b_1", "b_2"])]}
    runs = {f"{letter}_{seed}": sweep.PlannedRun(f"{letter}_{seed}", {}, seed) for seed in (1, 2) for letter in "ab"}
    setup = {"dataset": DATASET, "configuration": "2d", "fold": "0", "trainer": "T", "plans": "P"}
    labels = Labels(LABELS, None, ".nii.gz")
    test = TargetTest(["x", "y"], tmp_path, labels, None)
    planned = sweep.Sweep(tmp_path, setup, test, values, runs)
    points = write_tables(planned, scores, {"b_2": "it broke (log: L)"})["method.setting"]

    root = math.sqrt(0.02)  # deviation of two values that differ by 0.2: 0.2 / sqrt(2)
    assert points[0].dice == Spread(pytest.approx(0.7), pytest.approx(root), 2)
    assert points[0].assd == Spread(pytest.approx(2.5), pytest.approx(math.sqrt(0.5)), 2)
    assert points[0].pseudo_dice == Spread(pytest.approx(0.6), pytest.approx(root), 2)
    assert (points[0].undefined, points[1].undefined) == (1, 4)

    text = (tmp_path / "sweep.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 0")]
    assert rows == [
        ["0.7", "0.700 ± 0.141", "2.50 ± 0.71 (1 undefined)", "0.700 ± 0.141", "– (n = 0)", "0.600 ± 0.141", "2"],
        ["0.9 (as in the plans)", "0.000", "– (n = 0, 4 undefined)", "– (n = 0)", "1.500", "– (n = 0)", "1 of 2"],
    ]
    [header] = [line for line in text.splitlines() if line.startswith("| value")]
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [
        "target Dice", "target ASSD (mm)", "agreement ↑", "snd ↑", "validation pseudo Dice", "n",
    ]  # fmt: skip
    assert "chosen here, then by agreement" in text and "chosen by it" not in text
    assert "- b_2: it broke (log: L)" in text and "- a_1" not in text

    rows = {row["plans"]: row for row in read_csv(tmp_path / "sweep.csv")}
    assert list(rows) == ["a_1", "a_2", "b_1", "b_2"]
    assert [float(rows["a_2"][key]) for key in ("dice", "assd_mm", "dice_left", "assd_mm_left")] == pytest.approx(
        [0.6, 3, 0.4, 4]
    )
    assert (rows["a_2"]["seed"], rows["a_2"]["value"], rows["a_2"]["distances_undefined"]) == ("2", "0.7", "1")
    assert [rows[name]["agreement"] for name in rows] == ["0.8", "0.6", "", ""] and rows["b_1"]["snd"] == "1.5"
    assert rows["b_1"]["assd_mm"] == rows["b_1"]["validation_pseudo_dice"] == rows["b_2"]["dice"] == ""


def test_agreement_stands_before_the_other_criteria_even_where_it_was_not_measured():
    measured = {"entropy": 0.1, "foreground_entropy": 0.2, "mutual_information": 0.3, "snd": 0.4}
    scores = {"a": Score([volume("x", (1, 1), (1, 1))], 0.5, criteria=measured)}
    values = [Value(1, "1", False, ["a"])]
    table = sweep_table("s", values, collect_points(values, scores), scores)
    assert table["header"][3:8] == [
        "agreement ↑", "entropy ↓", "foreground_entropy ↓", "mutual_information ↑", "snd ↑",
    ]  # fmt: skip
    assert table["rows"][0][3:8] == ["– (n = 0)", "0.100", "0.200", "0.300", "0.400"]


def test_deviation_needs_two_seeds():
    one = spread([0.5, math.nan])
    assert (one.mean, one.n) == (0.5, 1) and math.isnan(one.std)
    none = spread([])
    assert math.isnan(none.mean) and none.n == 0


def test_a_fold_protocol_predicts_exactly_the_folds_test_images(tmp_path, monkeypatch):
    raw = make_raw_dataset(tmp_path / "raw", num_source=2, num_target=3, num_test=0, size=(2, 6, 6))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    with pytest.raises(UDAError, match=r"imagesTs holds no image, and fold 0 has no test images"):
        find_target_test(raw, "0")
    splits = [{"train": ["ct_Tu00", "ct_Tu01"], "val": ["ct_Tu02"]}, {"train": ["ct_Tu02"], "val": ["ct_Tu01"]}]
    (raw / "splits_target.json").write_text(json.dumps(splits))
    (raw / "labelsTs").mkdir()
    shutil.copy(raw / "labelsTr" / "mr_Tr00.nii.gz", raw / "labelsTs" / "ct_Tu01.nii.gz")
    with pytest.raises(UDAError, match=r"no reference in .*labelsTs for the test case\(s\) ct_Tu02"):
        find_target_test(raw, "0")
    with pytest.raises(UDAError, match=r"holds no image, and fold all"):
        find_target_test(raw, "all")

    test = find_target_test(raw, "1")
    assert (test.cases, test.fold) == (["ct_Tu01"], 1)
    folder = tmp_path / "out" / "images"
    folder.mkdir(parents=True)
    (folder / "ct_Tu02_0000.nii.gz").touch()
    for _ in range(2):
        assert lay_out_images(raw, test, folder) == folder
        assert [path.name for path in folder.iterdir()] == ["ct_Tu01_0000.nii.gz"]
    assert lay_out_images(raw, TargetTest(["x"], raw, test.labels, None), folder) == raw / "imagesTs"


def test_without_test_images_the_targets_training_images_with_a_reference_are_the_test(tmp_path):
    raw = make_raw_dataset(tmp_path, num_source=2, num_target=3, num_test=0, size=(2, 6, 6))
    (raw / "labelsTs").mkdir()
    shutil.copy(raw / "labelsTr" / "mr_Tr00.nii.gz", raw / "labelsTs" / "ct_Tu01.nii.gz")
    test = find_target_test(raw, "all")
    assert (test.cases, test.fold, test.transductive) == (["ct_Tu01"], None, True)
    assert lay_out_images(raw, test, tmp_path / "none") == raw / "imagesTu"
    shutil.copy(raw / "labelsTr" / "mr_Tr00.nii.gz", raw / "labelsTs" / "ct_Ts00.nii.gz")
    with pytest.raises(UDAError, match=r"no image in .*imagesTu for the reference\(s\) ct_Ts00"):
        find_target_test(raw, "all")


def test_test_images_and_references_must_belong_together(tmp_path):
    raw = make_raw_dataset(tmp_path, num_source=2, num_target=1, num_test=2, size=(2, 6, 6))
    assert (find_target_test(raw, "0").cases, find_target_test(raw, "0").fold) == (["ct_Ts00", "ct_Ts01"], None)
    image = raw / "imagesTs" / "ct_Ts01_0000.nii.gz"
    image.rename(tmp_path / image.name)
    with pytest.raises(UDAError, match=r"no image in .*imagesTs for the reference\(s\) ct_Ts01"):
        find_target_test(raw, "0")


def test_the_dice_axis_is_not_a_magnifying_glass(tmp_path, monkeypatch):
    axes = {}
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: axes.update(enumerate(figure.axes)))
    small = [Spread(value, 0.001, 2) for value in (0.003, 0.019)]
    points = [Point(i, str(i), cell, Spread(60 + i, 1, 2), cell, 0, {"agreement": cell})
              for i, cell in enumerate(small)]  # fmt: skip
    sweep_plot.draw_sweeps(tmp_path / "s.png", {"setting": points}, "title", "note")
    upper, lower = axes.values()
    assert upper.get_ylim() == (0, 1) and lower.get_ylim()[0] == 0
    assert [text.get_text() for text in upper.figure.legends[0].texts][1] == "agreement (needs none)"
