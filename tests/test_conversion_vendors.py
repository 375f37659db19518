"""What holds for every converter, on small trees of all vendors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import litter
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from support.amos import make_amos
from support.folders import use_folders
from support.hearts import make_acdc, make_emidec
from support.reproduce import make_vendor_trees
from support.scans import load, names

from nnunet_uda.commands.convert import main
from nnunet_uda.images.intensities import Intensities, read_intensities

PERCENTILES, UUDS = Intensities((0.5, 99.5)), Intensities((5, 95), (-1, 1))
HEART, ABDOMEN = Intensities(window=(-150, 650)), Intensities(window=(-125, 275))
WAYS = [
    ("mmwhs -i MMWHS -source mr -target ct", PERCENTILES, HEART),
    ("mmwhs -i MMWHS -source ct -target mr", "found", PERCENTILES),
    ("mmwhs -i MMWHS -source mr -target ct -protocol sifa", None, None),
    ("mmwhs -i MMWHS -source mr -target ct -protocol cisfa -target_intensities abdomen", None, ABDOMEN),
    ("mmwhs -i MMWHS -source mr -target ct --upper_bound", None, HEART),
    ("abdomen -i CHAOS BTCV -source ct -target mr", "found", PERCENTILES),
    ("abdomen -i CHAOS BTCV -source mr -target ct", PERCENTILES, ABDOMEN),
    ("chaos -i CHAOS -source t1in -target t2spir", PERCENTILES, PERCENTILES),
    ("btcv -i BTCV", None, ABDOMEN),
    ("btcv -i BTCV -source_intensities -200 300", None, Intensities(window=(-200, 300))),
    ("amos -i AMOS -source mr -target ct", PERCENTILES, ABDOMEN),
    ("cine_lge -i EMIDEC ACDC", PERCENTILES, PERCENTILES),
    ("acdc -i ACDC", None, PERCENTILES),
    ("emidec -i EMIDEC", None, PERCENTILES),
    ("brats -i BRATS -source flair -target t2", PERCENTILES, PERCENTILES),
    ("brats -i BRATS -source flair -target t2 -protocol uuds", UUDS, UUDS),
    ("brats -i BRATS -source flair -target t2 -protocol uuds -structures regions", UUDS, UUDS),
    ("vs -i VS -source cet1 -target hrt2", PERCENTILES, PERCENTILES),
    ("vs -i VS -source cet1 -target hrt2 -protocol uuds", None, None),
]
"""Options, and the intensities of source and target."""
TARGETS = {
    "mmwhs -i MMWHS -source mr -target ct": "MMWHS/ct_train/ct_train_{n}_label.nii.gz",
    "abdomen -i CHAOS BTCV -source ct -target mr": "CHAOS/Train_Sets/MR/{n}/T2SPIR/Ground/*",
    "abdomen -i CHAOS BTCV -source mr -target ct": "BTCV/RawData/Training/label/label{n:04d}.nii.gz",
    "chaos -i CHAOS -source t1in -target t2spir": "CHAOS/Train_Sets/MR/{n}/T2SPIR/Ground/*",
    "amos -i AMOS -source ct -target mr": "AMOS/labels*/amos_{n:04d}.nii.gz",
    "cine_lge -i ACDC EMIDEC -source lge -target cine": "ACDC/*/*/patient{n:03d}/*_gt.nii.gz",
    "brats -i BRATS -source flair -target t2": "BRATS/*/BraTS20_Training_{n:03d}/*_seg.nii.gz",
    "vs -i VS -source cet1 -target hrt2": "VS/*/VS-SEG-{n:03d}/*/t2-rt/*",
}
"""Options, and where the labels of the target's case ``n`` lie."""
FOLDED = [words for words in TARGETS if words.split()[0] in ("mmwhs", "abdomen", "amos")]
"""With -protocol cisfa."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vendors")
    make_vendor_trees(folder)
    make_amos(folder / "AMOS")
    make_acdc(folder / "ACDC")
    make_emidec(folder / "EMIDEC")
    return folder


@pytest.fixture
def vendors(made, tmp_path, monkeypatch) -> Path:
    use_folders(monkeypatch, tmp_path)
    return Path(shutil.copytree(made, tmp_path / "vendors"))


def convert(vendors: Path, words: str, d: str = "511") -> Path:
    folders = {path.name: str(path) for path in vendors.iterdir()}
    main([*(folders.get(word, word) for word in words.split()), "-d", d, "-np", "1"])
    return next((vendors.parent / "nnUNet_raw").glob(f"Dataset{d}_*"))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def numbers(folder: Path) -> list[int]:
    """Of the cases in a folder, as their vendor counts them."""
    return [int(re.search(r"(\d+)(_t2)?$", name)[1]) for name in names(folder)] if folder.exists() else []


@pytest.mark.parametrize(("words", "source", "target"), WAYS)
def test_intensities_and_nnunets_own_check_of_the_dataset(serial, vendors, capfd, words, source, target):
    out = convert(vendors, words)
    content = read(out / "dataset.json")
    found = read_intensities(content, "dataset.json", "source")
    assert (found.window is not None and "found" in found.origin) if source == "found" else found == source
    assert read_intensities(content, "dataset.json", "target") == target
    for folder, intensities in (("imagesTr", found), ("imagesTs", target)):
        for path in (out / folder).iterdir() if (out / folder).is_dir() and intensities else ():
            assert (intensities.clip(load(path), path) == load(path)).all()
    assert (out / "quicklook.png").exists()
    capfd.readouterr()
    verify_dataset_integrity(str(out), num_processes=1)
    said = capfd.readouterr().out
    assert "verify_dataset_integrity Done" in said
    assert not re.search("[Ww]arning|WARNING|Error", said), said


@pytest.mark.parametrize("words", [*TARGETS, "btcv -i BTCV"])
def test_what_systems_leave_beside_files_is_passed_over(vendors, words):
    clean = convert(vendors, words)
    for tree in vendors.iterdir():
        litter(tree)
    littered = convert(vendors, words, d="599")
    for folder in [path for path in clean.iterdir() if path.is_dir()]:
        assert names(littered / folder.name) == names(folder) != []


@pytest.mark.parametrize("words", [*TARGETS, *(f"{words} -protocol cisfa" for words in FOLDED)])
def test_target_labels_cannot_change_what_is_trained_on(vendors, words):
    """Those that are not for a test are not even opened; RTSTRUCTs have to be, to find the scan that they belong to."""

    def converted(d: str) -> dict[Path, bytes]:
        out = convert(vendors, words, d)
        return {p.relative_to(out): p.read_bytes() for k in ("images*/*", "labelsTr/*", "splits*") for p in out.glob(k)}

    def labels(*cases: int) -> list[Path]:
        pattern = TARGETS[words.removesuffix(" -protocol cisfa")]
        return [path for n in cases for path in vendors.glob(pattern.format(n=n))]

    before = converted("511")
    out = next((vendors.parent / "nnUNet_raw").iterdir())
    training, test = numbers(out / "imagesTu"), numbers(out / "imagesTs")
    if not words.startswith("vs"):
        for path in labels(*set(training) - set(numbers(out / "labelsTs"))):
            path.write_bytes(b"garbage")
        assert converted("512") == before
    assert len(labels(*training)) >= len(training) > 0 and (len(labels(*test)) >= len(test) > 0 or "cisfa" in words)
    for path in labels(*training, *test):
        path.unlink()
    assert converted("513") == before
    assert not list((vendors.parent / "nnUNet_raw").glob("Dataset513_*/labelsTs"))


@pytest.mark.parametrize("words", TARGETS)
def test_upper_bound(vendors, words):
    out, bound = convert(vendors, words), convert(vendors, f"{words} --upper_bound", d="525")
    assert bound.name.endswith("_upper_bound") and not (bound / "imagesTu").exists()
    assert names(bound / "imagesTr") == names(bound / "labelsTr")
    more = set(names(bound / "imagesTr")) - set(names(out / "imagesTu"))
    assert bool(more) == words.startswith("vs"), "whose patients for validation are of the source else"
    assert set(names(out / "imagesTu")) <= set(names(bound / "imagesTr"))
    assert names(bound / "imagesTs") == names(bound / "labelsTs") == names(out / "imagesTs")
    assert not {"source_domain", "target_domain"} & set(read(bound / "dataset.json").get("uda", {}))
    assert not (bound / "splits_target.json").exists()
    if (out / "splits_target.json").exists():
        assert read(bound / "splits_final.json") == read(out / "splits_target.json")


@pytest.mark.parametrize("words", FOLDED)
def test_cisfa_folds(vendors, words):
    out = convert(vendors, f"{words} -protocol cisfa")
    assert names(out / "imagesTu") == names(out / "labelsTs") and not (out / "imagesTs").exists()
    for name, folder in (("splits_final", "imagesTr"), ("splits_target", "imagesTu")):
        splits = read(out / f"{name}.json")
        assert len(splits) == 4 and sorted(i for s in splits for i in s["val"]) == names(out / folder)
        assert all(sorted(s["train"] + s["val"]) == names(out / folder) for s in splits)
    bound = convert(vendors, f"{words} -protocol cisfa --upper_bound", d="522")
    assert names(bound / "labelsTr") == names(out / "imagesTu")
    assert read(bound / "splits_final.json") == read(out / "splits_target.json")
