"""Adapting a trained model without its data: the model's folder, views, both modes, errors, a second start."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import sampled
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_uda.adaptation import folder as folder_mode
from nnunet_uda.adaptation import views
from nnunet_uda.adaptation.folder import (
    FolderSettings,
    WholeScans,
    adapt_to_folder,
    distrusted,
    known_volumes,
    knows_styles,
    moving_transforms,
)
from nnunet_uda.adaptation.model import Model, open_model
from nnunet_uda.adaptation.patches import Patches, Scan
from nnunet_uda.adaptation.scan import learning
from nnunet_uda.commands import adapt
from nnunet_uda.errors import UDAError
from nnunet_uda.evaluation.prediction import open_model as open_for_criteria
from nnunet_uda.losses.consistency import consistency_loss
from nnunet_uda.training.contrast_search import SHARES, ContrastSearch

CPU = torch.device("cpu")
CASES = ["ct_Tu00", "ct_Tu01"]


def residual_3d(plans: dict) -> None:
    """A tiny residual encoder in 3D, as ``nnUNetResEncUNetMPlans`` would have a large one."""
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"] = [8, 24, 24]
    architecture = configuration["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    arguments = architecture["arch_kwargs"]
    arguments.pop("n_conv_per_stage")
    arguments |= {"n_stages": 2, "features_per_stage": [4, 8], "n_blocks_per_stage": [1, 1],
                  "n_conv_per_stage_decoder": [1], "kernel_sizes": [[1, 3, 3], [3, 3, 3]],
                  "strides": [[1, 1, 1], [1, 2, 2]]}  # fmt: skip


def write_model(
    workspace,
    folder: Path,
    trainer: str = "nnUNetTrainer",
    configuration: str = "2d",
    change=None,
    **checkpoint: object,
) -> Path:
    """A model folder as a stock training leaves it; its weights are random, its log holds numpy's numbers."""
    preprocessed = workspace.preprocessed / "Dataset501_Blobs"
    plans = json.loads((preprocessed / "tiny.json").read_text())
    plans.pop("uda", None)
    if change is not None:
        change(plans)
    folder = folder / f"{trainer}__tiny__{configuration}"
    (folder / "fold_0" / "validation").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    for name in ("dataset.json", "dataset_fingerprint.json"):
        shutil.copyfile(preprocessed / name, folder / name)
    manager = PlansManager(plans)
    torch.manual_seed(0)
    network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration(configuration), 1, 3, False)
    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float32(0.5)], "train_losses": [np.float64(1)]},
        "_best_ema": np.float32(0.5),
        "current_epoch": 1,
        "init_args": {"plans": plans, "configuration": configuration, "fold": 0, "device": CPU},
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": (0,),
    }
    torch.save(content | checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


@pytest.fixture
def model(in_workspace, tmp_path) -> Path:
    return write_model(in_workspace, tmp_path / "results")


@pytest.fixture
def scans(in_workspace, tmp_path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for case in CASES:
        name = f"{case}_0000.nii.gz"
        shutil.copyfile(in_workspace.raw / "Dataset501_Blobs" / "imagesTu" / name, folder / name)
    return folder


def run(model: Path, scans: Path, out: Path, *more: str) -> dict:
    adapt.main(["-m", str(model), "-i", str(scans), "-o", str(out), "-device", "cpu", "-steps", "2", *more])
    return json.loads((out / "adapt.json").read_text())


def prefer(monkeypatch, adapted: bool) -> None:
    """An estimate that finds adapted predictions always better, or always worse."""

    def estimate(model: Model, volume, properties, weights) -> float:
        return float((weights is not model.weights) == adapted)

    monkeypatch.setattr(Model, "estimate", estimate)


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        adapt.main([*map(str, arguments), "-device", "cpu"])
    assert ended.value.code == 1
    return capsys.readouterr().err


def label(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 36), (6, 24, 36)])
def test_a_moved_patch_comes_back(size):
    axes = [torch.linspace(-1, 1, length) for length in size]
    smooth = sum(axis**2 for axis in torch.meshgrid(*axes, indexing="ij"))[None, None].repeat(3, 1, *[1] * len(size))
    maps = views.random_affine(3, size, torch.Generator().manual_seed(0))
    moved = views.warp(smooth, maps)
    back = views.warp(moved, views.inverse(maps))
    inside = views.warp(views.warp(torch.ones_like(smooth), maps), views.inverse(maps)) > 0.99
    assert (moved - smooth).abs()[inside].max() > 0.1, "it was moved"
    assert inside.float().mean() > 0.3 and (back - smooth).abs()[inside].max() < 0.03


