"""Figures of what :mod:`distillkit.view.measures` computes: arrays in, a Figure out; and tables of text.

Words are drawn through :func:`drawn`, and :func:`~distillkit.view.figures.describe` says what each figure holds.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D

from distillkit.io.checks import check_choice
from distillkit.io.escaping import visible
from distillkit.view.figures import METHOD_COLOURS, _figure, plain, style
from distillkit.view.measures import AttentionShares, History

ROLES = {"real": "o", "distilled": "*", "projected": "X"}
SIZES = {"real": 4, "distilled": 13, "projected": 8}
SHARES = ("special", "content", "own", "previous", "next")
FORMATS = ("markdown", "latex")


def drawn(token: str) -> str:
    """A token as it is drawn: letter by letter, and ``U+8ECA`` for a character that matplotlib's own font does not have."""
    font = get_font(findfont("DejaVu Sans"))
    return plain("".join(c if font.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in token))


def maps(panels: Mapping[str, np.ndarray], classes: Sequence[str] | np.ndarray, roles: Sequence[str] | np.ndarray) -> Figure:
    """Flat maps of the same points side by side, coloured by class, with a marker for each role.

    Args:
        panels: title → ``[n, 2]``, as :func:`~distillkit.view.measures.flat_map` returns them.
        classes: n names of classes.
        roles: n of ``"real"``, ``"distilled"``, ``"projected"``.
    """
    classes, roles = np.asarray(classes), np.asarray(roles)
    for role in np.unique(roles):
        check_choice("role", str(role), ROLES)
    names = list(dict.fromkeys(classes.tolist()))
    colours = dict(zip(names, sns.color_palette("colorblind", len(names))))
    with style():
        figure, axes = _figure(5.4 * len(panels), 4.6, len(panels))
        for where, (title, flat) in zip(axes, panels.items(), strict=True):
            for role in ROLES:
                if role in roles:
                    _scatter(where, np.asarray(flat)[roles == role], classes[roles == role], role, colours)
            where.set(title=plain(title), xlabel="first axis", ylabel="second axis", xticks=[], yticks=[])
        handles = [Line2D([], [], ls="", marker="s", color=colours[name], label=plain(name)) for name in names]
        handles += [
            Line2D([], [], ls="", marker=marker, color="0.3", ms=SIZES[role], label=role)
            for role, marker in ROLES.items() if role in roles
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=(len(handles) + 1) // 2, frameon=False, fontsize=10)
        sns.despine(figure)
    return figure


def _scatter(axes, flat: np.ndarray, classes: np.ndarray, role: str, colours: dict) -> None:
    """The points of a role, each on a dark rim (real text on a light one); many points are drawn smaller."""
    size = SIZES[role] * (1 if len(flat) <= 50 or role == "real" else 0.55)
    rim = {"color": "white", "ms": size + 1} if role == "real" else {"color": "black", "ms": size + 2}
    axes.plot(*flat.T, ls="", marker=ROLES[role], mew=0, label=role, **rim)
    for name, colour in colours.items():
        chosen = flat[classes == name]
        axes.plot(*chosen.T, ls="", marker=ROLES[role], color=colour, ms=size, mew=0, label="_" + name)


def attention_maps(panels: Sequence[tuple[str, np.ndarray, Sequence[str]]]) -> Figure:
    """One head's attention in several texts, on one scale: a row looks at the columns.

    Args:
        panels: for each its title, weights ``[l, l]``, and the l tokens.
    """
    longest = max(len(tokens) for _, _, tokens in panels)
    top = max(float(np.max(weights)) for _, weights, _ in panels)
    with style():
        figure, axes = _figure(len(panels) * (1 + 0.2 * longest), 1.6 + 0.2 * longest, len(panels))
        for where, (title, weights, tokens) in zip(axes, panels, strict=True):
            names = [drawn(token) for token in tokens]
            sns.heatmap(
                np.asarray(weights), ax=where, vmin=0, vmax=top, cmap="crest", square=True, xticklabels=names,
                yticklabels=names, cbar=where is axes[-1], cbar_kws={"label": "attention", "shrink": 0.6},
            )
            where.tick_params(axis="both", labelsize=9, length=0, pad=1)
            where.tick_params(axis="x", rotation=90)
            where.tick_params(axis="y", rotation=0)
            where.set(title=plain(title), xlabel="looked at", ylabel="looking")
    return figure


def heads(panels: Sequence[tuple[str, np.ndarray]], quantity: str, limits: tuple[float, float]) -> Figure:
    """A number for every head, as heat maps on one scale.

    Args:
        panels: for each its title and values ``[layers, heads]``.
        quantity: what is shown, with its unit.
        limits: the ends of the scale.
    """
    layers, per_layer = np.shape(panels[0][1])
    with style():
        figure, axes = _figure(len(panels) * (1.2 + 0.26 * per_layer), 1.4 + 0.34 * layers, len(panels))
        for where, (title, values) in zip(axes, panels, strict=True):
            sns.heatmap(
                np.asarray(values), ax=where, vmin=limits[0], vmax=limits[1], cmap="crest", cbar=where is axes[-1],
                cbar_kws={"label": quantity}, xticklabels=[*map(str, range(1, per_layer + 1))],
                yticklabels=[*map(str, range(1, layers + 1))],
            )
            where.tick_params(axis="both", rotation=0)
            where.set(title=plain(title), xlabel="head", ylabel="layer")
    return figure


def shares(found: Mapping[str, AttentionShares]) -> Figure:
    """Where attention goes, a bar for each text kind; a whisker spans the middle half of the heads.

    Args:
        found: name → shares ``[examples, layers, heads]``; a name of :data:`ROLES` has its usual colour, others are greys.
    """
    usual = {**METHOD_COLOURS, "distilled": METHOD_COLOURS["embeddings"], "real": METHOD_COLOURS["random"]}
    greys = iter(np.linspace(0.85, 0.45, len(found)))
    colours = {name: usual[name] if name in usual else str(next(greys)) for name in found}
    width = 0.8 / len(found)
    with style():
        figure, (axes,) = _figure(8, 3.6)
        for place, (name, parts) in enumerate(found.items()):
            values = [getattr(parts, share).mean(0).ravel() for share in SHARES]
            middle = [v.mean() for v in values]
            x = np.arange(len(SHARES)) + (place - (len(found) - 1) / 2) * width
            axes.bar(x, middle, width, color=colours[name], label=plain(name), edgecolor="white")
            for at, v in zip(x, values):
                axes.plot([at, at], np.quantile(v, [0.25, 0.75]), color="black", lw=1, alpha=0.6)
        axes.set(title="Where attention goes", xlabel="", ylabel="share of attention")
        labels = ["special tokens", "content", "own position", "previous", "next"]
        axes.set_xticks(range(len(SHARES)), labels)
        axes.grid(axis="x", visible=False)
        axes.legend(frameon=False)
        sns.despine(figure)
    return figure


def movement(found: History, yardstick: float | None = None) -> Figure:
    """How far the free positions moved, how many of them have another nearest word, and what the labels did.

    Args:
        found: a set through its snapshots.
        yardstick: a distance to draw beside the movement: from a word to the word nearest to it.
    """
    moved = found.moved[:, found.free]
    colour = METHOD_COLOURS["embeddings"]
    with style():
        figure, axes = _figure(4.6 * (2 + (found.labels is not None)), 3.6, 2 + (found.labels is not None))
        axes[0].plot(found.steps, moved, color=colour, alpha=0.12, lw=0.8)
        axes[0].plot(found.steps, np.median(moved, 1), color=colour, lw=2.5, label="median position")
        if yardstick is not None:
            axes[0].axhline(yardstick, color="black", ls=":", label="word to nearest word")
        axes[0].set(title="Moved from the start", ylabel="Euclidean distance", ylim=(0, None))
        axes[0].legend(frameon=False, fontsize=10)

        axes[1].plot(found.steps, found.away, "o-", color=colour, label="than at the start")
        axes[1].plot(
            found.steps, found.flipped[:, found.free].mean(1), "s--", color=METHOD_COLOURS["projected"],
            label="than one snapshot before",
        )
        axes[1].set(title="Another nearest word", ylabel="share of positions", ylim=(-0.03, 1.03))
        axes[1].legend(frameon=False, fontsize=10)
        if found.labels is not None:
            _draw_labels(axes[2], found)
        for where in axes:
            where.set_xlabel("outer step")
        sns.despine(figure)
    return figure


def _draw_labels(axes, found: History) -> None:
    """The label probability that each example began with as its highest."""
    labels = found.labels
    assert labels is not None  # or they would not be drawn
    own = labels[0].argmax(1)
    for example, colour in zip(range(len(own)), sns.color_palette("colorblind", len(own))):
        axes.plot(found.steps, labels[:, example, own[example]], "o-", ms=4, color=colour, label=f"example {example}")
    axes.set(title="Label: own class", ylabel="probability", ylim=(-0.03, 1.03))
    if len(own) <= 8:
        axes.legend(frameon=False, fontsize=9, ncols=2)


def flips(found: History, example: int, word: Callable[[int], str]) -> Figure:
    """The nearest word at every snapshot of those positions of one example whose word changed, shaded where it did.

    Args:
        found: a set through its snapshots.
        example: which of its examples; where none of its words changed, all its free positions are shown.
        word: from a token id to its text, such as ``tokenizer.convert_ids_to_tokens``.
    """
    free, flipped = np.flatnonzero(found.free[example]), found.flipped[:, example]
    shown = free[flipped[:, free].any(0)]
    title = f"Nearest words of example {example}: {len(shown)} of {len(free)} positions changed"
    shown = shown if len(shown) else free
    names = [[drawn(word(int(i))) for i in found.tokens[:, example, place]] for place in shown]
    with style():
        figure, (axes,) = _figure(max(6.5, 1.2 + 1.15 * len(found.steps)), 1.1 + 0.27 * len(shown))
        sns.heatmap(
            flipped[:, shown].T.astype(float), ax=axes, annot=np.array(names), fmt="", cbar=False, vmin=0, vmax=2.2,
            cmap="Blues", linewidths=0.5, annot_kws={"fontsize": 9}, xticklabels=[*map(str, found.steps)],
            yticklabels=[*map(str, shown)],
        )
        axes.tick_params(axis="y", rotation=0, labelsize=9)
        axes.set(title=title, xlabel="outer step", ylabel="position")
    return figure


def label_table(rows: Sequence[Mapping], classes: Sequence[str], format: str = "markdown") -> str:
    """Distilled sentences beside their label vectors, as Sucholutsky & Schonlau (2021) print them.

    Args:
        rows: ``text``, ``label`` and ``probabilities`` of each example, as ``DistilledSet.to_text()`` gives them.
        classes: the names of the classes, a column each.
        format: ``"markdown"``, or ``"latex"`` (a ``tabular``; ``p{…}`` breaks long sentences).

    Returns:
        The table as text, in which every character of the corpus stands for itself.

    Raises:
        ValueError: an unknown format, or a row with another number of probabilities than classes.
    """
    check_choice("format", format, FORMATS)
    escape = {"markdown": _markdown, "latex": _latex}[format]
    for place, row in enumerate(rows):
        if len(row["probabilities"]) != len(classes):
            raise ValueError(f"row {place} has {len(row['probabilities'])} probabilities for {len(classes)} classes")
    lines = [["class", "text", *classes]]
    lines += [[row["label"], row["text"], *(f"{p:.2f}" for p in row["probabilities"])] for row in rows]
    cells = [[escape(cell) for cell in line] for line in lines]
    if format == "markdown":
        rule = ["---", "---", *["---:"] * len(classes)]
        return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]]) + "\n"
    head, *body = [" & ".join(line) + r" \\" for line in cells]
    columns = "lp{0.45\\linewidth}" + "r" * len(classes)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}", ""])


def _markdown(text: str) -> str:
    """``text`` in a cell of a Markdown table: no HTML, no mark-up, no end of the cell."""
    text = html.escape(visible(" ".join(text.split())), quote=False)
    # As character references, which neither a Markdown reader nor a reader of formulas takes for mark-up.
    return "".join(f"&#{ord(c)};" if c in "|\\`*_[]~$#!:@" else c for c in text)


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\char34{}", "*": "{*}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", "-": "{-}", "[": "{[}", "]": "{]}",
}


def _latex(text: str) -> str:
    """``text`` as LaTeX sets it letter by letter; ``[`` and ``*`` stand in braces, as behind ``\\\\`` they are options."""
    return "".join(LATEX.get(c, c) for c in visible(" ".join(text.split())))
