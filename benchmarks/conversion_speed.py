"""How near conversion comes to what reading and gzip alone cost, and how much memory it takes.

Makes volumes of a CT's size with noise of a CT's entropy, converts them with ``nnUNetUDA_convert folders -np 1`` in a
process of its own, and, in another, only reads and writes the same files with SimpleITK. CPU seconds, so that other
programs on the machine do not count; the start of Python is measured and taken off.

    python benchmarks/conversion_speed.py
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk

COPY = """
import sys
from pathlib import Path
import SimpleITK as sitk
import nnunet_uda.dataset_conversion.folders
for path in sorted(Path(sys.argv[1]).glob("*/*.nii.gz")):
    sitk.WriteImage(sitk.ReadImage(str(path)), str(Path(sys.argv[2], path.parent.name + path.name)), True)
"""


def make_volumes(folder: Path, number: int, size: int, slices: int) -> None:
    """Source and target folders with ``number`` volumes each, and labels of the source."""
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[:slices, :size, :size]
    ball = (x - size / 2) ** 2 + (y - size / 2) ** 2 + (2 * (z - slices / 2)) ** 2 < (size / 4) ** 2
    for index in range(number):
        for name in ("source", "target"):
            array = (rng.normal(0, 12, ball.shape) + 60 * ball).astype(np.int16)
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((0.8, 0.8, 2.5))
            (folder / name).mkdir(exist_ok=True)
            sitk.WriteImage(image, str(folder / name / f"{name}{index}.nii.gz"), True)
        label = sitk.GetImageFromArray(ball.astype(np.uint8))
        label.CopyInformation(image)
        (folder / "labels").mkdir(exist_ok=True)
        sitk.WriteImage(label, str(folder / "labels" / f"source{index}.nii.gz"), True)


def measure(*command: str, **variables: str) -> tuple[float, float]:
    """CPU seconds and peak MiB of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = f"import resource, subprocess, sys; subprocess.run({list(command)!r}, check=True); " \
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | variables, check=True, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, int(done.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=2, help="volumes in source and in target [2]")
    parser.add_argument("-size", type=int, default=512, help="voxels of a slice's edge [512]")
    parser.add_argument("-slices", type=int, default=120, help="slices of a volume [120]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_volumes(folder, args.n, args.size, args.slices)
        raw, copies = folder / "raw", folder / "copies"
        copies.mkdir()
        start, idle = measure(sys.executable, "-c", "import nnunet_uda.dataset_conversion.folders")
        copied, _ = measure(sys.executable, "-c", COPY, str(folder), str(copies))
        converted, peak = measure(
            sys.executable, "-m", "nnunet_uda.dataset_conversion.folders", "-d", "1", "-name", "Speed", "-source", "A",
            "-target", "B", "-source_images", str(folder / "source"), "-source_labels", str(folder / "labels"),
            "-target_images", str(folder / "target"), "-labels", "ball=1", "-np", "1", nnUNet_raw=str(raw),
        )  # fmt: skip
        volume = args.size**2 * args.slices * 2 / 2**20
        print(
            f"{2 * args.n} volumes of {volume:.0f} MiB and {args.n} labels, one process, CPU seconds without start-up:"
        )
        print(f"  reading and gzip alone  {copied - start:.1f}")
        print(f"  conversion              {converted - start:.1f} ({(copied - start) / (converted - start):.2f} of the "
              f"speed), peak {peak - idle:.0f} MiB above start-up")  # fmt: skip


if __name__ == "__main__":
    main()
