"""A raw new scan is predicted as the clipped one, whoever calls nnU-Net's predictor; and what goes wrong is said."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import make_trainer, two_geometries
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.inference.data_iterators import preprocessing_iterator_fromfiles
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_uda.data import new_scans
from nnunet_uda.data.new_scans import NewScans, check_prediction, clip_scan, treat_new_scans
from nnunet_uda.errors import UDAError, print_without_traceback
from nnunet_uda.images.intensities import Intensities
from nnunet_uda.training import start
from nnunet_uda.training.uda_trainer import UDATrainer

WINDOW = Intensities(window=(-100, 200), origin="preset abdomen")
PERCENTILES = Intensities((10, 70))


def of(target: Intensities | None, source: Intensities | None = None) -> dict:
    return {name: i and i.to_json() for name, i in (("source", source), ("target", target))}


@pytest.fixture
def model(in_workspace, request) -> Path:
    """A model folder with random weights, as training writes it, of a dataset that was clipped."""
    trainer = make_trainer("SourceOnlyTrainer")
    trainer.dataset_json["uda"]["intensities"] = of(getattr(request, "param", WINDOW))
    torch.manual_seed(0)
    trainer.initialize()
    folder = Path(trainer.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
    (folder.parent / "dataset.json").write_text(json.dumps(trainer.dataset_json))
    for name in ("progress.png", "validation/summary.json", "../dataset_fingerprint.json"):  # an export wants them
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    torch.save(
        {
            "trainer_name": "SourceOnlyTrainer", "init_args": {"configuration": "2d"},
            "network_weights": trainer.network.state_dict(), "inference_allowed_mirroring_axes": None,
        },
        folder / "checkpoint_final.pth",
    )  # fmt: skip
    return folder.parent


def scans(workspace, tmp_path: Path, intensities: Intensities) -> tuple[str, str]:
    """A raw scan of the test set, and the same clipped as files."""
    raw = workspace.raw / "Dataset501_Blobs" / "imagesTs" / "ct_Ts00_0000.nii.gz"
    clipped = tmp_path / "clipped_0000.nii.gz"
    sitk.WriteImage(intensities.apply(sitk.ReadImage(str(raw)), raw), str(clipped))
    return str(raw), str(clipped)


def predictor(folder: Path) -> nnUNetPredictor:
    made = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    made.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    return made


def sequential(made: nnUNetPredictor, *files: str) -> list[np.ndarray]:
    """As ``nnUNetv2_predict -npp 0``: probabilities."""
    return [made.predict_from_files_sequential([[file]], None, save_probabilities=True)[0][1] for file in files]


@pytest.mark.parametrize("model", [WINDOW, PERCENTILES, Intensities((5, 95), (-1, 1))], indirect=True, ids=str)
def test_without_workers_and_arrays_and_after_a_zip(model, in_workspace, tmp_path, monkeypatch):
    content = json.loads((model / "dataset.json").read_text())["uda"]["intensities"]["target"]
    intensities = new_scans.read_intensities({"uda": {"intensities": content}}, "")
    made = predictor(model)
    raw, clipped = scans(in_workspace, tmp_path, intensities)
    of_raw, of_clipped = sequential(made, raw, clipped)
    assert np.array_equal(of_raw, of_clipped)

    image, properties = SimpleITKIOWithReorient().read_images([raw])
    single = made.predict_single_npy_array(image, properties, save_or_return_probabilities=True)[1]
    assert np.allclose(single, of_raw, atol=1e-3)

    made.configuration_manager.__class__ = ConfigurationManager  # nnU-Net's own: the scan as it is
    assert not np.allclose(sequential(made, raw)[0], of_raw, atol=1e-3)

    export_pretrained_model(
        "Dataset501_Blobs", str(tmp_path / "model.zip"), ("2d",), "SourceOnlyTrainer", "tiny", (0,), strict=False
    )
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    install_model_from_zip_file(str(tmp_path / "model.zip"))
    imported = next((tmp_path / "elsewhere").rglob("plans.json")).parent
    assert imported.name == model.name and tmp_path / "elsewhere" in imported.parents
    assert np.array_equal(sequential(predictor(imported), raw)[0], of_raw)


@pytest.mark.slow
def test_with_worker_processes(model, in_workspace, tmp_path):
    raw, clipped = scans(in_workspace, tmp_path, WINDOW)
    made = predictor(model)
    found = made.predict_from_files([[raw], [clipped]], None, True, True, 2, 1)
    assert np.array_equal(found[0][1], found[1][1])
    assert np.allclose(found[0][1], sequential(made, raw)[0], atol=1e-3)


def test_the_plans_and_what_is_trained_on_stay(in_workspace):
    trainer = make_trainer("SourceOnlyTrainer")
    before = json.dumps(trainer.configuration_manager.configuration), json.dumps(trainer.plans_manager.plans)
    trainer.initialize()
    after = json.dumps(trainer.configuration_manager.configuration), json.dumps(trainer.plans_manager.plans)
    assert after == before
    assert issubclass(trainer.configuration_manager.preprocessor_class, NewScans)
    assert PlansManager(trainer.plans_manager.plans).get_configuration("2d").preprocessor_class is DefaultPreprocessor
    again = pickle.loads(pickle.dumps(trainer.configuration_manager))
    assert again.preprocessor_class is trainer.configuration_manager.preprocessor_class
    treat_new_scans(again, trainer.plans_manager)
    assert again.preprocessor_class is trainer.configuration_manager.preprocessor_class


def test_every_trainer_treats_new_scans(in_workspace):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    for name in ("CISFATrainer", "SimilarityPrototypesTrainer", "UUDSTrainer", "UUDSAdversarialTrainer"):
        assert hasattr(recursive_find_trainer_class_by_name(name).build_network_architecture, "__wrapped__")

    class Own(UDATrainer):
        @staticmethod
        def build_network_architecture(plans_manager, configuration_manager, *others):
            return torch.nn.Identity()

    trainer = make_trainer("SourceOnlyTrainer")
    configuration = trainer.configuration_manager
    assert not issubclass(configuration.preprocessor_class, NewScans)
    Own.build_network_architecture(trainer.plans_manager, configuration, 1, 2)
    assert issubclass(configuration.preprocessor_class, NewScans)


# --- one scan ---------------------------------------------------------------------------------------------------------


def ct(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 300, (1, 4, 16, 16))
    return values.round().astype(np.float32)


def dataset(target: Intensities | None, source: Intensities | None = None) -> dict:
    return {"uda": {"intensities": of(target, source)}, "channel_names": {"0": "intensity"}}


def test_the_domain_of_new_scans(monkeypatch):
    both = dataset(WINDOW, Intensities(window=(0, 80)))
    assert clip_scan(ct(), both, ["a"]).max() == 200
    monkeypatch.setenv("NNUNET_UDA_DOMAIN", "source")
    assert clip_scan(ct(), both, ["a"]).max() == 80
    assert (clip_scan(ct(), dataset(WINDOW), ["a"]) == ct()).all()
    monkeypatch.setenv("NNUNET_UDA_DOMAIN", "mr")
    with pytest.raises(UDAError, match="NNUNET_UDA_DOMAIN=mr: expected source or target"):
        clip_scan(ct(), both, ["a"])


class Stock:
    """A preprocessor that reads one scan of noise, ``voxel`` its first voxel."""

    voxel = 1.0
    spacing: Sequence[float] = (1, 1, 1)

    def run_case(self, image_files, seg_file, *managers):
        scan = np.random.default_rng(0).normal(0, 100, (len(image_files), 4, 6, 8)).astype(np.float32)
        scan[0, 0, 0, 0] = self.voxel
        return self.run_case_npy(scan, seg_file, {"spacing": self.spacing}, *managers)

    def run_case_npy(self, data, seg, properties, *managers):
        return data


def preprocess(path: Path, voxel: float, spacing: Sequence[float] = (1, 1, 1), *others: Path) -> np.ndarray:
    made = new_scans._before(Stock)()
    made.voxel, made.spacing = voxel, spacing
    source = [1, 1, 1]
    plans = SimpleNamespace(
        original_median_spacing_after_transp=source, transpose_forward=[0, 1, 2],
        plans={"original_median_spacing_after_transp": source}, image_reader_writer_class=SimpleITKIOWithReorient,
    )  # fmt: skip
    configuration = SimpleNamespace(patch_size=(6, 8), spacing=(1, 1))
    files = [str(path), *map(str, others)]
    return made.run_case(files, None, plans, configuration, {"channel_names": {"0": "T1"}})


def scan_file(path: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 6, 8), np.float32)), str(path))
    return path


def test_a_geometry_that_programs_read_differently_is_refused_and_a_guessed_one_said(tmp_path, capsys):
    path = scan_file(tmp_path / "a_0000.nii.gz")
    preprocess(path, 1.0)
    assert capsys.readouterr().out == ""
    with pytest.raises(UDAError, match=r"a_0000\.nii\.gz: its header holds two geometries .*mirrored.*copysform2qform"):
        preprocess(two_geometries(path), 1.0)
    bare = scan_file(tmp_path / "b.nrrd").read_bytes()
    lines = [line for line in bare.split(b"\n\n")[0].split(b"\n") if not line.startswith((b"space", b"kinds"))]
    (tmp_path / "b.nrrd").write_bytes(b"\n".join(lines) + bare[bare.index(b"\n\n") :])
    preprocess(tmp_path / "b.nrrd", 1.0)
    assert "WARNING: b.nrrd: its header holds no voxel size" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "mha"])
def test_a_short_file_is_refused(tmp_path, ending):
    """ITK pads a NIfTI with zeros, and nnU-Net would predict them."""
    path = scan_file(tmp_path / f"a_0000.{ending}")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UDAError, match=rf"a_0000\.{ending}: .*(truncated|cannot be read|announced)"):
        preprocess(path, 1.0)
    with pytest.raises(UDAError, match="gone.nii.gz: there is no such file"):
        preprocess(tmp_path / "gone.nii.gz", 1.0)


@pytest.mark.parametrize("spacing", [1000.0, 0.001, 0.0, np.nan])
def test_a_scan_of_another_order_is_refused_before_it_is_resampled(tmp_path, spacing):
    path = scan_file(tmp_path / "a_0000.nii.gz")
    with pytest.raises(UDAError, match=r"a_0000\.nii\.gz: its voxels are .* those of the source 1 x 1 x 1 mm"):
        preprocess(path, 1.0, [spacing] * 3)


@pytest.mark.parametrize("voxel", [np.nan, np.inf, -3.4e38])
def test_values_that_no_scan_has_are_refused(tmp_path, voxel):
    with pytest.raises(UDAError, match="a_0000.nii.gz: .*expected (finite numbers|numbers below)"):
        preprocess(scan_file(tmp_path / "a_0000.nii.gz"), voxel)


def test_what_is_no_volume_is_refused(tmp_path):
    """nnU-Net would end in ITK's words on the length of a matrix."""
    sitk.WriteImage(sitk.JoinSeries([sitk.Image(4, 6, 8, sitk.sitkInt16)] * 2), str(tmp_path / "a_0000.nii.gz"))
    with pytest.raises(UDAError, match=r"a_0000\.nii\.gz: the image has 4 dimensions.*Split a 4D file"):
        preprocess(tmp_path / "a_0000.nii.gz", 1.0)


