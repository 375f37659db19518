"""Write a dataset of the labelled source and of target scans labelled by predictions, for a last round of training."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_uda.data.convention import (
    LABEL_VALUES,
    OTHER_LABEL_VALUES,
    check_splits,
    labelled_target_files,
    read_json,
    source_cases,
    target_cases,
)
from nnunet_uda.data.general_model import StructureMap, find_predictions, read_prediction
from nnunet_uda.data.pseudo_labels import implausible_structures, keep_components, structure_volumes
from nnunet_uda.errors import UDAError, shown
from nnunet_uda.files import link, whole_folder, write_json
from nnunet_uda.images.geometry import on_grid
from nnunet_uda.images.reading import LabelMap, read_image, read_label, write_image
from nnunet_uda.names import check_name

PREFIX = "pseudo_"
SPLITS = "splits_final.json"
REPORT = "pseudo_labels.json"
"""Beside dataset.json, where nnU-Net does not look: of each scan, whether it was taken and why."""


@dataclass(frozen=True)
class Request:
    """What is wanted, checked.

    Attributes:
        raw: raw dataset to start from.
        dataset_json: its ``dataset.json``.
        structures: their names, for the classes 1, 2, ...
        predictions: folder with one label file a target case, or one folder (``data.general_model``).
        share, factor: see ``keep_components`` and ``implausible_structures``.
        names: what the predictions call the structures; None where they are of a model of this dataset.
        estimates: of each case's Dice, by ``nnUNetUDA_quality``; least: what they must be.
    """

    raw: Path
    dataset_json: dict[str, Any]
    structures: list[str]
    predictions: Path
    share: float
    factor: float
    names: StructureMap | None = None
    estimates: dict[str, float] | None = None
    least: float = 0.0

    @property
    def label_map(self) -> LabelMap:
        """What a prediction may hold."""
        return LabelMap(
            {value: value for value in range(1, len(self.structures) + 1)},
            names=dict(enumerate(self.structures, 1)),
            hint=f"Expected the labels of {self.raw.name}: predict with a model trained on it, or map the values.",
        )

    @property
    def ending(self) -> str:
        return self.dataset_json["file_ending"]


def new_dataset(root: Path, name: str) -> Path:
    """The folder of a dataset that does not exist yet.

    Raises:
        UDAError: no dataset's name, or an id that is taken.
    """
    match = re.fullmatch(r"Dataset([0-9]{3})_[A-Za-z0-9_-]+", name)
    if not match:
        raise UDAError(f"-o takes the new dataset's name, DatasetXXX_NAME, found {shown(name)}")
    check_name(name, "-o", file=True)
    taken = sorted(path.name for path in root.glob(f"Dataset{match[1]}_*"))
    if taken:
        raise UDAError(f"{root / taken[0]} exists: give a dataset id that is free, or remove it. Nothing was written")
    return root / name


def write_pseudo_labelled(request: Request, final: Path) -> tuple[list[str], int, int, int]:
    """Write the dataset ``final``.

    Returns:
        A line on each target case, and the numbers of source cases, target cases and those taken.

    Raises:
        UDAError: predictions that are missing, superfluous or of another dataset, or none that is plausible.
    """
    targets = target_cases(request.raw, request.dataset_json)
    labelled = labelled_target_files(request.raw, request.dataset_json, targets)
    predictions = find_predictions(request.predictions, targets.keys(), labelled.keys(), request.ending)
    known = _source_volumes(request)
    with whole_folder(final) as folder:
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir()
        lines, kept, report = [], [], {}
        for identifier, images in tqdm(targets.items(), desc="Pseudo labels", unit="case"):
            if identifier in labelled:
                label, found = _own_label(request, labelled[identifier], images[0])
            else:
                label, found = _pseudo_label(request, identifier, predictions[identifier], images[0], known)
            report[identifier] = found
            why, notes = found["left_out"], "; ".join(found["notes"])
            lines.append(f"  {identifier}: {'left out, ' + why if why else 'taken'}{notes and f' ({notes})'}")
            if not why:
                kept.append(PREFIX + identifier)
                write_image(label, folder / "labelsTr" / f"{kept[-1]}{request.ending}")
                for image in images:
                    link(image, folder / "imagesTr" / f"{PREFIX}{image.name}")
        if not kept:
            raise UDAError(f"no prediction in {request.predictions} is plausible:\n" + "\n".join(lines))
        _add_source(request, kept, folder)
        write_json(report, folder / REPORT)
    return lines, len(known), len(targets), len(kept)


def _source_volumes(request: Request) -> np.ndarray:
    """``(N, structures)`` volumes of the labelled cases, in cubic mm."""
    label_map = replace(request.label_map, values={**request.label_map.values, **_ignored(request.dataset_json)})
    volumes = []
    for images, path in source_cases(request.raw, request.dataset_json).values():
        other = [file for file in (*images, path) if not file.name.endswith(request.ending)]
        if other:
            raise UDAError(f"{other[0]}: expected a file that ends in {request.ending}, as 'file_ending' says")
        label = read_image(path)
        array = label_map.apply(label, path)
        volumes.append(structure_volumes(array, len(request.structures), label.GetSpacing()))
    if not volumes:
        raise UDAError(f"{request.raw / 'imagesTr'} holds no image; expected files like CASE_0000{request.ending}")
    return np.array(volumes)


def _ignored(dataset_json: dict[str, Any], keep: bool = False) -> dict[int, int]:
    """What nnU-Net's ignore label, which labels made by hand may hold, becomes: background, or itself."""
    ignore = dataset_json["labels"].get("ignore")
    return {} if ignore is None else {ignore: ignore if keep else 0}


