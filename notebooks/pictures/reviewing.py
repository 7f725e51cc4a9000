"""A paper to review: suspicions with their verdicts, and drawings of intervals, for lesson 10.

Reviewing is taught by looking for what is wrong, so the lesson rebuilds the tables of an invented paper from committed
scores and hides mistakes in it.  :data:`SUSPICIONS` lists what a reader may object to; most objections hold and some do not,
because a reviewer who objects to everything helps as little as one who objects to nothing.  :func:`checklist` judges the
objections that a reader has ticked and keeps quiet about the others.  :func:`gains` draws differences with their intervals,
one line for each, so that a reader sees which of them leave zero out; :func:`groups` draws an interval alone and corrected in
one row; :func:`experiments` shows many simulated intervals beside the true gain.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import ipywidgets
from matplotlib.figure import Figure

from distillkit.view.figures import ROLE_COLOURS, _figure, style

HOLDS, FAILS, OPEN = "#0b6e4f", "#a8321a", "#222222"  # green, red, black; each verdict is also said in words


@dataclasses.dataclass(frozen=True)
class Suspicion:
    """An objection to the paper: what it says, whether it holds, and the reason in a few words."""

    text: str
    holds: bool
    reason: str


SUSPICIONS = {
    "A": Suspicion("k-centre and herding have one and the same score: a copying mistake", False,
                   "at one per class both choose the same sentences"),
    "B": Suspicion("the learned set has its own recipe, the others a tuned one", True, "under the tuned recipe: 0.541"),
    "C": Suspicion("the set that is reported was chosen by its test score", True, "the mean of the three sets is 0.592"),
    "D": Suspicion("float16 cannot have the same score to three digits", False, "rounding did not change one mean"),
    "E": Suspicion("the ± is not that between sets", True, "between sets it is 0.027"),
    "F": Suspicion("a cheap method that uses all labels is missing", True, "keywords 0.537, TF-IDF on all rows 0.743"),
    "G": Suspicion("three sets: an interval cannot be computed", False, "Student's t pays for it: 4.30 in place of 1.96"),
    "H": Suspicion("the size of the set is counted in examples only", True,
                   "in bytes: more than the compressed corpus, in float16 too"),
    "I": Suspicion("one draw is called random", True, "the three draws: 0.765, 0.802, 0.722"),
    "J": Suspicion("recipes were tuned on the test split", False, "the paper says: on validation, and so it was"),
    "K": Suspicion("line 2 counts one herding set three times", True, "it was drawn once, so the interval is too small"),
    "L": Suspicion("the share of line 3 forgets chance", True, "above chance it is 38 %"),
    "M": Suspicion("lines 4 and 5 forget how many comparisons were made", True,
                   "corrected for nine: ± 0.044 for line 4, which falls; line 5 stands"),
    "N": Suspicion("the only opponent of lines 4 and 5 is LESS", True, "random pairs are above LESS"),
    "O": Suspicion("a gain of 0.085, as in line 5, is too good to be true", False, "it stands, also over random pairs"),
}
PLANTED = sum(suspicion.holds for suspicion in SUSPICIONS.values())


def boxes() -> dict[str, ipywidgets.Checkbox]:
    """A small box to tick for each suspicion, by its letter: the controls of :func:`checklist`."""
    return {letter: ipywidgets.Checkbox(False, description=letter, indent=False, layout={"width": "56px"})
            for letter in SUSPICIONS}


@style()
def checklist(**ticked: bool) -> Figure:
    """The list of suspicions; those that are ticked are judged, and nothing is said of the others.

    Args:
        ticked: whether a suspicion is ticked, by its letter; a letter that is missing is not.

    Raises:
        ValueError: a letter that is none of :data:`SUSPICIONS`.
    """
    if unknown := [letter for letter in ticked if letter not in SUSPICIONS]:
        raise ValueError(f"no suspicion {unknown[0]!r}; the letters are {', '.join(SUSPICIONS)}")
    judged = [SUSPICIONS[letter] for letter, on in ticked.items() if on]
    right = sum(suspicion.holds for suspicion in judged)
    figure, (axes,) = _figure(8.4, 6.4)
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(SUSPICIONS) - 0.4, -0.6)
    axes.set_title(f"{right} of {PLANTED} mistakes found; objections without ground: {len(judged) - right}")
    for row, (letter, suspicion) in enumerate(SUSPICIONS.items()):
        on = ticked.get(letter, False)
        colour = (HOLDS if suspicion.holds else FAILS) if on else OPEN
        axes.text(0, row, letter, color=colour, va="center", fontsize=13, weight="bold")
        axes.text(0.045, row, suspicion.text, color=colour, va="center", fontsize=13)
        if on:
            verdict = "a mistake" if suspicion.holds else "no mistake"
            axes.text(0.045, row + 0.42, f"{verdict}: {suspicion.reason}", color=colour, va="center", fontsize=11)
    return figure


@style()
def gains(title: str, lines: Sequence[tuple[str, float, float]], apart: int = 0) -> Figure:
    """Differences of accuracies with their 95 % intervals, one below the other; beside each, on which side of 0 it lies.

    Args:
        title: the finding.
        lines: of each its label, the mean, and half the width of the interval; an infinite one, as of a single set, draws a
            hollow mark alone.
        apart: how many of the last lines a rule sets apart from the others.
    """
    figure, (axes,) = _figure(9.6, 1.6 + 0.5 * len(lines))
    axes.axvline(0, color="#222222", linewidth=1.5)
    for row, (label, mean, half) in enumerate(lines):
        known = math.isfinite(half)
        reach = [mean - half, mean + half] if known else [mean, mean]
        axes.plot(reach, [row, row], color=ROLE_COLOURS["learned"], linewidth=3, label=f"{label} {_signed(mean)}")
        axes.plot([mean], [row], "o", color=ROLE_COLOURS["learned"], markersize=9, markeredgewidth=2,
                  markerfacecolor=ROLE_COLOURS["learned"] if known else "white")
        text = f"{_signed(mean)} ± {half:.3f}: {_side(mean, half)}" if known else f"{_signed(mean)}: no interval"
        axes.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=12)
    if apart:
        axes.axhline(len(lines) - apart - 0.5, color="0.35", linewidth=1, linestyle="--", label="_apart")
    axes.set_yticks(range(len(lines)), [label for label, _, _ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("difference of accuracies, with its 95 % interval")
    axes.set_title(title)
    return figure


@style()
def groups(title: str, lines: Sequence[tuple[str, str, float, float, float]], comparisons: int) -> Figure:
    """Differences in groups, a row for each: a thick interval that holds alone, and a thin one that holds for all together.

    Args:
        title: the finding.
        lines: of each its group, its label, the mean, and half the width of the interval alone and together.  The lines of a
            group follow each other; its name stands above the first.
        comparisons: how many differences the thin intervals hold for together.
    """
    headings = list(dict.fromkeys(line[0] for line in lines))
    figure, (axes,) = _figure(10.4, 1.6 + 0.45 * (len(lines) + len(headings)))
    axes.axvline(0, color=OPEN, linewidth=1.5)
    names: list[str] = []
    for group, label, mean, alone, together in lines:
        names += [label] if group in names else [group, label]
        place, colour = len(names) - 1, ROLE_COLOURS["text" if group == headings[0] else "learned"]
        axes.plot([mean - together, mean + together], [place, place], color=colour, linewidth=1.5,
                  label=f"{group} {label} {_signed(mean)}")
        axes.plot([mean - alone, mean + alone], [place, place], color=colour, lw=5, solid_capstyle="butt", label="_alone")
        axes.plot([mean], [place], "o", color=colour, markersize=9, label="_mean")
        text = f"{_signed(mean)} ± {alone:.3f}, corrected ± {together:.3f}: {_side(mean, together)}"
        axes.annotate(text, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=11)
    axes.set_yticks(range(len(names)), names)
    for text in axes.get_yticklabels():
        text.set_weight("bold" if text.get_text() in headings else "normal")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"difference of accuracies, 95 %\n(thick: alone, thin: {comparisons} together)")
    axes.set_title(title)
    return figure


@style()
def experiments(columns: Mapping[str, tuple[Sequence[float], Sequence[float]]], truth: float) -> Figure:
    """Simulated experiments in columns, one for each kind of interval: blue where it lies above 0, grey where it does not.

    Args:
        columns: kind of interval → the gain of each experiment and half the width of its interval.
        truth: the true gain.
    """
    figure, panels = _figure(9.6, 4.4, len(columns))
    reach = 1.05 * max(abs(gain) + half for gains, halves in columns.values() for gain, half in zip(gains, halves))
    for axes, (name, (gains, halves)) in zip(panels, columns.items(), strict=True):
        axes.axvline(0, color=OPEN, linewidth=1.5, label="_zero")
        axes.axvline(truth, color=OPEN, linewidth=1.5, linestyle="--", label="_truth")
        for row, (gain, half) in enumerate(zip(gains, halves)):
            colour = ROLE_COLOURS["learned" if gain > half else "real"]
            axes.plot([gain - half, gain + half], [row, row], color=colour, linewidth=2.5, label="_interval")
            axes.plot([gain], [row], "o", color=colour, markersize=5, label="_gain")
        above = sum(gain > half for gain, half in zip(gains, halves))
        axes.set(title=f"{name.capitalize()}: {above} of {len(gains)} lie above 0", xlim=(-reach, reach), yticks=[],
                 ylim=(len(gains), -2.2), xlabel="gain in accuracy, 95 % interval", ylabel="experiment")
        for x, text, side in ((0, "0", "right"), (truth, f"true gain {truth:g}", "left")):
            axes.annotate(text, (x, -1.2), xytext=(-5 if side == "right" else 5, 0), textcoords="offset points", ha=side,
                          va="center", fontsize=10)
    return figure


def _side(mean: float, half: float) -> str:
    """On which side of 0 an interval lies."""
    return "holds 0" if abs(mean) <= half else "above 0" if mean > 0 else "below 0"


def _signed(value: float) -> str:
    """A difference with its sign; a minus sign and no hyphen."""
    return f"{value:+.3f}".replace("-", "−")