def test_a_turn_keeps_angles_in_patches_that_are_not_square(monkeypatch):
    monkeypatch.setattr(views, "SCALING", 0.0)
    monkeypatch.setattr(views, "SHIFT", 0.0)
    monkeypatch.setattr(views, "ROTATION", 0.5)
    maps = views.random_affine(4, (20, 60), torch.Generator().manual_seed(1))
    voxels = torch.tensor([[60.0, 0], [0, 20.0]]) / 2
    turned = voxels @ maps[:, :, :2] @ torch.linalg.inv(voxels)
    assert torch.allclose(turned @ turned.transpose(1, 2), torch.eye(2).expand(4, 2, 2), atol=1e-5)


def test_equal_and_certain_segmentations_cost_nothing_and_others_do():
    one = torch.nn.functional.one_hot(torch.tensor([[[0, 1], [2, 2]]]), 3).permute(0, 3, 1, 2).float()
    assert consistency_loss(one, one) == pytest.approx(0, abs=1e-6)
    other = one.flip(-1)
    by_hand = 1 - np.mean([0.001 / 2.001, (2 * 2 + 0.001) / 4.001])
    assert consistency_loss(one, other).item() == pytest.approx(by_hand, abs=1e-6)
    valid = torch.tensor([[[[0.0, 0.0], [1.0, 1.0]]]])
    assert consistency_loss(one, other, valid).item() == pytest.approx(0, abs=1e-6)


def test_patches_lie_around_what_was_found_or_anywhere():
    volume = np.arange(4 * 20 * 20, dtype=np.float32).reshape(1, 4, 20, 20)
    found = np.zeros((4, 20, 20), np.int16)
    found[2, 5, 6] = 1
    mask = np.where(volume[0] % 20 == 19, -1, 0).astype(np.int16)  # a column lies outside of nnU-Net's mask
    images, masks, scans = zip(*Patches([volume], [mask], [found], (8, 8), seed=0).draw(60), strict=True)
    images, masks = torch.stack(images), torch.stack(masks)
    assert images.shape == masks.shape == (60, 1, 8, 8) and set(scans) == {0}
    around = (images[:, 0, 4, 4] == volume[0, 2, 5, 6]).float().mean()
    assert 0.5 < around < 0.85
    padded = (masks < 0) & (images % 20 != 19)
    assert padded.any() and (images[padded] == 0).all() and (masks[images % 20 == 19] == -1).all()
    image, mask, _ = Patches([volume], [mask], [found], (2, 8, 8), seed=0).draw(1)[0]
    assert image.shape == mask.shape == (1, 2, 8, 8)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_folders_patches_are_seen_plain_by_the_student_and_in_styles_by_the_teacher(
    in_workspace, tmp_path, configuration
):
    change = residual_3d if configuration == "3d_fullres" else None
    folder = write_model(in_workspace, tmp_path, configuration=configuration, change=change)
    opened = open_model(folder, None, "checkpoint_final.pth", CPU)
    transforms, size = moving_transforms(opened, FolderSettings(teacher_views=2, style_probability=0.0))
    assert all(before >= after for before, after in zip(size, opened.patch_size, strict=True))
    image = torch.linspace(0, 1, size[-1]).expand(1, *size).clone()
    np.random.seed(0)
    moved = transforms(image=image, segmentation=torch.zeros(1, *size, dtype=torch.int16))["image"]
    assert moved.shape == (1 + 1 + 2, *opened.patch_size)
    plain, student, *teachers = moved
    assert all(not torch.allclose(plain, teacher, atol=1e-2) for teacher in teachers)
    similarity = [np.corrcoef(plain.flatten(), view.flatten())[0, 1] for view in (student, *teachers)]
    assert similarity[0] > max(similarity[1:])


def test_a_network_knows_styles_where_it_labels_restyled_patches_as_the_plain_ones(capsys):
    def network(images):
        """Class 1 where a pixel is over 0, else the background."""
        return torch.cat((-images, images), 1)

    plain = torch.tensor([[[[-1.0, 1.0], [1.0, 1.0]]]])
    assert knows_styles(network, [(plain, -plain, 2 * plain)]), "what the student sees does not count"
    assert not knows_styles(network, [(plain, plain, -plain)])
    assert not knows_styles(network, [(-torch.ones_like(plain),) * 3]), "nothing was found"
    assert "a Dice of 1.00: the teacher sees both" in capsys.readouterr().out


