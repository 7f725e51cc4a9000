"""A prompt as a figure: what a language model reads, and how likely each label is after it.

A prompt is shown as text with its parts marked, the question last.  Corpus text is drawn letter by letter through
:func:`~distillkit.view.set_figures.drawn`, so that nothing in it is taken for mathematics.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from distillkit.io.escaping import one_line
from distillkit.view.figures import ROLE_COLOURS, _figure, plain, style
from distillkit.view.lens.still import CLASS_COLOURS
from distillkit.view.set_figures import drawn

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
    lines = _lines(demonstrations, question, WITHOUT if role == "real" else ROLE_COLOURS[role], cue)
    font = {"fontsize": 10, "family": "DejaVu Sans Mono", "va": "center"}
    for place, (text, colour, answer, answer_colour) in enumerate(lines[-MOST:]):
        written = left.text(0.02, -place, text, color=colour, **font)
        if answer:
            left.annotate(answer, (1, 0.5), xycoords=written, color=answer_colour, weight="bold", **font)
    left.plot([0, 0], [0.5, -min(len(lines), MOST) + 0.5], color="0.8", lw=3, label="_prompt")
    left.set(title=plain(title or "What the model reads"), xlim=(-0.01, 1), ylim=(-max(len(lines[-MOST:]), 12), 1), xlabel="")
    left.set_axis_off()
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
def labels_given(rows: Mapping[str, Mapping[str, int]], labels: Sequence[str], title: str) -> Figure:
    """How often each label was given, a bar of all questions for each row; large parts have their label written on them.

    Args:
        rows: name → {label: number of questions}.
        labels: all labels, in the order of the parts and of the colours.
        title: of the figure.
    """
    figure, (axes,) = _figure(9, 1.5 + 0.5 * len(rows))
    total = max(sum(counts.values()) for counts in rows.values())
    for place, counts in enumerate(rows.values()):
        start = 0
        for number, label in enumerate(labels):
            part = counts.get(label, 0)
            axes.barh(place, part, left=start, height=0.7, color=CLASS_COLOURS[number % len(CLASS_COLOURS)], edgecolor="white")
            if part > 0.13 * total:
                axes.text(start + part / 2, place, plain(label), ha="center", va="center", color="white", fontsize=10)
            start += part
    axes.set(title=plain(title), xlabel="questions", xlim=(0, total), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), map(plain, rows))
    axes.grid(visible=False)
    return figure


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
