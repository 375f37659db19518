"""A brain task on real anatomies: T1-like and T2-like MR scans of different patients, rendered from label maps.

The label maps are those that SynthSeg was trained with (github.com/BBillot/SynthSeg, Apache-2.0): FreeSurfer's labels
inside the brain, 5xx outside. Every tissue has a mean in each contrast, in arbitrary units on one scale: cerebrospinal
fluid is dark in T1 and bright in T2, white matter brighter than grey in T1 and darker in T2, deep grey nuclei lie
between, cortical bone and air are dark in both. A scan has an own set of means, smooth variation within tissues,
partial volume (blur), a bias field, Rician noise and a gain.

    OUT/T1/train/images/CASE.nii.gz    OUT/T1/train/labels/CASE.nii.gz    (FreeSurfer's values)
    OUT/T1/test/...                    OUT/T2/...

No patient is in both contrasts, none in both train and test.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import find_objects, gaussian_filter
from tqdm import tqdm

from nnunet_uda.errors import UDAError, command
from nnunet_uda.images.listing import files_in
from nnunet_uda.images.reading import read_image, stem

CONTRASTS = ("T1", "T2")
STRUCTURES = {
    "white_matter": (2, 41),
    "cortex": (3, 42),
    "lateral_ventricles": (4, 5, 43, 44),
    "thalamus": (10, 49),
    "striatum": (11, 12, 50, 51),
    "brainstem": (16,),
}
"""What is segmented, left and right in one: FreeSurfer's values of each structure."""

# tissue: (values in the label maps, T1 mean, T2 mean, relative spread between scans)
TISSUES: dict[str, tuple[tuple[int, ...], float, float, float]] = {
    "air": ((0,), 8, 8, 0.3),
    "white matter": ((2, 41, 7, 46), 760, 340, 0.04),
    "cortical grey matter": ((3, 42, 8, 47, 17, 53, 18, 54), 520, 480, 0.04),
    "cerebrospinal fluid": ((4, 43, 5, 44, 14, 15, 24, 72), 170, 960, 0.06),
    "thalamus": ((10, 49), 620, 420, 0.04),
    "striatum": ((11, 50, 12, 51, 26, 58), 560, 440, 0.04),
    "pallidum": ((13, 52), 690, 290, 0.05),
    "brainstem": ((16, 28, 60, 512), 690, 370, 0.04),
    "optic pathways": ((85, 530), 680, 400, 0.06),
    "white matter lesion": ((25, 57, 77), 640, 560, 0.08),
    "choroid plexus": ((31, 63, 136, 137, 163, 164), 380, 720, 0.1),
    "vessel": ((30, 62, 502, 514), 330, 150, 0.2),
    "eye": ((506,), 190, 940, 0.06),
    "soft tissue": ((507,), 480, 330, 0.12),
    "muscle": ((508,), 400, 180, 0.08),
    "mucosa": ((509,), 430, 720, 0.12),
    "skin and fat": ((511,), 820, 560, 0.12),
    "cortical bone": ((515,), 90, 60, 0.2),
    "marrow": ((516,), 620, 400, 0.15),
}
TEXTURE = 0.035
"""Standard deviation of the variation within a tissue, relative to its mean."""

Array = np.ndarray


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Array:
    """Random field of zero mean and unit standard deviation, smooth over ``sigma`` voxels."""
    field = gaussian_filter(rng.standard_normal(shape).astype(np.float32), sigma, mode="reflect", truncate=2.5)
    return (field - field.mean()) / field.std()


def render(labels: Array, contrast: str, rng: np.random.Generator) -> Array:
    """An MR scan of a label map.

    Args:
        labels: ``(Z, Y, X)`` integers, all of them in ``TISSUES``; voxels of about 1 to 2 mm.
        contrast: ``"T1"`` or ``"T2"``.
        rng: decides tissue means, texture, blur, bias, noise and gain.

    Returns:
        ``(Z, Y, X)`` int16, arbitrary units of 0 and more.
    """
    values = np.zeros(int(labels.max()) + 1, np.float32)
    for places, t1, t2, spread in TISSUES.values():
        mean = (t1 if contrast == "T1" else t2) * (1 + spread * rng.uniform(-1, 1))
        values[[place for place in places if place < len(values)]] = mean
    image = values[labels]
    image *= 1 + TEXTURE * (_smooth_field(rng, labels.shape, 1.0) + _smooth_field(rng, labels.shape, 6.0)) / np.sqrt(2)
    image = gaussian_filter(image, rng.uniform(0.4, 0.65))  # partial volume
    image *= np.exp(rng.uniform(0.06, 0.15) * _smooth_field(rng, labels.shape, max(labels.shape) / 5))
    noise = rng.standard_normal((2, *labels.shape)).astype(np.float32) * rng.uniform(12, 28)
    image = np.hypot(image + noise[0], noise[1]) * rng.uniform(0.6, 1.5)
    return np.round(image).astype(np.int16)


