"""The pictures of the lesson "Six examples for a corpus": cards of learned examples, and accuracy against bytes.

A *card* says what can be read off one learned example at one outer step: the word nearest to each learned position, how far
that word is, and the soft label.  A nearest word always exists, however far away it is, so each card shows its distances beside
a yardstick, the distance from a word to the word nearest to it: a word many yardsticks away names a direction at best.
:func:`read_cards` computes them from the snapshots of a run, and :func:`cards` draws one step, or several as a film strip.

:func:`scores_by_size` collects what committed results say of each method at one example per class, and
:func:`accuracy_against_bytes` draws it, a dot for each set.
"""

from __future__ import annotations

import textwrap
from collections import namedtuple
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distillkit.core.distilled import DistilledSet
from distillkit.core.student import Student
from distillkit.experiments.results import by_set, frame
from distillkit.io.checks import require
from distillkit.io.escaping import one_line
from distillkit.view.figures import ROLE_COLOURS, _figure, plain, style
from distillkit.view.measures import distance_to_words, history
from distillkit.view.set_figures import in_font

Cards = namedtuple("Cards", ("steps", "classes", "own", "words", "changed", "distances", "labels", "yardstick"))

WIDTH, HEIGHT = 3.15, 1.75  # inches of a card
CHARACTERS, LINES, LINE = 40, 5, 0.105  # of the words of a card: characters in a line, lines, and the height of one
FONT = "DejaVu Sans Mono"  # every character is as wide as the next, so that words of two colours share a line
LABELS = {
    "class names/tuned": ("class names", "text"), "written/tuned": ("hand-written sentences", "text"),
    "random/tuned": ("random sentences", "real"), "k_center/tuned": ("k-centre sentences", "real"),
    "keywords/tuned": ("keywords", "text"), "chosen sentences/tuned": ("chosen sentences", "text"),
    "embeddings/own": ("embeddings, float32", "learned"), "embeddings float16/own": ("embeddings, float16", "learned"),
    "embeddings low rank/own": ("embeddings, rank 16", "learned"),
    "embeddings/tuned": ("embeddings, tuned recipe", "learned"),
    "projected/own": ("nearest words, own recipe", "text"),
    "projected/tuned": ("nearest words, tuned", "text"),
    "keywords + learned labels/own": ("keywords, labels learned", "text"),
}
LONGER = ("embeddings/own", "projected/tuned")  # rows of the longer run that are shown beside those of a hundred steps
GAP = 0.029  # least vertical distance between two labels, in accuracy
BRACKET = 0.59  # accuracy at which the true bytes of a crowded column stand


def read_cards(snapshots: Sequence[DistilledSet], student: Student) -> Cards:
    """What the cards of every snapshot say.

    Args:
        snapshots: two or more states of one set with soft labels, in order.
        student: the model whose words are the nearest ones.

    Returns:
        ``steps [s]``, outer steps made; ``classes [c]``, names; ``own [m]``, the class index of each example; ``words``, for
        each snapshot and example the nearest word of each learned position; ``changed``, likewise, whether it differs from the
        word at the first snapshot; ``distances``, likewise, the Euclidean distance to it; ``labels [s, m, c]``, probabilities;
        and the ``yardstick``, the median distance from a word to the word nearest to it.

    Raises:
        ValueError: the labels are not soft, or the snapshots are not of one set in ``student``'s embedding space.
    """
    require(all(snapshot.soft for snapshot in snapshots), "cards show soft labels, and this set has hard ones; use soften()")
    past = history(snapshots, student)
    table, names = student.embedding, student.tokenizer.convert_ids_to_tokens
    examples = range(len(past.free))
    words, changed, distances = [], [], []
    for tokens, snapshot in zip(past.tokens, snapshots, strict=True):
        ids = [tokens[m, past.free[m]] for m in examples]
        first = [past.tokens[0, m, past.free[m]] for m in examples]
        words.append([names(row.tolist()) for row in ids])
        changed.append([(row != before).tolist() for row, before in zip(ids, first, strict=True)])
        embeds = [snapshot.embeds[m, snapshot.free[m]].to(table) for m in examples]
        distances.append([(point - table[row]).float().norm(dim=1).tolist() for point, row in zip(embeds, ids, strict=True)])
    first = snapshots[0]
    classes = [str(name) for name in first.meta["classes"]]
    return Cards(past.steps.tolist(), classes, list(first.meta["labels"]), words, changed, distances, past.labels,
                 distance_to_words(first, student).yardstick)


