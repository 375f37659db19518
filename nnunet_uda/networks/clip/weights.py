"""CLIP's weights: from a file, a folder or the hub, checked against the shape."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_uda.errors import UDAError
from nnunet_uda.networks.clip.shape import build_whole, clip_shape

VARIABLE = "NNUNET_UDA_CLIP"
"""Environment variable: file or folder of CLIP's weights, for every training that names no file itself."""

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors",
                "open_clip_pytorch_model.bin", "pytorch_model.bin")  # fmt: skip
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def read_clip_weights(
    shape: dict[str, Any],
    model: str | None,
    weights: str,
    trust_torchscript: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Tensor] | None:
    """The weights of a CLIP of this ``shape`` under open_clip's names, float32; None where random ones are asked for.

    Args:
        shape: see ``clip_shape``.
        model: open_clip's name, which the hub knows; None for a shape of one's own.
        weights: a file (``state_dict`` or safetensors), a folder of open_clip's local-dir form, a tag of open_clip's
            hub such as ``openai``, or ``random``. In place of a tag, the variable ``NNUNET_UDA_CLIP`` is obeyed.
        trust_torchscript: run OpenAI's original archive, which is a program, to get its weights.

    Raises:
        UDAError: nothing there, not readable, not trusted, or weights of another CLIP.
    """
    if weights == "random":
        log("CLIP starts from RANDOM weights, as 'clip_weights' asks")
        return None
    path = _find(model, weights)
    state = _read(_weight_file(path, shape), trust_torchscript, model)
    with torch.device("meta"):
        wanted = {key: value.shape for key, value in build_whole(shape).state_dict().items()}
    wanted.pop("logit_scale")
    wrong = [key for key, size in wanted.items() if key not in state or state[key].shape != size]
    if wrong:
        found = tuple(state[wrong[0]].shape) if wrong[0] in state else "nothing"
        raise UDAError(
            f"{path} does not hold the weights of {model or 'the CLIP of clip_config'}: {len(wrong)} of {len(wanted)} "
            f"tensors differ, first {wrong[0]!r}, found {found}, expected {tuple(wanted[wrong[0]])}. Give the weights "
            "of this model, or the right 'clip_model'"
        )
    log(f"CLIP starts from {path}")
    return {key: state[key].float() for key in wanted}


def _find(model: str | None, weights: str) -> Path:
    if os.sep in weights or weights.endswith(_SUFFIXES) or Path(weights).exists():
        path, source = Path(weights).expanduser(), "'clip_weights'"
    elif os.environ.get(VARIABLE):
        path, source = Path(os.environ[VARIABLE]).expanduser(), f"the environment variable {VARIABLE}"
    else:
        return _from_hub(model, weights)
    if not path.exists():
        raise UDAError(f"{path}, which {source} names as CLIP's weights, does not exist")
    return path


def _from_hub(model: str | None, tag: str) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache
    from open_clip import pretrained

    if model is None:
        raise UDAError(
            f"'clip_weights' is {tag!r}, but no hub has weights for the shape in 'clip_config': give a file, or "
            "'random' to start from random weights"
        )
    entry = pretrained.get_pretrained_cfg(model, tag)
    if not entry:
        tags = pretrained.list_pretrained_tags_by_model(model)
        raise UDAError(
            f"'clip_weights' is {tag!r}: no such file, and open_clip has no such weights for {model}. It has "
            f"{', '.join(tags) or 'none (names that end in -quickgelu have them)'}; or give a file, or 'random'"
        )
    if entry.get("quick_gelu", False) and not model.endswith("-quickgelu"):
        raise UDAError(f"the weights {tag!r} are of {model}-quickgelu: set 'clip_model' to that")
    repository = entry.get("hf_hub", "").rstrip("/")  # older versions of open_clip know OpenAI's address alone
    for name in WEIGHT_FILES if repository else ():
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    try:
        _reach(f"{constants.ENDPOINT}/{repository}" if repository else entry["url"])
        return Path(pretrained.download_pretrained(entry))
    except Exception as error:  # whatever the hub's client makes of a missing network
        raise UDAError(
            f"the weights {tag!r} of {model} are neither in the hub's cache nor to be had over the network ({error}). "
            f"On a machine with a network get https://huggingface.co/{repository}/resolve/main/{WEIGHT_FILES[0]} , "
            f"copy it here and set {VARIABLE}=/path/to/{WEIGHT_FILES[0]} (or the setting uuds.clip_weights). OpenAI's "
            f"own archive, {entry.get('url')} , serves too, with uuds.clip_trust_torchscript=true. Random weights are "
            "used only where uuds.clip_weights is 'random'"
        ) from error


def _reach(address: str) -> None:
    """Raise at once where there is no network: the hub's client would try for a minute."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10):
            return
    except urllib.error.HTTPError:
        return  # something answered; the client knows better what to make of it


def _weight_file(path: Path, shape: dict[str, Any]) -> Path:
    if path.is_file():
        return path
    found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    if not found:
        raise UDAError(f"{path} holds no CLIP weights: expected one of {', '.join(WEIGHT_FILES)} in it")
    config = path / "open_clip_config.json"
    if config.is_file():
        try:
            described = clip_shape("", json.loads(config.read_text(encoding="utf-8"))["model_cfg"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UDAError(f"{config} is not a description of a CLIP as open_clip writes it: {error!r}") from error
        differing = [key for key in shape if described[key] != shape[key]]
        if differing:
            raise UDAError(
                f"{config} describes another CLIP than the settings: {differing[0]!r} is {described[differing[0]]} "
                f"there and {shape[differing[0]]} here. Set 'clip_model' or 'clip_config' to match"
            )
    return found[0]


def _read(path: Path, trust_torchscript: bool, model: str | None) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if _is_torchscript(path):
            if not trust_torchscript:
                raise UDAError(_untrusted(path, model))
            state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UDAError:
        raise
    except Exception as error:  # a cut or foreign file raises whatever its bytes make of it
        raise UDAError(
            f"{path} cannot be read as CLIP's weights: {error}. Expected safetensors, or a state_dict saved by torch"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UDAError(f"{path} holds no state_dict: expected a dictionary of tensors, or one under 'state_dict'")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _untrusted(path: Path, model: str | None) -> str:
    from open_clip import pretrained

    url = pretrained.get_pretrained_url(model or "", "openai")
    hint = f" (OpenAI's has the SHA-256 {url.split('/')[-2]})" if "openaipublic" in url else ""
    return (
        f"{path} is a TorchScript archive: reading it runs code. If you trust it{hint}, set "
        "uuds.clip_trust_torchscript=true, or convert it once: "
        f"torch.save(torch.jit.load('{path}', map_location='cpu').state_dict(), 'clip_state_dict.pt')"
    )
