"""Figures of prompts: what a language model reads, how likely each label is after it, and what demonstrations are worth.

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
from distillkit.view.set_figures import drawn

WIDE, MOST = 62, 24  # characters of a line of the prompt, and lines
WITHOUT = ROLE_COLOURS["chance"]


@style()
def prompt_and_labels(
    demonstrations: Sequence[tuple[str, str]], question: str, labels: Mapping[str, Mapping[str, float]], truth: str,
    role: str = "real", title: str = "",
) -> Figure:
    """A prompt, and beside it the log-likelihood of every label, with demonstrations and without.

    Args:
        demonstrations: (text, answer) of each, in their order.
        question: what stands last.
        labels: ``"without"`` and, where there are demonstrations, ``"with"`` → {label: log-likelihood in nats}.
        truth: the right label, in bold.
        role: of the demonstrations, one of :data:`~distillkit.view.figures.ROLE_COLOURS`.
        title: of the prompt.
    """
    figure, (left, right) = _figure(11, 4.6, 2, (3, 2))
    lines = _lines(demonstrations, question, WITHOUT if role == "real" else ROLE_COLOURS[role])
    for place, (text, colour, bold) in enumerate(lines[-MOST:]):
        left.text(0.02, -place, text, color=colour, fontsize=10, family="DejaVu Sans Mono", va="center",
                  weight="bold" if bold else "normal")
    left.plot([0, 0], [0.5, -min(len(lines), MOST) + 0.5], color="0.8", lw=3, label="_prompt")
    left.set(title=plain(title or "What the model reads"), xlim=(-0.01, 1), ylim=(-max(len(lines[-MOST:]), 12), 1), xlabel="")
    left.set_axis_off()
    names = list(labels["without"])
    for kind, shift in (("without", 0.2), ("with", -0.2)):
        if kind in labels:
            colour = WITHOUT if kind == "without" else ROLE_COLOURS[role if role != "real" else "full"]
            right.barh(np.arange(len(names)) - shift, [labels[kind][name] for name in names], height=0.38, color=colour,
                       label=f"{kind} demonstrations")
    right.set(title="How likely is each label?", xlabel="log-likelihood (nats): likelier to the right",
              ylim=(len(names) - 0.4, -0.6))
    right.set_yticks(range(len(names)), map(plain, names))
    for tick, name in zip(right.get_yticklabels(), names, strict=True):
        tick.set_weight("bold" if name == truth else "normal")
    right.grid(axis="y", visible=False)
    right.legend(frameon=False, fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def _lines(demonstrations, question: str, colour: str) -> list[tuple[str, str, bool]]:
    """The lines of a prompt, each with its colour and whether it is bold."""
    shown = []
    for number, (text, answer) in enumerate(demonstrations, start=1):
        shown.append((f"demonstration {number}", colour, False))
        parts = textwrap.wrap(one_line(text), WIDE - 2) or [""]
        shown += [("  " + drawn(part), "black", False) for part in parts]
        shown.append((f"  → {drawn(one_line(answer))}", colour, True))
    shown.append(("question", WITHOUT, False))
    shown += [("  " + drawn(part), "black", False) for part in textwrap.wrap(one_line(question), WIDE - 2)]
    return [*shown, ("  → ?", "black", True)]


@style()
def forest(
    panels: Mapping[str, Sequence[tuple[str, str, float, float]]], title: str, label: str,
    lines: Mapping[str, float] | None = None,
) -> Figure:
    """Differences with their 95 % intervals, a panel for each group and a row for each method; 0 is no difference.

    Args:
        panels: title → rows of (name, role, difference, half of its interval; nan: no interval, drawn hollow).
        title, label: of the figure and of x.
        lines: name → value of further vertical lines, such as chance.
    """
    most = max(map(len, panels.values()))
    figure, axes = _figure(1.6 + 3.2 * len(panels), 1.9 + 0.36 * most, len(panels))
    names = list(dict.fromkeys(name for rows in panels.values() for name, *_ in rows))
    for panel, (name, rows) in zip(axes, panels.items(), strict=True):
        for method, role, difference, half in rows:
            known = np.isfinite(half)
            panel.errorbar(difference, names.index(method), xerr=half if known else None, fmt="none", capsize=4, lw=2,
                           color=ROLE_COLOURS[role])
            panel.plot(difference, names.index(method), "o", ms=7, color=ROLE_COLOURS[role], label=plain(method),
                       mfc=ROLE_COLOURS[role] if known else "white", zorder=3)
        panel.axvline(0, color="black", lw=1.5, label="_zero")
        for text, value in (lines or {}).items():
            panel.axvline(value, color=ROLE_COLOURS["chance"], ls=":", lw=1.5, label=plain(text))
            panel.annotate(plain(text), (value, -0.75), xytext=(4, 0), textcoords="offset points", fontsize=10, va="center")
        panel.set(title=plain(name), xlabel=label, ylim=(len(names) - 0.5, -1.1))
        panel.set_yticks(range(len(names)), map(plain, names) if panel is axes[0] else [])
        panel.grid(axis="y", visible=False)
    limits = min(panel.get_xlim()[0] for panel in axes), max(panel.get_xlim()[1] for panel in axes)
    for panel in axes:
        panel.set_xlim(limits)
    figure.suptitle(plain(title))
    return figure
