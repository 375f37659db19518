"""The floors of the house: a module imports from its own package and from the floors below, never from above."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import REPOSITORY

FLOORS = (
    {"errors"},
    {"collectives", "devices", "durations", "files", "names", "palette", "settings", "workers"},
    {"figures", "images", "methods"},
    {"data"},
    {"foreign_plans", "installation"},
    {"plans"},
    {"networks"},
    {"losses"},
    {"quality"},
    {"training"},
    {"evaluation"},
    {"adaptation", "dataset_conversion", "trainers", "experiments", "demo"},
    {"commands"},
    {"api"},
)
"""From the ground up; what stands on one floor does not know of each other."""
FOLDERS = {"": "nnunet_uda", "trainers": "trainers", "dataset_conversion": "dataset_conversion"}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in (REPOSITORY / folder).rglob("*.py"):
            parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            found[".".join(part for part in (package, *parts) if part not in ("", "__init__"))] = path
    return found


def imported(source: str, known: set[str]) -> set[str]:
    """Modules of the package that ``source`` imports anywhere, but for type checking alone."""
    found = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name.removeprefix("nnunet_uda.") for name in found if name.startswith("nnunet_uda")} & known


IMPORTS = {
    name: imported(path.read_text(encoding="utf-8"), set(modules())) - {name} for name, path in modules().items()
}


def test_every_module_stands_on_a_floor_and_imports_from_below():
    height = {package: level for level, floor in enumerate(FLOORS) for package in floor}
    wrong = []
    for module, others in IMPORTS.items():
        package = module.split(".")[0]
        if not package:
            continue
        assert package in height, f"{module}: give it a floor"
        for other in others:
            below = other.split(".")[0]
            if below != package and height[below] >= height[package]:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others():
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names the cycle


def test_imports_for_types_alone_do_not_count():
    source = "if TYPE_CHECKING:\n import nnunet_uda.a\nelse:\n from nnunet_uda import b\ndef f():\n import nnunet_uda.d"
    assert imported(source, {"a", "b", "d"}) == {"b", "d"}


def test_no_test_module_imports_another():
    """What they share lies in conftest.py and ``support``."""
    tests = REPOSITORY / "tests"
    for path in (*tests.glob("*.py"), *(tests / "support").glob("*.py")):
        assert not re.search(r"^\s*(from|import) test_", path.read_text(encoding="utf-8"), re.MULTILINE), path
