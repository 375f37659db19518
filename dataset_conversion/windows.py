"""What the images of each domain are clipped at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from nnunet_uda.data.convention import is_ct
from nnunet_uda.dataset_conversion.case import CaseReport, Clipping, Group
from nnunet_uda.errors import UDAError
from nnunet_uda.images.intensities import (
    DEFAULT,
    PERCENTILES,
    PRESETS,
    Intensities,
    not_hounsfield,
    structure_bounds,
    window_of_structures,
)

MEASURED_CASES = 10
"""So many labelled CT scans, evenly taken, are looked at for the default window."""
LOST = 0.95
"""A structure of whose voxels this share lies outside of the window cannot be learned."""


@dataclass(frozen=True)
class IntensityRequest:
    """What is asked for the intensities of both domains.

    Args:
        source, target: ``DEFAULT`` (chosen by ``choose_intensities``), or what is given, None for the vendor's.
        preset: name in ``PRESETS``: the window of a CT that has no labels to find one from.
    """

    source: Intensities | str | None = DEFAULT
    target: Intensities | str | None = DEFAULT
    preset: str = "soft_tissue"


NOTHING_ASKED = IntensityRequest()


def choose_intensities(groups: Sequence[Group], request: IntensityRequest, adaptation: bool) -> dict[str, Clipping]:
    """What is done to the images of each group, by its folder.

    The default is 0.5 and 99.5 percent of the nonzero voxels. For CT (by the domain's name) it is a window: around the
    structures of the labelled source where that is CT, else the request's preset. No label of the target is looked at,
    and an upper bound's dataset has the window of the target that it is the bound of.
    """
    found: Intensities | None = None
    chosen = {}
    for group in groups:
        asked = request.source if adaptation and group.images == "imagesTr" else request.target
        wanted: Intensities | None
        hounsfield = False
        if not isinstance(asked, str):
            wanted = asked
            hounsfield = wanted is not None and wanted.window is not None and wanted.origin != "given"
        elif not is_ct(group.domain):
            wanted = Intensities(PERCENTILES, origin="default")
        else:
            hounsfield = True
            found = wanted = found or _found_window(groups, request.preset, adaptation)
        chosen[group.images] = Clipping(wanted, hounsfield, asked != DEFAULT, checked=group.images == "imagesTr")
    return chosen


def _found_window(groups: Sequence[Group], preset: str, adaptation: bool) -> Intensities:
    """The window around the structures of the source's CT scans; the preset where there are none that can be read."""
    of_preset = Intensities(window=PRESETS[preset], origin=f"preset {preset}, no label was read")
    source = next(group for group in groups if group.images == "imagesTr")
    if not (adaptation and is_ct(source.domain)):
        return of_preset
    cases = [(case, case.label, case.label_map) for case in source.cases if case.label and case.label_map]
    step = max(1.0, len(cases) / MEASURED_CASES)
    bounds: list[tuple[float, float]] = []
    for case, path_of_label, label_map in (cases[int(i * step)] for i in range(min(len(cases), MEASURED_CASES))):
        try:
            images = [case.read_image(path) for path in case.images]
            label, _ = case.read_label(path_of_label, images[0], case.images[0])
            classes = label_map.apply(label, path_of_label)
            for image in images:
                if image.GetSize() == images[0].GetSize() and not not_hounsfield(sitk.GetArrayViewFromImage(image)):
                    bounds += structure_bounds(image, classes)
        except UDAError:
            continue  # what is wrong with it is said when it is converted
    if not bounds:
        return of_preset
    origin = f"found around the structures labelled in {source.domain}"
    return Intensities(window=window_of_structures(bounds), origin=origin)


def check_outside(
    group: Group, reports: Sequence[CaseReport], structures: Sequence[str], clipping: Clipping, warnings: list[str]
) -> None:
    """Refuse a given window that leaves a structure without voxels; say so of percentiles and of a default."""
    for index, structure in enumerate(structures):
        shares = [r.outside[index] for r in reports if r.outside and not np.isnan(r.outside[index])]
        if not shares or min(shares) < LOST:
            continue
        fact = (
            f"at least {min(shares):.0%} of the voxels of '{structure}' lie outside of the {clipping.intensities} in "
            f"all {len(shares)} labelled {group.domain} case(s) that hold it"
        )
        if clipping.given and clipping.intensities is not None and clipping.intensities.window is not None:
            raise UDAError(
                f"{group.cases[0].images[0]}: {fact}; expected a window that shows every structure. Give another one "
                "(-source_intensities; with --upper_bound -target_intensities), or none."
            )
        warnings.append(f"{fact}: it is seen as one value. If it is hard to tell apart, give others, or none")
