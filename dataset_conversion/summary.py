"""What is said about a dataset that was converted: cases, sizes, structures, and what may go wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_uda.data.slices import FILE, REORIENTED, SliceOrder
from nnunet_uda.dataset_conversion.case import CaseReport, Clipping, Group
from nnunet_uda.errors import some
from nnunet_uda.images.geometry import BODY_AXES, mm

AXIS_PLANES = ("sagittal", "coronal", "axial")
QUICKLOOK = "quicklook.png"
"""Lies beside dataset.json, where nnU-Net does not look."""


def summarise(
    folder: Path,
    groups: Sequence[Group],
    reports: dict[str, list[CaseReport]],
    structures: Sequence[str],
    warnings: list[str],
    adaptation: bool,
    clippings: dict[str, Clipping],
    order: SliceOrder,
) -> None:
    print(f"\n{folder}\n  look at {folder / QUICKLOOK}: letters on its edges must agree with the anatomy")
    for group in groups:
        seen = reports[group.images]
        folders = Counter(group.labels_of(case.identifier) for case in group.cases if case.label)
        held = [f"{number} with labels in {name}" for name, number in sorted(folders.items(), key=str) if name]
        if group.labels and not held:
            held = [f"0 with labels in {group.labels}"]
        print(f"  {group.images}: {len(seen)} {group.domain} case(s), {', '.join(held) or 'no labels'}")
        if group.labelled:
            print(f"    trained on with their labels: {', '.join(sorted(group.labelled))}")
        print(f"    size (LR x PA x IS): {_ranges([r.size for r in seen], '.0f')}")
        print(f"    spacing in mm:       {_ranges([r.spacing for r in seen], '.3g')}")
        print(f"    intensities:         {intensities_in_words(clippings[group.images], origin=True)}")
        codes = Counter(r.grid.code for r in seen)
        print(f"    orientation:         {', '.join(f'{code} ({n})' for code, n in codes.most_common())}")
        measured = [report for report in seen if report.volumes_ml]
        for index, structure in enumerate(structures if measured else ()):
            volumes = [r.volumes_ml[index] for r in measured]
            print(
                f"    {index + 1} {structure}: mean {np.mean(volumes):.3g} ml, {min(volumes):.3g} to "
                f"{max(volumes):.3g}, in {sum(v > 0 for v in volumes)} of {len(volumes)} cases"
            )
        for report in measured:
            if not any(report.volumes_ml):
                warnings.append(f"{report.identifier}: its label is all background")
        warnings += _single_slices(group, seen)
    repairs = [f"{r.identifier}: {note}" for seen in reports.values() for r in seen for note in r.notes]
    warnings += [f"{r.identifier}: {warning}" for seen in reports.values() for r in seen for warning in r.warnings]
    if order.order == FILE:
        print("  axes: kept in the files' order (SimpleITKIO in dataset.json), as these scans are oblique: after "
              "reorientation their thick slices would lie along different axes of the body")  # fmt: skip
    print("  repaired: " + ("\n    ".join(["", *repairs]) if repairs else "nothing"))
    if adaptation:
        source, target = reports["imagesTr"], reports["imagesTu"] + reports.get("imagesTs", [])
        warnings += _domain_warnings(source, target, order)
    for warning in warnings:
        print(f"WARNING: {warning}")


def intensities_in_words(clipping: Clipping, origin: bool = False) -> str:
    if clipping.intensities is None:
        return "the vendor's intensities"
    return f"{clipping.intensities}{f' ({clipping.intensities.origin})' if origin else ''}"


def _ranges(rows: Sequence[Sequence[float]], form: str) -> str:
    low, high = np.min(rows, axis=0), np.max(rows, axis=0)
    return " x ".join(
        f"{a:{form}}" if f"{a:{form}}" == f"{b:{form}}" else f"{a:{form}}-{b:{form}}"
        for a, b in zip(low, high, strict=True)
    )


def _single_slices(group: Group, reports: Sequence[CaseReport]) -> list[str]:
    """A warning for each axis along which cases have one slice."""
    warnings = []
    for axis, plane in enumerate(AXIS_PLANES):
        flat = [report.identifier for report in reports if report.size[axis] == 1]
        if flat:
            warnings.append(
                f"{len(flat)} of {len(reports)} cases in {group.images} have one slice {BODY_AXES[axis]} "
                f"({some(flat)}): 3D configurations learn nothing from it, "
                "and nnU-Net takes the axis of the largest spacing for the slices' normal, so that 2D patches may be "
                f"rows across the image. Choose the plane: nnUNetUDA_configure -plane {plane}"
            )
    return warnings


def _domain_warnings(source: Sequence[CaseReport], target: Sequence[CaseReport], order: SliceOrder) -> list[str]:
    warnings = []
    spacings = [np.median([r.spacing for r in reports], axis=0).tolist() for reports in (source, target)]
    thick = [int(np.argmax(s)) for s in spacings if np.max(s) > 1.2 * np.median(s)]
    if order.order == REORIENTED and len(set(thick)) == 2:
        warnings.append(
            f"the thick slices lie along {BODY_AXES[thick[0]]} in the source and along {BODY_AXES[thick[1]]} in the "
            f"target (median spacings {mm(spacings[0])} and {mm(spacings[1])}): a 2D network trained in the "
            "source's plane sees the target's coarse axis in plane. Consider choosing the slice plane, or 3d_fullres"
        )
    finest, reach = (
        np.divide(*(np.median([function(report) for report in reports]) for reports in (target, source)))
        for function in (lambda r: min(r.spacing), lambda r: max(np.multiply(r.size, r.spacing)))
    )
    if max(finest, 1 / finest) > 5 and max(reach, 1 / reach) > 5 and (finest > 1) == (reach > 1):
        warnings.append(
            f"the target's voxels are {finest:.3g} times the source's ({mm(spacings[1])} and {mm(spacings[0])}), "
            f"and its scans {reach:.3g} times as large: check that both are in mm, none in cm"
        )
    shares = [float(np.mean([r.zero_share for r in reports])) for reports in (source, target)]
    if abs(shares[0] - shares[1]) > 0.25:
        warnings.append(
            f"{shares[0]:.0%} of the source's voxels are exactly 0, {shares[1]:.0%} of the target's: nnU-Net decides "
            "on the source alone whether z-scoring uses the nonzero voxels only. Give both domains the same background"
        )
    return warnings
