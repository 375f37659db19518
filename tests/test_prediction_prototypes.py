"""nnU-Net's own predictor gives the average of both branches, with tiles, mirroring and several folds."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from conftest import make_trainer
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

TINY = {"embedding_dim": 8, "discriminator_width": 4, "dictionary_size": 6, "top_k": 2}


@pytest.fixture
def model_folder(in_workspace):
    """Two folds with random weights, written as training writes them."""
    for fold in (0, 1):
        trainer = make_trainer(
            "SimilarityPrototypesTrainer", fold=fold, mirror=True,
            **{f"similarity_prototypes__{key}": value for key, value in TINY.items()},
        )  # fmt: skip
        trainer.on_train_start()
        for parameter in trainer.network.parameters():
            parameter.data += 0.1 * fold * torch.randn_like(parameter)
        trainer.on_train_epoch_end([{"loss": 0.0, "cycle": 0.0}])
        trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    return trainer.output_folder_base


def branches(state: dict, network, tile: torch.Tensor) -> torch.Tensor:
    """Log of the mean softmax of G_T on the tile and of G_S on G_T's translation of it, each run by itself."""
    network.load_state_dict(state)
    with torch.no_grad():
        direct = network.target_generator(tile)
        other = network.source_generator(direct.image)
        return torch.log(direct.segmentation.softmax(1) / 2 + other.segmentation.softmax(1) / 2)


def test_tiles_mirroring_and_folds(model_folder):
    predictor = nnUNetPredictor(
        tile_step_size=0.5, use_gaussian=True, use_mirroring=True, perform_everything_on_device=False,
        device=torch.device("cpu"), allow_tqdm=False,
    )  # fmt: skip
    predictor.initialize_from_trained_model_folder(model_folder, (0, 1), "checkpoint_final.pth")
    assert len(predictor.list_of_parameters) == 2 and tuple(predictor.allowed_mirroring_axes) == (0, 1)
    torch.manual_seed(0)
    image = torch.randn(1, 2, 44, 38)
    ours = predictor.predict_logits_from_preprocessed_data(image).float()

    patch = predictor.configuration_manager.patch_size
    gaussian = compute_gaussian(
        tuple(patch), sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu")
    ).float()
    flips = [axes for number in range(3) for axes in combinations((2, 3), number)]
    expected = torch.zeros(3, 2, 44, 38)
    for state in predictor.list_of_parameters:
        total, weight = torch.zeros(3, 2, 44, 38), torch.zeros(2, 44, 38)
        for index in range(2):
            for top in (0, 12):
                for left in (0, 6):
                    tile = image[:, index, top : top + 32, left : left + 32][None]
                    logits = [branches(state, predictor.network, tile.flip(axes)).flip(axes) for axes in flips]
                    total[:, index, top : top + 32, left : left + 32] += torch.stack(logits).mean(0)[0] * gaussian
                    weight[index, top : top + 32, left : left + 32] += gaussian
        expected += total / weight / 2
    error = (ours - expected).abs()  # the predictor sums in half precision
    assert error.max() < 0.1 and error.mean() < 5e-3
    assert (ours.argmax(0) == expected.argmax(0)).float().mean() > 0.99
