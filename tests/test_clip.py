"""CLIP's shape, weights from every source, the image encoder's maps and the prompts."""

from __future__ import annotations

import copy
import json
import urllib.error
import urllib.request

import pytest
import torch
from torch import nn

from nnunet_uda.errors import UDAError
from nnunet_uda.networks.clip import build_clip, load_clip
from nnunet_uda.networks.clip.image_encoder import ClipImageEncoder, pad, running_statistics_kept
from nnunet_uda.networks.clip.prompts import DualPrompts
from nnunet_uda.networks.clip.shape import build_whole, clip_shape
from nnunet_uda.networks.clip.weights import read_clip_weights

SHAPE = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def whole():
    """open_clip's own model with random weights in every place, the zero ones of a fresh ResNet too."""
    torch.manual_seed(0)
    model = build_whole(SHAPE).eval()
    with torch.no_grad():
        for module in model.visual.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def encoder(whole, channels=1, **options) -> ClipImageEncoder:
    return ClipImageEncoder(copy.deepcopy(whole.visual), channels, **options).eval()


def saved(whole, folder, name="clip.pt"):
    path = folder / name
    state = whole.state_dict()
    if name.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


# -- shape ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "width", "embed_dim"),
    [
        ("RN50-quickgelu", [3, 4, 6, 3], 64, 1024),
        ("RN101-quickgelu", [3, 4, 23, 3], 64, 512),
        ("RN50x4-quickgelu", [4, 6, 10, 6], 80, 640),
    ],
)
def test_named_shapes_are_open_clips(name, layers, width, embed_dim):
    shape = clip_shape(name)
    assert shape["embed_dim"] == embed_dim and shape["quick_gelu"]
    assert shape["vision_cfg"]["layers"] == layers and shape["vision_cfg"]["width"] == width


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        ("RN51", None, "RN51.*RN50-quickgelu"),
        ("ViT-B-32", None, "ResNet.*RN50-quickgelu"),
        ("", {"embed_dim": 4}, "clip_config.*ResNet"),
        ("", {**SHAPE, "text_cfg": {"width": 16}}, "clip_config.*context_length.*vocab_size"),
        ("", {**SHAPE, "embed_dim": "32"}, "embed_dim"),
    ],
)
def test_other_shapes_are_refused(model, config, words):
    with pytest.raises(UDAError, match=words):
        clip_shape(model, config)


# -- weights -------------------------------------------------------------------------------------------------------


def read(weights, **options):
    return read_clip_weights(SHAPE, options.pop("model", None), str(weights), log=lambda text: None, **options)


def same(state, whole) -> bool:
    wanted = whole.state_dict()
    wanted.pop("logit_scale")
    return state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["clip.pt", "clip.safetensors"])
def test_weights_come_from_a_file(whole, tmp_path, monkeypatch, name):
    path = saved(whole, tmp_path, name)
    assert same(read(path), whole)
    monkeypatch.setenv("NNUNET_UDA_CLIP", str(path))
    assert same(read("openai"), whole), "the variable is obeyed in place of a tag"
    assert read("random") is None, "but not where random weights are asked for"
    monkeypatch.setenv("NNUNET_UDA_CLIP", str(tmp_path / "gone.pt"))
    assert same(read(path), whole), "a setting is stronger"
    with pytest.raises(UDAError, match=r"gone\.pt.*NNUNET_UDA_CLIP.*does not exist"):
        read("openai")


