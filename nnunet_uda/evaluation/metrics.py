"""Dice, ASSD and HD95 of one volume or of a folder of volumes.

For each structure, with R the reference and P the prediction:

* Dice = 2 |R and P| / (|R| + |P|).
* A surface is the set of the voxels of a mask that have a face neighbour outside it (outside the image counts as
  outside). Distances run between voxel centres, in mm, from every surface voxel to the nearest of the other surface.
* ASSD (mm) = the sum of both directed sets of distances / the number of surface voxels of both.
* HD95 (mm) = the larger of the two directed 95th percentiles.

Rule for empty masks. Both empty: all values are NaN, the volume does not count (as in ``nnUNetv2_evaluate_folder``).
Only one empty: Dice is 0; ASSD and HD95 are NaN, and the tables count the volume as undefined beside their means.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import KDTree
from tqdm import tqdm

from nnunet_uda.errors import UDAError
from nnunet_uda.images.geometry import check_same_geometry
from nnunet_uda.images.listing import files_in
from nnunet_uda.images.nifti import choose_geometry, chosen_geometry
from nnunet_uda.images.reading import LabelMap, read_image
from nnunet_uda.names import check_name
from nnunet_uda.workers import as_done

PATIENCE = 5.0
"""Seconds of work after which processes are started for the rest: each imports for as long as that."""

METRICS = ("Dice", "ASSD", "HD95")


def read_segmentation(
    path: Path, labels: dict[str, int], ignore_label: int | None = None, label_map: LabelMap | None = None
) -> sitk.Image:
    """Read a label map whose values, once ``label_map`` is applied, are 0, those of ``labels`` or ``ignore_label``.

    Raises:
        UDAError: as ``read_image``, and for a value that is not an integer or not among the labels.
    """
    image = read_reference(path, label_map)
    known = {0, *labels.values()} | (set() if ignore_label is None else {ignore_label})
    unknown = [value for value in _integers(image, path) if value not in known]
    if unknown:
        listed = ", ".join(f"{value} {name}" for name, value in labels.items())
        raise UDAError(
            f"{path} holds the label(s) {', '.join(map(str, unknown[:5]))}, which the dataset does not have "
            f"(it has {listed}). nnUNetUDA_evaluate -labels NAME=VALUE ... says what a "
            "reference's values mean. Else use the dataset.json that belongs to the file"
        )
    return image


def read_reference(path: Path, label_map: LabelMap | None = None) -> sitk.Image:
    """``read_image``, with the file's values mapped to the dataset's classes."""
    image = read_image(path, (2, 3))
    if label_map is None:
        return image
    classes = sitk.GetImageFromArray(label_map.apply(image, path))
    classes.CopyInformation(image)
    return classes


def integer_values(path: Path) -> list[int]:
    """The values of a label file, in order.

    Raises:
        UDAError: as ``read_image``, and for a value that is not an integer.
    """
    return _integers(read_image(path, (2, 3)), path)


def _integers(image: sitk.Image, path: Path) -> list[int]:
    values = np.unique(sitk.GetArrayViewFromImage(image))
    broken = values[~np.isfinite(values) | (values != np.round(values))]
    if broken.size:
        raise UDAError(
            f"{path} holds the non-integer label {broken[0]}, expected integer labels only. It is a probability map, "
            "or was resampled by interpolation: use nearest-neighbour, or threshold it"
        )
    return [int(value) for value in values]


def surface_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (mm) from the prediction's surface voxels to the reference's surface, and the reverse.

    Args:
        reference: bool, any number of dimensions, not empty.
        prediction: bool, same shape, not empty.
        spacing: mm for each axis of the arrays.
    """
    (box,) = find_objects((reference | prediction).astype(np.uint8))
    masks = (reference[box], prediction[box])
    # mask minus its erosion, outside the box counting as background
    ours, theirs = (np.argwhere(mask ^ binary_erosion(mask)) * np.asarray(spacing) for mask in masks)
    return KDTree(ours).query(theirs)[0], KDTree(theirs).query(ours)[0]


