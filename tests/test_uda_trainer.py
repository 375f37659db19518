"""The trainers in this process: determinism, checkpoints, what they refuse, what they never read."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import draw_case, make_trainer, same_weights, weights, write_volume
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_uda.dataset_conversion import quicklook
from nnunet_uda.errors import UDAError
from nnunet_uda.training import pictures, preview, start
from nnunet_uda.training.checkpoint import plain


def train(name: str = "CISFATrainer", **options):
    trainer = make_trainer(name, **options)
    trainer.run_training()
    return trainer


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept") / "results"


@pytest.fixture
def trained(in_workspace, kept) -> Path:
    """``checkpoint_final.pth`` of CISFA in results of the test's own; the first test that asks for it trains."""
    results = Path(os.environ["nnUNet_results"])
    if kept.exists():
        shutil.copytree(kept, results)
    else:
        train()
        shutil.copytree(results, kept)
    return results / "Dataset501_Blobs" / "CISFATrainer__tiny__2d" / "fold_0" / "checkpoint_final.pth"


def loaded(path: Path):
    trainer = make_trainer("CISFATrainer")
    trainer.load_checkpoint(str(path))
    return trainer


@pytest.fixture
def own_copy(in_workspace, monkeypatch, tmp_path):
    """Raw and preprocessed folders that the test may change."""
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(in_workspace, name), tmp_path / name)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


def test_a_seed_decides_every_weight_and_target_labels_decide_nothing(own_copy):
    first = weights(train(num_epochs=1))
    for path in (own_copy / "raw" / "Dataset501_Blobs" / "labelsTs").iterdir():
        path.write_bytes(b"garbage")
    shutil.rmtree(own_copy / "results")
    assert same_weights(first, weights(train(num_epochs=1)))
    shutil.rmtree(own_copy / "results")
    assert not same_weights(first, weights(train(num_epochs=1, seed=8)))


def test_the_target_images_do_matter(own_copy):
    first = weights(train(num_epochs=1))
    image, _ = draw_case(np.random.default_rng(5), True, (10, 36, 36))
    for path in (own_copy / "raw" / "Dataset501_Blobs" / "imagesTu").iterdir():
        write_volume(path, image[::-1].copy())
    shutil.rmtree(own_copy / "results")
    assert not same_weights(first, weights(train(num_epochs=1)))


def test_the_running_mean_goes_on_to_the_last_bit_after_any_epoch(in_workspace, monkeypatch):
    values = np.random.default_rng(0).random(40).astype(np.float32)  # as nnU-Net logs them; a checkpoint has Python's

    def log(self, _):
        self.logger.log("mean_fg_dice", values[self.current_epoch], self.current_epoch)

    monkeypatch.setattr(nnUNetTrainer, "on_validation_epoch_end", log)
    trainer = make_trainer("SourceOnlyTrainer")
    trainer.batch_size = 1
    monkeypatch.setattr(trainer.model_choice, "add", lambda *_, **__: {})

    def means(stop: int) -> list[float]:
        trainer.logger.local_logger = LocalLogger()
        for trainer.current_epoch in range(len(values)):
            trainer.on_validation_epoch_end([])
            if trainer.current_epoch == stop:
                trainer.logger.load_checkpoint(plain(trainer.logger.get_checkpoint()))
        return plain(trainer.logger.get_value("ema_fg_dice", None))

    whole = means(-1)
    assert all(means(stop) == whole for stop in range(39))


def test_a_checkpoint_with_a_plain_adam_goes_on_fused(trained):
    checkpoint = torch.load(trained, weights_only=False)
    for state in (checkpoint["optimizer_state"], *checkpoint["uda"]["optimizers"].values()):
        for group in state["param_groups"]:
            assert group["fused"]
            group["fused"] = None
    torch.save(checkpoint, trained)
    assert all(group["fused"] for one in loaded(trained).optimizers.values() for group in one.param_groups)


def test_a_checkpoint_holds_everything(in_workspace):
    trainer = train()
    again = loaded(Path(trainer.output_folder, "checkpoint_final.pth"))
    assert same_weights(weights(trainer), weights(again))
    for name, optimizer in trainer.optimizers.items():
        ours, theirs = optimizer.state_dict(), again.optimizers[name].state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours["state"].keys() == theirs["state"].keys() and ours["state"]
        for index, state in ours["state"].items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][index][key]))
    assert again.record.history == trainer.record.history
    assert set(again.record.history) >= {"segmentation", "patch_contrastive", "global_contrastive"}


