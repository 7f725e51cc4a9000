"""A `Task`: real text, checked, split, and handed out in tokens.

A corpus is judged here. Every row must have words and a label, every class must occur in train, and no split is silently
empty: a `Task` that exists can be trained on.

What a source lacks is made from what it has, and `Task.origin` says so. Where the test split is missing, or published
without labels (all -1, as in GLUE), the validation split becomes the test split. Where validation is then missing, a
tenth of train is taken for it, class by class. That and `limit` are the only uses of `seed`, so the rows of a
complete corpus never depend on it; `Task.fingerprint` tells two selections of rows apart on any machine.

Prompts with responses make another kind of task, in `instruction.py`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distillkit.data.corpus import SPLITS, Corpus, CorpusError, named
from distillkit.data.labels import labelled_rows, whole
from distillkit.data.rows import dataset_of
from distillkit.io.checks import check_is
from distillkit.io.seeds import generator as seeded

if TYPE_CHECKING:
    import datasets  # a second to import, so at run time only where rows are made

NO_TARGET = -100  # fills up short rows of response ids
SHORTEST = 3  # a token between two special ones
CARVED = 0.1  # of train, where validation is missing


@dataclass(frozen=True, eq=False)
class Task:
    """Three splits of labelled text. Make one with `load_task`.

    `train`, `validation` and `test` are `datasets.Dataset`s with the columns `text` (str) and `label` (int, an index
    into `classes`). `max_length` is in tokens, special tokens included. `fingerprint` is a SHA-256 over the classes and
    the rows of all splits; `origin` says in words where the text came from. `resampled` is None, or the task that a
    `bootstrap` was drawn from, and the indices of the drawn rows, int64 [rows].
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    max_length: int
    fingerprint: str
    origin: str
    # What is computed once belongs to these rows: a task that `dataclasses.replace` makes begins without.
    _labels: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    _token_ids: weakref.WeakKeyDictionary = field(default_factory=weakref.WeakKeyDictionary, init=False)
    resampled: tuple[Task, Tensor] | None = None

    def __repr__(self) -> str:
        rows = ", ".join(f"{split}={len(getattr(self, split) or ())}" for split in SPLITS)
        classes = f"{len(self.classes)} classes, " if self.classes else ""
        return f"{type(self).__name__}({self.name!r}, {classes}rows: {rows}, max_length={self.max_length})"

    def split(self, name: str) -> datasets.Dataset:
        """The rows of "train", "validation" or "test"; a `ValueError` for any other name, or a split that is missing."""
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}; a task has {', '.join(SPLITS)}")
        rows = getattr(self, name)
        if rows is None:
            raise CorpusError(f"{self.name} has no {name} split ({self.origin}); add {name}.jsonl to its folder, or train "
                              "on another task and only evaluate on this one")
        return rows

    def with_rows(self, **splits: datasets.Dataset) -> Task:
        """The task with other rows in some splits, such as `task.with_rows(test=task.test.select(range(100)))`.

        Its fingerprint is another one, by which nothing that was computed for the old rows is taken for the new. Raises
        `ValueError` for an unknown split, or rows with other columns.
        """
        for name, rows in splits.items():
            expected, found = (sorted(getattr(part, "column_names", ())) for part in (self.split(name), rows))
            if found != expected:
                raise ValueError(f"{name} must be rows with the columns {', '.join(expected)}, not {', '.join(found) or rows}")
        content = json.dumps([self.fingerprint, {name: rows[:] for name, rows in splits.items()}])
        return replace(self, **splits, fingerprint=hashlib.sha256(content.encode()).hexdigest(), resampled=None,
                       origin=f"{self.origin}; other rows in {', '.join(splits)}")

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split, int64 [rows]."""
        if split not in self._labels:
            self._labels[split] = np.asarray(self.split(split)["label"][:], dtype=np.int64)
        return self._labels[split]

    def rows_by_class(self, split: str) -> list[np.ndarray]:
        """For each class, in the order of `classes`, the indices of its rows in that split."""
        return [np.flatnonzero(self.labels(split) == label) for label in range(len(self.classes))]

    def token_ids(self, tokenizer, split: str) -> list[list[int]]:
        """Each row of a split in tokens, special ones included, cut at `max_length`; cached as long as `tokenizer` lives."""
        cache = self._token_ids.setdefault(tokenizer, {})
        if split not in cache:
            texts = self.split(split)["text"][:]
            ids = tokenizer(texts, truncation=True, max_length=self.max_length, padding=False)["input_ids"]
            if [] in ids:
                row = ids.index([])
                raise ValueError(f"{self.name}, split {split}, row {row}: this tokenizer makes no token of "
                                 f"{texts[row][:40]!r}; drop the row or add special tokens to the tokenizer")
            cache[split] = ids
        return cache[split]

    def batch(self, tokenizer, split: str, rows: Sequence[int] | np.ndarray | Tensor) -> dict[str, Tensor]:
        """Rows as `input_ids` [b, l], `attention_mask` [b, l] and `labels` [b], int64, padded right to the longest."""
        rows = [int(row) for row in rows]
        return self._inputs(tokenizer, split, rows) | {"labels": torch.from_numpy(self.labels(split)[rows])}

    def _inputs(self, tokenizer, split: str, rows: list[int]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("a batch needs at least one row")
        ids = self.token_ids(tokenizer, split)
        chosen = [torch.tensor(ids[row]) for row in rows]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        return {"input_ids": pad_sequence(chosen, batch_first=True, padding_value=pad),
                "attention_mask": pad_sequence([torch.ones_like(tokens) for tokens in chosen], batch_first=True)}

    def balanced_rows(self, split: str, size: int, generator: torch.Generator) -> Tensor:
        """`size` row indices in random order, the classes as equal as possible; int64 [size].

        What does not divide evenly goes to random classes. A row is drawn twice only when its class has no rows left.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        pools = [torch.from_numpy(rows) for rows in self.rows_by_class(split) if len(rows)]
        drawn = []
        for place, chosen in enumerate(torch.randperm(len(pools), generator=generator).tolist()):
            pool, quota = pools[chosen], size // len(pools) + (place < size % len(pools))
            while quota > 0:
                drawn.append(pool[torch.randperm(len(pool), generator=generator)[:quota]])
                quota -= len(pool)
        return torch.cat(drawn)[torch.randperm(size, generator=generator)]


