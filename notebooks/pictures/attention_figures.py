"""Figures that show a learned set from inside a model, with its controls beside it: maps, heads of a layer, one head, numbers.

What differs from real text may differ because it was shifted far.  So each figure has room for several *kinds* of examples:
``real``; ``learned``; and three controls, real examples shifted by as much as the learned ones: ``together`` (one random
direction for an example), ``apart`` (one for each position; :func:`~distillkit.view.measures.random_shift`) and ``exchanged``
(the learned shift of another example).  Differences of attention are drawn on one diverging scale that is white at zero.  The
arrays come from :mod:`distillkit.view.measures`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from distillkit.view.figures import ROLE_COLOURS, _figure, _Shown, plain, style
from distillkit.view.set_figures import drawn

KINDS = {"real": ("o", ROLE_COLOURS["real"]), "learned": ("o", ROLE_COLOURS["learned"]), "exchanged": ("D", "#2a9d8f"),
         "apart": ("^", "#6a3d9a"), "together": ("s", "#a23b72")}
DIFFERENCE = LinearSegmentedColormap.from_list("difference", ["#b2182b", "#ef8a62", "#ffffff", "#67a9cf", "#2166ac"])
WEIGHT = LinearSegmentedColormap.from_list("weight", ["#ffffff", "#4d4d4d", "#000000"])
LIMIT = 0.4  # end of the scale of differences, in shares of a row's attention
GAP = 3  # cells between two heads


@style()
def kind_maps(panels: Mapping[str, tuple[np.ndarray, Sequence[str] | np.ndarray]]) -> Figure:
    """Flat maps side by side, a marker and a colour for each kind.

    Args:
        panels: title → (points ``[n, 2]``, the kind of each, one of :data:`KINDS`, or ``""`` for points of no kind).
    """
    figure, axes = _figure(4.1 * len(panels), 4.3, len(panels))
    looks = dict(reversed(KINDS.items())) | {"": ("o", ROLE_COLOURS["chance"])}
    for panel, (title, (flat, kinds)) in zip(axes, panels.items(), strict=True):
        for kind, (marker, colour) in looks.items():
            chosen = np.asarray(flat)[np.asarray(kinds) == kind]
            if len(chosen):
                size = 3 if kind == "real" else 6
                panel.plot(*chosen.T, ls="", marker=marker, ms=size, mew=0, color=colour, label=kind or "points")
        panel.set(title=plain(title), xlabel="first axis (no unit)", ylabel="second axis (no unit)", xticks=[], yticks=[])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, markerscale=1.5)
    return figure


@style()
def thumbnails(rows: Mapping[str, np.ndarray], marked: int | None = None, title: str = "") -> Figure:
    """Every head of a layer as a small map of the difference of its attention, a row of maps for each kind.

    In a map rows look at columns; blue is more than in real text.

    Args:
        rows: name → differences ``[heads, l, l]``, such as means over examples.
        marked: a head, counted from 0, that gets a frame.
        title: of the figure.
    """
    heads, length, _ = next(iter(rows.values())).shape
    step, side = length + GAP, 0.8 if heads > 8 else 1.1  # cells and inches from a map to the next
    figure, (panel,) = _figure(2.0 + side * heads, 1.1 + side * len(rows))
    sheet = np.full((len(rows) * step - GAP, heads * step - GAP), np.nan)
    for (row, values), head in itertools.product(enumerate(rows.values()), range(heads)):
        sheet[row * step :, head * step :][:length, :length] = values[head]
        look = {"ec": "black", "lw": 2.2, "zorder": 4} if head == marked else {"ec": "0.7", "lw": 0.6, "zorder": 3}
        panel.add_patch(Rectangle((head * step, row * step), length, length, fill=False, clip_on=False, **look))
    mesh = panel.pcolormesh(sheet, cmap=DIFFERENCE, vmin=-LIMIT, vmax=LIMIT)
    panel.invert_yaxis()
    middle = (length - 1) / 2
    panel.set_xticks(np.arange(heads) * step + middle, range(1, heads + 1))
    panel.set_yticks(np.arange(len(rows)) * step + middle, map(plain, rows))
    panel.set(title=plain(title), xlabel="head", aspect="equal")
    panel.grid(visible=False)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=panel, extend="both", fraction=0.03, ticks=[-LIMIT, 0, LIMIT]).set_label("attention minus real")
    return figure


@style()
def one_head(maps: Mapping[str, np.ndarray], tokens: Sequence[str], title: str = "") -> Figure:
    """One head in one example: its attention to each kind of text, and what each kind adds to that to real text.

    Args:
        maps: kind → weights ``[l, l]``; ``real`` is one of them.
        tokens: the l tokens of the example.
        title: of the figure.
    """
    others = [kind for kind in maps if kind != "real"]
    names, size = [drawn(token)[:12] for token in tokens], 0.155 * len(tokens)
    figure, axes = _figure((1 + len(others)) * (size + 0.5) + 2.4, size + 1.9, 1 + len(others))
    for panel, kind in zip(axes, ["real", *others], strict=True):
        if kind == "real":
            weights = panel.pcolormesh(np.asarray(maps[kind]), cmap=WEIGHT, vmin=0, vmax=1)
        else:
            change = panel.pcolormesh(np.asarray(maps[kind]) - maps["real"], cmap=DIFFERENCE, vmin=-LIMIT, vmax=LIMIT)
        panel.invert_yaxis()
        panel.set_xticks(np.arange(len(names)) + 0.5, names, fontsize=8, rotation=90)
        panel.set_yticks(np.arange(len(names)) + 0.5, names if kind == "real" else [], fontsize=8)
        panel.set(title="real text" if kind == "real" else f"{kind} − real", xlabel="looked at", aspect="equal",
                  ylabel="looking" if kind == "real" else "")
        panel.tick_params(length=0, pad=1)
        panel.grid(visible=False)
    figure.colorbar(weights, ax=axes[0], shrink=0.8, label="attention", ticks=[0, 0.5, 1])
    figure.colorbar(change, ax=axes[-1], shrink=0.8, extend="both", label="attention minus real", ticks=[-LIMIT, 0, LIMIT])
    figure.suptitle(plain(title) if title else None)
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
        panel.set_xticks(range(len(values)), list(values), fontsize=11 if len(values) < 5 else 9)
        panel.grid(axis="x", visible=False)
    return figure


@style()
def dot_rows(rows: Mapping[str, tuple[str, Sequence[float]]], lines: Mapping[str, float], title: str, label: str) -> Figure:
    """A row of dots for each method, a dot for each set (hollow where there is one), with lines such as chance and full data.

    Args:
        rows: name → (role, one of :data:`~distillkit.view.figures.ROLE_COLOURS`, and values).
        lines: name → value; a name that is a role has its colour.
        title, label: of the figure and of x.
    """
    figure, (axes,) = _figure(8, 1.5 + 0.42 * len(rows))
    for place, (name, (role, values)) in enumerate(rows.items()):
        inside = ROLE_COLOURS[role] if len(values) > 1 else "none"
        beside = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)  # equal values stay apart
        axes.plot(values, place + beside, "o", color=ROLE_COLOURS[role], mfc=inside, ms=9, mew=1.6, label=plain(name))
    for name, value in lines.items():
        colour = ROLE_COLOURS.get(name, ROLE_COLOURS["chance"])
        axes.axvline(value, color=colour, ls=":" if name == "chance" else "--", lw=1.5, label=plain(name))
        axes.annotate(plain(name), (value, -0.75), xytext=(4, 0), textcoords="offset points", va="center", fontsize=11,
                      color=colour)
    most = max(max(map(max, (values for _, values in rows.values()))), *lines.values())
    axes.set(title=plain(title), xlabel=label, xlim=(0, 1.15 * most), ylim=(len(rows) - 0.5, -1.1))
    axes.set_yticks(range(len(rows)), map(plain, rows))
    axes.grid(axis="y", visible=False)
    return figure
