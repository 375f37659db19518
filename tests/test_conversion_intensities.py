"""The intensities that converters choose for each domain: what is written, recorded, shown and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.folders import refuser, use_folders
from support.scans import body, load

from nnunet_uda.commands.convert import main
from nnunet_uda.images.intensities import Intensities, read_intensities

DATA = os.environ.get("NNUNET_UDA_TEST_DATA")
SHAPE = (8, 20, 20)
ORGAN = np.zeros(SHAPE, np.uint8)
ORGAN[2:6, 6:12, 6:9] = 1
BONE = np.zeros(SHAPE, np.uint8)
BONE[2:6, 9:11, 9:11] = 1


def mr(seed: int) -> np.ndarray:
    array = np.random.default_rng(seed).integers(1, 900, SHAPE).astype(np.int16)
    array[:, :4], array[3, 3, 3], array[4, 10, 10] = 0, 30_000, 29_000
    return array


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    use_folders(monkeypatch, tmp_path)
    for i in range(2):
        save(tmp_path / "ct" / f"a{i}.nii.gz", body(i))
        save(tmp_path / "mr" / f"b{i}.nii.gz", mr(i))
        save(tmp_path / "organ" / f"a{i}.nii.gz", ORGAN)
        save(tmp_path / "organ_mr" / f"b{i}.nii.gz", ORGAN)
        save(tmp_path / "bone" / f"a{i}.nii.gz", BONE)
    return tmp_path


def arguments(data: Path, source: str, target: str, labels: str, *more: str) -> list[str]:
    folder = {domain: str(data / ("ct" if "CT" in domain else "mr")) for domain in (source, target)}
    return [
        "folders", "-d", "510", "-name", "X", "-np", "1", "-labels", "organ=1", "-source", source, "-target", target,
        "-source_images", folder[source], "-source_labels", str(data / labels), "-target_images", folder[target], *more,
    ]  # fmt: skip


def convert(data: Path, *words: str) -> Path:
    main([*arguments(data, *words), "--overwrite"])
    return data / "nnUNet_raw" / "Dataset510_X"


refused = refuser(convert)


def recorded(dataset: Path, domain: str) -> Intensities | None:
    return read_intensities(json.loads((dataset / "dataset.json").read_text()), "dataset.json", domain)


def test_labelled_ct_gives_the_window_and_mr_has_percentiles(data, capsys):
    out = convert(data, "CT", "MR", "organ")
    text = capsys.readouterr().out
    low, high = recorded(out, "source").window
    assert -60 < low < 0 and 100 < high < 160
    assert recorded(out, "target") == Intensities((0.5, 99.5))
    assert f"window {low} to {high} HU (found around the structures labelled in CT)" in text
    assert "percentiles 0.5 to 99.5 of the nonzero voxels (default)" in text
    for i in range(2):
        clipped = load(out / f"imagesTr/CT_a{i}_0000.nii.gz")
        assert clipped.dtype == np.int16 and (clipped == np.clip(body(i), low, high)).all()
        clipped = load(out / f"imagesTu/MR_b{i}_0000.nii.gz")
        assert clipped.dtype == np.int16 and clipped.max() < 1000 and ((clipped == 0) == (mr(i) == 0)).all()
    bone = recorded(convert(data, "CT", "MR", "bone"), "source").window
    assert bone[1] > 1000 and bone[0] == -150, "soft tissue around it stays visible"


def test_scans_that_went_through_go_through_again_and_stay(data):
    out = convert(data, "CT", "MR", "organ")
    before = recorded(out, "source")
    for i in range(2):
        save(data / "ct" / f"a{i}.nii.gz", load(out / f"imagesTr/CT_a{i}_0000.nii.gz"))
        save(data / "mr" / f"b{i}.nii.gz", load(out / f"imagesTu/MR_b{i}_0000.nii.gz"))
    again = convert(data, "CT", "MR", "organ")
    assert recorded(again, "source") == before
    for i in range(2):
        assert (load(again / f"imagesTr/CT_a{i}_0000.nii.gz") == load(data / "ct" / f"a{i}.nii.gz")).all()
        assert (load(again / f"imagesTu/MR_b{i}_0000.nii.gz") == load(data / "mr" / f"b{i}.nii.gz")).all()


def test_ct_as_the_target_reads_none_of_its_labels(data, capsys):
    out = convert(data, "MR", "CT_late", "organ_mr", "-target_labels", str(data / "bone"), "-target_folds", "2")
    assert recorded(out, "target") == Intensities(window=(-160, 240))
    assert "window -160 to 240 HU (preset soft_tissue, no label was read)" in capsys.readouterr().out
    assert load(out / "imagesTu/CT_late_a0_0000.nii.gz").max() == 240
    bound = convert(data, "MR", "CT_late", "organ_mr", "-target_labels", str(data / "organ"), "--upper_bound")
    content = json.loads((bound / "dataset.json").read_text())
    assert set(content["uda"]) == {"intensities"} and recorded(bound, "target") == recorded(out, "target")


def test_two_ct_domains_share_the_window_of_the_labelled_one(data):
    save(data / "ct2" / "c.nii.gz", body(7))
    words = arguments(data, "CT", "MR", "organ")
    words[words.index("-target") + 1], words[words.index("-target_images") + 1] = "NCCT", str(data / "ct2")
    main(words)
    out = data / "nnUNet_raw" / "Dataset510_X"
    assert recorded(out, "target") == recorded(out, "source") and recorded(out, "source").window is not None


def test_given_intensities(data):
    out = convert(data, "CT", "MR", "organ", "-source_intensities", "-100", "250", "-target_intensities", "percentiles",
                  "0", "90")  # fmt: skip
    assert recorded(out, "source") == Intensities(window=(-100, 250))
    assert recorded(out, "target") == Intensities((0, 90))
    assert (
        load(out / "imagesTr/CT_a0_0000.nii.gz").max() == 250 and load(out / "imagesTu/MR_b0_0000.nii.gz").max() < 850
    )
    out = convert(data, "CT", "MR", "organ", "-source_intensities", "none", "-target_intensities", "none")
    assert (load(out / "imagesTr/CT_a0_0000.nii.gz") == body(0)).all()
    assert (load(out / "imagesTu/MR_b0_0000.nii.gz") == mr(0)).all()
    assert "intensities" not in json.loads((out / "dataset.json").read_text())["uda"]
    out = convert(data, "CT", "MR", "organ", "-source_intensities", "none")
    assert recorded(out, "source") is None and recorded(out, "target") == Intensities((0.5, 99.5))


def test_ct_that_is_not_in_hounsfield_units_is_refused(data, refused):
    save(data / "ct" / "a1.nii.gz", (body(1) + 1024).astype(np.uint16))
    text = refused(data, "CT", "MR", "organ")
    assert "ct/a1.nii.gz: its values are" in text and "perhaps 1024" in text and "-source_intensities" in text
    assert "a0" not in text and "Traceback" not in text
    assert "a1.nii.gz: its values are" in refused(data, "CT", "MR", "organ", "-source_intensities", "abdomen")
    own_units = convert(data, "CT", "MR", "organ", "-source_intensities", "-160", "1200")
    assert load(own_units / "imagesTr/CT_a1_0000.nii.gz").max() == 1200
    kept = convert(data, "CT", "MR", "organ", "-source_intensities", "none")
    assert load(kept / "imagesTr/CT_a1_0000.nii.gz").max() > 1900


def test_a_target_called_ct_that_was_scaled_is_refused(data, refused):
    save(data / "ct" / "a0.nii.gz", (body(0) / 1000).astype(np.float32))
    text = refused(data, "MR", "CT", "organ_mr")
    assert "a0.nii.gz: its values are -1.0" in text and "as of a scan that was scaled" in text


def test_a_window_without_the_structure_is_refused(data, refused):
    text = refused(data, "CT", "MR", "organ", "-source_intensities", "400", "1200")
    assert "100% of the voxels of 'organ' lie outside of the window 400 to 1200 HU in all 2 labelled CT case(s)" in text
    text = refused(data, "CT", "MR", "organ", "-source_intensities", "2000", "3000")
    assert "all outside of the window 2000 to 3000 HU" in text and "a0.nii.gz" in text and "a1.nii.gz" in text
    text = refused(data, "CT", "MR", "organ", "-source_intensities", "275", "-125")
    assert "-source_intensities: window 275 -125: expected two whole numbers in HU, the lower one first" in text


def test_percentiles_that_hide_a_structure_are_said(data, capsys):
    save(data / "tiny" / "b0.nii.gz", (mr(0) > 20_000).astype(np.uint8))
    save(data / "tiny" / "b1.nii.gz", (mr(1) > 20_000).astype(np.uint8))
    convert(data, "MR", "CT", "tiny")
    assert "WARNING: at least 100% of the voxels of 'organ' lie outside of the percentiles" in capsys.readouterr().out


def test_a_preset_that_hides_an_upper_bounds_structure_is_said(data, refused, capsys):
    """It must not depend on the target's labels what the scans look like."""
    words = ("MR", "CT", "organ_mr", "-target_labels", str(data / "bone"), "--upper_bound")
    convert(data, *words)
    assert "lie outside of the window -160 to 240 HU in all 2 labelled CT case(s)" in capsys.readouterr().out
    said = refused(data, *words, "-target_intensities", "abdomen")
    assert "expected a window that shows every structure" in said


