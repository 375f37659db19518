"""One unlabelled case from its files to the network's input, by the dataset's own reader, checked on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_uda.images.geometry import Grid, check_against_source, check_possible, check_same_geometry
from nnunet_uda.images.nifti import is_nifti
from nnunet_uda.images.reading import check_nifti, check_voxels, check_whole, readable


def preprocess_case(
    files: Sequence[Path],
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict[str, Any],
    segmentation: Path | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """``(C, Z, Y, X)`` image, nonzero mask and properties, as nnU-Net's preprocessor makes them of one file a channel.

    With ``segmentation``, a file on the image's grid, its classes stand in place of the mask, and -1 outside of it.

    Raises:
        UDAError: before anything is resampled: for a file that the reader of the plans cannot read, that is cut short,
            has two geometries or another one than the first channel, holds voxels that no scan has, or has voxels of
            another order than the source's.
    """
    reader = plans.image_reader_writer_class()
    grids = [_checked_grid(Path(file), isinstance(reader, SimpleITKIO)) for file in files]
    for grid, file in zip(grids[1:], files[1:], strict=True):
        if grid is not None and grids[0] is not None:
            check_same_geometry(grids[0], files[0], grid, file)
    with readable(files[0], f"an image for {type(reader).__name__}"):
        data, properties = reader.read_images([str(file) for file in files])
    for channel, voxels in enumerate(data):
        check_voxels(voxels, files[min(channel, len(files) - 1)])  # colours are channels of one file
    shape, spacing = data.shape[1:], [float(step) for step in properties["spacing"]]
    if grids[0] is not None:
        check_possible(files[0], shape, spacing)  # of pictures the reader makes a spacing up
    forward = plans.transpose_forward
    shape, spacing = ([values[axis] for axis in forward] for values in (shape, spacing))
    wanted = [*spacing[: 3 - len(configuration.spacing)], *configuration.spacing]  # 2D keeps the slices' distance
    source = plans.plans["original_median_spacing_after_transp"]
    check_against_source(files[0], shape, spacing, source, np.multiply(shape, spacing) / wanted)
    seg = None
    if segmentation is not None:
        grid = _checked_grid(segmentation, isinstance(reader, SimpleITKIO))
        if grid is not None and grids[0] is not None:
            check_same_geometry(grids[0], files[0], grid, segmentation)
        with readable(segmentation, f"a segmentation for {type(reader).__name__}"):
            seg, _ = reader.read_seg(str(segmentation))
    preprocessor = configuration.preprocessor_class(verbose=False)
    return preprocessor.run_case_npy(data, seg, properties, plans, configuration, dataset_json)


def _checked_grid(path: Path, by_itk: bool) -> Grid | None:
    """The grid of a file, which must be whole; None where the format has none."""
    if by_itk:
        return Grid.of(check_whole(path))
    return check_nifti(path) if is_nifti(path) else None
