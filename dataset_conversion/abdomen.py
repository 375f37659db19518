"""The abdominal task: CT of BTCV and MR of CHAOS (T2-SPIR), in either direction; liver, kidneys, spleen.

Expected trees (-i, in any order), as their owners distribute them:

    CHAOS_TREE/Train_Sets/MR/1/T2SPIR/DICOM_anon/*.dcm, Ground/*.png
    BTCV_TREE/RawData/Training/img/img0001.nii.gz, label/label0001.nii.gz

Data: https://doi.org/10.5281/zenodo.3431873 (CHAOS, CC BY-SA 4.0) and https://www.synapse.org/Synapse:syn3193805
(BTCV, registration and Synapse's terms). `nnUNetUDA_convert chaos -h` and `btcv -h` tell more: what is taken care of in
DICOM and masks, and why BTCV renumbered 1 to 30 is refused.

Classes: liver 1, right_kidney 2, left_kidney 3, spleen 4, or as given to -structures; BTCV's other organs become
background. Images keep voxels and orientation; nothing is cropped. -sequence takes another of CHAOS's MR sequences.
A CHAOS patient without the sequence, and a scan for imagesTr without labels, is left out with a warning; --strict
refuses it.

Protocols:
  sifa    fixed test set MR 1 13 32 38, CT 1 9 30 32 33 39. Source: the scans outside the source modality's own test
          set, in 4 seeded folds. Target: test scans to imagesTs and labelsTs, all others to imagesTu without labels,
          used in every fold. With -test_ids these target scans are the test set instead, and the source is used whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_uda.dataset_conversion import btcv, chaos, protocols
from nnunet_uda.dataset_conversion.options import add_directions, run_alone

EXAMPLE = "nnUNetUDA_convert abdomen -i CHAOS BTCV -d 503 -source ct -target mr"

MR_SEQUENCES = ("t2spir", "t1in", "t1out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i", type=Path, nargs=2, required=True, metavar=("CHAOS_TREE", "BTCV_TREE"), help="both trees, in any order"
    )
    add_directions(parser, ("ct", "mr"))
    parser.add_argument("-sequence", choices=MR_SEQUENCES, default="t2spir", help="CHAOS's MR sequence [t2spir]")
    protocols.add_structures(parser, chaos.STRUCTURES, "all, in this order")
    protocols.add_arguments(parser, "13")


def convert(args: argparse.Namespace, warnings: list[str]) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    chaos_tree, btcv_tree = protocols.tell_apart(
        args.i, {"CHAOS": chaos.train_folder, "BTCV": btcv.training_folder},
        "one CHAOS tree (with Train_Sets/MR) and one BTCV tree (with RawData/Training/img and label)",
    )  # fmt: skip
    mr = chaos.find_domain(chaos_tree, args.sequence, "MR", "mr", args.structures, args.strict, warnings)
    ct = btcv.find_domain(btcv_tree, args.structures)
    source, target = (ct, mr) if args.source == "ct" else (mr, ct)
    information = {key: f"{chaos.INFORMATION[key]}; {btcv.INFORMATION[key]}" for key in chaos.INFORMATION}
    title = f"BTCV (CT) and CHAOS ({args.sequence})"
    protocols.write_adaptation(
        "Abdomen", source, target, args.structures, information, args, warnings, "abdomen", title
    )


if __name__ == "__main__":
    run_alone(__doc__, add_arguments, convert)
