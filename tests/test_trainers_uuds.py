"""The step of UUDS, its ablations, what its checkpoints hold, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from conftest import batch, make_trainer, same_weights, weights, written_model
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from support.tiny import CLIP, write_plans
from torch import nn

from nnunet_uda.commands import configure
from nnunet_uda.data.mixed_slices import is_mixed
from nnunet_uda.errors import UDAError
from nnunet_uda.losses.domain_discrepancy import domain_discrepancy_loss
from nnunet_uda.losses.supervised_contrastive import supervised_contrastive_loss
from nnunet_uda.losses.uncertainty import uncertain_segmentation_loss

TERMS = {"domain", "domain_translated", "contrastive", "segmentation", "uncertain_segmentation", "identity"}


@pytest.fixture
def workspace(in_workspace):
    """Plans of a batch of 4 beside ``tiny``, with a CLIP that trains in seconds."""
    write_plans(in_workspace, "uuds")
    return in_workspace


def started(name="UUDSTrainer", **options):
    trainer = make_trainer(name, "uuds", **options)
    Path(trainer.output_folder_base, "plans.json").unlink(missing_ok=True)  # of a trainer with other settings
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def train(name="UUDSTrainer", pictures=False, bound=0.2, **options):
    trainer = make_trainer(name, "uuds", **options)
    trainer.structure_bound = bound
    if not pictures:
        trainer.draw_pictures = lambda path: None  # seconds an epoch
    trainer.run_training()
    return trainer


def parameters(trainer):
    modules = {"network": trainer.plain_network, "other": trainer.networks}
    return {f"{m}.{n}": p.detach().clone() for m, module in modules.items() for n, p in module.named_parameters()}


# -- a step --------------------------------------------------------------------------------------------------------


def test_two_steps_change_everything_clip_included(workspace):
    trainer = started(uuds__weight_decay=0.0)
    before = parameters(trainer)
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert set(losses) == TERMS | {"loss", "structure"}
    trainer.train_step(next(trainer.dataloader_train))  # a fresh ResNet's blocks let nothing through in the first
    after = parameters(trainer)
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert still == {
        "network.encoder.to_rgb.weight", "network.encoder.to_rgb.bias",  # one channel: as CLIP wants it
        "network.seg_layers.1.weight", "network.seg_layers.1.bias",  # nnU-Net's coarsest output has weight 0
    }  # fmt: skip
    assert all(p.requires_grad for p in trainer.networks.parameters())


def terms_of(trainer, monkeypatch, data) -> dict[str, torch.Tensor]:
    """The terms of one step, which is not made."""
    seen = {}
    monkeypatch.setattr(trainer, "update", lambda name, terms, max_norm=None: seen.update(terms))
    trainer.train_on(*data)
    return {name: value.item() for name, value in seen.items()}


def test_every_loss_has_its_weight(workspace, monkeypatch):
    trainer = started()
    data = batch(trainer)
    plain = terms_of(trainer, monkeypatch, data)
    assert set(plain) == TERMS and all(value > 0 for value in plain.values())
    weighted = {"domain": 3.0, "contrastive": 5.0, "segmentation": 7.0, "identity": 11.0}
    trainer.own_settings = dataclasses.replace(
        trainer.own_settings, **{f"{name}_weight": value for name, value in weighted.items()}
    )
    factors = weighted | {"domain_translated": 3.0, "uncertain_segmentation": 7.0}
    for name, value in terms_of(trainer, monkeypatch, data).items():
        assert value == pytest.approx(factors[name] * plain[name], rel=1e-3), name


def test_the_terms_are_the_equations(workspace, monkeypatch):
    trainer = started(uuds__clip_batch_statistics="frozen", deep_supervision=False)
    source, label, target = data = batch(trainer)
    terms = terms_of(trainer, monkeypatch, data)
    network = trainer.plain_network
    domain, classes = network.prompts()
    of_source, of_target = (network.encode(x) for x in (source, target))
    reconstructed, translated = (network.generate(x, domain) for x in (of_source, of_target))
    again = network.encode(translated.image)
    predicted = network.segment(of_source, reconstructed, classes)
    logits = network.segment(of_target, translated, classes).logits
    expected = {
        "domain": domain_discrepancy_loss(of_source.summary, of_target.summary, domain),
        "domain_translated": domain_discrepancy_loss(again.summary, of_target.summary, domain),
        "contrastive": trainer.contrastive_loss(predicted.pooled, label),
        "segmentation": trainer.loss(predicted.logits, label),
        "uncertain_segmentation": uncertain_segmentation_loss(logits, 1.0),
        "identity": (reconstructed.image - source).abs().mean(),
    }
    for name, value in expected.items():
        assert terms[name] == pytest.approx(value.item(), rel=1e-3), name


def test_the_contrast_is_the_mean_over_classes(workspace):
    trainer = started()
    pooled = torch.randn(4, 2, trainer.plain_network.channels)
    label = torch.zeros(4, 1, 32, 32)
    label[0, 0, 3, 3] = label[1, 0, 5:9] = 1
    label[1, 0, 20:30] = label[3, 0, 0, 0] = 2
    expected = [
        supervised_contrastive_loss(trainer.networks["contrastive_head"].mlp(pooled[:, k]), torch.tensor(holds).bool())
        for k, holds in ((0, [1, 1, 0, 0]), (1, [0, 1, 0, 1]))
    ]
    loss = trainer.contrastive_loss(pooled, label)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_the_text_encoder_runs_once_a_step_and_never_at_prediction(workspace, monkeypatch):
    trainer = started()
    calls = []
    original = trainer.plain_network.prompts.transformer.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer.plain_network.prompts.transformer, "forward", counted)
    trainer.train_step(next(trainer.dataloader_train))
    assert len(calls) == 1
    trainer.network.eval()
    with torch.no_grad():
        trainer.network(torch.zeros(1, 1, 32, 32))
    assert len(calls) == 1


def test_nothing_is_encoded_or_decoded_more_often_than_needed(workspace, monkeypatch):
    encoded, segmented = [], []

    def watch(trainer):
        network = trainer.plain_network
        encode, segment = network.encode, network.segment
        monkeypatch.setattr(network, "encode", lambda x, *a, **k: (encoded.append(len(x)), encode(x, *a, **k))[1])
        monkeypatch.setattr(network, "segment", lambda e, *a: (segmented.append(len(e.levels[0])), segment(e, *a))[1])
        trainer.train_step(next(trainer.dataloader_train))
        result = encoded.copy(), segmented.copy()
        encoded.clear()
        segmented.clear()
        return result

    assert watch(started()) == ([8, 4], [4, 4]), "source and target at once, the translation, both segmentations"
    assert watch(started(uuds__warmup_epochs=1)) == ([8, 4], [4]), "no target segmentation during the warm-up"
    assert watch(started("UUDSNoDomainPromptTrainer")) == ([8], [4, 4]), "no second encoding without L_DD"
    assert watch(started(uuds__domain_weight=0, uuds__content_weight=1)) == ([8, 4], [4, 4])


def test_running_statistics_come_from_real_images_alone(workspace):
    """Prediction encodes real images only, so the second encoding must leave the running statistics alone."""
    trainer = started()
    source, label, target = batch(trainer)
    norm = trainer.plain_network.encoder.visual.bn1
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    trainer.train_on(source, label, target)
    assert [len(x) for x in seen] == [8, 4]
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[0].mean((0, 2, 3)))
    frozen = started(uuds__clip_batch_statistics="frozen").plain_network.encoder.visual
    assert not frozen.bn1.training and frozen.bn1.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("UUDSNoDomainPromptTrainer", {"domain", "domain_translated"}),
        ("UUDSNoSegmentationPromptTrainer", {"contrastive"}),
        ("UUDSNoUncertaintyTrainer", {"uncertain_segmentation"}),
    ],
)
def test_table_3(workspace, name, missing):
    trainer = started(name, uuds__weight_decay=0.0)
    before = parameters(trainer)
    for _ in range(2):
        losses = trainer.train_step(next(trainer.dataloader_train))
    assert TERMS - set(losses) == missing
    after = parameters(trainer)
    parts = ("domain_attention.query.weight", "segmentation_attention.query.weight", "prompts.context")
    assert {part for part in parts if torch.equal(before[f"network.{part}"], after[f"network.{part}"])} == {
        "UUDSNoDomainPromptTrainer": {"domain_attention.query.weight"},
        "UUDSNoSegmentationPromptTrainer": {"segmentation_attention.query.weight", "prompts.context"},
        "UUDSNoUncertaintyTrainer": set(),
    }[name]
    rebuilt = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    assert rebuilt.domain_prompt == trainer.plain_network.domain_prompt == ("Domain" not in name)
    assert rebuilt.segmentation_prompt == trainer.plain_network.segmentation_prompt == ("Segmentation" not in name)


def test_the_adversarial_variant_has_defaults_of_its_own_and_takes_the_users_settings(workspace):
    trainer = started("UUDSAdversarialTrainer", uuds__identity_weight=3.0)
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert set(losses) == TERMS | {"domain_judge", "content", "loss", "structure"}
    assert (trainer.own_settings.domain_weight, trainer.own_settings.identity_weight) == (0.3, 3.0)
    rebuilt = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    rebuilt.load_state_dict(trainer.plain_network.state_dict())
    assert len(rebuilt.skips) == 3 and len(started().plain_network.skips) == 0


def test_target_labels_come_after_the_warm_up_and_never_with_chi_0(workspace):
    def term(**options):
        trainer = started(**options)
        return trainer.train_step(next(trainer.dataloader_train))["uncertain_segmentation"]

    assert term() > 0
    assert term(uuds__warmup_epochs=1) == 0
    assert term(uuds__threshold=0.0) == 0


@pytest.mark.parametrize(
    ("judge", "term", "passes", "reached"),
    [
        ("trained", "domain_translated", [False, True], {"judge", "prompt", "generator"}),
        ("fixed", "domain_translated", [False, True], {"generator", "prompt"}),  # T^d steers the generator's DAM
        ("adversarial", "domain_translated", [False, True, False], {"generator", "prompt"}),
        ("adversarial", "domain_judge", [False, True, False], {"judge", "prompt"}),
    ],
)
def test_whom_the_judge_of_translations_teaches(workspace, monkeypatch, judge, term, passes, reached):
    trainer = started(uuds__translation_judge=judge)
    network = trainer.plain_network
    terms, encode, seen = {}, network.encode, []
    monkeypatch.setattr(trainer, "update", lambda name, new, max_norm=None: terms.update(new))

    def cut(images, **options):
        seen.append(images.requires_grad)
        encoded = encode(images, **options)
        if options:
            return encoded
        return encoded._replace(levels=[x.detach() for x in encoded.levels], tokens=encoded.tokens.detach())

    monkeypatch.setattr(network, "encode", cut)
    trainer.train_on(*batch(trainer))
    assert seen == passes
    network.zero_grad()
    terms[term].backward()
    parts = {"judge": network.encoder.visual.conv1.weight, "prompt": network.prompts.text_projection,
             "generator": network.image_head.weight}  # fmt: skip
    assert {name for name, p in parts.items() if p.grad is not None and p.grad.abs().sum() > 0} == reached
    assert all(p.requires_grad for p in network.encoder.visual.parameters())


def test_an_adversarial_judge_compares_reconstructions_with_translations_and_both_sides_pull_apart(
    workspace, monkeypatch
):
    trainer = started(uuds__translation_judge="adversarial")
    pairs = []

    def watched(near, far, prompt):
        pairs.append((near, far))
        return (near - far).sum()

    monkeypatch.setattr(trainer, "domain_loss", watched)
    source, label, target = batch(trainer)
    network = trainer.plain_network
    with torch.no_grad():
        domain, _ = network.prompts()
        made = network.generate(network.encode(torch.cat([source, target]), keep_statistics=True), domain).image
        looked_at = network.encode(made, keep_statistics=True).summary
    trainer.train_on(source, label, target)
    reconstructed, translated = looked_at.split(len(source))
    learnt, deceived = pairs[1:]
    for found, expected in ((learnt[0], reconstructed), (learnt[1], translated)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(deceived[0], learnt[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(deceived[1], learnt[0], rtol=1e-4, atol=1e-6)
    assert deceived[0].requires_grad
    assert not deceived[1].requires_grad, "reconstructed source images are not to look like translations"


@pytest.mark.parametrize(
    "setting",
    [
        {"domain_loss": "printed"},
        {"uncertainty": "printed", "threshold": 0.3},
        {"generator_skips": "normalised"},
        {"optimizer": "adamw"},
    ],
)
def test_printed_forms_and_other_choices_are_settings(workspace, setting):
    plain, other = (started(**options) for options in ({}, {f"uuds__{name}": value for name, value in setting.items()}))
    source, label, target = batch(plain)
    for trainer in (plain, other):
        torch.manual_seed(0)
        for module in (trainer.plain_network, trainer.networks):
            for p in module.parameters():
                nn.init.normal_(p, std=0.1)
        for _ in range(2):
            trainer.train_on(source, label, target)
    ours, theirs = (torch.cat([value.flatten() for value in parameters(t).values()]) for t in (plain, other))
    assert ours.shape != theirs.shape or not torch.equal(ours, theirs)
    assert torch.isfinite(theirs).all()


def test_the_content_constraint_is_off_by_default_and_compares_the_same_slices(workspace, monkeypatch):
    assert "patch_projector" not in started().networks
    trainer = started(uuds__content_weight=2.0)
    seen = []
    original = trainer.patch_contrastive

    class Spy(nn.Module):
        def forward(self, queries, keys):
            seen.append((queries, keys))
            return original(queries, keys)

    trainer.patch_contrastive = Spy()
    before = parameters(trainer)
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert losses["content"] > 0
    assert len(seen) == 5 and all(q.shape == k.shape and q.shape[0] == 4 for q, k in seen)
    after = parameters(trainer)
    projector = [name for name in before if name.startswith("other.patch_projector")]
    assert len(projector) == 20 and not any(torch.equal(before[name], after[name]) for name in projector)
    target = torch.randn(4, 1, 32, 32)
    network = trainer.plain_network.eval()
    encoded = network.encode(target)
    network.encoder.visual.train(False)
    same = trainer.content_loss(target, encoded, target, encoded)
    other = trainer.content_loss(target, encoded, target.roll(1, 0), network.encode(target.roll(1, 0)))
    assert same < other


def test_batches_hold_both_kinds_of_slices(workspace):
    trainer = started()
    for _ in range(5):
        label = next(trainer.dataloader_train)["target"][0]
        assert is_mixed(label)


def test_worker_processes_draw_such_batches_too(workspace, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = started()
    assert trainer.dataloader_train.num_processes == 1
    for _ in range(3):
        label = next(trainer.dataloader_train)["target"][0]
        assert is_mixed(label)
    for loader in (trainer.dataloader_train, trainer.dataloader_val, trainer.dataloader_target):
        loader._finish()


# -- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.draws
def test_a_run_writes_pictures_and_watches_the_structure(workspace):
    trainer = train(pictures=True, bound=1.0, num_epochs=1)
    folder = Path(trainer.output_folder)
    for name in ("losses.png", "pictures/epoch_0000.png", "pictures/prompts_epoch_0000.png", "pictures/domains.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG", name
    assert len(trainer.record.history["structure"]) == 1
    assert set(trainer.record.history) == TERMS | {"structure"}
    log = next(folder.glob("training_log*.txt")).read_text()
    assert "WARNING: translations keep little" in log and "content_weight=1" in log
    assert "'A photo of a source domain'" in log and "['left', 'right']" in log


def test_no_warning_while_structure_is_kept_or_training_warms_up(workspace):
    for options in ({"bound": -1.0}, {"bound": 1.0, "uuds__warmup_epochs": 2}):
        trainer = train(num_epochs=1, **options)
        assert "WARNING: translations" not in next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
        shutil.rmtree(trainer.output_folder_base)


def test_a_checkpoint_holds_everything(workspace):
    whole = train(uuds__content_weight=1.0)
    folder = Path(whole.output_folder)
    loaded = make_trainer("UUDSTrainer", "uuds", uuds__content_weight=1.0)
    loaded.load_checkpoint(str(folder / "checkpoint_final.pth"))
    assert same_weights(weights(whole), weights(loaded))
    ours, theirs = whole.optimizer.state_dict(), loaded.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"] and len(ours["param_groups"]) == 2
    for index, state in ours["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][index][key]))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def predictor(folder: Path, *folds: int) -> nnUNetPredictor:
    made = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    made.initialize_from_trained_model_folder(str(folder), folds)
    return made


def test_prediction_needs_neither_clips_file_nor_a_network(workspace, tmp_path, monkeypatch, no_network):
    from nnunet_uda.networks.clip.shape import build_whole

    torch.manual_seed(1)
    path = tmp_path / "clip.pt"
    torch.save(build_whole(CLIP).state_dict(), path)
    options = {"uuds__clip_weights": str(path)}
    trainer = train(**options)
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    assert f"CLIP starts from {path}" in log
    path.unlink()
    monkeypatch.setenv("NNUNET_UDA_CLIP", str(tmp_path / "gone"))

    made = predictor(Path(trainer.output_folder_base), 0)
    torch.manual_seed(0)
    images = torch.randn(1, 3, 32, 32)
    logits = made.predict_logits_from_preprocessed_data(images)
    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        expected = trainer.network(images.transpose(0, 1)).transpose(0, 1)
    error = (logits.float() - expected).abs()  # the predictor sums in half precision
    assert error.max() < 0.1 and error.mean() < 5e-3
    again = make_trainer("UUDSTrainer", "uuds", **options)
    again.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))  # nor does continuing
    assert same_weights(weights(trainer), weights(again))
    with pytest.raises(UDAError, match=r"clip\.pt.*does not exist"):
        make_trainer("UUDSTrainer", "uuds", **options).initialize()


def test_every_fold_predicts_with_its_own_prompts(workspace):
    for fold in (0, 1):
        trainer = make_trainer("UUDSTrainer", "uuds", fold=fold, seed=fold)
        trainer.initialize()
        folder = written_model(trainer)
    torch.manual_seed(0)
    images = torch.randn(1, 3, 32, 32)
    alone = [predictor(folder, fold).predict_logits_from_preprocessed_data(images) for fold in (0, 1)]
    assert not torch.allclose(alone[0], alone[1])
    both = predictor(folder, 0, 1).predict_logits_from_preprocessed_data(images)
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2, atol=2e-2, rtol=2e-2)


def test_training_takes_clips_weights_from_a_file(workspace, tmp_path):
    from nnunet_uda.networks.clip.shape import build_whole

    model = build_whole(CLIP)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    trainer = make_trainer("UUDSTrainer", "uuds", uuds__clip_weights=str(tmp_path / "clip.pt"))
    trainer.initialize()
    assert torch.equal(trainer.plain_network.encoder.visual.conv1.weight, model.visual.conv1.weight)
    prompts = trainer.plain_network.prompts
    used = prompts.vocabulary[prompts.vocabulary >= 0]
    assert torch.equal(prompts.token_embedding.weight[: len(used)], model.token_embedding.weight[used])
    assert any(p is prompts.context for group in trainer.optimizer.param_groups for p in group["params"])


def test_other_templates_name_the_domains(workspace):
    trainer = make_trainer("UUDSTrainer", "uuds", uuds__domain_prompt="A {source} slice, not {target}")
    trainer.initialize()
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    assert "'A MR slice, not CT'" in log


# -- settings, plans and refusals ----------------------------------------------------------------------------------


def test_the_plans_give_widths_and_outputs(workspace):
    write_plans(workspace, "deep", patch_size=(128, 64), base_features=4, max_features=32, stages=7)
    trainer = make_trainer("UUDSTrainer", "deep")
    trainer.initialize()
    network = trainer.plain_network
    assert [block.output_channels for block in network.segmentation_decoder.blocks] == [32, 32, 32, 16, 8, 4]
    scales = trainer._get_deep_supervision_scales()
    assert len(network.seg_layers) == len(scales) and scales[:2] == [[1, 1], [0.5, 0.5]]
    outputs = trainer.segment(torch.zeros(1, 1, 128, 64))
    assert [list(o.shape[2:]) for o in outputs] == [[128 // 2**i, 64 // 2**i] for i in range(len(scales))]
    write_plans(workspace, "flat", patch_size=(32, 32), stages=2)
    assert not make_trainer("UUDSTrainer", "flat").enable_deep_supervision


def test_3d_is_refused_with_the_reason(workspace):
    write_plans(workspace, "volume", base="nnUNetPlans", configuration="3d_fullres", patch_size=(8, 32, 32))
    with pytest.raises(UDAError, match=r"CLIP's image encoder.*is 2D.*configuration 2d"):
        make_trainer("UUDSTrainer", "volume", configuration="3d_fullres").initialize()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"threshold": 1.2}, "threshold.*between 0 and 1"),
        ({"domain_temperature": 0}, "domain_temperature.*positive"),
        ({"use_uncertainty": False}, "'use_uncertainty' is no setting any more, it is fixed at True; found False"),
        ({"content_weight": -1}, "content_weight"),
        ({"domain_prompt": "A {scan}"}, r"domain_prompt.*\{source\}"),
        ({"clip_config": "RN50"}, "clip_config.*a JSON object or null"),
        ({"chi": 0.2}, "unknown setting 'chi'"),
        ({"domain_loss": "reversed"}, "'similarity', 'printed'"),
    ],
)
def test_wrong_settings_are_refused(workspace, setting, words):
    with pytest.raises(UDAError, match=words):
        make_trainer("UUDSTrainer", "uuds", **{f"uuds__{name}": value for name, value in setting.items()})


def test_missing_weights_are_said_before_anything_is_built(workspace, monkeypatch, no_network, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("NNUNET_UDA_CLIP", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    trainer = make_trainer("UUDSTrainer")
    with pytest.raises(UDAError, match=r"open_clip_model\.safetensors.*NNUNET_UDA_CLIP"):
        trainer.initialize()
    assert trainer.network is None


def test_the_protocol_writes_section_4_1(in_workspace):
    configure.main(["-d", "501", "-p", "paper_uuds", "-protocol", "uuds"])
    written = json.loads((in_workspace.preprocessed / "Dataset501_Blobs" / "paper_uuds.json").read_text())
    uda, chosen = written["uda"], written["configurations"]["2d"]
    assert uda["segmentation_loss"] == "dice" and uda["num_epochs"] == 200 and "cisfa" not in uda
    assert chosen["batch_size"] == 4 and chosen["patch_size"] == [160, 160]
    shutil.copytree(
        in_workspace.preprocessed / "Dataset501_Blobs" / "nnUNetPlans_2d",
        in_workspace.preprocessed / "Dataset501_Blobs" / "paper_uuds_2d",
        dirs_exist_ok=True,
    )
    trainer = make_trainer("UUDSTrainer", "paper_uuds", uuds__clip_config=CLIP, uuds__clip_weights="random")
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.Adam) and not isinstance(trainer.optimizer, torch.optim.AdamW)
    for group in trainer.optimizer.param_groups:
        assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-4, 0.01, (0.9, 0.999))
    settings = trainer.own_settings
    assert {settings.domain_weight, settings.contrastive_weight, settings.segmentation_weight,
            settings.identity_weight} == {1.0}  # fmt: skip
    assert settings.threshold == 0.2


@pytest.mark.slow
def test_the_commands_train_continue_and_predict(workspace, tmp_path):
    plans = "uuds"
    workspace_results = {"nnUNet_results": str(tmp_path / "results")}
    train_command = ("nnUNetv2_train", "501", "2d", "0", "-tr", "UUDSTrainer", "-p", plans, "-device", "cpu")
    workspace.run(*train_command, nnUNet_n_proc_DA="0", **workspace_results)
    folder = tmp_path / "results" / "Dataset501_Blobs" / "UUDSTrainer__uuds__2d" / "fold_0"
    assert "road of target images" in json.loads((folder / "validation" / "about.json").read_text())["validated_on"]
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_latest.pth")
    workspace.run(*train_command, "--c", nnUNet_n_proc_DA="0", **workspace_results)
    images = workspace.raw / "Dataset501_Blobs" / "imagesTs"
    done = workspace.run(
        "nnUNetv2_predict", "-d", "501", "-c", "2d", "-f", "0", "-tr", "UUDSTrainer", "-p", plans, "-i", str(images),
        "-o", str(tmp_path / "out"), "-device", "cpu", "-npp", "1", "-nps", "1", **workspace_results,
    )  # fmt: skip
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2, done.stdout
