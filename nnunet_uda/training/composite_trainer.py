"""The base of trainers whose ``network`` is more than nnU-Net's plain network."""

from __future__ import annotations

from torch import Tensor

from nnunet_uda.training.uda_trainer import UDATrainer


class CompositeTrainer(UDATrainer):
    """``self.network`` is one module with all that prediction needs, built by ``build_network_architecture``.

    That static method is overridden with nnU-Net's signature ``(plans_manager, configuration_manager,
    num_input_channels, num_output_channels, enable_deep_supervision)``; it also runs at prediction, from the plans
    alone. The module's ``forward`` maps ``(B, C, *patch)`` images to logits, a list from fine to coarse where its
    attribute ``deep_supervision`` is true. ``-pretrained_weights`` takes checkpoints of the same trainer only.
    """

    def prepare_network(self) -> None:
        """Training calls the module's parts; a method that has them compiles them here."""

    def segment(self, images: Tensor) -> list[Tensor] | Tensor:
        return self.network(images)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        self.plain_network.deep_supervision = enabled
