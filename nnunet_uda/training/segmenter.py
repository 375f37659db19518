"""nnU-Net's network and loss as the trainers here use them, and the networks beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_uda.data.new_scans import treating_new_scans
from nnunet_uda.foreign_plans import check_before_building
from nnunet_uda.losses.deep_supervision import deeply_supervised
from nnunet_uda.losses.dice import soft_dice_loss
from nnunet_uda.training.ranks import seen_as_ddp

if TYPE_CHECKING:
    from nnunet_uda.training.uda_trainer import UDATrainer


class Networks(nn.ModuleDict):
    """A method's networks beside the segmenter, by name. What each of them can do is known to the method alone."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name)


@treating_new_scans
def build_segmenter(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
) -> nn.Module:
    """nnU-Net's network from the plans. Prediction comes here with plans that no trainer has looked at."""
    check_before_building(plans_manager.plans)
    return nnUNetTrainer.build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
    )


def segmentation_loss(trainer: UDATrainer, nnunets: Callable[[], Any]) -> Callable:
    """The loss that the settings choose, of the batch of all ranks, with the weights of levels that it has on one.

    Args:
        nnunets: builds nnU-Net's own loss.
    """
    loss: Any
    if trainer.settings.segmentation_loss == "dice":
        loss = partial(soft_dice_loss, ignore_label=trainer.label_manager.ignore_label)
    else:
        with seen_as_ddp(trainer, trainer.ranks.several):
            loss = nnunets()
        loss = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    scales = trainer._get_deep_supervision_scales()
    return loss if scales is None else deeply_supervised(loss, len(scales))
