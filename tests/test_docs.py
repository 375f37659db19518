"""What the documentation says of the code: the notebook, the generated pages, links, the README's length."""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, TRAINERS
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from packaging.specifiers import SpecifierSet
from support.documents import bash_blocks, command_lines, inline_commands, options, parsed

from nnunet_uda.errors import UDAError
from nnunet_uda.methods import check_uda, find_any_trainer
from nnunet_uda.plans import merge_uda
from nnunet_uda.settings import parse_assignment

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


def pages_with_commands() -> list[Path]:
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
    return [page for page in pages if page.name != "reproduce.md"]  # test_reproduce.py runs those


@pytest.mark.parametrize("page", pages_with_commands(), ids=lambda page: page.name)
def test_the_commands_of_a_page_parse(page, monkeypatch):
    """Commands, options, values and subcommands of bash blocks; of commands in a line or with ``...`` the options."""
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS))
    text = page.read_text("utf-8")
    lines = [words for block in bash_blocks(text) for words in command_lines(block)]
    for words in [*lines, *inline_commands(text)]:
        if words not in lines or "..." in words:
            given = words[3:] if words[:2] == ["python", "-m"] else words
            unknown = {word for word in given if re.match("--?[a-z]", word)} - options(words)
            assert not unknown, (shlex.join(words), unknown)
            continue
        found = vars(parsed(words))
        for name in np.ravel(found.get("tr") or []):
            assert name == "TRAINER" or find_any_trainer(name).__name__ == name
        check_settings(found.get("set") or [], words)
        check_settings([f"{name}={value}" for name, *values in found.get("vary") or [] for value in values], words)


def check_settings(assignments: list[str], words: list[str]) -> None:
    """Settings exist and take these values, but for placeholders (``seed=S``, ``$CLIP``)."""
    for name, value in map(parse_assignment, assignments):
        if not (isinstance(value, str) and (value.isupper() or "$" in value)):
            check_uda(merge_uda({}, {name: value}), shlex.join(words))


def test_a_page_of_yesterday_is_seen(monkeypatch):
    """The check of pages can fail."""
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS))
    [words] = command_lines("X=1 torchrun --x 2 nnUNetUDA_train 501 2d 0 -trainer A  # one\n")
    assert words == ["nnUNetUDA_train", "501", "2d", "0", "-trainer", "A"]
    for line in (words, ["nnUNetUDA_none"], ["python", "benchmarks/none.py"], ["nnUNetUDA_convert", "heart"]):
        with pytest.raises(AssertionError):
            parsed(line)
    assert "-target_few_labels" in options(["nnUNetUDA_convert", "folders"]) and "-x" not in options(
        ["nnUNetUDA_adapt"]
    )
    with pytest.raises(UDAError, match="num_epohs"):
        check_settings(["num_epohs=3"], words)


def test_what_is_made_exists():
    targets = set(re.findall(r"^(\w[\w-]*):", (REPOSITORY / "Makefile").read_text(), flags=re.M))
    texts = [page.read_text("utf-8") for page in (*pages_with_commands(), REPOSITORY / ".ci" / "run")]
    named = {name for text in texts for name in re.findall(r"(?:^|`|&& )make ([a-z-]+)", text, flags=re.M)}
    assert {"test", "lint", "docs", "demo"} <= named <= targets


def test_what_runs_elsewhere_calls_what_is_here():
    """The workflow, the container and the hooks, none of which is run here."""
    [job] = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"] and os.access(REPOSITORY / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", REPOSITORY / ".ci" / "run"], check=True)
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert {"lint", "test", "docs"} == set(re.findall("^make ([a-z-]+)", script, flags=re.M))
    project = (REPOSITORY / "pyproject.toml").read_text()
    wanted = SpecifierSet(re.search(r'^requires-python = "(.*)"', project, flags=re.M)[1])
    container = (REPOSITORY / "Dockerfile").read_text()
    versions = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
    versions += re.findall(r"^FROM python:([\d.]+)", container, flags=re.M)
    assert len(versions) == 2 and all(version in wanted for version in versions)
    [words] = re.findall(r"^CMD (\[.*\])$", container, flags=re.M)
    assert parsed(json.loads(words)).o == Path("/demo")
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in hooks[0]["hooks"]] == ["make lint"]


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


def test_every_trainer_is_in_the_table_of_trainers():
    files = [path.read_text("utf-8") for path in TRAINERS.glob("*.py")]
    defined = {name for text in files for name in re.findall(r"^class (\w+Trainer)\(", text, flags=re.M)}
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "howto" / "choose_a_trainer.md").read_text("utf-8"), flags=re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+Trainer)`", row)} == defined and len(defined) > 20


def test_each_common_change_is_two_or_three_files_and_at_most_250_lines_to_read():
    sections = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8").split("\n## ")
    opened = {part.splitlines()[0]: re.search(r"^Open (.*?)\. ", part, flags=re.M | re.S) for part in sections}
    files = {title: re.findall(r"`(\S+)`", found[1]) for title, found in opened.items() if found}
    assert len(files) == 4
    for title, names in files.items():
        lines = [len((REPOSITORY / name).read_text("utf-8").splitlines()) for name in names]
        assert 2 <= len(names) <= 3 and sum(lines) <= 250, (title, dict(zip(names, lines, strict=True)))


def test_what_a_method_may_call_is_there():
    text = (DOCS / "reference" / "trainer.md").read_text("utf-8")
    training = REPOSITORY / "nnunet_uda" / "training"
    base = (training / "uda_trainer.py").read_text("utf-8") + inspect.getsource(nnUNetTrainer)
    called = set(re.findall(r"self\.(\w+)", text)) | set(re.findall(r"^\| `(\w+)\(", text, flags=re.M)) - {"require"}
    translating = set(re.findall(r"`(\w+)\(self", text))
    missing = [name for name in called - translating if not re.search(rf"\b{name}\b", base)]
    kit = (training / "translation.py").read_text("utf-8")
    missing += [name for name in translating if f"def {name}(" not in kit]
    assert not missing and len(called) > 25 and len(translating) == 4


def test_the_files_of_the_house_are_there():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"`((?:nnunet_uda|trainers|dataset_conversion|tests|docs)/[\w./]*)`", text)
    training = re.findall(r"`(\w+\.py)`", text[text.index("## A training") : text.index("## A loss")])
    missing = [name for name in named if not (REPOSITORY / name).exists()]
    missing += [name for name in training if not (REPOSITORY / "nnunet_uda" / "training" / name).exists()]
    assert not missing and len(training) > 15


def test_the_readme_is_short_and_names_every_command():
    text = (REPOSITORY / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    missing = [name for name in load("generate.py")["commands"]() if f"`{name}`" not in text]
    assert not missing, f"give them a row: {missing}"
