"""Figures of what a set costs: accuracy against operations, bytes as dots, and settings that are varied one at a time.

A point that stands for several sets is filled and has a bar of their standard deviation; a single set is hollow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from distillkit.view.figures import ROLE_COLOURS, _figure, plain, style

BESIDE = {"right": ((8, 0), "left", "center"), "left": ((-8, 0), "right", "center"), "above": ((0, 8), "center", "bottom"),
          "below": ((0, -8), "center", "top"), "below left": ((-5, -3), "right", "top"),
          "above left": ((-5, 3), "right", "bottom"), "above right": ((2, 7), "left", "bottom"),
          "far below": ((24, -22), "center", "top")}
MEANING = {"full": "trained on the corpus", "learned": "learned sets", "text": "keywords", "real": "real sentences"}
MANY = 6  # values of a setting that are all named on its axis


def front(points: pd.DataFrame) -> pd.DataFrame:
    """The points that nothing beats at the same cost or less, the cheapest first; columns ``cost`` and ``accuracy``."""
    ordered = points.sort_values(["cost", "accuracy"], ascending=[True, False], kind="stable")
    return ordered[ordered["accuracy"] > ordered["accuracy"].cummax().shift(fill_value=-np.inf)]


def _dot(axes, x: float, y: float, deviation: float, colour: str, several: bool, label: str = "_point") -> None:
    """A point with the standard deviation over its sets, hollow where there is only one."""
    if several:
        axes.errorbar(x, y, yerr=deviation, fmt="none", capsize=3, ecolor=colour, label="_deviation")
    axes.plot(x, y, "o", ms=7, mew=1.6, mec=colour, mfc=colour if several else "white", label=label)


def _beside(axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names of lines to the right of a panel, each at its line's last height; near ones are moved apart.

    Args:
        labels: height in data, name and colour of each.
    """
    low, high = axes.get_ylim()
    gap, last = (high - low) / 16, np.inf
    for height, name, colour in sorted(labels, reverse=True):
        last = min(height, last - gap)
        axes.annotate(plain(name), (1.02, last), xycoords=("axes fraction", "data"), ha="left", va="center", color=colour,
                      fontsize=11)


@style()
def pareto(panels: Mapping[str, pd.DataFrame], cost: str, chance: float, joined: Sequence[str] = ()) -> Figure:
    """Accuracy against cost on a logarithmic axis, with the Pareto line; the panels have the same axes.

    Args:
        panels: title → a row for each point: ``label``, ``role`` of :data:`ROLE_COLOURS`, ``cost``, ``accuracy``,
            ``deviation`` over ``sets`` sets, and ``place``, the side of the label.
        cost: the label of the axis, with its unit.
        chance: the accuracy of guessing.
        joined: labels of points that are one method on different rows; a thin line joins them.
    """
    figure, panes = _figure(8 if len(panels) == 1 else 6.2 * len(panels), 4.9, len(panels))
    everything = pd.concat(list(panels.values()))
    costs = everything["cost"]
    for axes, (title, points) in zip(panes, panels.items(), strict=True):
        for row in points.itertuples():
            _dot(axes, row.cost, row.accuracy, row.deviation, ROLE_COLOURS[row.role], row.sets > 1, label=plain(row.label))
            offset, horizontal, vertical = BESIDE[row.place]
            leader = {"arrowstyle": "-", "color": "0.4", "lw": 0.8, "shrinkB": 5} if row.place.startswith("far") else None
            axes.annotate(plain(row.label), (row.cost, row.accuracy), xytext=offset, textcoords="offset points", fontsize=11,
                          ha=horizontal, va=vertical, arrowprops=leader)
        pair = points[points["label"].isin(joined)]
        axes.plot(pair["cost"], pair["accuracy"], color="0.4", lw=1, zorder=1, label="_joined")
        best = front(points)
        axes.plot([*best["cost"], costs.max() * 3], [*best["accuracy"], best["accuracy"].iloc[-1]], color="black", lw=1,
                  ls="--", drawstyle="steps-post", label="Pareto line", zorder=0)
        axes.axhline(chance, color=ROLE_COLOURS["chance"], lw=1.2, ls=":", label="_chance")
        axes.annotate("chance", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=11,
                      color=ROLE_COLOURS["chance"])
        axes.set(xscale="log", xlabel=cost, ylim=(0.1, 0.9), title=title, xlim=(costs.min() / 3, costs.max() * 3))
    panes[0].set_ylabel("accuracy on the test split")
    handles = [Line2D([], [], marker="o", ls="", ms=7, color=ROLE_COLOURS[role], label=meaning)
               for role, meaning in MEANING.items() if role in {*everything["role"]}]
    handles += [Line2D([], [], marker="o", ls="", ms=7, mew=1.6, mec="0.3", mfc="white", label="single set or training"),
                Line2D([], [], color="black", lw=1, ls="--", label="Pareto line")]
    figure.legend(handles=handles, loc="outside lower center", ncols=6 if len(panels) > 1 else 3, frameon=False, fontsize=11)
    return figure


