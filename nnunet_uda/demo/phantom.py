"""A small thorax phantom in the MM-WHS vendor layout: unpaired MR and CT scans of different patients.

Each patient is an own chest (body wall with ribs, lungs, spine, liver, vessels, heart) built from deformed, posed and
scaled solids; each scan is an own acquisition (voxel size, field of view, enhancement or gain, noise, blur, and in MR
a coil bias field). Tissue contrasts follow the modalities: contrast-enhanced CT in HU, and in MR the fat-suppressed,
T2-prepared bSSFP of whole-heart scans, in arbitrary units. Blood is brighter than muscle in both, and arterial blood
brighter than venous blood (oxygenation in MR, the timing of the bolus in CT); the distances between tissues, bone,
marrow, noise and bias differ.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_filter, zoom
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from nnunet_uda.errors import UDAError, command
from nnunet_uda.workers import as_done

LABELS = {"LV": 500, "RV": 600, "LA": 420, "RA": 550, "MYO": 205, "AA": 820, "PA": 850}
MODALITIES = ("MR", "CT")
ORIENTATIONS = ("LPS", "RAS")

# tissue: (MR mean, CT mean in HU, relative spread between scans of MR, spread of CT in HU, texture of MR, of CT)
TISSUES: dict[str, tuple[float, float, float, float, float, float]] = {
    "air": (4, -1000, 0.1, 2, 0, 0),
    "lung": (40, -810, 0.15, 30, 12, 35),
    "fat": (115, -95, 0.12, 8, 15, 10),
    "muscle": (170, 60, 0.06, 6, 14, 10),
    "myocardium": (205, 110, 0.05, 10, 14, 10),
    "liver": (245, 110, 0.08, 12, 18, 10),
    "cortical bone": (45, 780, 0.15, 60, 10, 60),
    "marrow": (145, 430, 0.08, 30, 30, 50),
    "left blood": (660, 290, 0.05, 25, 20, 10),
    "right blood": (520, 200, 0.06, 20, 20, 14),
}

Array = np.ndarray


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], knots: tuple[int, int, int]) -> Array:
    """Smooth random field of about unit standard deviation: cubic splines through normal knots."""
    field = zoom(rng.standard_normal(knots).astype(np.float32), np.array(shape) / knots, order=3, mode="nearest")
    return field / field.std()


def _ellipsoid(p: Array, centre: ArrayLike, axes: ArrayLike, frame: Array | None = None) -> Array:
    """Signed distance (mm, first order) to an ellipsoid; the rows of ``frame`` are its axes."""
    q = p - np.reshape(centre, (3, 1, 1, 1))
    if frame is not None:
        q = np.tensordot(frame.astype(np.float32), q, 1)
    q = q / np.reshape(axes, (3, 1, 1, 1)).astype(np.float32)
    r = np.sqrt((q**2).sum(0)) + 1e-6
    return (r - 1) * r / np.sqrt(((q / np.reshape(axes, (3, 1, 1, 1)).astype(np.float32)) ** 2).sum(0) + 1e-9)


def _tube(p: Array, points: Array, radius: float) -> Array:
    """Signed distance (mm) to a tube around a polyline."""
    distance = np.full(p.shape[1:], np.inf, np.float32)
    for start, end in pairwise(points):
        axis = (end - start).astype(np.float32)
        q = p - np.reshape(start, (3, 1, 1, 1)).astype(np.float32)
        t = np.clip(np.tensordot(axis, q, 1) / (axis @ axis), 0, 1)
        distance = np.minimum(distance, np.sqrt(((q - axis.reshape(3, 1, 1, 1) * t) ** 2).sum(0)))
    return distance - radius


def _smooth_union(a: Array, b: Array, width: float) -> Array:
    h = np.clip(0.5 + 0.5 * (b - a) / width, 0, 1)
    return b + (a - b) * h - width * h * (1 - h)


class _Canvas:
    """Paints tissues over each other with soft (partial volume) edges, and labels with hard ones."""

    def __init__(self, shape: tuple[int, ...], edge: float, values: dict[str, tuple[float, float]]):
        self.values, self.edge = values, edge
        self.mean = np.full(shape, values["air"][0], np.float32)
        self.texture = np.full(shape, values["air"][1], np.float32)
        self.label = np.zeros(shape, np.int16)

    def paint(self, distance: Array, tissue: str, label: int = 0) -> None:
        alpha = np.clip(0.5 - distance / self.edge, 0, 1)
        mean, texture = self.values[tissue]
        self.mean += alpha * (mean - self.mean)
        self.texture += alpha * (texture - self.texture)
        self.label[distance < 0] = label


def _paint_chest(canvas: _Canvas, p: Array, rng: np.random.Generator) -> None:
    """Everything but the heart; ``p`` in mm from the heart's centre, axes to the left, the back and the head."""
    x, y, z = p
    flat = p * np.array([1, 1, 0], np.float32).reshape(3, 1, 1, 1)
    fat = rng.uniform(10, 20)
    body = np.array([rng.uniform(150, 165), rng.uniform(100, 108), 1e3])
    middle = np.array([0, rng.uniform(8, 14), 0])
    skin = _ellipsoid(flat, middle, body)
    canvas.paint(skin, "fat")
    canvas.paint(skin + fat, "muscle")
    cavity = _ellipsoid(flat, middle - [0, 2, 0], body - [fat + 14, fat + 14, 0])

    phase = (z - rng.uniform(0.3, 0.5) * y + rng.uniform(0, 28)) % 28 - 14
    rib = np.hypot(cavity - 7, phase * 0.92)
    rib[np.abs(x) < 22] = 99
    canvas.paint(rib - 6, "cortical bone")
    canvas.paint(rib - 3, "marrow")

    canvas.paint(cavity, "lung")
    vessels = _smooth_field(rng, x.shape, (14, 14, 9))
    canvas.paint(np.maximum(3 * (2.1 - vessels), cavity + 4), "right blood")

    mediastinum = np.array([rng.uniform(30, 36), rng.uniform(62, 70), 1e3])
    canvas.paint(np.maximum(_ellipsoid(flat, [2, 8, 0], mediastinum), cavity), "fat")

    dome = np.array([-62 + rng.uniform(-8, 8), 5, -116 + rng.uniform(-6, 6)])
    liver = np.maximum(_ellipsoid(p, dome, [88, 88, 72]), cavity)
    stomach = np.maximum(_ellipsoid(p, dome * [-1.1, 1, 1.05], [70, 75, 60]), cavity)
    canvas.paint(stomach - 3, "muscle")
    canvas.paint(liver - 3, "muscle")
    canvas.paint(liver, "liver")

    spine = np.array([rng.uniform(-4, 4), middle[1] + body[1] - fat - rng.uniform(26, 30), 0])
    canvas.paint(np.maximum(_ellipsoid(flat, np.add(spine, [0, 8, 0]), [44, 26, 1e3]), skin + fat), "muscle")
    process = np.minimum(_tube(p, spine + np.array([[-30, 22, 0], [0, 20, 0], [30, 22, 0]]), 5),
                         np.maximum(np.abs(x - spine[0]) - 4, np.abs(y - spine[1] - 26) - 12))  # fmt: skip
    canvas.paint(process, "cortical bone")
    canvas.paint(process + 2.5, "marrow")
    vertebra = _ellipsoid(flat, spine, np.array([rng.uniform(17, 20), rng.uniform(14, 16), 1e3]))
    disc = np.abs((z + rng.uniform(0, 26)) % 26 - 13) - 3.5
    canvas.paint(vertebra, "cortical bone")
    canvas.paint(vertebra + 2.5, "marrow")
    canvas.paint(np.maximum(vertebra + 1, disc), "muscle")
    canvas.paint(_ellipsoid(flat, np.add(spine, [0, 20, 0]), [8, 7, 1e3]), "muscle")

    front = middle[1] - 2 - (body[1] - fat - 14)
    sternum = _ellipsoid(flat, [rng.uniform(-3, 3), front - 4, 0], [19, 6, 1e3])
    canvas.paint(sternum, "cortical bone")
    canvas.paint(sternum + 2.5, "marrow")

    canvas.paint(_tube(p, np.array([[4, 50, -99], [2, 48, 99]]), 7), "muscle")  # oesophagus
    aorta = np.array([[24, 52, -99], [rng.uniform(20, 30), rng.uniform(47, 53), 0], [20, 48, 99]])
    radius = rng.uniform(10.5, 13)
    canvas.paint(_tube(p, aorta, radius + 1.5), "muscle")
    canvas.paint(_tube(p, aorta, radius), "left blood")


