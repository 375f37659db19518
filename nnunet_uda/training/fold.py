"""One fold trained as ``nnUNetv2_train`` does it, and what that cost."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

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


def train(arguments: argparse.Namespace, device: torch.device) -> Path:
    """Train with the options of ``nnUNetUDA_train``, in each process; the fold's folder.

    Raises:
        UDAError: no such plans, configuration or trainer, or files that are missing or broken.
    """
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
    from torch.backends import cudnn

    fold = arguments.fold if arguments.fold == "all" else int(arguments.fold)
    folder = environment_folder("nnUNet_preprocessed") / dataset_name(arguments.dataset)
    plans = read_plans(folder, arguments.p)
    if arguments.configuration not in plans["configurations"]:
        raise UDAError(
            f"the plans {arguments.p} have no configuration {arguments.configuration!r}; they have "
            f"{', '.join(plans['configurations'])}"
        )
    find_any_trainer(arguments.tr)
    read_json(folder / "dataset.json")  # nnU-Net, which reads it too, does not name a broken one
    trainer = get_trainer_from_args(
        arguments.dataset, arguments.configuration, fold, arguments.tr, arguments.p, arguments.c, device
    )
    for name in [FINAL] * arguments.val + [BEST] * (arguments.val and arguments.val_best):
        if not (needed := Path(trainer.output_folder, name)).is_file():
            raise UDAError(f"--val needs {needed}, which does not exist: train first, or continue with --c")
    trainer.disable_checkpointing = arguments.disable_checkpointing
    if arguments.pretrained_weights is not None:
        trainer.initialize()
        load_pretrained(trainer.network, arguments.pretrained_weights)
    else:
        maybe_load_checkpoint(trainer, arguments.c, arguments.val)
    if device.type == "cuda":
        cudnn.deterministic, cudnn.benchmark = False, True
    if not arguments.val:
        trainer.run_training()
        if rank() == 0:
            write_cost(Path(trainer.output_folder, COST), device)
    if arguments.val_best:
        trainer.load_checkpoint(str(Path(trainer.output_folder, BEST)))
    trainer.perform_actual_validation(arguments.npz)
    return Path(trainer.output_folder)


def load_pretrained(network: torch.nn.Module, path: Path) -> None:
    """All weights but the segmentation layers' from a checkpoint, by nnU-Net's rule, on whatever device.

    Raises:
        UDAError: no readable checkpoint, or a weight that is missing there or has another shape.
    """
    module = getattr(network, "_orig_mod", network)
    weights = read_checkpoint(path)["network_weights"]
    own = module.state_dict()
    for key in (key for key in own if ".seg_layers." not in key):
        found = tuple(weights[key].shape) if key in weights else None
        if found != tuple(own[key].shape):
            raise UDAError(
                f"-pretrained_weights {path}: {key} is {'missing' if found is None else f'of shape {found}'}, this "
                f"network's has shape {tuple(own[key].shape)}. Take weights of the same network and plans"
            )
        own[key] = weights[key]
    module.load_state_dict(own)
    if rank() == 0:
        print(f"Pretrained weights, all but the segmentation layers, from {path}")


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
