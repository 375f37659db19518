"""The shape of a CLIP with a ResNet image encoder, and open_clip's network of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from nnunet_uda.errors import UDAError, shown


def clip_shape(model: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The description of a ResNet CLIP that open_clip's ``CLIP`` is built from.

    Args:
        model: name that open_clip knows, such as ``RN50-quickgelu``; not read where ``config`` is given.
        config: the like of open_clip's own JSON files: ``embed_dim``, ``quick_gelu``, ``vision_cfg``, ``text_cfg``.

    Raises:
        UDAError: unknown name, not a ResNet, or an incomplete ``config``.
    """
    if config is None:
        import open_clip

        if model not in open_clip.list_models():
            known = ", ".join(name for name in open_clip.list_models() if name.startswith("RN"))
            raise UDAError(f"'clip_model' is {model!r}, which open_clip does not have; its ResNets: {known}")
        config = open_clip.get_model_config(model)
        where = f"'clip_model' {model!r}"
    else:
        where = "'clip_config'"
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise UDAError(f"{where}: 'vision_cfg' and 'text_cfg' must be JSON objects, as in open_clip's own model files")
    layers = vision.get("layers")
    if not isinstance(layers, (list, tuple)) or len(layers) != 4 or not all(map(_is_size, layers)):
        raise UDAError(
            f"{where}: the image encoder must be CLIP's ResNet ('vision_cfg' with four numbers in 'layers'), found "
            f"{shown(vision.get('timm_model_name') or layers)}; choose RN50-quickgelu, RN101-quickgelu or "
            "RN50x4-quickgelu"
        )
    for part, needed in ((config, ["embed_dim"]), (vision, ["image_size", "width"]),
                         (text, ["context_length", "vocab_size", "width", "heads", "layers"])):  # fmt: skip
        missing = [key for key in needed if not _is_size(part.get(key))]
        if missing:
            raise UDAError(f"{where}: {missing} must be given as whole numbers, as in open_clip's own model files")
    return {
        "embed_dim": config["embed_dim"],
        "quick_gelu": bool(config.get("quick_gelu", False)),
        "vision_cfg": {key: vision[key] for key in ("image_size", "layers", "width")}
        | {key: vision[key] for key in ("head_width",) if key in vision},
        "text_cfg": {key: text[key] for key in ("context_length", "vocab_size", "width", "heads", "layers")},
    }


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def build_whole(shape: dict[str, Any], vocabulary: int | None = None) -> nn.Module:
    """open_clip's CLIP at random weights, with a smaller vocabulary where one is given."""
    from open_clip.model import CLIP

    text = shape["text_cfg"] | ({"vocab_size": vocabulary} if vocabulary is not None else {})
    return CLIP(shape["embed_dim"], dict(shape["vision_cfg"]), text, shape["quick_gelu"])
