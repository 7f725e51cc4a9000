"""Figures about meta-gradients: what a strategy holds in memory, what it costs, and how far an approximation is off.

:class:`MemoryTrace` writes down the live bytes after every tensor operation, so that a lesson can draw memory as a film and
not only as a peak.  The figures take plain numbers (:func:`line_panels`) or a committed benchmark (:func:`cost_bars`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from distillkit.io.memory import LiveBytes
from distillkit.view.figures import ROLE_COLOURS, _figure, style

# None of them is the colour of a role.
COLOURS = ("#029e73", "#d55e00", "#7b4ea3", "#a0522d", "#cc78bc")
STRATEGIES = ("StoreAll", "Replay", "Truncated", "ForwardDifference", "Replay, every 4th set")
STRATEGY_COLOURS = dict(zip(STRATEGIES, ("#6b2d0f", "#029e73", "#cc78bc", "#c9a200", "#7b4ea3"), strict=True))
MARKED = {"color": "black", "lw": 1.2, "ls": ":"}  # a value that the reader chose, or a limit


class MemoryTrace(LiveBytes):
    """:class:`~distillkit.io.memory.LiveBytes` with a memory: ``history`` holds the live bytes after each tensor operation."""

    def __init__(self):
        super().__init__()
        self.history: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = super().__torch_dispatch__(func, types, args, kwargs)
        self.history.append(self.total.now)
        return output


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel of :func:`line_panels`.

    Args:
        title, x, y: the finding, and the labels of the axes.
        lines: {name: (x values, y values)}.
        log: the axes that are logarithmic: "", "x", "y" or "xy".
        marks: {name: x value} of dotted vertical lines.
        levels: {name: (y value, role)} of horizontal lines, in the colour of a role.
        ylim: the limits of y; None: those of the values.
        markers: a mark at every point; hollow for a single set, which has no spread.
        legend: where matplotlib puts the names of the lines; "outside": right of the panel; "ends": at the ends of the lines;
            "none": nowhere.
        colours: {name: colour} of lines; the others take :data:`COLOURS` in turn.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log: str = ""
    marks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    levels: Mapping[str, tuple[float, str]] = dataclasses.field(default_factory=dict)
    ylim: tuple[float, float] | None = None
    markers: bool = True
    hollow: bool = False
    legend: str = "best"
    colours: Mapping[str, str] = dataclasses.field(default_factory=dict)


@style()
def line_panels(*panels: Panel) -> Figure:
    """Panels of lines side by side, each with a legend of its own."""
    figure, axes = _figure(5.4 * len(panels), 3.9, len(panels))
    for where, panel in zip(axes, panels, strict=True):
        for number, (name, (xs, ys)) in enumerate(panel.lines.items()):
            colour = panel.colours.get(name, COLOURS[number % len(COLOURS)])
            marker = "osD^v"[number % 5] if panel.markers else None
            where.plot(xs, ys, marker=marker, ms=6 if panel.hollow else 5, mfc="white" if panel.hollow else colour, lw=1.8,
                       color=colour, label=name)
        where.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, **{f"{axis}scale": "log" for axis in panel.log})
        if panel.ylim is not None:
            where.set_ylim(panel.ylim)
        _mark(where, panel.marks, panel.levels)
        if "x" not in panel.log and all(float(x).is_integer() for xs, _ in panel.lines.values() for x in xs):
            where.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        where.title.set_fontsize(12)
        if panel.legend == "outside":
            where.legend(fontsize=9.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
        elif panel.legend == "ends":
            _name_ends(where, panel.lines)
        elif panel.legend != "none":
            where.legend(fontsize=9.5, loc=panel.legend)
    return figure


def _name_ends(axes, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Name each line at its right end in its colour, the names as far apart as they need to be read."""
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    ends = {name: (xs[-1], ys[-1]) for name, (xs, ys) in lines.items()}
    places, height = {name: axes.transData.transform(end)[1] for name, end in ends.items()}, float("-inf")
    for name in sorted(ends, key=places.__getitem__):
        height = max(places[name], height + 13 * axes.figure.dpi / 72)
        axes.annotate(name, ends[name], xytext=(8, (height - places[name]) * 72 / axes.figure.dpi), textcoords="offset points",
                      va="center", fontsize=9.5, color=colours[name], annotation_clip=False)


