"""matplotlib as every picture here is drawn: without a screen, text as text, and whatever else a process has set.

nnU-Net sets seaborn's style with letters two and a half times as large, and users have a matplotlibrc: nothing of that
reaches what is drawn in ``own_style``. ``$``, ``\\`` and ``_`` are letters of a name like others, never mathematics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_uda.files import whole_file
from nnunet_uda.palette import RUNS

__all__ = ["legend_label", "new_figure", "own_style", "plt", "save_figure"]

matplotlib.use("agg")
_TEXT = {"text.parse_math": False, "text.usetex": False}
matplotlib.rcParams.update(_TEXT)
_LOOKS = ("axes", "boxplot", "errorbar", "figure.", "font", "grid", "hatch", "image", "legend", "lines", "markers",
          "patch", "path", "savefig", "scatter", "text", "xaxis", "xtick", "yaxis", "ytick")  # fmt: skip
_STYLE = (
    {key: value for key, value in matplotlib.rcParamsDefault.items() if key.startswith(_LOOKS)}
    | _TEXT
    | {
        "axes.prop_cycle": cycler(color=RUNS),
        "font.size": 9.0,
        "axes.titlesize": 10.0,
        "axes.labelsize": 9.0,
        "xtick.labelsize": 8.0,
        "ytick.labelsize": 8.0,
        "legend.fontsize": 8.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.color": "#d8dbe2",
    }
)


def own_style() -> Any:  # what contextmanager makes: no public type is a context and a decorator
    """The style of every figure here, as a context or a decorator; what was set before is set again behind it."""
    return matplotlib.rc_context(_STYLE)


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
