"""Figures: data in, a matplotlib Figure out, and nothing shown or saved on the way.

All share one style: seaborn's white-grid theme, its colour-blind palette, and the same colour for the same method
wherever it appears.  :func:`describe` says in words what a figure holds, so that a test can compare what a picture shows
without comparing pixels.  Corpus text goes through :func:`plain` first, because matplotlib reads ``$`` as mathematics.
"""

from __future__ import annotations

import contextlib
import html
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

METHOD_COLOURS = dict(
    zip(
        ("embeddings", "projected", "full", "random", "k_center", "herding", "real + learned labels"),
        (sns.color_palette("colorblind", 10)[i] for i in (0, 1, 7, 8, 2, 4, 9)),
        strict=True,
    )
)
LABELS = {
    "embeddings": "distilled embeddings",
    "projected": "… projected to words",
    "full": "full training data",
    "k_center": "real, k-centre",
    "herding": "real, herding",
    "random": "real, random",
    "real + learned labels": "real, labels learned",
}
DPI = 150


@contextlib.contextmanager
def style():
    """The kit's style, for the figures made inside; the caller's own settings are left alone."""
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"), matplotlib.rc_context({"figure.dpi": 100}):
        yield


def plain(text: str) -> str:
    """``text`` as matplotlib prints it letter by letter."""
    return text.replace("$", r"\$")


