"""A prompt as a figure: what a language model reads, and how likely each label is after it.

A prompt is shown as text with its parts marked, the question last.  Corpus text is drawn letter by letter through
:func:`~distillkit.view.set_figures.drawn`, so that nothing in it is taken for mathematics.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distillkit.io.escaping import one_line
from distillkit.view.figures import ROLE_COLOURS, _figure, plain, style
from distillkit.view.lens.still import CLASS_COLOURS
from distillkit.view.set_figures import drawn
from pictures.forest import Gain, forest

WIDE, MOST = 62, 24  # characters of a line of the prompt, and lines
LEAST = -7.0  # nats: one scale for the labels of all prompts, unless one is less likely
WITHOUT = ROLE_COLOURS["chance"]


@style()
def prompt_and_labels(
    demonstrations: Sequence[tuple[str, str]], question: str, labels: Mapping[str, Mapping[str, float]], truth: str,
    role: str = "real", title: str = "", cue: str = "",
) -> Figure:
    """A prompt, and beside it the log-likelihood of every label, with demonstrations and without.

    Args:
        demonstrations: (text, answer) of each, in their order.
        question: what stands last.
        labels: ``"without"`` and, where there are demonstrations, ``"with"`` → {label: log-likelihood in nats}.
        truth: the right label, in bold.
        role: of the demonstrations, one of :data:`~distillkit.view.figures.ROLE_COLOURS`.
        title: of the prompt.
        cue: what stands between a text and its answer; a question ends with it already.
    """
    figure, (left, right) = _figure(11, 4.6, 2, (3, 2))
    _write(left, _lines(demonstrations, question, WITHOUT if role == "real" else ROLE_COLOURS[role], cue), title)
    names, least = list(labels["without"]), min(LEAST, 1.05 * min(min(scores.values()) for scores in labels.values()))
    for kind, shift in (("without", 0.2), ("with", -0.2)):
        if kind in labels:
            fill = "white" if kind == "without" else ROLE_COLOURS[role]
            right.barh(np.arange(len(names)) - shift, [labels[kind][name] - least for name in names], height=0.38, left=least,
                       color=fill, edgecolor=WITHOUT, label=f"{kind} demonstrations")
    right.set(title="How likely is each label?", xlabel="log-likelihood (nats): the longer, the likelier",
              ylim=(len(names) - 0.4, -0.6), xlim=(least, 0))
    right.set_yticks(range(len(names)), map(plain, names))
    for tick, name in zip(right.get_yticklabels(), names, strict=True):
        tick.set_weight("bold" if name == truth else "normal")
    right.grid(axis="y", visible=False)
    right.legend(frameon=False, fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


@style()
def prompt_and_probabilities(demonstrations: Sequence[tuple[str, str]], question: str,
                             kinds: Mapping[str, tuple[str, Mapping[str, float]]], truth: str, title: str,
                             cue: str = "") -> Figure:
    """A prompt, and beside it how probable every label is after several kinds of the same words.

    Args:
        demonstrations, question, truth, cue: as :func:`prompt_and_labels` takes them.
        kinds: name → (role, {label: log-likelihood in nats}); the first kind has hollow marks.
        title: of the labels.
    """
    figure, (left, right) = _figure(11, 4.6, 2, (3, 2))
    _write(left, _lines(demonstrations, question, WITHOUT, cue), "Two demonstrations and a question")
    names = list(next(iter(kinds.values()))[1])
    for number, (kind, (role, scores)) in enumerate(kinds.items()):
        places = np.arange(len(names)) + 0.22 * (number - (len(kinds) - 1) / 2)
        right.plot(np.exp([scores[name] for name in names]), places, ls="", marker="osD^v"[number], ms=8, mew=1.6,
                   color=ROLE_COLOURS[role], mfc=ROLE_COLOURS[role] if number else "white", label=plain(kind))
    right.set(title=plain(title), xlabel="probability of the label", xlim=(-0.02, 1), ylim=(len(names) - 0.4, -0.6))
    right.set_yticks(range(len(names)), map(plain, names))
    for tick, name in zip(right.get_yticklabels(), names, strict=True):
        tick.set_weight("bold" if name == truth else "normal")
    right.grid(axis="y", visible=False)
    right.legend(frameon=False, fontsize=10, loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=len(kinds))
    return figure


@style()
def labels_given(rows: Mapping[str, Mapping[str, int]], labels: Sequence[str], title: str,
                 right: Mapping[str, int] | None = None) -> Figure:
    """How often each label was given, a bar of all questions for each row; large parts have their label written on them.

    Args:
        rows: name → {label: number of questions}.
        labels: all labels, in the order of the parts and of the colours.
        title: of the figure.
        right: name → how many were right, written at the end of the bar.
    """
    figure, (axes,) = _figure(9, 1.5 + (0.5 if len(rows) < 12 else 0.4) * len(rows))
    total = max(sum(counts.values()) for counts in rows.values())
    for place, counts in enumerate(rows.values()):
        start = 0
        for number, label in enumerate(labels):
            part = counts.get(label, 0)
            axes.barh(place, part, left=start, height=0.7, color=CLASS_COLOURS[number % len(CLASS_COLOURS)], edgecolor="white")
            if part > 0.13 * total:
                axes.text(start + part / 2, place, plain(label), ha="center", va="center", color="white", fontsize=10)
            start += part
    for place, name in enumerate(rows):
        if name in (right or {}):
            axes.annotate(f"{right[name]} right", (total, place), xytext=(5, 0), textcoords="offset points", va="center",
                          fontsize=10)
    axes.set(title=plain(title), xlabel="questions", xlim=(0, total), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), map(plain, rows))
    axes.grid(visible=False)
    return figure


@style()
def gains_over_none(panels: Mapping[str, Sequence[Gain]], none: float, chance: float, title: str) -> Figure:
    """A :func:`~pictures.forest.forest` of what demonstrations gain over none, whose bars end where the accuracy is 0.

    Gains without an interval are left out.

    Args:
        panels: title → gains, as :func:`~pictures.forest.gains` returns them.
        none: the accuracy without demonstrations.
        chance: the accuracy of guessing.
        title: of the figure.
    """
    shown = {name: [gain for gain in listed if np.isfinite(gain.alone)] for name, listed in panels.items()}
    figure = forest(shown, title, "accuracy minus zero-shot", {"chance": chance - none})
    for axes in figure.axes:
        axes.set_xlim(-none, max(axes.get_xlim()[1], 0.05))
    for legend in figure.legends:
        legend.remove()
    marks = [Line2D([], [], color="0.3", lw=4, label="95 % interval of this gain alone"),
             Line2D([], [], color="0.3", lw=1.3, label="of all gains of the panel together"),
             Line2D([], [], ls="", marker="o", color="0.3", ms=5.5, label="dot alone: the bar is shorter than the dot")]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return figure


def _write(axes, lines: Sequence[tuple[str, str, str, str]], title: str) -> None:
    """A prompt into a panel, line by line."""
    font = {"fontsize": 10, "family": "DejaVu Sans Mono", "va": "center"}
    for place, (text, colour, answer, answer_colour) in enumerate(lines[-MOST:]):
        written = axes.text(0.02, -place, text, color=colour, **font)
        if answer:
            axes.annotate(answer, (1, 0.5), xycoords=written, color=answer_colour, weight="bold", **font)
    axes.plot([0, 0], [0.5, -min(len(lines), MOST) + 0.5], color="0.8", lw=3, label="_prompt")
    axes.set(title=plain(title or "What the model reads"), xlim=(-0.01, 1), ylim=(-max(len(lines[-MOST:]), 12), 1), xlabel="")
    axes.set_axis_off()


def _lines(demonstrations, question: str, colour: str, cue: str) -> list[tuple[str, str, str, str]]:
    """The lines of a prompt: the text of each, its colour, and the answer behind it with its own; an empty line ends a
    demonstration."""
    shown = []
    for number, (text, answer) in enumerate(demonstrations, start=1):
        shown.append((f"demonstration {number}", colour, "", ""))
        *parts, last = _wrapped(one_line(text) + cue, len(one_line(answer)) + 1)
        shown += [("  " + drawn(part), "black", "", "") for part in parts]
        shown += [("  " + drawn(last), "black", f" {drawn(one_line(answer))}", colour), ("", "black", "", "")]
    *parts, last = _wrapped(one_line(question), 2)
    return [*shown, ("question", WITHOUT, "", ""), *(("  " + drawn(part), "black", "", "") for part in parts),
            ("  " + drawn(last), "black", " ?", "black")]


def _wrapped(text: str, behind: int) -> list[str]:
    """A text in lines, with room for ``behind`` characters after the last one."""
    parts = textwrap.wrap(text, WIDE - 2) or [""]
    if len(parts[-1]) + behind > WIDE + 4 and " " in parts[-1]:
        parts[-1:] = parts[-1].rsplit(" ", 1)
    return parts
