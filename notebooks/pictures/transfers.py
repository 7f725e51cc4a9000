"""Text on its way to another model, as pictures of a lesson: what its tokenizer cuts, and what the words are worth there.

:func:`chips` draws the tokens of several models under each other, character over character.  :func:`slopes` joins the scores of
a method on the model that made the text and on those that only read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from distillkit.view.figures import LABELS, METHOD_COLOURS, _figure, plain, style
from distillkit.view.lens.reading import Piece, pieces

__all__ = ["chips", "pieces", "slopes"]

LINE = 64  # characters of text in a line of chips
LINES = {"random": ("o", ":"), "k_center": ("s", "--"), "herding": ("D", "-."), "sentences": ("^", "-"), "swaps": ("v", "-")}
STEP, LEFT = 0.1, 1.75  # of the slopes: from method to method, and room for their names
SAME, OTHER, LOST = "#eeeeee", "#d9c8ec", "#ffffff"  # fills: cut alike by all, cut otherwise here, not read


@style()
def chips(text: str, rows: Mapping[str, Sequence[Piece]], title: str) -> Figure:
    """A text cut by several tokenizers, one under the other; what a model does not read is struck through.

    Args:
        text: on one line; a longer one is broken at spaces.
        rows: label → its pieces, as :func:`~distillkit.view.lens.reading.pieces` returns them.
        title: of the panel.
    """
    lines = _lines(text)
    alike = set.intersection(*({(piece.start, piece.end) for piece in row} for row in rows.values()))
    depth = len(rows) + 0.6
    figure, (axes,) = _figure(11, 0.36 * depth * len(lines) + 0.8)
    for number, (first, last) in enumerate(lines):
        for place, (label, row) in enumerate(rows.items()):
            y = number * depth + place
            axes.text(-1, y, plain(label), ha="right", va="center", fontsize=10)
            for piece in row:
                if first <= piece.start < last:
                    fill = SAME if (piece.start, piece.end) in alike else OTHER
                    _chip(axes, piece, text, first, y, fill if piece.read else LOST)
    axes.set(title=plain(title), xlim=(-14, LINE), ylim=(len(lines) * depth - 0.5, -0.8), xticks=[], yticks=[],
             xlabel="grey: all cut alike here; violet: they differ; struck through: not read, no room or no such token")
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def _chip(axes, piece: Piece, text: str, first: int, y: float, fill: str) -> None:
    left, width = piece.start - first, piece.end - piece.start
    box = {"boxstyle": "round,pad=0,rounding_size=0.25", "mutation_aspect": 0.5, "ec": "0.55", "lw": 0.8, "fc": fill}
    axes.add_patch(FancyBboxPatch((left + 0.06, y - 0.4), width - 0.12, 0.8, **box))
    axes.text(left + width / 2, y, plain(text[piece.start : piece.end]), ha="center", va="center", fontsize=10,
              family="monospace", color="black" if piece.read else "0.45")
    if not piece.read:
        axes.plot([left + 0.1, left + width - 0.1], [y, y], color="#b3261e", lw=1.5, label="_struck")


def _lines(text: str) -> list[tuple[int, int]]:
    """First and last character of each line of at most :data:`LINE` characters, broken at spaces where there are any."""
    lines, first = [], 0
    while first < len(text):
        last = len(text) if len(text) - first <= LINE else text.rfind(" ", first + 1, first + LINE) + 1 or first + LINE
        lines.append((first, last))
        first = last
    return lines


@style()
def slopes(panels: Mapping[str, pd.DataFrame], chance: float, full: Mapping[str, float]) -> Figure:
    """Scores of a method on the model that made its text and on others, a named line for each method, a dot for each set.

    Args:
        panels: title → scores with columns ``method`` (of :data:`LINES`), ``target``, ``set_seed`` and ``accuracy``; targets
            from the left in order of appearance.  What is missing is left out; a single set is hollow.
        chance: accuracy of guessing.
        full: target → accuracy of training on all data, where it was measured.
    """
    figure, axes = _figure(5.8 * len(panels), 4.6, len(panels))
    for panel, (title, scores) in zip(axes, panels.items(), strict=True):
        targets = [*dict.fromkeys(scores["target"])]
        methods = [method for method in LINES if method in set(scores["method"])]
        begins = {}
        for number, method in enumerate(methods):
            rows = scores[scores["method"] == method]
            means = rows.groupby("target")["accuracy"].agg(["mean", "size"]).reindex(targets).dropna()
            aside = STEP * (number - (len(methods) - 1) / 2)  # the methods stand beside each other at each target
            marker, dashes = LINES[method]
            look = {"color": METHOD_COLOURS[method], "marker": marker, "ms": 8, "mew": 1.6}
            panel.plot(means.index.map(targets.index) + aside, means["mean"], dashes, lw=2, **look,
                       label=LABELS.get(method, method))
            single = means["mean"][means["size"] == 1]
            places = [targets.index(target) + aside for target in single.index]
            panel.plot(places, single, ls="", mfc="white", **look, label="_one set")
            panel.plot(rows["target"].map(targets.index) + aside, rows["accuracy"], ".", ms=6, color="black", mfc="white",
                       mew=0.8, zorder=3, label="_sets")
            begins[method] = means["mean"].iloc[0]
        _names(panel, begins)
        for target, score in full.items():
            if target in targets:
                place = targets.index(target)
                panel.plot([place - 0.3, place + 0.3], [score, score], color="black", lw=2.5, zorder=1, label="_all data")
                panel.annotate("all data", (place + 0.32, score), va="center", fontsize=10)
        panel.axhline(chance, color="black", lw=1.2, ls=":", label="_chance")
        panel.annotate("guessing", (-LEFT + 0.02, chance), xytext=(0, -4), textcoords="offset points", va="top", fontsize=10)
        panel.set(title=plain(title), ylabel="test accuracy", xlim=(-LEFT, len(targets) - 0.25), ylim=(0.1, 0.88))
        panel.set_xticks(range(len(targets)), [plain(target) for target in targets])
        panel.set_xlabel("trained on (a small dot: one set)")
    return figure


def _names(panel, begins: Mapping[str, float]) -> None:
    """Name each line at its left end, the names as far apart as they need to be read."""
    height = 0.0
    for method in sorted(begins, key=begins.__getitem__):
        height = max(begins[method], height + 0.045)
        panel.text(-0.22, height, LABELS.get(method, method), ha="right", va="center", fontsize=10)
