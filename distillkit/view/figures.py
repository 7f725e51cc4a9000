"""Figures: data in, a matplotlib Figure out, and nothing shown or saved on the way.

All share one style: seaborn's white-grid theme, one colour for each role (:data:`ROLE_COLOURS`), and a shade of it for each
method that plays it.  :func:`describe` says in words what a figure holds, so that a test can compare what a picture shows
without comparing pixels.  Corpus text goes through :func:`plain` first, because matplotlib reads ``$`` as mathematics.
"""

from __future__ import annotations

import contextlib
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distillkit.experiments.results import by_row, by_set, classes_of, frame, paired_difference, spread
from distillkit.experiments.transfer import different_sets, of_full, parsed, short_name

# One colour for each role, in every figure: real text grey, learned embeddings blue, distilled text orange, all the data black.
ROLE_COLOURS = {"real": "#8c8c8c", "learned": "#0173b2", "text": "#de8f05", "full": "#000000", "chance": "#595959"}
_ROLES = {
    "real": ("random", "k_center", "herding", "k_means", "less", "real + learned labels", "zero-shot", "nearest sentences"),
    "learned": ("embeddings", "nacd", "nacd vectors", "bptt", "neighbor loss", "through projection"),
    "text": ("projected", "sentences", "keywords", "chosen pairs", "nacd text", "bptt text", "swaps", "projection",
             "relaxed tokens", "swaps from random", "swaps from herding", "swaps from sentences", "swaps from relaxed tokens"),
}


