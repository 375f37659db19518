"""The brain task: contrasts, patients apart, and the printed commands, on made label maps and on the real ones."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import REPOSITORY, litter
from scipy.ndimage import binary_erosion
from support.folders import use_folders

from nnunet_uda.commands.convert import main as convert_main
from nnunet_uda.errors import UDAError

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(REPOSITORY)
    from benchmarks.accuracy.brain import STRUCTURES, TISSUES, convert_command, main, make_brains, render

DATA = os.environ.get("NNUNET_UDA_TEST_DATA")
SIZE = (48, 54, 50)
LAYERS = (511, 515, 24, 3, 41, 10, 43)  # from the skin to the ventricle


def draw_head(number: int) -> np.ndarray:
    """Shells of tissue around an off-centre middle, in background, with small nuclei."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SIZE), indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2) + 0.01 * number
    labels = np.zeros(SIZE, np.int16)
    for level, value in enumerate(LAYERS):
        labels[radius < 0.85 - 0.11 * level] = value
    labels[22:26, 14:18, 20:28] = 12
    labels[9:12, 25:30, 20:28] = 16
    return labels


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    folder = tmp_path / "labels"
    folder.mkdir()
    for number in range(6):
        write(folder / f"head_{number}.nii.gz", draw_head(number))
    litter(folder)
    return folder


