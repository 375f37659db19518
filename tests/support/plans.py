"""Plans of others."""

from __future__ import annotations

from typing import Any

UNETS = "dynamic_network_architectures.architectures.unet"


def plans(dimension: int = 2) -> dict[str, Any]:
    """What nnU-Net's planner writes, shortened."""
    arguments = {
        "n_stages": 2, "features_per_stage": [4, 8], "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
        "kernel_sizes": [[3] * dimension] * 2, "strides": [[1] * dimension, [2] * dimension],
        "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d", "norm_op_kwargs": {"affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {},
    }  # fmt: skip
    functions = {f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")}
    configuration = {
        "data_identifier": "P_2d", "preprocessor_name": "DefaultPreprocessor", "patch_size": [8] * dimension,
        "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False], "batch_size": 2,
        "spacing": [1.0] * dimension, **functions,
        "architecture": {"network_class_name": f"{UNETS}.PlainConvUNet", "arch_kwargs": arguments,
                         "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]},
    }  # fmt: skip
    return {
        "dataset_name": "Dataset501_Blobs", "plans_name": "P", "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager", "experiment_planner_used": "ExperimentPlanner",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "original_median_spacing_after_transp": [3.0, 1.0, 1.0], "foreground_intensity_properties_per_channel": {},
        "configurations": {"2d": configuration, "child": {"inherits_from": "2d", "batch_size": 3}},
    }  # fmt: skip