def _mark(axes, marks: Mapping[str, float], levels: Mapping[str, tuple[float, str]]) -> None:
    """Dotted vertical lines with their names at the foot of the panel, and dashed levels with theirs at its left."""
    for name, (y, role) in levels.items():
        axes.axhline(y, color=ROLE_COLOURS[role], lw=1.5, ls="--", label=f"_{name}")
        axes.annotate(name, (0.02, y), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                      fontsize=9.5, color="#333333")
    for name, x in marks.items():
        axes.axvline(x, label=f"_{name}", **MARKED)
        axes.annotate(name, (x, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points",
                      fontsize=9.5 if len(name) > 2 else 14, rotation=90 if len(name) > 2 else 0, va="bottom")


@style()
def memory_films(films: Mapping[str, Sequence[float]], title: str, frames: int = 150) -> Figure:
    """Live megabytes of strategies while they run, each from its start to its end.

    Args:
        films: of :data:`STRATEGIES`: {name: megabytes after each tensor operation}.
        title: the finding.
        frames: how many points are drawn of each, the most bytes of as many equal stretches.
    """
    lines = {}
    for name, film in films.items():
        bounds = [len(film) * place // frames for place in range(frames + 1)]
        peaks = [max(film[begin:end] or [film[min(begin, len(film) - 1)]]) for begin, end in zip(bounds, bounds[1:])]
        lines[name] = [100 * place / frames for place in range(1, frames + 1)], peaks
    figure = line_panels(Panel(title, "tensor operations done, % of each run", "live tensors, MB", lines, markers=False,
                               legend="outside", colours=STRATEGY_COLOURS))
    figure.set_size_inches(8.5, 3.9)
    return figure


@style()
def cost_bars(result: Mapping, steps: Sequence[int], contenders: Mapping[str, str], titles: tuple[str, str]) -> Figure:
    """Memory and time of strategies at several numbers of inner steps.

    Left, the peak of all live tensors as a pale bar and the peak of the activations as a full one in front of it; right, the
    time as a multiple of training without a meta-gradient.  The legend of the left panel serves both.

    Args:
        result: as the benchmark of meta-gradients writes it; its first student is drawn.
        steps: inner steps T, a group of bars each.
        contenders: the bars of a group, of :data:`STRATEGIES`: {name in ``result``: name in the legend}.
        titles: of the two panels.

    Raises:
        KeyError: a contender was not measured at one of the ``steps``.
    """
    rows = {(row["contender"], row["steps"]): row for row in result["entries"][0]["rows"]}
    figure, (memory, time) = _figure(11, 4, 2)
    width = 0.8 / len(contenders)
    for number, (name, label) in enumerate(contenders.items()):
        places = [place + (number - (len(contenders) - 1) / 2) * width for place in range(len(steps))]
        cells, colour = [rows[name, t] for t in steps], STRATEGY_COLOURS[name]
        memory.bar(places, [cell["bytes"] / 1e9 for cell in cells], width * 0.92, color=colour, alpha=0.4, label=label)
        memory.bar(places, [cell["activations"] / 1e9 for cell in cells], width * 0.5, color=colour, label=f"_{label}")
        time.bar(places, [cell["cost"] for cell in cells], width * 0.92, color=colour, label=label)
    time.axhline(1, label="training alone", **MARKED)
    time.annotate("training alone", (1, 1), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                  fontsize=9.5, va="center")
    for axes, title in zip((memory, time), titles, strict=True):
        axes.set_xticks(range(len(steps)), [f"T = {t}" for t in steps])
        axes.set_xlabel("inner steps")
        axes.grid(axis="x", visible=False)
        axes.set_title(title, fontsize=12)
    memory.set_ylabel("peak of live tensors, GB")
    time.set_ylabel("time, in plain training runs")
    kinds = [Patch(color="grey", alpha=0.4, label="pale: everything"), Patch(color="grey", label="full: activations")]
    memory.legend(handles=[*memory.get_legend_handles_labels()[0], *kinds], fontsize=9.5)
    return figure