def write(path: Path, labels: np.ndarray) -> None:
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing((2.0, 2.0, 2.0))
    image.SetDirection((-1, 0, 0, 0, 0, 1, 0, -1, 0))
    image.SetOrigin((7, -3, 11))
    sitk.WriteImage(image, str(path))


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(float)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def medians(image: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Median intensity inside each tissue, away from its edge where it is thick enough."""
    result = {}
    for name, (values, *_) in TISSUES.items():
        mask = np.isin(labels, values)
        inner = binary_erosion(mask)
        if mask.any():
            result[name] = float(np.median(image[inner if inner.sum() > 20 else mask]))
    return result


def check_contrast(contrast: str, image: np.ndarray, labels: np.ndarray) -> None:
    seen = medians(image, labels)
    white, grey, fluid = (seen[n] for n in ("white matter", "cortical grey matter", "cerebrospinal fluid"))
    assert seen["air"] < 0.15 * white and seen["cortical bone"] < 0.5 * min(white, grey)
    if contrast == "T1":
        assert fluid < 0.7 * grey < grey < 0.92 * white and grey < seen["thalamus"] < white
    else:
        assert fluid > 1.3 * grey > grey > 1.08 * white and grey > seen["thalamus"] > white


@pytest.mark.parametrize("contrast", ["T1", "T2"])
def test_contrasts_are_those_of_mr(contrast: str) -> None:
    for seed in range(5):
        image = render(draw_head(0), contrast, np.random.default_rng(seed))
        assert image.dtype == np.int16 and image.min() >= 0 and image.shape == SIZE
        check_contrast(contrast, image, draw_head(0))


def test_scans_of_one_head_differ_in_gain_noise_and_bias() -> None:
    labels = np.full((24, 24, 24), 2, np.int16)
    first, second = (render(labels, "T1", np.random.default_rng(seed)).astype(float) for seed in (0, 1))
    assert abs(np.median(first) / np.median(second) - 1) > 0.05
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.5
    coarse = first.reshape(4, 6, 4, 6, 4, 6).mean((1, 3, 5))
    assert 0.03 < coarse.std() / first.mean() < 0.25  # a bias field and slow variation are left after averaging
    assert first.std() / first.mean() > coarse.std() / first.mean()


def test_edges_have_partial_volume() -> None:
    labels = np.full((16, 16, 16), 2, np.int16)
    labels[8:] = 24
    shares = []
    for seed in range(8):
        rows = render(labels, "T2", np.random.default_rng(seed)).mean((1, 2))
        shares.append((rows[7:9] - rows[5]) / (rows[10] - rows[5]))
    below, above = np.mean(shares, axis=0)
    assert 0.03 < below < 0.3 and 0.7 < above < 0.97


def test_patients_are_apart_and_files_complete(heads: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_brains(heads, out, 0)
    seen = {}
    for contrast in ("T1", "T2"):
        for part, number in (("train", 2), ("test", 1)):
            images, labels = (sorted((out / contrast / part / kind).iterdir()) for kind in ("images", "labels"))
            assert [p.name for p in images] == [p.name for p in labels] and len(images) == number
            seen[contrast, part] = {p.name for p in images}
            for image, label in zip(images, labels, strict=True):
                first, second = sitk.ReadImage(str(image)), sitk.ReadImage(str(label))
                original = sitk.ReadImage(str(heads / image.name))
                assert first.GetSize() == second.GetSize() and first.GetDirection() == original.GetDirection()
                inside = sitk.Resample(original, second, sitk.Transform(), sitk.sitkNearestNeighbor)
                assert np.array_equal(sitk.GetArrayFromImage(inside), read(label))
                assert (read(label) > 0).sum() == (read(heads / image.name) > 0).sum()  # the crop loses nothing
                check_contrast(contrast, read(image), read(label))
    assert len(set.union(*seen.values())) == 6 == sum(map(len, seen.values()))


def test_a_seed_decides_everything(heads: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_brains(heads, tmp_path / name, seed)
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "c")


def test_the_printed_commands_convert(heads: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    use_folders(monkeypatch, tmp_path)
    main(["-i", str(heads), "-o", str(tmp_path / "out"), "-seed", "1"])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("nnUNetUDA")]
    assert [words[3] for words in commands] == ["531", "533", "532", "534"]
    for words in commands:
        convert_main([*words[1:], "-np", "1"])
    cases = {
        path.name: {kind: {p.name[3:] for p in (path / kind).iterdir()} for kind in ("labelsTr", "labelsTs")}
        for path in (tmp_path / "nnUNet_raw").iterdir()
    }
    assert set(cases) == {
        "Dataset531_BrainT12T2", "Dataset532_BrainT22T1", "Dataset533_BrainT2Supervised",
        "Dataset534_BrainT1Supervised",
    }  # fmt: skip
    assert cases["Dataset533_BrainT2Supervised"]["labelsTr"] == cases["Dataset532_BrainT22T1"]["labelsTr"]
    assert cases["Dataset533_BrainT2Supervised"]["labelsTs"] == cases["Dataset531_BrainT12T2"]["labelsTs"]
    label = next((tmp_path / "nnUNet_raw" / "Dataset531_BrainT12T2" / "labelsTr").iterdir())
    assert set(np.unique(read(label))) == set(range(len(STRUCTURES) + 1))


def test_bad_input_is_named_and_nothing_is_written(heads: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UDAError, match=r"nowhere: found 0 label maps.*at least 4"):
        make_brains(tmp_path / "nowhere", out, 0)
    with pytest.raises(UDAError, match="seed is -1"):
        make_brains(heads, out, -1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UDAError, match="full is not empty"):
        make_brains(heads, tmp_path / "full", 0)
    labels = draw_head(5)
    labels[24, 24, 24] = 99
    write(heads / "head_5.nii.gz", labels)
    with pytest.raises(UDAError, match=r"head_5.nii.gz: found the labels 99"):
        make_brains(heads, out, 0)
    write(heads / "head_5.nii.gz", np.zeros(SIZE, np.int16))
    with pytest.raises(UDAError, match="found nothing but 0"):
        make_brains(heads, out, 0)
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["full", "labels"]


def test_no_value_belongs_to_two_tissues_and_every_structure_is_rendered() -> None:
    values = [value for places, *_ in TISSUES.values() for value in places]
    assert len(values) == len(set(values))
    assert {value for places in STRUCTURES.values() for value in places} <= set(values)
    words = convert_command(Path("x"), "T1", "T2", 531)
    assert words[-len(STRUCTURES) :][0] == "white_matter=2,41"


@pytest.mark.skipif(DATA is None, reason="NNUNET_UDA_TEST_DATA is not set: no real label maps")
def test_real_anatomies(tmp_path: Path) -> None:
    maps = Path(DATA, "synthseg_2mm")
    if not maps.is_dir():
        pytest.skip(f"{maps} does not exist")
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(maps.glob("*.nii.gz"))[:4]:
        (few / path.name).symlink_to(path)
    make_brains(few, tmp_path / "out", 0)
    for contrast in ("T1", "T2"):
        for image in (tmp_path / "out" / contrast).glob("*/images/*"):
            labels = read(image.parent.parent / "labels" / image.name)
            check_contrast(contrast, read(image), labels)
            assert all(np.isin(labels, values).sum() > 300 for values in STRUCTURES.values())
