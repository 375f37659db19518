"""``nnUNetUDA_evaluate`` from the command line to the page, its overlays, and what bad input gets."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import write_volume
from PIL import Image
from scipy.ndimage import zoom
from support.pages import read_csv, read_page

from nnunet_uda.commands.evaluate import main, make_parser
from nnunet_uda.evaluation import draw_overlay, evaluate_case
from nnunet_uda.evaluation.overlays import choose_slices
from nnunet_uda.evaluation.runs import parse_runs, runs_and_bound
from nnunet_uda.evaluation.stacks import make_stack
from nnunet_uda.evaluation.tables import MEAN
from nnunet_uda.palette import label_colours

CASES = ["ct_1", "ct_2", "ct_3", "ct_4"]
RUNS = {"lower": 3, "ours": 1, "upper": 0}
"""Shift of each run's predictions, in voxels."""


write = partial(write_volume, spacing=(1.5, 1.0, 3.0), direction=(0, 1, 0, -1, 0, 0, 0, 0, 1))


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    """Raw dataset in the fold protocol (two folds of two cases) and three runs in ``preds``; returns ``tmp_path``."""
    raw = tmp_path / "raw" / "Dataset501_Test"
    rng = np.random.default_rng(0)
    for i, case in enumerate(CASES):
        labels = np.zeros((8, 20, 18), np.uint8)
        labels[2:6, 4:10, 4 : 10 + i % 2] = 2
        labels[3:5, 11:15, 3:9] = 1
        write(raw / "labelsTs" / f"{case}.nii.gz", labels)
        write(raw / "imagesTu" / f"{case}_0000.nii.gz", (100 * labels + rng.normal(0, 9, labels.shape)).astype("f4"))
        for run, shift in RUNS.items():
            for folder in (f"{run}/fold_{i // 2}", f"{run}_all"):
                write(tmp_path / "preds" / folder / f"{case}.nii.gz", np.roll(labels, shift + i % 2, axis=2))
    content = {"channel_names": {"0": "intensity"}, "labels": {"background": 0, "zulu": 2, "alpha": 1}}
    (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": 1, "file_ending": ".nii.gz"}))
    splits = [{"train": CASES[2:], "val": CASES[:2]}, {"train": CASES[:2], "val": CASES[2:]}]
    (raw / "splits_target.json").write_text(json.dumps(splits))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def evaluate(folder: Path, *arguments: str) -> dict:
    main([*map(str, arguments), "-o", str(folder / "out"), "-np", "1"])
    return json.loads((folder / "out" / "evaluation.json").read_text())


@pytest.fixture
def fails(dataset, refused) -> Callable[..., str]:
    """The message of a run that must fail and leave nothing behind."""

    def message(*arguments: object) -> str:
        before = sorted(dataset.iterdir())
        error = refused(main, [*arguments, "-o", dataset / "out", "-np", 1])
        assert sorted(dataset.iterdir()) == before
        return error

    return message


def test_fold_protocol_with_three_runs(dataset, capsys):
    runs = [f"{run}={dataset / 'preds' / run}/fold_{{fold}}" for run in RUNS]
    arguments = ("-d", "501", "-f", "0", "1", "-pred", *runs, "-lower", "lower", "-upper", "upper", "-slices", "2")
    result = evaluate(dataset, *arguments)

    raw = dataset / "raw" / "Dataset501_Test"
    assert list(result["structures"]) == ["zulu", "alpha"], "dataset.json's order"
    assert [(v["fold"], v["case"]) for v in result["volumes"]["ours"]] == [(i // 2, c) for i, c in enumerate(CASES)]
    for volume in result["volumes"]["ours"]:
        file = f"{volume['case']}.nii.gz"
        prediction = dataset / "preds" / "ours" / f"fold_{volume['fold']}" / file
        assert volume["metrics"] == evaluate_case(raw / "labelsTs" / file, prediction, {"zulu": 2, "alpha": 1})
    dice = {run: result["summary"][run][MEAN]["Dice"]["mean"] for run in RUNS}
    gap = result["gap_closed"]["ours"][MEAN]["Dice"]["percent"]
    assert gap == pytest.approx(100 * (dice["ours"] - dice["lower"]) / (dice["upper"] - dice["lower"]))
    assert result["folds"]["ours"]["over_folds"]["zulu"]["ASSD"]["n"] == 2
    pairs = [("lower", "ours", 4), ("lower", "upper", 4), ("ours", "upper", 4)]
    assert [(t["run_a"], t["run_b"], t["n"]) for t in result["wilcoxon"]] == pairs
    assert "too few pairs" in result["wilcoxon"][0]["note"]

    out = dataset / "out"
    rows = read_csv(out / "evaluation.csv")
    assert len(rows) == 3 * 4 * 2
    row = next(r for r in rows if (r["run"], r["case"], r["structure"]) == ("ours", "ct_3", "alpha"))
    assert float(row["dice"]) == result["volumes"]["ours"][2]["metrics"]["alpha"]["Dice"]
    assert row["fold"] == "1"
    markdown = (out / "evaluation.md").read_text()
    assert f"{dice['ours']:.3f}" in markdown
    printed = capsys.readouterr().out
    assert markdown.startswith(printed[:500])
    assert "| ours" in printed

    _, data = read_page(out / "evaluation.html")
    assert data["volumes"] == [f"{case} (fold {i // 2})" for i, case in enumerate(CASES)]
    assert data["values"]["Dice"]["alpha"][1][2] == float(row["dice"])
    assert [overlay["volume"] for overlay in data["overlays"]] == data["volumes"]
    for overlay in data["overlays"]:
        assert 1 <= len(overlay["chosen"]) <= 2 and overlay["depth"] == 8
        stack = overlay["stack"]
        assert stack["slices"] == list(range(8)), "the whole volume"
        assert list(stack["labels"]) == ["reference", *RUNS] and list(stack["wrong"]) == list(RUNS)
        for part in overlay["chosen"]:
            assert part["index"] in stack["slices"] and (out / "overlays" / part["file"]).is_file()
    assert len(list((out / "overlays").iterdir())) == sum(len(o["chosen"]) for o in data["overlays"])


def test_one_folder_for_all_folds_and_one_fold_alone(dataset, fails):
    folder = dataset / "preds" / "ours_all"
    result = evaluate(dataset, "-d", "Dataset501_Test", "-f", "0", "1", "-pred", folder, "--no_overlays")
    assert [v["case"] for v in result["volumes"]["ours_all"]] == CASES
    assert not (dataset / "out" / "overlays").exists()
    one = f"x={dataset}/preds/ours/fold_{{fold}}"
    result = evaluate(dataset, "-d", "501", "-f", "1", "-pred", one, "--no_overlays")
    assert [v["case"] for v in result["volumes"]["x"]] == CASES[2:], "a former evaluation is replaced"
    assert result["folds"] is None
    assert "ct_3.nii.gz, ct_4.nii.gz" in fails("-d", "501", "-f", "0", "-pred", folder)


@pytest.mark.parametrize(
    ("bound", "name", "runs"),
    [
        ("a", "a", ["a", "b"]),
        ("b=preds", "b", ["a", "b"]),
        ("c=preds/fold_{fold}", "c", ["a", "b", "c"]),
        ("preds", "preds", ["a", "b", "preds"]),
        ("nowhere", "nowhere", ["a", "b"]),
        (None, None, ["a", "b"]),
    ],
)
def test_a_bound_is_one_of_the_runs_or_one_more(tmp_path, monkeypatch, bound, name, runs):
    """As the trainers that nnUNetUDA_compare takes."""
    (tmp_path / "preds").mkdir()
    monkeypatch.chdir(tmp_path)
    words, found = runs_and_bound(["a=x", "b=preds"], bound)
    assert found == name and [run.name for run in parse_runs(words)] == runs


def test_bounds_need_not_be_given_twice(dataset):
    predictions = dataset / "preds" / "ours_all"
    bounds = ("-lower", f"low={predictions}", "-upper", f"up={predictions}")
    result = evaluate(dataset, "-d", "501", "-pred", f"a={predictions}", *bounds, "--no_overlays")
    assert result["bounds"] == {"lower": "low", "upper": "up"} and list(result["volumes"]) == ["a", "low", "up"]


def test_without_dataset(dataset, capsys, fails):
    raw, run = dataset / "raw" / "Dataset501_Test", f"a={dataset / 'preds' / 'ours_all'}"
    arguments = ("-r", raw / "labelsTs", "-djfile", raw / "dataset.json", "-pred", run)
    result = evaluate(dataset, *arguments)
    assert [v["fold"] for v in result["volumes"]["a"]] == [None] * 4
    assert result["dataset"] is None
    assert "they need the images' folder (-i)" in capsys.readouterr().out
    result = evaluate(dataset, *arguments, "-i", raw / "imagesTu", "-plane", "coronal", "-slices", "1")
    assert len(list((dataset / "out" / "overlays").glob("ct_*_coronal_*.png"))) == 4
    assert "-djfile is needed too" in fails("-r", raw / "labelsTs", "-pred", run)


def test_names_cannot_break_the_page(dataset):
    raw = dataset / "raw" / "Dataset501_Test"
    content = json.loads((raw / "dataset.json").read_text())
    name = "</script><img src=x> | &"
    content["labels"] = {"background": 0, name: 2, "alpha": 1}
    (raw / "dataset.json").write_text(json.dumps(content))
    evaluate(dataset, "-d", "501", "-pred", f"<b>={dataset / 'preds' / 'ours_all'}", "--no_overlays")
    markup, data = read_page(dataset / "out" / "evaluation.html")
    assert data["rows"][0] == name and "<b>" not in markup and "<img" not in markup
    header = next(x for x in (dataset / "out" / "evaluation.md").read_text().splitlines() if x.startswith("| metric"))
    assert "\\| &" in header


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-d", "501", "-pred", "{all}", "-f", "2"), "fold 2 does not exist"),
        (("-d", "501", "-pred", "{all}", "-f", "-1"), "fold -1 does not exist"),
        (("-d", "501", "-pred", "a={folds}"), "no fold is given: add -f"),
        (("-d", "501", "-pred", "{folds}", "-f", "0"), "give the run a name"),
        (("-d", "501", "-pred", "a={all}", "a={folds}"), "two runs are called a"),
        (("-d", "501", "-pred", "{all}", "-i", "{all}"), "no image ct_1_0000.nii.gz"),
        (("-d", "502", "-pred", "{all}"), "id 502"),
        (("-pred", "{all}"), "-r is needed too"),
    ],
)
def test_bad_arguments(dataset, fails, arguments, message):
    """Of which ``test_arguments`` has more."""
    places = {"{all}": str(dataset / "preds" / "ours_all"), "{folds}": str(dataset / "preds" / "ours" / "fold_{fold}")}
    for place, path in places.items():
        arguments = [argument.replace(place, path) for argument in arguments]
    assert message in fails(*arguments)


def test_unset_environment_variable_names_the_line_to_add(dataset, fails, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    assert "export nnUNet_raw=" in fails("-d", "501", "-pred", dataset / "preds" / "ours_all")


def test_missing_prediction_of_a_fold_and_no_splits(dataset, fails):
    (dataset / "preds" / "ours" / "fold_1" / "ct_4.nii.gz").unlink()
    arguments = ("-d", "501", "-f", "0", "1", "-pred", f"x={dataset}/preds/ours/fold_{{fold}}")
    message = fails(*arguments)
    assert "no prediction in" in message and "ct_4.nii.gz" in message
    (dataset / "raw" / "Dataset501_Test" / "splits_target.json").unlink()
    assert "splits_target.json does not exist" in fails(*arguments)


def test_bad_prediction_is_named_and_the_former_evaluation_survives(dataset, fails):
    arguments = ("-d", "501", "-pred", dataset / "preds" / "ours_all", "--no_overlays")
    former = evaluate(dataset, *arguments)
    path = dataset / "preds" / "ours_all" / "ct_2.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])
    assert str(path) in fails(*arguments)
    assert json.loads((dataset / "out" / "evaluation.json").read_text()) == former


def test_a_kill_between_the_renames_and_bad_input_lose_nothing(dataset, refused):
    aside = dataset / ".out.partial_0a1b2c3d" / "former" / "out"
    aside.mkdir(parents=True)
    (aside / "evaluation.json").write_text("the former")
    words = ["-d", "501", "-pred", dataset / "preds" / "ours_all", "-lower", "nobody", "-o", dataset / "out"]
    assert "-lower nobody" in refused(main, words), "found before any folder is made"
    assert (dataset / "out" / "evaluation.json").read_text() == "the former" and list(dataset.glob(".*")) == []


def test_foreign_output_folder_is_left_alone(dataset, fails):
    (dataset / "out").mkdir()
    (dataset / "out" / "thesis.txt").write_text("years of work")
    assert "holds no former evaluation" in fails("-d", "501", "-pred", dataset / "preds" / "ours_all")
    assert (dataset / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "a": [1, 2]}, "is a region"),
        ({"background": 0, "a": "1"}, "an integer"),
        ({}, "no structure"),
        ({"background": 1, "a": 0, "b": 2}, "the value 0 must be the background's and no other's"),
        ({"a": 0, "b": 1}, "the value 0 must be the background's and no other's"),
        ({"background": 0, "a": 1, "b": 1}, "one value for two structures"),
    ],
)
def test_bad_dataset_json(dataset, fails, labels, message):
    path = dataset / "raw" / "Dataset501_Test" / "dataset.json"
    path.write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    assert message in fails("-d", "501", "-pred", dataset / "preds" / "ours_all")


