"""Rows of named columns, held as plain lists and read as a `datasets.Dataset` is read.

A prepared task (`prepared.py`) has its rows in this form, since `datasets` may not be installed where it is used. It has
what the kit asks of a `datasets.Dataset` and nothing more.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets


class Rows:
    """Rows of a table, read by column, by number or by several numbers.

    `columns`: {name: the value of each row}, all of one length.

    Raises `ValueError` for columns of different lengths.
    """

    def __init__(self, columns: Mapping[str, Sequence]):
        self._columns = {name: list(values) for name, values in columns.items()}
        lengths = {len(values) for values in self._columns.values()}
        if len(lengths) > 1:
            raise ValueError(f"the columns {', '.join(self._columns)} have different lengths, {sorted(lengths)}; give each row "
                             "a value in every column")
        self._length = lengths.pop() if lengths else 0

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        return list(self._columns)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key):
        """A column by its name; a row by its number, as a dictionary; rows by a slice or numbers, as columns."""
        if isinstance(key, str):
            return self._columns[key]
        if isinstance(key, slice):
            return {name: values[key] for name, values in self._columns.items()}
        if isinstance(key, Iterable):
            numbers = [operator.index(number) for number in key]
            return {name: [values[number] for number in numbers] for name, values in self._columns.items()}
        number = operator.index(key)
        return {name: values[number] for name, values in self._columns.items()}

    def __iter__(self) -> Iterator[dict]:
        return (self[number] for number in range(len(self)))

    def select(self, numbers: Iterable[int]) -> Rows:
        """The rows of those numbers, in that order."""
        return Rows(self[list(numbers)])

    def to_list(self) -> list[dict]:
        """Every row as a dictionary."""
        return list(self)


def dataset_of(columns: Mapping[str, Sequence], classes: Sequence[str] = ()) -> datasets.Dataset | Rows:
    """The columns as a `datasets.Dataset`, or as :class:`Rows` where `datasets` is not installed.

    `classes`: the names of the classes that the columns `text` and `label` are of.
    """
    try:
        import datasets  # a second to import
    except ImportError:
        return Rows(columns)
    labelled = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(classes))}
    return datasets.Dataset.from_dict(dict(columns), features=datasets.Features(labelled) if classes else None)
