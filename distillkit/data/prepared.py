"""A task as one file: rows, labels, and token ids for chosen tokenizers, read without `datasets` and without a corpus.

The file is a self-verifying one (`io/files.py`). Text is UTF-8 JSON in a tensor of bytes. Token ids are int32, all rows of a
split one after the other, with the place at which each row ends. They fill the task's cache of tokens, so that nothing is
tokenised where the file is read. Ids are served to the tokenizer that they were made with: its `tokenizer.json` must have the
same SHA-256, its vocabulary the same size, and a few rows of each split must come out the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from distillkit.data.corpus import SPLITS, CorpusError
from distillkit.data.instruction import InstructionTask
from distillkit.data.rows import Rows
from distillkit.data.tasks import Task
from distillkit.io.checks import limits_by_split
from distillkit.io.files import read_file, write_file
from distillkit.io.prepared import COMMAND, VARIABLE, read_index, whole_file
from distillkit.io.storage import StorageError
from distillkit.io.verify import sha256_of

KIND = "prepared-task"
TRIED = 16  # rows of a split that are tokenised to try a tokenizer


def arguments(source, *, max_length: int = 64, limit=None, seed: int = 0, text_column: str | None = None,
              label_column: str | None = None) -> dict:
    """The arguments of `load_task` as JSON: what a prepared task is told by."""
    columns = {"text_column": text_column, "label_column": label_column}
    return {"source": os.fspath(source), "max_length": max_length, "limit": limits_by_split(limit, SPLITS), "seed": seed,
            **{name: column for name, column in columns.items() if column is not None}}


def prepared_task(folder: Path, asked: Mapping) -> Task:
    """The task of exactly those arguments from a prepared folder.

    Raises `CorpusError` that lists what there is for any others, `FileNotFoundError` for parts that have not been uploaded, and
    `StorageError` for damaged ones.
    """
    index = read_index(folder)
    for entry in index["tasks"]:
        if entry["arguments"] == asked:
            return read_task(whole_file(folder, index, entry["file"]), asked)
    tasks = "; ".join(_in_words(entry["arguments"]) for entry in index["tasks"]) or "nothing"
    raise CorpusError(f"{folder} has no task of {_in_words(asked)}; it was prepared with {tasks}. Ask for one of these, "
                      f"prepare the folder again ({COMMAND} {folder.name}), or unset {VARIABLE}")


def _in_words(asked: Mapping) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in asked.items() if value not in ({}, None))


# --- the file ---------------------------------------------------------------------------------------------------------


def write_task(task: Task, path: Path, asked: Mapping, tokenizers: Sequence) -> str:
    """Write a task that `load_task` made of those arguments, with its tokens for `tokenizers`; returns the file's SHA-256."""
    by_key = {tokenizer_key(tokenizer): tokenizer for tokenizer in tokenizers}
    tensors, splits = {}, [split for split in SPLITS if getattr(task, split) is not None]
    for split in splits:
        rows = task.split(split)
        columns = {name: list(rows[name][:]) for name in rows.column_names if name != "label"}
        tensors[f"{split}/columns"] = torch.frombuffer(bytearray(json.dumps(columns, ensure_ascii=False).encode()),
                                                       dtype=torch.uint8)
        if "label" in rows.column_names:
            tensors[f"{split}/labels"] = torch.from_numpy(task.labels(split).copy())
        for key, tokenizer in by_key.items():
            for part, ids in _parts_of(task, tokenizer, split).items() if key else ():
                name = f"{split}/{key}/{part}"
                tensors[name] = torch.tensor([token for row in ids for token in row], dtype=torch.int32)
                tensors[f"{name}.ends"] = torch.tensor([*accumulate(map(len, ids))], dtype=torch.int64)
    data = {name: getattr(task, name) for name in ("name", "kind", "classes", "max_length", "fingerprint", "origin")}
    data |= {"splits": splits, "also_right": [[*key, *places] for key, places in getattr(task, "_also_right", {}).items()]}
    return write_file(path, kind=KIND, tensors=tensors, data=data, identity=asked)