def test_output_that_cannot_be_written(dataset, refused):
    runs = dataset / "preds" / "ours_all"
    words = ["-d", "501", "-pred", runs, "-o", runs / "ct_1.nii.gz" / "out", "-np", 1]
    assert "cannot be written" in refused(main, words)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_overlay_draws_contours_on_the_image():
    image = np.tile(np.linspace(0, 1, 20), (10, 1))
    labels = np.zeros((10, 20), int)
    labels[2:8, 4:12] = 3
    picture = draw_overlay(image, labels, {3: (255, 0, 0)}, spacing=(2.0, 1.0), size=200, window=(0, 1))
    assert picture.shape == (200, 200, 3), "square pixels: 20 mm by 20 mm"
    assert picture.dtype == np.uint8
    red = (picture == (255, 0, 0)).all(axis=2)
    rows, columns = np.nonzero(red)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40, 159, 40, 119)
    assert not red[50:150, 50:110].any(), "only the contour is drawn"
    plain = draw_overlay(image, None, spacing=(2.0, 1.0), size=200, window=(0, 1))
    assert (plain[~red] == picture[~red]).all()
    assert plain[100, 5, 0] < plain[100, 195, 0]
    with pytest.raises(ValueError, match="2D slice"):
        draw_overlay(image, labels[:5])


