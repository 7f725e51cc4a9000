"""Text on its way to another model, as a picture of a lesson.

:func:`slopes` joins the scores of a method on the model that made the text and on those that only read it.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from distillkit.view.figures import LABELS, METHOD_COLOURS, _figure, plain, style

LINES = {"random": ("o", ":"), "k_center": ("s", "--"), "herding": ("D", "-."), "sentences": ("^", "-"), "swaps": ("v", "-"),
         "keywords": ("P", "--")}
STEP, LEFT = 0.11, 1.75  # of the slopes: from method to method, and room for their names


@style()
def slopes(panels: Mapping[str, pd.DataFrame], chance: float, full: Mapping[str, float]) -> Figure:
    """Scores of a method on the model that made its text and on others, a named line for each method, a dot for each set.

    Args:
        panels: title → scores with columns ``method`` (of :data:`LINES`), ``target``, ``set_seed`` and ``accuracy``; targets
            from the left in order of appearance.  What is missing is left out; a single set is hollow.
        chance: accuracy of guessing.
        full: target → accuracy of training on all data, where it was measured.
    """
    columns = max(scores["target"].nunique() for scores in panels.values())
    figure, axes = _figure(max(5.4, 1.4 + 1.47 * columns) * len(panels), 4.6, len(panels))
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
            centres = means.index.map(targets.index) + aside
            panel.plot(centres, means["mean"], dashes, lw=1.2, color=METHOD_COLOURS[method], alpha=0.45, label="_joined")
            panel.plot(centres, means["mean"], ls="", **look, label=LABELS.get(method, method))
            single = means["mean"][means["size"] == 1]
            places = [targets.index(target) + aside for target in single.index]
            panel.plot(places, single, ls="", mfc="white", **look, label="_one set")
            rows = rows[rows["target"].map(means["size"]) > 1]
            spots = [targets.index(target) + aside for target in rows["target"]]
            panel.plot(spots, rows["accuracy"], ".", ms=6, color="black", mfc="white",
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
        panel.set(title=plain(title), ylabel="test accuracy", xlim=(-LEFT, len(targets) - 0.25),
                  ylim=(min(0.1, chance - 0.06), max([*scores["accuracy"], *full.values()]) + 0.08))
        panel.set_xticks(range(len(targets)), [plain(target) for target in targets])
        panel.set_xlabel("trained on (dot or hollow mark: one set)")
    return figure


def _names(panel, begins: Mapping[str, float]) -> None:
    """Name each line at its left end, the names as far apart as they need to be read."""
    height = 0.0
    for method in sorted(begins, key=begins.__getitem__):
        height = max(begins[method], height + 0.045)
        panel.text(-0.26, height, LABELS.get(method, method), ha="right", va="center", fontsize=10)
