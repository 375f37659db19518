"""A few target scans that are trained on with their labels: preprocessing, every trainer's loss, what stays unread."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import make_trainer, same_weights, sampled, weights
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from support.tiny import write_plans

from nnunet_uda.commands import preprocess
from nnunet_uda.data.target import preprocess_target
from nnunet_uda.errors import UDAError
from nnunet_uda.training import streams

NAME = "Dataset501_Blobs"
FEW = ["ct_Tu00", "ct_Tu02"]


def write_label(path: Path, image: Path, offset: int = 0) -> None:
    """The structures of ``conftest.draw_case`` by their values, or any other label."""
    read = sitk.ReadImage(str(image))
    voxels = sitk.GetArrayFromImage(read)
    label = np.zeros(voxels.shape, np.uint8)
    label[voxels > 210], label[(voxels > 80) & (voxels <= 210)] = 1 + offset, 2
    written = sitk.GetImageFromArray(label)
    written.CopyInformation(read)
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(written, str(path))


@pytest.fixture
def labelled(in_workspace, monkeypatch, tmp_path):
    """The dataset with two labelled target scans; nnU-Net's three folders are the test's own."""
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(in_workspace, name), tmp_path / name)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    raw = tmp_path / "raw" / NAME
    for case in FEW:
        write_label(raw / "labelsTu" / f"{case}.nii.gz", raw / "imagesTu" / f"{case}_0000.nii.gz")
    for folder in ("raw", "preprocessed"):
        path = tmp_path / folder / NAME / "dataset.json"
        content = json.loads(path.read_text())
        content["uda"]["labelled_target"] = FEW
        path.write_text(json.dumps(content))
    return tmp_path


def steps(trainer, number: int = 1) -> list[dict[str, float]]:
    if not trainer.was_initialized:
        trainer.initialize()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(number)]


def prepared(folder: Path, **options) -> Path:
    preprocessed = folder / "preprocessed" / NAME
    plans = PlansManager(json.loads((preprocessed / "tiny.json").read_text()))
    dataset = json.loads((preprocessed / "dataset.json").read_text())
    return preprocess_target(plans, "2d", dataset, 1, **options)


def test_labelled_scans_lie_with_their_labels_in_a_folder_of_their_own(labelled):
    said: list[str] = []
    folder = prepared(labelled, labelled=True, log=said.append)
    assert folder.name == "nnUNetPlans_2d_target_labelled" and "2 labelled target" in said[0]
    trainer = make_trainer("RandomStyleTrainer")
    dataset = streams.target_scans(trainer).labelled()
    assert dataset.identifiers == FEW
    data, seg, _, properties = dataset.load_case("ct_Tu00")
    image, mask, *_ = trainer_target_case(labelled, "ct_Tu00")
    assert np.array_equal(data[:], image[:]), "the image is that of the unlabelled target"
    assert set(np.unique(seg[:])) >= {0, 1, 2} and set(np.unique(mask[:])) <= {-1, 0}
    assert all(len(properties["class_locations"][value]) for value in (1, 2))

    write_label(labelled / "raw" / NAME / "labelsTu" / "ct_Tu00.nii.gz",
                labelled / "raw" / NAME / "imagesTu" / "ct_Tu00_0000.nii.gz", offset=1)  # fmt: skip
    prepared(labelled, labelled=True, log=said.append)
    assert "1 labelled target" in said[-1], "a changed label is preprocessed again, the other is kept"


def test_the_command_prepares_them_too(labelled, capsys):
    preprocess.main(["-d", "501", "-p", "tiny", "-np", "1"])
    assert "Labelled target ready" in capsys.readouterr().out
    manifest = labelled / "preprocessed" / NAME / "nnUNetPlans_2d_target_labelled" / "manifest.json"
    assert sorted(json.loads(manifest.read_text())["cases"]) == FEW


def trainer_target_case(folder: Path, case: str):
    from nnunet_uda.data.target import TargetDataset

    return TargetDataset(str(prepared(folder)), [case]).load_case(case)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: write_value(path, 7), r"ct_Tu00.nii.gz holds the value\(s\) 7; expected .*0, 1, 2"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), r"ct_Tu00.nii.gz"),
        (lambda path: write_value(path, 1, 5), r"ct_Tu00"),
    ],
)
def test_a_label_that_does_not_fit_is_refused_by_name(labelled, write, message):
    write(labelled / "raw" / NAME / "labelsTu" / "ct_Tu00.nii.gz")
    with pytest.raises(UDAError, match=message):
        prepared(labelled, labelled=True)


def write_value(path: Path, value: int, slices: int | None = None) -> None:
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)[:slices]
    array[0, 0, 0] = value
    written = sitk.GetImageFromArray(array)
    for name in ("Spacing", "Origin", "Direction"):
        getattr(written, f"Set{name}")(getattr(image, f"Get{name}")())
    sitk.WriteImage(written, str(path))


@sampled(
    "name",
    ["RandomStyleTrainer", "SupervisedTrainer", "CASTTrainer", "CISFATrainer", "SimilarityPrototypesTrainer",
     "EntMinTrainer", "ADVENTTrainer"],
    "CASTTrainer", "SimilarityPrototypesTrainer",
)  # fmt: skip
def test_every_trainer_learns_them_in_the_segmenters_update(labelled, name):
    trainer = make_trainer(name)
    seen = []
    loss = trainer.labelled_target_loss
    trainer.labelled_target_loss = lambda images, label: seen.append((images, label)) or loss(images, label)
    [losses] = steps(trainer)
    [(images, label)] = seen
    assert len(images) == 1, "a third of three labelled patches"
    assert losses["labelled_target"] > 0
    assert set(np.unique(trainer.known(label))) <= {-1, 0, 1, 2}


def test_uuds_learns_them_on_its_road_for_target_images(labelled):
    write_plans(SimpleNamespace(preprocessed=labelled / "preprocessed"), "uuds")
    trainer = make_trainer("UUDSTrainer", "uuds")
    assert steps(trainer)[0]["labelled_target"] > 0


def test_a_translator_learns_them_once_its_segmenter_does(labelled):
    trainer = make_trainer("CUTTrainer")
    assert "labelled_target" not in steps(trainer)[0], "the generator alone learns at first"
    trainer.current_epoch = 1
    trainer.on_train_epoch_start()
    assert trainer.train_step(next(trainer.dataloader_train))["labelled_target"] > 0


def test_their_loss_has_the_weight_of_their_share_and_reaches_the_network_that_learns(labelled):
    trainer = make_trainer("CASTTrainer", labelled_target_share=0.5)
    before = {name: value.clone() for name, value in trainer_weights(trainer).items()}
    trainer.loss = lambda outputs, label: 0 * trainer.finest(outputs).sum()
    trainer.labelled_target_loss = lambda images, label: trainer.finest(trainer.study(images)).square().mean()
    [losses] = steps(trainer)
    images = next(trainer.dataloader_labelled)["data"]
    assert len(images) == 2, "half of the labelled patches of a step, beside a batch of two"
    assert losses["labelled_target"] > 0 and losses["segmentation"] == 0
    student = trainer.student.state_dict()
    assert any(not torch.equal(before[name], student[name]) for name in before)


def trainer_weights(trainer) -> dict[str, torch.Tensor]:
    trainer.initialize()
    return trainer.student.state_dict()


def test_bounds_know_them(labelled):
    lower = make_trainer("SourceOnlyTrainer")
    assert "labelled_target" not in steps(lower)[0] and lower.dataloader_labelled is None
    alone = make_trainer("LabelledTargetTrainer")
    assert "labelled_target" not in steps(alone)[0]
    assert alone.training_dataset.identifiers == FEW and alone.validation_dataset.identifiers[0].startswith("mr_")
    off = make_trainer("RandomStyleTrainer", labelled_target_share=0.0)
    assert "labelled_target" not in steps(off)[0]


def test_training_on_them_alone_needs_some(in_workspace):
    trainer = make_trainer("LabelledTargetTrainer")
    with pytest.raises(UDAError, match="dataset.json names none.*-few"):
        trainer.initialize()
        trainer.get_tr_and_val_datasets()


def test_a_fold_never_trains_on_its_test_scans_labels(labelled):
    preprocessed = labelled / "preprocessed" / NAME
    rest = ["ct_Tu01", "ct_Tu03"]
    splits = [{"train": [*rest, "ct_Tu00"], "val": ["ct_Tu02"]}, {"train": rest, "val": FEW}]
    for folder in (preprocessed, labelled / "raw" / NAME):
        (folder / "splits_target.json").write_text(json.dumps(splits))
    assert streams.target_scans(make_trainer("RandomStyleTrainer")).labelled().identifiers == ["ct_Tu00"]
    assert streams.target_scans(make_trainer("RandomStyleTrainer", fold=1)).labelled() is None


def test_no_other_target_label_decides_anything(labelled):
    def train():
        trainer = make_trainer("CASTTrainer", num_epochs=1)
        trainer.run_training()
        shutil.rmtree(trainer.output_folder)
        return weights(trainer)

    first = train()
    shutil.rmtree(labelled / "raw" / NAME / "labelsTs")
    assert same_weights(first, train())
    for case in FEW:  # a change of these labels does decide
        label = labelled / "raw" / NAME / "labelsTu" / f"{case}.nii.gz"
        write_label(label, labelled / "raw" / NAME / "imagesTu" / f"{case}_0000.nii.gz", offset=1)
    assert not same_weights(first, train())


def test_the_preprocessed_folder_alone_is_enough_and_must_hold_them_all(labelled, monkeypatch):
    prepared(labelled, labelled=True)
    shutil.move(labelled / "raw" / NAME, labelled / "elsewhere")
    assert streams.target_scans(make_trainer("RandomStyleTrainer")).labelled().identifiers == FEW
    trainer = make_trainer("RandomStyleTrainer")
    trainer.dataset_json["uda"]["labelled_target"] = [*FEW, "ct_Tu03"]
    with pytest.raises(UDAError, match=r"lacks the labelled target case\(s\) ct_Tu03"):
        streams.target_scans(trainer).labelled()