@pytest.mark.parametrize(("knows", "held"), [(True, 0), (False, 10)])
def test_a_folders_teacher_sees_the_contrasts_that_the_network_is_surer_of_until_it_needs_them_no_more(
    model, monkeypatch, knows, held
):
    opened = open_model(model, None, "checkpoint_final.pth", CPU)
    volume = np.random.default_rng(0).normal(size=(1, 4, 40, 40)).astype(np.float32)
    seen, ask = [], folder_mode.teachers_opinion
    monkeypatch.setattr(
        folder_mode,
        "teachers_opinion",
        lambda teacher, images, views, intensities: (
            seen.append((images, list(views))), ask(teacher, images, views, intensities)
        )[1],
    )  # fmt: skip
    curve = torch.rand(1, len(SHARES), generator=torch.Generator().manual_seed(0))

    def found(contrasts, network, patches):
        contrasts.places.copy_(torch.linspace(-2, 2, len(SHARES)))
        contrasts.curves[0], contrasts.number = curve, torch.tensor(1)

    reviewed = []
    monkeypatch.setattr(folder_mode, "search_contrasts", found)
    monkeypatch.setattr(folder_mode, "knows_styles", lambda network, batches: knows)
    monkeypatch.setattr(
        ContrastSearch,
        "review",
        lambda contrasts, network, patches: (
            reviewed.append((patches[0], network(patches[0]))), contrasts.number.fill_(int(len(reviewed) < 3))
        ),
    )  # fmt: skip
    scan = Scan("a", volume, np.zeros(volume.shape[1:], np.int16), {"spacing": [1.0, 1.0, 1.0]})
    adapt_to_folder(opened, opened.weights[0], [scan], None, FolderSettings(steps=20, teacher_views=2))
    expected = ContrastSearch(2, [True])
    found(expected, None, None)
    until = held + 4  # reviewed thrice, then let go
    assert [len(views) for _, views in seen] == [2 if knows else int(step < until) for step in range(20)]
    along = [len(views) > 0 and torch.equal(views[0], expected(images)[0]) for images, views in seen]
    assert along == [step < until for step in range(20)]
    assert len(reviewed) == 3
    if held == 0:
        patch, logits = reviewed[0]  # the teacher's, which begins as the model
        opened.network.load_state_dict(opened.weights[0])
        with torch.no_grad():
            torch.testing.assert_close(logits, opened.network.eval()(patch))


def test_whole_scans_say_where_a_structure_of_one_piece_is_not(model, monkeypatch, capsys):
    opened = open_model(model, None, "checkpoint_final.pth", CPU)
    opened.predictor.plans_manager.plans["single_components"] = [[1, 2], [1]]
    volume, mask = np.zeros((1, 2, 30, 30), np.float32), np.zeros((2, 30, 30), np.int16)
    volume[0, :, 4:14, 4:14], volume[0, :, 22:25, 22:25], mask[:, :, 29] = 1, 1, -1
    asked = []

    def logits(opened, view, weights, mirror):
        """Class 1 where a voxel is over a half."""
        asked.append(view)
        return torch.stack((0.5 - view[0], view[0] - 0.5, torch.full_like(view[0], -9)))

    monkeypatch.setattr(Model, "logits", logits)
    scan, contrasts = Scan("a", volume, mask, {"spacing": [1.0, 1.0, 1.0]}), ContrastSearch(2, [False])
    whole = WholeScans(opened, [scan], None, (8, 8), 0)
    whole.label({}, contrasts)
    assert whole.left_out == [[]] and len(asked) == 1
    far = whole.patches.masks[0]
    assert (far[:, 4:14, 4:14] == 0).all() and (far[:, 8, 1:17] == 0).all(), "the larger piece, and near it"
    assert (far[:, 20:, 20:29] == 1).all() and (far[:, :, 29] == -1).all()
    places = whole.patches.places[0]
    assert len(places) == 1 and places[0].max() < 14, "patches are drawn around that piece"
    opinion = torch.tensor([0.1, 0.7, 0.2]).view(1, 3, 1, 1).repeat(1, 1, 30, 30)
    believed = whole.believable(opinion, torch.from_numpy(far[:1]))
    assert believed[0, :, 8, 8].tolist() == opinion[0, :, 8, 8].tolist() == believed[0, :, 8, 29].tolist()
    assert believed[0, :, 23, 23].tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    contrasts.places.copy_(torch.linspace(0, 1, len(SHARES)))
    contrasts.curves[0], contrasts.number = torch.linspace(0, 1, len(SHARES)), torch.tensor(1)
    whole.label({}, contrasts)
    assert len(asked) == 3, "the scan, and along the contrast"
    known = WholeScans(opened, [scan], np.array([[1e4, 1.0]]), (8, 8), 0)
    known.label({}, ContrastSearch(0, [False]))
    known.say_what_is_left_out()
    assert known.left_out == [[1, 2]] and known.patches.masks[0] is mask, "what is no heart says nothing of others"
    assert "a: labels of left, right are not learned there" in capsys.readouterr().out


