"""The phantom: layout, labels, determinism, and contrasts that a radiologist would accept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_dilation, binary_erosion, label

from nnunet_uda.demo.phantom import LABELS, main, make_phantom
from nnunet_uda.errors import UDAError

NUM = 2


def read(folder: Path, modality: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    stem = folder / f"{modality}_train" / f"{modality}_train_{number}"
    images = [sitk.DICOMOrient(sitk.ReadImage(f"{stem}_{kind}.nii.gz"), "LPS") for kind in ("image", "label")]
    return sitk.GetArrayFromImage(images[0]).astype(float), sitk.GetArrayFromImage(images[1])


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    make_phantom(folder, seed=7, num_mr=NUM, num_ct=NUM, num_processes=1)
    return folder


CASES = [(modality, 1001 + i) for modality in ("mr", "ct") for i in range(NUM)]


def test_layout(phantom: Path) -> None:
    expected = {
        f"{m}_train/{m}_train_{1001 + i}_{kind}.nii.gz"
        for m in ("mr", "ct")
        for i in range(NUM)
        for kind in ("image", "label")
    }
    assert {str(p.relative_to(phantom)) for p in phantom.rglob("*") if p.is_file()} == expected
    assert {p.name for p in phantom.iterdir()} == {"ct_train", "mr_train"}


@pytest.mark.parametrize(("modality", "number"), CASES)
def test_headers(phantom: Path, modality: str, number: int) -> None:
    stem = phantom / f"{modality}_train" / f"{modality}_train_{number}"
    image, labels = (sitk.ReadImage(f"{stem}_{kind}.nii.gz") for kind in ("image", "label"))
    assert image.GetSize() == labels.GetSize()
    assert image.GetSpacing() == labels.GetSpacing()
    assert image.GetOrigin() == labels.GetOrigin()
    assert image.GetDirection() == labels.GetDirection()
    orientation = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    assert orientation in ("LPS", "RAS")
    spacing, size = image.GetSpacing(), image.GetSize()
    assert spacing[2] > 1.3 * max(spacing[:2])  # nnU-Net slices across the axis of largest spacing
    assert 64 <= min(size[:2]) and max(size[:2]) <= 85 and 20 <= size[2] <= 40


@pytest.mark.slow
def test_both_orientations_and_several_spacings_occur(tmp_path: Path) -> None:
    make_phantom(tmp_path, seed=1, num_mr=5, num_ct=5)
    images = [sitk.ReadImage(str(p)) for p in tmp_path.rglob("*_image.nii.gz")]
    assert len({image.GetDirection() for image in images}) == 2
    assert len({image.GetSpacing() for image in images}) == len(images)


@pytest.mark.parametrize(("modality", "number"), CASES)
def test_every_structure_is_present_and_whole(phantom: Path, modality: str, number: int) -> None:
    _, labels = read(phantom, modality, number)
    assert set(np.unique(labels)) == {0, *LABELS.values()}
    for name in ("LV", "LA", "MYO", "AA"):
        mask = labels == LABELS[name]
        parts, _ = label(mask)
        assert np.bincount(parts.ravel())[1:].max() > 0.9 * mask.sum(), name
        areas = mask.sum((1, 2))
        assert np.median(areas[areas > 0]) >= 40, name
        assert (areas > 0).sum() >= 7, name


@pytest.mark.parametrize(("modality", "number"), CASES)
def test_anatomy_is_where_it_belongs(phantom: Path, modality: str, number: int) -> None:
    _, labels = read(phantom, modality, number)
    centre = {name: np.argwhere(labels == value).mean(0) for name, value in LABELS.items()}  # head, back, left
    assert centre["LV"][2] > centre["RV"][2] > centre["RA"][2]
    assert centre["LA"][1] > centre["LV"][1] > centre["RV"][1]
    assert centre["AA"][0] > centre["LV"][0]
    assert centre["PA"][2] > centre["AA"][2]
    shell = binary_dilation(labels == LABELS["LV"]) & (labels != LABELS["LV"])
    assert (labels[shell] == LABELS["MYO"]).mean() > 0.6


def core(labels: np.ndarray, name: str) -> np.ndarray:
    return binary_erosion(labels == LABELS[name], np.ones((1, 3, 3)))


@pytest.mark.parametrize("number", range(1001, 1001 + NUM))
def test_ct_contrast(phantom: Path, number: int) -> None:
    image, labels = read(phantom, "ct", number)
    for name in ("LV", "LA", "AA"):
        assert 230 < image[core(labels, name)].mean() < 330
    for name in ("RV", "RA", "PA"):
        assert 150 < image[core(labels, name)].mean() < 250
    assert 60 < image[core(labels, "MYO")].mean() < 170
    assert image.min() >= -1024
    lung, fat, bone = (image > -900) & (image < -700), (image > -150) & (image < -40), image > 500
    assert 0.2 < lung.mean() < 0.65 and 0.02 < fat.mean() < 0.5 and 0.005 < bone.mean() < 0.15


@pytest.mark.parametrize("number", range(1001, 1001 + NUM))
def test_mr_contrast(phantom: Path, number: int) -> None:
    image, labels = read(phantom, "mr", number)
    assert image.min() >= 0
    blood = image[core(labels, "LV") | core(labels, "LA") | core(labels, "AA")].mean()
    muscle = image[core(labels, "MYO")].mean()
    dark = np.percentile(image, 10)
    assert dark < 0.6 * muscle < 0.6 * 0.6 * blood
    assert (image == 0).mean() < 0.05  # noise, not a mask


def test_deterministic_per_seed_and_different_patients(phantom: Path, tmp_path: Path) -> None:
    make_phantom(tmp_path / "same", seed=7, num_mr=1, num_ct=1, num_processes=1)
    make_phantom(tmp_path / "other", seed=8, num_mr=1, num_ct=1, num_processes=1)
    for modality, number in (("mr", 1001), ("ct", 1001)):
        for a, b in zip(read(phantom, modality, number), read(tmp_path / "same", modality, number), strict=True):
            np.testing.assert_array_equal(a, b)
    anatomies = [read(phantom, m, n)[1] for m, n in CASES]
    anatomies += [read(tmp_path / "other", m, 1001)[1] for m in ("mr", "ct")]
    volumes = {tuple(int((a == v).sum()) for v in LABELS.values()) for a in anatomies}
    assert len(volumes) == len(anatomies)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UDAError, match="0 MR"):
        make_phantom(tmp_path / "none", seed=0, num_mr=0)
    assert not (tmp_path / "none").exists()
    (tmp_path / "ct_train").mkdir()
    with pytest.raises(UDAError, match="ct_train already exists"):
        make_phantom(tmp_path, seed=0, num_mr=1, num_ct=1)
    assert not (tmp_path / "mr_train").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UDAError, match="Cannot write"):
        make_phantom(tmp_path / "file", seed=0, num_mr=1, num_ct=1)


def test_command(tmp_path: Path) -> None:
    main(["-o", str(tmp_path / "a"), "-seed", "3", "-num_mr", "1", "-num_ct", "1", "-np", "1"])
    assert len(list((tmp_path / "a").rglob("*.nii.gz"))) == 4
    with pytest.raises(UDAError, match="already exists"):
        main(["-o", str(tmp_path / "a"), "-seed", "3"])
