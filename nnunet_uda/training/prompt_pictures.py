"""Pictures of UUDS: what the prompts attend to, what is certain, and where x_g of both domains lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_uda.figures import own_style, plt, save_figure
from nnunet_uda.palette import RUNS
from nnunet_uda.training.pictures import class_map

COLOURS = dict(zip(("source", "target", "translated"), RUNS, strict=False))


@own_style()
def write_prompt_maps(
    path: Path,
    images: np.ndarray,
    translated: np.ndarray,
    predicted: np.ndarray,
    attention: np.ndarray,
    names: Sequence[str],
    uncertainty: np.ndarray,
    threshold: float,
) -> None:
    """One row a target slice: image, translation, each prompt's attention over it, uncertainty, certain prediction.

    Args:
        images, translated: ``(N, H, W)``.
        predicted: ``(N, H, W)``, class indices; drawn where it is certain.
        attention: ``(N, P, H, W)``, one map a prompt, scaled to its own largest value.
        names: P titles.
        uncertainty: ``(N, H, W)`` in [0, 1], certain where below ``threshold``.
    """
    classes = max(1, int(predicted.max()))
    titles = ["target", "translated", *names, "uncertainty", f"certain (< {threshold:g})"]
    figure, axes = plt.subplots(len(images), len(titles), figsize=(2.4 * len(titles), 2.6 * len(images)), squeeze=False)
    for index, row in enumerate(axes):
        for axis, title in zip(row, titles, strict=True):
            axis.axis("off")
            axis.set_title(title, fontsize=9)
            grey = translated[index] if title == "translated" else images[index]
            axis.imshow(grey, cmap="gray", interpolation="nearest")
        for axis, heat in zip(row[2:-2], attention[index], strict=True):
            axis.imshow(heat, cmap="inferno", alpha=0.55, vmin=0, interpolation="bilinear")
        row[-2].imshow(uncertainty[index], cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
        certain = uncertainty[index] < threshold
        row[-1].imshow(np.ma.masked_where(certain, np.ones_like(certain)), cmap="gray", vmin=0, vmax=2, alpha=0.8)
        shown = np.ma.masked_where(~certain | (predicted[index] == 0), predicted[index] - 1)
        row[-1].imshow(
            shown, cmap=class_map(classes), vmin=-0.5, vmax=classes - 0.5, alpha=0.6, interpolation="nearest"
        )
    figure.tight_layout()
    save_figure(figure, path)


@own_style()
def write_domain_map(path: Path, summaries: dict[str, np.ndarray]) -> None:
    """x_g of source, target and translated slices in one t-SNE; left before the translation, right after.

    Args:
        summaries: ``source``, ``target`` and ``translated``, each ``(N, E)``; at least 4 points in all.
    """
    from sklearn.manifold import TSNE

    vectors = np.concatenate(list(summaries.values()))
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    perplexity = min(15, (len(vectors) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)
    ends = np.cumsum([len(part) for part in summaries.values()])[:-1]
    placed = dict(zip(summaries, np.split(points, ends), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.5), sharex=True, sharey=True)
    for axis, title, shown in zip(
        axes, ("before", "after"), (("source", "target"), ("source", "translated")), strict=True
    ):
        for name in shown:
            axis.scatter(*placed[name].T, s=16, color=COLOURS[name], label=name)
        axis.set_title(f"{title} translation: t-SNE of x_g", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
