"""Where a student ends beside where an expert went, as pictures of a lesson on trajectory matching.

Weights have thousands or millions of coordinates, but the matching loss needs two of them.  :func:`in_plane` gives these: how
far a point lies along the expert's move, and how far off the line through its two ends, both in units of the move.  They are
the coordinates of the point in the plane that it spans with the two ends, so that both of its distances are exact:
(1 − along)² + off² is the matching loss.  Every point has a plane of its own; :func:`plane` folds them onto one sheet, with the
expert's line as the hinge.  Only distances between two points off the line are not those of weight space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from distillkit.experiments.results import by_set, paired_difference
from distillkit.view.figures import LABELS, ROLE_COLOURS, _figure, plain, shades, style

RINGS = (0.05, 0.25, 0.5, 1.0)  # matching losses whose circles are drawn around the expert's end
# Every difference on the instruction task that lessons 04 and 10 speak of; both correct their intervals for all of them.
COMPARED = (
    ("nacd/standard", "random/standard"), ("nacd/standard", "k_center/standard"), ("nacd/standard", "less/standard"),
    ("nacd/standard", "chosen pairs/standard"), ("nacd/own", "random/standard"), ("chosen pairs/standard", "random/standard"),
    ("chosen pairs/standard", "less/standard"), ("k_center/standard", "random/standard"), ("less/standard", "random/standard"),
)
DASHES = {"full": "-", "real": "--", "learned": "-"}


def in_plane(point: Mapping[str, Tensor], start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> tuple[float, float]:
    """Along and off the expert's move, in units of its length: ``start`` is (0, 0) and ``end`` (1, 0).

    Args:
        point, start, end: parameters of the same names.

    Raises:
        ValueError: start and end are the same point.
    """
    origin, move = _flat(start), _flat(end) - _flat(start)
    away, length = _flat(point) - origin, float(move.norm())
    if not length:
        raise ValueError(f"start and end are the same point ({len(move)} numbers), so that no line joins them")
    along = float(away @ move) / length**2
    return along, float((away - along * move).norm()) / length


def _flat(params: Mapping[str, Tensor]) -> Tensor:
    """All parameters as one float64 vector, in the order of their names."""
    return torch.cat([params[name].detach().flatten().double().cpu() for name in sorted(params)])


@style()
def plane(paths: Mapping[str, tuple[str, Sequence[tuple[float, float]]]], title: str) -> Figure:
    """Paths through weight space on one sheet, around the expert's end circles of equal matching loss.

    Args:
        paths: label → role (``"full"`` for the expert, ``"real"``, ``"learned"``) and the points, as :func:`in_plane` gives
            them; the last one is where training ended, and a dotted line joins it to the expert's end.
        title: of the panel.
    """
    figure, (axes,) = _figure(9, 5)
    angles = np.linspace(0, 2 * np.pi, 200)
    for loss in RINGS:
        axes.plot(1 + loss**0.5 * np.cos(angles), loss**0.5 * np.sin(angles), color="0.7", lw=1, label="_ring")
        axes.annotate(f"loss {loss:g}", (1, loss**0.5), ha="center", va="bottom", fontsize=9, color="0.35")
    for label, (role, points) in paths.items():
        (along, off), colour = np.transpose(points), ROLE_COLOURS[role]
        axes.plot(along, off, DASHES[role], marker="o", ms=4, lw=2, color=colour, label=label)
        if role != "full":
            axes.plot([along[-1], 1], [off[-1], 0], ":", color=colour, lw=2)
            axes.plot(along[-1], off[-1], "o", ms=10, color=colour, mfc="white" if role == "real" else colour, mew=2)
    axes.plot([0, 1], [0, 0], "o", ms=10, color=ROLE_COLOURS["full"])
    for x, name in ((0, r"$\theta^*_{start}$"), (1, r"$\theta^*_{end}$")):
        axes.annotate(name, (x, 0), xytext=(0, -14), textcoords="offset points", ha="center", va="top", fontsize=13)
    axes.set(title=plain(title), xlabel="along the expert's move (1 = all of it)", ylabel="off the expert's line (same unit)",
             xlim=(-0.12, 1.45), ylim=(-0.13, 1.08), aspect="equal")
    left = Line2D([], [], ls=":", lw=2, color="0.35", label="what is left: √loss")
    lines, _ = axes.get_legend_handles_labels()
    axes.legend(handles=[*lines, left], loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure


@style()
def losses(curves: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Matching losses over the outer steps, a line for each set; the right axis reads them as the distance left, √loss.

    Args:
        curves: name of a set → its matching loss before each outer step.
        title: of the panel.
    """
    figure, (axes,) = _figure(8, 4)
    for (label, curve), colour in zip(curves.items(), shades("learned", len(curves)), strict=True):
        axes.plot(range(len(curve)), curve, lw=1.3, color=colour, label=label)
        axes.plot(0, curve[0], "o", ms=7, mfc="none", mew=1.5, color=ROLE_COLOURS["real"], label="_control")
    axes.annotate("real\nprompts", (0, min(curve[0] for curve in curves.values())), xytext=(-4, -42), va="top", fontsize=11,
                  textcoords="offset points", color="0.3")
    axes.set(title=plain(title), xlabel="outer steps done", ylabel="matching loss", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    way = axes.secondary_yaxis("right", functions=(lambda loss: np.sqrt(np.maximum(loss, 0)), np.square))
    way.set_ylabel("distance left (√)")
    way.set_yticks([0.2, 0.3, 0.4, 0.5, 0.6])
    return figure


ROLE_OF = {"nacd": "learned", "nacd vectors": "learned", "bptt": "learned", "chosen pairs": "text"}


@style()
def gains(result: Mapping, other: str, chance: float, title: str, gain_title: str, comparisons: int) -> Figure:
    """A forest plot of an experiment on instruction tuning: accuracy of every set, and the gain over one row, paired by set.

    Args:
        result: as :class:`~distillkit.experiments.instruction.InstructionJob` writes it; only rows that have scores are drawn.
        other: the row that gains are measured over, such as ``"random/standard"``.
        chance: accuracy of guessing.
        title: of the left panel.
        gain_title: of the right panel.
        comparisons: how many of them the thin intervals hold for together; a thick one holds for its gain alone.

    The rows of a method stand together.  A row of a single set has hollow marks and no interval.  The axis begins left of the
    lowest row; a level that lies farther left stands in words below it.
    """
    sets = by_set(result).dropna(how="all")
    full, zero = (sets.loc[name].mean() for name in ("full/standard", "zero-shot/none"))
    rows = sets.drop(["full/standard", "zero-shot/none"])
    means = rows.mean(axis=1)
    best = means.groupby(means.index.str.split("/").str[0]).transform("max")  # the rows of a method stand together
    rows = rows.loc[sorted(rows.index, key=lambda name: (-best[name], name.split("/")[0], -means[name]))]
    figure, (left, right) = _figure(11.5, 0.42 * len(rows) + 1.6, 2, ratios=(3, 2))
    for place, (name, scores) in enumerate(rows.iterrows()):
        scores = scores.dropna()
        colour = ROLE_COLOURS[ROLE_OF.get(str(name).split("/")[0], "real")]
        face = colour if len(scores) > 1 else "white"
        heights = place + np.linspace(-0.18, 0.18, len(scores)) * (len(scores) > 1)  # no dot hides another
        left.plot(scores, heights, "o", ms=6, color=colour, mfc=face, mew=1.5, label=_label(str(name)))
        if len(scores) > 1:
            left.plot(scores.mean(), place, "|", ms=22, mew=2.5, color=colour)
        if name != other:
            for together, width in ((comparisons, 1.3), (1, 4)):
                mean, half = paired_difference(sets, str(name), other, together)
                if np.isfinite(half):
                    right.plot([mean - half, mean + half], [place, place], color=colour, lw=width, label="_interval",
                               solid_capstyle="butt")
            right.plot(mean, place, "o", ms=7, color=colour, mfc=face, mew=1.5, label="_gain")
        else:
            right.annotate("reference", (0, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=10)
    edge = min(float(rows.min().min()), full) - 0.05
    levels = (("guessing", chance, ":", "right"), ("no training", zero, "--", "left"), ("all pairs", full, "-", "right"))
    outside = [f"{label} {score:.2f}" for label, score, *_ in levels if score < edge]
    for label, score, dashes, side in levels:
        if score >= edge:
            left.axvline(score, color=ROLE_COLOURS["full"], lw=1.5, ls=dashes)
            left.annotate(f"{label} {score:.2f}", (score, -0.7), xytext=(4 if side == "left" else -4, 0), ha=side,
                          textcoords="offset points", fontsize=9)
    left.set_yticks(range(len(rows)), [_label(str(name)) for name in rows.index], fontsize=10)
    left.set(title=plain(title), xlim=(edge, full + 0.03), xlabel="test accuracy (a dot per set; stroke: mean)"
             + ("\nfarther left: " + ", ".join(outside) if outside else ""))
    right.axvline(0, color="black", lw=1)
    right.set_yticks(range(len(rows)), [])
    right.set(title=plain(gain_title),
              xlabel=f"minus {other.split('/')[0]} pairs, paired, 95 %\n(thick: alone, thin: {comparisons} together)")
    right.xaxis.set_major_locator(MaxNLocator(5))
    for axes in (left, right):
        axes.set_ylim(len(rows) - 0.5, -1)
        axes.grid(axis="y", visible=False)
    return figure


def differences(sets: pd.DataFrame) -> list[str]:
    """The differences of :data:`COMPARED` in words, a line for each: mean, half of the 95 % interval alone and together.

    Args:
        sets: as :func:`~distillkit.experiments.results.by_set` gives it.
    """
    shorter = {"nacd": "NACD", "k_center": "k-centre", "less": "LESS"}
    lines = [f"{'':32}    mean   95 % ±, alone   all {len(COMPARED)} together"]
    for number, (one, other) in enumerate(COMPARED, start=1):
        (mean, alone), (_, together) = (paired_difference(sets, one, other, count) for count in (1, len(COMPARED)))
        first, second = (shorter.get(name.split("/")[0], name.split("/")[0]) for name in (one, other))
        words = f"{number}  {first}{', own steps' * one.endswith('own')} minus {second}"
        lines.append(f"{words:32}  {mean:+.3f}           {alone:.3f}            {together:.3f}")
    return lines


def _label(name: str) -> str:
    """A row ``method/recipe`` in words."""
    method, recipe = name.split("/")
    return f"{LABELS.get(method, method)} ({recipe})"