def _paint_heart(canvas: _Canvas, p: Array, rng: np.random.Generator) -> None:
    """The heart in its own pose; same axes as the chest, before its rotation."""

    def about(*values: float, spread: float = 3) -> Array:
        return np.array(values) + rng.uniform(-spread, spread, len(values))

    def size(*values: float) -> Array:
        return np.array(values) * rng.uniform(0.9, 1.1, len(values))

    def chamber(distance: Array, tissue: str, name: str, wall: float) -> None:
        canvas.paint(distance - wall, "myocardium")
        canvas.paint(distance, tissue, LABELS[name])

    long_axis = about(0.66, -0.60, -0.45, spread=0.07)
    long_axis /= np.linalg.norm(long_axis)
    side = np.cross(long_axis, [0, 0, 1.0])
    side /= np.linalg.norm(side)
    frame = np.stack([long_axis, side, np.cross(long_axis, side)])

    lv = about(22, -14, -16)
    lv_axes = size(44, 23, 23)
    thickness = rng.uniform(10.5, 13)
    base = rng.uniform(22, 26)
    along = np.tensordot(long_axis.astype(np.float32), p - lv.reshape(3, 1, 1, 1).astype(np.float32), 1)
    la_centre = lv - (base + 27) * long_axis + about(0, 9, 1, spread=2)
    root = lv - (base + 2) * long_axis + about(-4, -13, 10, spread=2)
    bend = root + about(-11, -5, 22)
    aorta = np.stack([root, bend, bend + about(-3, 5, 24), bend + about(6, 16, 50)])
    valve = about(14, -38, 18)
    fork = valve + about(3, 34, 24)
    pulmonary = np.stack([valve, valve + about(6, 14, 16), fork])
    vena_cava = np.stack([about(-36, 4, 8), about(-32, 4, 45), about(-30, 2, 99)])

    canvas.paint(_ellipsoid(p, about(-2, -8, -10), size(70, 53, 56)), "fat")  # epicardial fat
    ra = _ellipsoid(p, about(-42, 2, -12), size(20, 25, 28))
    cava = np.minimum(_tube(p, vena_cava, rng.uniform(8, 10)),
                      _tube(p, np.array([[-40, 12, -30], [-32, 24, -99]]), rng.uniform(9, 12)))  # fmt: skip
    canvas.paint(cava - 1.5, "muscle")
    canvas.paint(cava, "right blood")
    chamber(ra, "right blood", "RA", 2.5)
    rv = _ellipsoid(p, lv + about(-27, -19, 1), size(42, 25, 27), frame)
    outflow = _tube(p, np.stack([np.add(lv, [-20, -26, 14]), valve]), rng.uniform(12, 14))
    chamber(np.maximum(_smooth_union(rv, outflow, 8), -(ra - 2.5)), "right blood", "RV", 3.5)

    arms = np.minimum(_tube(p, np.stack([fork, np.add(fork, [-46, 2, -2])]), rng.uniform(8, 10)),
                      _tube(p, np.stack([fork, np.add(fork, [32, 14, 2])]), rng.uniform(8, 10)))  # fmt: skip
    chamber(_smooth_union(_tube(p, pulmonary, rng.uniform(12, 14.5)), arms, 5), "right blood", "PA", 1.5)

    chamber(_ellipsoid(p, la_centre, size(32, 21, 24)), "left blood", "LA", 2.5)
    outer = np.maximum(_ellipsoid(p, lv, lv_axes + thickness, frame), -(along + base))
    inner = np.maximum(_ellipsoid(p, lv, lv_axes, frame), -(along + base - 1))
    canvas.paint(outer, "myocardium", LABELS["MYO"])
    canvas.paint(inner, "left blood", LABELS["LV"])

    trunk = (bend - root) / np.linalg.norm(bend - root)
    above_valve = -np.tensordot(trunk.astype(np.float32), p - root.reshape(3, 1, 1, 1).astype(np.float32), 1)
    chamber(np.maximum(_tube(p, aorta, rng.uniform(14, 17)), above_valve), "left blood", "AA", 2)


