"""Text of a distilled set in figures and tables: tokens as matplotlib draws them, sentences beside their label vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.font_manager import findfont, get_font

from distillkit.io.checks import check_choice
from distillkit.io.escaping import markdown, visible
from distillkit.view.figures import plain


def in_font(text: str, font: str = "DejaVu Sans") -> str:
    """``text`` with ``U+8ECA`` for each character that a font does not have."""
    known = get_font(findfont(font)).get_char_index
    return "".join(c if known(ord(c)) else f"U+{ord(c):04X}" for c in text)


def drawn(token: str) -> str:
    """A token as matplotlib draws it: letter by letter, in characters that its own font has."""
    return plain(in_font(token))


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
