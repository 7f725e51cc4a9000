"""Figures that show a learned set from inside a model, with its controls beside it: attention heads, and numbers.

What differs from real text may differ because it was shifted far.  So each figure has room for several *kinds* of examples:
``real``, ``learned``, and three controls: ``shuffled`` (learned in the same way from shuffled labels), ``random``
(each position shifted as far as the learned one, in a direction of its own) and ``shared`` (in one direction for the example;
both by :func:`~distillkit.view.measures.random_shift`).  Differences of attention have the colours that Lens gives them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from distillkit.view.figures import ROLE_COLOURS, _figure, _Shown, plain, style
from distillkit.view.lens.still import DIFFERENCE

KINDS = {"real": ("o", ROLE_COLOURS["real"]), "learned": ("o", ROLE_COLOURS["learned"]), "shuffled": ("D", "#2a9d8f"),
         "random": ("^", "#6a3d9a"), "shared": ("v", "#b0559e")}
LIMIT = 0.4  # end of the scale of differences, in shares of a row's attention
GAP = 3  # cells between two heads


@style()
def thumbnails(rows: Mapping[str, np.ndarray], first: int = 1, title: str = "") -> Figure:
    """Heads of a layer as small maps of the difference of their attention, a row of maps for each kind.

    In a map rows look at columns; blue is more than in real text.

    Args:
        rows: name → differences ``[heads, l, l]``, such as means over examples.
        first: number of the first of these heads.
        title: of the figure.
    """
    heads, length, _ = next(iter(rows.values())).shape
    step, side = length + GAP, 0.8 if heads > 8 else 1.1  # cells and inches from a map to the next
    figure, (panel,) = _figure(2.0 + side * heads, 1.1 + side * len(rows))
    sheet = np.full((len(rows) * step - GAP, heads * step - GAP), np.nan)
    for (row, values), head in itertools.product(enumerate(rows.values()), range(heads)):
        sheet[row * step :, head * step :][:length, :length] = values[head]
        panel.add_patch(Rectangle((head * step, row * step), length, length, fill=False, clip_on=False, ec="0.7", lw=0.6,
                                  zorder=3))
    mesh = panel.pcolormesh(sheet, cmap=DIFFERENCE, vmin=-LIMIT, vmax=LIMIT)
    panel.invert_yaxis()
    middle = (length - 1) / 2
    panel.set_xticks(np.arange(heads) * step + middle, range(first, first + heads))
    panel.set_yticks(np.arange(len(rows)) * step + middle, map(plain, rows))
    panel.set(title=plain(title), xlabel="head (in a map: looks from ↓, looks at →)", aspect="equal")
    panel.grid(visible=False)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=panel, extend="both", fraction=0.03, shrink=0.8, ticks=[-LIMIT, 0, LIMIT],
                    label="attention minus real")
    return figure


@style()
def by_kind(panels: Sequence[tuple[str, str, Mapping[str, Sequence[float]], float | None]]) -> Figure:
    """A number for each kind, a dot for each set and a line for their mean; three panels in a row.

    Args:
        panels: for each its title, the label of y, {kind: values}, and where chance is (or None).
    """
    across, down = min(3, len(panels)), -(-len(panels) // 3)
    figure = _Shown(figsize=(3.9 * across, 3.5 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for panel in axes[len(panels):]:
        panel.remove()
    for panel, (title, label, values, chance) in zip(axes, panels, strict=False):
        for place, (kind, numbers) in enumerate(values.items()):
            marker, colour = KINDS[kind]
            spread = np.linspace(-0.12, 0.12, len(numbers)) if len(numbers) > 1 else np.zeros(1)
            panel.plot(place + spread, numbers, ls="", marker=marker, ms=7, color=colour, label=kind)
            panel.plot([place - 0.25, place + 0.25], [np.mean(numbers)] * 2, color=colour, lw=2, label="_mean")
        if chance is not None:
            panel.axhline(chance, color=ROLE_COLOURS["chance"], ls=":", lw=1.5, label="chance")
            panel.annotate("chance", (-0.45, chance), xytext=(0, -3), textcoords="offset points", fontsize=10,
                           va="top", ha="left", color=ROLE_COLOURS["chance"])
        panel.set(title=plain(title), ylabel=label, xlim=(-0.5, len(values) - 0.5), ylim=(0, 1.1 * panel.get_ylim()[1]))
        many = len(values) > 4
        panel.set_xticks(range(len(values)), list(values), fontsize=9 if many else 11, rotation=25 if many else 0)
        panel.grid(axis="x", visible=False)
    return figure
