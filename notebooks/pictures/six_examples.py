"""The pictures of the lesson "Six examples for a corpus": cards of learned examples, and accuracy against bytes.

A *card* says what can be read off one learned example at one outer step: the word nearest to each learned position, how far
that word is, and the soft label.  A nearest word always exists, however far away it is, so each card shows its distances beside
a yardstick, the distance from a word to the word nearest to it: a word many yardsticks away names a direction at best.
:func:`read_cards` computes them from the snapshots of a run, :func:`cards` draws one step, or several as a film strip above
the distances of all positions, and :func:`summary` condenses a step into numbers.

:func:`scores_by_size` collects what committed results say of each method at one example per class, and
:func:`accuracy_against_bytes` draws some of it, a dot for each set.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distillkit.core.distilled import DistilledSet
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.words import weighted_words
from distillkit.experiments.results import by_set, frame
from distillkit.io.checks import require
from distillkit.io.escaping import one_line
from distillkit.view.figures import ROLE_COLOURS, _figure, plain, style
from distillkit.view.measures import distance_to_words, history
from distillkit.view.set_figures import in_font

Cards = namedtuple("Cards", ("steps", "classes", "own", "words", "changed", "distances", "labels", "yardstick"))
Summary = namedtuple("Summary", ("changed", "positions", "telling", "telling_changed", "distance", "lowest", "highest"))

WIDTH, HEIGHT = 3.15, 1.75  # inches of a card
STRIP_HEIGHT = 1.1  # of a card without labels and distances
CHARACTERS, LINES, LINE = 36, 5, 0.105  # of the words of a card: characters in a line, lines, and the height of one
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
LONGER = ("embeddings/own", "projected/own", "projected/tuned")  # rows of a longer run that are shown beside the others
DRAWN = ("keywords/tuned", "chosen sentences/tuned", "random/tuned", "projected/own", "projected/tuned",
         "embeddings low rank/own", "embeddings float16/own", "embeddings/own")  # rows that the figure shows
GAP = 0.031  # least vertical distance between two labels, in accuracy
JITTER = 0.04  # how far dots of one weight stand to the left and right of it, as a share of the weight
START, CHANGED = "0.35", ROLE_COLOURS["learned"]  # a word of the start, and another one: words and dots alike


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


def telling_words(task: Task, count: int = 50) -> list[set[str]]:
    """For each class the ``count`` words with the largest weights in a classifier of word counts."""
    return [{word for word, _ in of_class[:count]} for of_class in weighted_words(task)]


def summary(data: Cards, place: int, telling: Sequence[set[str]]) -> Summary:
    """What the cards at one ``place`` of ``data.steps`` say in numbers.

    Returns:
        ``changed``, positions whose nearest word is another than at the start, of ``positions``; ``telling``, positions whose
        nearest word is among the ``telling`` words of their class, and ``telling_changed``, how many of the changed ones are;
        the median ``distance`` in yardsticks; ``lowest`` and ``highest`` probability that a label gives to its own class.
    """
    changed, distances = (np.concatenate(values[place]) for values in (data.changed, data.distances))
    cards = zip(data.words[place], data.own, strict=True)
    tells = np.array([word in telling[label] for words, label in cards for word in words])
    own = data.labels[place][range(len(data.own)), data.own]
    return Summary(int(changed.sum()), len(changed), int(tells.sum()), int((changed & tells).sum()),
                   float(np.median(distances)) / data.yardstick, float(own.min()), float(own.max()))


@style()
def cards(
    data: Cards, shown: Sequence[int], *, title: str, columns: int = 3, examples: Sequence[int] | None = None,
    below: str = "The distances of all positions",
) -> Figure:
    """The cards of all examples at one outer step, or of some examples at several, above the distances of all positions.

    Args:
        data: as :func:`read_cards` returns it.
        shown: places in ``data.steps``.
        title: the finding.
        columns: cards side by side where a single step is shown.
        examples: those whose cards a strip of several steps shows; default: all.
        below: title of the distances that stand below such a strip.
    """
    if len(shown) > 1:
        return _strip(data, shown, range(len(data.own)) if examples is None else examples, title, below)
    columns = min(columns, len(data.own))
    rows = -(-len(data.own) // columns)
    figure, axes = _sheet(WIDTH * columns, HEIGHT * rows, left=0.05, bottom=0.75)
    farthest = max(max(map(max, step)) for step in data.distances)
    palette = sns.color_palette("Set2", len(data.classes))
    for example in range(len(data.own)):
        card = _Card(axes, (example % columns, example // columns), 1.08 * max(farthest, data.yardstick))
        card.draw(data, shown[0], example, palette)
    axes.set(xticks=[], yticks=[], xlabel=f"outer step {data.steps[shown[0]]}")
    _without_frame(axes, columns, rows, title)
    figure.legend(handles=_card_legend(), loc="lower center", ncols=3, frameon=False, fontsize=9.5)
    return figure


def _strip(data: Cards, shown: Sequence[int], examples: Sequence[int], title: str, below: str) -> Figure:
    """A row of cards for each example and a column for each step, and below them all positions on one axis of distances."""
    width, height, line = WIDTH * len(shown), STRIP_HEIGHT * len(examples), 0.36 * len(shown) + 0.3
    figure, axes = _sheet(width, height, left=0.85, bottom=line + 1.9)
    for place, (row, column) in enumerate(np.ndindex(len(examples), len(shown))):
        example, step = examples[place // len(shown)], shown[column]
        card = _Card(axes, (column, row), 1.0)
        card.edge()
        card.words(data.words[step][example], data.changed[step][example], 0.14, LINE * HEIGHT / STRIP_HEIGHT)
    axes.set_xticks([i + 0.5 for i in range(len(shown))], [str(data.steps[place]) for place in shown])
    names = [plain(data.classes[data.own[example]]) for example in examples]
    axes.set_yticks([i + 0.5 for i in range(len(examples))], names, rotation=90, va="center", fontsize=11)
    axes.set_xlabel("outer step", labelpad=2)
    _without_frame(axes, len(shown), len(examples), title)

    total_width, total_height = figure.get_size_inches()
    distances = figure.add_axes((0.85 / total_width, 0.95 / total_height, width / total_width, line / total_height))
    for row, place in enumerate(shown):
        away, changed = (np.concatenate(values[place]) for values in (data.distances, data.changed))
        heights = row + 0.52 * ((np.arange(len(away)) * 5 % 7) / 6 - 0.5)
        for these, colour in ((~changed, START), (changed, CHANGED)):
            distances.plot(away[these] / data.yardstick, heights[these], "o", ms=4, mew=0, color=colour, label="_positions")
    distances.axvline(1, ls=":", lw=2, color="black", label="yardstick")
    distances.set_yticks(range(len(shown)), [f"step {data.steps[place]}" for place in shown])
    farthest = max(max(map(max, data.distances[place])) for place in shown) / data.yardstick
    distances.set(xlim=(-0.2, max(1.5, 1.05 * farthest)), ylim=(len(shown) - 0.5, -0.5), title=below,
                  xlabel="distance to the nearest word (1 yardstick: from a word to the word nearest to it)")
    distances.grid(axis="y", visible=False)
    figure.legend(handles=_card_legend(), loc="lower center", ncols=3, frameon=False, fontsize=9.5)
    return figure


def _sheet(width: float, height: float, *, left: float, bottom: float, top: float = 0.35):
    """A figure with axes of ``width`` × ``height`` inches and these margins; without a layout to solve it is drawn faster."""
    figure, (axes,) = _figure(width + left + 0.05, height + bottom + top)
    figure.set_layout_engine("none")
    whole_width, whole_height = figure.get_size_inches()
    axes.set_position((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))
    return figure, axes


def _without_frame(axes, columns: int, rows: int, title: str) -> None:
    axes.set(xlim=(0, columns), ylim=(rows, 0), title=title)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _card_legend() -> list[Line2D]:
    words = {"nearest word: that of the start": START, "nearest word: another one": CHANGED}
    marks = [Line2D([], [], ls="", marker="o", color=colour, label=name) for name, colour in words.items()]
    return [*marks, Line2D([], [], ls=":", lw=2, color="black", label="1 yardstick")]


class _Card:
    """A card in the unit square whose upper left corner is ``corner``; distances are drawn up to ``farthest``."""

    def __init__(self, axes, corner: tuple[int, int], farthest: float):
        self.axes, self.corner, self.farthest = axes, corner, farthest

    def at(self, x, y):
        """Where the point (x, y) of the card, both from 0 to 1, lies in the figure."""
        return self.corner[0] + np.asarray(x), self.corner[1] + np.asarray(y)

    def text(self, x: float, y: float, words: str, **options) -> None:
        self.axes.text(*self.at(x, y), words, **{"fontsize": 8.5, "va": "center", "parse_math": False} | options)

    def draw(self, data: Cards, step: int, example: int, palette) -> None:
        self.edge()
        self.text(0.05, 0.09, one_line(data.classes[data.own[example]], 24), weight="bold", fontsize=10)
        self.words(data.words[step][example], data.changed[step][example], 0.19)
        self._labels(data.labels[step][example], data.classes, palette)
        self._distances(data.distances[step][example], data.changed[step][example], data.yardstick)

    def edge(self) -> None:
        edge = np.array([(0.02, 0.02), (0.98, 0.02), (0.98, 0.97), (0.02, 0.97), (0.02, 0.02)])
        self.axes.plot(*self.at(*edge.T), color="0.75", lw=1, label="_edge")

    def words(self, words: Sequence[str], changed: Sequence[bool], top: float, line: float = LINE) -> None:
        """The words in lines; those that changed are drawn over the gaps that the others leave."""
        lines = _in_lines(words, changed, LINES)
        for number, (kept, new) in enumerate(lines):
            place = {"x": 0.05, "y": top + line * number, "family": FONT, "fontsize": 9}
            self.text(words=kept, color=START, **place)
            self.text(words=new, color=CHANGED, weight="bold", **place)

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

    def _distances(self, distances: Sequence[float], changed: Sequence[bool], yardstick: float) -> None:
        """Each position's distance to its nearest word as a dot on a line (heights keep dots apart), beside the yardstick."""
        left, right, floor = 0.58, 0.95, 0.87
        scale = (right - left) / self.farthest
        self.axes.plot(*self.at([left, right], [floor, floor]), color="0.4", lw=1, label="_axis")
        heights = floor - 0.03 - 0.13 * (np.arange(len(distances)) % 5) / 4
        for place, height, new in zip(left + scale * np.array(distances), heights, changed, strict=True):
            self.axes.plot(*self.at(place, height), "o", ms=3.5, mew=0, color=CHANGED if new else START, label="_positions")
        x = left + scale * yardstick
        self.axes.plot(*self.at([x, x], [floor - 0.19, floor]), ":", lw=2, color="black", label="_yardstick")
        middle = float(np.median(distances)) / yardstick
        self.text(right, floor + 0.05, f"median {middle:.1f} yardsticks", ha="right", fontsize=8.5)


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