def test_overlay_of_a_constant_image_and_default_colours():
    picture = draw_overlay(np.full((8, 8), 5.0), np.eye(8, dtype=int), size=64)
    assert {tuple(colour) for colour in picture.reshape(-1, 3)} == {(0, 0, 0), label_colours({"1": 1})[1]}


def test_slices_cover_the_reference_and_hold_the_worst():
    reference = np.zeros((30, 4, 4), int)
    reference[5:25] = 1
    prediction = reference.copy()
    prediction[27] = 1
    chosen = choose_slices(reference, [prediction], 5)
    assert [index for index, _ in chosen] == [7, 12, 17, 22, 27]
    assert chosen[-1][1] == ", most wrong voxels"
    assert [index for index, _ in choose_slices(reference, [reference], 4)] == [7, 12, 17, 22]
    assert choose_slices(0 * reference, [0 * reference], 4) == [(15, "")]
    assert [index for index, _ in choose_slices(0 * reference.swapaxes(0, 1), [prediction.swapaxes(0, 1)], 1)] == [0]


def test_overlay_of_a_flipped_scan_shows_anterior_up(tmp_path):
    """A marker at the anterior, right, superior corner is drawn top left, whatever the file's orientation."""
    from nnunet_uda.evaluation.overlays import OverlayTask, draw_case

    labels = np.zeros((6, 10, 10), np.uint8)
    labels[5, 0:3, 0:3] = 1  # LPS: superior, anterior, right
    image = sitk.GetImageFromArray(labels)
    for orientation in ("LPS", "RAS", "PIR"):
        turned = sitk.DICOMOrient(image, orientation)
        path = tmp_path / f"{orientation}.nii.gz"
        sitk.WriteImage(turned, str(path))
        for plane in ("axial", "coronal"):
            task = OverlayTask("x", path, {"reference": path}, {"a": 1}, tmp_path, 1, plane)
            stack = draw_case(task)["stack"]
            at = -1 if plane == "axial" else 1
            for picture in (tiles(stack, stack["image"])[at] > 99, tiles(stack, stack["labels"]["reference"])[at] > 0):
                rows, columns = np.nonzero(picture)
                assert rows.max() < picture.shape[0] / 2, (orientation, plane)
                assert columns.max() < picture.shape[1] / 2, (orientation, plane)


