"""Durations and moments in everyday words."""

from __future__ import annotations

from datetime import datetime, timedelta

MINUTE, HOUR, DAY = 60, 3600, 86400


def duration_text(seconds: float) -> str:
    """``0.25 s``, ``7.2 s``, ``40 s``, ``12 min``, ``2 h 10 min``, ``4 days``."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 2 * MINUTE:
        return f"{seconds:.0f} s"
    if (minutes := round(seconds / MINUTE)) < 60:
        return f"{minutes} min"
    if minutes < 10 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if (hours := round(seconds / HOUR)) < 48:
        return f"{hours} h"
    return f"{round(seconds / DAY)} days"


def moment_text(seconds: float, now: datetime | None = None) -> str:
    """The moment in ``seconds`` from ``now`` on this machine's clock, as ``Fri 4 Dec, 14:10``; of today ``14:10``."""
    now = now or datetime.now()
    moment = now + timedelta(seconds=seconds)
    if moment.date() == now.date():
        return f"{moment:%H:%M}"
    return f"{moment:%a} {moment.day} {moment:%b}, {moment:%H:%M}"
