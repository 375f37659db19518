"""A trained model folder of nnU-Net's, whoever made it: read as data, asked, and written again with other weights."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_uda.data.case import preprocess_case
from nnunet_uda.data.components import KEY
from nnunet_uda.data.convention import check_dataset_json, check_results_folder, read_json
from nnunet_uda.data.new_scans import treat_new_scans
from nnunet_uda.errors import UDAError
from nnunet_uda.files import write_json
from nnunet_uda.foreign_plans import check_plans
from nnunet_uda.images.intensities import read_intensities
from nnunet_uda.methods import look_for_trainer
from nnunet_uda.quality.asked import Asked
from nnunet_uda.quality.calibration import Calibration
from nnunet_uda.quality.cases import FILE, quality_of_volume, read_calibration, structure_names, uncalibrated
from nnunet_uda.training.checkpoint import FINAL, check_model, configuration_of, load, plain, write_checkpoint
from nnunet_uda.training.uda_trainer import UDATrainer

Weights = dict[str, Tensor]
TILE_STEP = 0.5
"""Of the sliding window, nnU-Net's."""


@dataclass
class Model:
    """A model that is open.

    Attributes:
        folder: ``TRAINER__PLANS__CONFIGURATION`` in nnU-Net's results, or any folder of that kind.
        folds: names behind ``fold_``; ``weights`` has one entry for each.
        checkpoints: what their files held, without the weights.
        predictor: nnU-Net's, with the network.
        trainer: the class that built the network.
        configuration: its name in the plans.
        calibration: that beside the first fold's checkpoint, or what is known without one.
    """

    folder: Path
    folds: list[str]
    weights: list[Weights]
    checkpoints: list[dict[str, Any]]
    predictor: nnUNetPredictor
    trainer: type[Any]
    configuration: str
    calibration: Calibration

    @property
    def network(self) -> nn.Module:
        return self.predictor.network

    @property
    def dataset_json(self) -> dict[str, Any]:
        return self.predictor.dataset_json

    @property
    def patch_size(self) -> tuple[int, ...]:
        return tuple(self.predictor.configuration_manager.patch_size)

    @property
    def batch_size(self) -> int:
        """Of adaptation: the training's, but no more than 4 patches, which a device that trained it holds."""
        return max(1, min(4, self.predictor.configuration_manager.batch_size))

    @property
    def masked(self) -> list[bool]:
        """For each channel whether it is 0 outside of nnU-Net's mask."""
        return list(self.predictor.configuration_manager.use_mask_for_norm)

    @property
    def num_classes(self) -> int:
        return self.predictor.label_manager.num_segmentation_heads

    @property
    def single_components(self) -> list[list[int]]:
        """Groups of classes that are one piece (``data.components``)."""
        return self.predictor.plans_manager.plans.get(KEY, [])

    @property
    def structures(self) -> list[str]:
        """Names of the classes from 1."""
        return structure_names(self.dataset_json)

    def preprocess(self, files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """``(C, Z, Y, X)`` float32, ``(Z, Y, X)`` int16 nonzero mask (-1 outside) and properties of a scan, as its
        network reads it; with the intensities of the dataset where it says which (``data.new_scans``)."""
        predictor = self.predictor
        data, mask, properties = preprocess_case(
            files, predictor.plans_manager, predictor.configuration_manager, self.dataset_json
        )
        return data.astype(np.float32, copy=False), np.minimum(mask[0], 0).astype(np.int16), properties

    def logits(self, volume: np.ndarray | Tensor, weights: Sequence[Weights], mirror: bool = True) -> Tensor:
        """``(K, Z, Y, X)`` on the CPU, mean over ``weights``, as nnU-Net predicts; ``mirror`` as it was trained."""
        self.predictor.use_mirroring, self.predictor.tile_step_size = mirror, TILE_STEP
        volume = torch.as_tensor(volume).cpu()
        total: Tensor | None = None
        for one in weights:
            self.network.load_state_dict(one)
            logits = self.predictor.predict_sliding_window_return_logits(volume).cpu().float()
            total = logits if total is None else total + logits
        assert total is not None, "a model has weights"
        return total / len(weights)

    def estimate(self, volume: np.ndarray, properties: dict[str, Any], weights: Sequence[Weights]) -> float:
        """The Dice that ``nnunet_uda.quality`` expects of a scan's segmentation, without a label; by the calibration
        beside the first fold's checkpoint, where there is one."""
        self.network.load_state_dict(weights[0])
        asked = Asked(self.predictor, {f"network_{index}": one for index, one in enumerate(weights)}, {})
        spacing, image = asked.spacing(properties), torch.from_numpy(np.asarray(volume))
        quality, _ = quality_of_volume("", asked, self.calibration, image, spacing)
        return float(np.nan_to_num(quality.overall.dice))

    def write_prediction(self, logits: Tensor, properties: dict[str, Any], path: Path) -> None:
        """The segmentation on the scan's own grid, whole or not at all; ``path`` with the file ending."""
        ending = self.dataset_json["file_ending"]
        work = path.with_name(f".{path.name}.{os.getpid()}.partial")
        work.mkdir(parents=True, exist_ok=True)
        try:
            predictor = self.predictor
            export_prediction_from_logits(
                logits, properties, predictor.configuration_manager, predictor.plans_manager, self.dataset_json,
                str(work / "prediction"), False, 1,
            )  # fmt: skip
            os.replace(work / f"prediction{ending}", path)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def seconds(self, shape: Sequence[int], passes: int, steps: int) -> float:
        """How long a scan takes: ``passes`` sliding windows without mirroring and ``steps`` steps on a batch."""
        patch = torch.zeros(1, self.num_input_channels, *self.patch_size, device=self.predictor.device)
        network = self.network.to(self.predictor.device).eval()
        self.network.load_state_dict(self.weights[0])
        forward = _time(lambda: network(patch))
        batch = patch.expand(self.batch_size, *patch.shape[1:])

        def step() -> None:
            network(batch).square().mean().backward()
            network.zero_grad(set_to_none=True)

        padded = [max(a, b) for a, b in zip(shape, [1, *self.patch_size][-3:], strict=True)]
        windows = len(self.predictor._internal_get_sliding_window_slicers(tuple(padded)))
        with torch.no_grad():
            forward = _time(lambda: network(patch))
        return windows * forward * passes + (steps * _time(step) if steps else 0.0)

    @property
    def num_input_channels(self) -> int:
        predictor = self.predictor
        return determine_num_input_channels(
            predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        )

    @property
    def mirrored_passes(self) -> int:
        """Passes of a prediction with nnU-Net's mirroring."""
        return 2 ** len(self.predictor.allowed_mirroring_axes or ())

    @property
    def written_trainer(self) -> str:
        """The trainer that will predict with the written model.

        It is nnU-Net's own where the model is a plain network and no new scan has to be clipped, else the model's.
        """
        own = self.predictor.trainer_name
        plain_network = self.trainer.build_network_architecture is UDATrainer.build_network_architecture
        clipped = read_intensities(self.dataset_json, "dataset.json of the model", "target") is not None
        return "nnUNetTrainer" if plain_network and not clipped else own

    def results_folder(self, results: Path) -> Path:
        """Where ``nnUNetv2_predict`` looks for the adapted model where ``nnUNet_results`` is ``results``."""
        plans = self.predictor.plans_manager
        return results / plans.dataset_name / f"{self.written_trainer}__{plans.plans_name}__{self.configuration}"

    def write_fold(self, results: Path, fold: str, weights: Weights, note: dict[str, Any]) -> None:
        """An adapted fold, with what nnU-Net needs beside it."""
        folder = self.results_folder(results)
        (folder / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
        write_json(self.predictor.plans_manager.plans, folder / "plans.json")
        write_json(self.dataset_json, folder / "dataset.json")
        fingerprint = self.folder / "dataset_fingerprint.json"
        if fingerprint.is_file():
            shutil.copyfile(fingerprint, folder / fingerprint.name)
        checkpoint = self.checkpoints[self.folds.index(fold)]
        axes = self.predictor.allowed_mirroring_axes
        write_checkpoint(
            {
                "network_weights": {name: value.cpu() for name, value in weights.items()},
                "trainer_name": self.written_trainer,
                "init_args": checkpoint["init_args"],
                "current_epoch": checkpoint.get("current_epoch", 0),  # of the training that was adapted
                "inference_allowed_mirroring_axes": None if axes is None else tuple(axes),
                "adapted": plain(note),
            },
            folder / f"fold_{fold}" / FINAL,
        )


def _time(function: Callable[[], Any]) -> float:
    """Seconds of a second call: the first one warms up."""
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def open_model(
    folder: Path, folds: Sequence[str] | None, checkpoint: str, device: torch.device, trusted: bool = False
) -> Model:
    """Open a model folder.

    Args:
        folds: names behind ``fold_``; None for all that have the checkpoint.
        trusted: let pickled code in the checkpoints run, which else is refused.

    Raises:
        UDAError: no such folder, fold or checkpoint, plans or dataset.json that are none, a cascade, regions, a
            checkpoint that is no data, or one whose network is another than that of the plans.
    """
    check_results_folder(folder)
    plans = check_plans(read_json(folder / "plans.json"), folder / "plans.json")
    dataset_json = read_json(folder / "dataset.json")
    check_dataset_json(dataset_json, folder / "dataset.json")
    there = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}"))
    folds = list(folds or there)
    missing = [fold for fold in folds if fold not in there]
    if missing or not folds:
        raise UDAError(
            f"{folder} holds no {checkpoint} of {'fold ' + ', '.join(missing) if missing else 'any fold'}; it has "
            f"{checkpoint} of {', '.join(there) or 'no fold'}. Choose with -f and -chk"
        )
    files = [folder / f"fold_{fold}" / checkpoint for fold in folds]
    contents = [_read(path, trusted) for path in files]
    configuration = configuration_of(contents[0], files[0], plans)
    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    if any(isinstance(value, list) for value in dataset_json["labels"].values()):
        raise UDAError(f"{folder}: this model was trained on regions; adapting needs one integer for each structure")
    if settings.previous_stage_name is not None:
        raise UDAError(f"{folder}: the second stage of a cascade needs the first one's output, which is not adapted")
    treat_new_scans(settings, manager)
    labels = manager.get_label_manager(dataset_json)
    name = contents[0]["trainer_name"]
    trainer = _find_trainer(name)
    channels = determine_num_input_channels(manager, settings, dataset_json)
    try:
        with redirect_stdout(StringIO()):
            network = trainer.build_network_architecture(
                manager, settings, channels, labels.num_segmentation_heads, enable_deep_supervision=False
            )
    except TypeError as error:
        raise UDAError(f"{folder}: its trainer {name} does not build networks as nnU-Net 2.8 does ({error})") from error
    for path, content in zip(files, contents, strict=True):
        _check_weights(network, content["network_weights"], path, folder)
    axes = contents[0].get("inference_allowed_mirroring_axes")
    with redirect_stdout(StringIO()):
        predictor = nnUNetPredictor(device=device, allow_tqdm=False)
    weights = [content.pop("network_weights") for content in contents]
    predictor.manual_initialization(network, manager, settings, weights, dataset_json, name, axes)
    path, structures = folder / f"fold_{folds[0]}" / FILE, structure_names(dataset_json)
    calibration = read_calibration(path, structures) if path.is_file() else uncalibrated(structures)
    return Model(folder, folds, weights, contents, predictor, trainer, configuration, calibration)


def _read(path: Path, trusted: bool) -> dict[str, Any]:
    try:
        content = load(path, trusted)
    except UDAError:
        raise
    except Exception as error:  # a cut or foreign pickle raises whatever its bytes make of it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UDAError(
            f"{path} cannot be read as data ({reason[:200]}): it is cut short, or holds pickled code, which is not run "
            "here. If you know where the file is from and trust it, add --trusted"
        ) from error
    return check_model(content, path)


def _find_trainer(name: str) -> type[Any]:
    if (trainer := look_for_trainer(name)) is not None:
        return trainer
    print(
        f"WARNING: the trainer {name} is not to be found here (nnUNet_extTrainer); trying nnU-Net's plain network of "
        "the plans"
    )
    return nnUNetTrainer


def _check_weights(network: nn.Module, weights: Weights, path: Path, folder: Path) -> None:
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    if own == theirs:
        return
    wrong = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    raise UDAError(
        f"{path} does not fit {folder / 'plans.json'} and dataset.json: {len(wrong)} weight(s) differ, as {wrong[0]} "
        f"({theirs.get(wrong[0], 'missing')} in the file, {own.get(wrong[0], 'none')} in the network). Channels, "
        "labels and architecture must be those of the training"
    )
