"""Pages of the site that are made from the code: every command's ``-h``, every setting, the functions of the package.

mkdocs calls ``on_files`` (``mkdocs.yml``, ``hooks``). Nothing is written into ``docs/``.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
from contextlib import redirect_stdout, suppress
from importlib.metadata import entry_points
from typing import Any

COMMANDS = "reference/commands.md"
SETTINGS = "reference/settings.md"
PYTHON = "reference/python.md"


def commands() -> dict[str, str]:
    """Every command of this package and the function behind it, ``module:function``."""
    found = {point.name: point.value for point in entry_points(group="console_scripts")}
    ours = sorted(item for item in found.items() if item[0].startswith("nnUNetUDA_"))
    return {name: value for name, value in ours if name != "nnUNetUDA_clip"}  # a former name


def help_of(value: str, *words: str) -> str:
    """What a command prints with ``-h``, 100 columns wide."""
    module, function = value.split(":")
    main = getattr(importlib.import_module(module), function)
    os.environ["COLUMNS"] = "100"
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        main([*words, "-h"])
    return shown.getvalue().rstrip()


def commands_page() -> str:
    """All commands, and every converter of nnUNetUDA_convert."""
    from nnunet_uda.commands.convert import CONVERTERS

    parts = ["# Commands", "Made from the code: what every command prints with `-h`."]
    for name, value in commands().items():
        parts += [f"## {name}", f"```text\n{help_of(value)}\n```"]
        if name == "nnUNetUDA_convert":
            for converter in CONVERTERS:
                parts += [f"### {name} {converter}", f"```text\n{help_of(value, converter)}\n```"]
    return "\n\n".join(parts) + "\n"


def settings_page() -> str:
    """A table of the shared settings, then one a method, with what the class says of them."""
    from nnunet_uda.methods import find_methods
    from nnunet_uda.settings import UDASettings, describe_settings, setting_notes

    def section(title: str, settings: type, prefix: str, trainers: list[str]) -> list[str]:
        notes = setting_notes(settings)
        rows = ["| setting | default | type | what, and when to change it |", "| --- | --- | --- | --- |"]
        rows += [
            f"| `{prefix}{name}` | `{json.dumps(default)}` | {kind} | {notes.get(name, '')} |"
            for name, kind, default in describe_settings(settings)
        ]
        read = [f"Read by {', '.join(f'`{name}`' for name in trainers)}."] if trainers else []
        return [f"## {title}", inspect.cleandoc(settings.__doc__ or ""), *read, "\n".join(rows)]

    parts = [
        "# Settings",
        "Made from the code. `nnUNetUDA_configure -set NAME=VALUE` writes one into plans of their own name.",
    ]
    parts += section("Shared by all trainers", UDASettings, "", [])
    for method in find_methods().methods:
        parts += section(
            f"{method.name} ({', '.join(method.trainers[:1])})", method.settings, f"{method.name}.", method.trainers
        )
    return "\n\n".join(parts) + "\n"


def python_page() -> str:
    """Signatures and docstrings of what ``from nnunet_uda import ...`` gives."""
    import nnunet_uda
    from nnunet_uda import api

    parts = ["# Python", f"```text\n{inspect.cleandoc(api.__doc__ or '')}\n```"]
    for name in nnunet_uda.__all__:
        thing: Any = getattr(nnunet_uda, name)
        signature = "" if inspect.isclass(thing) else str(inspect.signature(thing))
        parts += [
            f"## {name}",
            f"```python\n{name}{signature}\n```",
            f"```text\n{inspect.cleandoc(thing.__doc__)}\n```",
        ]
    return "\n\n".join(parts) + "\n"


PAGES = {COMMANDS: commands_page, SETTINGS: settings_page, PYTHON: python_page}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs' hook: add the pages."""
    from mkdocs.structure.files import File

    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    return files
