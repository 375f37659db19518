"""RandomStyleTrainer: where its transforms stand, and that it needs no target."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from conftest import make_trainer, same_weights, weights

from nnunet_uda.errors import UDAError

NAME = "RandomStyleTrainer"


def pipeline_of(loader) -> list:
    return loader.data_loader.transforms.transforms


def test_styles_come_after_the_spatial_augmentation_of_training_alone(in_workspace):
    trainer = make_trainer(NAME)
    trainer.initialize()
    training, validation = trainer.get_dataloaders()
    names = [type(step).__name__ for step in pipeline_of(training)]
    assert names[:2] == ["SpatialTransform", "ComposeTransforms"] and names.count("ComposeTransforms") == 1
    assert len(pipeline_of(training)[1].transforms) == 3
    assert not any(isinstance(step, ComposeTransforms) for step in pipeline_of(validation))
    batch = next(training)
    assert batch["data"].shape == (2, 1, 32, 32) and batch["data"].isfinite().all()


def test_styles_differ_between_the_calls_and_leave_the_labels(in_workspace):
    trainer = make_trainer(NAME, augmentation="none", mirror=False)
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    transforms = loader.data_loader.transforms
    image = torch.randn(1, 32, 32)
    label = torch.zeros(1, 32, 32, dtype=torch.int16)
    label[:, 4:20, 8:24] = 2
    first, second = (transforms(image=image.clone(), segmentation=label.clone()) for _ in range(2))
    assert not torch.allclose(first["image"], second["image"], atol=1e-2)
    assert torch.equal(first["segmentation"][0], label) and torch.equal(second["segmentation"][0], label)


def test_switched_off_it_is_source_only(in_workspace):
    off = {f"random_style__{part}_probability": 0.0
           for part in ("cluster_contrast", "random_convolution", "global_location_scale")}  # fmt: skip
    plain, source_only = make_trainer(NAME, num_epochs=1, **off), make_trainer("SourceOnlyTrainer", num_epochs=1)
    for trainer in (plain, source_only):
        trainer.run_training()
    assert same_weights(weights(plain), weights(source_only))


def test_a_seed_decides_every_weight_and_no_target_is_needed(in_workspace, monkeypatch, tmp_path):
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(in_workspace, name), tmp_path / name)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    shutil.rmtree(tmp_path / "raw" / "Dataset501_Blobs" / "imagesTu")
    results = []
    for seed in (7, 7, 8):
        trainer = make_trainer(NAME, num_epochs=1, seed=seed)
        trainer.run_training()
        results.append(weights(trainer))
        shutil.rmtree(Path(trainer.output_folder))
        shutil.rmtree(trainer.output_folder_base, ignore_errors=True)
    assert same_weights(results[0], results[1]) and not same_weights(results[0], results[2])


def test_three_dimensions_train_too(in_workspace):
    in_workspace.configure("tiny3d", configuration="3d_fullres", options=("--overwrite",))
    trainer = make_trainer(NAME, plans="tiny3d", configuration="3d_fullres")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert np.isfinite(losses["segmentation"])


def test_anisotropic_3d_is_restyled_as_a_volume(in_workspace):
    """With nnU-Net's dummy 2D augmentation the slices are channels for a while."""
    trainer = make_trainer(NAME)
    pipeline = trainer.get_training_transforms(
        np.array([8, 32, 32]), (-0.5, 0.5), None, (0, 1, 2), True, use_mask_for_norm=[False],
        foreground_labels=[1, 2], regions=None, ignore_label=None,
    )  # fmt: skip
    names = [type(step).__name__ for step in pipeline.transforms]
    assert names.index("ComposeTransforms") == names.index("Convert2DTo3DTransform") + 1


def test_worker_processes_can_restyle(in_workspace, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = make_trainer(NAME, num_epochs=1)
    trainer.run_training()
    assert np.isfinite(trainer.record.history["segmentation"]).all()


def test_a_wrong_probability_is_named(in_workspace):
    with pytest.raises(UDAError, match="'random_convolution_probability' must be between 0 and 1, found 2"):
        make_trainer(NAME, random_style__random_convolution_probability=2)
