"""Networks that train in seconds: a CLIP, plans for UUDS, and settings of the prototypes."""

from __future__ import annotations

import json

from nnunet_uda.plans import derive_plans

CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
UUDS = {"clip_config": CLIP, "clip_weights": "random", "warmup_epochs": 0, "threshold": 1.0}

PROTOTYPES = {"embedding_dim": 8, "discriminator_width": 4, "dictionary_size": 6, "top_k": 2, "min_positions": 1}


def write_plans(workspace, name, base="tiny", configuration="2d", **options):
    folder = workspace.preprocessed / "Dataset501_Blobs"
    plans = json.loads((folder / f"{base}.json").read_text())
    uda = {**json.loads((folder / "tiny.json").read_text())["uda"], "uuds": UUDS}
    (folder / f"{name}.json").write_text(
        json.dumps(derive_plans(plans, configuration, name, uda, batch_size=4, **options))
    )
