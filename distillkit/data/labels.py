"""Which class a label means.

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
from collections import Counter
from decimal import Decimal

from distillkit.data.corpus import Corpus, CorpusError, check_text, named, shown

_WHOLE = re.compile(r"\s*([+-]?[0-9]{1,18})(\.0+)?\s*")


def whole(label) -> int | None:
    """The whole number that a label is, as a file may spell it (1, 1.0, "1", "1.0"), or None."""
    if isinstance(label, str):
        match = _WHOLE.fullmatch(label)
        return int(match[1]) if match else None
    return int(label) if _is_number(label) and label % 1 == 0 else None  # NaN and infinity have no such remainder


def spelled(label) -> str | None:
    """The name that a label spells, or None where it is missing, a list, or anything else that is no name."""
    if isinstance(label, str):
        return label.strip() or None
    if isinstance(label, bool):
        return str(label).lower()  # as JSON writes it
    if (number := whole(label)) is not None:
        return str(number)
    return repr(float(label)) if _is_number(label) and math.isfinite(label) else None


def _is_number(label) -> bool:
    return isinstance(label, int | float | Decimal) and not isinstance(label, bool)


def labelled_rows(corpus: Corpus) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]]]:
    """The names of the classes, and for each split its rows: the text, and the class as an index into the names.

    Raises `CorpusError` at the first row that cannot be used.
    """
    classes = tuple(name.strip() for name in corpus.classes) if corpus.classes else _names(corpus)
    _warn_of_case(classes)
    numbers = {whole(label) for split in corpus.splits.values() for label in split.labels} - {None}
    values = [whole(name) for name in classes]
    indexed = bool(corpus.classes) and numbers.isdisjoint(values)  # numbers are places in the list, not names
    places: dict[str | int, int] = {name: place for place, name in enumerate(classes)}
    if indexed or None not in values:
        places |= {number: place for place, number in enumerate(range(len(classes)) if indexed else values)}

    def read_split(name: str) -> list[tuple[str, int]]:
        numeric = {whole(label) is not None for label in corpus.splits[name].labels[:1]}

        def read(text, label) -> tuple[str, int]:
            check_text(text, "text")
            place = places.get(spelled(label), places.get(whole(label)))
            if place is None or indexed and {whole(label) is not None} != numeric:
                raise ValueError(f"the label is {shown(label)}, which is none of the {len(classes)} classes {named(classes)}; "
                                 "write the name of one, or in every row of the split its place in the list of labels.json, "
                                 "from 0")
            return text, place

        return corpus.read_rows(name, read)

    return classes, {name: read_split(name) for name in corpus.splits}


def _names(corpus: Corpus) -> tuple[str, ...]:
    """The classes where nothing lists them: the labels of train, in the order of numbers or of the alphabet."""
    corpus.read_rows("train", lambda _, label: check_text(spelled(label) or label, "label"))
    train = corpus.splits["train"]
    others = (label for split in corpus.splits.values() for label in split.labels if spelled(label) is not None)
    if all(whole(label) is not None for label in others):
        return tuple(str(number) for number in sorted({whole(label) for label in train.labels}))
    kinds = {_is_number(label) for label in train.labels}
    if len(kinds) > 1:
        raise CorpusError(f"{train.place} mixes labels that are numbers with labels that are names; use one kind")
    names = {spelled(label) for label in train.labels}
    return tuple(sorted(names, key=float if kinds == {True} else str))


def _warn_of_case(classes: tuple[str, ...]) -> None:
    counts = Counter(name.casefold() for name in classes)
    alike = [name for name in classes if counts[name.casefold()] > 1]
    if alike:
        warnings.warn(f"the classes {named(map(shown, alike))} differ in case only; they stay different classes, so spell one "
                      "class in one way", stacklevel=4)
