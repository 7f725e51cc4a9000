"""Figures of what :mod:`distillkit.view.measures` computes: arrays in, a Figure out; and tables of text.

Words are drawn through :func:`drawn`, and :func:`~distillkit.view.figures.describe` lists the contents of each figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D

from distillkit.io.checks import check_choice
from distillkit.io.escaping import markdown, visible
from distillkit.view.figures import METHOD_COLOURS, _figure, plain, style
from distillkit.view.measures import AttentionShares, History

ROLES = {"real": "o", "distilled": "*", "projected": "X"}
SIZES = {"real": 4, "distilled": 13, "projected": 8}
SHARES = {
    "special": "special tokens", "content": "content", "own": "own position", "previous": "previous", "next": "next",
}


def drawn(token: str) -> str:
    """A token as matplotlib draws it: letter by letter, with ``U+8ECA`` for a character that its own font does not have."""
    font = get_font(findfont("DejaVu Sans"))
    return plain("".join(c if font.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in token))


@style()
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
    figure, axes = _figure(5.4 * len(panels), 4.6, len(panels))
    shown = [role for role in ROLES if role in roles]
    for panel, (title, flat) in zip(axes, panels.items(), strict=True):
        for role in shown:
            _scatter(panel, np.asarray(flat)[roles == role], classes[roles == role], role, colours)
        panel.set(title=plain(title), xlabel="first axis", ylabel="second axis", xticks=[], yticks=[])
    handles = [Line2D([], [], ls="", marker="s", color=colours[name], label=plain(name)) for name in names]
    handles += [Line2D([], [], ls="", marker=ROLES[role], color="0.3", ms=SIZES[role], label=role) for role in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=(len(handles) + 1) // 2, frameon=False, fontsize=10)
    return figure


def _scatter(axes, flat: np.ndarray, classes: np.ndarray, role: str, colours: dict) -> None:
    """The points of a role, each on a dark rim (real text on a light one); many points are drawn smaller."""
    size = SIZES[role] * (1 if len(flat) <= 50 or role == "real" else 0.55)
    rim = {"color": "white", "ms": size + 1} if role == "real" else {"color": "black", "ms": size + 2}
    axes.plot(*flat.T, ls="", marker=ROLES[role], mew=0, label=role, **rim)
    for name, colour in colours.items():
        axes.plot(*flat[classes == name].T, ls="", marker=ROLES[role], color=colour, ms=size, mew=0, label="_" + name)


@style()
def attention_maps(panels: Sequence[tuple[str, np.ndarray, Sequence[str]]]) -> Figure:
    """One head's attention in several texts, on one scale: a row looks at the columns.

    Args:
        panels: for each its title, weights ``[l, l]``, and the l tokens.
    """
    longest = max(len(tokens) for *_, tokens in panels)
    top = max(float(np.max(weights)) for _, weights, _ in panels)
    figure, axes = _figure(len(panels) * (1 + 0.2 * longest), 1.6 + 0.2 * longest, len(panels))
    for panel, (title, weights, tokens) in zip(axes, panels, strict=True):
        names = [drawn(token) for token in tokens]
        sns.heatmap(
            np.asarray(weights), ax=panel, vmin=0, vmax=top, cmap="crest", square=True, xticklabels=names,
            yticklabels=names, cbar=panel is axes[-1], cbar_kws={"label": "attention", "shrink": 0.6},
        )
        panel.tick_params(axis="x", labelsize=9, length=0, pad=1, rotation=90)
        panel.tick_params(axis="y", labelsize=9, length=0, pad=1, rotation=0)
        panel.set(title=plain(title), xlabel="looked at", ylabel="looking")
    return figure


@style()
def heads(panels: Sequence[tuple[str, np.ndarray]], quantity: str, limits: tuple[float, float]) -> Figure:
    """A number for every head, as heat maps on one scale.

    Args:
        panels: for each its title and values ``[layers, heads]``.
        quantity: the name of the number, with its unit.
        limits: the ends of the scale.
    """
    layers, per_layer = np.shape(panels[0][1])
    figure, axes = _figure(len(panels) * (1.2 + 0.26 * per_layer), 1.4 + 0.34 * layers, len(panels))
    for panel, (title, values) in zip(axes, panels, strict=True):
        sns.heatmap(
            pandas.DataFrame(np.asarray(values), range(1, layers + 1), range(1, per_layer + 1)), ax=panel, cmap="crest",
            vmin=limits[0], vmax=limits[1], cbar=panel is axes[-1], cbar_kws={"label": quantity},
            xticklabels=1, yticklabels=1,
        )
        panel.tick_params(rotation=0)
        panel.set(title=plain(title), xlabel="head", ylabel="layer")
    return figure


@style()
def shares(parts: Mapping[str, AttentionShares]) -> Figure:
    """Where attention goes, a bar for each kind of text; a whisker spans the middle half of the heads.

    Args:
        parts: name → shares ``[examples, layers, heads]``; a name of :data:`ROLES` has its usual colour, others are greys.
    """
    usual = {**METHOD_COLOURS, "distilled": METHOD_COLOURS["embeddings"], "real": METHOD_COLOURS["random"]}
    greys = [str(grey) for grey in np.linspace(0.85, 0.45, len(parts))]
    by_head = pandas.concat([
        pandas.DataFrame({"text": plain(name), "part": label, "share": getattr(values, part).mean(0).ravel()})
        for name, values in parts.items() for part, label in SHARES.items()
    ])
    figure, (axes,) = _figure(8, 3.6)
    sns.barplot(
        by_head, x="part", y="share", hue="text", palette=[usual.get(name, grey) for name, grey in zip(parts, greys)],
        edgecolor="white", saturation=1, errorbar=("pi", 50), err_kws={"color": "black", "lw": 1, "alpha": 0.6}, ax=axes,
        legend=False,
    )
    axes.set(title="Where attention goes", xlabel="", ylabel="share of attention")
    axes.legend(axes.containers, by_head["text"].unique(), frameon=False)
    return figure


@style()
def movement(past: History, yardstick: float | None = None) -> Figure:
    """How far the learned positions moved, how many of them have another nearest word, and how the labels changed.

    Args:
        past: a set through its snapshots.
        yardstick: a distance to draw beside the movement: from a word to the word nearest to it.
    """
    moved, flipped, panels = past.moved[:, past.free], past.flipped[:, past.free].mean(1), 2 + (past.labels is not None)
    colour = METHOD_COLOURS["embeddings"]
    figure, axes = _figure(4.6 * panels, 3.6, panels)
    axes[0].plot(past.steps, moved, color=colour, alpha=0.12, lw=0.8)
    axes[0].plot(past.steps, np.median(moved, 1), color=colour, lw=2.5, label="median position")
    if yardstick is not None:
        axes[0].axhline(yardstick, color="black", ls=":", label="word to nearest word")
    axes[0].set(title="Moved from the start", ylabel="Euclidean distance", ylim=(0, None))
    axes[1].plot(past.steps, past.away, "o-", color=colour, label="than at the start")
    axes[1].plot(past.steps, flipped, "s--", color=METHOD_COLOURS["projected"], label="than one snapshot before")
    axes[1].set(title="Another nearest word", ylabel="share of positions", ylim=(-0.03, 1.03))
    if past.labels is not None:
        examples = range(past.labels.shape[1])
        axes[2].set_prop_cycle(color=sns.color_palette("colorblind", len(examples)))
        highest = past.labels[:, examples, past.labels[0].argmax(1)]
        axes[2].plot(past.steps, highest, "o-", ms=4, label=[f"example {example}" for example in examples])
        axes[2].set(title="Label: own class", ylabel="probability", ylim=(-0.03, 1.03))
    for panel in axes:
        panel.set_xlabel("outer step")
        if len(panel.get_legend_handles_labels()[0]) <= 8:
            panel.legend(frameon=False, fontsize=10)
    return figure


@style()
def flips(past: History, example: int, word: Callable[[int], str]) -> Figure:
    """The nearest word at every snapshot of those positions of one example whose word changed, shaded where it did.

    Args:
        past: a set through its snapshots.
        example: which of its examples; where none of its words changed, all its learned positions are shown.
        word: from a token id to its text, such as ``tokenizer.convert_ids_to_tokens``.
    """
    free, flipped = np.flatnonzero(past.free[example]), past.flipped[:, example]
    changed = free[flipped[:, free].any(0)]
    shown = changed if len(changed) else free
    names = [[drawn(word(int(token))) for token in past.tokens[:, example, place]] for place in shown]
    figure, (axes,) = _figure(max(6.5, 1.2 + 1.15 * len(past.steps)), 1.1 + 0.27 * len(shown))
    sns.heatmap(
        pandas.DataFrame(flipped[:, shown].T.astype(float), shown, past.steps), ax=axes, annot=np.array(names), fmt="",
        cbar=False, vmin=0, vmax=2.2, cmap="Blues", linewidths=0.5, annot_kws={"fontsize": 9}, xticklabels=1, yticklabels=1,
    )
    axes.tick_params(axis="y", rotation=0, labelsize=9)
    title = f"Nearest words of example {example}: {len(changed)} of {len(free)} positions changed"
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
    check_choice("format", format, ("markdown", "latex"))
    if wrong := [place for place, row in enumerate(rows) if len(row["probabilities"]) != len(classes)]:
        raise ValueError(f"rows {wrong} do not have a probability for each of the {len(classes)} classes")
    escape = markdown if format == "markdown" else _latex
    lines = [["class", "text", *classes]]
    lines += [[row["label"], row["text"], *(f"{p:.2f}" for p in row["probabilities"])] for row in rows]
    cells = [[escape(cell) for cell in line] for line in lines]
    if format == "markdown":
        cells.insert(1, ["---", "---", *["---:"] * len(classes)])
        return "".join(f"| {' | '.join(line)} |\n" for line in cells)
    head, *body = [" & ".join(line) + r" \\" for line in cells]
    columns = "lp{0.45\\linewidth}" + "r" * len(classes)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}", ""])


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\char34{}", "*": "{*}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", "-": "{-}", "[": "{[}", "]": "{]}",
}


def _latex(text: str) -> str:
    """``text`` as LaTeX sets it letter by letter; ``[`` and ``*`` stand in braces, as behind ``\\\\`` they are options."""
    return visible(" ".join(text.split())).translate(str.maketrans(LATEX))
