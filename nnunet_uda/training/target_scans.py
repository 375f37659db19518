"""A fold's target training cases: preprocessed where they are missing or stale, and looked over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_uda.data.convention import labelled_target, normalisation_warning, read_domains
from nnunet_uda.data.damage import refuse_damaged
from nnunet_uda.data.target import (
    LabelledTargetDataset,
    TargetDataset,
    labelled_identifiers,
    preprocess_target,
    target_identifiers,
)
from nnunet_uda.training.ranks import Ranks
from nnunet_uda.workers import usual_processes

TARGET_REMEDY = "Remove the files of these cases: the same command with --c preprocesses them again"


@dataclass(frozen=True)
class TargetScans:
    """The target of one training: what ``dataset.json`` and the plans say of it.

    Raises (both methods):
        UDAError: a scan is missing, or cannot be read or preprocessed.
    """

    plans: PlansManager
    configuration: str
    dataset_json: dict[str, Any]
    fold: int | str
    ranks: Ranks
    log: Callable[[str], None]

    def unlabelled(self) -> TargetDataset:
        """All target training cases, without their labels."""
        domains = read_domains(self.dataset_json)
        warning = normalisation_warning(self.dataset_json, domains)
        if warning:
            self.log(f"WARNING: {warning}")
        folder = self._preprocessed(labelled=False)
        identifiers = target_identifiers(folder, self.fold)
        here = " here" if labelled_target(self.dataset_json) else ""
        self.log(
            f"Unlabelled target: {len(identifiers)} {domains.target} case(s) from {folder}. No target label is read"
            f"{here}; pseudo Dice comes from {domains.source} validation cases"
        )
        dataset = TargetDataset(str(folder), identifiers)
        refuse_damaged((dataset,), TARGET_REMEDY)
        return dataset

    def labelled(self) -> LabelledTargetDataset | None:
        """The few that ``dataset.json`` names as labelled, with their labels; None where this fold has none."""
        listed = labelled_target(self.dataset_json)
        if not listed:
            return None
        folder = self._preprocessed(labelled=True)
        identifiers = labelled_identifiers(folder, self.fold, listed)
        self.log(
            f"Labelled target: {', '.join(identifiers) or 'no case in this fold'}, from {folder}. No other target "
            "label is read"
        )
        dataset = LabelledTargetDataset(str(folder), identifiers)
        refuse_damaged((dataset,), TARGET_REMEDY)
        return dataset if identifiers else None

    def _preprocessed(self, labelled: bool) -> Path:
        return self.ranks.on_first(
            lambda: preprocess_target(
                self.plans, self.configuration, self.dataset_json, usual_processes(), self.log, labelled=labelled
            )
        )
