"""Templates beside this module, filled: pages in one file that ask the network for nothing, and model cards."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from nnunet_uda.palette import RGB


@cache
def _templates() -> Environment:
    folder = Path(__file__).with_name("templates")
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=select_autoescape(), trim_blocks=True, undefined=StrictUndefined
    )
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    environment.filters["neighbours"] = lambda rows: [(first, list(of)) for first, of in groupby(rows, lambda r: r[0])]
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment


def filled(template: str, **content: Any) -> str:
    """Fill a template with ``content``, which is escaped in ``.html`` templates."""
    return _templates().get_template(template).render(**content)


def write_filled(
    path: Path, template: str, title: str, colours: Mapping[str, RGB], data: Any, content: Mapping[str, Any]
) -> None:
    """Write a page.

    Args:
        path: the file to write.
        template: its template's name without the ending.
        title: its heading, plain text.
        colours: of the legend, by structure.
        data: what the script reads, as JSON can say it.
        content: what else the template names, plain text and tables (``{"caption", "header", "rows", "notes"}``).
    """
    text = filled(f"{template}.html", name=template, title=title, colours=colours, data=data, **content)
    path.write_text(text, "utf-8", "backslashreplace")