def test_a_scan_of_one_value_but_for_few_voxels_is_kept_unless_asked(data, refused, capsys):
    flat = np.zeros(SHAPE, np.int16)
    flat[2:6] = 7
    flat[3, 3, 3] = 9
    save(data / "mr" / "b0.nii.gz", flat)
    out = convert(data, "CT", "MR", "organ")
    assert "b0.nii.gz: percentiles 0.5 and 99.5 of its 1600 nonzero voxels are both 7: left as it is" in (
        capsys.readouterr().out
    )
    assert (load(out / "imagesTu/MR_b0_0000.nii.gz") == flat).all()
    said = refused(data, "CT", "MR", "organ", "-target_intensities", "percentiles")
    assert "expected an image with contrast" in said


@pytest.mark.skipif(DATA is None, reason="NNUNET_UDA_TEST_DATA is not set: no real scans")
def test_the_organs_of_a_real_ct_lie_apart(tmp_path, monkeypatch):
    files = Path(DATA or "", "totalseg")
    if not files.is_dir():
        pytest.skip(f"{files} does not exist")
    use_folders(monkeypatch, tmp_path)
    main([
        "folders", "-d", "510", "-name", "X", "-source", "CT", "-target", "MR", "-np", "1", "--ignore_other_labels",
        "-source_images", str(files / "example_ct_sm.nii.gz"), "-source_labels", str(files / "example_seg.nii.gz"),
        "-target_images", str(files / "example_mr_sm.nii.gz"), "-labels", "spleen=1", "right=2", "left=3", "liver=5",
    ])  # fmt: skip
    out = tmp_path / "nnUNet_raw" / "Dataset510_X"
    labels = load(next((out / "labelsTr").iterdir()))

    def spread(voxels: np.ndarray) -> float:
        scores = (voxels - voxels.mean()) / voxels.std()
        means = [scores[labels == index].mean() for index in range(1, 5)]
        return max(means) - min(means)

    assert spread(load(files / "example_ct_sm.nii.gz").astype(float)) < 0.08
    assert spread(load(next((out / "imagesTr").iterdir())).astype(float)) > 0.4
