"""``nnUNetUDA_quality``: its report, its page, and what it says where something is missing."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import make_trainer, sampled, written_model
from matplotlib.image import imread
from support.pages import read_csv, read_page

from nnunet_uda.commands import quality as command
from nnunet_uda.evaluation.prediction import unlabelled_images
from nnunet_uda.evaluation.quality import estimate_quality
from nnunet_uda.evaluation.quality_page import thumbnail, write_page
from nnunet_uda.quality.calibration import Calibration
from nnunet_uda.training.expectation import seconds_for


@pytest.fixture
def model(in_workspace) -> Path:
    """A model's folder: the weights of a training that was begun."""
    trainer = make_trainer("RandomStyleTrainer")
    trainer.initialize()
    trainer.do_split()
    return written_model(trainer)


def scans(workspace, tmp_path: Path, number: int = 2) -> Path:
    """Some of the target's scans in a folder of their own."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for path in sorted((workspace.raw / "Dataset501_Blobs" / "imagesTs").iterdir())[:number]:
        shutil.copyfile(path, folder / path.name)
    return folder


def test_a_report_of_predictions_and_a_calibration_made_on_the_way(model, in_workspace, tmp_path, capsys):
    predictions = tmp_path / "predictions"  # as good as they get, and one that lacks a structure
    shutil.copytree(in_workspace.raw / "Dataset501_Blobs" / "labelsTs", predictions)
    folder = scans(in_workspace, tmp_path)
    output = tmp_path / "quality"
    arguments = ["-m", str(model), "-i", str(folder), "-pred", str(predictions), "-o", str(output), "-device", "cpu"]
    command.main(arguments)
    said = capsys.readouterr().out
    assert "does not exist: calibrating on 1 labelled cases that it has not trained on" in said
    assert (model / "fold_0" / "quality.json").is_file()
    report = json.loads((output / "quality_report.json").read_text())
    assert [case["case"] for case in report["cases"]] and report["predictions"] == str(predictions)
    for case in report["cases"]:
        assert set(case["structures"]) == {"left", "right"}
        for each in (case["overall"], *case["structures"].values()):
            assert 0 <= each["low"] <= each["dice"] <= each["high"] <= 1
            assert each["verdict"] in ("good", "look at it", "failed")
        assert case["structures"]["left"]["reasons"]
    rows = read_csv(output / "quality.csv")
    assert len(rows) == 2 * 3 and {row["structure"] for row in rows} == {"all", "left", "right"}
    assert "data:image/jpeg;base64," not in (page := (output / "quality.html").read_text()) or "picture" in page
    assert "no label of these scans was read" in page
    command.main(arguments)  # a second time the calibration is there, and the report is replaced
    assert "calibrating" not in capsys.readouterr().out


def test_estimates_of_the_networks_own_segmentations_from_python(model, in_workspace, tmp_path):
    dataset_json = json.loads((model / "dataset.json").read_text())
    cases = unlabelled_images(scans(in_workspace, tmp_path, 1), dataset_json)
    (found,) = estimate_quality(model, cases).values()
    assert found.case in cases and set(found.structures) == {"left", "right"}
    assert set(found.scan) == {"intensities", "field"}


def test_without_source_cases_the_estimate_is_from_what_is_there(model, in_workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_preprocessed")
    folder = scans(in_workspace, tmp_path, 1)
    output = tmp_path / "quality"
    command.main(["-m", str(model), "-i", str(folder), "-o", str(output), "-device", "cpu", "--no_pictures"])
    said = capsys.readouterr().out
    assert "WARNING" in said and "nnUNet_preprocessed" in said and "Not calibrated on this model" in said
    (case,) = json.loads((output / "quality_report.json").read_text())["cases"]
    present = [each for name, each in case["structures"].items() if case["signals"][name]["present"]]
    assert all((each["low"], each["high"]) == (0, 1) for each in present)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "x"], "-d and -tr are needed"),
        (["-m", "nowhere", "-i", "x"], "nowhere does not exist: no such model"),
        (["-m", "MODEL"], "without -d, -i is needed too"),
        (["-m", "MODEL", "-f", "3", "-i", "SCANS"], "fold_3/checkpoint_final.pth does not exist"),
        (
            ["-m", "MODEL", "-i", "SCANS", "-pred", "EMPTY"],
            "holds no ct_Ts00.nii.gz, expected a prediction of every scan",
        ),
        (["-m", "MODEL", "-i", "EMPTY"], "holds no image"),
        (["-m", "MODEL", "-i", "SCANS", "-o", "SCANS"], "holds no former evaluation"),
    ],
)
def test_what_is_missing_is_said(arguments, message, model, in_workspace, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    places = {"MODEL": str(model), "SCANS": str(scans(in_workspace, tmp_path)), "EMPTY": str(tmp_path / "empty")}
    words = [places.get(word, word) for word in arguments]
    words += [] if "-o" in words else ["-o", str(tmp_path / "quality")]
    assert message in refused(command.main, [*words, "-device", "cpu"])
    assert not (tmp_path / "quality").exists()


def test_scans_of_another_channel_count_are_refused(model, in_workspace, tmp_path, refused):
    folder = scans(in_workspace, tmp_path, 1)
    shutil.copyfile(folder / "ct_Ts00_0000.nii.gz", folder / "ct_Ts00_0001.nii.gz")
    words = ["-m", model, "-i", folder, "-o", tmp_path / "q", "-device", "cpu"]
    assert "the network reads 1 channel(s)" in refused(command.main, words)


def test_a_prediction_of_another_dataset_is_refused(model, in_workspace, tmp_path, refused):
    folder = scans(in_workspace, tmp_path, 1)
    (tmp_path / "predictions").mkdir()
    label = sitk.ReadImage(str(in_workspace.raw / "Dataset501_Blobs" / "labelsTs" / "ct_Ts00.nii.gz"))
    sitk.WriteImage(label * 3, str(tmp_path / "predictions" / "ct_Ts00.nii.gz"))
    words = ["-m", model, "-i", folder, "-p", tmp_path / "predictions", "-o", tmp_path / "q", "-device", "cpu"]
    said = refused(command.main, words)
    assert "ct_Ts00.nii.gz holds the value(s) 3, 6; expected" in said
    assert "the predictions of nnUNetUDA_quality are now -pred" in said, "-p was their name"


def test_several_folds_are_asked_and_how_far_they_agree_counts(model, in_workspace, tmp_path):
    shutil.copytree(model / "fold_0", model / "fold_1")
    path = model / "fold_1" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    for weight in content["network_weights"].values():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std())
    torch.save(content, path)
    cases = unlabelled_images(scans(in_workspace, tmp_path, 1), json.loads((model / "dataset.json").read_text()))
    (found,) = estimate_quality(model, cases, folds=("0", "1")).values()
    others = [signals["others"] for signals in found.signals.values()]
    assert all(set(each) == {"fold_0", "fold_1"} for each in others)
    for name, signals in found.signals.items():
        if signals["present"]:
            assert found.structures[name].dice <= min(signals["others"].values()) + 1e-9


# -- a training --------------------------------------------------------------------------------------------------------


@sampled("name", ["CASTTrainer", "CISFATrainer"], "CASTTrainer")
def test_a_training_writes_its_calibration_and_says_what_to_expect(in_workspace, name):
    trainer = make_trainer(name, quality_volumes=1, num_epochs=1)
    trainer.run_training()
    content = json.loads(Path(trainer.output_folder, "quality.json").read_text())
    made = Calibration.from_json(content, "quality.json")
    assert made.structures == ["left", "right"] and made.shapes[0]["present"] == 1
    assert made.about["styles"] == 6 and "not trained on" in made.about["calibrated_on"]
    assert set(made.scans) == {"source", "target"}
    (log,) = Path(trainer.output_folder).glob("training_log_*.txt")
    assert "Expected on the target" in log.read_text()
    assert trainer.plain_network.decoder.deep_supervision


def test_a_training_ends_well_where_the_estimate_cannot_be_made(in_workspace, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("nnunet_uda.training.expectation.calibrate_trainer", fails)
    trainer = make_trainer("RandomStyleTrainer", quality_volumes=1, num_epochs=1)
    trainer.run_training()
    folder = Path(trainer.output_folder)
    assert (folder / "checkpoint_final.pth").is_file() and not (folder / "quality.json").exists()
    (log,) = folder.glob("training_log_*.txt")
    assert "WARNING: no quality estimate was made: out of memory. nnUNetUDA_quality makes it later" in log.read_text()
    assert trainer.plain_network.decoder.deep_supervision


def test_the_estimate_takes_a_small_part_of_the_trainings_time():
    assert [seconds_for(training) for training in (0, 100, 2000, 1e6)] == [30, 30, 100, 600]


def test_a_training_begun_anew_forgets_the_former_calibration(model):
    trainer = make_trainer("RandomStyleTrainer")
    trainer.initialize()
    calibration = Path(trainer.output_folder, "quality.json")
    calibration.write_text("{}")
    trainer.save_checkpoint(str(Path(trainer.output_folder, "checkpoint_latest.pth")))
    assert not calibration.exists()


# -- the page ----------------------------------------------------------------------------------------------------------


def made_up_cases(number: int) -> list[dict]:
    rng = np.random.default_rng(0)
    cases = []
    for index in range(number):
        structures = {}
        for name in ("liver", "left <kidney>"):
            dice = float(rng.uniform(0, 1))
            verdict = "failed" if dice < 0.5 else "good" if dice > 0.75 else "look at it"
            reasons = ["too small: 3 ml, the source's labels have 80 to 150 ml"] * (verdict != "good")
            structures[name] = {"dice": dice, "low": max(0, dice - 0.2), "high": min(1, dice + 0.1),
                                "verdict": verdict, "reasons": reasons}  # fmt: skip
        worst = min(structures.values(), key=lambda each: each["dice"])
        cases.append({"case": f"case_{index:03d}", "overall": worst, "structures": structures,
                      "signals": {name: {"volume": 1.5e6} for name in structures}})  # fmt: skip
    return cases


def made_up_page(path: Path, number: int) -> Path:
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, 24),) * 3, indexing="ij")
    label = np.where(x**2 + y**2 + z**2 < 0.3, np.where(x > 0, 1, 2), 0)
    structures = {"liver": 1, "left <kidney>": 2}
    strip = thumbnail(np.cos(3 * x) + label, label, (3.0, 1.0, 1.0), structures)
    cases = made_up_cases(number)
    write_page(path, "Quality of a model", ["A <note>."], cases, structures, {case["case"]: strip for case in cases})
    return path


def test_a_thumbnail_shows_three_planes_with_contours():
    label = np.zeros((6, 20, 20), int)
    label[2:4, 5:15, 5:15] = 1
    picture = imread(io.BytesIO(base64.b64decode(thumbnail(label * 1.0, label, (5, 1, 1), {"a": 1}, 60))), "jpeg")
    assert picture.shape == (60, 60 + 40 + 40 + 2 * 4, 3)
    coloured = np.ptp(picture.astype(int), axis=2) > 40
    thirds = np.array_split(coloured, 3, axis=1)
    assert all(part.any() for part in thirds)


def test_the_page_asks_for_nothing_from_elsewhere_and_escapes_names(tmp_path):
    path = made_up_page(tmp_path / "quality.html", 3)
    markup, data = read_page(path)
    assert "left <kidney>" in data["structures"] and "left <kidney>" not in path.read_text()
    assert "A &lt;note&gt;." in markup


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium by playwright, where both are installed."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        try:
            opened = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


def test_five_hundred_cases_open_fast_filter_and_sort(browser, tmp_path):
    path = made_up_page(tmp_path / "quality.html", 500)
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    assert page.locator("article").count() < 200  # the rest comes as one scrolls
    worst = page.locator("article h2").first.inner_text()
    page.select_option("#order", "best")
    best = page.locator("article h2").first.inner_text()
    assert float(worst.rsplit(" ", 1)[1]) < 0.1 and float(best.rsplit(" ", 1)[1]) > 0.8
    page.select_option("#structure", "liver")
    page.select_option("#verdict", "failed")
    expected = sum(case["structures"]["liver"]["verdict"] == "failed" for case in made_up_cases(500))
    assert page.locator("#shown").inner_text() == f"{expected} of 500 cases"
    assert page.locator("article").first.locator("tr").count() == 2
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_function("document.querySelectorAll('article').length > 40")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("article").count() == expected
    opened = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    assert opened < 5000 and not errors
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_can_be_read_in_light_and_dark(browser, scheme, tmp_path):
    path = made_up_page(tmp_path / "quality.html", 5)
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    verdicts = page.locator("td.verdict")
    assert verdicts.first.inner_text().splitlines()[1] == "1500 ml"
    assert verdicts.locator("> span").first.bounding_box()["height"] < 30, "in one line"
    columns = "[...document.querySelectorAll('td.range')].map(e => Math.round(e.getBoundingClientRect().left))"
    assert len(set(page.evaluate(columns))) == 1, "one below the other in all cases"
    contrast = """() => {
        const light = text => { const c = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]; };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        return [...document.querySelectorAll('.good, .look, .failed, .notes p, li, h1')].map(e => {
            const ink = light(getComputedStyle(e).color);
            return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05); });
    }"""
    assert min(page.evaluate(contrast)) >= 4.0
    page.close()


def test_the_print_is_dark_on_white(browser, tmp_path):
    page = browser.new_page(viewport={"width": 720, "height": 1000}, color_scheme="dark")  # A4
    page.goto(made_up_page(tmp_path / "quality.html", 5).as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".bar").is_visible()
    assert page.locator("article th").first.bounding_box()["height"] < 60, "a name is not one letter a line"
    page.close()


if __name__ == "__main__":
    made_up_page(Path(sys.argv[1]), int(sys.argv[2]))
