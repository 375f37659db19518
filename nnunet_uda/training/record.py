"""What a training has done so far, so that a checkpoint can be written at any step."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from nnunet_uda.training.checkpoint import random_state
from nnunet_uda.training.progress import Progress


class Record:
    """Loss terms of the present epoch's steps, and their means in the epochs before.

    Attributes:
        history: the mean of each term, one an epoch; NaN before a term appeared.
        steps: the terms of each step of this epoch, those made by an earlier process included.
        within_epoch: from an epoch's first step until its checkpoints are written: it is not done yet.
        in_step: while weights change, so that no checkpoint can be written.
        progress: is told of epochs and steps.
        began: when this process began, in seconds of ``time.monotonic``.
    """

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}
        self.steps: list[dict[str, float]] = []
        self.within_epoch = False
        self.in_step = False
        self.progress: Progress | None = None
        self.began = time.monotonic()
        self._before_validation: dict[str, Any] | None = None

    def begin_epoch(self, epoch: int) -> None:
        self.within_epoch = True
        if self.progress is not None:
            self.progress.epoch_begins(epoch, len(self.steps))

    def add_step(self, losses: dict[str, float]) -> None:
        self.steps = [*self.steps, losses]
        self.in_step = False
        if self.progress is not None:
            self.progress.step_done()

    def end_steps(self, epoch: int, outputs: list[dict[str, float]]) -> dict[str, float]:
        """The steps of ``epoch``, all of ``outputs``, are done: returns the means of their terms.

        A checkpoint from now on to the end of the epoch says that validation is to be done again.
        """
        self._before_validation = self.position()
        means = {name: float(np.mean([each[name] for each in outputs])) for name in outputs[0] if name != "loss"}
        for name, mean in means.items():
            self.history.setdefault(name, [math.nan] * epoch).append(mean)
        self.steps = []
        return means

    def end_epoch(self) -> None:
        self._before_validation = None
        self.within_epoch = False

    def position(self) -> dict[str, Any]:
        """Where training stands: what networks, optimisers and nnU-Net's log do not hold."""
        if self._before_validation is not None:
            return self._before_validation
        history = {name: list(values) for name, values in self.history.items()}
        return {"steps": self.steps, "random_state": random_state(), "loss_history": history}
