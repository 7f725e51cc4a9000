"""Figures of streams of tasks: matrices of accuracies as annotated heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from distillkit.view.figures import _Shown, plain, style

ACROSS = 3  # panels side by side


@style()
def accuracy_maps(panels: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    """Matrices of accuracies as annotated heat maps on one scale from 0 to 1; nan stays white.

    Args:
        panels: the title of each and its values ``[rows, columns]``.
        rows, columns: their names.
        title: the finding, above all panels.
    """
    across = min(ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    figure = _Shown(figsize=(1.7 + across * (0.75 + 0.62 * len(columns)), 0.7 + down * (0.95 + 0.42 * len(rows))),
                    layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for number, (axes, (name, values)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
        sns.heatmap(np.asarray(values, dtype=float), ax=axes, vmin=0, vmax=1, cmap="crest", annot=True, fmt=".2f", cbar=False,
                    linewidths=1.5, xticklabels=[plain(c) for c in columns], yticklabels=[plain(r) for r in rows],
                    annot_kws={"fontsize": 12})
        axes.set_title(plain(name), fontsize=12)
        axes.grid(False)
        axes.tick_params(axis="both", rotation=0, labelsize=11, length=0, labelleft=number % across == 0)
        axes.set(xlabel="accuracy on" if number // across == down - 1 else "")
    for axes in grid.flat[len(panels):]:
        axes.remove()
    figure.suptitle(plain(title))
    return figure
