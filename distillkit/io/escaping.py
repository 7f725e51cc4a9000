"""Other people's text where a person reads it: names, paths and sentences of strangers show themselves and do nothing.

A corpus, a model folder or a manifest may hold escape sequences that clear a terminal, or direction marks that turn round
what stands beside them.  Whatever leaves the kit for a terminal, a card or a page goes through :func:`visible` first.
"""

from __future__ import annotations

import html
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # control, direction, surrogate, private, none, line ends
LONGEST = 2000  # characters of a line that is printed


def visible(text: object) -> str:
    """``text`` in which each character that would be unseen, or do something, is named: ``(U+001B)``."""
    return "".join(f"(U+{ord(c):04X})" if unicodedata.category(c) in HIDDEN else c for c in str(text))


def one_line(text: object, longest: int = LONGEST) -> str:
    """``text`` on one line, :func:`visible`, of at most ``longest`` characters."""
    line = visible(" ".join(str(text).split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def markdown(text: object, longest: int | None = None) -> str:
    """``text`` on one line of Markdown as itself: no HTML, mark-up, link, mention or formula, and no character unseen."""
    line = " ".join(str(text).split())
    if longest is not None and len(line) > longest:
        line = line[: longest - 1] + "…"
    line = html.escape(visible(line), quote=False)
    # As character references, which neither a Markdown reader nor a reader of formulas takes for mark-up.
    return "".join(f"&#{ord(c)};" if c in "|\\`*_[]~$#!:@{}^=" else c for c in line)


def say(text: object, *, error: bool = False) -> None:
    """Print ``text`` to the terminal (to stderr for an ``error``), each of its lines :func:`visible`."""
    print("\n".join(map(visible, str(text).split("\n"))), file=sys.stderr if error else sys.stdout, flush=True)


@contextmanager
def visible_warnings() -> Iterator[None]:
    """Warnings within the block are printed on one line, :func:`visible`."""
    plain = warnings.formatwarning

    def escaped(message, category, filename, lineno, line=None) -> str:
        return one_line(f"{filename}:{lineno}: {category.__name__}: {message}") + "\n"

    warnings.formatwarning = escaped
    try:
        yield
    finally:
        warnings.formatwarning = plain
