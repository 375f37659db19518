"""CLIP with a ResNet image encoder (Radford et al. 2021), by open_clip: its shape, its weights, and both encoders."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_uda.errors import UDAError, shown

VARIABLE = "NNUNET_UDA_CLIP"
"""Environment variable: file or folder of CLIP's weights, for every training that names no file itself."""

MULTIPLE, LEAST = 32, 64
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors",
                "open_clip_pytorch_model.bin", "pytorch_model.bin")  # fmt: skip
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


# -- shape ---------------------------------------------------------------------------------------------------------


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


# -- weights -------------------------------------------------------------------------------------------------------


def read_clip_weights(
    shape: dict[str, Any],
    model: str | None,
    weights: str,
    trust_torchscript: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Tensor] | None:
    """The weights of a CLIP of this ``shape`` under open_clip's names, float32; None where random ones are asked for.

    Args:
        shape: see :func:`clip_shape`.
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
        wanted = {key: value.shape for key, value in _build(shape).state_dict().items()}
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
            described = clip_shape("", json.loads(config.read_text())["model_cfg"])
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


def _build(shape: dict[str, Any], vocabulary: int | None = None) -> nn.Module:
    """open_clip's CLIP at random weights, with a smaller vocabulary where one is given."""
    from open_clip.model import CLIP

    text = shape["text_cfg"] | ({"vocab_size": vocabulary} if vocabulary is not None else {})
    return CLIP(shape["embed_dim"], dict(shape["vision_cfg"]), text, shape["quick_gelu"])


# -- image encoder -------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What the image encoder makes of images whose padded size is (H, W).

    Attributes:
        levels: maps of the stem (H/4), layer1 (H/4), layer2 (H/8), layer3 (H/16) and layer4 (H/32), each
            ``[B, channels[i], h, w]``; the last is X_c.
        tokens: ``[B, E, H/32, W/32]``, X_d: the attention pool's spatial tokens; None where not asked for.
        summary: ``[B, E]``, x_g: its token 0; None likewise.
        size: (H, W) of the images before padding.
    """

    levels: list[Tensor]
    tokens: Tensor | None
    summary: Tensor | None
    size: tuple[int, int]

    def part(self, which: slice) -> Encoded:
        """Some of the batch's images."""
        tokens, summary = (None if item is None else item[which] for item in (self.tokens, self.summary))
        return Encoded([level[which] for level in self.levels], tokens, summary, self.size)