def tiles(stack: dict, sheet: str) -> np.ndarray:
    """``(N, height, width)`` of a sheet, as the page takes it apart."""
    whole = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet))))
    height, width, columns = stack["height"], stack["width"], stack["columns"]
    corners = [(i // columns * height, i % columns * width) for i in range(len(stack["slices"]))]
    return np.stack([whole[top : top + height, left : left + width] for top, left in corners])


def test_the_sheets_of_a_volume_are_its_slices():
    rng = np.random.default_rng(0)
    image = rng.normal(0, 1, (7, 30, 20)).astype(np.float32)
    labels = rng.choice([0, 4, 9], (7, 30, 20))
    run = np.where(labels == 9, 4, labels)
    stack = make_stack(image, {"reference": labels, "run": run}, [9, 4], (1, 1), (-1, 1), 10**7)
    assert stack["slices"] == list(range(7)) and stack["height"] == 128 and stack["width"] == 85
    shown = tiles(stack, stack["labels"]["reference"])
    places = np.array([0, *[0] * 3, 2, *[0] * 4, 1])
    for part, cut in zip(shown, labels, strict=True):
        assert (part[2::128, 2::85] == places[cut[0, 0]]).all() and set(np.unique(part)) == {0, 1, 2}
        assert (part == zoom(places[cut], (128 / 30, 85 / 20), order=0, mode="nearest", grid_mode=True)).all()
    assert stack["wrong"] == {"run": [int((cut == 9).sum()) for cut in labels]}
    small = make_stack(image, {"reference": labels}, [9, 4], (1, 1), (-1, 1), 3 * 128 * 85, kept=[0, 6])
    assert small["slices"] == [0, 1, 3, 5, 6] and tiles(small, small["image"]).shape == (5, 128, 85)
    flat = make_stack(0 * image, {"reference": labels}, [9, 4], (4, 1), (0, 0), 10**7)
    assert not tiles(flat, flat["image"]).any() and (flat["height"], flat["width"]) == (128, 21)


def test_the_former_name_of_an_option_still_works_with_a_hint(dataset, capsys, fails):
    folder = dataset / "preds" / "ours_all"
    evaluate(dataset, "-d", "501", "-p", folder, "--no_overlays")
    assert "are now -pred" in capsys.readouterr().err
    assert "-pred" in make_parser().format_help() and " -p " not in make_parser().format_help()
    assert "-pred is missing" in fails("-d", "501")