def _scan(modality: str, rng: np.random.Generator) -> tuple[sitk.Image, sitk.Image]:
    """One scan of one new patient, with its label map; axes to the left, the back and the head (LPS)."""
    in_plane = rng.uniform(2.4, 2.7) if modality == "MR" else rng.uniform(2.5, 2.8)
    spacing = np.array([in_plane, in_plane, rng.uniform(3.8, 4.6)])
    extent = np.array([196, 186, 122]) + rng.uniform(-6, 6, 3)
    shape = tuple(int(n) for n in np.round(extent / spacing))
    centre = np.array([4, -2, -6]) + rng.uniform(-6, 6, 3)

    axes = [(np.arange(n) - (n - 1) / 2) * s + c for n, s, c in zip(shape, spacing, centre, strict=True)]
    p = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    p += np.stack([_smooth_field(rng, shape, (5, 5, 4)) for _ in range(3)]) * rng.uniform(1.5, 3)
    p /= (rng.uniform(0.92, 1.06) * rng.uniform(0.97, 1.03, 3)).reshape(3, 1, 1, 1).astype(np.float32)
    tilt = Rotation.from_euler("xyz", rng.uniform(-5, 5, 3), degrees=True).as_matrix().astype(np.float32)
    pose = Rotation.from_euler("xyz", rng.uniform(-12, 12, 3), degrees=True).as_matrix().astype(np.float32)

    mr = modality == "MR"
    values = {
        name: (mr_mean * (1 + mr_spread * rng.uniform(-1, 1)), mr_texture)
        if mr
        else (ct_mean + ct_spread * rng.uniform(-1, 1), ct_texture)
        for name, (mr_mean, ct_mean, mr_spread, ct_spread, mr_texture, ct_texture) in TISSUES.items()
    }
    canvas = _Canvas(shape, 1.2 * in_plane, values)
    p = np.tensordot(tilt, p, 1)
    _paint_chest(canvas, p, rng)
    _paint_heart(canvas, np.tensordot(pose, p, 1), rng)

    texture = gaussian_filter(rng.standard_normal(shape).astype(np.float32), (1, 1, 0.5))
    image = canvas.mean + canvas.texture * texture / texture.std()
    blur = rng.uniform(0.35, 0.6)
    image = gaussian_filter(image, (blur, blur, 0.3))
    if mr:
        image *= np.exp(rng.uniform(0.08, 0.18) * _smooth_field(rng, shape, (3, 3, 3)))
        sigma = rng.uniform(15, 25)
        noise = rng.standard_normal((2, *shape)).astype(np.float32) * sigma
        image = np.hypot(image + noise[0], noise[1]) * rng.uniform(0.6, 1.5)
    else:
        noise = gaussian_filter(rng.standard_normal(shape).astype(np.float32), (0.5, 0.5, 0))
        image = np.maximum(image + noise / noise.std() * rng.uniform(18, 35), -1024)

    orientation = ORIENTATIONS[rng.integers(len(ORIENTATIONS))]
    origin = rng.uniform(-200, 0, 3)
    scan = []
    for array in (np.round(image).astype(np.int16), canvas.label):
        out = sitk.GetImageFromArray(array.transpose(2, 1, 0))
        out.SetSpacing(spacing.tolist())
        out.SetOrigin(origin.tolist())
        scan.append(sitk.DICOMOrient(out, orientation))
    return scan[0], scan[1]