def bootstrap(task: Task, seed: int) -> Task:
    """The task with its training rows drawn anew with replacement, as many of each class; validation and test unchanged.

    A method that draws nothing at random, such as herding, has a spread over bootstraps, and methods that see the same
    bootstrap can be compared pairwise (Efron, 1979). `fingerprint` and `origin` say which one it is.

    Raises `CorpusError` for a task without a training split.
    """
    check_is("task", task, Task)
    draw = seeded("bootstrap", seed)
    pools = [torch.from_numpy(rows) for rows in task.rows_by_class("train")]
    rows = torch.cat([pool[torch.randint(len(pool), (len(pool),), generator=draw)] for pool in pools]).sort().values
    content = hashlib.sha256(json.dumps([task.fingerprint, rows.tolist()]).encode())
    return replace(task, train=task.split("train").select(rows.tolist()), fingerprint=content.hexdigest(),
                   origin=f"{task.origin}; training rows drawn with replacement (seed {seed})",
                   resampled=(task, rows))


def classification_task(corpus: Corpus, *, max_length: int, limits: Mapping[str, int], seed: int) -> Task:
    """The task that a corpus of labelled text makes; for the arguments see `load.load_task`."""
    corpus = with_test_split(corpus)
    classes, rows = labelled_rows(corpus)
    place, present = corpus.splits["train"].place, {label for _, label in rows["train"]}
    missing = [name for label, name in enumerate(classes) if label not in present]
    if len(classes) < 2 or missing:
        raise CorpusError(f"{place} has rows of the classes {named(name for name in classes if name not in missing)} and none "
                          f"of {named(missing) or 'others'}; a task needs two or more, each with rows in train, so add rows, "
                          "or shorten the list of classes")
    if limits and min(limits.values()) < len(classes):
        raise ValueError(f"limit={min(limits.values())} leaves some of the {len(classes)} classes of {corpus.name} without a "
                         f"row; use {len(classes)} or more")

    def held_out(train: list) -> list[int]:
        """A tenth of each class."""
        chosen = []
        for label, name in enumerate(classes):
            members = [number for number, row in enumerate(train) if row[1] == label]
            if len(members) < 2:
                raise CorpusError(f"{place} has one row of the class {name!r}, so none can be spared for validation; add "
                                  "rows, or a validation split")
            order = torch.randperm(len(members), generator=seeded("task-carve", seed, name)).tolist()
            chosen += [members[number] for number in order[: max(1, round(CARVED * len(members)))]]
        return chosen

    rows, origin = complete(corpus, rows, held_out, lambda row: row[1], limits, seed, groups=range(len(classes)))
    return task_of_rows(corpus.name, classes, rows, max_length=max_length, origin=origin)