def _read_labels(path: Path) -> sitk.Image:
    """A label map around its nonzero voxels, with a margin of 3, checked to hold known values alone."""
    image = read_image(path)
    array = sitk.GetArrayViewFromImage(image)
    known = {value for values, *_ in TISSUES.values() for value in values}
    found = np.unique(array)
    unknown = [value.item() for value in found if value.item() not in known]
    if unknown or not found.any():
        seen = f"the labels {', '.join(map(str, unknown[:8]))}" if unknown else "nothing but 0"
        raise UDAError(
            f"{path}: found {seen}; expected FreeSurfer's labels with SynthSeg's 5xx outside the brain. Check -i."
        )
    box = find_objects((array > 0).astype(np.uint8))[0]
    start = [max(0, part.start - 3) for part in reversed(box)]
    size = [min(n, part.stop + 3) - low for n, part, low in zip(image.GetSize(), reversed(box), start, strict=True)]
    return sitk.RegionOfInterest(sitk.Cast(image, sitk.sitkInt16), size, start)


def make_brains(labels: Path, folder: Path, seed: int, test_share: float = 0.3) -> None:
    """Render half of the label maps as T1, the others as T2, into ``folder``, which must not exist or be empty.

    Which patient becomes what, and every scan, depend on ``seed`` and the file's name alone. All files appear together
    or none does.

    Args:
        labels: folder with at least 4 label maps (``.nii.gz`` or another ending that SimpleITK reads).
        folder: as in this module's text.
        seed: 0 or more.
        test_share: share of each contrast's patients that are held out for the test; at least one is, and one is not.

    Raises:
        UDAError: no such folder, too few or unknown label maps, an output folder that is not empty or not writable.
    """
    found = files_in(labels) if labels.is_dir() else []
    paths = [path for path in found if path.name.lower().endswith((".nii.gz", ".nii"))]
    if len(paths) < 2 * len(CONTRASTS):
        raise UDAError(
            f"{labels}: found {len(paths)} label maps (*.nii.gz); expected at least {2 * len(CONTRASTS)}, one to train "
            "and one to test with in each contrast. Check -i."
        )
    if seed < 0:
        raise UDAError(f"Brains: the seed is {seed}; expected 0 or more. Change -seed.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UDAError(f"{folder} is not empty; brains are only written to a new folder. Remove it or choose another.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".brains_")
    except OSError as error:
        raise UDAError(f"Cannot write brains to {folder}: {error}. Give a folder that can be written.") from error
    order = np.random.default_rng(seed).permutation(len(paths))
    jobs = []
    for contrast, patients in zip(CONTRASTS, np.array_split(order, len(CONTRASTS)), strict=True):
        number = min(max(1, round(test_share * len(patients))), len(patients) - 1)
        jobs += [(contrast, "test" if i < number else "train", patient) for i, patient in enumerate(patients)]
    with temporary as name:
        root = Path(name, "brains")
        for contrast, part, patient in tqdm(jobs, desc="brains", unit="scan"):
            label = _read_labels(paths[patient])
            rng = np.random.default_rng([seed, int(patient)])
            image = sitk.GetImageFromArray(render(sitk.GetArrayFromImage(label), contrast, rng))
            image.CopyInformation(label)
            for kind, volume in (("images", image), ("labels", label)):
                place = root / contrast / part / kind
                place.mkdir(parents=True, exist_ok=True)
                sitk.WriteImage(volume, str(place / f"{stem(paths[patient])}.nii.gz"), useCompression=True)
        root.replace(folder)


def convert_command(folder: Path, source: str, target: str, dataset: int, upper_bound: bool = False) -> list[str]:
    """The command that makes a dataset of ``folder``; with ``upper_bound`` the target's with its training labels."""
    train, test = folder / target / "train", folder / target / "test"
    words = ["nnUNetUDA_convert", "folders", "-d", dataset, "-name", f"Brain{source}2{target}"]
    if upper_bound:
        words = [*words[:-1], f"Brain{target}Supervised", "--upper_bound", "-target_labels", train / "labels"]
    words += ["-source", source, "-target", target]
    words += ["-source_images", folder / source / "train/images", "-source_labels", folder / source / "train/labels"]
    words += ["-target_images", train / "images", "-target_test_images", test / "images"]
    words += ["-target_test_labels", test / "labels", "--ignore_other_labels", "-labels"]
    words += [f"{name}={','.join(map(str, values))}" for name, values in STRUCTURES.items()]
    return [str(word) for word in words]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Render T1-like and T2-like MR scans of different patients from brain label maps (FreeSurfer's "
        "labels, SynthSeg's 5xx outside the brain), and print the commands that make datasets of them.",
    )
    parser.add_argument("-i", type=Path, required=True, metavar="LABEL_FOLDER", help="label maps, one file a patient")
    parser.add_argument("-o", type=Path, required=True, metavar="OUT", help="output folder, new or empty")
    parser.add_argument("-seed", type=int, default=0, help="another seed gives other pairs and scans [0]")
    args = parser.parse_args(argv)
    make_brains(args.i, args.o, args.seed)
    directions = (("T1", "T2", 531, 533), ("T2", "T1", 532, 534))
    for source, target, dataset, upper_bound in directions:
        print(f"\n# {source} to {target}, and its upper bound")
        print(shlex.join(convert_command(args.o, source, target, dataset)))
        print(shlex.join(convert_command(args.o, source, target, upper_bound, upper_bound=True)))


if __name__ == "__main__":
    command(main)()
