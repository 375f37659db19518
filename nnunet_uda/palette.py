"""The colours of structures and of runs: one palette in every picture, plot and page.

Chosen so that any two of the first eight differ by at least 24 in CIELAB for normal sight, protanopia, deuteranopia and
tritanopia, and stand out from black and from grey tissue.
"""

from __future__ import annotations

import colorsys

RGB = tuple[int, int, int]
"""0 to 255 each."""

COLOURS: tuple[RGB, ...] = (
    (101, 178, 255),  # sky blue
    (229, 25, 93),  # crimson
    (190, 244, 163),  # pale green
    (101, 101, 255),  # indigo
    (204, 50, 152),  # magenta
    (101, 255, 229),  # aqua
    (183, 102, 20),  # brown
    (239, 239, 117),  # pale yellow
    (239, 117, 158),  # pink
    (214, 173, 91),  # sand
)
RUNS: tuple[str, ...] = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a6a2f", "#6b6f7b")
"""Of lines and bars on white and on black: Okabe and Ito's, and two more."""


def structure_colour(index: int) -> RGB:
    """The colour of the structure at ``index`` (from 0) in ``dataset.json``'s order; they never run out."""
    if index < len(COLOURS):
        return COLOURS[index]
    spun = colorsys.hsv_to_rgb((index * 0.618034) % 1, 0.65, 1 if index % 2 else 0.75)
    red, green, blue = (round(255 * part) for part in spun)
    return red, green, blue


def name_colours(labels: dict[str, int]) -> dict[str, RGB]:
    """The colour of each structure by its name; ``labels`` without the background."""
    return dict(zip(labels, label_colours(labels).values(), strict=True))


def label_colours(labels: dict[str, int]) -> dict[int, RGB]:
    """The colour of each foreground label, in the order of ``labels``."""
    values = [value for value in labels.values() if value != 0]
    return {value: structure_colour(index) for index, value in enumerate(values)}