def task_of_rows(name: str, classes: tuple[str, ...], rows: Mapping[str, Sequence[tuple[str, int]]], *, max_length: int,
                 origin: str) -> Task:
    """A classification task of labelled text.

    `rows`: {split: (text, label) of each row}, labels as indices into `classes`; the fingerprint is of these and the
    classes alone.
    """
    content, splits = hashlib.sha256(json.dumps(classes).encode()), {}
    for split in SPLITS:
        texts, labels = [text for text, _ in rows[split]], [label for _, label in rows[split]]
        content.update(json.dumps([split, texts, labels]).encode())
        splits[split] = dataset_of({"text": texts, "label": labels}, classes)
    return Task(name, "classification", classes, **splits, max_length=max_length, origin=origin,
                fingerprint=content.hexdigest())


def with_test_split(corpus: Corpus, needed: tuple[str, ...] = ("train", "test")) -> Corpus:
    """The corpus with validation as its test split where that is missing or has no labels.

    Warns of data that are not read, and raises `CorpusError` where a split that is `needed` is still missing.
    """
    splits, origin = dict(corpus.splits), corpus.origin
    if "test" in splits and _unlabelled(corpus):
        del splits["test"]
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        origin += "; its validation split is used as test, for want of a labelled one"
    unread = f"not read: {named(corpus.unread)}; " if corpus.unread else ""
    for name in needed:
        if name not in splits:
            raise CorpusError(f"{corpus.name} has no {name} split and none can be made: it has only "
                              f"{', '.join(split.place for split in splits.values())}; {unread}add a labelled {name} split")
    if unread:
        warnings.warn(f"{corpus.name}: {unread}name a file after a split (train, validation, test) to have it read",
                      stacklevel=3)
    return replace(corpus, splits=splits, origin=origin)


def _unlabelled(corpus: Corpus) -> bool:
    """Whether the test split was published without labels: all -1, as in GLUE, where -1 is not one of the classes."""
    labels = corpus.splits["test"].labels
    names = corpus.classes or (corpus.splits["train"].labels if "train" in corpus.splits else ())
    return bool(labels) and all(whole(label) == -1 for label in labels) and -1 not in map(whole, names)


def complete(corpus: Corpus, rows: dict[str, list], held_out: Callable, group: Callable, limits: Mapping[str, int], seed: int,
             groups: Sequence | None = None) -> tuple[dict[str, list], str]:
    """Checked rows with a validation split and within their limits, and the origin of the task in words.

    `held_out`: gives the numbers of the rows of train that become the validation split where there is none. `group`: the
    group of a row, for `limits`, which take as many rows of every group as they can. `groups`: all groups; default: those
    of the split.
    """
    origin = corpus.origin
    if "validation" not in rows:
        train, chosen = rows["train"], {*held_out(rows["train"])}
        rows = rows | {"train": [row for number, row in enumerate(train) if number not in chosen],
                       "validation": [train[number] for number in sorted(chosen)]}
        origin += f"; validation is {CARVED:.0%} of train (seed {seed})"
    for split, limit in limits.items():
        if len(rows.get(split, ())) > limit:
            rows = rows | {split: _limited(rows[split], limit, group, groups, seeded("task-limit", seed, split))}
    return rows, origin


def _limited(rows: list, limit: int, group: Callable, groups: Sequence | None, draw: torch.Generator) -> list:
    """`limit` rows in their old order: each group gives the same number, and the large ones what is missing."""
    members = {name: [] for name in (dict.fromkeys(map(group, rows)) if groups is None else groups)}
    for number, row in enumerate(rows):
        members[group(row)].append(number)
    shuffled = [[numbers[place] for place in torch.randperm(len(numbers), generator=draw).tolist()]
                for numbers in members.values()]
    # The k-th row of every group comes before the (k+1)-th of any; which group gives the remainder is random too.
    turns = torch.randperm(len(shuffled), generator=draw).tolist()
    queue = sorted((place, turn, number) for turn, numbers in zip(turns, shuffled) for place, number in enumerate(numbers))
    return [rows[number] for number in sorted(number for _, _, number in queue[:limit])]