class _Shown(Figure):
    """A figure that a notebook shows by itself, without pyplot, which would keep it alive and show it a second time."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()


def _figure(width: float, height: float, columns: int = 1, ratios: Sequence[float] | None = None):
    figure = _Shown(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, width_ratios=ratios, squeeze=False)[0]
    return figure, axes


def draw_curve(axes, losses: Sequence[float], window: int = 10) -> None:
    """Outer loss at each step (faint) and its running mean over ``window`` steps."""
    steps = np.arange(1, len(losses) + 1)
    colour = METHOD_COLOURS["embeddings"]
    axes.plot(steps, losses, color=colour, alpha=0.25, lw=1, label="each step")
    if len(losses) >= window:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, color=colour, lw=2, label=f"mean of {window} steps")
    axes.set(xlabel="outer step", ylabel="loss on real text", title="Learning the set")
    axes.legend(frameon=False)


def draw_scores(axes, rows: Sequence[dict], chance: float | None = None) -> None:
    """A bar for each row of a result: mean accuracy, a dot for each seed, the recipe in the label."""
    names = []
    for place, row in enumerate(rows):
        axes.barh(place, row["mean"], color=METHOD_COLOURS[row["method"]], alpha=0.85, height=0.65)
        axes.plot(row["scores"], [place] * len(row["scores"]), ".", color="black", ms=4, alpha=0.6)
        reach = max(row["mean"], *row["scores"])
        spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
        axes.text(reach + 0.012, place, f"{row['mean']:.2f}{spread}", va="center", fontsize=9)
        names.append(f"{LABELS[row['method']]}\n({row['examples']:,} examples, {row['recipe']['name']})")
    if chance is not None:
        axes.axvline(chance, color="black", lw=1, ls=":")
        axes.annotate("chance", (chance, -0.5), xytext=(3, 0), textcoords="offset points", va="top", fontsize=8)
    axes.set(yticks=range(len(rows)), xlim=(0, 1), xlabel="accuracy on the test split (dots: seeds)")
    axes.set_yticklabels(names, fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.75)
    axes.grid(axis="y", visible=False)


def learning_curve(losses: Sequence[float]) -> Figure:
    """The outer loss of one distillation."""
    with style():
        figure, (axes,) = _figure(6, 3.4)
        draw_curve(axes, losses)
        sns.despine(figure)
    return figure


def scores(rows: Sequence[dict], chance: float | None = None) -> Figure:
    """The rows of a result as bars."""
    with style():
        figure, (axes,) = _figure(7, 0.62 * len(rows) + 1)
        draw_scores(axes, rows, chance)
        sns.despine(figure)
    return figure


def quickstart(result: dict) -> Figure:
    """The whole story of a classification result: how the set was learned, and what it is worth beside real text."""
    rows = sorted(result["rows"].values(), key=lambda r: -r["mean"])
    with style():
        figure, (left, right) = _figure(11, 0.6 * len(rows) + 1.2, 2, ratios=(2, 3))
        draw_curve(left, result["distilling"]["embeddings"]["losses"])
        classes = len(rows[0]["groups"])
        draw_scores(right, rows, 1 / classes)
        k = result["config"]["per_class"]
        right.set_title(f"Training on {k} example{'s' * (k > 1)} of each of {classes} classes")
        sns.despine(figure)
    return figure


def soft_labels(before, after, classes: Sequence[str]) -> Figure:
    """Label probabilities ``[m, c]`` before and after distilling, as two heat maps on one scale."""
    with style():
        figure, axes = _figure(10, 0.45 * len(before) + 1.6, 2)
        for where, values, title in zip(axes, (before, after), ("at the start", "learned"), strict=True):
            sns.heatmap(
                np.asarray(values), ax=where, vmin=0, vmax=1, cmap="crest", annot=True, fmt=".2f", cbar=False,
                xticklabels=[plain(c) for c in classes], annot_kws={"fontsize": 8},
            )
            where.set(title=title, xlabel="probability of class", ylabel="synthetic example")
            where.tick_params(axis="x", rotation=30)
    return figure


def curves(
    panels: Sequence[tuple[str, str, str, dict[str, tuple[Sequence[float], Sequence[float]]]]], log: str = ""
) -> Figure:
    """Lines in panels side by side.

    Args:
        panels: for each its title, the labels of x and y, and {name of a line: (x values, y values)}.
        log: the axes with a logarithmic scale: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
    """
    with style():
        figure, axes = _figure(5 * len(panels), 3.4, len(panels))
        for where, (title, x, y, lines) in zip(axes, panels, strict=True):
            for colour, marker, (name, (xs, ys)) in zip(sns.color_palette("colorblind"), "osD^vP", lines.items(), strict=False):
                where.plot(xs, ys, marker=marker, color=colour, label=name)
            where.set(title=title, xlabel=x, ylabel=y)
            where.set_xscale("log" if "x" in log else "linear")
            where.set_yscale("log" if "y" in log else "linear")
            where.legend(frameon=False)
        sns.despine(figure)
    return figure


def points(title: str, x: str, y: str, clouds: dict[str, tuple[Sequence[float], Sequence[float]]], diagonal=False) -> Figure:
    """Points of one or more clouds.

    Args:
        title, x, y: of the panel and its axes.
        clouds: {name: (x values, y values)}.
        diagonal: draw the line on which y is x.
    """
    with style():
        figure, (axes,) = _figure(5.5, 4)
        for colour, (name, (xs, ys)) in zip(sns.color_palette("colorblind"), clouds.items(), strict=False):
            axes.plot(xs, ys, "o", color=colour, alpha=0.6, ms=5, label=name)
        if diagonal:
            axes.axline((0, 0), slope=1, color="black", lw=1, ls=":", label="y = x")
        axes.axhline(0, color="black", lw=0.5)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.legend(frameon=False)
        sns.despine(figure)
    return figure


def describe(figure: Figure) -> str:
    """What a figure shows, a line for each panel: title, axis labels, and what is drawn."""
    lines = []
    for number, axes in enumerate(figure.axes, start=1):
        series = [
            f"{line.get_label()}: {len(line.get_ydata())} points" for line in axes.lines
            if not line.get_label().startswith("_")
        ]
        bars = len(axes.patches)
        cells = [c.get_array().size for c in axes.collections if c.get_array() is not None]
        parts = [f"{bars} bars"] * (bars > 0) + [f"{n} cells" for n in cells] + series
        title = axes.get_title() or "untitled"
        lines.append(f"panel {number}: {title} | x: {axes.get_xlabel()} | y: {axes.get_ylabel()} | {'; '.join(parts)}")
    return "\n".join(lines)


def save(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` as PNG, without a date in its metadata, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def text_table(rows: Sequence[dict], classes: Sequence[str]) -> str:
    """Distilled sentences with their label vectors as an HTML table; every piece of text is escaped.

    Args:
        rows: ``text``, ``label`` and ``probabilities`` of each example, as ``DistilledSet.to_text()`` gives them.
    """
    # Lists of cells, not dictionaries: a class may be called "text".
    head = ["class", "text", *classes]
    return _html([head, *([row["label"], row["text"], *row["probabilities"]] for row in rows)], named=True)


def html_table(rows: Sequence[dict]) -> str:
    """Dictionaries of the same keys as an HTML table, a column a key; every piece of text is escaped."""
    return _html([[*rows[0]], *([*row.values()] for row in rows)])


def _html(rows: list[list], named: bool = False) -> str:
    """Rows of cells, the first of them titles; text to the left, but for the names of the rows where they are ``named``."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in rows[0])
    body = "".join(
        f"<tr>{''.join(_html_cell(value, left=i > 0 or not named) for i, value in enumerate(row))}</tr>" for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_cell(value, left: bool) -> str:
    if isinstance(value, float):
        return f"<td>{value:.2f}</td>"
    style = " style='text-align:left'" if left else ""
    return f"<td{style}>{html.escape(value)}</td>"
