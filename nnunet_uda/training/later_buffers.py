"""Modules that a trainer got later than some of its checkpoints."""

from __future__ import annotations

from typing import Any

from torch import nn


class LaterBuffers(nn.Module):
    """A module of buffers that checkpoints of before do not hold: there the buffers keep their values."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self.named_buffers():
            state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
