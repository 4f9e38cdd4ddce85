"""Curves and confusion matrices, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fzoo.figures import make_figure, save_figure


def draw_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw loss and accuracy over the epochs, with a line where a phase begins."""
    figure = make_figure(9, 3.4, extra="finetune", dpi=120)
    epochs = np.arange(1, len(history) + 1)
    starts = [i + 1 for i in range(1, len(history)) if history[i]["phase"] != history[i - 1]["phase"]]
    for ax, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        ax.plot(epochs, [row[name] for row in history], "o-", color="#0969da", markersize=3, label="training")
        if any(f"val_{name}" in row for row in history):
            values = [row.get(f"val_{name}", np.nan) for row in history]
            ax.plot(epochs, values, "s-", color="#bc4c00", markersize=3, label="validation")
        for start in starts:
            ax.axvline(start - 0.5, color="#8c959f", linewidth=0.8, linestyle="--")
        ax.set(xlabel="epoch", ylabel=name)
        ax.grid(alpha=0.3)
        ax.legend()
    save_figure(figure, path)


def draw_confusion(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix in colours, with the numbers where there is room for them."""
    count = len(names)
    side = min(3 + 0.35 * count, 24)
    figure = make_figure(side, side, extra="finetune", dpi=120)
    ax = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= 60:
        ax.set_xticks(range(count), names, rotation=90)
        ax.set_yticks(range(count), names)
    if count <= 30:
        for i, j in zip(*np.nonzero(confusion), strict=True):
            ax.text(
                j, i, str(confusion[i, j]), ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black"
            )
    ax.set(xlabel="predicted", ylabel="true")
    save_figure(figure, path)
