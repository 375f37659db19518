"""Hearts in short axis: cine MR of ACDC and late-enhancement MR of EMIDEC, in either direction; LV, myocardium.

Expected trees (-i, in any order), as their owners distribute them:

    ACDC_TREE/database/training/patient001/Info.cfg, patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz ...
    EMIDEC_TREE/Case_P001/Images/Case_P001.nii.gz, Contours/Case_P001.nii.gz ...

Data: https://www.creatis.insa-lyon.fr/Challenge/acdc and https://emidec.com/dataset (both CC BY-NC-SA 4.0).
`nnUNetUDA_convert acdc -h` and `emidec -h` tell more.

Classes: LV (cavity) 1, myocardium 2, or as given to -structures. EMIDEC's infarct and no-reflow count as myocardium;
ACDC's RV becomes background, for EMIDEC does not label it. Of the cine the end of diastole is taken, about when late
enhancement is acquired (-frame es: the end of systole). Intensities are clipped at the percentiles 0.5 and 99.5.

Short-axis scans are oblique: where their headers say so, axes are kept in the files' order (see the summary). Where
headers do not say how the heart lies in the body, the two sets may be turned or mirrored beside each other: look at
quicklook.png. A scan for imagesTr without a label is left out with a warning; --strict refuses it.

Protocols:
  (none)  the vendors' split. Target cine: patients 101 to 150 are the test set. Target LGE: a third of the labelled
          cases, drawn with -seed. Test scans go to imagesTs and labelsTs, all others, EMIDEC's cases without Contours
          among them, to imagesTu without labels, used in every fold. Source: cine of patients 1 to 100, or all labelled
          LGE, in 4 seeded folds. With -test_ids these target scans are the test set, and the source is used whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_uda.dataset_conversion import acdc, emidec, protocols
from nnunet_uda.dataset_conversion.options import add_directions, run_alone

EXAMPLE = "nnUNetUDA_convert cine_lge -i ACDC EMIDEC -d 512 -source cine -target lge"

STRUCTURES = ("LV", "myocardium")
DOMAINS = ("cine", "lge")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i", type=Path, nargs=2, required=True, metavar=("ACDC_TREE", "EMIDEC_TREE"), help="both trees, in any order"
    )
    add_directions(parser, DOMAINS, "domain", required=False)
    parser.add_argument("-frame", choices=acdc.FRAMES, default="ed", help="cine: end of diastole or of systole [ed]")
    protocols.add_structures(parser, STRUCTURES, "both, in this order")
    protocols.add_arguments(parser, "101, or P007", vendor="ACDC and EMIDEC", kind=emidec.number)


def convert(args: argparse.Namespace, warnings: list[str]) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    acdc_tree, emidec_tree = protocols.tell_apart(
        args.i, {"ACDC": acdc.patient_folders, "EMIDEC": emidec.case_folders},
        "one ACDC tree (with training/patient001) and one EMIDEC tree (with Case_P001)",
    )  # fmt: skip
    cine = acdc.find_domain(acdc_tree, args.frame, "cine", "cine", args.structures, args.strict, warnings)
    lge = emidec.find_domain(emidec_tree, "LGE", "lge", emidec.classes(args.structures), args.strict, warnings)
    if args.source == "cine":
        source, target = cine, emidec.with_drawn_test(lge, args.seed)
    else:
        source, target = lge, cine
    information = {key: f"{acdc.INFORMATION[key]}; {emidec.INFORMATION[key]}" for key in acdc.INFORMATION}
    title = f"ACDC (cine, {args.frame.upper()}) and EMIDEC (LGE)"
    protocols.write_adaptation("CineLGE", source, target, args.structures, information, args, warnings, "heart", title)


if __name__ == "__main__":
    run_alone(__doc__, add_arguments, convert)
