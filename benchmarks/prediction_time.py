"""Time of predicting one preprocessed volume by networks of several trainers on the same plans.

Every trainer writes a checkpoint at its random start, and nnU-Net's own predictor opens it as ``nnUNetv2_predict``
does. The volume, the dataset's first target case, is predicted in rounds that take the trainers in turn, without
test-time mirroring, which plans may allow one trainer and not another. Nothing is written into nnU-Net's folders.

    python benchmarks/prediction_time.py -d 501 -p nnUNetPlansDemo -tr nnUNetTrainer CISFATrainer
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from passes import synchronise
from step_time import add_run_arguments, chosen_runs, make_trainer, most_held, print_table, set_aside

from nnunet_uda.data.convention import environment_folder
from nnunet_uda.data.target import TargetDataset, target_folder, target_identifiers
from nnunet_uda.errors import UDAError, command


def open_predictor(name: str, dataset: str, plans: dict, configuration: str, device: torch.device) -> nnUNetPredictor:
    """nnU-Net's predictor with the network that a trainer starts from, by way of a checkpoint."""
    trainer = make_trainer(name, dataset, plans, configuration, device)
    trainer.save_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    predictor = nnUNetPredictor(use_mirroring=False, device=device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    return predictor


def first_target_volume(dataset: str, plans: dict, configuration: str, slices: int | None) -> torch.Tensor:
    """``(C, Z, Y, X)`` of the first preprocessed target case, with ``slices`` its middle slices alone.

    Raises:
        UDAError: where no target has been preprocessed.
    """
    manager = PlansManager(plans)
    folder = target_folder(
        environment_folder("nnUNet_preprocessed") / dataset, manager.get_configuration(configuration)
    )
    if not folder.is_dir():
        raise UDAError(f"{folder} does not exist: run nnUNetUDA_preprocess -d {dataset} -c {configuration}")
    data = TargetDataset(str(folder)).load_case(target_identifiers(folder, "all")[0])[0][:]
    if slices is not None:
        first = max(0, (data.shape[1] - slices) // 2)
        data = data[:, first : first + slices]
    return torch.from_numpy(data)


def measure_predictions(
    runs: Sequence[tuple[str, str, dict]],
    dataset: str,
    configuration: str,
    device: torch.device,
    rounds: int,
    slices: int | None = None,
) -> list[dict]:
    """Time ``rounds`` predictions of every run: a trainer's name, the name of its plans and these.

    ``ratio`` is the median over rounds of the time against that of the first run with the same plans in that round.
    """
    with set_aside("0"):
        predictors = [open_predictor(name, dataset, plans, configuration, device) for name, _, plans in runs]
        volumes = {
            plans_name: first_target_volume(dataset, plans, configuration, slices) for _, plans_name, plans in runs
        }
        found = [
            {"trainer": name, "plans": plans, "shape": list(volumes[plans].shape), "seconds": []}
            for name, plans, _ in runs
        ]
        for number in range(rounds + 1):  # the first is a warm-up
            for predictor, one in zip(predictors, found, strict=True):
                synchronise(device)
                start = time.perf_counter()
                predictor.predict_logits_from_preprocessed_data(volumes[one["plans"]])
                synchronise(device)
                if number > 0:
                    one["seconds"].append(time.perf_counter() - start)
        for predictor, one in zip(predictors, found, strict=True):
            volume, network = volumes[one["plans"]], predictor.network
            peak = most_held(lambda p=predictor, v=volume: p.predict_logits_from_preprocessed_data(v), device)
            if device.type != "cuda":
                peak += sum({t.data_ptr(): t.nbytes for t in [*network.parameters(), *network.buffers()]}.values())
            one["peak_bytes"] = peak
    for one in found:
        first = next(other for other in found if other["plans"] == one["plans"])
        ratios = [mine / theirs for mine, theirs in zip(one["seconds"], first["seconds"], strict=True)]
        one |= {"median": statistics.median(one["seconds"]), "ratio": statistics.median(ratios)}
    return found


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, ["nnUNetTrainer", "CISFATrainer", "SimilarityPrototypesTrainer"])
    parser.add_argument("-rounds", type=int, default=11, help="timed predictions of each trainer [11]")
    parser.add_argument("-slices", type=int, help="of the volume (default: all)")
    args = parser.parse_args(argv)
    dataset, device, runs = chosen_runs(args)
    found = measure_predictions(runs, dataset, args.c, device, args.rounds, args.slices)
    print(f"{dataset}, {args.c}, {device}, {args.threads} threads, {args.rounds} predictions each of a volume of "
          f"{' and '.join(dict.fromkeys('x'.join(map(str, one['shape'][1:])) for one in found))} voxels\n")  # fmt: skip
    print_table(
        ["trainer", "plans", "s a volume: median (fastest, slowest)", f"times {args.tr[0]}", "peak MiB"],
        [[one["trainer"], one["plans"], f"{one['median']:.3f} ({min(one['seconds']):.3f}, {max(one['seconds']):.3f})",
          f"{one['ratio']:.3f}", f"{one['peak_bytes'] / 2**20:.0f}"] for one in found],
    )  # fmt: skip
    if args.o:
        args.o.write_text(json.dumps({"runs": found}, indent=1))


if __name__ == "__main__":
    main()