def shades(role: str, count: int) -> list[str]:
    """``count`` shades of the colour of a role, for methods that share it: the role's own colour, then darker and lighter."""
    base, (darkest, lightest) = ROLE_COLOURS[role], (0.55, 0.45)
    darker = [sns.dark_palette(base, 101)[round(100 * (1 - darkest * i / count))] for i in range(0, count, 2)]
    lighter = [sns.light_palette(base, 101)[round(100 * (1 - lightest * i / count))] for i in range(1, count, 2)]
    return [to_hex((darker if i % 2 == 0 else lighter)[i // 2]) for i in range(count)]


METHOD_COLOURS = {"full": ROLE_COLOURS["full"]} | {
    method: colour for role, methods in _ROLES.items() for method, colour in zip(methods, shades(role, len(methods)))
}
METHOD_COLOURS["keywords + learned labels"] = METHOD_COLOURS["keywords"]
LABELS = {
    "embeddings": "distilled embeddings", "projected": "… projected to words", "full": "full training data",
    "k_center": "real, k-centre", "herding": "real, herding", "random": "real, random",
    "real + learned labels": "real, labels learned", "less": "real, LESS", "sentences": "real, chosen by a judge",
    "nacd": "distilled, NACD", "nacd text": "NACD → text", "nacd vectors": "NACD, prompt vectors",
    "chosen pairs": "real, chosen by matching", "bptt": "distilled, BPTT", "bptt text": "BPTT → text",
    "zero-shot": "no training", "k_means": "real, medoids", "keywords": "keywords",
    "keywords + learned labels": "keywords, labels learned",
}
STRATEGIES_SHOWN = ("StoreAll", "Replay", "ForwardDifference", "unroll, autograd", "TorchOpt", "MixFlow-MG")
SELECTED = ("random/standard", "k_center/standard", "less/standard")  # rows that learned sets are compared with
MARKERS = "osD^vPX"
DPI = 150
LONGEST = 200  # characters of a label or title
WINDOW = 10  # steps of a running mean
FEW = 4  # lines that a legend inside a panel leaves room for


@contextlib.contextmanager
def style():
    """The kit's style, for the figures made inside; the caller's own settings stay as they are.  Also a decorator."""
    more = {"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False}
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook"), matplotlib.rc_context(more):
        yield


def plain(text: str) -> str:
    """``text`` as matplotlib prints it letter by letter; cut where it would be longer than any figure."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
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


def draw_curve(axes, losses: Sequence[float]) -> None:
    """Outer loss at each step (faint) and its running mean over :data:`WINDOW` steps."""
    steps = np.arange(1, len(losses) + 1)
    colour = METHOD_COLOURS["embeddings"]
    axes.plot(steps, losses, color=colour, alpha=0.25, lw=1, label="each step")
    if len(losses) >= WINDOW:
        mean = np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")
        axes.plot(steps[WINDOW - 1 :], mean, color=colour, lw=2, label=f"mean of {WINDOW} steps")
    axes.set(xlabel="outer step", ylabel="loss on real text", title="Learning the set")
    axes.legend(frameon=False)


def draw_bars(axes, bars: Sequence[tuple[str, str, pd.Series]]) -> None:
    """A bar for the mean of each of several series of accuracies, a dot for each value.

    Args:
        bars: from above, the method, the label and the values of each.
    """
    for place, (method, _, values) in enumerate(bars):
        axes.barh(place, values.mean(), color=METHOD_COLOURS[method], alpha=0.85, height=0.65)
        axes.plot(values, [place] * len(values), ".", color="black", ms=4, alpha=0.6)
        axes.text(max(values) + 0.012, place, spread(values, 2), va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [label for _, label, _ in bars], fontsize=9)
    axes.set_xlim(0, 1)
    axes.grid(axis="y", visible=False)


def draw_scores(axes, result: Mapping) -> None:
    """The rows of a classification result as bars, the best on top, a dot for each initialisation, and chance."""
    rows, students = by_row(result).dropna(subset="mean").sort_values("mean", ascending=False, kind="stable"), frame(result)
    draw_bars(axes, [
        (row.method, f"{LABELS[row.method]}\n({row.examples:,.0f} examples, {row.recipe})",
         students[students["row"] == row.Index]["accuracy"])
        for row in rows.itertuples()])
    chance = 1 / len(classes_of(result))
    axes.axvline(chance, color="black", lw=1, ls=":")
    axes.annotate("chance", (chance, -0.5), xytext=(3, 0), textcoords="offset points", va="top", fontsize=8)
    axes.set(xlabel="accuracy on the test split (dots: seeds)", ylim=(len(rows) - 0.4, -0.75))


@style()
def scores(result: Mapping) -> Figure:
    """The rows of a classification result as bars."""
    figure, (axes,) = _figure(7, 0.62 * frame(result)["row"].nunique() + 1)
    draw_scores(axes, result)
    return figure


@style()
def quickstart(result: Mapping) -> Figure:
    """The whole story of a classification result: how the set was learned, and what it is worth beside real text."""
    (cell,), k, classes = result["cells"].values(), result["config"]["per_class"], len(classes_of(result))
    figure, (left, right) = _figure(11, 0.6 * frame(result)["row"].nunique() + 1.2, 2, ratios=(2, 3))
    draw_curve(left, cell["notes"][f"embeddings {result['config']['seed']}"]["losses"])
    draw_scores(right, result)
    right.set_title(f"Training on {k} example{'s' * (k > 1)} of each of {classes} classes")
    return figure


@style()
def curves(panels: Sequence[tuple[str, str, str, dict[str, tuple[Sequence[float], Sequence[float]]]]]) -> Figure:
    """Lines in panels side by side; where a panel has more than four, the lines are named once, below them.

    Args:
        panels: for each its title, the labels of x and y, and {name of a line: (x values, y values)}.
    """
    figure, axes = _figure(5 * len(panels), 3.4, len(panels))
    for where, (title, x, y, lines) in zip(axes, panels, strict=True):
        for colour, marker, (name, (xs, ys)) in zip(sns.color_palette("colorblind"), MARKERS, lines.items(), strict=False):
            where.plot(xs, ys, marker=marker, color=colour, label=name)
        where.set(title=title, xlabel=x, ylabel=y)
        if all(float(value).is_integer() for xs, _ in lines.values() for value in xs):
            where.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if max(len(lines) for *_, lines in panels) > FEW:
        _legend_below(figure)
    else:
        for where in axes:
            where.legend(frameon=False)
    return figure


def _legend_below(figure: Figure) -> None:
    """One legend for all panels, of the lines of the first."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)


@style()
def points(title: str, x: str, y: str, clouds: dict[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Points of one or more clouds, and the line on which y is x.

    Args:
        title, x, y: of the panel and its axes.
        clouds: {name: (x values, y values)}.
    """
    figure, (axes,) = _figure(5.5, 4)
    for colour, (name, (xs, ys)) in zip(sns.color_palette("colorblind"), clouds.items(), strict=False):
        axes.plot(xs, ys, "o", color=colour, alpha=0.6, ms=5, label=name)
    axes.axline((0, 0), slope=1, color="black", lw=1, ls=":", label="y = x")
    axes.axhline(0, color="black", lw=0.5)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.legend(frameon=False)
    return figure


def describe(figure: Figure) -> str:
    """What a figure shows, a line for each panel: title, axis labels, and what is drawn."""
    lines = []
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    for number, axes in enumerate(panels, start=1):
        series = [
            f"{line.get_label()}: {len(np.asarray(line.get_ydata()))} points" for line in axes.lines
            if not str(line.get_label()).startswith("_")
        ]
        bars = [f"{len(axes.patches)} bars"] if axes.patches else []
        cells = [f"{values.size} cells" for meshes in axes.collections if (values := meshes.get_array()) is not None]
        title = axes.get_title() or axes.get_title(loc="left") or "untitled"
        lines.append(f"panel {number}: {title} | x: {axes.get_xlabel()} | y: {axes.get_ylabel()} | "
                     f"{'; '.join(bars + cells + series)}")
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
    cells = ([row["label"], row["text"], *row["probabilities"]] for row in rows)
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    body = "".join(f"<tr>{''.join(_html_cell(value, left=i > 0) for i, value in enumerate(row))}</tr>" for row in cells)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _html_cell(value, left: bool) -> str:
    if isinstance(value, float):
        return f"<td>{value:.2f}</td>"
    style = " style='text-align:left'" if left else ""
    return f"<td{style}>{html.escape(value)}</td>"


@style()
def seeded(result: Mapping, title: str) -> Figure:
    """Every row that has run of a result on text or on instruction tuning: a bar for the mean, a dot a set."""
    sets = by_set(result).dropna(how="all")
    figure, (axes,) = _figure(7, 0.36 * len(sets) + 1.3)
    draw_bars(axes, [(name.split("/")[0], _row_label(name), sets.loc[name].dropna()) for name in sets.index])
    axes.set(title=title, xlabel="accuracy on the test split (dots: sets)", ylim=(len(sets) - 0.4, -0.6))
    return figure


@style()
def seeded_grid(result: Mapping) -> Figure:
    """A grid of texts, as far as it has run: accuracy against examples per class, a panel a corpus, a dot a set.

    Rows that have run at one size only make no line and are left to the table, unless there is no more than one size.

    Args:
        result: as :class:`~distillkit.experiments.ways_to_text.TextGridJob` writes it.
    """
    sets = frame(result).groupby(["cell", "row", "set_seed"])["accuracy"].mean().reset_index()
    sets[["corpus", "size"]] = sets["cell"].str.rsplit(",", n=1, expand=True)
    sizes = sorted(sets["size"].unique(), key=int)
    corpora = [corpus for corpus in result["config"]["corpora"] if corpus in {*sets["corpus"]}]
    counts = sets.groupby("row")["size"].nunique()
    names = [name for name in result["config"]["rows"] if counts.get(name, 0) >= min(2, len(sizes))]
    one = len({name.split("/")[1] for name in names}) == 1  # recipe: no need to say it on every line
    sets["place"] = sets["size"].map(sizes.index)
    figure, panels = _figure(3.8 * len(corpora) + 0.6, 3.6, columns=len(corpora))
    for axes, corpus in zip(panels, corpora, strict=True):
        for number, name in enumerate(names):
            dots = sets[(sets["corpus"] == corpus) & (sets["row"] == name)]
            line = dots.groupby("place")["accuracy"].mean()
            shift = 0.05 * (number - (len(names) - 1) / 2)  # so that dots of one size do not hide each other
            colour = METHOD_COLOURS[name.split("/")[0]]
            axes.plot(line.index + shift, line, color=colour, lw=1.8, marker=MARKERS[number % len(MARKERS)], ms=7,
                      label=_row_label(name, not one))
            axes.plot(dots["place"] + shift, dots["accuracy"], ".", color=colour, ms=5, alpha=0.6)
        axes.set(title=plain(corpus), xlabel="examples per class", xticks=range(len(sizes)), xticklabels=sizes)
    panels[0].set_ylabel("test accuracy (dots: sets)")
    _legend_below(figure)
    return figure


def _row_label(name: str, with_recipe: bool = True) -> str:
    """A row ``method/recipe`` in words."""
    method, recipe = name.split("/")
    return LABELS.get(method, method) + (f" ({recipe})" if with_recipe and recipe != "none" else "")


@style()
def differences(result: Mapping) -> Figure:
    """How much better learned sets are than selected ones, seed by seed: mean and 95 % interval of the paired differences.

    Args:
        result: of an experiment on instruction tuning; of :data:`SELECTED`, what has not run is left out.
    """
    sets = by_set(result).dropna(how="all")
    others = [name for name in SELECTED if name in sets.index]
    learned = [name for name in sets.index if name.startswith(("nacd", "bptt", "chosen"))]
    figure, (axes,) = _figure(8.5, 0.5 * len(learned) + 1.4)
    for shift, marker, other in zip(np.linspace(-0.2, 0.2, len(others)), MARKERS, others, strict=False):
        means, halves = np.reshape([paired_difference(sets, name, other) for name in learned], (-1, 2)).T
        axes.errorbar(
            means, np.arange(len(learned)) + shift, xerr=np.where(np.isfinite(halves), halves, 0), fmt=marker, ms=6, capsize=3,
            color=METHOD_COLOURS[other.split("/")[0]], label=f"minus {_row_label(other)}",
        )
        alone = ~np.isfinite(halves)  # of a single set there is no interval: a hollow mark
        axes.plot(means[alone], np.flatnonzero(alone) + shift, marker, ms=6, color=METHOD_COLOURS[other.split("/")[0]],
                  mfc="white", label="_single")
    axes.axvline(0, color="black", lw=1, ls=":")
    axes.set_yticks(range(len(learned)), [_row_label(name) for name in learned], fontsize=9)
    axes.set(xlabel="difference of accuracy at the same seed (95 % interval)", ylim=(max(1, len(learned)) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=len(others), frameon=False, fontsize=9)
    return figure


def metagrad_cost(result: dict) -> Figure:
    """Time and memory of meta-gradients against the number of inner steps T, our strategies and their peers.

    Args:
        result: what ``tests/benchmarks/metagrad.py`` writes; its first model is drawn.
    """
    entry = result["entries"][0]
    rows = pd.DataFrame(entry["rows"]).dropna(subset="cost")
    groups = {name: rows[rows["contender"] == name] for name in STRATEGIES_SHOWN if name in {*rows["contender"]}}
    figure = curves([
        (f"Time, {entry['student'].removeprefix('offline:')}", "inner steps T", "times plain training",
         {name: (group["steps"], group["cost"]) for name, group in groups.items()}),
        ("Memory, copies of the parameters included", "inner steps T", "live MB",
         {name: (group["steps"], group["bytes"] / 1e6) for name, group in groups.items()}),
    ])
    steps = sorted({row["steps"] for row in entry["rows"]})
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.set_xticks(steps, [str(t) for t in steps])
        axes.minorticks_off()
    return figure


@style()
def transfer_map(result: Mapping) -> Figure:
    """Scores of texts on other models: a row a source and method, a column a target, absolute and by the target's full data.

    Cells that have not run stay white; so do those of a text on its own source, which is no transfer.  Where no target's full
    data has run, there is no second panel.

    Args:
        result: of an experiment on transfer.
    """
    sets = by_set(result)
    pairs = pd.DataFrame([parsed(name) for name in sets.index], columns=["source", "target", "method"], index=sets.index)
    pairs = pairs.assign(accuracy=sets.mean(axis=1), share=of_full(result))[pairs["source"] != ""]
    pairs["words"] = [spread(different_sets(sets, name), 2) or "not run" for name in pairs.index]
    shares = pairs["share"].map("{:.0%}".format).where(pairs["share"].notna(), "no full score")
    pairs["share words"] = shares.where(pairs["accuracy"].notna(), "not run")
    targets = [name for name in map(short_name, result["config"]["students"]) if name in {*pairs["target"]}]
    sides = pairs[["source", "method"]].drop_duplicates().agg(tuple, axis=1)

    def arranged(column: str) -> pd.DataFrame:
        return pairs.pivot(index=["source", "method"], columns="target", values=column).reindex(index=sides, columns=targets)

    panels = [("accuracy", "words", "accuracy"), ("share", "share words", "share of the target's full data, above chance")]
    panels = panels if pairs["share"].notna().any() else panels[:1]
    figure, axes = _figure(3 + 2.3 * len(targets) * len(panels) / 2, 0.42 * len(sides) + 1.4, len(panels))
    labels = [f"{source}: {LABELS.get(method, method)}" for source, method in sides]
    for where, (value, word, title) in zip(axes, panels, strict=True):
        values, words = arranged(value).to_numpy(float), arranged(word).fillna("").to_numpy()
        sns.heatmap(values, ax=where, vmin=0, vmax=1, cmap="crest", cbar=False, linewidths=1, xticklabels=targets,
                    yticklabels=labels if where is axes[0] else [])
        for place in np.ndindex(values.shape):
            where.text(place[1] + 0.5, place[0] + 0.5, words[place], ha="center", va="center", fontsize=9,
                       color="white" if values[place] > 0.45 else "0.1")
        where.set(title=title, xlabel="trained on", ylabel="made on" if where is axes[0] else "")
        where.tick_params(axis="y", rotation=0)
        where.grid(False)
    return figure
