"""nnU-Net's folders of one test, a vendor's tree in it, a converter, and the message of a command that refuses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_uda.commands.convert import main


def use_folders(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """nnU-Net's three folders below ``root``, each called as its variable."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(root / variable))


def vendor_fixtures(make: Callable[[Path], object]) -> tuple[Any, Any]:
    """The fixtures ``made``, a tree that ``make`` makes once a module, and one with a copy of it for each test.

    The copy is in ``tmp_path / "vendor"``, nnU-Net's folders beside it.
    """

    @pytest.fixture(scope="module")
    def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("made") / "vendor"
        make(folder)
        return folder

    @pytest.fixture
    def tree(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        use_folders(monkeypatch, tmp_path)
        return Path(shutil.copytree(made, tmp_path / "vendor"))

    return made, tree


def converter(name: str, d: str, *usual: str, source: str = "", target: str = "") -> tuple[Callable, Any]:
    """A converter's ``convert(tree, *options, source=, target=, d=)``, which returns the dataset's folder.

    And its ``refuser``. ``usual`` options are given in all calls.
    """

    def convert(tree: Path, *options: str, source: str = source, target: str = target, d: str = d) -> Path:
        directions = ("-source", source, "-target", target) if source else ()
        main([name, "-i", str(tree), "-d", d, *directions, "-np", "1", *usual, *options])
        return next((tree.parent / "nnUNet_raw").glob(f"Dataset{d}_*"))

    return convert, refuser(convert)


def refuser(command: Callable[..., object]) -> Any:
    """The fixture ``refused(...)``: what ``command(...)`` says behind ERROR; it leaves nothing in ``nnUNet_raw``."""

    @pytest.fixture
    def refused(refused: Callable[..., str]) -> Callable[..., str]:
        def message(*arguments, **options) -> str:
            raw = Path(os.environ["nnUNet_raw"])
            before = sorted(raw.glob("*"))
            error = refused(lambda _: command(*arguments, **options), ())
            assert sorted(raw.glob("*")) == before
            return error.split("ERROR: ")[1]

        return message

    return refused
