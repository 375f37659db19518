"""The folder of an evaluation: new, empty, or a former evaluation, which is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_uda import files
from nnunet_uda.errors import UDAError

REPORT = "evaluation.json"


def check_output(target: Path, report: str = REPORT) -> None:
    """Restore what a killed command had set aside (``files.put_back``), then check what is there.

    Raises:
        UDAError: if ``target`` holds something else than a former evaluation (``report``).
    """
    files.put_back(target)
    if not files.is_free(target) and not (target / report).is_file():
        raise UDAError(f"{target} exists and holds no former evaluation ({report}): choose another folder with -o")


@contextmanager
def whole_folder(target: Path, report: str = REPORT) -> Iterator[Path]:
    """``files.whole_folder`` for an evaluation, which may replace a former one and nothing else.

    Raises:
        UDAError: as ``check_output``, or if the folder cannot be written.
    """
    check_output(target, report)
    with files.whole_folder(target) as temporary:
        yield temporary
