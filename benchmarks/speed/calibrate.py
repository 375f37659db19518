"""What a trainer's step takes in terms of a plain network's: for comparisons at equal time."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

PLAIN = "SourceOnlyTrainer"
PARTS, STEPS = 4, 4
"""The schedule's parts, from the middle of each of which so many steps are timed."""


def step_seconds(run: dict[str, Any]) -> tuple[float, float]:
    """Seconds that a step of the plain network and one of a trainer take, loading included; in a process of its own.

    They are taken in turn, so that a slow moment of the machine meets both. On a CPU it is this process's own time,
    which others on the machine hardly touch. The steps are of the middles of the schedule's parts, since a method may
    do other things early than late; what it does only after a certain score is not seen.

    Args:
        run: ``trainer``, ``dataset``, ``plans`` (their content), ``configuration``, ``fold`` and ``device``.
    """
    import torch

    from benchmarks.speed.step_time import make_trainer, set_aside, synchronise

    device = torch.device(run["device"])
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with set_aside("0"):
        plans = run["plans"] | {"uda": {key: value for key, value in run["plans"]["uda"].items()
                                        if not isinstance(value, dict)}}  # fmt: skip
        where = (run["configuration"], device)
        pair = [make_trainer(name, run["dataset"], content, *where, fold=run["fold"])
                for name, content in ((PLAIN, plans), (run["trainer"], run["plans"]))]  # fmt: skip
        medians: tuple[list[float], list[float]] = ([], [])
        for part in range(PARTS):
            times: tuple[list[float], list[float]] = ([], [])
            for step in range(STEPS + 1):
                for one, own in zip(pair, times, strict=True):
                    if step == 0:
                        one.current_epoch = (2 * part + 1) * one.num_epochs // (2 * PARTS)
                        one.on_train_epoch_start()
                    synchronise(device)
                    start = clock()
                    one.train_step(next(one.dataloader_train))
                    synchronise(device)
                    own.append(clock() - start)
            for own, median in zip(times, medians, strict=True):
                median.append(statistics.median(own[1:]))
    return statistics.mean(medians[0]), statistics.mean(medians[1])