def test_training_checkpoints_and_half_precision_are_understood(whole, tmp_path):
    state = {f"module.{key}": value.half() for key, value in whole.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch.pt")
    read_state = read(tmp_path / "epoch.pt")
    assert all(value.dtype == torch.float32 for value in read_state.values())
    torch.testing.assert_close(read_state["text_projection"], whole.text_projection.data, atol=1e-3, rtol=1e-2)


def test_a_folder_of_open_clips_local_form(whole, tmp_path):
    saved(whole, tmp_path, "open_clip_model.safetensors")
    config = tmp_path / "open_clip_config.json"
    assert same(read(tmp_path), whole)
    config.write_text(json.dumps({"model_cfg": SHAPE, "preprocess_cfg": {}}))
    assert same(read(tmp_path), whole)
    config.write_text(json.dumps({"model_cfg": {**SHAPE, "quick_gelu": False}}))
    with pytest.raises(UDAError, match="another CLIP.*quick_gelu"):  # no tensor's shape would tell
        read(tmp_path)
    config.write_text("[]")
    with pytest.raises(UDAError, match=r"open_clip_config\.json"):
        read(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UDAError, match=r"no CLIP weights.*open_clip_model\.safetensors"):
        read(empty)


def test_torchscript_runs_only_when_trusted(whole, tmp_path):
    class Archive(nn.Module):
        def __init__(self, model):
            super().__init__()
            for key, value in model.state_dict().items():
                self._add(key.split("."), value)
            self.register_buffer("input_resolution", torch.tensor(224))

        def _add(self, names, value):
            module = self
            for name in names[:-1]:
                if not hasattr(module, name):
                    module.add_module(name, nn.Module())
                module = getattr(module, name)
            module.register_buffer(names[-1], value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    path = tmp_path / "RN50.pt"
    torch.jit.save(torch.jit.trace(Archive(whole), torch.zeros(1)), path)
    with pytest.raises(UDAError, match="TorchScript.*clip_trust_torchscript=true"):
        read(path)
    with pytest.raises(UDAError, match="SHA-256 afeb0e10"):
        read_clip_weights(SHAPE, "RN50", str(path), log=lambda text: None)
    assert same(read(path, trust_torchscript=True), whole)


def test_other_and_broken_files_are_explained(whole, tmp_path):
    path = saved(whole, tmp_path)
    bigger = {**SHAPE, "embed_dim": 64}
    with pytest.raises(UDAError, match=r"clip\.pt does not hold.*found \(.*32.*expected \(.*64"):
        read_clip_weights(bigger, None, str(path), log=lambda text: None)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(UDAError, match="found nothing"):
        read(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UDAError, match="no state_dict"):
        read(tmp_path / "list.pt")
    for name in ("cut.pt", "cut.safetensors"):
        (tmp_path / name).write_bytes(path.read_bytes()[:1000])
        with pytest.raises(UDAError, match="cannot be read"):
            read(tmp_path / name)
    with pytest.raises(UDAError, match=r"'clip_weights' names.*does not exist"):
        read(tmp_path / "missing.safetensors")


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"a": Harm()}, tmp_path / "bad.pt")
    with pytest.raises(UDAError, match="cannot be read"):
        read(tmp_path / "bad.pt")
    assert not (tmp_path / "harm").exists()


