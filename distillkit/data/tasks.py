"""A `Task`: real text, checked, split, and handed out in tokens.

`corpora.py` finds text as it is; here it is judged. Every row must have words and a label, every class must occur in
train, and no split is silently empty: a `Task` that exists can be trained on.

What a source lacks is made from what it has, and `Task.origin` says so. Where the test split is missing, or published
without labels (all -1, as in GLUE), the validation split becomes the test split. Where validation is then missing, a
tenth of train is carved out for it, class by class. Carving and `limit` are the only uses of `seed`, so the rows of a
complete corpus never depend on it; `Task.fingerprint` tells two selections of rows apart on any machine.

Prompts with responses make another kind of task, in `instruction.py`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distillkit.data.corpora import Corpus, CorpusError, Split
from distillkit.data.labels import read_labels, unlabelled
from distillkit.data.tables import named, shown
from distillkit.io.seeds import generator as seeded

if TYPE_CHECKING:
    import datasets  # a second to import, so at run time only where rows are made

NO_TARGET = -100  # fills up short rows of response ids
SPLITS = ("train", "validation", "test")
SHORTEST = 3  # a token between two special ones
CARVED = 0.1  # of train, where validation is missing


@dataclass(frozen=True, eq=False)
class Task:
    """Three splits of labelled text. Make one with `load_task`.

    `train`, `validation` and `test` are `datasets.Dataset`s with the columns `text` (str) and `label` (int, an index
    into `classes`). `max_length` is in tokens, special tokens included. `fingerprint` is a SHA-256 over the classes and
    the rows of all splits; `origin` says in words where the text came from.
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
    _labels: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _token_ids: weakref.WeakKeyDictionary = field(default_factory=weakref.WeakKeyDictionary, repr=False)

    def split(self, name: str) -> datasets.Dataset:
        """The rows of "train", "validation" or "test"; a `ValueError` for any other name."""
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}; a task has {', '.join(SPLITS)}")
        return getattr(self, name)

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split, int64 [rows]."""
        if split not in self._labels:
            self._labels[split] = np.asarray(self.split(split)["label"][:], dtype=np.int64)
        return self._labels[split]

    def rows_by_class(self, split: str) -> list[np.ndarray]:
        """For each class, in the order of `classes`, the indices of its rows in that split."""
        return _rows_by_class(self.labels(split), len(self.classes))

    def token_ids(self, tokenizer, split: str) -> list[list[int]]:
        """Each row of a split in tokens, special ones included, cut at `max_length`; kept as long as `tokenizer` is."""
        kept = self._token_ids.setdefault(tokenizer, {})
        if split not in kept:
            texts = self.split(split)["text"][:]
            ids = tokenizer(texts, truncation=True, max_length=self.max_length, padding=False)["input_ids"]
            for row, tokens in enumerate(ids):
                if not tokens:
                    raise ValueError(f"{self.name}, split {split}, row {row}: this tokenizer makes no token of "
                                     f"{texts[row][:40]!r}; drop the row or add special tokens to the tokenizer")
            kept[split] = ids
        return kept[split]

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
        padded = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(tokens) for tokens in chosen])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return {"input_ids": padded, "attention_mask": mask}

    def balanced_rows(self, split: str, size: int, generator: torch.Generator) -> Tensor:
        """`size` row indices in random order, the classes as equal as possible; int64 [size].

        What does not divide evenly goes to random classes. A row is drawn twice only when its class has no rows left.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        pools = [torch.from_numpy(rows) for rows in self.rows_by_class(split) if len(rows)]
        order = torch.randperm(len(pools), generator=generator).tolist()
        drawn = []
        for place, chosen in enumerate(order):
            quota, pool = size // len(pools) + (place < size % len(pools)), pools[chosen]
            passes = [torch.randperm(len(pool), generator=generator) for _ in range(-(-quota // len(pool)))]
            drawn += [pool[torch.cat(passes)[:quota]]] if passes else []
        drawn = torch.cat(drawn)
        return drawn[torch.randperm(size, generator=generator)]

    def accuracy(self, logits: Tensor, labels: Tensor) -> float:
        """The share of rows of `logits` [n, c] whose largest entry is at `labels` [n]. A row with a NaN is wrong."""
        if logits.shape != (len(labels), len(self.classes)) or not len(labels):
            raise ValueError(f"logits {tuple(logits.shape)} must be [{len(labels)}, {len(self.classes)}], a row for "
                             "each label (one at least) and a column for each class")
        right = (logits.argmax(dim=-1) == labels) & ~logits.isnan().any(dim=-1)
        return right.double().mean().item()


def classification_task(corpus: Corpus, *, max_length: int, limits: Mapping[str, int], seed: int) -> Task:
    """The task that a corpus of labelled text makes; for the arguments see `load.load_task`."""
    corpus = with_test_split(corpus)
    for name, split in corpus.splits.items():
        _check_texts(corpus.name, name, split)
    classes, labels = read_labels(corpus.name, corpus.splits, corpus.classes)
    rows = {name: (split.texts, labels[name]) for name, split in corpus.splits.items()}
    _check_classes(corpus, classes, rows["train"][1])
    origin = corpus.origin
    if "validation" not in rows:
        rows["train"], rows["validation"] = _carve(corpus, classes, rows["train"], seed)
        origin += f"; validation is {CARVED:.0%} of train (seed {seed})"
    for name, most in limits.items():
        if most < len(classes):
            raise ValueError(f"limit={most} leaves some of the {len(classes)} classes of {corpus.name} without a row; "
                             f"use {len(classes)} or more")
        rows[name] = limited(rows[name], most, len(classes), name, seed)
    return task_of_rows(corpus.name, classes, rows, max_length=max_length, origin=origin)


def task_of_rows(name: str, classes: tuple[str, ...], rows: Mapping[str, tuple[list[str], list[int]]], *,
                 max_length: int, origin: str) -> Task:
    """A classification task of labelled text.

    `rows`: {split: (texts, labels)}, labels as numbers of `classes`; the fingerprint is of these and the classes alone.
    """
    splits: dict[str, Any] = {split: _dataset(*rows[split], classes) for split in SPLITS}
    return Task(name, "classification", classes, **splits, max_length=max_length,
                fingerprint=_fingerprint(classes, rows), origin=origin)


def with_test_split(corpus: Corpus, needed: tuple[str, ...] = ("train", "test")) -> Corpus:
    """Validation takes the place of a test split that is missing or has no labels; what is `needed` must then be there."""
    splits, origin = dict(corpus.splits), corpus.origin
    if "test" in splits and unlabelled(splits["test"], corpus):
        del splits["test"]
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        origin += "; its validation split is used as test, for want of a labelled one"
    not_read = f"not read: {named(corpus.unread)}; " if corpus.unread else ""
    for name in needed:
        if name not in splits:
            places = ", ".join(split.place for split in splits.values())
            missing = "a train" if name == "train" else "a labelled test or validation"
            raise CorpusError(f"{corpus.name} has no {name} split and none can be made: found only {places}; {not_read}add "
                              f"{missing} split")
    if not_read:
        warnings.warn(f"{corpus.name}: {not_read}name a file after a split (train, validation, test) to have it read",
                      stacklevel=3)
    return replace(corpus, splits=splits, origin=origin)


def _check_texts(task: str, name: str, split: Split) -> None:
    """Raise `CorpusError` at the first row of a split whose text cannot be used, or if it has no rows."""
    if not split.texts:
        raise CorpusError(f"{task}, split {name} has no rows ({split.place})")
    for row, text in enumerate(split.texts):
        try:
            check_text(text, "text")
        except ValueError as error:
            raise CorpusError(f"{task}, split {name}, {split.row(row)}: {error}") from None


def check_text(text, role: str) -> None:
    """Raise `ValueError` unless `text`, which has that `role` in a row, is a string with something in it."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the {role} is {shown(text)}; fill it in or drop the row")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"half a surrogate pair in the {role} {shown(text)}; repair or drop the row")


def _check_classes(corpus: Corpus, classes: tuple[str, ...], labels: list[int]) -> None:
    place = corpus.splits["train"].place
    if len(classes) < 2:
        raise CorpusError(f"{place} has only the class {named(classes)}; a task needs two or more")
    numbers = {*labels}
    missing = [name for number, name in enumerate(classes) if number not in numbers]
    if missing:
        raise CorpusError(f"{place} has no row of the class {named(missing)}; add rows, or take the class off the "
                          "list of classes")


def _carve(corpus: Corpus, classes, rows, seed: int):
    """Train without, and validation with, a tenth of each class."""
    texts, labels = rows
    taken = []
    for name, members in zip(classes, _rows_by_class(np.asarray(labels), len(classes))):
        if len(members) < 2:
            raise CorpusError(f"{corpus.splits['train'].place} has one row of the class {name!r}, so none can be "
                              "spared for validation; add rows, or a validation split")
        order = torch.randperm(len(members), generator=seeded("task-carve", seed, name)).numpy()
        taken += members[order[: max(1, round(CARVED * len(members)))]].tolist()
    taken_set = {*taken}
    left = [row for row in range(len(texts)) if row not in taken_set]
    return _rows((texts, labels), left), _rows((texts, labels), sorted(taken))


def limited(rows, limit: int, classes: int, split: str, seed: int):
    """At most `limit` rows in their old order: each class gives the same number, and the large ones what is missing."""
    texts, labels = rows
    if len(texts) <= limit:
        return rows
    rng = seeded("task-limit", seed, split)
    members = _rows_by_class(np.asarray(labels), classes)
    shuffled = [group[torch.randperm(len(group), generator=rng).numpy()] for group in members]
    # The k-th row of every class comes before the (k+1)-th of any; which class gives the remainder is random too.
    order = torch.randperm(classes, generator=rng).tolist()
    queue = sorted((place, turn, row) for turn, group in zip(order, shuffled) for place, row in enumerate(group))
    return _rows(rows, sorted(row for _, _, row in queue[:limit]))


def _rows(rows, chosen):
    texts, labels = rows
    return [texts[row] for row in chosen], [labels[row] for row in chosen]


def _rows_by_class(labels: np.ndarray, classes: int) -> list[np.ndarray]:
    return [np.flatnonzero(labels == number) for number in range(classes)]


def _dataset(texts: list[str], labels: list[int], classes: tuple[str, ...]) -> datasets.Dataset:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(classes))})
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def _fingerprint(classes: tuple[str, ...], rows: Mapping) -> str:
    content = hashlib.sha256(json.dumps(classes).encode())
    for name in SPLITS:
        content.update(json.dumps([name, *rows[name]]).encode())
    return content.hexdigest()
