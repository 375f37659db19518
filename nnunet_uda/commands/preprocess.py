"""``nnUNetUDA_preprocess``: preprocess the unlabelled target with a plans file's settings."""

from __future__ import annotations

import argparse

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_uda.data.convention import check_dataset_json, dataset_name, environment_folder, labelled_target, read_json
from nnunet_uda.data.slices import refuse_mixed_slices
from nnunet_uda.data.target import preprocess_target
from nnunet_uda.errors import UDAError, command
from nnunet_uda.foreign_plans import read_plans
from nnunet_uda.workers import usual_processes


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_preprocess",
        description="Preprocess the unlabelled target images (imagesTu) into a sibling of nnU-Net's preprocessed "
        "folder. Run it after nnUNetv2_plan_and_preprocess. The trainers do the same at their start when it is needed.",
        epilog="Example: nnUNetUDA_preprocess -d 501 -c 2d",
    )
    parser.add_argument("-d", required=True, nargs="+", help="dataset ids or names")
    parser.add_argument("-c", nargs="+", default=["2d"], help="configurations, for instance 2d 3d_fullres [2d]")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier [nnUNetPlans]")
    parser.add_argument("-np", type=int, default=usual_processes(), help="number of processes [%(default)s]")
    args = parser.parse_args(argv)
    if args.np < 1:
        raise UDAError(f"-np must be at least 1, found {args.np}")
    checked = []
    for dataset in args.d:
        folder = environment_folder("nnUNet_preprocessed") / dataset_name(dataset)
        plans = PlansManager(read_plans(folder, args.p))
        dataset_json = read_json(folder / "dataset.json")
        check_dataset_json(dataset_json, folder / "dataset.json")
        for configuration in args.c:
            if configuration not in plans.available_configurations:
                raise UDAError(
                    f"{folder / args.p}.json has no configuration {configuration!r}. It has: "
                    f"{', '.join(plans.available_configurations)}"
                )
            patch_size = plans.get_configuration(configuration).patch_size
            refuse_mixed_slices(dataset_json, patch_size, f"{folder / 'dataset.json'}, -c {configuration}")
            checked.append((plans, configuration, dataset_json))
    for plans, configuration, dataset_json in checked:
        print(f"Target ready: {preprocess_target(plans, configuration, dataset_json, args.np)}")
        if labelled_target(dataset_json):
            folder = preprocess_target(plans, configuration, dataset_json, args.np, labelled=True)
            print(f"Labelled target ready: {folder}")


if __name__ == "__main__":
    main()