def test_channels_on_other_grids_are_refused(tmp_path):
    first, second = (scan_file(tmp_path / f"a_000{channel}.nii.gz") for channel in range(2))
    image = sitk.ReadImage(str(second))
    image.SetOrigin((3.0, 0.0, 0.0))
    sitk.WriteImage(image, str(second))
    with pytest.raises(UDAError, match=r"a_0001\.nii\.gz: its geometry differs from that of .*a_0000\.nii\.gz: origin"):
        preprocess(first, 1.0, (1, 1, 1), second)


def test_another_number_of_channels_is_refused(tmp_path):
    """nnU-Net would end in torch's words on the first layer."""
    files = [scan_file(tmp_path / f"a_000{channel}.nii.gz") for channel in range(2)]
    with pytest.raises(UDAError, match=r"a_0000.nii.gz, .*a_0001.nii.gz: 2 channel\(s\); expected 1, .*\(T1\)"):
        preprocess(files[0], 1.0, (1, 1, 1), files[1])


def test_nnunets_own_command_ends_by_one_message_of_a_worker_and_one_of_its_starter(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a_0000.nii.gz"
    path.write_bytes(b"no image")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "nnUNetv2_predict")
    with pytest.raises(SystemExit) as end:
        preprocess(path, 1.0)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith(f"ERROR: {path}: cannot be read") and said.count("\n") == 1
    dead = "Background workers died. Look for the error message further up!"
    print_without_traceback(RuntimeError, RuntimeError(dead), None)
    assert capsys.readouterr().err == f"ERROR: {dead}\n"
    assert "Background workers died" in inspect.getsource(preprocessing_iterator_fromfiles), "as this nnU-Net says it"