def test_norms_alone_learn_where_that_is_asked(model):
    network = open_model(model, None, "checkpoint_final.pth", CPU).network
    norms = {name for name, parameter in network.named_parameters() if ".norm." in name}
    chosen = learning(network, "norms")
    assert {name for name, p in network.named_parameters() if p.requires_grad} == norms and len(chosen) > 3
    assert len(learning(network, "all")) == len(list(network.parameters()))


def test_sizes_are_read_from_the_validation_and_say_what_not_to_believe(model):
    opened = open_model(model, None, "checkpoint_final.pth", CPU)
    assert known_volumes(opened) is None
    spacings = json.loads((model / "dataset_fingerprint.json").read_text())["spacings"]
    voxel = float(np.median([np.prod(spacing) for spacing in spacings]))
    summary = model / "fold_0" / "validation" / "summary.json"
    cases = [{"metrics": {"1": {"n_ref": 100.0}, "(2,)": {"n_ref": 50.0}}}]
    summary.write_text(json.dumps({"metric_per_case": cases}))
    known = known_volumes(opened)
    assert known.tolist() == [[100 * voxel, 50 * voxel]]
    found = np.zeros((1, 40, 40), np.int16)
    found[0, :10, :10], found[0, 20:30, 20:32] = 1, 2
    assert distrusted([found], [[voxel, 1, 1]], known, 2) == [[2]]
    summary.write_text(json.dumps({"metric_per_case": [{"metrics": {"1": {}}}]}))
    with pytest.raises(UDAError, match=r"summary.json is no summary"):
        known_volumes(opened)
    summary.write_text(json.dumps({"metric_per_case": cases}))
    for spacings in ("abc", [["a", "b"]], 3, [None]):
        (model / "dataset_fingerprint.json").write_text(json.dumps({"spacings": spacings}))
        with pytest.raises(UDAError, match=r"dataset_fingerprint.json: 'spacings' must be"):
            known_volumes(opened)


# --- models of others -------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_code_in_a_checkpoint_is_run_for_those_who_trust_it_alone(in_workspace, tmp_path):
    folder = write_model(in_workspace, tmp_path / "results", extra=Bomb(tmp_path / "ran"))
    with pytest.raises(UDAError, match=r"checkpoint_final.pth cannot be read as data.*--trusted"):
        open_model(folder, None, "checkpoint_final.pth", CPU)
    assert not (tmp_path / "ran").exists()
    open_model(folder, None, "checkpoint_final.pth", CPU, trusted=True)
    assert (tmp_path / "ran").exists()