@pytest.mark.draws
def test_pictures_and_logs_are_written(in_workspace):
    folder = Path(train(num_epochs=1).output_folder)
    for name in ("losses.png", "criteria.png", "progress.png", "pictures/epoch_0000.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG", name
    log = next(folder.glob("training_log*.txt")).read_text()
    assert "No target label is read" in log and "  patch_contrastive  " in log


def test_a_log_says_what_a_step_takes_and_holds_no_numpy(in_workspace, capsys):
    trainer = train("SourceOnlyTrainer", num_epochs=2, iterations_per_epoch=6)
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    assert re.search(r"2 epochs x 6 steps, [\d.]+ s each: .* left, until ", log)
    assert "Training on the CPU, with" in log and "-preset cpu" not in log, "these plans are small"
    assert re.search(r"setting +here +default\n +num_epochs +2 +200\n", log)
    assert "Pseudo dice" in log and "np." not in log and "FutureWarning" not in capsys.readouterr().err


def test_plans_for_a_gpu_are_warned_of_on_a_cpu(in_workspace, monkeypatch):
    trainer, said = make_trainer("SourceOnlyTrainer", "nnUNetPlans"), []
    monkeypatch.setattr(trainer, "print_to_log_file", said.append)
    start.new_progress(trainer)
    assert "WARNING: training on the CPU, with" in said[0] and "-from nnUNetPlans -preset cpu" in said[0]


@pytest.mark.parametrize(
    ("trainer", "options", "words"),
    [
        ("CISFANoGCLTrainer", {}, "written by CISFATrainer, not by CISFANoGCLTrainer"),
        ("SourceOnlyTrainer", {}, "written by CISFATrainer, not by SourceOnlyTrainer"),
        ("CISFATrainer", {"cisfa__foreground_weight": 3}, "other settings"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(trained, trainer, options, words):
    with pytest.raises(UDAError, match=words):
        make_trainer(trainer, **options).load_checkpoint(str(trained))


def test_a_checkpoint_of_other_plans_or_a_cut_one_is_refused(trained):
    other = make_trainer("CISFATrainer")
    other.plans_manager.plans["configurations"]["2d"]["batch_size"] = 5
    with pytest.raises(UDAError, match="other plans"):
        other.load_checkpoint(str(trained))
    trained.write_bytes(trained.read_bytes()[:5000])
    with pytest.raises(UDAError, match="cut short"):
        loaded(trained)


def test_results_of_other_settings_are_not_mixed(trained):
    with pytest.raises(UDAError, match="other settings"):
        make_trainer("CISFATrainer", iterations_per_epoch=3).run_training()


def test_a_full_disk_leaves_the_previous_checkpoint(trained):
    trainer, before = loaded(trained), trained.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # writing fails half-way, as on a full disk
    try:
        with pytest.raises(UDAError, match=r"checkpoint_final.pth could not be written.*intact"):
            trainer.save_checkpoint(str(trained))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert trained.read_bytes() == before
    assert [p.name for p in trained.parent.glob(".*.tmp")] == []
    trainer.save_checkpoint(str(trained))  # with room again


def test_a_missing_results_folder_is_explained_too(in_workspace):
    trainer = make_trainer("SourceOnlyTrainer")
    trainer.initialize()
    with pytest.raises(UDAError, match="read-only"):
        trainer.save_checkpoint("/proc/no_such_folder/checkpoint.pth")


def test_a_loss_that_becomes_nan_stops_training_with_its_name(in_workspace, monkeypatch):
    trainer = make_trainer("CISFATrainer", num_epochs=3)
    module = type(trainer).train_on.__globals__
    original, calls = module["lsgan_loss"], []

    def poisoned(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options) * (float("nan") if len(calls) > 20 else 1)

    monkeypatch.setitem(module, "lsgan_loss", poisoned)
    with pytest.raises(UDAError, match="_adversarial' became nan|_discriminator' became nan"):
        trainer.run_training()
    survivor = make_trainer("CISFATrainer", num_epochs=3)
    survivor.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_latest.pth")))
    assert all(torch.isfinite(value).all() for value in weights(survivor).values())


@pytest.mark.parametrize("name", ["nnUNet_preprocessed", "nnUNet_results"])
def test_unset_variables_are_named(in_workspace, monkeypatch, name):
    content = make_trainer("CISFATrainer").plans_manager.plans
    trainer_class = type(make_trainer("CISFATrainer"))
    monkeypatch.delenv(name)
    with pytest.raises(UDAError, match=f"export {name}="):
        trainer_class({**content, "continue_training": False}, "2d", 0, {}, torch.device("cpu"))


def test_a_device_that_is_not_there_is_named_with_what_to_add(in_workspace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trainer = make_trainer("CISFATrainer")
    arguments = {**trainer.my_init_kwargs, "device": torch.device("cuda")}
    arguments["plans"]["continue_training"] = False
    with pytest.raises(UDAError, match="-device cuda is not available; it may be cpu.*Add -device cpu"):
        type(trainer)(**arguments)


def test_bad_settings_stop_before_training(in_workspace):
    with pytest.raises(UDAError, match="'nmu_epochs'.*num_epochs"):
        make_trainer("CISFATrainer", nmu_epochs=3)
    with pytest.raises(UDAError, match="generator_width.*an integer"):
        make_trainer("CISFATrainer", cisfa__generator_width="wide")
    with pytest.raises(UDAError, match="CISFANoPCLTrainer fixes.*patch_contrastive_weight"):
        make_trainer("CISFANoPCLTrainer", cisfa__patch_contrastive_weight=1.0)


def test_a_fold_outside_the_splits_and_too_few_cases_are_refused(own_copy):
    trainer = make_trainer("CISFATrainer", fold=3)
    splits = own_copy / "preprocessed" / "Dataset501_Blobs" / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["mr_Tr00", "mr_Tr01"], "val": ["mr_Tr02"]}]))
    with pytest.raises(UDAError, match=r"fold 3 does not exist.*1 fold\(s\), 0 to 0"):
        trainer.run_training()
    splits.unlink()
    few = make_trainer("CISFATrainer")
    few.dataset_json["numTraining"] = 3
    with pytest.raises(UDAError, match=r"3 labelled source case\(s\) are too few"):
        few.run_training()


def test_fold_all_uses_every_case(in_workspace):
    trainer = train(fold="all", num_epochs=1)
    assert len(trainer.target_dataset.identifiers) == 4
    assert len(trainer.validation_dataset.identifiers) == 5


def test_regions_and_cascades_are_refused(in_workspace, monkeypatch):
    trainer = make_trainer("CISFATrainer")
    monkeypatch.setattr(trainer, "is_cascaded", True)
    with pytest.raises(UDAError, match="cascades"):
        trainer.initialize()
    with pytest.raises(UDAError, match="dataset.json of Dataset501_Blobs: region-based labels"):
        make_trainer("CISFATrainer", labels={"background": 0, "both": [1, 2], "right": 2})


def test_cases_preprocessed_with_other_labels_are_refused(in_workspace):
    trainer = make_trainer("SourceOnlyTrainer", labels={"background": 0, "left": 1})
    with pytest.raises(
        UDAError, match=r"preprocessed with the label\(s\) 2, which dataset.json does not have \(it has 1\)"
    ):
        trainer.run_training()


@pytest.mark.parametrize("augmentation", ["nnunet", "spatial", "none"])
def test_augmentation_settings_choose_transforms(in_workspace, augmentation):
    trainer = make_trainer("SourceOnlyTrainer", augmentation=augmentation, mirror=augmentation == "nnunet")
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    names = [type(t).__name__ for t in loader.data_loader.transforms.transforms]
    assert ("RandomTransform" in names) == (augmentation == "nnunet")
    assert "SpatialTransform" in names and next(loader)["data"].shape == (2, 1, 32, 32)
    assert (trainer.inference_allowed_mirroring_axes is None) == (augmentation != "nnunet")


@pytest.mark.parametrize(
    ("name", "titles"),
    [("CISFATrainer", ["source", "translated", "label", "prediction"]),
     ("SourceOnlyTrainer", ["source", "label", "prediction"]),
     ("CASTTrainer", ["source", "label", "prediction"])],
)  # fmt: skip
def test_no_unchanged_source_is_called_translated(in_workspace, monkeypatch, tmp_path, name, titles):
    trainer = make_trainer(name)
    trainer.on_train_start()
    rows = []
    monkeypatch.setattr(preview, "write_panels", lambda path, panels, structures, *_: rows.extend(panels))
    trainer.draw_pictures(tmp_path / "pictures" / "epoch_0000.png")
    assert len(rows) == preview.SLICES
    of_target = ["target", "prediction"] if trainer.needs_target else []
    for row in rows:
        assert [title.partition(":")[0] for title, _, _ in row] == [*titles, *of_target]
        assert all(image.shape == (36, 36) for _, image, _ in row), "whole slices, though the patch is smaller"
        source, *_, prediction = (image for _, image, _ in row[: len(titles)])
        assert (source == prediction).all() == (name != "CISFATrainer"), "the picture that was segmented"
        assert row[titles.index("label")][2].any(), "a slice with a structure"


def test_pictures_lie_as_the_quicklook_of_the_same_scan(in_workspace):
    trainer = make_trainer("SourceOnlyTrainer")
    trainer.on_train_start()
    case = trainer.validation_dataset.identifiers[0]
    folder = in_workspace.raw / "Dataset501_Blobs"
    cuts = quicklook.slices(
        sitk.ReadImage(str(folder / "imagesTr" / f"{case}_0000.nii.gz")),
        sitk.ReadImage(str(folder / "labelsTr" / f"{case}.nii.gz")),
    )
    _, shown, _ = cuts["axial"]
    label = trainer.validation_dataset.load_case(case)[1][:][0]
    assert shown.any() and any((preview.as_seen(cut, preview.REORIENTED) == shown).all() for cut in label)
    assert preview.orientation(preview.REORIENTED, 0).startswith("Axial: anterior is up, the patient's right is on")
    assert preview.orientation("SimpleITKIO", 0) is None
    assert (preview.as_seen(label[5], "SimpleITKIO") == label[5]).all(), "files' own order is left alone"


@pytest.mark.parametrize(
    ("held", "number", "slices"),
    [([4, 5, 6, 7, 8, 9], 3, [5, 7, 9]), ([3], 3, [3]), ([], 3, [6, 10, 13]), ([], 1, [10]), ([2, 17], 2, [2, 17])],
)
def test_which_slices_are_shown(held, number, slices):
    label = np.zeros((20, 2, 2))
    label[held] = 1
    assert preview.shown_slices(label, number) == slices


def test_curves_are_drawn_in_a_style_of_their_own_whatever_a_process_has_set(tmp_path):
    history = {"agreement": [0.5], "snd": [1.0, float("nan"), 2.0]}
    pictures.plot_curves(tmp_path / "a.png", history, thresholds={"agreement": (0.85, "not adapted")})
    before = matplotlib.rcParams["font.size"]
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red", "lines.linewidth": 9}):
        pictures.plot_curves(tmp_path / "b.png", history, thresholds={"agreement": (0.85, "not adapted")})
        assert matplotlib.rcParams["font.size"] == 40, "and what was set is set again"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert matplotlib.rcParams["font.size"] == before


@pytest.mark.parametrize("columns", [2, 5])
def test_a_title_stays_within_its_picture(monkeypatch, tmp_path, columns):
    seen = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: seen.append(figure))
    title = f"CASTTrainer, epoch 2\n{preview.orientation(preview.REORIENTED, 0)}"
    pictures.write_panels(tmp_path / "a.png", [[("target", np.eye(9), None)] * columns], ["left"], title)
    [figure] = seen
    figure.canvas.draw()
    extent = figure._suptitle.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width and extent.y1 <= figure.bbox.height
    matplotlib.pyplot.close(figure)


