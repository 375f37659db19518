"""A folder of scans with the intensities that a dataset got when it was converted, as files."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from nnunet_uda.data.convention import case_files
from nnunet_uda.errors import UDAError
from nnunet_uda.images.intensities import Intensities, read_clipped
from nnunet_uda.images.listing import ENDINGS, entries
from nnunet_uda.images.reading import write_image


def find_scans(folder: Path) -> dict[str, Path]:
    """Scans of a folder by name without ending (``CASE_0000``).

    Raises:
        UDAError: no folder, no scan, one under two endings, or a name that nnU-Net does not take.
    """
    if not folder.is_dir():
        raise UDAError(f"{folder} (-i) is no folder; expected one that holds CASE_0000.nii.gz files.")
    cases: dict[str, Path] = {}
    for ending in ENDINGS:
        for files in case_files(folder, ending).values():
            for path in files:
                name = path.name.removesuffix(ending)
                if other := cases.get(name):
                    raise UDAError(f"{path}: there is also {other.name}; expected each scan once. Remove one of them.")
                cases[name] = path
    for path in entries(folder):
        if path.name.lower().endswith(ENDINGS) and path not in cases.values():
            raise UDAError(f"{path}: expected a name like CASE_0000.nii.gz, as nnUNetv2_predict needs it. Rename it.")
    if not cases:
        raise UDAError(f"{folder} (-i) holds no scan; expected files named like CASE_0000.nii.gz.")
    return cases


def write_clipped(cases: dict[str, Path], intensities: Intensities, folder: Path) -> None:
    """Write every scan clipped as ``NAME.nii.gz``.

    Raises:
        UDAError: naming all scans that cannot be read, or the one that cannot be written.
    """
    errors: list[str] = []
    for name, path in tqdm(cases.items(), desc="Clipping", unit="scan"):
        try:
            clipped = read_clipped(path, intensities)
        except UDAError as error:
            errors.append(str(error))
            continue
        write_image(clipped, folder / f"{name}.nii.gz")
    if errors:
        raise UDAError("nothing was written:\n  - " + "\n  - ".join(errors) if len(errors) > 1 else errors[0])