def test_what_does_not_look_like_the_target_is_said(capsys):
    clip_scan(ct(), dataset(WINDOW), ["a.nii.gz"])
    assert capsys.readouterr().out == ""
    with pytest.raises(UDAError, match=r"a\.nii\.gz: its values are .*all outside of the window -100 to 200 HU"):
        clip_scan(np.abs(ct()) + 1000, dataset(WINDOW), ["a.nii.gz"])
    assert "WARNING: a.nii.gz: its values are" in capsys.readouterr().out
    flat = np.zeros((1, 4, 16, 16), np.float32)
    flat[:, 1:3] = 5
    flat[0, 1, 1, 1] = 7
    assert (clip_scan(flat, dataset(PERCENTILES), ["b.nii.gz"]) == flat).all()
    assert "WARNING: b.nii.gz: percentiles 10 and 70" in capsys.readouterr().out


# --- the check at the start of training -------------------------------------------------------------------------------


def checked(trainer, intensities: Intensities | None) -> None:
    trainer.dataset_json["uda"]["intensities"] = of(intensities)
    check_prediction(
        "SourceOnlyTrainer", trainer.network, trainer.plans_manager.plans, "2d", trainer.dataset_json
    )  # fmt: skip


def test_the_check_passes_and_fails_where_nnunet_goes_another_way(in_workspace, monkeypatch):
    trainer = make_trainer("SourceOnlyTrainer")
    trainer.initialize()
    for intensities in (WINDOW, PERCENTILES, Intensities((5, 95), (-1, 1)), None):
        checked(trainer, intensities)

    with monkeypatch.context() as patch:
        patch.setattr(new_scans, "treat_new_scans", lambda configuration, plans: None)
        with pytest.raises(UDAError, match="does not predict with the intensities that the dataset was converted with"):
            checked(trainer, WINDOW)
        checked(trainer, None)
    with monkeypatch.context() as patch:  # what workers unpickle is nnU-Net's own
        reduce = lambda self, protocol: (ConfigurationManager, (self.configuration,))  # noqa: E731
        patch.setattr(new_scans.NewScansConfiguration, "__reduce_ex__", reduce, raising=False)
        with pytest.raises(UDAError, match="does not predict with the intensities"):
            checked(trainer, WINDOW)
    with monkeypatch.context() as patch:  # a preprocessor that no longer goes through run_case_npy's own arguments
        patch.setattr(NewScans, "run_case_npy", DefaultPreprocessor.run_case_npy)
        with pytest.raises(UDAError, match="does not predict with the intensities"):
            checked(trainer, WINDOW)


def test_training_checks_first_and_draws_no_random_number(in_workspace, monkeypatch):
    calls = []
    trainer = make_trainer("SourceOnlyTrainer", seed=3)
    trainer.initialize()
    monkeypatch.setattr("nnunet_uda.training.start.check_prediction", lambda *arguments: calls.append(torch.rand(3)))
    before = torch.get_rng_state()
    start.try_prediction(trainer)
    assert torch.equal(torch.get_rng_state(), before) and len(calls) == 1
    monkeypatch.setattr(
        "nnunet_uda.training.start.check_prediction", lambda *arguments: (_ for _ in ()).throw(UDAError("no"))
    )
    with pytest.raises(UDAError, match="no"):
        trainer.on_train_start()
    assert not list(Path(trainer.output_folder).rglob("*.pth"))


def test_a_full_folder_for_temporary_files_is_named(in_workspace, monkeypatch):
    trainer = make_trainer("SourceOnlyTrainer")
    trainer.initialize()

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        UDAError, match=r"checkpoint_final\.pth: cannot be written whole \(.*unexpected pos.* free there"
    ):
        checked(trainer, WINDOW)