def test_without_a_network_the_error_says_which_file_to_put_where(tmp_path, monkeypatch):
    from huggingface_hub import constants

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.delenv("NNUNET_UDA_CLIP", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(UDAError) as caught:
        read("openai", model="RN50-quickgelu")
    for words in ("huggingface.co/timm/resnet50_clip.openai/resolve/main/open_clip_model.safetensors",
                  "NNUNET_UDA_CLIP=/path/to", "uuds.clip_weights", "RN50.pt", "'random'"):  # fmt: skip
        assert words in str(caught.value)


def test_weights_in_the_hubs_cache_need_no_network(whole, tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder = tmp_path / "models--timm--resnet50_clip.openai"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    saved(whole, folder / "snapshots" / "abc", "open_clip_model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", None)
    assert same(read("openai", model="RN50-quickgelu"), whole)


@pytest.mark.parametrize(
    ("model", "tag", "words"),
    [
        (None, "openai", "no hub has weights.*'random'"),
        ("RN50-quickgelu", "laion2b", "laion2b.*openai"),
        ("RN50", "openai", "RN50-quickgelu"),
    ],
)
def test_tags_that_do_not_exist_or_fit_are_refused(monkeypatch, model, tag, words):
    monkeypatch.delenv("NNUNET_UDA_CLIP", raising=False)
    with pytest.raises(UDAError, match=words):
        read(tag, model=model)


def test_loaded_weights_are_open_clips(whole, tmp_path):
    image_encoder, prompts = build_clip(SHAPE, 1, 2, 4, False)
    prompts.set_prompts("A photo of a source domain", ["spleen", "left kidney"])
    load_clip(image_encoder, prompts, read(saved(whole, tmp_path)))
    for key, value in whole.visual.state_dict().items():
        assert torch.equal(value, image_encoder.visual.state_dict()[key])
    image_encoder.eval()
    images = torch.randn(1, 1, 224, 224)
    expected = whole.encode_image(image_encoder.to_rgb(images))
    torch.testing.assert_close(image_encoder(images).summary, expected)
    assert same_text(prompts()[0], whole, "A photo of a source domain")


def same_text(embedding, whole, text) -> bool:
    from open_clip import tokenize

    return torch.allclose(embedding, whole.encode_text(tokenize([text]))[0], atol=1e-5)


# -- image encoder -------------------------------------------------------------------------------------------------


def test_positions_and_pooling_are_open_clips_at_224():
    image_encoder, _ = build_clip(clip_shape("RN50-quickgelu"), 1, 1, 16, False)
    image_encoder.eval()
    embedding = image_encoder.visual.attnpool.positional_embedding
    assert image_encoder.positions((7, 7)) is embedding and embedding.shape == (50, 2048)
    images = torch.randn(1, 1, 224, 224)
    with torch.no_grad():
        encoded = image_encoder(images)
        assert torch.allclose(encoded.summary, image_encoder.visual(image_encoder.to_rgb(images)), atol=1e-5)
    assert [tuple(level.shape[1:]) for level in encoded.levels] == [
        (64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7),
    ]  # fmt: skip
    assert encoded.tokens.shape == (1, 1024, 7, 7) and encoded.summary.shape == (1, 1024)


def test_positions_are_interpolated_as_a_map(whole):
    image_encoder = encoder(whole)
    row, column = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    with torch.no_grad():
        image_encoder.visual.attnpool.positional_embedding[1:, 0] = row.flatten()
        image_encoder.visual.attnpool.positional_embedding[1:, 1] = column.flatten()
    places = image_encoder.positions((14, 5))
    assert torch.equal(places[0], image_encoder.visual.attnpool.positional_embedding[0])
    grid = places[1:].unflatten(0, (14, 5))
    assert torch.allclose(grid[3:-3, 1:-1, 0], ((torch.arange(14.0) + 0.5) / 2 - 0.5)[3:-3, None], atol=0.06)
    assert (grid[0, 1:, 1] > grid[0, :-1, 1]).all() and (grid[:, 0, 1] - grid[0, 0, 1]).abs().max() < 1e-5


def test_every_token_of_the_pool_attends_as_open_clips_first(whole):
    """With another token in the first place, open_clip's pool gives that token's output."""
    image_encoder = encoder(whole)
    pool = image_encoder.visual.attnpool
    features = torch.randn(2, 256, 7, 7)
    tokens = image_encoder.attention_pool(features)
    torch.testing.assert_close(tokens[:, 0], pool(features))
    expected, _ = nn.functional.multi_head_attention_forward(
        *[(torch.cat([features.flatten(2).mean(2, keepdim=True), features.flatten(2)], 2).permute(2, 0, 1)
           + pool.positional_embedding[:, None])] * 3,
        256, pool.num_heads, None, torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None,
        False, 0.0, pool.c_proj.weight, pool.c_proj.bias, use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
    )  # fmt: skip
    torch.testing.assert_close(tokens, expected.transpose(0, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(96, 96), (50, 100), (20, 20), (224, 31)])
def test_any_size_is_padded(whole, size):
    image_encoder = encoder(whole)
    images = torch.randn(2, 1, *size)
    encoded = image_encoder(images)
    height, width = (max(64, -(-n // 32) * 32) for n in size)
    assert encoded.levels[-1].shape[2:] == (height // 32, width // 32) and encoded.size == size
    padded = pad(images)
    assert padded.shape[2:] == (height, width) and torch.equal(padded[:, :, : size[0], : size[1]], images)
    assert torch.equal(padded[:, :, -1, : size[1]], images[:, :, -1]), "replicated, not zero"


def test_a_z_scored_grey_image_becomes_a_grey_picture(whole):
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    images = torch.randn(2, 1, 8, 8)
    rgb = encoder(whole).to_rgb(images) * std + mean
    grey = images * std.mean() + mean.mean()
    torch.testing.assert_close(rgb, grey.expand(-1, 3, -1, -1), atol=1e-5, rtol=1e-5)
    one, several = encoder(whole), encoder(whole, channels=3)
    assert not any(p.requires_grad for p in one.to_rgb.parameters()), "as CLIP wants it"
    assert all(p.requires_grad for p in several.to_rgb.parameters()), "learned"
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(several(images).summary, one(images.mean(1, keepdim=True)).summary)


def test_batch_statistics_are_trained_frozen_or_kept(whole):
    images = torch.randn(4, 1, 64, 64)
    for frozen in (False, True):
        image_encoder = encoder(whole, frozen_statistics=frozen).train()
        before = image_encoder.visual.bn1.running_mean.clone()
        with running_statistics_kept(image_encoder):
            kept = image_encoder(images).summary
        assert torch.equal(before, image_encoder.visual.bn1.running_mean)
        trained = image_encoder(images).summary
        torch.testing.assert_close(kept, trained)
        assert torch.equal(before, image_encoder.visual.bn1.running_mean) == frozen
        image_encoder.eval()
        assert torch.allclose(image_encoder(images).summary, trained, atol=1e-6) == frozen
        assert image_encoder.visual.bn1.weight.requires_grad and image_encoder.visual.bn1.momentum == 0.1


def test_part_takes_the_same_images_of_everything(whole):
    encoded = encoder(whole)(torch.randn(3, 1, 64, 64))
    part = encoded.part(slice(1, None))
    assert torch.equal(part.summary, encoded.summary[1:]) and torch.equal(part.tokens, encoded.tokens[1:])
    assert all(torch.equal(a, b[1:]) for a, b in zip(part.levels, encoded.levels, strict=True))
    assert encoder(whole)(torch.randn(1, 1, 64, 64), pool=False).part(slice(1)).tokens is None


# -- prompts -------------------------------------------------------------------------------------------------------

NAMES = ["spleen", "left_kidney", "vestibular schwannoma"]


@pytest.fixture
def prompts(whole):
    built = DualPrompts(build_whole(SHAPE, DualPrompts.rows(3, 77)), 3, context_vectors=5)
    built.set_prompts("A photo of a source domain", NAMES)
    text = {key: value for key, value in whole.state_dict().items() if not key.startswith(("visual", "logit"))}
    built.load_tokens(text.pop("token_embedding.weight"))
    built.load_state_dict(text, strict=False)
    return built


def test_the_context_lies_between_the_start_and_the_name(prompts, whole):
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    embedded = prompts.embedded()
    table = whole.token_embedding.weight
    longest = max(len(tokenizer.encode(f"{name}.".replace("_", " "))) for name in NAMES)
    assert embedded.shape[1] == 1 + 5 + longest + 1, "cut after the longest prompt's end"
    for index, name in enumerate(NAMES, start=1):
        words = tokenizer.encode(name.replace("_", " ") + ".")
        assert torch.equal(embedded[index, 0], table[tokenizer.sot_token_id])
        assert torch.equal(embedded[index, 1:6], prompts.context)
        assert torch.equal(embedded[index, 6 : 6 + len(words)], table[words])
        assert torch.equal(embedded[index, 6 + len(words)], table[tokenizer.eot_token_id])
        assert prompts.ends[index] == 6 + len(words)
    domain = tokenizer.encode("A photo of a source domain")
    assert torch.equal(embedded[0, 1 : 1 + len(domain)], table[domain]) and prompts.ends[0] == 1 + len(domain)
    assert len(set(prompts.ends.tolist())) > 2, "names of several tokens end elsewhere"


def test_embeddings_are_open_clips_for_ordinary_words(prompts, whole):
    from open_clip.tokenizer import SimpleTokenizer

    with torch.no_grad():
        x = SimpleTokenizer().encode("X")
        prompts.context.copy_(whole.token_embedding.weight[x].expand(5, -1))
    domain, classes = prompts()
    assert same_text(domain, whole, "A photo of a source domain")
    for embedding, name in zip(classes, NAMES, strict=True):
        assert same_text(embedding, whole, f"X X X X X {name.replace('_', ' ')}.")
        assert not same_text(embedding, whole, f"X X X X {name.replace('_', ' ')}.")
    assert not torch.allclose(classes[0], classes[1])


def test_gradients_reach_the_context_and_the_words_in_use(prompts):
    domain, classes = prompts()
    (domain.sum() + classes.square().sum()).backward()
    assert (prompts.context.grad.abs().sum(1) > 0).all()
    used = int((prompts.vocabulary >= 0).sum())
    trained = prompts.token_embedding.weight.grad.abs().sum(1) > 0
    places = set(prompts.tokens[:, : int(prompts.ends.max()) + 1].flatten().tolist())
    assert trained.sum() >= used - 2 and set(trained.nonzero()[:, 0].tolist()) <= places


def test_prompts_travel_with_the_weights(prompts):
    other = DualPrompts(build_whole(SHAPE, DualPrompts.rows(3, 77)), 3, context_vectors=5)
    other.load_state_dict(prompts.state_dict())
    for ours, theirs in zip(prompts(), other(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_prompt_that_is_too_long_is_refused(prompts):
    with pytest.raises(UDAError, match="tokens, CLIP's text encoder takes 77"):
        prompts.set_prompts("A photo", ["a", "b", "very " * 80])
