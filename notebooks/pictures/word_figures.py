"""Pictures of the lesson "From embeddings to words": promises of swaps, accuracy under two recipes, gains at ten per class.

The cut through the cells of tokens is in :mod:`pictures.cells`, the intervals of gains in :mod:`pictures.forest`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from distillkit.view.figures import ROLE_COLOURS, _figure, points, style

from . import forest

OWN, TUNED = "own: three SGD steps", "tuned: AdamW"
TEN = {"k_center/fixed": ("k-centre", "real"), "random/fixed": ("random sentences", "real"),
       "k_means/fixed": ("medoids", "real"), "keywords/fixed": ("keywords", "text"),
       "sentences/fixed": ("chosen sentences", "text"), "swaps from sentences/fixed": ("swaps from chosen", "text"),
       "relaxed tokens/fixed": ("relaxed tokens", "text"), "projection/fixed": ("projection", "text")}


@style()
def promises(chance: tuple[Tensor, Tensor], promising: tuple[Tensor, Tensor]) -> Figure:
    """What swaps promise against what they do: random ones and those that promise most, each (promised, true)."""
    figure = points("The best promises keep less than half, on average", "promised change of the loss", "true change",
                    {"30 random swaps": chance, "30 that promise most": promising})
    axes = figure.axes[0]
    axes.get_legend().remove()
    places = {"30 random swaps": ("real", 0.7, 0.05), "30 that promise most": ("text", 0.03, 0.9)}
    for line, (name, (role, *place)) in zip(axes.lines, places.items(), strict=False):
        line.set(color=ROLE_COLOURS[role], alpha=0.9)
        axes.text(*place, name, color=ROLE_COLOURS[role], transform=axes.transAxes)
    axes.text(-0.015, -0.018, "true = promised", fontsize=9)
    axes.locator_params(nbins=6)
    return figure


@style()
def recipes(scores: pd.Series, chance: float) -> Figure:
    """The accuracy of learned embeddings, of their nearest words and of cheap text under two recipes, a panel for each.

    Args:
        scores: row → accuracy, of ``classification_docstrings``.
        chance: accuracy.
    """
    rows = {  # label: role, row under the own recipe, row under the tuned one
        "learned embeddings": ("learned", "embeddings/own", "embeddings/tuned"),
        "their nearest words": ("text", "projected/own", "projected/tuned"),
        "keywords": ("text", "keywords + learned labels/own", "keywords/tuned"),
        "k-centre sentences": ("real", None, "k_center/tuned"),
        "random sentences": ("real", "real + learned labels/own", "random/tuned"),
    }
    figure, axes = _figure(8.6, 3.2, 2)
    for where, title, column in zip(axes, (OWN, TUNED), (1, 2), strict=True):
        for place, (label, row) in enumerate(rows.items()):
            if row[column] is None:
                where.text(chance + 0.03, place, "not measured", va="center", fontsize=10, color="0.35")
                continue
            score, colour = scores[row[column]], ROLE_COLOURS[row[0]]
            where.plot(score, place, "o", color=colour, mfc="white", mew=2, ms=8, label=label)
            left = 0 < scores["full/standard"] - score < 0.15  # else the number would stand on the line of full data
            where.annotate(f"{score:.2f}", (score, place), xytext=(-9 if left else 9, 0), textcoords="offset points",
                           ha="right" if left else "left", va="center", fontsize=10)
        for name, level, line in (("full data", scores["full/standard"], "-"), ("chance", chance, ":")):
            where.axvline(level, color="black", ls=line, lw=1.5, label=name, zorder=0)
            where.annotate(name, (level, -1), xytext=(4, -2), textcoords="offset points", fontsize=10, va="top")
        where.set(title=title, xlabel="test accuracy", xlim=(0, 1), ylim=(len(rows) - 0.5, -1.1))
        where.set_yticks(range(len(rows)), list(rows) if where is axes[0] else [])
        where.grid(visible=False)
    figure.suptitle("Nearest words: at chance under the own recipe, below keywords when tuned", fontsize=13)
    return figure


def gains_at_ten(tables: Mapping[str, pd.DataFrame], listed: Mapping[str, Sequence[forest.Gain]]) -> dict:
    """The gains of each panel, without an interval where herding is one and the same set: there it would leave herding out."""
    fixed = {name: table.loc["herding/fixed"].nunique() == 1 for name, table in tables.items()}
    return {name: [dataclasses.replace(gain, sets=1, alone=math.inf, together=math.inf) if fixed[name] else gain
                   for gain in gains] for name, gains in listed.items()}


@style()
def ten_per_class(tables: Mapping[str, pd.DataFrame], listed: Mapping[str, Sequence[forest.Gain]]) -> Figure:
    """Gains over herding at ten per class: the forest, with keywords as a dashed line and the number of sets of each row.

    Args:
        tables: corpus → accuracy of each row and set.
        listed: corpus → gains, as :func:`gains_at_ten` gives them.
    """
    figure = forest.forest(listed, "Ten per class: no search is shown to beat keywords (dashed; one set)\n"
                                   "Chosen sentences clear herding (0) on two of three corpora", "accuracy minus herding")
    labels = {label: place for place, label in enumerate(dict.fromkeys(g.label for gains in listed.values() for g in gains))}
    left, right = figure.axes[0].get_xlim()
    right += 0.06  # room for the number of sets
    for where, (name, gains) in zip(figure.axes, listed.items(), strict=True):
        shown = {gain.label: gain for gain in gains}
        where.set_xlim(left, right)
        where.axvline(shown["keywords"].mean, color=ROLE_COLOURS["text"], ls="--", lw=1.5, zorder=1.5, label="_keywords")
        where.annotate("sets", (right, -0.5), xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=9)
        for row, (label, _) in TEN.items():
            if label in shown:
                sets = tables[name].loc[row].notna().sum()
                where.annotate(str(sets), (right, labels[label]), xytext=(-6, 0), textcoords="offset points", ha="right",
                               va="center", fontsize=9)
            else:
                x = max(0, shown["keywords"].mean) + 0.015  # right of both lines
                where.text(x, labels[label], "not measured", va="center", fontsize=9, color="0.35")
    return figure
