"""Gains with their intervals: what a method adds to the accuracy of another, paired by set, a row per method.

The interval of one comparison holds with 95 %.  A panel of several needs wider ones to hold together (Bonferroni), so both are
drawn: a thick bar for the method alone, a thin one for all of the panel.  A single set, or sets that agree exactly, have no
interval and are a hollow mark.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from distillkit.experiments.results import by_set, paired_difference
from distillkit.view.figures import ROLE_COLOURS, _figure, plain, style


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a row of a result gains over another: the ``mean`` of the differences of ``sets`` sets, half of the 95 % interval of
    this comparison ``alone`` and ``together`` with the others of its list (both infinite for one set), and its ``role``, a key
    of :data:`~distillkit.view.figures.ROLE_COLOURS`."""

    label: str
    role: str
    mean: float
    alone: float
    together: float
    sets: int


def gains(result: Mapping, other: str, rows: Mapping[str, tuple[str, str]], cell: str | None = None) -> list[Gain]:
    """The gains of some rows of a result over the row ``other``, paired by set; a row without a common set is left out.

    Sets that all give the same difference are one set made several times, so they count as one.

    Args:
        result: as :func:`~distillkit.experiments.results.read` returns it.
        other: the row compared with, such as ``"k_center/tuned"``.
        rows: row → (label, role).
        cell: of a grid, the cell.
    """
    sets = by_set(result, cell=cell)
    common = {row: int((sets.reindex([row, other]).notna().all()).sum()) for row in rows}
    several = sum(count > 1 for count in common.values())
    out = []
    for row, (label, role) in rows.items():
        if common[row]:
            mean, alone = paired_difference(sets, row, other)
            together = paired_difference(sets, row, other, max(1, several))[1]
            if alone == 0:
                common[row], alone, together = 1, math.inf, math.inf
            out.append(Gain(label, role, mean, alone, together, common[row]))
    return out


@style()
def forest(panels: Mapping[str, Sequence[Gain]], title: str, x: str, lines: Mapping[str, float] | None = None) -> Figure:
    """Gains as points with intervals, panels side by side; labels stand once, in the order in which they first appear.

    Args:
        panels: title → gains, as :func:`gains` returns them.
        title: of the figure, above the panels.
        x: label of the axes: what is gained over what.
        lines: name → gain of further vertical lines, such as chance.
    """
    labels = list(dict.fromkeys(gain.label for listed in panels.values() for gain in listed))
    width = 9.5 if len(panels) == 1 else 2.9 * len(panels) + 2.2  # one panel leaves room for the legend
    figure, axes = _figure(width, 0.38 * len(labels) + 2, len(panels))
    for where, (name, listed) in zip(axes, panels.items(), strict=True):
        for gain in listed:
            place, colour = labels.index(gain.label), ROLE_COLOURS[gain.role]
            for half, width in ((gain.together, 1.3), (gain.alone, 4)):
                if math.isfinite(half):
                    where.plot([gain.mean - half, gain.mean + half], [place, place], color=colour, lw=width, label="_interval",
                               solid_capstyle="butt")
            fill = colour if gain.sets > 1 else "white"
            where.plot(gain.mean, place, "o", color=colour, mfc=fill, mew=1.6, ms=5.5, label=plain(gain.label))
        where.axvline(0, color="black", lw=1, label="_none")
        for name_of_line, value in (lines or {}).items():
            where.axvline(value, color=ROLE_COLOURS["chance"], ls=":", lw=1.5, label=plain(name_of_line))
            where.annotate(plain(name_of_line), (value, -0.5), xytext=(4, -2), textcoords="offset points", fontsize=10,
                           va="top")
        where.set(title=plain(name), xlabel=x, ylim=(len(labels) - 0.5, -0.5))
        where.set_yticks(range(len(labels)), [plain(label) for label in labels] if where is axes[0] else [])
        where.xaxis.set_major_locator(MaxNLocator(4))
        where.grid(axis="y", visible=False)
    limits = [where.get_xlim() for where in axes]
    for where in axes:  # one scale, so that panels can be compared
        where.set_xlim(min(left for left, _ in limits), max(right for _, right in limits))
    marks = [Line2D([], [], color="0.3", lw=4, label="95 % interval of this gain alone"),
             Line2D([], [], color="0.3", lw=1.3, label="of all gains of the panel together"),
             Line2D([], [], ls="", marker="o", color="0.3", mfc="white", mew=1.6, ms=5.5,
                    label="no interval: one set, or equal sets")]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=14)
    return figure