@style()
def cards(data: Cards, shown: Sequence[int], *, title: str, columns: int = 3) -> Figure:
    """The cards of all examples: at one outer step in rows of ``columns``, at several as a film strip, a column a step.

    Args:
        data: as :func:`read_cards` returns it.
        shown: places in ``data.steps``.
        title: the finding.
        columns: cards side by side where a single step is shown.
    """
    strip, examples = len(shown) > 1, len(data.own)
    columns = len(shown) if strip else min(columns, examples)
    rows = examples if strip else -(-examples // columns)
    figure, axes = _sheet(WIDTH * columns, HEIGHT * rows, left=0.4 if strip else 0.05, bottom=0.95 if strip else 0.75)
    farthest = max(max(map(max, step)) for step in data.distances)
    palette = sns.color_palette("Set2", len(data.classes))
    for place in range(len(shown) * examples):
        example = place // len(shown) if strip else place
        corner = (place % columns, place // columns)
        card = _Card(axes, corner, 1.08 * max(farthest, data.yardstick))
        card.draw(data, shown[place % len(shown)], example, palette, heading=not strip)
    if strip:
        axes.set_xticks([i + 0.5 for i in range(columns)], [str(data.steps[place]) for place in shown])
        names = [plain(data.classes[label]) for label in data.own]
        axes.set_yticks([i + 0.5 for i in range(rows)], names, rotation=90, va="center", fontsize=11)
        axes.set_xlabel("outer step")
    else:
        axes.set(xticks=[], yticks=[], xlabel=f"outer step {data.steps[shown[0]]}")
    axes.set(xlim=(0, columns), ylim=(rows, 0), title=title)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.legend(handles=_card_legend(), loc="lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _sheet(width: float, height: float, *, left: float, bottom: float, top: float = 0.35):
    """A figure with axes of ``width`` × ``height`` inches and these margins; without a layout to solve it is drawn faster."""
    figure, (axes,) = _figure(width + left + 0.05, height + bottom + top)
    figure.set_layout_engine("none")
    whole_width, whole_height = figure.get_size_inches()
    axes.set_position((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))
    return figure, axes


def _card_legend() -> list[Line2D]:
    changed = Line2D([], [], ls="", marker="s", color=ROLE_COLOURS["learned"], label="word: another than at the start")
    dots = Line2D([], [], ls="", marker="o", ms=5, color=ROLE_COLOURS["learned"], alpha=0.6,
                  label="learned position: distance to its nearest word")
    rule = Line2D([], [], ls=":", lw=2, color="black", label="yardstick: from a word to its nearest word")
    return [changed, dots, rule]


class _Card:
    """A card in the unit square whose upper left corner is ``corner``; distances are drawn up to ``farthest``."""

    def __init__(self, axes, corner: tuple[int, int], farthest: float):
        self.axes, self.corner, self.farthest = axes, corner, farthest

    def at(self, x, y):
        """Where the point (x, y) of the card, both from 0 to 1, lies in the figure."""
        return self.corner[0] + np.asarray(x), self.corner[1] + np.asarray(y)

    def text(self, x: float, y: float, words: str, **options) -> None:
        self.axes.text(*self.at(x, y), words, **{"fontsize": 8.5, "va": "center", "parse_math": False} | options)

    def draw(self, data: Cards, step: int, example: int, palette, *, heading: bool) -> None:
        edge = np.array([(0.02, 0.02), (0.98, 0.02), (0.98, 0.97), (0.02, 0.97), (0.02, 0.02)])
        self.axes.plot(*self.at(*edge.T), color="0.75", lw=1, label="_edge")
        if heading:
            self.text(0.05, 0.09, one_line(data.classes[data.own[example]], 24), weight="bold", fontsize=10)
        self._words(data.words[step][example], data.changed[step][example], 0.19 if heading else 0.09)
        self._labels(data.labels[step][example], data.classes, palette)
        self._distances(data.distances[step][example], data.yardstick)

    def _words(self, words: Sequence[str], changed: Sequence[bool], top: float) -> None:
        """The words in lines; those that changed are drawn over the gaps that the others leave."""
        lines = _in_lines(words, changed, LINES)
        for number, (kept, new) in enumerate(lines):
            place = {"x": 0.05, "y": top + LINE * number, "family": FONT, "fontsize": 8.5}
            self.text(words=kept, color="0.25", **place)
            self.text(words=new, color=ROLE_COLOURS["learned"], weight="bold", **place)

    def _labels(self, probabilities: np.ndarray, classes: Sequence[str], palette) -> None:
        """The soft label as bars, each class under the first three letters of its name."""
        floor, height, width = 0.87, 0.18, 0.47 / len(classes)
        places = 0.04 + width * np.arange(len(classes))
        x, y = self.at(places, floor)
        self.axes.bar(x, -height * probabilities, 0.8 * width, y, align="edge", color=palette, edgecolor="0.4", lw=0.5)
        for place, name in zip(places, classes, strict=True):
            self.text(place + 0.4 * width, floor + 0.05, one_line(name[:3]), ha="center", fontsize=8)
        best = int(np.argmax(probabilities))
        self.text(0.04 + width * (best + 0.4), floor - height * probabilities[best] - 0.035, f"{probabilities[best]:.2f}",
                  ha="center")

    def _distances(self, distances: Sequence[float], yardstick: float) -> None:
        """Each position's distance to its nearest word as a dot on a line (heights keep dots apart), beside the yardstick."""
        left, right, floor = 0.58, 0.95, 0.87
        scale = (right - left) / self.farthest
        self.axes.plot(*self.at([left, right], [floor, floor]), color="0.4", lw=1, label="_axis")
        heights = floor - 0.03 - 0.13 * (np.arange(len(distances)) % 5) / 4
        self.axes.plot(*self.at(left + scale * np.array(distances), heights), "o", ms=3.5, mew=0, alpha=0.6,
                       color=ROLE_COLOURS["learned"], label="_positions")
        x = left + scale * yardstick
        self.axes.plot(*self.at([x, x], [floor - 0.19, floor]), ":", lw=2, color="black", label="_yardstick")
        middle = float(np.median(distances)) / yardstick
        self.text(right, floor + 0.05, f"median {middle:.1f} yardsticks", ha="right", fontsize=8)


def _in_lines(words: Sequence[str], changed: Sequence[bool], most: int) -> list[tuple[str, str]]:
    """Words in at most ``most`` lines of :data:`CHARACTERS`: in each the kept words, and the changed ones in their gaps."""
    lines, kept, new = [], "", ""
    for whole, other in zip(words, changed, strict=True):
        word = in_font(one_line(whole, 24), FONT)
        if kept and len(kept) + len(word) > CHARACTERS:
            lines.append((kept, new))
            kept = new = ""
        blank = " " * len(word)
        kept, new = kept + (blank if other else word) + " ", new + (word if other else blank) + " "
    lines.append((kept, new))
    return lines if len(lines) <= most else [*lines[: most - 1], ("…", "")]


# --- accuracy against bytes ----------------------------------------------------------------------------------------------


def scores_by_size(evidence: Mapping, demo: Mapping, longer: Mapping, *, cell: str = "per_class=1") -> pd.DataFrame:
    """What each method weighs and reaches at one example per class, from three committed results on one corpus.

    Args:
        evidence: cheap opponents and embeddings, several sets.
        demo: the run of `make demo`, one set: its words.
        longer: a set that was learned for longer, one set.
        cell: of ``evidence``.

    Returns:
        A line per method: ``label``, ``role``, ``recipe``, ``bytes``, ``accuracies`` (of each set, the mean over its
        initialisations), ``mean``, ``sets``, ``steps`` of one training (of each set); the lightest first, then the better.
    """
    shown = [(evidence, cell, row, "") for row in LABELS if row in {*frame(evidence)["row"]}]
    shown.append((demo, None, "projected/own", ""))
    (steps,) = {note["steps"] for name, note in _notes(longer) if name == "embeddings 0"}
    shown += [(longer, None, row, f", {steps:,} outer steps") for row in LONGER]
    lines = []
    for result, of_cell, row, more in shown:
        scores = frame(result).query("row == @row")
        sets = by_set(result, cell=of_cell).loc[row].dropna()
        label, role = LABELS[row]
        notes = dict(_notes(result))
        lines.append({"label": label + more, "role": role, "recipe": row.split("/")[1], "bytes": scores["nbytes"].mean(),
                      "accuracies": sets.tolist(), "mean": sets.mean(), "sets": len(sets),
                      "steps": [notes[f"{row} {seed}"]["recipe"]["steps"] for seed in sets.index]})
    return pd.DataFrame(lines).sort_values(["bytes", "mean"], ascending=[True, False], kind="stable", ignore_index=True)


def _notes(result: Mapping) -> list[tuple[str, Mapping]]:
    return [item for cell in result["cells"].values() for item in cell["notes"].items()]


@style()
def accuracy_against_bytes(
    methods: pd.DataFrame, *, title: str, upper: Mapping[str, float], chance: float, corpus_bytes: int
) -> Figure:
    """Accuracy against the bytes of what a student trains on, bytes on a log axis: a dot a set, hollow where there is one set.

    Args:
        methods: as :func:`scores_by_size` returns it.
        title: the finding.
        upper: name → accuracy of what trains on all rows, drawn as lines.
        chance: accuracy of guessing.
        corpus_bytes: size of the compressed corpus, drawn as a vertical line.
    """
    figure, (axes,) = _figure(10.5, 6.2)
    beside = _beside(methods)
    for method in methods.itertuples():
        colour, x = ROLE_COLOURS[method.role], beside[method.Index]
        filled = colour if method.sets > 1 else "white"
        axes.plot([x] * method.sets, method.accuracies, "o", color=colour, mfc=filled, mew=1.6, ms=7, alpha=0.85,
                  zorder=3 if method.sets > 1 else 4, label=method.label)
    for name, value in upper.items():
        axes.axhline(value, color=ROLE_COLOURS["full"], lw=1.6, label=name)
        axes.text(160, value + 0.006, f"{name}: {value:.2f}", fontsize=10, va="bottom")
    axes.axhline(chance, color=ROLE_COLOURS["chance"], lw=1.6, ls=":", label="chance")
    axes.text(160, chance + 0.006, f"chance: {chance:.2f}", fontsize=10, color=ROLE_COLOURS["chance"], va="bottom")
    axes.axvline(corpus_bytes, color=ROLE_COLOURS["full"], lw=1.6, ls="--", label="compressed corpus")
    axes.text(corpus_bytes * 0.94, 0.2, "compressed corpus", rotation=90, fontsize=10, ha="right", va="bottom")
    _labelled(axes, methods)
    axes.set(xscale="log", xlim=(140, 2e7), ylim=(0.12, 0.86), title=title, ylabel="accuracy on the test split",
             xlabel="bytes of what a student trains on (log scale; similar ones spread out; a dot per set, hollow: one set)")
    axes.set_xticks([1e3, 1e4, 1e5, 1e6], ["1 kB", "10 kB", "100 kB", "1 MB"])
    axes.grid(axis="x", visible=False)
    names = {"real": "real sentences, drawn without scoring them", "text": "text: written, chosen by a score, or nearest words",
             "learned": "learned vectors"}
    marks = [Line2D([], [], ls="", marker="o", color=ROLE_COLOURS[role], label=name) for role, name in names.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _columns(methods: pd.DataFrame) -> pd.Series:
    """The column of each method: those of similar weight share one."""
    return (np.log10(methods["bytes"]).diff() > 0.5).cumsum()


def _beside(methods: pd.DataFrame) -> pd.Series:
    """Where each method is drawn: beside those of the same weight, and in a strip of its own where a column holds many, the
    highest mean on the left."""
    rank = methods["mean"].groupby(_columns(methods)).rank(ascending=False, method="first") - 1
    many = methods["mean"].groupby(_columns(methods)).transform("size")
    place = pd.Series(range(len(methods)), methods.index)
    middle = methods["bytes"].groupby(_columns(methods)).transform("mean")
    return (middle * 1.14 ** (rank - (many - 1) / 2)).where(many > 4, methods["bytes"] * (1 + 0.05 * (place % 3 - 1)))


def _labelled(axes, methods: pd.DataFrame) -> None:
    """Each method's name and mean to the right of its dots, moved apart where two would overlap, with a line to the mean.

    Methods of similar weight form a column; the name of one that is alone in the first stands below its dots, in a later one
    beside the highest, and the name of the lightest of the last column to the left of its dots.
    """
    columns, beside = _columns(methods), _beside(methods)
    for column, group in methods.groupby(columns):
        names = {method.Index: f"{method.label}: {method.mean:.2f}" for method in group.itertuples()}
        if len(group) == 1 and column < columns.max():
            (method,) = group.itertuples()
            if column:
                axes.text(method.bytes * 1.13, max(method.accuracies), names[method.Index].replace(", ", ",\n"), fontsize=9.5,
                          va="center")
            else:
                axes.text(method.bytes, min(method.accuracies) - 0.015, names[method.Index], fontsize=9.5, va="top")
            continue
        right, last, crowded = beside[group.index].max() * 1.3, np.inf, len(group) > 4
        if crowded:
            ends, bytes_of = beside[group.index].agg(["min", "max"]), group["bytes"].agg(["min", "max"])
            axes.plot(ends, [BRACKET] * 2, color="black", lw=0.9)
            axes.text(ends["min"], BRACKET + 0.008, f"{bytes_of['min']:,.0f} to {bytes_of['max']:,.0f} bytes", fontsize=9.5)
        for method in group.sort_values("mean", ascending=False, kind="stable").itertuples():
            x = beside[method.Index]
            if column == columns.max() and method.bytes < 0.6 * group["bytes"].max():
                axes.text(x * 0.8, method.mean, names[method.Index], fontsize=9.5, ha="right", va="center")
                continue
            name = textwrap.fill(names[method.Index], 30) if crowded else names[method.Index]
            extra = GAP / 2 * name.count("\n")
            last = min(method.mean + (GAP if last == np.inf and crowded else 0), last - GAP - extra)
            axes.annotate(name, (x, method.mean), (right, last), fontsize=9.5, va="center", color="black",
                          bbox={"fc": "white", "ec": "none", "pad": 0.6},
                          arrowprops={"arrowstyle": "-", "color": ROLE_COLOURS[method.role], "lw": 0.9, "shrinkA": 2,
                                      "relpos": (0, 0.5), "shrinkB": 5})
            last -= extra
