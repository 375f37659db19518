"""One rule for names at every door, and text that pictures and tables show as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread
from support.folders import use_folders
from support.pages import read_csv

from nnunet_uda.commands import evaluate, fold_images, pseudo_labels
from nnunet_uda.data import convention
from nnunet_uda.dataset_conversion.case import Case, Group
from nnunet_uda.dataset_conversion.dataset import write_dataset
from nnunet_uda.dataset_conversion.quicklook import draw_quicklook
from nnunet_uda.errors import UDAError, command, escaped
from nnunet_uda.evaluation.compare_plot import Bar, draw_comparison
from nnunet_uda.evaluation.metrics import list_cases
from nnunet_uda.evaluation.overlays import OverlayTask, draw_case
from nnunet_uda.evaluation.report import write_csv
from nnunet_uda.evaluation.runs import parse_runs, read_labels
from nnunet_uda.evaluation.sweep_plot import Point, draw_sweeps
from nnunet_uda.evaluation.tables import MEAN, Spread, Volume
from nnunet_uda.names import MOST_BYTES, check_name, is_name, is_plain_name, spreadsheet_cell
from nnunet_uda.training.embedding_picture import Embeddings, write_embedding_picture
from nnunet_uda.training.pictures import plot_curves, write_panels
from nnunet_uda.training.prompt_pictures import write_prompt_maps

NO_NAMES = {
    "a line break": "a\nb",
    "an escape sequence": "\x1b[31mred",
    "a writing direction": "a\u202eb",
    "a mark without width": "a\u200fb",
    "a line separator": "a\u2028b",
    "half a character": "a\udc80",
    "nothing": "",
    "spaces": "  ",
    "too long": "ä" * (MOST_BYTES // 2 + 1),
    "a null": "a\0",
}
MATHS = [r"$\frac{a_$", "$_a_b$", r"\$x\alpha_", "_$", "a_{b}^$"]
"""Names that matplotlib's mathematics, or its legends, would stumble over."""


@pytest.fixture(params=NO_NAMES.values(), ids=NO_NAMES)
def bad(request) -> str:
    return request.param


def test_what_is_a_name(bad):
    assert not is_name(bad) and not is_plain_name(bad)
    with pytest.raises(UDAError) as error:
        check_name(bad, "-labels")
    assert str(error.value).startswith("-labels: ") and escaped(str(error.value)) == str(error.value)
    for good in ("left kidney", "Leber (ä)", "肝臓", *MATHS, "x" * MOST_BYTES):
        assert is_name(good)
    assert not is_name(3)
    assert all(is_name(path) and not is_plain_name(path) for path in ("a/b", "a\\b", "..", "."))


def test_a_message_steers_no_terminal(capsys):
    @command
    def main(argv):
        raise UDAError("the file \x1b[2Ja\u202eb\udc80 is\n  bad")

    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err == "ERROR: the file \\x1b[2Ja\\u202eb\\udc80 is\n  bad\n"


