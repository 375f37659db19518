"""How far a training is, what a step takes, and when the whole will end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

from nnunet_uda.durations import HOUR, MINUTE, duration_text, moment_text

FIRST_ESTIMATE_STEPS = 4
"""Steps before the first estimate; the first one, which warms up, is not counted."""
RECENT_STEPS = 50
MOST_SILENT_SECONDS = 10 * MINUTE
LONG = {"cpu": 3 * HOUR}
LONG_ELSEWHERE = 24 * HOUR
"""A training that lasts longer gets the remedy with its first estimate."""


class Progress:
    """Says so, in lines that become rarer: after 10 s, 20 s, 40 s, ... and then every ten minutes.

    Args:
        epochs: of the whole training.
        steps: of an epoch.
        device: ``cpu``, ``cuda`` or ``mps``.
        remedy: what to do where the training would take too long.
        say: prints a line.
        clock: seconds.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        device: str,
        remedy: str,
        say: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epochs, self.steps, self.device, self.remedy = epochs, steps, device, remedy
        self.say, self.clock = say, clock
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.between: float | None = None
        """Seconds from an epoch's last step to the next one's start: validation, pictures, checkpoints."""
        self.epoch = self.step = 0
        self.last = self.spoke = self.began = clock()
        self.silence = 10.0
        self.estimated = False
        self.warm = False

    def epoch_begins(self, epoch: int, step: int) -> None:
        """``epoch`` (from 0) goes on behind ``step`` of its steps."""
        now = self.clock()
        if self.step == self.steps and epoch == self.epoch + 1:
            self.between = now - self.last
        self.epoch, self.step, self.last = epoch, step, now

    def step_done(self) -> None:
        """Another step is done; says how far things are where it is time to."""
        now = self.clock()
        if self.warm:
            self.recent.append(now - self.last)
        else:
            self.warm, self.began = True, now
        self.last = now
        self.step += 1
        if not self.recent:
            return
        if not self.estimated:
            if len(self.recent) < FIRST_ESTIMATE_STEPS and now - self.began <= MINUTE:
                return
            self.estimated = True
            self._estimate()
        elif now - self.spoke >= self.silence:
            self.silence = min(2 * self.silence, MOST_SILENT_SECONDS)
            self.say(f"{self._place()}: {duration_text(self.step_seconds)} a step, {self._end()}")
        else:
            return
        self.spoke = now

    @property
    def step_seconds(self) -> float:
        """What a step takes: the median of the last ones, in which a pause does not count."""
        return median(self.recent)

    @property
    def left_seconds(self) -> float:
        """Until the last epoch's end, at the present pace."""
        epochs = self.epochs - self.epoch - 1
        steps = epochs * self.steps + self.steps - self.step
        return steps * self.step_seconds + (epochs + 1) * (self.between or 0.0)

    def _place(self) -> str:
        return f"Epoch {self.epoch} (of 0 to {self.epochs - 1}), step {self.step} of {self.steps}"

    def _end(self) -> str:
        left = self.left_seconds
        return f"about {duration_text(left)} left, until {moment_text(left)}"

    def _estimate(self) -> None:
        whole, step = self.epochs * self.steps, self.step_seconds
        text = (
            f"{self.epochs} epochs x {self.steps} steps, {duration_text(step)} each: {duration_text(whole * step)} and "
            f"the validations; {self._end()}"
        )
        if self.left_seconds > LONG.get(self.device, LONG_ELSEWHERE):
            text += f". For less: {self.remedy}"
        self.say(text)
