"""One fold trained as ``nnUNetv2_train`` does it, and what that cost."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nnunet_uda.collectives import rank
from nnunet_uda.data.convention import dataset_name, environment_folder, read_json
from nnunet_uda.errors import UDAError
from nnunet_uda.files import write_json
from nnunet_uda.foreign_plans import read_plans
from nnunet_uda.methods import find_any_trainer
from nnunet_uda.training.checkpoint import BEST, FINAL, read_checkpoint

COST = "training_cost.json"
"""Beside the checkpoints: peak memory in GiB, resident and on the device, and processor time in seconds."""


def train(
    dataset: str,
    configuration: str,
    fold: str,
    trainer_name: str,
    plans_name: str,
    device: torch.device,
    *,
    go_on: bool = False,
    only_validate: bool = False,
    validate_best: bool = False,
    keep_probabilities: bool = False,
    write_checkpoints: bool = True,
    pretrained_weights: Path | None = None,
) -> Path:
    """Train one fold and validate it, in each process; the fold's folder.

    Args:
        dataset: id or name.
        fold: its number, or ``all``.
        go_on: from the latest checkpoint.
        only_validate: of a finished training.
        validate_best: with ``checkpoint_best``.
        keep_probabilities: of the validation.
        pretrained_weights: a checkpoint whose network's weights to start from.

    Raises:
        UDAError: no such plans, configuration or trainer, or files that are missing or broken.
    """
    from nnunetv2.run.run_training import maybe_load_checkpoint
    from torch.backends import cudnn

    folder = environment_folder("nnUNet_preprocessed") / dataset_name(dataset)
    plans = read_plans(folder, plans_name)
    if configuration not in plans["configurations"]:
        raise UDAError(
            f"the plans {plans_name} have no configuration {configuration!r}; they have "
            f"{', '.join(plans['configurations'])}"
        )
    trainer = find_any_trainer(trainer_name)(
        plans=plans | {"continue_training": go_on}, configuration=configuration,
        fold=fold if fold == "all" else int(fold), dataset_json=read_json(folder / "dataset.json"), device=device,
    )  # fmt: skip
    for name in [FINAL] * only_validate + [BEST] * (only_validate and validate_best):
        if not (needed := Path(trainer.output_folder, name)).is_file():
            raise UDAError(f"--val needs {needed}, which does not exist: train first, or continue with --c")
    trainer.disable_checkpointing = not write_checkpoints
    if pretrained_weights is not None:
        trainer.initialize()
        load_pretrained(trainer.network, pretrained_weights, trainer.dataset_json["labels"])
    else:
        maybe_load_checkpoint(trainer, go_on, only_validate)
    if device.type == "cuda":
        cudnn.deterministic, cudnn.benchmark = False, True
    if not only_validate:
        trainer.run_training()
        if rank() == 0:
            write_cost(Path(trainer.output_folder, COST), device)
    if validate_best:
        trainer.load_checkpoint(str(Path(trainer.output_folder, BEST)))
    trainer.perform_actual_validation(keep_probabilities)
    return Path(trainer.output_folder)


def load_pretrained(network: torch.nn.Module, path: Path, labels: dict[str, Any]) -> None:
    """All weights from a checkpoint, on whatever device; the segmentation layers' where it knows the same structures.

    nnU-Net never takes these. But self-training from the first step needs them: a teacher whose last layers are random
    labels nothing.

    Args:
        labels: of the ``dataset.json`` that is trained on.

    Raises:
        UDAError: no readable checkpoint, or a weight that is missing there or has another shape.
    """
    module = getattr(network, "_orig_mod", network)
    checkpoint = read_checkpoint(path)
    weights, own = checkpoint["network_weights"], module.state_dict()
    same = _labels_of(checkpoint) == labels
    for key in (key for key in own if same or ".seg_layers." not in key):
        found = tuple(weights[key].shape) if key in weights else None
        if found != tuple(own[key].shape):
            raise UDAError(
                f"-pretrained_weights {path}: {key} is {'missing' if found is None else f'of shape {found}'}, this "
                f"network's has shape {tuple(own[key].shape)}. Take weights of the same network and plans"
            )
        own[key] = weights[key]
    module.load_state_dict(own)
    if rank() == 0:
        which = "all of them" if same else "all but the segmentation layers, for it was trained for other structures,"
        print(f"Pretrained weights, {which} from {path}")


def _labels_of(checkpoint: dict[str, Any]) -> Any:
    """The labels that a checkpoint's network was trained for; None where it does not say."""
    arguments = checkpoint.get("init_args")
    dataset_json = arguments.get("dataset_json") if isinstance(arguments, dict) else None
    return dataset_json.get("labels") if isinstance(dataset_json, dict) else None


def write_cost(path: Path, device: torch.device) -> None:
    """Peak memory of this process so far in GiB, over all starts of a training that was continued the largest; and its
    processor time in seconds, of the starts that came to an end the sum."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes of ru_maxrss
    now = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        now["peak_device_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    before = read_json(path) if path.exists() else {}
    spent = {"cpu_seconds": time.process_time() + before.get("cpu_seconds", 0.0)}
    write_json({name: max(value, before.get(name, 0.0)) for name, value in now.items()} | spent, path)