def _own_label(request: Request, path: Path, image: Path) -> tuple[sitk.Image, dict[str, Any]]:
    """The label of a scan that was labelled by hand, as ``_pseudo_label`` returns one."""
    scan = read_image(image)
    label, _ = read_label(path, scan, image)
    values = {**request.label_map.values, **_ignored(request.dataset_json, keep=True)}
    label_map = replace(request.label_map, values=values)
    return on_grid(label_map.apply(label, path), scan), {"left_out": "", "notes": ["its own label"]}


def _pseudo_label(
    request: Request, case: str, place: Path, image: Path, known: np.ndarray
) -> tuple[sitk.Image, dict[str, Any]]:
    """The cleaned prediction of a case; why it is left out, empty where it is taken; volumes and what was removed."""
    scan = read_image(image)
    number = len(request.structures)
    classes, notes = read_prediction(place, scan, image, request.names, request.structures, request.label_map)
    cleaned = keep_components(classes, number, request.share)
    before, volumes = (structure_volumes(one, number, scan.GetSpacing()) for one in (classes, cleaned))
    removed = {
        name: round(float(b - v) / 1000, 3)
        for name, b, v in zip(request.structures, before, volumes, strict=True)
        if b > v
    }
    if removed:
        listed = ", ".join(f"{volume:.3g} ml of {name}" for name, volume in removed.items())
        notes.append(f"small components removed: {listed}")
    wrong = [
        f"{request.structures[i - 1]} has {volumes[i - 1] / 1000:.1f} ml (source "
        f"{known[:, i - 1].min() / 1000:.1f} to {known[:, i - 1].max() / 1000:.1f} ml)"
        for i in implausible_structures(volumes, known, request.factor)
    ]
    if request.estimates is not None:
        if case not in request.estimates:
            raise UDAError(f"the quality report (-q) has no case {case}: make it of all of {image.parent}")
        estimate = request.estimates[case]
        if not estimate >= request.least:
            wrong.append(f"its estimated Dice is {estimate:.2f}, below {request.least:g}")
    in_ml = dict(zip(request.structures, (round(float(volume) / 1000, 3) for volume in volumes), strict=True))
    return on_grid(cleaned, scan), {
        "left_out": "; ".join(wrong), "notes": notes, "volumes_ml": in_ml, "removed_ml": removed,
    }  # fmt: skip


def _add_source(request: Request, kept: list[str], folder: Path) -> None:
    """The source's cases, ``dataset.json`` and the splits: pseudo labels are trained on in every fold, never tested."""
    cases = source_cases(request.raw, request.dataset_json)
    for identifier, (images, label) in cases.items():
        for channel, image in enumerate(images):
            link(image, folder / "imagesTr" / f"{identifier}_{channel:04d}{request.ending}")
        link(label, folder / "labelsTr" / f"{identifier}{request.ending}")
    # without the key "dataset", a list of files, nnU-Net takes all that lies in imagesTr
    content = {key: value for key, value in request.dataset_json.items() if key not in ("uda", "dataset")}
    uda = request.dataset_json["uda"]
    content |= {key: uda[key] for key in (LABEL_VALUES, OTHER_LABEL_VALUES) if key in uda}
    of_scans = {key: uda[key] for key in ("intensities", "slices") if key in uda}
    if of_scans:  # new scans of the target are predicted with it
        content["uda"] = of_scans
    write_json(content | {"numTraining": len(cases) + len(kept), "pseudo_labelled": kept}, folder / "dataset.json")
    splits_file = request.raw / SPLITS
    if splits_file.exists():
        splits = check_splits(read_json(splits_file), set(cases), splits_file)
    else:
        identifiers = sorted(cases)
        parts = [identifiers[fold::5] for fold in range(min(5, len(identifiers)))]
        splits = [{"train": [i for i in identifiers if i not in part], "val": part} for part in parts]
    write_json([{"train": split["train"] + kept, "val": split["val"]} for split in splits], folder / SPLITS)
