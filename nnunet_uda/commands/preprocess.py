"""``nnUNetUDA_preprocess``: preprocess the unlabelled target with a plans file's settings."""

from __future__ import annotations

import argparse

from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_uda.data.convention import (
    check_dataset_json,
    check_plans_names,
    dataset_name,
    environment_folder,
    read_json,
)
from nnunet_uda.data.target import preprocess_target
from nnunet_uda.errors import UDAError, command


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_preprocess",
        description="Preprocess the unlabelled target images (imagesTu) into a sibling of nnU-Net's preprocessed "
        "folder. Run it after nnUNetv2_plan_and_preprocess. The trainers do the same at their start when it is needed.",
    )
    parser.add_argument("-d", required=True, nargs="+", help="dataset ids or names")
    parser.add_argument("-c", nargs="+", default=["2d"], help="configurations, for instance 2d 3d_fullres [2d]")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier [nnUNetPlans]")
    parser.add_argument("-np", type=int, default=default_num_processes, help="number of processes")
    args = parser.parse_args(argv)
    for dataset in args.d:
        folder = environment_folder("nnUNet_preprocessed") / dataset_name(dataset)
        plans = PlansManager(check_plans_names(read_json(folder / f"{args.p}.json"), folder / f"{args.p}.json"))
        dataset_json = read_json(folder / "dataset.json")
        check_dataset_json(dataset_json, folder / "dataset.json")
        for configuration in args.c:
            if configuration not in plans.available_configurations:
                raise UDAError(
                    f"{folder / args.p}.json has no configuration {configuration!r}. It has: "
                    f"{', '.join(plans.available_configurations)}"
                )
            print(f"Target ready: {preprocess_target(plans, configuration, dataset_json, args.np)}")


if __name__ == "__main__":
    main()
