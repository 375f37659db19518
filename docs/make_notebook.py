"""Write ``docs/first_steps.ipynb`` from ``docs/notebook.py``, whose cells begin with ``# %%``."""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parent
SCRIPT, NOTEBOOK = DOCS / "notebook.py", DOCS / "first_steps.ipynb"


def cells(script: str) -> list[dict]:
    """Notebook cells of a script, without the remarks that are for linters."""
    found = []
    for number, part in enumerate(script.split("# %%")[1:]):
        head, _, body = part.partition("\n")
        lines = [line.replace("  # noqa: E402", "").replace("  # fmt: skip", "") for line in body.strip().splitlines()]
        kind = "markdown" if "[markdown]" in head else "code"
        if kind == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        source = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source}
        found.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    return found


def notebook(script: str) -> str:
    """The notebook's file."""
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    content = {"cells": cells(script), "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(SCRIPT.read_text("utf-8")), "utf-8")
