"""nnU-Net's network and loss as the trainers here use them, and the networks beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_uda.data import new_scans
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


def prepared(build_network_architecture: Callable) -> Callable:
    """A trainer's ``build_network_architecture`` that first checks the plans and has new scans treated.

    ``nnUNetv2_predict`` calls it with plans that no trainer has looked at, and with the configuration that it then
    preprocesses with.
    """
    signature = inspect.signature(build_network_architecture)

    @wraps(build_network_architecture)
    def build(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if "configuration_manager" in given and "plans_manager" in given:
            check_before_building(given["plans_manager"].plans)
            new_scans.treat_new_scans(given["configuration_manager"], given["plans_manager"])
        return build_network_architecture(*args, **kwargs)

    return build


def prepare_builder_of(trainer: type[Any]) -> None:
    """Make a trainer's own ``build_network_architecture``, if it has one, a ``prepared`` one."""
    own = trainer.__dict__.get("build_network_architecture")
    if isinstance(own, staticmethod | classmethod):
        trainer.build_network_architecture = type(own)(prepared(own.__func__))


@prepared
def build_segmenter(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
) -> nn.Module:
    """nnU-Net's network from the plans."""
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