def test_models_that_do_not_fit_are_refused_by_name(in_workspace, model, tmp_path):
    def expect(message: str, folds=None):
        with pytest.raises(UDAError, match=message):
            open_model(model, folds, "checkpoint_final.pth", CPU)

    expect(r"holds no checkpoint_final.pth of fold 3; it has checkpoint_final.pth of 0", ["3"])
    dataset = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps(dataset | {"labels": {"background": 0, "left": 1}}))
    expect(r"does not fit .*plans.json and dataset.json.*Channels, labels")
    channels = {"channel_names": {"0": "a", "1": "b"}}
    (model / "dataset.json").write_text(json.dumps(dataset | channels))
    expect(r"does not fit")
    (model / "dataset.json").write_text(json.dumps(dataset | {"labels": {"background": 0, "all": [1, 2], "b": 2}}))
    expect(r"regions")
    (model / "dataset.json").write_text(json.dumps(dataset))
    path = model / "fold_0" / "checkpoint_final.pth"
    whole = torch.load(path, weights_only=False)
    some = next(iter(whole["network_weights"]))
    for change, message in (
        ({"init_args": "x"}, "its 'init_args' is 'x'"),
        ({"init_args": {"configuration": ["2d"]}}, "its 'init_args' is"),
        ({"init_args": {"configuration": "3d_cascade"}}, "is of the configuration '3d_cascade', which the plans.json"),
        ({"network_weights": [1]}, "its 'network_weights' is"),
        ({"network_weights": {some: 1}}, "its 'network_weights' is"),
        ({"network_weights": {some: torch.tensor([float("nan")])}}, "its weights hold NaN"),
        ({"trainer_name": "../x"}, "its 'trainer_name' is '../x'"),
        ({"current_epoch": None}, "its 'current_epoch' is None"),
        ({"inference_allowed_mirroring_axes": 1}, "its 'inference_allowed_mirroring_axes' is 1"),
        ({"inference_allowed_mirroring_axes": (7,)}, "its 'inference_allowed_mirroring_axes' is"),
        ({"inference_allowed_mirroring_axes": (0, 2)}, "are (0, 2), but patches of 2d have 2 axes"),
        ({"uda": {"settings": "x"}}, "its 'uda' is"),
    ):
        torch.save(whole | change, path)
        expect(rf"checkpoint_final.pth.*{re.escape(message)}")
        with pytest.raises(UDAError, match=re.escape(message)):  # quality, export and checkpoints
            open_for_criteria(model, ["0"], "checkpoint_final.pth", CPU)
    torch.save(whole, path)
    (model / "fold_0" / "quality.json").write_text("[]")
    expect(r"quality.json is no calibration")
    torch.save({"weights": 1}, path)
    expect(r"is no checkpoint of an nnU-Net v2 training: it lacks network_weights")
    with pytest.raises(UDAError, match=r"nowhere does not exist"):
        open_model(tmp_path / "nowhere", None, "checkpoint_final.pth", CPU)
    for near in (model.parent, model / "fold_0"):
        with pytest.raises(UDAError, match=rf"holds no plans.json; expected .* Give {re.escape(str(model))}$"):
            open_model(near, None, "checkpoint_final.pth", CPU)


def test_a_trainer_that_is_not_here_falls_back_to_the_plain_network(in_workspace, tmp_path, capsys):
    folder = write_model(in_workspace, tmp_path / "results", "SomebodysTrainer")
    opened = open_model(folder, None, "checkpoint_final.pth", CPU)
    assert "SomebodysTrainer is not to be found" in capsys.readouterr().out and opened.trainer is nnUNetTrainer


# --- the command ------------------------------------------------------------------------------------------------------


def test_each_scan_by_itself(model, scans, tmp_path, capsys):
    out = tmp_path / "out"
    state = run(model, scans, out, "-mode", "scan")
    said = capsys.readouterr().out
    assert "This takes about" in said and "on cpu for 2 scan(s)" in said
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"{case}.nii.gz" for case in CASES]
    assert set(state["scans"]) == set(CASES) and not list(out.glob("Dataset*"))
    alone = tmp_path / "alone"
    (scans / f"{CASES[0]}_0000.nii.gz").unlink()
    assert run(model, scans, alone, "-mode", "scan")["scans"][CASES[1]] == state["scans"][CASES[1]], "nothing is kept"
    image = sitk.ReadImage(str(scans / f"{CASES[1]}_0000.nii.gz"))
    assert sitk.ReadImage(str(out / f"{CASES[1]}.nii.gz")).GetSize() == image.GetSize()


@sampled("mode", ["scan", "folder"], "scan")
def test_a_residual_network_in_3d_is_adapted(in_workspace, scans, tmp_path, monkeypatch, mode):
    model = write_model(in_workspace, tmp_path / "results", configuration="3d_fullres", change=residual_3d)
    prefer(monkeypatch, adapted=True)
    (scans / f"{CASES[1]}_0000.nii.gz").unlink()
    state = run(model, scans, tmp_path / "out", "-mode", mode)
    assert state["scans"][CASES[0]]["kept"] == "adapted"
    assert label(tmp_path / "out" / f"{CASES[0]}.nii.gz").shape == (10, 36, 36)


