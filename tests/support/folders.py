"""nnU-Net's folders of one test, and the message of a command that refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import litter

from support.scans import names


def use_folders(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """nnU-Net's three folders below ``root``, each called as its variable."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(root / variable))


def check_litter(convert: Callable[..., Path], tree: Path) -> None:
    """What systems leave beside files is passed over by ``convert(tree, d=...)``."""
    clean = convert(tree)
    litter(tree)
    littered = convert(tree, d="599")
    for folder in [path for path in clean.iterdir() if path.is_dir()]:
        assert names(littered / folder.name) == names(folder) != []


def refusal(capsys: pytest.CaptureFixture, command: Callable[..., object], *arguments, **options) -> str:
    """What ``command`` says behind ERROR when it ends with status 1."""
    with pytest.raises(SystemExit) as exit_:
        command(*arguments, **options)
    assert exit_.value.code == 1
    return capsys.readouterr().err.split("ERROR: ")[1]
