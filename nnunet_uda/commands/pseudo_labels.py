"""``nnUNetUDA_pseudo_labels``: a dataset of the labelled source and of target scans with predictions for labels."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_uda.data.convention import check_dataset_json, dataset_name, environment_folder, read_domains, read_json
from nnunet_uda.data.general_model import parse_map
from nnunet_uda.data.pseudo_dataset import Request, new_dataset, write_pseudo_labelled
from nnunet_uda.errors import UDAError, command
from nnunet_uda.evaluation.quality_report import read_estimates


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_pseudo_labels",
        description="Make a dataset whose labelled cases are those of dataset -d and its unlabelled target scans "
        "(imagesTu) with predictions for labels, for a last round of plain training. Small connected components of a "
        "prediction are removed; a case is left out where a structure's volume is implausible beside the source's. "
        "Predictions are made with nnUNetv2_predict -i .../imagesTu, or by a general model (TotalSegmentator, an older "
        "one): then -labels says what it calls the structures. No target label is read but of scans that dataset.json "
        "names as labelled, which keep their own. What was taken and why stands in pseudo_labels.json.",
        epilog="Example: nnUNetUDA_pseudo_labels -d 501 -pred predictions_of_imagesTu/ -o Dataset601_Second",
    )
    parser.add_argument("-d", required=True, help="dataset id or name")
    parser.add_argument(
        "-pred", "-i", dest="i", required=True, type=Path, metavar="FOLDER", help="predictions of imagesTu"
    )
    parser.add_argument("-o", required=True, metavar="DatasetXXX_NAME", help="the new dataset")
    parser.add_argument(
        "-labels", nargs="+", metavar="NAME=VALUE",
        help="what a general model calls the dataset's structures: values in its files (liver=5 kidneys=2,3; others "
        "become background), or names of files where it writes a folder a case (kidneys=kidney_left,kidney_right) "
        "[values of the dataset, files called as its structures]",
    )  # fmt: skip
    parser.add_argument(
        "-component_share", type=float, default=0.1,
        help="keep a component with at least this share of its structure's largest one [0.1; 1: largest only]",
    )  # fmt: skip
    parser.add_argument(
        "-volume_factor", type=float, default=2.0,
        help="a volume is plausible from the source's least divided by this to its greatest times this [2]",
    )  # fmt: skip
    parser.add_argument(
        "-q", type=Path, metavar="FILE",
        help="quality_report.json of nnUNetUDA_quality on imagesTu: leave out cases with an estimate below -least_dice",
    )  # fmt: skip
    parser.add_argument("-least_dice", type=float, default=0.6, help="least estimate of a case with -q [0.6]")
    args = parser.parse_args(argv)
    root = environment_folder("nnUNet_raw")
    request = _request(args, root / dataset_name(args.d))
    final = new_dataset(root, args.o)
    lines, source, target, kept = write_pseudo_labelled(request, final)
    print("\n".join(lines))
    print(f"{final}: {source} source case(s) and {kept} of {target} target case(s) with pseudo labels")
    number = final.name.removeprefix("Dataset")[:3]
    print(f"Next: nnUNetv2_plan_and_preprocess -d {number} -c 2d --verify_dataset_integrity")
    print(f"Then: nnUNetUDA_train {number} 2d 0 -tr SupervisedTrainer")


def _request(args: argparse.Namespace, raw: Path) -> Request:
    if not 0 <= args.component_share <= 1:
        raise UDAError(f"-component_share must be between 0 and 1, found {args.component_share}")
    if not args.volume_factor >= 1:
        raise UDAError(f"-volume_factor must be at least 1, found {args.volume_factor}")
    if not args.i.is_dir():
        raise UDAError(f"{args.i} (-pred) is no folder; expected the output of nnUNetv2_predict on imagesTu")
    dataset_json = read_json(raw / "dataset.json")
    check_dataset_json(dataset_json, raw / "dataset.json")
    read_domains(dataset_json, str(raw / "dataset.json"))
    labels = {name: value for name, value in dataset_json["labels"].items() if name not in ("background", "ignore")}
    if sorted(map(str, labels.values())) != sorted(map(str, range(1, len(labels) + 1))):
        raise UDAError(f"{raw / 'dataset.json'}: region-based labels are not supported: one integer for each structure")
    structures = sorted(labels, key=labels.__getitem__)
    names = parse_map(args.labels, structures) if args.labels else None
    if not 0 <= args.least_dice <= 1:
        raise UDAError(f"-least_dice must be between 0 and 1, found {args.least_dice}")
    estimates = read_estimates(args.q) if args.q else None
    filters = (args.component_share, args.volume_factor)
    return Request(raw, dataset_json, structures, args.i, *filters, names, estimates, args.least_dice)


if __name__ == "__main__":
    main()
