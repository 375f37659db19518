"""Listing of folders: what systems leave beside files is no data, and what cannot be listed is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import litter

from nnunet_uda.errors import UDAError
from nnunet_uda.images.listing import entries, files_in, folders_below, folders_in, folders_named, passed_over


def test_names_that_are_no_data():
    left = "._a.nii.gz .DS_Store __MACOSX Thumbs.db desktop.ini DESKTOP.INI @eaDir lost+found ~$a.nii.gz"
    for name in left.split():
        assert passed_over(name)
    for name in ("a.nii.gz", "_a.dcm", "Thumbs.dbx", "DICOM", "1.2.3", "~a.nii.gz"):
        assert not passed_over(name)


def test_a_littered_tree_lists_as_a_clean_one(tmp_path):
    for name in ("b/2.dcm", "b/1.dcm", "a/c/x.nii.gz", "note"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "b" / "link.dcm").symlink_to(tmp_path / "nowhere")

    def listed() -> tuple:
        below = [folder.relative_to(tmp_path).as_posix() for folder in folders_below(tmp_path)]
        return below, *([path.name for path in kind(tmp_path)] for kind in (entries, files_in, folders_in))

    clean = listed()
    assert clean == ([".", "a", "a/c", "b"], ["a", "b", "note"], ["note"], ["a", "b"])
    litter(tmp_path)
    assert listed() == clean
    assert [path.name for path in files_in(tmp_path / "b")] == ["1.dcm", "2.dcm", "link.dcm"]  # not missed in silence


def test_folders_and_pipes_that_are_called_as_images_are_not_missed_in_silence(tmp_path):
    for name in ("a.nii.gz", "b.MHA", "c"):
        (tmp_path / name).mkdir()
    for name in ("d.nii", "e"):
        os.mkfifo(tmp_path / name)
    assert [path.name for path in files_in(tmp_path)] == ["a.nii.gz", "b.MHA", "d.nii"]
    assert [path.name for path in folders_in(tmp_path)] == ["c"] and len(list(folders_below(tmp_path))) == 2


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert len(list(folders_below(tmp_path))) == 2


def test_a_link_to_a_folder_that_is_gone_is_not_missed(tmp_path):
    (tmp_path / "notes.txt").symlink_to(tmp_path / "nowhere")
    assert folders_in(tmp_path) == []
    (tmp_path / "patient002").symlink_to("/mnt/unmounted/patient002")
    with pytest.raises(UDAError, match=r"patient002: a link to /mnt/unmounted/patient002, where there is nothing"):
        folders_in(tmp_path)


def test_folders_of_cases_are_found_by_name_and_none_is_missed(tmp_path):
    def named(begins: str = "") -> list[str]:
        return [path.name for path in folders_named(tmp_path, r"patient\d+", "patient001", begins)]

    for name in ("patient001", "Patient002", "other"):
        (tmp_path / name).mkdir()
    for name in ("patient.txt", "patient003.nii.gz", "patient001.zip"):
        (tmp_path / name).touch()
    assert named() == named("patient") == ["Patient002", "patient001"]
    for name in ("patient004", "patient004.tar.gz", "patient004.zip"):
        (tmp_path / name).touch()
        with pytest.raises(UDAError, match=f"{name}: a file; expected a folder, like patient001. Unpack it"):
            named()
        (tmp_path / name).unlink()
    (tmp_path / "patient004 copy").mkdir()
    assert named() == ["Patient002", "patient001"]
    with pytest.raises(UDAError, match="patient004 copy: unexpected folder; expected names like patient001"):
        named("patient")


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    with pytest.raises(UDAError, match="nowhere: cannot be listed"):
        files_in(tmp_path / "nowhere")

    def refused(path: Path) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(UDAError, match=r"cannot be listed \(Permission denied\)"):
        entries(tmp_path)
