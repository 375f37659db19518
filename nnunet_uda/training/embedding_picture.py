"""A picture of pixel embeddings and prototypes of both domains, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.colors import ListedColormap

from nnunet_uda.figures import legend_label, own_style, plt, save_figure
from nnunet_uda.training.pictures import class_map

MARKERS = {"source": "o", "target": "x"}


class Embeddings(NamedTuple):
    """Pixel embeddings of one domain.

    Attributes:
        vectors: ``(N, D)`` of unit length.
        classes: ``(N,)`` class of each.
        prototypes: ``(K, D)``, zero where a class has none.
    """

    vectors: np.ndarray
    classes: np.ndarray
    prototypes: np.ndarray


def save_embeddings(path: Path, embeddings: dict[str, Embeddings]) -> None:
    """Keep embeddings by domain for a later picture."""
    arrays = {f"{name}_{key}": value for name, item in embeddings.items() for key, value in item._asdict().items()}
    np.savez_compressed(path, **arrays)


def load_embeddings(path: Path) -> dict[str, Embeddings]:
    """What ``save_embeddings`` kept."""
    with np.load(path) as arrays:
        names = sorted({key.split("_", 1)[0] for key in arrays})
        return {name: Embeddings(*(arrays[f"{name}_{key}"] for key in Embeddings._fields)) for name in names}


def principal_plane(vectors: np.ndarray) -> np.ndarray:
    """``(N, D)`` on their first two principal components, ``(N, 2)``; each component's largest entry is positive."""
    centred = vectors - vectors.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    return centred @ axes.T


@own_style()
def write_embedding_picture(
    path: Path, before: dict[str, Embeddings], after: dict[str, Embeddings], class_names: Sequence[str]
) -> None:
    """One panel for ``before`` and one for ``after``, each with both domains and prototypes in one projection."""
    colours = ListedColormap(
        [(0.5, 0.5, 0.5), *np.asarray(class_map(len(class_names) - 1).colors)]
    )  # grey: the background
    figure, axes = plt.subplots(1, 2, figsize=(11, 5))
    for axis, embeddings, title in zip(axes, (before, after), ("before training", "now"), strict=True):
        parts = [part for item in embeddings.values() for part in (item.vectors, item.prototypes)]
        ends = np.cumsum([len(part) for part in parts])
        placed = iter(np.split(principal_plane(np.concatenate(parts)), ends[:-1]))
        for domain, item in embeddings.items():
            pixels, prototypes = next(placed), next(placed)
            marker = MARKERS[domain]
            axis.scatter(*pixels.T, c=colours(item.classes), s=9, marker=marker, alpha=0.5, linewidths=0.7)
            for index, point in enumerate(prototypes):
                if item.prototypes[index].any():
                    axis.scatter(*point, color=colours(index), s=150, marker=marker, linewidths=2.5,
                                 **({"edgecolors": "black"} if marker == "o" else {}))  # fmt: skip
        axis.set_title(f"{title}: principal plane of embeddings", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [
        plt.Line2D([], [], color=colours(index), marker="s", linestyle="", label=legend_label(name))
        for index, name in enumerate(class_names)
    ]
    for domain in after:
        text = f"{domain} ({'label' if domain == 'source' else 'prediction'}); large: prototype"
        handles.append(plt.Line2D([], [], color="grey", marker=MARKERS[domain], linestyle="", label=text))
    figure.legend(handles=handles, loc="lower center", ncol=min(4, len(handles)), fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    save_figure(figure, path)