class ClipImageEncoder(nn.Module):
    """CLIP's ModifiedResNet with all its maps, for images of any size and number of channels.

    Images are padded at the end of each axis (replicate) to a multiple of 32, at least 64. The attention pool's
    position embedding is interpolated bicubically from its own grid (7 x 7 in RN50); at that grid it is unchanged.

    CLIP wants three channels, (rgb - mean) / std. A z-scored grey image is taken for a grey picture with CLIP's mean
    and standard deviation: repeated to r = g = b, then normalised. Several channels go through a learned 1 x 1 map
    that starts at their mean as that grey picture.

    Args:
        visual: open_clip's ModifiedResNet.
        in_channels: image channels.
        frozen_statistics: batch norm always uses its running statistics (its weights are trained all the same).
    """

    def __init__(self, visual: nn.Module, in_channels: int, frozen_statistics: bool = False) -> None:
        super().__init__()
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        self.visual = visual
        self.frozen_statistics = frozen_statistics
        self.to_rgb = nn.Conv2d(in_channels, 3, 1)
        mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
        with torch.no_grad():
            self.to_rgb.weight.copy_((std.mean() / std / in_channels)[:, None, None, None])
            self.to_rgb.bias.copy_((mean.mean() - mean) / std)
        self.to_rgb.requires_grad_(in_channels > 1)
        width = visual.conv3.out_channels
        self.channels = [width, width * 4, width * 8, width * 16, width * 32]
        self.embed_dim = visual.attnpool.c_proj.out_features

    def train(self, mode: bool = True) -> ClipImageEncoder:
        super().train(mode)
        if self.frozen_statistics:
            for module in self.visual.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor, pool: bool = True) -> Encoded:
        """Encode ``[B, C, H, W]`` z-scored images; without ``pool`` X_d and x_g are not computed."""
        levels = self.find_levels(images)
        size = (images.shape[2], images.shape[3])
        if not pool:
            return Encoded(levels, None, None, size)
        tokens = self.attention_pool(levels[-1])
        height, width = levels[-1].shape[2:]
        return Encoded(levels, tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width)), tokens[:, 0], size)

    def find_levels(self, images: Tensor) -> list[Tensor]:
        """The maps of the stem and of the four layers, fine to coarse."""
        levels = [self.visual.stem(self.to_rgb(pad(images)))]
        for layer in (self.visual.layer1, self.visual.layer2, self.visual.layer3, self.visual.layer4):
            levels.append(layer(levels[-1]))
        return levels

    def attention_pool(self, features: Tensor) -> Tensor:
        """All output tokens of CLIP's attention pool, the pooled one first: ``[B, C, h, w]`` to ``[B, 1 + hw, E]``."""
        pool = self.visual.attnpool
        tokens = features.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positions(features.shape[2:])
        heads = (pool.num_heads, -1)
        query, key, value = (
            projection(tokens).unflatten(2, heads).transpose(1, 2)
            for projection in (pool.q_proj, pool.k_proj, pool.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return pool.c_proj(attended.transpose(1, 2).flatten(2))

    def positions(self, size: Sequence[int]) -> Tensor:
        """The position embedding for an ``h x w`` map, ``[1 + hw, C]``, the pooled token's first."""
        embedding = self.visual.attnpool.positional_embedding
        side = round((embedding.shape[0] - 1) ** 0.5)
        if tuple(size) == (side, side):
            return embedding
        grid = embedding[1:].T.reshape(1, -1, side, side).float()
        grid = F.interpolate(grid, tuple(size), mode="bicubic", align_corners=False)
        return torch.cat([embedding[:1], grid[0].flatten(1).T.to(embedding.dtype)])


def pad(images: Tensor) -> Tensor:
    """Pad the end of both axes (replicate) to a multiple of 32, at least 64."""
    extra = [max(LEAST, -(-size // MULTIPLE) * MULTIPLE) - size for size in images.shape[2:]]
    return F.pad(images, (0, extra[1], 0, extra[0]), mode="replicate") if any(extra) else images


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norm inside uses the batch's statistics in training as ever, but leaves the running ones alone."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


# -- prompts -------------------------------------------------------------------------------------------------------


class DualPrompts(nn.Module):
    """The domain prompt and the segmentation prompts, through CLIP's text transformer (sections 3.1.1 and 3.1.2).

    The domain prompt is a sentence. A segmentation prompt is M learnable vectors, shared by all classes, and the class
    name (CoOp, Zhou et al. 2022): ``<start> v_1 .. v_M name . <end>``. Both end at the output of their own end token
    under the causal mask, projected into the space CLIP shares with images.

    Only the rows of the token embedding that the prompts use are kept (and trained): no other can receive a gradient.
    ``tokens`` point into these rows, ``vocabulary`` says which of CLIP's tokens they are; both are filled by
    :meth:`set_prompts` and travel with the weights. The tokens after the longest prompt's end are cut: nothing before
    them can see them.

    Args:
        clip: open_clip's CLIP, built with as many tokens as :meth:`rows` says.
        num_classes: foreground classes.
        context_vectors: M.
    """

    def __init__(self, clip: nn.Module, num_classes: int, context_vectors: int = 16) -> None:
        super().__init__()
        self.transformer = clip.transformer
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.register_buffer("mask", clip.attn_mask, persistent=False)
        length, width = self.positional_embedding.shape
        self.context = nn.Parameter(torch.empty(context_vectors, width))
        nn.init.normal_(self.context, std=0.02)
        self.register_buffer("tokens", torch.zeros(1 + num_classes, length, dtype=torch.long))
        self.register_buffer("ends", torch.zeros(1 + num_classes, dtype=torch.long))
        self.register_buffer("vocabulary", torch.full((self.rows(num_classes, length),), -1, dtype=torch.long))

    @staticmethod
    def rows(num_classes: int, context_length: int) -> int:
        """Token embeddings kept: as many as the prompts can use at most."""
        return (1 + num_classes) * context_length

    def set_prompts(self, domain_prompt: str, class_names: Sequence[str]) -> None:
        """Tokenise the prompts.

        Raises:
            UDAError: a prompt has more tokens than CLIP's text encoder takes.
        """
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer, length = SimpleTokenizer(), self.tokens.shape[1]
        context = " ".join(["X"] * len(self.context))  # the places that the learnable vectors take
        rows = []
        for text in (domain_prompt, *(f"{context} {name.replace('_', ' ')}." for name in class_names)):
            row = [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]
            if len(row) > length:
                raise UDAError(f"the prompt {text!r} has {len(row)} tokens, CLIP's text encoder takes {length}")
            rows.append(row)
        used = sorted({token for row in rows for token in row})
        self.vocabulary.fill_(-1)[: len(used)] = torch.tensor(used)
        self.tokens.zero_()
        for index, row in enumerate(rows):
            self.tokens[index, : len(row)] = torch.tensor([used.index(token) for token in row])
            self.ends[index] = len(row) - 1

    @torch.no_grad()
    def load_tokens(self, embedding: Tensor) -> None:
        """Take the rows in use from CLIP's whole token embedding, ``[49408, width]``."""
        used = self.vocabulary[self.vocabulary >= 0].to(embedding.device)
        self.token_embedding.weight[: len(used)] = embedding[used].to(self.token_embedding.weight)

    def embedded(self) -> Tensor:
        """The input of the transformer without positions, ``[1 + K, L, width]``, L the longest prompt's length."""
        length = int(self.ends.max()) + 1
        embedded = self.token_embedding(self.tokens[:, :length])
        classes, end = self.tokens.shape[0] - 1, 1 + len(self.context)
        prompts = torch.cat([embedded[1:, :1], self.context.expand(classes, -1, -1), embedded[1:, end:]], 1)
        return torch.cat([embedded[:1], prompts])

    def forward(self) -> tuple[Tensor, Tensor]:
        """T^d, ``[E]``, and T^s of every class, ``[K, E]``; float32 also under autocast, not normalised."""
        hidden = self.embedded()
        length = hidden.shape[1]
        hidden = hidden + self.positional_embedding[:length]
        hidden = self.ln_final(self.transformer(hidden, attn_mask=self.mask[:length, :length]))
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), self.ends]
        out = (pooled @ self.text_projection).float()
        return out[0], out[1:]


def build_clip(
    shape: dict[str, Any], in_channels: int, num_classes: int, context_vectors: int, frozen_statistics: bool
) -> tuple[ClipImageEncoder, DualPrompts]:
    """Both encoders at random weights."""
    clip = _build(shape, DualPrompts.rows(num_classes, shape["text_cfg"]["context_length"]))
    encoder = ClipImageEncoder(clip.visual, in_channels, frozen_statistics)
    return encoder, DualPrompts(clip, num_classes, context_vectors)


@torch.no_grad()
def load_clip(encoder: ClipImageEncoder, prompts: DualPrompts, state: dict[str, Tensor]) -> None:
    """Put what :func:`read_clip_weights` returned into both encoders; the prompts must be set before."""
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    encoder.visual.load_state_dict(visual)
    text = {key: value for key, value in state.items() if not key.startswith("visual.")}
    prompts.load_tokens(text.pop("token_embedding.weight"))
    own = {"context", "tokens", "ends", "vocabulary", "token_embedding.weight"}
    missing, unexpected = prompts.load_state_dict(text, strict=False)
    if set(missing) != own or unexpected:
        raise UDAError(f"CLIP's text encoder does not fit: missing {missing}, not expected {unexpected}")