def _write_patient(task: tuple[str, int], folder: Path, seed: int) -> None:
    modality, number = task
    image, label = _scan(modality, np.random.default_rng([seed, MODALITIES.index(modality), number]))
    stem = folder / f"{modality.lower()}_train" / f"{modality.lower()}_train_{1001 + number}"
    sitk.WriteImage(image, f"{stem}_image.nii.gz", useCompression=True)
    sitk.WriteImage(label, f"{stem}_label.nii.gz", useCompression=True)


def make_phantom(folder: Path, seed: int, num_mr: int = 16, num_ct: int = 16, num_processes: int = 2) -> None:
    """Write ``{mr,ct}_train/{mr,ct}_train_10xx_{image,label}.nii.gz`` under ``folder``, as MM-WHS does.

    A patient depends on ``seed``, modality and number alone: the same files for any ``num_processes``, and no patient
    is in both modalities. Images are int16 (CT in HU), about 75 x 70 x 29 voxels of 2.6 x 2.6 x 4.2 mm, stored LPS or
    RAS; labels are ``LABELS``. All files appear together or none does. Raises ``UDAError`` for impossible numbers, or
    if the folder cannot be written or already holds scans.
    """
    folder = Path(folder)
    if seed < 0 or num_mr < 1 or num_ct < 1 or num_processes < 1:
        raise UDAError(
            f"Phantom: seed {seed}, {num_mr} MR and {num_ct} CT patients, {num_processes} processes were asked for; "
            "expected a seed of 0 or more, and at least one of each other. Change the arguments."
        )
    for modality in MODALITIES:
        target = folder / f"{modality.lower()}_train"
        if target.exists():
            raise UDAError(
                f"{target} already exists; a phantom is only written to a folder without one. "
                "Delete it or choose another folder."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".phantom_")
    except OSError as error:
        raise UDAError(f"Cannot write a phantom to {folder}: {error}. Give a folder that can be written.") from error
    with temporary as name:
        for modality in MODALITIES:
            (Path(name) / f"{modality.lower()}_train").mkdir()
        tasks = [("MR", i) for i in range(num_mr)] + [("CT", i) for i in range(num_ct)]
        write = partial(_write_patient, folder=Path(name), seed=seed)
        written = map(write, tasks) if num_processes == 1 else as_done(write, tasks, num_processes)
        list(tqdm(written, total=len(tasks), desc="phantom", unit="scan"))
        for part in Path(name).iterdir():
            part.rename(folder / part.name)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a thorax phantom (unpaired MR and CT) in the MM-WHS layout.")
    parser.add_argument("-o", type=Path, required=True, help="folder for mr_train and ct_train")
    parser.add_argument("-seed", type=int, default=0, help="any number from 0; another seed gives other patients")
    parser.add_argument("-num_mr", type=int, default=16, help="MR patients")
    parser.add_argument("-num_ct", type=int, default=16, help="CT patients")
    parser.add_argument("-np", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    make_phantom(args.o, args.seed, args.num_mr, args.num_ct, args.np)


if __name__ == "__main__":
    command(main)()
