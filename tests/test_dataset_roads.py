"""One road per dataset through the real commands: vendor tree, intact nnU-Net dataset, training, prediction."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support import chaos, vs
from support.reproduce import make_vendor_trees, run_commands

pytestmark = pytest.mark.slow
DATA = os.environ.get("NNUNET_UDA_TEST_DATA")
NO_DATA = "NNUNET_UDA_TEST_DATA is not set: no real scans"


@pytest.fixture(scope="module")
def vendor(tmp_path_factory) -> dict[str, str]:
    return make_vendor_trees(tmp_path_factory.mktemp("vendor"))


CONFIGURE = [
    "-patch_size", "32", "32", "-batch_size", "2", "-base_features", "4", "-max_features", "8", "-stages", "3", "-set",
    "num_epochs=1", "iterations_per_epoch=1", "val_iterations_per_epoch=1", "mirror=false", "quality_volumes=0",
    "cisfa.generator_width=4",
    "cisfa.generator_blocks=1", "cisfa.discriminator_width=4", "cisfa.patches=16",
]  # fmt: skip


def intact_dataset(folder: Path, *arguments: str, further: Sequence[list[str]] = ()) -> Path:
    """Convert, and let nnU-Net check and preprocess the dataset without a word of error or warning; then ``further``.

    Args:
        arguments: of nnUNetUDA_convert.
        further: commands to run afterwards.
    """
    convert = ["nnUNetUDA_convert", *arguments, "-d", "501", "-name", "Road", "-np", "1"]
    check = ["nnUNetv2_plan_and_preprocess", "-d", "501", "-c", "2d", "-npfp", "1", "-np", "1",
             "--verify_dataset_integrity"]  # fmt: skip
    output = run_commands([convert, check, *further], folder)[shlex.join(check)]
    said = output.replace("If you didn't see any error messages", "")
    assert "verify_dataset_integrity Done" in said
    assert not re.search(r"error|warn|mismatch|fail", said, re.I), said
    return folder / "nnUNet_raw" / "Dataset501_Road"


def travel(folder: Path, *arguments: str) -> dict[str, sitk.Image]:
    """Convert, check, plan, train for one epoch, predict ``imagesTs``; the predictions by case."""
    tiny = ["-tr", "CISFATrainer", "-p", "tiny", "-device", "cpu"]
    images, output = folder / "nnUNet_raw" / "Dataset501_Road" / "imagesTs", folder / "predictions"
    further = [
        ["nnUNetUDA_configure", "-d", "501", "-p", "tiny", *CONFIGURE],
        ["nnUNetv2_train", "501", "2d", "0", *tiny],
        ["nnUNetv2_predict", "-i", str(images), "-o", str(output), "-d", "501", "-c", "2d", "-f", "0", *tiny],
    ]
    intact_dataset(folder, *arguments, further=further)
    predictions = {path.name.removesuffix(".nii.gz"): sitk.ReadImage(str(path)) for path in output.glob("*.nii.gz")}
    assert predictions.keys() == {path.name.removesuffix("_0000.nii.gz") for path in images.iterdir()}
    return predictions


def assert_grid(prediction: sitk.Image, vendor: sitk.Image, classes: int) -> None:
    """The same voxels at the same places as the vendor's scan."""
    assert prediction.GetSize() == vendor.GetSize()
    for corner in ((0, 0, 0), tuple(n - 1 for n in vendor.GetSize()), (0, vendor.GetSize()[1] - 1, 0)):
        places = [image.TransformIndexToPhysicalPoint(corner) for image in (prediction, vendor)]
        assert np.allclose(*places, atol=1e-3)
    assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= set(range(classes + 1))


def read_slices(folder: Path) -> sitk.Image:
    """A series by GDCM's order of it."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def test_brats_from_the_vendors_tree_to_predictions(vendor, tmp_path):
    arguments = ("-i", vendor["BRATS"], "-source", "flair", "-target", "t2", "-protocol", "uuds")
    predictions = travel(tmp_path, "brats", *arguments)
    assert predictions
    for case, prediction in predictions.items():
        scan = next(Path(vendor["BRATS"]).rglob(f"{case}.nii.gz"))
        assert_grid(prediction, sitk.ReadImage(str(scan)), 1)


@pytest.mark.parametrize(("source", "target"), [("ct", "mr"), ("mr", "ct")])
def test_abdomen_from_the_vendors_trees_to_predictions(vendor, tmp_path, source, target):
    trees = (vendor["CHAOS"], vendor["BTCV"])
    predictions = travel(tmp_path, "abdomen", "-i", *trees, "-source", source, "-target", target)
    tests = {"mr": {"mr_01", "mr_13", "mr_38"}, "ct": {"ct_0001", "ct_0009", "ct_0030"}}
    assert predictions.keys() == tests[target]
    for case, prediction in predictions.items():
        number = case.split("_")[1]
        if target == "mr":
            scan = read_slices(Path(trees[0], "Train_Sets", "MR", str(int(number)), "T2SPIR", "DICOM_anon"))
        else:
            scan = sitk.ReadImage(str(Path(trees[1], "RawData", "Training", "img", f"img{number}.nii.gz")))
        assert_grid(prediction, scan, 4)


def test_chaos_from_the_vendors_tree_to_predictions(vendor, tmp_path):
    predictions = travel(tmp_path, "chaos", "-i", vendor["CHAOS"], "-source", "t1in", "-target", "t2spir")
    assert predictions.keys() == {"t2spir_01", "t2spir_13", "t2spir_38"}
    for case, prediction in predictions.items():
        folder = Path(vendor["CHAOS"], "Train_Sets", "MR", str(int(case.split("_")[1])), "T2SPIR", "DICOM_anon")
        assert_grid(prediction, read_slices(folder), 4)


def test_schwannoma_from_dicom_to_predictions(vendor, tmp_path):
    predictions = travel(tmp_path, "vs", "-i", vendor["VS"], "-source", "cet1", "-target", "hrt2")
    assert predictions.keys() == {f"vs_gk_{number}_t2" for number in vs.ROLES["test"]}
    for case, prediction in predictions.items():
        number = int(case.split("_")[2])
        study = next(Path(vendor["VS"]).rglob(f"VS-SEG-{number:03d}"))
        assert_grid(prediction, read_slices(next(study.rglob("t2-series"))), 1)


# --- real scans: converted, and intact ------------------------------------------------------------------------------


@pytest.mark.skipif(not Path(DATA or "", "vs").is_dir(), reason=NO_DATA)
@pytest.mark.parametrize("make", [vs.real_crossmoda, vs.real_pairs])
def test_real_schwannoma_scans(tmp_path, make):
    tree = make(tmp_path / "vendor", Path(DATA or "", "vs"))
    intact_dataset(tmp_path, "vs", "-i", str(tree), "-source", "cet1", "-target", "hrt2")


@pytest.mark.skipif(not chaos.REAL.is_dir(), reason=f"{NO_DATA}, or none of CHAOS")
def test_real_chaos_case(tmp_path):
    tree = chaos.make_chaos(tmp_path / "vendor", mr=(1, 2), ct=())
    (tree / "Train_Sets" / "CT").mkdir()
    (tree / "Train_Sets" / "CT" / "3").symlink_to(chaos.REAL)
    intact_dataset(tmp_path, "chaos", "-i", str(tree), "-source", "ct", "-target", "t2spir")
