"""Draw README's picture of the task from real scans: ``python docs/picture.py FOLDER docs/task.png``.

FOLDER holds TotalSegmentator's test files example_ct_sm, example_seg, example_mr_sm and example_seg_mr (.nii.gz,
https://github.com/wasserth/TotalSegmentator, Apache-2.0).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_uda.dataset_conversion.quicklook import oriented
from nnunet_uda.training.pictures import write_panels

STRUCTURES = {"spleen": 1, "right kidney": 2, "left kidney": 3, "liver": 5}


def slice_of(folder: Path, image: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """The axial slice that shows every structure best, anterior up, the patient's right on the left."""
    scan, classes = (sitk.ReadImage(str(folder / f"{name}.nii.gz")) for name in (image, label))
    voxels, values = oriented(scan)[0], oriented(classes)[0]
    places = np.select([values == value for value in STRUCTURES.values()], range(1, len(STRUCTURES) + 1), 0)
    smallest = [min((cut == place).sum() for place in range(1, len(STRUCTURES) + 1)) for cut in places]
    index = int(np.argmax(smallest))
    return voxels[index].copy(), places[index]  # the view is of memory that goes with the scan


def main() -> None:
    folder, path = map(Path, sys.argv[1:])
    ct, ct_label = slice_of(folder, "example_ct_sm", "example_seg")
    mr, mr_label = slice_of(folder, "example_mr_sm", "example_seg_mr")
    ct = np.clip(ct, -160, 240)
    rows = [
        [("source: CT with labels", ct, ct_label), ("target: MR, no labels", mr, None), ("asked for", mr, mr_label)]
    ]
    write_panels(path, rows, list(STRUCTURES))


if __name__ == "__main__":
    main()
