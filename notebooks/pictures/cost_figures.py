"""Figures of what a set costs: accuracy against operations, bytes as dots, and settings that are varied one at a time.

A point that stands for several sets is filled and has a bar of their standard deviation; a single set is hollow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distillkit.view.figures import ROLE_COLOURS, _figure, plain, style

BESIDE = {"right": ((8, 0), "left", "center"), "left": ((-8, 0), "right", "center"), "above": ((0, 8), "center", "bottom"),
          "below": ((0, -8), "center", "top"), "below left": ((2, -8), "right", "top"),
          "far below": ((24, -22), "center", "top"), "far above": ((0, 13), "center", "bottom")}


def front(points: pd.DataFrame) -> pd.DataFrame:
    """The points that nothing beats at the same cost or less, the cheapest first; columns ``cost`` and ``accuracy``."""
    ordered = points.sort_values(["cost", "accuracy"], ascending=[True, False], kind="stable")
    return ordered[ordered["accuracy"] > ordered["accuracy"].cummax().shift(fill_value=-np.inf)]


def _dot(axes, x: float, y: float, deviation: float, colour: str, several: bool, label: str = "_point") -> None:
    """A point with the standard deviation over its sets, hollow where there is only one."""
    if several:
        axes.errorbar(x, y, yerr=deviation, fmt="none", capsize=3, ecolor=colour, label="_deviation")
    axes.plot(x, y, "o", ms=8, mew=1.8, mec=colour, mfc=colour if several else "white", label=label)


@style()
def pareto(panels: Mapping[str, pd.DataFrame], cost: str, chance: float) -> Figure:
    """Accuracy against cost on a logarithmic axis, with the Pareto line; the panels have the same axes.

    Args:
        panels: title → a row for each point: ``label``, ``role`` of :data:`ROLE_COLOURS`, ``cost``, ``accuracy``,
            ``deviation`` over ``sets`` sets, and ``place``, the side of the label.
        cost: the label of the axis, with its unit.
        chance: the accuracy of guessing.
    """
    figure, panes = _figure(8 if len(panels) == 1 else 6.5 * len(panels), 4.8, len(panels))
    costs = pd.concat(list(panels.values()))["cost"]
    for axes, (title, points) in zip(panes, panels.items(), strict=True):
        for row in points.itertuples():
            _dot(axes, row.cost, row.accuracy, row.deviation, ROLE_COLOURS[row.role], row.sets > 1, label=plain(row.label))
            offset, horizontal, vertical = BESIDE[row.place]
            leader = {"arrowstyle": "-", "color": "0.4", "lw": 0.8, "shrinkB": 5} if row.place.startswith("far") else None
            axes.annotate(plain(row.label), (row.cost, row.accuracy), xytext=offset, textcoords="offset points", fontsize=11,
                          ha=horizontal, va=vertical, arrowprops=leader)
        best = front(points)
        axes.plot([*best["cost"], costs.max() * 4], [*best["accuracy"], best["accuracy"].iloc[-1]], color="black", lw=1,
                  ls="--", drawstyle="steps-post", label="Pareto line", zorder=0)
        axes.axhline(chance, color=ROLE_COLOURS["chance"], lw=1.2, ls=":", label="_chance")
        axes.annotate("chance", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=11,
                      color=ROLE_COLOURS["chance"])
        axes.set(xscale="log", xlabel=cost, ylim=(0.1, 0.9), title=title, xlim=(costs.min() / 8, costs.max() * 4))
    panes[0].set_ylabel("accuracy on the test split")
    return figure


@style()
def byte_dots(rows: pd.DataFrame, title: str, line: tuple[str, float]) -> Figure:
    """What sets and texts weigh, as dots on a logarithmic axis, each with what it is worth.

    Args:
        rows: from above: ``label``, ``role``, ``nbytes``, and ``worth``, the words behind the dot; where ``sets`` is
            given, a single set is hollow.
        title: the finding.
        line: name and bytes of what all are compared with.
    """
    figure, (axes,) = _figure(9, 0.45 * len(rows) + 1.5)
    for place, row in enumerate(rows.itertuples()):
        colour = ROLE_COLOURS[row.role]
        fill = "white" if getattr(row, "sets", 0) == 1 else colour
        axes.plot(row.nbytes, place, "o", mec=colour, mfc=fill, mew=1.8, ms=9, label=plain(row.label))
        axes.text(row.nbytes * 1.3, place, plain(f"{row.nbytes:,.0f} B  {row.worth}"), va="center", fontsize=11,
                  bbox={"color": "white", "pad": 1})
    name, weight = line
    compared = axes.axvline(weight, color="black", ls="--", lw=1.2, label=name, zorder=0)
    axes.set_yticks(range(len(rows)), [plain(label) for label in rows["label"]], fontsize=11)
    axes.set(xscale="log", xlabel="bytes (logarithmic)", title=title, ylim=(len(rows) - 0.4, -0.6),
             xlim=(100, rows["nbytes"].max() * 1500))
    figure.legend(handles=[compared], loc="outside lower right", frameon=False, fontsize=11)
    return figure


@style()
def varied(panels: Sequence[tuple[str, str, pd.DataFrame]], lines: Mapping[str, float],
           quantity: str = "accuracy on the test split") -> Figure:
    """Accuracy against settings, a panel each on one scale.

    Args:
        panels: title, name of the setting, and points: ``x``, ``line`` (those of one name are joined), ``colour``,
            ``accuracy``, ``deviation`` over ``sets`` sets.
        lines: accuracies to draw across, by name, such as chance and the full data.
        quantity: the label of the accuracies.
    """
    figure, panes = _figure(max(4 * len(panels), 7), 4.4, len(panels))
    for axes, (title, setting, points) in zip(panes, panels, strict=True):
        for name, group in points.groupby("line", sort=False):
            axes.plot(group["x"], group["accuracy"], color=group["colour"].iloc[0], lw=1.6, zorder=1, label=plain(name))
            for row in group.itertuples():
                _dot(axes, row.x, row.accuracy, row.deviation, row.colour, row.sets > 1)
        for number, (name, value) in enumerate(lines.items()):
            axes.axhline(value, color="0.2", lw=1.2, ls=(":", "--", "-.")[number % 3], label=name)
        ticks = sorted({*points["x"]})
        axes.set(title=title, xlabel=setting, ylim=(-0.03, 0.93), xscale="log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.margins(x=0.12)
    panes[0].set_ylabel(quantity)
    names = dict(sorted({label: handle for axes in panes for handle, label in zip(*axes.get_legend_handles_labels())}.items(),
                        key=lambda pair: pair[0] in lines))
    figure.legend([*names.values()], [*names], loc="outside lower center", ncols=min(3, 1 + len(panels)), frameon=False,
                  fontsize=11)
    return figure


@style()
def running_cost(distilling: float, full: float, small: float, pays: float) -> Figure:
    """What n trainings cost in all, on the full data and on a set that has to be distilled first.

    Args:
        distilling, full, small: TFLOPs of distilling, of a training on the full data and of one on the set.
        pays: the number of trainings from which distilling costs less, as :func:`distillkit.applications.costs.break_even`
            gives it; may be infinite.
    """
    figure, (axes,) = _figure(7.5, 4)
    last = int(min(2 * pays + 1, 200))
    trainings = np.arange(last + 1)
    axes.plot(trainings, trainings * full, color=ROLE_COLOURS["full"], lw=2, label="full data each time")
    axes.plot(trainings, distilling + trainings * small, color=ROLE_COLOURS["learned"], lw=2, label="distil once, then the set")
    if pays <= last:
        axes.plot(pays, pays * full, "o", color=ROLE_COLOURS["full"], ms=9, label=f"n* = {pays:,}")
    title = f"Distilling costs less from training {pays:,} on" if np.isfinite(pays) else "Distilling never costs less"
    axes.set(title=title, xlabel="trainings", ylabel="TFLOPs in all", ylim=(0, None), xlim=(0, last))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.legend(frameon=False)
    return figure