def evaluate_masks(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Dice, ASSD (mm) and HD95 (mm) of one structure, and the voxel counts of both masks.

    Args:
        reference: bool, any number of dimensions.
        prediction: bool, same shape.
        spacing: mm for each axis of the arrays.
    """
    n_reference, n_prediction = int(reference.sum()), int(prediction.sum())
    scores = dict.fromkeys(METRICS, math.nan)
    if n_reference + n_prediction:
        scores["Dice"] = 2 * int((reference & prediction).sum()) / (n_reference + n_prediction)
    if n_reference and n_prediction:
        there, back = surface_distances(reference, prediction, spacing)
        scores["ASSD"] = float((there.sum() + back.sum()) / (there.size + back.size))
        scores["HD95"] = float(max(np.percentile(there, 95), np.percentile(back, 95)))
    return scores | {"n_reference": n_reference, "n_prediction": n_prediction}


def evaluate_case(
    reference: Path,
    prediction: Path,
    labels: dict[str, int],
    ignore_label: int | None = None,
    label_map: LabelMap | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of one volume: ``{structure: {"Dice", "ASSD", "HD95", "n_reference", "n_prediction"}}``.

    Args:
        reference: file of the reference label map.
        prediction: file of the predicted label map, on the same voxel grid.
        labels: value of each structure; a value of 0 is background and is left out.
        ignore_label: voxels with this value in the reference are background in both.
        label_map: the reference's values to those of ``labels``, where they differ.

    Raises:
        UDAError: for an unreadable file, different voxel grids or an unknown label; it names the file(s).
    """
    reference_image = read_segmentation(reference, labels, ignore_label, label_map)
    prediction_image = read_segmentation(prediction, labels)
    check_same_geometry(reference_image, reference, prediction_image, prediction)
    reference_array = sitk.GetArrayFromImage(reference_image)
    prediction_array = sitk.GetArrayFromImage(prediction_image)
    if ignore_label is not None:
        ignored = reference_array == ignore_label
        reference_array[ignored] = 0
        prediction_array[ignored] = 0
    spacing = reference_image.GetSpacing()[::-1]  # arrays are (z, y, x)
    return {
        name: evaluate_masks(reference_array == value, prediction_array == value, spacing)
        for name, value in labels.items()
        if value != 0
    }


def list_cases(folder: Path, file_ending: str) -> list[str]:
    """Sorted ids of the segmentations in ``folder``.

    Raises:
        UDAError: if the folder is missing or holds no file with this ending, and for an id that is no name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else "does not exist"
        raise UDAError(f"the folder {folder} {found}; expected one with files named like CASE{file_ending}")
    names = [path.name for path in files_in(folder)]
    cases = sorted(name[: -len(file_ending)] for name in names if name.endswith(file_ending))
    if not cases:
        raise UDAError(f"{folder} holds no segmentation: expected files named like CASE{file_ending}")
    for case in cases:
        check_name(case, f"{folder}: a case")
    return cases


def check_cases(reference: Path, prediction: Path, file_ending: str, cases: Sequence[str] | None = None) -> list[str]:
    """The cases to score: ``cases``, or every reference. Predictions must be exactly these.

    Raises:
        UDAError: naming a case without a reference, a missing or an extra prediction.
    """
    references, predictions = list_cases(reference, file_ending), list_cases(prediction, file_ending)
    expected = sorted(references if cases is None else cases)
    origin = f"the references in {reference}" if cases is None else "the cases of the fold(s)"
    for problem, found, advice in (
        (f"no reference in {reference}", set(expected) - set(references), "Add it, or correct the list of cases"),
        (f"no prediction in {prediction}", set(expected) - set(predictions), "Predict it: none is left out silently"),
        (f"a prediction in {prediction}, but not among {origin}", set(predictions) - set(expected), "Move it away"),
    ):
        if found:
            names = ", ".join(name + file_ending for name in sorted(found)[:10])
            more = f" and {len(found) - 10} more" if len(found) > 10 else ""
            raise UDAError(f"{problem}: {names}{more}. {advice}")
    return expected


def evaluate_folder(
    reference: Path,
    prediction: Path,
    labels: dict[str, int],
    file_ending: str = ".nii.gz",
    cases: Sequence[str] | None = None,
    ignore_label: int | None = None,
    num_processes: int = 1,
) -> dict[str, dict[str, dict[str, float]]]:
    """``evaluate_case`` of every reference (or of exactly ``cases``) in a folder, by case id.

    Raises:
        UDAError: as ``evaluate_case``, and for a missing or an extra prediction.
    """
    reference, prediction = Path(reference), Path(prediction)
    chosen = check_cases(reference, prediction, file_ending, cases)
    tasks = [(reference / f"{c}{file_ending}", prediction / f"{c}{file_ending}", labels, ignore_label) for c in chosen]
    return dict(zip(chosen, parallel(evaluate_case, tasks, num_processes, "Scores"), strict=True))


def parallel(function: Callable[..., Any], tasks: Sequence[tuple], num_processes: int, description: str) -> list[Any]:
    """``[function(*task) for task in tasks]`` with a progress bar; long work is spread over spawned processes."""
    numbered = _done(function, tasks, num_processes)
    found = dict(tqdm(numbered, desc=description, unit="volume", total=len(tasks)))
    return [found[index] for index in range(len(tasks))]


def _done(function: Callable[..., Any], tasks: Sequence[tuple], num_processes: int) -> Iterator[tuple[int, Any]]:
    """Yield each task's number and result: this process works for ``PATIENCE`` seconds, others do the rest."""
    left, begun = list(enumerate(tasks)), time.monotonic()
    while left and (num_processes <= 1 or len(left) == 1 or time.monotonic() - begun <= PATIENCE):
        yield _numbered(function, left.pop(0))
    if left:
        set_up = partial(_set_up, chosen_geometry())
        yield from as_done(partial(_numbered, function), left, min(num_processes, len(left)), set_up)


def _numbered(function: Callable[..., Any], task: tuple[int, tuple]) -> tuple[int, Any]:
    return task[0], function(*task[1])


def _set_up(geometry: str | None) -> None:
    """Make a worker read files by this process's geometry, with one thread."""
    choose_geometry(geometry)
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, which scores load
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
