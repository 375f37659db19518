"""torch.compile, nnU-Net's default on CUDA: its eager backend runs the same code path anywhere."""

from __future__ import annotations

import pytest
import torch
from conftest import make_trainer
from support.tiny import write_plans

PASSES = {
    "CISFATrainer": {"encode", "decode"},
    "CUTTrainer": {"encode", "decode"},
    "CASTTrainer": set(),
    "SimilarityPrototypesTrainer": set(),
    "UUDSAdversarialTrainer": {"find_levels", "generate", "segment"},
}
"""Methods that a trainer calls apart from ``forward``, which are to be compiled too."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_compiled_networks_train_to_the_same_losses_within_dynamos_limit(name, in_workspace, monkeypatch):
    """Modules of one class share their compiled forms; past the limit of those Dynamo compiles nothing more."""
    write_plans(in_workspace, "uuds")
    plans, options = ("uuds", {"uuds__content_weight": 0.1}) if "UUDS" in name else ("tiny", {})
    eager = make_trainer(name, plans, num_epochs=2, **options)
    eager.on_train_start()
    eager.on_train_epoch_start()
    expected = eager.train_step(next(eager.dataloader_train))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # those of former tests
    original, functions, losses = torch.compile, set(), []

    def through_eager(function, **_):
        functions.add(getattr(function, "__name__", type(function).__name__))
        return original(function, backend="eager")

    monkeypatch.setattr(torch, "compile", through_eager)
    compiled = make_trainer(name, plans, num_epochs=2, **options)
    monkeypatch.setattr(type(compiled), "_do_i_compile", lambda self: True)
    step = compiled.train_step
    compiled.train_step = lambda batch: losses.append(step(batch)) or losses[-1]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled.run_training()

    assert losses[0] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert len(losses) == 2 * compiled.num_iterations_per_epoch
    assert functions >= PASSES[name]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > len(PASSES[name])
    assert not any(key.startswith("_orig_mod") for key in compiled.networks.state_dict())