def scores_by_size(evidence: Mapping, *longer: Mapping, cell: str = "per_class=1") -> pd.DataFrame:
    """What each method weighs and reaches at one example per class, from committed results on one corpus.

    Args:
        evidence: cheap opponents and embeddings, several sets.
        longer: runs of one set each, of another number of outer steps; of them the rows :data:`LONGER` are taken.
        cell: of ``evidence``.

    Returns:
        A line per method: ``row`` of the settings, ``label``, ``role``, ``recipe``, ``bytes``, ``accuracies`` (of each set, the
        mean over its initialisations), ``mean``, ``sets``, ``steps`` of one training (of each set); the lightest first, then
        the better.
    """
    shown = [(evidence, cell, row, "") for row in LABELS if row in {*frame(evidence)["row"]}]
    for result in longer:
        (steps,) = {note["steps"] for name, note in _notes(result) if name == "embeddings 0"}
        shown += [(result, None, row, f", {steps:,} outer steps") for row in LONGER if row in {*frame(result)["row"]}]
    lines = []
    for result, of_cell, row, more in shown:
        scores = frame(result).query("row == @row")
        sets = by_set(result, cell=of_cell).loc[row].dropna()
        label, role = LABELS[row]
        notes = dict(_notes(result))
        lines.append({"row": row, "label": label + more, "role": role, "recipe": row.split("/")[1],
                      "bytes": scores["nbytes"].mean(), "accuracies": sets.tolist(), "mean": sets.mean(), "sets": len(sets),
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
        methods: as :func:`scores_by_size` returns it; those of :data:`DRAWN` are drawn.
        title: the finding.
        upper: name → accuracy of what trains on all rows, drawn as lines.
        chance: accuracy of guessing.
        corpus_bytes: size of the compressed corpus, drawn as a vertical line.
    """
    figure, (axes,) = _figure(10.5, 5.6)
    drawn = methods[methods["row"].isin(DRAWN)]
    beside = _beside(drawn)
    for method in drawn.itertuples():
        colour = ROLE_COLOURS[method.role]
        axes.plot([beside[method.Index]] * method.sets, method.accuracies, "o", color=colour, mew=1.6, ms=7, alpha=0.85,
                  mfc=colour if method.sets > 1 else "white", zorder=3 if method.sets > 1 else 4, label=method.label)
    for name, value in upper.items():
        axes.axhline(value, color=ROLE_COLOURS["full"], lw=1.6, label=name)
        axes.text(430, value + 0.006, f"{name}: {value:.2f}", fontsize=10, va="bottom")
    axes.axhline(chance, color=ROLE_COLOURS["chance"], lw=1.6, ls=":", label="chance")
    axes.text(7e6, chance - 0.008, f"chance: {chance:.2f}", fontsize=10, color=ROLE_COLOURS["chance"], ha="right", va="top")
    axes.axvline(corpus_bytes, color=ROLE_COLOURS["full"], lw=1.6, ls="--", label="compressed corpus")
    axes.text(corpus_bytes * 0.94, 0.2, "compressed corpus", rotation=90, fontsize=10, ha="right", va="bottom")
    _labelled(axes, drawn, beside, lowest=chance + 0.025)
    axes.set(xscale="log", xlim=(400, 9e6), ylim=(0.12, 0.86), title=title, ylabel="accuracy on the test split",
             xlabel="bytes of what a student trains on, log scale (a dot per set; hollow: one set)")
    axes.set_xticks([1e3, 1e4, 1e5, 1e6], ["1 kB", "10 kB", "100 kB", "1 MB"])
    axes.grid(axis="x", visible=False)
    names = {"real": "real sentences, drawn at random", "text": "other text", "learned": "learned vectors"}
    marks = [Line2D([], [], ls="", marker="o", color=ROLE_COLOURS[role], label=name) for role, name in names.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _beside(methods: pd.DataFrame) -> pd.Series:
    """Where each method is drawn: at its weight, or :data:`JITTER` beside it where another one of that weight is as good."""
    places = methods["bytes"].astype(float)
    for _, group in methods.groupby("bytes"):
        ranges = pd.DataFrame(group["accuracies"].map(lambda values: (min(values), max(values))).tolist(), index=group.index)
        shared = [i for i in group.index if ((ranges[0] <= ranges[1][i]) & (ranges[1] >= ranges[0][i])).sum() > 1]
        places[shared] *= 1 + JITTER * np.linspace(-1, 1, len(shared))
    return places


def _labelled(axes, methods: pd.DataFrame, beside: pd.Series, lowest: float) -> None:
    """Each method's name and mean beside its dots: text to the right of all text, moved apart but not below ``lowest``; vectors
    that stand just to the left of heavier ones have their name to the left."""
    box = {"fc": "white", "ec": "none", "pad": 0.6}
    text = methods[methods["role"] != "learned"].sort_values("mean", ascending=False)
    last, right = np.inf, text["bytes"].max() * 1.25
    for method in text.itertuples():
        last = max(lowest, min(method.mean, last - GAP))
        name = f"{LABELS[method.row][0]}: {method.mean:.2f}"
        axes.annotate(name, (beside[method.Index], method.mean), (right, last), fontsize=10, va="center", bbox=box,
                      arrowprops={"arrowstyle": "-", "color": ROLE_COLOURS[method.role], "lw": 0.9, "shrinkA": 1,
                                  "relpos": (0, 0.5), "shrinkB": 5})
    vectors = methods[methods["role"] == "learned"]
    for method in vectors.itertuples():
        to_the_left = vectors["bytes"].between(method.bytes * 1.1, method.bytes * 3).any()
        name = method.label.replace(", ", ",\n", 1) if method.bytes < vectors["bytes"].max() / 3 else method.label
        axes.text(beside[method.Index] * (0.8 if to_the_left else 1.2), method.mean, f"{name}: {method.mean:.2f}", bbox=box,
                  fontsize=10, ha="right" if to_the_left else "left", va="center")
