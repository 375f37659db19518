"""Preprocessing the unlabelled target: what it equals, what makes it stale, what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import draw_case, write_volume
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image

from nnunet_uda.commands import preprocess
from nnunet_uda.data import target
from nnunet_uda.data.case import preprocess_case
from nnunet_uda.errors import UDAError


@pytest.fixture
def dataset(in_workspace, monkeypatch, tmp_path):
    """A copy of the planned dataset that a test may change: ``(raw, preprocessed, plans, dataset.json)``."""
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(in_workspace, name), tmp_path / name)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    raw, preprocessed = tmp_path / "raw" / "Dataset501_Blobs", tmp_path / "preprocessed" / "Dataset501_Blobs"
    shutil.rmtree(preprocessed / "nnUNetPlans_2d_target", ignore_errors=True)  # of an earlier test
    plans = PlansManager(json.loads((preprocessed / "nnUNetPlans.json").read_text()))
    return raw, preprocessed, plans, json.loads((raw / "dataset.json").read_text())


def run(dataset, configuration="2d", log=None) -> Path:
    lines = log if log is not None else []
    return target.preprocess_target(dataset[2], configuration, dataset[3], 1, lines.append)


def test_equals_what_nnunet_makes_of_the_same_image_and_lies_beside_its_folder(dataset):
    raw, preprocessed, plans, dataset_json = dataset
    folder = run(dataset)
    assert folder == preprocessed / "nnUNetPlans_2d_target"
    manager = plans.get_configuration("2d")
    image = str(raw / "imagesTu" / "ct_Tu01_0000.nii.gz")
    data, seg, _ = manager.preprocessor_class(verbose=False).run_case([image], None, plans, manager, dataset_json)
    stored, stored_seg, _, properties = target.TargetDataset(str(folder)).load_case("ct_Tu01")
    np.testing.assert_array_equal(stored[:], data)
    np.testing.assert_array_equal(stored_seg[:], seg)
    assert properties["class_locations"] == {}
    assert target.target_identifiers(folder, 0) == ["ct_Tu00", "ct_Tu01", "ct_Tu02", "ct_Tu03"]


def test_nothing_is_done_twice_and_only_what_changed_is_done_again(dataset):
    raw, *_ = dataset
    folder = run(dataset)
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.b2nd")}
    os.utime(raw / "imagesTu" / "ct_Tu00_0000.nii.gz")  # a new date alone, as after copying, means nothing
    log: list[str] = []
    run(dataset, log=log)
    assert log == []
    image, _ = draw_case(np.random.default_rng(9), True, (10, 36, 36))
    write_volume(raw / "imagesTu" / "ct_Tu02_0000.nii.gz", image)
    (raw / "imagesTu" / "ct_Tu03_0000.nii.gz").unlink()
    run(dataset, log=log)
    assert "Preprocessing 1 unlabelled" in log[0]
    changed = {path.name for path in folder.glob("*.b2nd") if path.stat().st_mtime_ns != stamps[path.name]}
    assert changed == {"ct_Tu02.b2nd", "ct_Tu02_seg.b2nd"}
    assert target.target_identifiers(folder, "all") == ["ct_Tu00", "ct_Tu01", "ct_Tu02"]
    assert not list(folder.glob("ct_Tu03*"))


def test_a_change_that_keeps_the_size_of_the_file_is_seen(dataset):
    path = dataset[0] / "imagesTu" / "ct_Tu01_0000.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(bytes(content), 0))
    run(dataset)
    content[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(content), 0))
    log: list[str] = []
    run(dataset, log=log)
    assert "Preprocessing 1 unlabelled" in log[0]


def test_other_plans_make_it_stale(dataset):
    folder = run(dataset)
    before = target.TargetDataset(str(folder)).load_case("ct_Tu00")[0].shape
    dataset[2].plans["configurations"]["2d"]["spacing"] = [4.0, 4.0]
    dataset[2].get_configuration.cache_clear()
    log: list[str] = []
    run(dataset, log=log)
    assert "other settings" in log[0]
    after = target.TargetDataset(str(folder)).load_case("ct_Tu00")[0].shape
    assert after[2] < before[2]


def test_a_complete_target_needs_no_lock_and_nothing_written(dataset, monkeypatch):
    raw = dataset[0]
    (raw / "splits_target.json").write_text(json.dumps([{"train": ["ct_Tu00"], "val": ["ct_Tu01"]}]))
    folder = run(dataset)
    (folder / "stray").touch()  # cannot be removed from a read-only folder, and harms nobody

    def refuse(*_):
        raise OSError(30, "Read-only file system", str(folder / ".lock"))

    monkeypatch.setattr(target, "exclusive", refuse)
    monkeypatch.setattr(target, "write_json", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run(dataset) == folder
    os.utime(raw / "imagesTu" / "ct_Tu00_0000.nii.gz")  # as after copying
    assert run(dataset) == folder
    (raw / "splits_target.json").write_text(json.dumps([{"train": ["ct_Tu02"], "val": ["ct_Tu01"]}]))
    with pytest.raises(UDAError, match=r"target cannot be preprocessed \(Read-only file system: '.*lock'\. Mount it"):
        run(dataset)  # else training would go by folds of before
    (raw / "splits_target.json").write_text(json.dumps([{"train": ["ct_Tu00"], "val": ["ct_Tu01"]}]))
    (raw / "imagesTu" / "ct_Tu03_0000.nii.gz").unlink()
    with pytest.raises(UDAError, match="Read-only file system"):
        run(dataset)


def test_a_case_that_cannot_be_written_is_one_message(dataset, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Error while creating the NDArray")  # blosc2's words for a full disk

    monkeypatch.setattr(target.TargetDataset, "save_case", fail)
    with pytest.raises(UDAError, match=r"ct_Tu00\.b2nd: cannot be written whole \(Error while.*GiB are free"):
        run(dataset)
    assert {path.name for path in (dataset[1] / "nnUNetPlans_2d_target").iterdir()} == {".lock", target.MANIFEST}


def test_an_interrupted_case_is_not_taken_for_whole(dataset):
    folder = run(dataset)
    manifest = json.loads((folder / target.MANIFEST).read_text())
    del manifest["cases"]["ct_Tu01"]  # as if killed before the case was recorded
    (folder / target.MANIFEST).write_text(json.dumps(manifest))
    (folder / "ct_Tu01.b2nd").write_bytes(b"half")
    log: list[str] = []
    run(dataset, log=log)
    assert "Preprocessing 1 unlabelled" in log[0]
    assert target.TargetDataset(str(folder)).load_case("ct_Tu01")[0].shape[0] == 1


def test_without_the_raw_data_a_complete_folder_is_taken_and_a_stale_one_refused(dataset, monkeypatch):
    folder = run(dataset)
    monkeypatch.delenv("nnUNet_raw")
    assert run(dataset) == folder
    dataset[2].plans["transpose_forward"] = [1, 0, 2]
    with pytest.raises(UDAError, match="is stale"):
        run(dataset)
    shutil.rmtree(folder)
    with pytest.raises(UDAError, match="no preprocessed target"):
        run(dataset)


def test_folds_of_the_target_follow_the_raw_datasets_file(dataset):
    raw, preprocessed, *_ = dataset
    splits = [{"train": ["ct_Tu00", "ct_Tu01", "ct_Tu02"], "val": ["ct_Tu03"]}, {"train": ["ct_Tu03"], "val": []}]
    (raw / "splits_target.json").write_text(json.dumps(splits))
    folder = run(dataset)
    assert json.loads((preprocessed / "splits_target.json").read_text()) == splits
    assert target.target_identifiers(folder, 0) == ["ct_Tu00", "ct_Tu01", "ct_Tu02"]
    assert target.target_identifiers(folder, 1) == ["ct_Tu03"]
    assert len(target.target_identifiers(folder, "all")) == 4
    with pytest.raises(UDAError, match="fold 2 does not exist"):
        target.target_identifiers(folder, 2)
    (raw / "splits_target.json").write_text(json.dumps([{"train": ["nobody"], "val": []}]))
    with pytest.raises(UDAError, match="nobody"):
        run(dataset)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda image: np.where(image > 600, np.nan, image), "NaN or infinite"),
        (np.zeros_like, "every voxel is"),
        (lambda image: np.where(image > 600, np.finfo(np.float32).min, image), "intensities from -3.403e.38"),
    ],
)
def test_bad_images_are_named(dataset, damage, words):
    raw, *_ = dataset
    image, _ = draw_case(np.random.default_rng(1), False, (10, 36, 36))
    write_volume(raw / "imagesTu" / "ct_Tu02_0000.nii.gz", damage(image).astype(np.float32))
    with pytest.raises(UDAError, match=rf"ct_Tu02_0000\.nii\.gz.*{words}"):
        run(dataset)


@pytest.mark.parametrize("spacing", [(1000, 1000, 3000), (1e-3, 1e-3, 3), (0.02, 0.02, 3), (50, 50, 50)])
def test_spacing_of_another_order_is_refused_before_resampling(dataset, monkeypatch, spacing):
    image, _ = draw_case(np.random.default_rng(1), False, (10, 36, 36))
    write_volume(dataset[0] / "imagesTu" / "ct_Tu02_0000.nii.gz", image, spacing)
    with pytest.raises(UDAError, match=r"ct_Tu02_0000\.nii\.gz: its voxels are .*36 x 36.* of them"):
        run(dataset)


def test_what_resampling_may_make_is_bounded(dataset):
    dataset[2].plans["configurations"]["2d"]["spacing"] = [0.001, 0.001]
    dataset[2].get_configuration.cache_clear()
    with pytest.raises(UDAError, match=r"ct_Tu00_0000\.nii\.gz: .*resampled to them it would have 5\.2e\+10 voxels"):
        run(dataset)


@pytest.mark.parametrize("reader", ["SimpleITKIOWithReorient", "NibabelIOWithReorient", "NibabelIO"])
def test_two_geometries_are_refused_whatever_the_reader(dataset, reader):
    path = dataset[0] / "imagesTu" / "ct_Tu02_0000.nii.gz"
    image = nibabel.load(path)
    mirrored = nibabel.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
    mirrored.set_qform(image.affine, 1)
    mirrored.set_sform(image.affine @ np.diag([-1.0, 1, 1, 1]), 1)
    nibabel.save(mirrored, path)
    dataset[2].plans["image_reader_writer"] = reader
    with pytest.raises(UDAError, match=r"ct_Tu02_0000\.nii\.gz: .*two geometries"):
        run(dataset)


def sheared(raw: Path) -> None:
    """The target's axes at no right angles, which ITK refuses and nnU-Net's readers by nibabel take."""
    for path in (raw / "imagesTu").iterdir():
        image = nibabel.load(path)
        affine = image.affine.copy()
        affine[0, 1] += 0.2
        changed = nibabel.Nifti1Image(np.asanyarray(image.dataobj), affine)
        changed.set_qform(None, 0)
        nibabel.save(changed, path)


@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient"])
def test_the_datasets_own_reader_reads_the_target(dataset, reader):
    raw, _, plans, dataset_json = dataset
    sheared(raw)
    with pytest.raises(UDAError, match="at right angles"):
        run(dataset)
    plans.plans["image_reader_writer"] = reader
    folder = run(dataset)
    manager = plans.get_configuration("2d")
    image = str(raw / "imagesTu" / "ct_Tu01_0000.nii.gz")
    data, _, _ = manager.preprocessor_class(verbose=False).run_case([image], None, plans, manager, dataset_json)
    np.testing.assert_array_equal(target.TargetDataset(str(folder)).load_case("ct_Tu01")[0][:], data)
    (raw / "imagesTu" / "ct_Tu01_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(UDAError, match=r"ct_Tu01_0000\.nii\.gz: cannot be read"):
        run(dataset)


def test_pictures_are_read_by_the_reader_of_pictures(dataset, tmp_path):
    _, _, plans, dataset_json = dataset
    manager = plans.get_configuration("2d")
    plans.plans["image_reader_writer"] = "NaturalImage2DIO"
    plans.plans["original_median_spacing_after_transp"] = [999.0, 1.0, 1.0]
    manager.configuration["spacing"] = [1.0, 1.0]
    path = tmp_path / "a_0000.png"
    Image.fromarray(np.random.default_rng(0).integers(1, 200, (6000, 8), np.uint8)).save(path)  # 6000 mm if it had mm
    assert preprocess_case([path], plans, manager, dataset_json)[0].shape == (1, 1, 6000, 8)
    Image.fromarray(np.full((30, 40), 7, np.uint8)).save(path)
    with pytest.raises(UDAError, match=r"a_0000\.png: every voxel is 7"):
        preprocess_case([path], plans, manager, dataset_json)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UDAError, match=r"a_0000\.png: cannot be read .* expected an image for NaturalImage2DIO"):
        preprocess_case([path], plans, manager, dataset_json)


def test_several_volumes_in_one_file_are_refused_as_such(dataset):
    volume = sitk.GetImageFromArray(np.ones((10, 36, 36), np.float32))
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(dataset[0] / "imagesTu" / "ct_Tu02_0000.nii.gz"))
    with pytest.raises(UDAError, match=r"ct_Tu02_0000\.nii\.gz: the image has 4 dimensions.*Split a 4D file"):
        run(dataset)


def test_a_truncated_image_is_named(dataset):
    path = dataset[0] / "imagesTu" / "ct_Tu02_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UDAError, match=r"ct_Tu02_0000\.nii\.gz: the (compressed )?file is truncated"):
        run(dataset)


def test_command_serves_2d_and_3d_and_refuses_unknown_configurations(dataset, capsys, refused):
    preprocess.main(["-d", "501", "-c", "2d", "3d_fullres", "-np", "1"])
    out = capsys.readouterr().out
    assert "nnUNetPlans_2d_target" in out and "nnUNetPlans_3d_fullres_target" in out
    assert "no configuration '4d'" in refused(preprocess.main, ["-d", "501", "-c", "4d"])