def test_one_model_for_a_folder_that_nnunet_predicts_with(model, scans, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    prefer(monkeypatch, adapted=True)
    state = run(model, scans, out)
    assert {scan["kept"] for scan in state["scans"].values()} == {"adapted"}
    written = out / "Dataset501_Blobs" / "nnUNetTrainer__tiny__2d"
    said = capsys.readouterr().out
    assert str(out.resolve()) in said and "The network expects a Dice of" in said
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(written), ("0",), "checkpoint_final.pth")
    before = open_model(model, None, "checkpoint_final.pth", CPU).weights[0]
    assert any(not torch.equal(before[name], value) for name, value in predictor.list_of_parameters[0].items())
    again = open_model(written, None, "checkpoint_final.pth", CPU)
    volume, _, properties = again.preprocess([scans / f"{CASES[0]}_0000.nii.gz"])
    again.write_prediction(again.logits(volume, again.weights), properties, tmp_path / "again.nii.gz")
    assert np.array_equal(label(tmp_path / "again.nii.gz"), label(out / f"{CASES[0]}.nii.gz"))


def test_a_second_start_goes_on_and_another_command_is_refused(model, scans, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    write = Model.write_prediction
    written = []

    def once(self, logits, properties, path):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(self, logits, properties, path)

    monkeypatch.setattr(Model, "write_prediction", once)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(model, scans, out)
    assert sorted(p.name for p in out.glob("*.nii.gz")) == [f"{CASES[0]}.nii.gz"]
    stamps = [p.stat().st_mtime_ns for p in out.rglob("*.pth")] + [written[0].stat().st_mtime_ns]
    monkeypatch.setattr(Model, "write_prediction", write)
    capsys.readouterr()
    assert set(run(model, scans, out)["scans"]) == set(CASES)
    assert "1 of 2 scan(s) are finished already" in capsys.readouterr().out
    assert [p.stat().st_mtime_ns for p in out.rglob("*.pth")] + [written[0].stat().st_mtime_ns] == stamps
    command = ("-m", model, "-i", scans, "-o", out, "-steps", "2")
    assert "other settings (settings)" in refused(capsys, *command, "-seed", "3")
    assert "(mode, settings)" in refused(capsys, *command, "-mode", "scan")
    (scans / f"{CASES[0]}_0000.nii.gz").unlink()
    assert "one model is for all" in refused(capsys, *command)


def test_the_unadapted_prediction_stays_where_it_agrees_more(model, scans, tmp_path, monkeypatch):
    prefer(monkeypatch, adapted=False)
    state = run(model, scans, tmp_path / "out", "-mode", "scan", "-what", "all", "-learning_rate", "0.1")
    assert {scan["kept"] for scan in state["scans"].values()} == {"unadapted"}
    opened = open_model(model, None, "checkpoint_final.pth", CPU)
    volume, _, properties = opened.preprocess([scans / f"{CASES[0]}_0000.nii.gz"])
    opened.write_prediction(opened.logits(volume, opened.weights), properties, tmp_path / "own.nii.gz")
    assert np.array_equal(label(tmp_path / "own.nii.gz"), label(tmp_path / "out" / f"{CASES[0]}.nii.gz"))


def test_what_the_command_refuses(model, scans, tmp_path, capsys):
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    assert "give either -m FOLDER, or -d" in refused(capsys, "-i", scans, "-o", out)
    assert "empty holds no image" in refused(capsys, "-m", model, "-i", empty, "-o", out)
    assert "none (-i) is no folder" in refused(capsys, "-m", model, "-i", tmp_path / "none", "-o", out)
    assert "give another one" in refused(capsys, "-m", model, "-i", scans, "-o", scans)
    assert "'steps' must be at least 1" in refused(capsys, "-m", model, "-i", scans, "-o", out, "-steps", "0")
    unknown = refused(capsys, "-m", model, "-i", scans, "-o", out, "-runs", "2")
    assert "-mode folder: unknown setting 'runs'" in unknown
    (scans / f"{CASES[0]}_0001.nii.gz").write_bytes(b"")
    assert "reads 1 channel(s)" in refused(capsys, "-m", model, "-i", scans, "-o", out)
    (scans / f"{CASES[0]}_0001.nii.gz").unlink()
    (scans / f"{CASES[0]}_0000.nii.gz").write_bytes(b"no scan")
    assert f"{CASES[0]}_0000.nii.gz" in refused(capsys, "-m", model, "-i", scans, "-o", out)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("")
    assert "is not empty" in refused(capsys, "-m", model, "-i", scans, "-o", out)