def test_running_means_start_without_bias_and_pass_over_gaps():
    means = pictures.running_mean([2.0, float("nan"), 4.0])
    assert means[0] == means[1] == pytest.approx(2) and means[2] == pytest.approx((0.16 * 2 + 0.2 * 4) / 0.36)
    assert np.isnan(pictures.running_mean([float("nan")])[0])


def test_source_only_needs_no_target(own_copy):
    shutil.rmtree(own_copy / "raw" / "Dataset501_Blobs" / "imagesTu")
    trainer = train("SourceOnlyTrainer", num_epochs=1)
    assert list(trainer.record.history) == ["segmentation"]


def test_worker_processes_serve_both_streams(in_workspace, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = train(num_epochs=1)
    assert trainer.dataloader_target.num_processes == 1
    assert np.isfinite(trainer.record.history["segmentation"]).all()


def test_terms_in_parts_make_the_step_of_their_sum(in_workspace):
    found = []
    for parts in ([{"a": 1.0, "b": 2.0}], [{"a": 0.25}, {"b": 2.0}, {"a": 0.75}]):
        trainer = make_trainer("SourceOnlyTrainer")
        trainer.initialize()
        with trainer.updating("segmenter", max_norm=1e3) as add:
            for part in parts:
                size = sum(p.square().sum() for p in trainer.network.parameters())
                add({name: factor * size for name, factor in part.items()})
        found.append((weights(trainer), {name: value.item() for name, value in trainer.updates.terms.items()}))
    (whole, logged), (of_parts, sums) = found
    assert sums == pytest.approx(logged) and logged["b"] == pytest.approx(2 * logged["a"])
    for name, value in whole.items():
        torch.testing.assert_close(value, of_parts[name])


def test_denormal_numbers_are_0_in_training_and_distances_are_measured_after_it(in_workspace, monkeypatch):
    """scipy's KDTree, built on the surface that most voxels share, ends the process where they are 0."""
    trainer, seen = make_trainer("SourceOnlyTrainer", num_epochs=1, iterations_per_epoch=1), []
    train_on = trainer.train_on
    tiny = torch.full((1,), 1e-39)
    monkeypatch.setattr(trainer, "train_on", lambda *batch: (seen.append((tiny * 1).item()), train_on(*batch)))
    trainer.run_training()
    assert seen == [0] and (tiny * 1).item() > 0