def read_task(path: Path, asked: Mapping = {}) -> Task:
    """The task in a file that `write_task` wrote, which must be the one of those arguments; raises `StorageError`."""
    stored = read_file(path, kind=KIND, identity=asked)
    try:
        return _task_of(stored.data, stored.tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} holds no task ({error!r}); prepare it again: {COMMAND}") from error


def _task_of(data: Mapping, tensors: Mapping[str, Tensor]) -> Task:
    splits = dict.fromkeys(SPLITS)
    for split in data["splits"]:
        columns = json.loads(tensors[f"{split}/columns"].numpy().tobytes())
        if f"{split}/labels" in tensors:
            columns["label"] = tensors[f"{split}/labels"].tolist()
        splits[split] = Rows(columns)
    values = {name: data[name] for name in ("name", "kind", "max_length", "fingerprint", "origin")} | splits
    cache = _TokenCache(tensors)
    if data["kind"] == "classification":
        task = Task(classes=tuple(data["classes"]), **values)
    else:
        also_right = {(prompt, answer): tuple(places) for prompt, answer, *places in data["also_right"]}
        task = InstructionTask(classes=(), **values, _also_right=also_right)
    cache.task = task
    object.__setattr__(task, "_token_ids", cache)  # a task is frozen, and its cache is no argument
    return task


# --- tokens -----------------------------------------------------------------------------------------------------------


def tokenizer_key(tokenizer) -> str:
    """What tells a tokenizer: the SHA-256 of the `tokenizer.json` it was loaded from, and its size; "" without that file."""
    path = Path(tokenizer.name_or_path) / "tokenizer.json"
    return f"{sha256_of(path)}-{len(tokenizer)}" if path.is_file() else ""


class _TokenCache(weakref.WeakKeyDictionary):
    """The cache of a task's tokens, filled at first sight of a tokenizer that the task was prepared with."""

    task: Task

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self._tensors = {name: tensor for name, tensor in tensors.items() if name.count("/") == 2}

    def setdefault(self, tokenizer, default=None):
        if tokenizer not in self:
            self[tokenizer] = self._prepared(tokenizer) or default
        return self[tokenizer]

    def _prepared(self, tokenizer) -> dict:
        """{split: its tokens, as the task keeps them} where the task was prepared with that tokenizer, else nothing."""
        key, splits = tokenizer_key(tokenizer), {}
        for split in SPLITS:
            ids = {name.split("/")[2]: _rows(tensor, self._tensors[f"{name}.ends"]) for name, tensor in self._tensors.items()
                   if name.startswith(f"{split}/{key}/") and not name.endswith(".ends")}
            if ids and self._is_right(tokenizer, split, ids):
                splits[split] = self._kept(split, ids)
        return splits

    def _kept(self, split: str, ids: Mapping[str, list]):
        if self.task.kind == "classification":
            return ids["texts"]
        choices = iter(ids["choices"])
        return ids["prompts"], ids["responses"], [[next(choices) for _ in row] for row in self.task.split(split)["choices"]]

    def _is_right(self, tokenizer, split: str, ids: Mapping[str, list]) -> bool:
        """Whether `tokenizer` makes the same of a few rows, so that neither it nor its library has changed."""
        whole = self.task.split(split)
        tried = [*range(0, len(whole), max(1, len(whole) // TRIED))]
        few = dataclasses.replace(self.task, **{split: whole.select(tried)})
        new = _parts_of(few, tokenizer, split)
        return all([ids[part][row] for row in tried] == new[part] for part in new if part != "choices")


def _parts_of(task: Task, tokenizer, split: str) -> dict[str, list[list[int]]]:
    """All that a task makes of a split in tokens: texts; or prompts, responses, and the choices of all rows in turn."""
    ids = task.token_ids(tokenizer, split)
    if not isinstance(task, InstructionTask):
        return {"texts": ids}
    choices = [choice for row in range(len(ids)) for choice in task.choice_ids(tokenizer, split, row)]
    return {"prompts": ids, "responses": task.response_ids(tokenizer, split), "choices": choices}


def _rows(ids: Tensor, ends: Tensor) -> list[list[int]]:
    numbers = ids.tolist()
    return [numbers[start:end] for start, end in pairwise([0, *ends.tolist()])]
