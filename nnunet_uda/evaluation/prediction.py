"""A folder of scans segmented by a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nnunet_uda.errors import UDAError
from nnunet_uda.methods import let_find
from nnunet_uda.training.checkpoint import FINAL


def predict_folder(
    trained: Path,
    folds: Sequence[int | str],
    images: Path,
    output: Path,
    device: torch.device,
    checkpoint: str = FINAL,
) -> None:
    """Segment every case of a folder as ``nnUNetv2_predict`` does, one after the other in this process.

    Args:
        trained: nnU-Net's folder of a trainer, plans and configuration.
        output: gets ``CASE.nii.gz``.

    Raises:
        UDAError: no such checkpoint.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    let_find()
    for fold in folds:
        if not (path := trained / f"fold_{fold}" / checkpoint).is_file():
            raise UDAError(f"{path} does not exist: train the fold first, or choose another checkpoint")
    if not images.is_dir():
        raise UDAError(f"{images} is no folder of images (CASE_0000.nii.gz)")
    output.mkdir(parents=True, exist_ok=True)
    predictor = nnUNetPredictor(device=device, allow_tqdm=False, perform_everything_on_device=device.type == "cuda")
    predictor.initialize_from_trained_model_folder(str(trained), tuple(folds), checkpoint)
    predictor.predict_from_files_sequential(str(images), str(output))
