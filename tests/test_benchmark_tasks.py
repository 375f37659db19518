"""The tasks that trainers are compared on: what is made where, and what their datasets hold."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from support.folders import use_folders

from nnunet_uda.commands.convert import main as convert_main
from nnunet_uda.errors import UDAError

pytestmark = pytest.mark.slow

DATA = os.environ.get("NNUNET_UDA_TEST_DATA")


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    monkeypatch.delitem(sys.modules, "benchmarks.accuracy.tasks", raising=False)
    module = importlib.import_module("benchmarks.accuracy.tasks")
    monkeypatch.delenv("NNUNET_UDA_TEST_DATA", raising=False)
    return module


@pytest.fixture
def log(tasks, monkeypatch):
    """Commands that would run; scans appear at once."""
    seen = []

    def run(demo, *words, **variables):
        words = [str(word) for word in words]
        seen.append(words)
        if words[0] == sys.executable:
            out = Path(words[words.index("-o") + 1])
            for part in ("mr_train", "ct_train") if "phantom" in words[2] else ("T1", "T2"):
                (out / part).mkdir(parents=True)

    monkeypatch.setattr(tasks.Demo, "run", run)
    return seen


@pytest.fixture
def scans(tmp_path):
    """A folder like the one of third-party scans, whose files are empty."""
    data = tmp_path / "data"

    def put(folder: str, *stems: str) -> None:
        for stem in stems:
            (data / folder).mkdir(parents=True, exist_ok=True)
            (data / folder / f"{stem}.nii.gz").touch()

    for name, source, target, sides in (
        ("cardiac_cine_to_lge", "abcd", "efg", ("", )), ("brain_tissue_t1_to_t2", "abc", "xyz", ("",)),
        ("spinal_cord_t2star_to_t1w", "abc", "yz", ("", "_t2w")), ("brain_tumour_t1c_to_flair", "abc", "xyz", ("",)),
    ):  # fmt: skip
        for part in ("images", "labels"):
            put(f"{name}/source_{part}", *source)
            for side in sides:
                put(f"{name}/target_{part}{side}", *target)
    put("cardiac_cine_to_lge/test_images", *"uv")
    put("cardiac_cine_to_lge/test_labels", *"uv")
    put("totalseg", "example_ct_sm", "example_seg", "example_mr_sm", "example_seg_mr")
    put("vs", *(f"vs_gk_{scan}{end}" for scan in ("99_t1", "98_t2", "95_t2", "9_t2") for end in ("", "_seg")))
    return data


def of(words, option: str) -> list[str]:
    """The values of an option, as names without folder and ending."""
    rest = words[words.index(option) + 1 :] if option in words else []
    values = rest[: next((i for i, word in enumerate(rest) if word.startswith("-")), None)]
    return [Path(value).name.removesuffix(".nii.gz") for value in values]


def converted(log) -> dict[str, list[str]]:
    return {words[words.index("-d") + 1]: words for words in log if words[0] == "nnUNetUDA_convert"}


def test_every_real_task_is_made_with_its_upper_bounds(tasks, log, scans, tmp_path):
    tasks.main(["-o", str(tmp_path / "out"), "-data", str(scans)])
    words = converted(log)
    assert list(words) == [str(i) for name in tasks.GROUPS["real"] for i in
                           (tasks.TASKS[name].dataset, *tasks.TASKS[name].bounds)]  # fmt: skip
    assert not [w for w in log if "-m" in w]
    planned = [of(w, "-d") for w in log if w[0] == "nnUNetv2_plan_and_preprocess"]
    assert [i for ids in planned for i in ids] == list(words)
    configured = {of(w, "-d")[0]: w for w in log if w[0] == "nnUNetUDA_configure"}
    assert list(configured) == list(words)
    assert {tuple(of(w, "-patch_size")) for i, w in configured.items() if i < "580"} == {("96", "96")}
    assert of(configured["581"], "-patch_size") == ["32"] * 3 and of(configured["581"], "-c") == ["3d_fullres"]
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.json")) == sorted(tasks.GROUPS["real"])


def test_target_labels_never_go_into_an_adaptation_with_a_test_part(tasks, log, scans, tmp_path):
    tasks.main(["-o", str(tmp_path / "out"), "-data", str(scans)])
    for number, words in converted(log).items():
        bound = "--upper_bound" in words
        assert bound == (number in {str(i) for task in tasks.TASKS.values() for i in task.bounds})
        assert bound or not (of(words, "-target_labels") and of(words, "-target_test_images"))


def test_a_scan_left_out_is_the_test_and_two_scans_are_joined_by_the_source(tasks, scans, tmp_path):
    def parts(name: str) -> list[tuple]:
        upper = tasks.conversions(name, tmp_path, scans)[1:]
        return [("".join(of(w, "-target_images")), *of(w, "-target_test_images")) for w in upper]

    assert parts("brain") == parts("tumour") == parts("brain_3d") == [("yz", "x"), ("xz", "y"), ("xy", "z")]
    assert parts("cord_t1w") == parts("cord_t2w") == [("abcz", "y"), ("abcy", "z")]
    assert parts("heart") == [("target_images", "test_images")]  # folders with nothing else in them
    assert parts("totalseg") == parts("vs_back") == []
    for name in ("brain", "cord_t2w", "heart"):
        for words in tasks.conversions(name, tmp_path, scans):
            for images, labels in (
                ("-target_images", "-target_labels"),
                ("-target_test_images", "-target_test_labels"),
            ):
                if of(words, labels):
                    assert [name.replace("images", "labels") for name in of(words, images)] == of(words, labels)
    side = tasks.conversions("cord_t2w", tmp_path, scans)[0]
    assert of(side, "-target_images") == ["target_images_t2w"] and of(side, "-target_labels") == ["target_labels_t2w"]


def test_phantoms_are_made_and_called_so(tasks, log, tmp_path):
    tasks.main(["-o", str(tmp_path), "-groups", "phantom", "-seed", "3", "-data", str(tmp_path / "data")])
    made = [words for words in log if words[0] == sys.executable]
    assert [(w[2] if w[1] == "-m" else Path(w[1]).name, of(w, "-seed")) for w in made] == [
        ("nnunet_uda.demo.phantom", ["3"]),
        ("brain.py", ["3"]),
    ]
    assert list(converted(log)) == ["501", "511", "502", "512", "531", "533", "532", "534"]
    patches = {of(w, "-d")[0]: of(w, "-patch_size")[0] for w in log if w[0] == "nnUNetUDA_configure"}
    assert {patch for dataset, patch in patches.items() if dataset < "520"} == {"64"}
    assert all(name.startswith("phantom") for name in tasks.GROUPS["phantom"])


def test_what_is_whole_is_not_made_again_and_what_is_not_goes_on(tasks, log, tmp_path, monkeypatch, capsys, refused):
    arguments = ["-o", str(tmp_path), "-tasks", "phantom_mr2ct", "phantom_ct2mr"]
    run = tasks.Demo.run

    def fail_at_planning(demo, *words, **variables):
        if words[0] == "nnUNetv2_plan_and_preprocess" and "502" in words:
            raise UDAError("ended with status 1")
        run(demo, *words, **variables)

    monkeypatch.setattr(tasks.Demo, "run", fail_at_planning)
    assert "ended with status 1" in refused(tasks.main, arguments)
    assert [p.name for p in tmp_path.glob("*.json")] == ["phantom_mr2ct.json"]
    monkeypatch.setattr(tasks.Demo, "run", run)
    log.clear()
    tasks.main(arguments)
    assert list(converted(log)) == ["502", "512"] and not [w for w in log if "-m" in w]
    assert all("--overwrite" in w for w in converted(log).values())
    log.clear()
    tasks.main(arguments)
    assert log == [] and "phantom_ct2mr: whole already" in capsys.readouterr().out


def test_half_a_phantom_is_made_anew(tasks, log, tmp_path):
    (tmp_path / "phantom" / "mr_train").mkdir(parents=True)
    tasks.main(["-o", str(tmp_path), "-tasks", "phantom_mr2ct"])
    assert len([w for w in log if "-m" in w]) == 1


def test_a_task_may_move_but_not_change(tasks, log, scans, tmp_path, refused):
    arguments = ["-tasks", "vs", "-data", str(scans)]
    tasks.main(["-o", str(tmp_path / "a"), *arguments])
    shutil.move(tmp_path / "a", tmp_path / "b")
    log.clear()
    tasks.main(["-o", str(tmp_path / "b"), *arguments])
    assert log == []
    path = tmp_path / "b" / "vs.json"
    path.write_text(path.read_text().replace("96 96", "64 64"))
    said = refused(tasks.main, ["-o", tmp_path / "b", *arguments])
    assert "vs.json was written for another form of this task" in said


@pytest.mark.parametrize(("more", "said"), [
    ([], "vs needs third-party scans: give their folder with -data"),
    (["-data", "empty"], "vs does not hold vs_gk_99_t1"),
])  # fmt: skip
def test_scans_of_others_must_be_given_and_be_there(tasks, tmp_path, refused, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(tasks.main, ["-o", "out", "-tasks", "vs", *more])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(DATA is None, reason="NNUNET_UDA_TEST_DATA is not set: no real scans to convert")
@pytest.mark.parametrize(("name", "dataset", "labelled", "unlabelled", "tested"), [
    ("vs", "Dataset523_VsSupervised", ["hrT2_vs_gk_95_t2", "hrT2_vs_gk_98_t2"], [], ["hrT2_vs_gk_9_t2"]),
    ("vs_back", "Dataset525_VsBack", [f"hrT2_vs_gk_{i}_t2" for i in (95, 98, 9)], ["ceT1_vs_gk_99_t1"],
     ["ceT1_vs_gk_99_t1"]),
    ("totalseg", "Dataset521_Totalseg", ["CT_example_ct_sm"], ["MR_example_mr_sm"], ["MR_example_mr_sm"]),
    ("totalseg_back", "Dataset524_TotalsegBack", ["MR_example_mr_sm"], ["CT_example_ct_sm"], ["CT_example_ct_sm"]),
    ("cord_t1w", "Dataset563_CordT1wSupervised",
     [f"T1w_t2s_{i}" for i in (10062, 9418, 9584, 9604, 9669, 9709)] + ["t1w_errsm30"], [], ["t1w_unf01"]),
])  # fmt: skip
def test_the_real_scans_make_these_datasets(tasks, tmp_path, monkeypatch, name, dataset, labelled, unlabelled, tested):
    data = Path(DATA)
    if not (data / tasks.TASKS[name].scans).is_dir():
        pytest.skip(f"{data / tasks.TASKS[name].scans} does not exist")
    use_folders(monkeypatch, tmp_path)
    for _ in range(2):  # again, as after a stop
        commands = tasks.conversions(name, tmp_path, data)
    (words,) = (words for words in commands if f"Dataset{of(words, '-d')[0]}_{of(words, '-name')[0]}" == dataset)
    convert_main([*words[1:], "-np", "1"])
    found = {folder: sorted(p.name.removesuffix(".nii.gz").removesuffix("_0000") for p in path.iterdir())
             for folder in ("labelsTr", "imagesTu", "labelsTs")
             if (path := tmp_path / "nnUNet_raw" / dataset / folder).is_dir()}  # fmt: skip
    wanted = {"labelsTr": sorted(labelled), "imagesTu": unlabelled, "labelsTs": tested}
    assert found == {folder: names for folder, names in wanted.items() if names}


@pytest.mark.slow
def test_a_phantom_task_from_nothing_to_plans(tasks, tmp_path):
    tasks.main(["-o", str(tmp_path), "-tasks", "phantom_mr2ct", "-seed", "5", "-np", "1"])
    for dataset in ("Dataset501_Phantom", "Dataset511_PhantomSupervised"):
        plans = json.loads((tmp_path / "nnUNet_preprocessed" / dataset / f"{tasks.PLANS}.json").read_text())
        assert plans["configurations"]["2d"]["patch_size"] == [64, 64] and plans["uda"]["seed"] == 5
    assert (tmp_path / "nnUNet_preprocessed/Dataset501_Phantom/nnUNetPlans_2d_target").is_dir()
