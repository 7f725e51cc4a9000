"""Figures of streams of tasks: matrices of accuracies as annotated heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from distillkit.view.figures import _Shown, plain, style

ACROSS = 2  # panels side by side
COLOURS = sns.color_palette("blend:#ffffff,#9fd0b4,#2a7f8e,#23396f", as_cmap=True)  # 0 is white


def _cells(axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """One matrix, with a frame round its last row."""
    sns.heatmap(np.asarray(values, dtype=float), ax=axes, vmin=0, vmax=1, cmap=COLOURS, annot=True, fmt=".2f", cbar=False,
                linewidths=1, linecolor="0.85", xticklabels=[plain(c) for c in columns], yticklabels=[plain(r) for r in rows],
                annot_kws={"fontsize": 12})
    left, right, top, bottom = 0, len(columns), len(rows) - 1, len(rows)
    axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="black", lw=2, clip_on=False,
              label="_frame")
    axes.set_title(plain(title), fontsize=12)
    axes.grid(False)
    axes.tick_params(axis="both", rotation=0, labelsize=11, length=0)


@style()
def accuracy_maps(panels: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], title: str,
                  reference: tuple[str, Sequence[float]] | None = None) -> Figure:
    """Matrices of accuracies as annotated heat maps on one scale from 0, white, to 1; nan has no number.

    Args:
        panels: the title of each and its values ``[rows, columns]``; its last row is framed.
        rows, columns: their names.
        title: the finding, above all panels.
        reference: title and values ``[columns]`` of a strip below the panels.
    """
    across = min(ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    heights = [len(rows) + 1.6] * down + [2.1] * (reference is not None)
    figure = _Shown(figsize=(1.7 + across * (0.75 + 0.72 * len(columns)), 1 + 0.42 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
    for number, (name, values) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[number // across, number % across])
        _cells(axes, values, rows, columns, name)
        axes.tick_params(labelleft=number % across == 0)
    if reference is not None:
        name, values = reference
        _cells(figure.add_subplot(grid[down, 0]), np.asarray(values)[None], ["one training"], columns, name)
    figure.supxlabel("accuracy on", fontsize=12)
    figure.suptitle(plain(title))
    return figure
