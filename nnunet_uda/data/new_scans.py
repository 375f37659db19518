"""Clip the scans that a trained model predicts as its dataset was clipped when it was converted.

nnU-Net looks preprocessors up inside its own package, by a name in the plans. But it hands a trainer's
``build_network_architecture`` the very configuration that it preprocesses with and sends to worker processes. There
``treat_new_scans`` makes it a ``NewScansConfiguration``, whose preprocessor clips a scan first, as ``dataset.json``
beside the model says, and then does what nnU-Net's does. The plans stay as they are, and so do training data, which
are preprocessed by nnU-Net itself, from files that the converter has clipped. ``check_prediction`` tries it out.

New scans count as the target's, or as the source's if the environment variable ``NNUNET_UDA_DOMAIN`` is ``source``.
Scans that were clipped before stay as they are.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_uda.data.case import check_before_resampling, checked_grids
from nnunet_uda.data.components import KEY, keep_largest_components
from nnunet_uda.data.convention import read_json
from nnunet_uda.data.slices import elsewhere
from nnunet_uda.errors import UDAError, worker_ends_by_message
from nnunet_uda.files import cannot_write, write_json
from nnunet_uda.images.intensities import NoContrastError, not_hounsfield, read_intensities
from nnunet_uda.images.reading import check_values, remarks

VARIABLE = "NNUNET_UDA_DOMAIN"


class NewScans(DefaultPreprocessor if TYPE_CHECKING else object):  # type: ignore[misc] # it is put before any
    """Checks and clipping before a preprocessor of nnU-Net.

    A file that is short, damaged or no volume, or that has two geometries, is refused; so is a scan with voxels that no
    scan has, or of another order than the source's, before it is resampled.
    """

    _files: Sequence[str] = ("the scan",)

    def run_case(self, image_files: Sequence[str], seg_file: Any, plans_manager: Any, *others: Any) -> Any:
        self._files = image_files
        with worker_ends_by_message():
            files = [Path(file) for file in image_files]
            checked_grids(files, plans_manager.image_reader_writer_class())
            for warning in (warning for file in files for warning in remarks(file)[1]):
                print(f"WARNING: {warning}")
            return super().run_case(image_files, seg_file, plans_manager, *others)

    def run_case_npy(
        self,
        data: np.ndarray,
        seg: Any,
        properties: dict,
        plans_manager: Any,
        configuration_manager: Any,
        dataset_json: Any,
    ) -> Any:
        if not isinstance(dataset_json, dict):
            dataset_json = read_json(Path(dataset_json))
        channels = dataset_json.get("channel_names") or dataset_json.get("modality")  # as nnU-Net counts them
        if channels and len(data) != len(channels):
            raise UDAError(
                f"{', '.join(map(str, self._files))}: {len(data)} channel(s); expected {len(channels)}, as the model "
                f"was trained with ({', '.join(map(str, channels.values()))}). Names that end in _0000, _0001, ... are "
                "channels of one case: rename or remove what does not belong to it, or add what is missing."
            )
        for index, channel in enumerate(data):
            check_values(channel, Path(self._files[min(index, len(self._files) - 1)]))
        where = (Path(self._files[0]), data.shape[1:], properties["spacing"])
        check_before_resampling(*where, plans_manager, configuration_manager, None)
        data = clip_scan(data, dataset_json, self._files)
        if reason := elsewhere(
            properties["spacing"],
            plans_manager.original_median_spacing_after_transp,
            plans_manager.transpose_forward,
            len(configuration_manager.patch_size) == 2,
        ):
            print(f"WARNING: {self._files[0]}: {reason}. Its prediction is likely to be worse")
        return super().run_case_npy(data, seg, properties, plans_manager, configuration_manager, dataset_json)


@cache
def _before(preprocessor_class: type) -> type:
    return type(f"NewScans{preprocessor_class.__name__}", (NewScans, preprocessor_class), {})


class NewScansConfiguration(ConfigurationManager):
    """nnU-Net's configuration, whose preprocessor is ``NewScans`` before the one that the plans name.

    The logits of a whole scan, resampled to its grid, keep the largest component of what is one piece in the source's
    labels (``data.components``).
    """

    single_components: Sequence[Sequence[int]] = ()

    @property
    def preprocessor_class(self) -> type:
        return _before(super().preprocessor_class)

    @property
    def resampling_fn_probabilities(self) -> Callable:
        resample = super().resampling_fn_probabilities

        def resampled(logits: Any, *args: Any, **kwargs: Any) -> Any:
            return keep_largest_components(resample(logits, *args, **kwargs), self.single_components)

        return resampled if self.single_components else resample


def treat_new_scans(configuration: ConfigurationManager, plans: PlansManager) -> None:
    """Make ``configuration`` a ``NewScansConfiguration``, with what ``plans`` know of structures that are one piece."""
    if type(configuration) is ConfigurationManager:
        configuration.__class__ = NewScansConfiguration
    if isinstance(configuration, NewScansConfiguration):
        configuration.single_components = plans.plans.get(KEY, ())


def domain_of_new_scans() -> str:
    """``target`` or ``source``, by the environment; ``UDAError`` for any other value of the variable."""
    domain = os.environ.get(VARIABLE, "").strip().lower() or "target"
    if domain not in ("source", "target"):
        raise UDAError(f"{VARIABLE}={os.environ[VARIABLE]}: expected source or target (the domain of the new scans).")
    return domain


def clip_scan(data: np.ndarray, dataset_json: dict[str, Any], files: Sequence[str]) -> np.ndarray:
    """``data`` ``(C, Z, Y, X)`` as the converter would have written it; a new array where anything is to be done.

    Args:
        files: of the channels, for messages.

    Raises:
        UDAError: for a scan that lies outside of the window altogether.
    """
    domain = domain_of_new_scans()
    intensities = read_intensities(dataset_json, "dataset.json of the model", domain)
    if intensities is None:
        return data
    channels = []
    for index, channel in enumerate(data):
        where = str(files[min(index, len(files) - 1)])
        if intensities.window is not None and intensities.origin != "given" and (reason := not_hounsfield(channel)):
            print(
                f"WARNING: {where}: {reason}; expected a CT in Hounsfield units, as the model's {domain} scans were. "
                f"Its prediction is likely to be wrong. If it is no {domain} scan, see {VARIABLE} in the README"
            )
        try:
            channels.append(intensities.clip(channel, where))
        except NoContrastError as error:
            if intensities.window is not None:
                raise
            print(f"WARNING: {error}: predicted as it is")
            channels.append(channel)
    return np.stack(channels).astype(data.dtype, copy=False)


def check_prediction(
    trainer_name: str, network: torch.nn.Module, plans: dict, configuration: str, dataset_json: dict
) -> None:
    """Try whether this version of nnU-Net predicts a raw scan as a clipped one, and keeps single components.

    Args:
        network: the trainer's, for its weights' names and shapes alone.

    Raises:
        UDAError: if it does not.
    """
    intensities = read_intensities(dataset_json, "dataset.json", domain_of_new_scans())
    if intensities is None and not plans.get(KEY):
        return
    weights = {name: torch.zeros((), dtype=w.dtype).expand(w.shape) for name, w in network.state_dict().items()}
    checkpoint = {
        "trainer_name": trainer_name, "init_args": {"configuration": configuration}, "network_weights": weights,
        "inference_allowed_mirroring_axes": None,
    }  # fmt: skip
    with TemporaryDirectory() as name, redirect_stdout(StringIO()):
        write_json(plans, Path(name, "plans.json"))
        write_json(dataset_json, Path(name, "dataset.json"))
        Path(name, "fold_0").mkdir()
        try:
            torch.save(checkpoint, weights_file := Path(name, "fold_0", "checkpoint_final.pth"))
        except RuntimeError as error:  # torch does not say why
            raise cannot_write(weights_file, error) from error
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(name, (0,), "checkpoint_final.pth")
    stock = PlansManager(plans)
    of_worker = pickle.loads(pickle.dumps((predictor.plans_manager, predictor.configuration_manager)))
    managers = ((predictor.plans_manager, predictor.configuration_manager), of_worker)
    if plans.get(KEY) and not all(_keeps_one(plan, each, dataset_json) for plan, each in managers):
        raise UDAError(
            "nnunetv2 of this version does not let predictions keep as one piece what is one in the source's labels. "
            "Train with nnunetv2 2.8.1, or with keep_largest_component=false (nnUNetUDA_configure -set)"
        )
    if intensities is None:
        return
    rng = np.random.default_rng(0)
    raw = rng.normal(100, 3000, (len(dataset_json["channel_names"]), 4, 16, 16)).astype(np.float32)
    clipped = np.stack([intensities.clip(channel, "a scan of random numbers") for channel in raw])
    expected = _preprocess(clipped, stock, stock.get_configuration(configuration), dataset_json)
    for plan, each in managers:
        for scan in (raw, clipped):
            if not np.allclose(_preprocess(scan, plan, each, dataset_json), expected, atol=1e-4):
                raise UDAError(
                    "nnunetv2 of this version does not predict with the intensities that the dataset was converted "
                    "with: nnUNetv2_predict would take new scans as they are. Train with nnunetv2 2.8.1, or convert "
                    "the data with -source_intensities none -target_intensities none"
                )


def _keeps_one(plans: PlansManager, configuration: ConfigurationManager, dataset: dict) -> bool:
    """Whether a small second piece of a single component is removed from a prediction."""
    labels = plans.get_label_manager(dataset)
    size = (1, 16, 16)
    logits = torch.zeros(labels.num_segmentation_heads, *size)
    value = plans.plans[KEY][0][0]
    logits[value, :, 2:8, 2:8] = logits[value, :, 12:14, 12:14] = 1
    properties = {
        "spacing": [1.0] * 3,  # of no account: the size stays
        "shape_before_cropping": size, "shape_after_cropping_and_before_resampling": size,
        "bbox_used_for_cropping": [[0, length] for length in size],
    }  # fmt: skip
    found = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, labels, properties, num_threads_torch=1
    )
    return int((found == value).sum()) == 36


def _preprocess(scan: np.ndarray, plans: PlansManager, configuration: ConfigurationManager, dataset: dict) -> Any:
    """As ``nnUNetPredictor.predict_single_npy_array`` does it."""
    spacing = list(np.asarray(plans.original_median_spacing_after_transp)[list(plans.transpose_backward)])
    adapter = PreprocessAdapterFromNpy(
        [scan], [None], [{"spacing": spacing}], [None], plans, dataset, configuration, num_threads_in_multithreaded=1
    )
    return next(adapter)["data"].numpy()
