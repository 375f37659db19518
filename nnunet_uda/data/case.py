"""One case from its files to the network's input, read by the dataset's own reader and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_uda.errors import UDAError
from nnunet_uda.images.geometry import Grid, check_against_source, check_possible, check_same_geometry
from nnunet_uda.images.nifti import is_nifti
from nnunet_uda.images.reading import check_file, check_kind, check_nifti, check_voxels, check_whole, readable


def preprocess_case(
    files: Sequence[Path],
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict[str, Any],
    segmentation: Path | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Image ``(C, Z, Y, X)``, nonzero mask and properties, as nnU-Net's preprocessor makes them of one file a channel.

    With ``segmentation``, a file on the image's grid, classes take the place of the mask, with -1 outside of it.

    Raises:
        UDAError: before anything is resampled: for a file that the reader of the plans cannot read, that is cut short,
            has two geometries or another one than the first channel, holds voxels that no scan has, or has voxels of
            another order than the source's; for a label with values that ``dataset_json`` does not name.
    """
    reader = plans.image_reader_writer_class()
    grid = checked_grids(files, reader)
    with readable(files[0], f"an image for {type(reader).__name__}"):
        data, properties = reader.read_images([str(file) for file in files])
    for channel, voxels in enumerate(data):
        check_voxels(voxels, files[min(channel, len(files) - 1)])  # colours are channels of one file
    check_before_resampling(Path(files[0]), data.shape[1:], properties["spacing"], plans, configuration, grid)
    seg = None
    if segmentation is not None:
        seg = _read_label(segmentation, files[0], grid, reader, data.shape[1:], dataset_json)
    preprocessor = configuration.preprocessor_class(verbose=False)
    return preprocessor.run_case_npy(data, seg, properties, plans, configuration, dataset_json)


def check_before_resampling(
    path: Path,
    shape: Sequence[int],
    spacing: Sequence[float],
    plans: PlansManager,
    configuration: ConfigurationManager,
    grid: Grid | None,
) -> None:
    """Raise ``UDAError`` for a scan whose voxels no scan has, or are of another order than the source's.

    Args:
        shape, spacing: of the scan as the reader gives it, in mm.
        grid: None for pictures, whose spacing the reader makes up.
    """
    spacing = [float(step) for step in spacing]
    if grid is not None:
        check_possible(path, shape, spacing, grid.origin)
    forward = plans.transpose_forward
    size, steps = [shape[axis] for axis in forward], [spacing[axis] for axis in forward]
    wanted = [*steps[: 3 - len(configuration.spacing)], *configuration.spacing]  # 2D keeps the slices' distance
    source = plans.plans["original_median_spacing_after_transp"]
    check_against_source(path, size, steps, source, np.multiply(size, steps) / wanted)


def _read_label(
    path: Path,
    image: Path,
    grid: Grid | None,
    reader: BaseReaderWriter,
    shape: tuple[int, ...],
    dataset_json: dict[str, Any],
) -> np.ndarray:
    """The label of a case, ``(1, Z, Y, X)``, on its image's grid.

    Raises:
        UDAError: it cannot be read, lies on another grid or holds a value that is no label of the dataset.
    """
    own = checked_grids([path], reader)
    if grid is not None and own is not None:
        check_same_geometry(grid, image, own, path)
    with readable(path, f"a label for {type(reader).__name__}"):
        seg, _ = reader.read_seg(str(path))
    if seg.shape[1:] != tuple(shape):
        raise UDAError(f"{path} has the size {seg.shape[1:]}, its image {image} {tuple(shape)}; expected equal sizes")
    listed = [value if isinstance(value, list) else [value] for value in dataset_json["labels"].values()]  # regions
    values = {0, *(value for several in listed for value in several)}
    unknown = sorted(set(np.unique(seg).tolist()) - values)
    if unknown:
        raise UDAError(
            f"{path} holds the value(s) {', '.join(f'{value:g}' for value in unknown[:5])}; expected the values of "
            f"'labels' in dataset.json, {', '.join(map(str, sorted(values)))}. Map them, or correct the file"
        )
    return seg


def checked_grids(files: Sequence[Path], reader: BaseReaderWriter) -> Grid | None:
    """The grid that all files of a case share, each of which must be whole; None where their format has none.

    Raises:
        UDAError: for a file that ``reader`` cannot read, that is cut short or has two geometries, and for one on
            another grid than the first.
    """
    first: Grid | None = None
    for file in files:
        grid = None
        if isinstance(reader, SimpleITKIO):
            read = check_whole(file)
            check_kind(file, read, (2, 3))
            grid = Grid.of(read)
        elif is_nifti(file):
            grid = check_nifti(file)
        else:
            check_file(file)
        if first is not None and grid is not None:
            check_same_geometry(first, files[0], grid, file)
        first = first or grid
    return first
