"""Which class a label of a file means.

Classes are names. A label that is a number is the name that it is written as, and a number written in two ways (1, 1.0) is
one name: in columns of numbers, and in columns of text where every value is a whole number once a trailing .0 is gone, so
that the versions 1.1 and 1.10 stay two. Blanks around a name do not count.

Where a list names the classes (labels.json, a known corpus), whole numbers are places in that list, counted from 0, if none
of them is itself a name in it. What a number means is settled for the whole corpus and never for a single row, so a
number among names is an error.
"""

import math
import re
import warnings
from collections.abc import Sequence
from decimal import Decimal
from numbers import Integral, Real

import numpy as np

from distillkit.data.corpora import Corpus, Split
from distillkit.data.tables import CorpusError, named, shown

_WHOLE = re.compile(r"\s*([+-]?[0-9]{1,18})(\.0+)?\s*")


def whole(label) -> int | None:
    """The whole number that a label is, as a file may spell it (1, 1.0, "1", "1.0"), or None."""
    if type(label) is int:  # most are, and the general test below is slow
        return label
    if type(label) is float:
        return int(label) if label.is_integer() else None
    if isinstance(label, str):
        match = _WHOLE.fullmatch(label)
        return int(match[1]) if match else None
    if isinstance(label, bool | np.bool_) or not isinstance(label, Real | Decimal):
        return None
    return int(label) if isinstance(label, Integral) or math.isfinite(label) and label == int(label) else None


def spelled(label) -> str | None:
    """The name that a label spells, or None for one that is missing, a list, or anything else that is no name."""
    if type(label) is int:
        return str(label)
    if isinstance(label, str):
        return label.strip() or None
    if isinstance(label, bool | np.bool_):
        return str(bool(label)).lower()  # as JSON writes it
    if (number := whole(label)) is not None:
        return str(number)
    return repr(float(label)) if isinstance(label, Real | Decimal) and math.isfinite(label) else None


def read_labels(task: str, splits: dict[str, Split], listed: Sequence[str] | None) -> tuple[tuple[str, ...], dict]:
    """The names of the classes, and for each split the class of each row as an index into them.

    `listed`: the classes, where something names them. Raises `CorpusError` at the first row that cannot be used.
    """
    numbers = {number for split in splits.values() for label in split.labels if (number := whole(label)) is not None}
    classes = tuple(name.strip() for name in listed) if listed else _names(task, splits)
    _warn_of_case(classes)
    values = [whole(name) for name in classes]
    reading = _Reading(classes, indexed=bool(listed) and numbers.isdisjoint(values),
                       by_number={} if None in values else dict(zip(values, range(len(values)))))
    return classes, {name: reading.indices(f"{task}, split {name}", split) for name, split in splits.items()}


class _Reading:
    """How the labels of a corpus are read: `indexed` says that numbers are places in `classes`; `by_number` holds the
    places of the classes where all of their names are whole numbers."""

    def __init__(self, classes: tuple[str, ...], *, indexed: bool, by_number: dict) -> None:
        self.classes, self.indexed, self.by_number = classes, indexed, by_number
        self.by_name = {name: place for place, name in enumerate(classes)}

    def indices(self, where: str, split: Split) -> list[int]:
        places, first = [], None
        for row, label in enumerate(split.labels):
            place, as_index = self.by_name.get(spelled(label)), False
            number = whole(label) if place is None else None
            if number is not None and self.indexed:
                place, as_index = number if 0 <= number < len(self.classes) else None, True
            elif number is not None:
                place = self.by_number.get(number)
            first = as_index if first is None else first
            if place is None or as_index != first:
                raise CorpusError(f"{where}, {split.row(row)}: the label is {shown(label)}, which is none of the "
                                  f"{len(self.classes)} classes {named(self.classes)}; write the name of one, or in every row "
                                  "of the split its place in the list of labels.json, from 0")
            places.append(place)
        return places


def _names(task: str, splits: dict[str, Split]) -> tuple[str, ...]:
    """The classes where nothing lists them: what stands in train, in the order of numbers or of the alphabet."""
    train = splits["train"]
    for row, label in enumerate(train.labels):
        name = spelled(label)
        if name is None:
            raise CorpusError(f"{task}, split train, {train.row(row)}: the label is {shown(label)}; write the name of one "
                              "class, or drop the row")
        if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
            raise CorpusError(f"{task}, split train, {train.row(row)}: half a surrogate pair in the label {shown(label)}; "
                              "repair it or drop the row")
    labels = {(type(label), label) for label in train.labels}
    others = (label for split in splits.values() for label in split.labels if spelled(label) is not None)
    if all(whole(label) is not None for _, label in labels) and all(whole(label) is not None for label in others):
        return tuple(str(number) for number in sorted({whole(label) for _, label in labels}))
    numbers = {isinstance(label, Real | Decimal) and not isinstance(label, bool | np.bool_) for _, label in labels}
    if len(numbers) > 1:
        kinds = sorted({kind.__name__ for kind, _ in labels})
        raise CorpusError(f"{train.place} mixes kinds of labels ({named(kinds)}); use numbers, or names")
    names = {spelled(label) for _, label in labels}
    return tuple(sorted(names, key=float if numbers == {True} else str))


def _warn_of_case(classes: tuple[str, ...]) -> None:
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            warnings.warn(f"the classes {shown(other)} and {shown(name)} differ in case only; they are kept apart, so spell "
                          "one class in one way", stacklevel=4)


def unlabelled(split: Split, corpus: Corpus) -> bool:
    """Whether a split was published without labels: all -1, as in GLUE, where -1 is not one of the classes."""
    train = corpus.splits.get("train")
    names = corpus.classes or (train.labels if train else ())
    return bool(split.labels) and all(whole(label) == -1 for label in split.labels) and -1 not in map(whole, names)
