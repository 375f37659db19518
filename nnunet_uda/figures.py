"""matplotlib as every picture here is drawn: without a screen, and text as text.

``$``, ``\\`` and ``_`` are letters of a name like others, never mathematics, whatever a user's matplotlibrc says.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_uda.files import whole_file

__all__ = ["legend_label", "new_figure", "plt", "save_figure"]

matplotlib.use("agg")
matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False})


def new_figure(width: int, height: int) -> Figure:
    """A white figure of so many pixels, outside pyplot's list of open ones."""
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def legend_label(name: str) -> str:
    """``name`` for a legend, which leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    plt.close(figure)