@style()
def byte_dots(rows: pd.DataFrame, title: str, line: tuple[str, float]) -> Figure:
    """What sets and texts weigh, as dots on a logarithmic axis, each with what it is worth.

    Args:
        rows: from above: ``label``, ``role``, ``nbytes``, and ``worth``, the words behind the dot; where ``sets`` is
            given, a single set is hollow; where ``accuracy`` is given, its words stand in a column on the right.
        title: the finding.
        line: name and bytes of what all are compared with.
    """
    figure, (axes,) = _figure(9, 0.45 * len(rows) + 1.5)
    for place, row in enumerate(rows.itertuples()):
        colour = ROLE_COLOURS[row.role]
        fill = "white" if getattr(row, "sets", 0) == 1 else colour
        axes.plot(row.nbytes, place, "o", mec=colour, mfc=fill, mew=1.8, ms=9, label=plain(row.label))
        axes.text(row.nbytes * 1.3, place, plain(f"{row.nbytes:,.0f} B  {row.worth}".rstrip()), va="center", fontsize=11,
                  bbox={"color": "white", "pad": 1})
    name, weight = line
    axes.axvline(weight, color="black", ls="--", lw=1.2, label=name, zorder=0)
    axes.set_yticks(range(len(rows)), [plain(label) for label in rows["label"]], fontsize=11)
    columns = "accuracy" in rows.columns
    axes.set(xscale="log", xlabel="bytes (logarithmic)", ylim=(len(rows) - 0.4, -1.1 if columns else -0.6),
             xlim=(100, rows["nbytes"].max() * (12 if columns else 1500)))
    axes.set_title(title, pad=24 if columns else 22)
    named = axes.secondary_xaxis("top")
    named.set_xticks([weight], [plain(name)], fontsize=11)
    named.minorticks_off()
    named.tick_params(length=0)
    named.spines["top"].set_visible(False)
    if columns:
        beside = axes.secondary_yaxis("right")
        beside.set_yticks([-0.75, *range(len(rows))], ["accuracy", *map(plain, rows["accuracy"])], fontsize=11)
        beside.tick_params(length=0)
        beside.spines["right"].set_visible(False)
    return figure


@style()
def varied(panels: Sequence[tuple[str, str, pd.DataFrame]], lines: Mapping[str, float],
           quantity: str = "accuracy on the test split", *, ylim: tuple[float, float] = (-0.03, 0.93),
           direct: bool = False) -> Figure:
    """Accuracy against settings, a panel each on one scale.

    Args:
        panels: title, name of the setting, and points: ``x``, ``line`` (those of one name are joined), ``colour``,
            ``accuracy``, ``deviation`` over ``sets`` sets; where ``filled`` is given, it says which marks are.
        lines: accuracies to draw across, by name, such as chance and the full data.
        quantity: the label of the accuracies.
        ylim: the ends of its axis.
        direct: names beside the lines instead of a legend.
    """
    figure, panes = _figure(max(4 * len(panels), 7) + direct, 4.4, len(panels))
    for axes, (title, setting, points) in zip(panes, panels, strict=True):
        for name, group in points.groupby("line", sort=False):
            axes.plot(group["x"], group["accuracy"], color=group["colour"].iloc[0], lw=1.6, zorder=1, label=plain(name))
            for row in group.itertuples():
                _dot(axes, row.x, row.accuracy, row.deviation, row.colour, getattr(row, "filled", row.sets > 1))
        for number, (name, value) in enumerate(lines.items()):
            axes.axhline(value, color="0.2", lw=1.2, ls=(":", "--", "-.")[number % 3], label=name)
            if direct:
                axes.annotate(plain(name), (0.01, value), xycoords=("axes fraction", "data"), xytext=(0, 2),
                              textcoords="offset points", color="0.2", fontsize=11)
        ticks = sorted({*points["x"]})
        axes.set(title=title, xlabel=setting, ylim=ylim, xscale="log")
        if len(ticks) <= MANY:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.12)
        if direct:
            ends = points.sort_values("x").groupby("line", sort=False).last()
            _beside(axes, [*zip(ends["accuracy"], ends.index, ends["colour"], strict=True)])
    panes[0].set_ylabel(quantity)
    if direct:
        return figure
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
    figure, (axes,) = _figure(8.5, 4)
    last = int(min(2 * pays + 1, 200))
    trainings = np.arange(last + 1)
    bills = {"full data each time": (trainings * full, ROLE_COLOURS["full"]),
             "distil once, then the set": (distilling + trainings * small, ROLE_COLOURS["learned"])}
    for name, (bill, colour) in bills.items():
        axes.plot(trainings, bill, color=colour, lw=2, label=name)
    title = f"Distilling costs less from training {pays:,} on" if np.isfinite(pays) else "Distilling never costs less"
    axes.set(title=title, xlabel="trainings", ylabel="TFLOPs in all", ylim=(0, None), xlim=(0, last))
    if pays <= last:
        meet = distilling / (full - small)
        axes.plot(meet, meet * full, "o", mec="black", mfc="white", mew=1.6, ms=9, label=f"equal after {meet:.1f}")
        axes.annotate(f"equal after {meet:.1f}", (meet, meet * full), xytext=(-10, 8), textcoords="offset points", ha="right",
                      fontsize=11)
        axes.fill_between([pays, last], 0, 1, transform=axes.get_xaxis_transform(), color=ROLE_COLOURS["learned"], alpha=0.12,
                          lw=0, zorder=0)
        axes.annotate(f"pays from\ntraining {pays:,}", (pays, 0.05), xycoords=("data", "axes fraction"), xytext=(6, 0),
                      textcoords="offset points", fontsize=11, color=ROLE_COLOURS["learned"])
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    _beside(axes, [(bill[-1], name, colour) for name, (bill, colour) in bills.items()])
    return figure
