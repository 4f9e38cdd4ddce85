"""Figures of matplotlib, which comes with an extra: how one is made, and written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fzoo.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.axis import Axis as Axis
    from matplotlib.figure import Figure
else:
    Axes = Axis = Figure = Any  # to what checks while it runs: matplotlib comes with an extra


def make_figure(
    width: float, height: float, *, extra: str, dpi: int = 150, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """Make a matplotlib figure that no window shows.

    Args:
        width: in inches.
        height: in inches.
        extra: of fzoo, which brings matplotlib; for the error.
        dpi: pixels to the inch.
        layout: matplotlib's engine for the places of axes; None where they are given.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(f"the pictures are drawn by matplotlib: pip install 'fzoo[{extra}]'") from e
    return Figure((width, height), dpi=dpi, layout=layout)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure to a file, whole or not at all; the name's ending says in which format.

    In an SVG text stays text, and the same figure gives the same bytes.

    Raises:
        OSError: it can't be written.
    """
    from matplotlib import rc_context

    undated = {"Date": None} if Path(path).suffix == ".svg" else None
    with replacing(path) as temporary, rc_context({"svg.fonttype": "none", "svg.hashsalt": "fzoo"}):
        figure.savefig(temporary, metadata=undated)
