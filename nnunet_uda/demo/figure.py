"""The demo's picture: source | translated | label, and target | ground truth | lower bound | CISFA."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_uda.data.convention import read_json
from nnunet_uda.images.listing import files_in
from nnunet_uda.training.pictures import Panel, write_panels
from nnunet_uda.training.preview import REORIENTED, as_seen
from nnunet_uda.training.translated_dataset import translate_volume


def translation_rows(dataset: str, plans_name: str, number: int) -> list[list[Panel]]:
    """Source validation slices with most label, translated by the trained CISFA generator of fold 0."""
    preprocessed = Path(os.environ["nnUNet_preprocessed"], dataset)
    plans = read_json(preprocessed / f"{plans_name}.json") | {"continue_training": True}
    dataset_json = read_json(preprocessed / "dataset.json")
    trainer_class = recursive_find_trainer_class_by_name("CISFATrainer")
    trainer = trainer_class(plans, "2d", 0, dataset_json, torch.device("cpu"))
    trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    _, validation = trainer.get_tr_and_val_datasets()
    rows = []
    for identifier in validation.identifiers[:number]:
        data, label, _, _ = validation.load_case(identifier)
        volume = torch.from_numpy(np.asarray(data[:]))
        with torch.no_grad():
            translated = translate_volume(volume, trainer.translate, trainer.configuration_manager.patch_size)
        seg = np.asarray(label[:])[0]
        index = int((seg > 0).sum((1, 2)).argmax())
        fake = translated[0, index].numpy()
        rows.append([("source", data[0, index], None), ("translated", fake, None), ("label", fake, seg[index])])
    return rows


def prediction_rows(raw: Path, predictions: Path, runs: list[str], number: int) -> list[list[Panel]]:
    """Test slices with most label: image, ground truth and each run's prediction, all in RAS."""
    rows = []
    labels = [path for path in files_in(raw / "labelsTs") if path.name.endswith(".nii.gz")]
    for path in labels[:number]:
        name = path.name.removesuffix(".nii.gz")
        label = _read(path)
        index = int((label > 0).sum((1, 2)).argmax())
        image = _read(raw / "imagesTs" / f"{name}_0000.nii.gz")[index]
        row: list[Panel] = [("target", image, None), ("ground truth", image, label[index])]
        row += [(run.replace("_", " "), image, _read(predictions / run / path.name)[index]) for run in runs]
        rows.append(row)
    return rows


def _read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "RAS"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the demo's pictures")
    parser.add_argument("-i", type=Path, required=True, help="folder of the demo")
    parser.add_argument("-p", required=True, help="plans of CISFA")
    args = parser.parse_args(argv)
    raw = args.i / "nnUNet_raw" / "Dataset501_Phantom"
    labels = read_json(raw / "dataset.json")["labels"]
    structures = [name for name, value in sorted(labels.items(), key=lambda pair: pair[1]) if value]
    pictures = {
        "translation.png": translation_rows(raw.name, args.p, 3),
        "predictions.png": prediction_rows(raw, args.i / "predictions", ["lower_bound", "CISFA", "upper_bound"], 3),
    }
    for name, rows in pictures.items():
        turned = [
            [(t, *(x if x is None else as_seen(x, REORIENTED) for x in cuts)) for t, *cuts in row] for row in rows
        ]
        write_panels(args.i / name, turned, structures)
        print(f"Wrote {args.i / name}")


if __name__ == "__main__":
    main()
