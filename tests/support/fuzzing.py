"""Values and texts damaged at random, and bounds on what reading them may take."""

from __future__ import annotations

import copy
import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nnunet_uda.errors import UDAError

SECONDS, WAIT = 20, 300
"""Of computing for one input, and of any time at all, for busy machines."""


def nested(depth: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def strange_values() -> list[Any]:
    return [
        None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"),
        float("inf"), -float("inf"), "", " ", "0", "cisfa", "../../x", "/etc/passwd", "a/b", "..", "\x00", "a\nb",
        "\ud800", "\u202e", "ä" * 5000, "x" * 300, [], {}, [[]], [{}], {"": None}, {"a": {}}, [None] * 50,
        list(range(100)), nested(30, list), nested(30, dict), nested(400, list), nested(400, dict), b"".decode(),
    ]  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to every part of ``value``."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy with one to three parts replaced, removed, doubled, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *way, last = rng.choice(list(places(value))) or (None,)
        strange = copy.deepcopy(rng.choice(strange_values()))
        if last is None:
            return strange if rng.random() < 0.3 else value
        holder = value
        for step in way:
            holder = holder[step]
        action = rng.choice(("replace", "replace", "replace", "remove", "double", "rename", "add", "retype"))
        if action == "remove":
            del holder[last]
        elif action == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        elif action == "rename" and isinstance(holder, dict):
            holder[rng.choice(("", "x", last.upper(), f"{last}_", "\ud800", "../x", "y" * 300))] = holder.pop(last)
        elif action == "add" and isinstance(holder, dict):
            holder[rng.choice(("x", "uuds", "cisfa", "seed", "1", "ignore", "num_epochs"))] = strange
        elif action == "retype":
            holder[last] = rng.choice((str, lambda v: [v], lambda v: {"a": v}))(holder[last])
        else:
            holder[last] = strange
    return value


def as_text(value: Any, rng: random.Random) -> bytes:
    """JSON, one time in eight cut, or with bytes that are no text, or nested beyond what any parser takes."""
    text = json.dumps(value).encode()
    return rng.choice(
        [text] * 24 + [text[: rng.randrange(len(text) + 1)], text + b"\xff\xfe", b"[" * 100000]
    )  # fmt: skip


@contextmanager
def limited(what: Any) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"no answer in time to {what!r:.300}")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAIT))
    before = [signal.signal(number, late) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def refused(function: Callable[[], object], what: Any) -> bool:
    """Whether ``function`` ended in a clear refusal; anything but that and a correct end fails the test."""
    try:
        with limited(what):
            function()
    except UDAError as error:
        assert str(error)
        return True
    except SystemExit as end:
        assert end.code == 1
        return True
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error!s:.300} for {what!r:.500}") from error
    return False
