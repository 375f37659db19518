"""Find preprocessed cases that a full disk, a killed copy or a bad sector has damaged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset, nnUNetDatasetBlosc2

from nnunet_uda.errors import UDAError


def refuse_damaged(datasets: Iterable[nnUNetBaseDataset], remedy: str, voxels: bool = False) -> None:
    """Open every case; with ``voxels`` decompress it too, which takes as long as reading all the data does.

    Opening finds what is missing or cut short. nnU-Net's older format of arrays in npz files, where opening a case is
    reading it, is looked at with ``voxels`` alone.

    Args:
        remedy: what to do, for the message.

    Raises:
        UDAError: naming the cases that cannot be read.
    """
    bad: dict[str, str] = {}
    for dataset in datasets:
        if not voxels and not isinstance(dataset, nnUNetDatasetBlosc2):
            continue
        for identifier in dataset.identifiers:
            try:
                data, seg, _, properties = dataset.load_case(identifier)
                if data.shape[1:] != seg.shape[1:] or not isinstance(properties, dict):
                    raise ValueError(f"image {data.shape} and labels {seg.shape} do not belong together")
                if voxels and not all(np.isfinite(data[:, index]).all() for index in range(data.shape[1])):
                    raise ValueError("voxels are NaN or infinite")
                if voxels:
                    seg[:]
            except Exception as error:  # a damaged file raises whatever its bytes make of it
                bad.setdefault(str(Path(dataset.source_folder, identifier)), str(error) or type(error).__name__)
    if bad:
        shown = "; ".join(f"{path} ({reason})" for path, reason in list(bad.items())[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UDAError(f"{len(bad)} preprocessed case(s) are damaged or incomplete: {shown}{more}. {remedy}")
