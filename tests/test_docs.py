"""What the documentation says of the code: the notebook, the generated pages, links, the README's length."""

from __future__ import annotations

import json
import re
import runpy
import sys

import pytest
from conftest import REPOSITORY

DOCS = REPOSITORY / "docs"


def load(name: str) -> dict:
    """A script of ``docs/``, as a dictionary of what it defines."""
    return runpy.run_path(str(DOCS / name))


def test_the_notebook_is_made_from_its_script():
    made = load("make_notebook.py")["notebook"]((DOCS / "notebook.py").read_text("utf-8"))
    assert (DOCS / "first_steps.ipynb").read_text("utf-8") == made, "run: python docs/make_notebook.py"
    kinds = [cell["cell_type"] for cell in json.loads(made)["cells"]]
    assert kinds.count("code") >= 6 and kinds[0] == "markdown" and "noqa" not in made


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("WORK", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    script = "".join(
        "".join(cell["source"]) + "\n"
        for cell in json.loads((DOCS / "first_steps.ipynb").read_text())["cells"]
        if cell["cell_type"] == "code"
    )
    names: dict = {"__name__": "__main__"}
    monkeypatch.setattr(sys, "argv", ["notebook"])
    exec(compile(script, "first_steps.ipynb", "exec"), names)
    assert names["scores"]["summary"]["CAST"]["blob"]["Dice"]["n"] == 6
    assert names["picture"].is_file() and (tmp_path / "evaluation" / "evaluation.html").is_file()


def test_generated_pages_name_every_command_setting_and_function():
    made = load("generate.py")
    text = made["commands_page"]()
    for name in made["commands"]():
        assert f"## {name}\n" in text and f"usage: {name}" in text, name
    for part in text.split("\n## ")[1:]:
        assert "xample" in part, f"{part.split()[0]} -h has an example"
    assert "### nnUNetUDA_convert folders" in text
    settings = made["settings_page"]()
    assert (
        "| `num_epochs` | `200` | an integer | At least 1. Fewer where" in settings
        and "| `cast.start_share` | `0.7` |" in settings
    )
    assert "## train" in made["python_page"]() and "trainer: 'str' = 'CASTTrainer'" in made["python_page"]()


def test_links_between_pages_lead_somewhere():
    generated = {DOCS / name for name in load("generate.py")["PAGES"]}
    pages = [REPOSITORY / "README.md", *DOCS.rglob("*.md")]
    broken = []
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
            target = (page.parent / link).resolve()
            if not link.startswith("http") and not target.exists() and target not in generated:
                broken.append(f"{page.name}: {link}")
    assert not broken, broken


def test_the_readme_is_short_and_names_every_command():
    text = (REPOSITORY / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    missing = [name for name in load("generate.py")["commands"]() if f"`{name}`" not in text]
    assert not missing, f"give them a row: {missing}"
