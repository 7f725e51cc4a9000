"""What a corpus is before it becomes a task: rows as they were read, each with the place it came from.

The readers (`tables.py`, `corpora.py`, `docstrings.py`) make a `Corpus`; `tasks.py` and `instruction.py` check its rows.
"""

import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

SPLITS = ("train", "validation", "test")
PROMPT_COLUMNS = ("prompt", "response", "choices", "answer", "group")  # of instruction tasks

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class CorpusError(ValueError):
    """Text that is missing or cannot be used; the message names the value, the place and the remedy."""


def shown(value) -> str:
    """`value` as an error message quotes it: shortened, and without control characters."""
    return _short.repr(value)


def named(names: Iterable, most: int = 8) -> str:
    """A list of names for an error message: the first `most`, without control characters."""
    names = [str(name) for name in names]
    plain = [name if name.isprintable() else shown(name) for name in names[:most]]
    return ", ".join(plain) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def is_text(value) -> bool:
    """Whether `value` is a string that is not blank and has no half of a surrogate pair, which UTF-8 cannot store."""
    return isinstance(value, str) and bool(value.strip()) and (
        value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value))


def check_text(value, role: str) -> None:
    """Raise `ValueError` unless `value`, which has that `role` in a row, is text."""
    if not is_text(value):
        raise ValueError(f"the {role} is {shown(value)}; it must be a string that is not blank and has no half a surrogate "
                         "pair, so correct it or drop the row")


@dataclass(frozen=True)
class Split:
    """The rows of one split, unchecked.

    `texts` and `labels` have one entry per row; for prompts they hold questions and answers, and `further` holds other
    columns of the same length. `place` says where the split is from, and `where` the same for each row, with its line.
    """

    texts: list
    labels: list
    place: str
    where: Sequence[str]
    further: dict[str, list] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """Text as it was read.

    `classes` is None where nothing names them. `origin` says in words where the text is from. `layout` is "labels" for
    labelled text, else a key of `instruction.ROWS`. `unread` names data that lie beside the splits and belong to none.
    """

    name: str
    classes: tuple[str, ...] | None
    splits: dict[str, Split]
    origin: str
    layout: str = "labels"
    unread: tuple[str, ...] = ()

    def read_rows(self, split: str, read: Callable) -> list:
        """`read(text, label, **further)` of each row of a split.

        Raises `CorpusError` for a split without rows, and names the row where `read` raises `ValueError`.
        """
        rows, results = self.splits[split], []
        if not rows.texts:
            raise CorpusError(f"{self.name}, split {split} has no rows ({rows.place})")
        for number, (text, label, *further) in enumerate(zip(rows.texts, rows.labels, *rows.further.values())):
            try:
                results.append(read(text, label, **dict(zip(rows.further, further))))
            except ValueError as error:
                raise CorpusError(f"{self.name}, split {split}, row {number} (counted from 0; {rows.where[number]}): "
                                  f"{error}") from None
        return results
