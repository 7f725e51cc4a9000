"""Figures that show a learned set from inside a model, with its controls beside it: attention heads, and numbers.

What differs from real text may differ because it was shifted far.  So each figure has room for several *kinds* of examples:
``real``, ``learned``, and three controls: ``shuffled`` (learned in the same way from shuffled labels), ``random``
(each position shifted as far as the learned one, in a direction of its own) and ``shared`` (in one direction for the example;
both by :func:`~distillkit.view.measures.random_shift`).  ``learned again`` is a second set from right labels.  Differences of
attention have the colours and the scale that Lens gives them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from distillkit.view.figures import ROLE_COLOURS, _figure, _Shown, plain, style
from distillkit.view.lens.still import DIFFERENCE, MOST

KINDS = {"real": ("o", ROLE_COLOURS["real"]), "learned": ("o", ROLE_COLOURS["learned"]),
         "learned again": ("s", ROLE_COLOURS["learned"]), "shuffled": ("D", "#2a9d8f"), "random": ("^", "#6a3d9a"),
         "shared": ("v", "#b0559e")}
LIMIT = MOST  # end of the scale of differences, in shares of a row's attention
GAP = 3  # cells between two heads


@style()
def thumbnails(rows: Mapping[str, np.ndarray], first: int = 1, title: str = "", start: str = "",
               numbers: Mapping[str, Sequence[Mapping[str, float]]] | None = None) -> Figure:
    """Heads of a layer as small maps of the difference of their attention, a row of maps for each kind.

    In a map rows look at columns; blue is more than in real text.  A grey line marks a position that looks at itself.

    Args:
        rows: name → differences ``[heads, l, l]``, such as means over examples.
        first: number of the first of these heads.
        title: of the figure.
        start: the token that stands first; with it a map is drawn that says what stripes and diagonals are.
        numbers: name of a row → for each of its heads {kind: number}, written in the colours of the kinds, in the upper corner
            of maps that look back only and above others.
    """
    heads, length, _ = next(iter(rows.values())).shape
    step, side = length + GAP, 0.8 if heads > 8 else 1.1  # cells and inches from a map to the next
    figure, (panel,) = _figure(2.2 + side * (heads + (1.5 if start else 0)), 1.3 + side * len(rows))
    sheet = np.full((len(rows) * step - GAP, heads * step - GAP), np.nan)
    for (row, values), head in itertools.product(enumerate(rows.values()), range(heads)):
        sheet[row * step :, head * step :][:length, :length] = values[head]
        _frame(panel, head * step, row * step, length)
        for line, (kind, number) in enumerate((numbers or {}).get(list(rows)[row], [{}] * heads)[head].items()):
            below = _looks_back(rows.values())
            panel.annotate(f"{number:.2f}", ((head + 1) * step - GAP, row * step), xytext=(-1, -11 * line - 1 if below else 2),
                           textcoords="offset points", fontsize=9, ha="right", va="top" if below else "bottom",
                           color=KINDS[kind][1] if kind in KINDS else "black", zorder=4)
    if start:
        kinds = {kind: None for heads_of in (numbers or {}).values() for some in heads_of for kind in some if kind in KINDS}
        _key(panel, heads * step + GAP, length, start, _looks_back(rows.values()), kinds)
    mesh = panel.pcolormesh(sheet, cmap=DIFFERENCE, vmin=-LIMIT, vmax=LIMIT)
    panel.invert_yaxis()
    middle = (length - 1) / 2
    panel.set_xticks(np.arange(heads) * step + middle, range(first, first + heads))
    panel.set_yticks(np.arange(len(rows)) * step + middle, map(plain, rows))
    panel.set(xlabel="head", aspect="equal")
    panel.set_title(plain(title), pad=18)
    panel.grid(visible=False)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=panel, extend="both", fraction=0.03, shrink=0.6, ticks=[-LIMIT, 0, LIMIT],
                    label="difference of attention")
    return figure


def _frame(panel, left: float, top: float, length: int) -> None:
    """The edge of a map, and its main diagonal."""
    panel.add_patch(Rectangle((left, top), length, length, fill=False, clip_on=False, ec="0.7", lw=0.6, zorder=3))
    panel.plot([left, left + length], [top, top + length], color="0.6", lw=0.5, label="_itself", clip_on=False)


def _looks_back(maps: Iterable[np.ndarray]) -> bool:
    """Whether no position looks at a later one in any of these maps."""
    return not any(np.triu(one, 1).any() for one in maps)


def _key(panel, left: float, length: int, start: str, back: bool, kinds: Iterable[str]) -> None:
    """A map without numbers, beside the first row, that says where the first token and a token's neighbours are, and below it
    the kinds of the numbers."""
    _frame(panel, left, 0, length)
    for step in (-1,) if back else (-1, 1):
        ends = np.array([1, length - 1]) + 0.5 * np.array([1, -1])
        panel.plot(left + ends + step / 2, ends - step / 2, color=ROLE_COLOURS["text"], lw=1.2, label="_next", clip_on=False)
    panel.add_patch(Rectangle((left, 0), 1, length, color=ROLE_COLOURS["learned"], lw=0, clip_on=False))
    font = {"fontsize": 9, "clip_on": False}
    if not back:
        panel.text(left + length, 0.12 * length, "next ", ha="right", va="center", **font)
    panel.text(left + 1.2, 0.85 * length, " previous", ha="left", va="center", **font)
    panel.text(left + length / 2, -0.4, "looks at →", ha="center", va="bottom", **font)
    panel.text(left + length + 0.5, length / 2, "looks from ↓", rotation=270, ha="left", va="center", **font)
    panel.text(left, length + 0.5, f"↑ {plain(start)}", ha="left", va="top", **font)
    for line, kind in enumerate(kinds):
        panel.annotate(kind, (left, length + 0.5), xytext=(2, -28 - 14 * line), textcoords="offset points", fontsize=10,
                       va="top", color=KINDS[kind][1], annotation_clip=False)


@style()
def by_kind(panels: Sequence[tuple[str, str, Mapping[str, Sequence[float]], float | tuple[str, float] | None]]) -> Figure:
    """A number for each kind, a dot for each set and a line for their mean; three panels in a row.

    Args:
        panels: for each its title, the label of y, {kind: values}, and where chance is, or a line with another name (or None).
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
            name, height = chance if isinstance(chance, tuple) else ("chance", chance)
            panel.axhline(height, color=ROLE_COLOURS["chance"], ls=":", lw=1.5, label=name)
            panel.annotate(name, (-0.45, height), xytext=(0, -3), textcoords="offset points", fontsize=10,
                           va="top", ha="left", color=ROLE_COLOURS["chance"])
        panel.set(title=plain(title), ylabel=label, xlim=(-0.5, len(values) - 0.5), ylim=(0, 1.1 * panel.get_ylim()[1]))
        many = len(values) > 4
        panel.set_xticks(range(len(values)), list(values), fontsize=9.5 if many else 11, rotation=25 if many else 0,
                         ha="right" if many else "center", rotation_mode="anchor")
        panel.grid(axis="x", visible=False)
    return figure