def test_text_that_the_terminal_lacks_ends_no_command(tmp_path, monkeypatch):
    @command
    def main(argv):
        print("0.9 ± 0.1 \udc80")

    with open(tmp_path / "out", "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        main([])
    assert (tmp_path / "out").read_text() == "0.9 \\xb1 0.1 \\udc80\n"


# --- doors -----------------------------------------------------------------------------------------------------------


def dataset_json(**changes: object) -> dict:
    content = {"channel_names": {"0": "intensity"}, "labels": {"background": 0, "liver": 1}, "numTraining": 1}
    domains = {"source_domain": "MR", "target_domain": "CT"}
    return {**content, "file_ending": ".nii.gz", "uda": domains, **changes}


def test_names_in_dataset_json(bad, tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(dataset_json(labels={"background": 0, bad: 1})))
    for read in (lambda: read_labels(path), lambda: convention.check_dataset_json(convention.read_json(path), path)):
        with pytest.raises(UDAError, match=r"dataset.json, 'labels': .* cannot be a name"):
            read()
    with pytest.raises(UDAError, match="'channel_names': .* cannot be a name"):
        convention.check_dataset_json(dataset_json(channel_names={"0": bad}), path)
    with pytest.raises(UDAError, match="target_domain"):
        convention.read_domains(dataset_json(uda={"source_domain": "MR", "target_domain": bad}))
    path.write_text(json.dumps(dataset_json(labels={"background": 0, MEAN: 1})))
    with pytest.raises(UDAError, match="as a row of every table"):
        read_labels(path)


def test_names_on_command_lines(bad, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    with pytest.raises(UDAError):
        parse_runs([f"{bad}=folder"])
    for main, words in (
        (evaluate.main, ["-d", f"Dataset501{bad or '/'}", "-p", "a=b", "-o", str(tmp_path / "out")]),
        (fold_images.main, ["-d", f"Dataset501{bad or '/'}", "-f", "0", "-o", str(tmp_path / "out")]),
        (pseudo_labels.main, ["-d", "1", "-i", str(tmp_path), "-o", f"Dataset502_{bad}"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 1
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["²", "9" * 5000, "-1", "1.5", ""])
def test_what_is_no_dataset_id(number):
    with pytest.raises(UDAError, match="-d takes a dataset's id"):
        convention.dataset_name(number)


@pytest.mark.parametrize("fold", ["²", "-1", "", "9" * 5000, "All"])
def test_what_is_no_fold(fold):
    assert not convention.is_fold(fold) and convention.is_fold("12") and convention.is_fold("all")


@pytest.mark.parametrize("what", ["structures", "channels", "domain", "name", "case"])
def test_every_converter_refuses_what_is_no_name(bad, what, tmp_path, monkeypatch):
    use_folders(monkeypatch, tmp_path)
    given = {"structures": "liver", "channels": "intensity", "domain": "MR", "name": "X", "case": "a"} | {what: bad}
    cases = [Case(given["case"], (tmp_path / "a.nii.gz",), tmp_path / "l.nii.gz")]
    groups = [Group(given["domain"], cases, "imagesTr", "labelsTr")]
    with pytest.raises(UDAError):
        write_dataset(1, given["name"], groups, [given["structures"]], [given["channels"]], adaptation=False)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_fits_no_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    cases = [Case("a", (tmp_path / "a.nii.gz",), tmp_path / "l.nii.gz")]
    groups = [Group("MR", cases, "imagesTr", "labelsTr")]
    with pytest.raises(UDAError, match=f"-name: .* cannot be a name. A name has 1 to {MOST_BYTES} bytes"):
        write_dataset(1, "x" * 255, groups, ["liver"], ["intensity"], adaptation=False)


@pytest.mark.parametrize("name", [b"a\xff", b"a\x1b[31m", b"a\nb"])
def test_cases_named_by_others(name, tmp_path):
    for ending, read in ((b"_0000.nii.gz", convention.case_files), (b".nii.gz", list_cases)):
        folder = tmp_path / read.__name__
        folder.mkdir()
        with open(bytes(folder) + b"/" + name + ending, "wb"):
            pass
        with pytest.raises(UDAError, match="a case: .* cannot be a name"):
            read(folder, ".nii.gz")


# --- pictures and tables ---------------------------------------------------------------------------------------------


def volume(path: Path, array: np.ndarray) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    return path


def drawn(path: Path) -> np.ndarray:
    return imread(path)


def test_no_text_in_pictures_is_taken_for_mathematics(tmp_path):
    rng = np.random.default_rng(0)
    image = volume(tmp_path / "i.nii.gz", rng.normal(0, 9, (3, 8, 9)).astype(np.float32))
    classes = np.zeros((3, 8, 9), np.uint8)
    classes[1, 2:5, 2:7] = np.arange(1, 6)
    label = volume(tmp_path / "l.nii.gz", classes)
    structures = {name: value for value, name in enumerate(MATHS, 1)}
    draw_quicklook([(f"imagesTr: {name}, {name}", image, label) for name in MATHS[:2]], MATHS, tmp_path / "1.png")
    for name in ("a_$b_c", "plain"):
        draw_case(OverlayTask(name, image, {"reference": label, MATHS[0]: label}, structures, tmp_path, 1))
    one = Spread(0.5, 0.1, 2)
    draw_comparison(tmp_path / "2.png", [Bar(MATHS[0], name, one, one, [0.4]) for name in MATHS], MATHS[1])
    points = [Point(name, name, one, one, one, 0, {"agreement": one}) for name in MATHS]
    draw_sweeps(tmp_path / "3.png", {MATHS[0]: points, MATHS[2]: points}, MATHS[1], MATHS[4])
    write_panels(tmp_path / "4.png", [[(name, classes[1], classes[1]) for name in MATHS]], MATHS, MATHS[0])
    plot_curves(tmp_path / "5.png", {name: [1.0, 2.0] for name in MATHS})
    domains = {name: Embeddings(rng.normal(size=(9, 3)), np.arange(9) % 5, np.eye(5)[:, :3]) for name in
               ("source", "target")}  # fmt: skip
    write_embedding_picture(tmp_path / "6.png", domains, domains, MATHS)
    maps = np.abs(rng.normal(size=(1, 5, 8, 8)))
    write_prompt_maps(tmp_path / "7.png", maps[0, :1], maps[0, :1], maps[0, :1] > 1, maps, MATHS, maps[0, :1], 0.5)
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 9 and all(drawn(path).std() > 0 for path in pictures)


def test_a_structure_that_begins_with_an_underscore_stands_in_the_legend(tmp_path):
    image = volume(tmp_path / "i.nii.gz", np.arange(64, dtype=np.float32).reshape(4, 4, 4))
    label = volume(tmp_path / "l.nii.gz", np.ones((4, 4, 4), np.uint8))
    for name in ("_", "a"):
        draw_quicklook([("title", image, label)], [f"{name}liver"], tmp_path / f"{name}.png")
    legends = [drawn(tmp_path / f"{name}.png")[-30:] for name in ("_", "a")]
    assert all((legend < 0.9).any() for legend in legends)


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", " =", "\uff1d"])
def test_no_spreadsheet_takes_a_name_for_a_formula(first, tmp_path):
    name = f"{first}HYPERLINK(A1)"
    assert spreadsheet_cell(name) == f"'{name}"
    scores = {"Dice": 0.5, "ASSD": 1.0, "HD95": 2.0, "n_reference": 3, "n_prediction": 4}
    write_csv(tmp_path / "e.csv", {name: [Volume(name, {name: scores})]})
    [row] = read_csv(tmp_path / "e.csv")
    assert [row[key] for key in ("run", "case", "structure")] == [f"'{name}"] * 3
    assert (row["dice"], row["voxels_reference"]) == ("0.5", "3")


@pytest.mark.parametrize("value", ["-0.5", "+1e3", -0.5, None, "liver", "a=b", ""])
def test_numbers_and_other_text_stay_as_they_are(value):
    assert spreadsheet_cell(value) == value
