"""Maps that are made again for the gradient, switched by the setting ``lean`` (docs/speed.md)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

SMALL = 2**20
"""Bytes of a map below which it is kept: at patches of 64 x 64 making maps again took a tenth of a step."""


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, of which only ``x`` and the outputs of convolutions are kept for the gradient.

    What cheap steps (norm, activation, padding, interpolation) make of them is made again in the backward pass (Chen et
    al. 2016, arXiv 1604.06174; Rota Bulò, Porzi and Kontschieder 2018, arXiv 1712.02616); no convolution is computed
    twice. Where no gradient is recorded or ``x`` is ``SMALL`` it is just ``function(x)``. Under ``torch.compile``, too,
    which decides by itself what to repeat.

    Args:
        function: draws no random numbers and changes no state; no convolution's output is changed in place.
        x: ``(B, C, *S)`` of floating point.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.nbytes < SMALL:
        return function(x)
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, context_fn=kept)
