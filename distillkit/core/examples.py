"""From text to the tensors of a distilled set: sentences with labels, or prompts with responses, as tokens and embeddings.

Every set starts here (:class:`~distillkit.core.distilled.DistilledSet`): real rows, anybody's text, or a selection.  Short
sentences may be filled up with further ones of their class, so that sets of a size hold as many tokens; long ones are cut.
Each function returns the fields of a set by name.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from distillkit.core.student import Student
from distillkit.data.corpus import check_text
from distillkit.data.labels import whole
from distillkit.data.rows import Rows
from distillkit.data.tasks import NO_TARGET, Task
from distillkit.io.checks import check_number, check_whole, require
from distillkit.io.seeds import generator


def examples_per_class(task: Task, per_class: int | None, fraction: float | None) -> int:
    """The number of examples of each class that ``per_class`` or ``fraction`` asks for, checked against the task."""
    require((per_class is None) != (fraction is None),
            f"give one of per_class and fraction, not per_class={per_class!r} and fraction={fraction!r}")
    require(per_class is None or task.classes, f"per_class={per_class!r}, but task {task.name!r} has no classes; give fraction")
    if fraction is not None:
        check_number("fraction", fraction, most=1, without="least")
        per_class = int(fraction * len(task.train) / max(1, len(task.classes)))
        least = f"one for each of {len(task.classes)} classes" if task.classes else "one"
        require(per_class, f"fraction={fraction!r} of {len(task.train)} training rows is less than {least}; ask for more")
    check_whole("per_class", per_class)
    for name, rows in zip(task.classes, task.rows_by_class("train")):
        require(len(rows) >= cast("int", per_class), f"per_class={per_class} but class {name!r} of task {task.name!r} has only "
                f"{len(rows)} training rows; ask for fewer")
    return cast("int", per_class)


def rows_as_set(task: Task, student: Student, rows: list, *, length: int | None, fill: bool, seed: int) -> dict[str, Any]:
    """The fields of a set of chosen training rows with hard labels; see :meth:`DistilledSet.from_rows`."""
    chosen = [int(row) for of_class in rows for row in of_class]
    if task.kind == "instruction":
        fields = prompts_as_set(task, student, chosen, length)
    else:
        labels = [label for label, of_class in enumerate(rows) for _ in of_class]
        texts = [task.train[row]["text"] for row in chosen]
        fields = sentences_as_set(texts, labels, task, student, length=length, fill=fill, seed=seed)
    fields["meta"]["rows"] = chosen
    return fields


def sentences_as_set(
    texts: list[str], labels: list[int], task: Task, student: Student, *, length: int | None, fill: bool, seed: int
) -> dict[str, Any]:
    """The fields of a set of sentences with hard labels, each filled up from training sentences of its class if ``fill``."""
    before, after, room = _frame(task, student, length)
    further = _further(task, seed) if fill else {}
    bodies = [_filled(student.tokenizer, text, further.get(label, iter(())), room) for text, label in zip(texts, labels)]
    for row, body in enumerate(bodies):
        require(body, f"row {row} (counted from 0): the tokenizer of {student.name!r} makes no token of {texts[row][:40]!r}")
    ids = _padded([before + body + after for body in bodies], cast("int", student.tokenizer.pad_token_id or 0))
    mask, free = framed(torch.tensor([len(body) for body in bodies]), len(before), len(after))
    return _fields(task, student, ids, mask, free, torch.tensor(labels), classes=list(task.classes), labels=labels)


def prompts_as_set(task, student: Student, rows: list[int], length: int | None) -> dict[str, Any]:
    """The fields of a set of prompts, cut in front to ``length`` behind the special tokens that open them, with responses."""
    before, after, room = _frame(task, student, length)
    opening, length = len(before), len(before) + room + len(after)
    tokenizer = student.tokenizer
    prompts, responses = task.token_ids(tokenizer, "train"), task.response_ids(tokenizer, "train")
    tokens = [ids if len(ids) <= length else ids[:opening] + ids[len(ids) - length + opening :]
              for ids in (prompts[row] for row in rows)]
    ids = _padded(tokens, cast("int", tokenizer.pad_token_id or 0))
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(prompt) for prompt in tokens])[:, None]
    free = mask & ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=torch.long))
    targets = _padded([responses[row] for row in rows], NO_TARGET)
    return _fields(task, student, ids, mask, free, targets, classes=[], labels=[],
                   responses=[task.train[row]["response"] for row in rows])


def texts_as_set(
    texts: Iterable[str], labels: Iterable[str | int], task: Task, student: Student, *, length: int | None, fill: bool,
    seed: int,
) -> dict[str, Any]:
    """The fields of a set of anybody's text; see :meth:`DistilledSet.from_text`."""
    texts, labels = _listed("texts", texts), _listed("labels", labels)
    require(texts and len(texts) == len(labels),
            f"there must be a label for each text, one at least, not {len(labels)} labels for {len(texts)} texts")
    _check_texts("text", texts)
    if task.kind != "instruction":
        numbers = [_class_number(label, task, row) for row, label in enumerate(labels)]
        return sentences_as_set(texts, numbers, task, student, length=length, fill=fill, seed=seed)
    _check_texts("response", labels)
    # As the training split of the task, which knows how a student reads prompts and responses, and may have none.
    n = len(texts)
    rows = {"prompt": texts, "response": labels, "choices": [[]] * n, "answer": [-1] * n, "group": [""] * n}
    stand_in = dataclasses.replace(task, train=Rows(rows), origin="texts and labels", resampled=None)
    return prompts_as_set(stand_in, student, [*range(n)], length)


def special_frame(tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens a tokenizer puts before and after a single text."""
    body, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(framed) - len(body) + 1):
        if framed[start : start + len(body)] == body:
            return framed[:start], framed[start + len(body) :]
    return [], []


def framed(counts: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
    """Which positions are read, and which of them lie between the special tokens: two masks ``[m, l]``.

    Args:
        counts: content positions ``[m]`` of each example.
        before, after: special tokens before and after them.
    """
    place = torch.arange(before + int(counts.max()) + after)
    ends = before + counts[:, None]
    return place < ends + after, (place >= before) & (place < ends)


def embed(student: Student, ids: Tensor) -> Tensor:
    """Input embeddings ``[m, l, d]`` of token ``ids [m, l]`` on the CPU: float64 for a float64 student, else float32."""
    rows = student.embedding[ids.to(student.device)].cpu()
    return rows if rows.dtype == torch.float64 else rows.float()


def decode(tokenizer, ids: Tensor, keep: Tensor) -> list[str]:
    """The text of each row of ``ids [m, l]`` at the positions ``keep [m, l]``."""
    return [tokenizer.decode(row[k].tolist()) for row, k in zip(ids, keep, strict=True)]


def _fields(task: Task, student: Student, ids: Tensor, mask: Tensor, free: Tensor, targets: Tensor, **meta) -> dict[str, Any]:
    """The fields of a set, which remembers where it was made."""
    origin = {"task": task.name, "task_fingerprint": task.fingerprint, "student": student.name,
              "table_sha256": student.table_sha256}
    return {"embeds": embed(student, ids), "mask": mask, "free": free, "targets": targets, "tokens": ids,
            "meta": {**origin, **meta, "text": decode(student.tokenizer, ids, free)}}


def _frame(task: Task, student: Student, length: int | None) -> tuple[list[int], list[int], int]:
    """The special tokens before and after a text, and the room between them in ``length`` tokens."""
    length = task.max_length if length is None else length
    before, after = special_frame(student.tokenizer)
    room = length - len(before) - len(after) if isinstance(length, int) else 0
    require(room >= 1, f"length must be a whole number above {len(before) + len(after)} (special tokens), not {length!r}")
    require(length <= student.max_positions,
            f"length={length} is more than the {student.max_positions} positions of {student.name!r}")
    return before, after, room


def _further(task: Task, seed: int) -> dict[int, Iterator[str]]:
    """For each class its training sentences in a seeded order, to fill up with; each is taken once."""
    further = {}
    for label, rows in enumerate(task.rows_by_class("train")):
        order = rows[torch.randperm(len(rows), generator=generator("fill-up", seed, label)).numpy()].tolist()
        further[label] = (task.train[row]["text"] for row in order)
    return further


def _filled(tokenizer, text: str, further: Iterator[str], room: int) -> list[int]:
    """``room`` content tokens: those of ``text``, then of ``further`` texts while there are any."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    while len(ids) < room and (more := next(further, None)) is not None:
        apart = " " if ids else ""  # byte-level tokenizers would glue the words together
        ids = ids + tokenizer(apart + more, add_special_tokens=False)["input_ids"]
    return ids[:room]


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _check_texts(role: str, texts: list) -> None:
    for row, text in enumerate(texts):
        try:
            check_text(text, role)
        except ValueError as error:
            raise ValueError(f"row {row} (counted from 0): {error}") from None


def _listed(name: str, values) -> list:
    require(isinstance(values, Iterable) and not isinstance(values, str | bytes),
            f"{name} must be a list with a value for each example, not {reprlib.repr(values)}", TypeError)
    return values.tolist() if isinstance(values, np.ndarray | Tensor) else list(values)


def _class_number(label, task: Task, row: int) -> int:
    """The index of a class that a label names; a number is the name of a class where all names are numbers."""
    classes, name = list(task.classes), label.strip() if isinstance(label, str) else label
    number = None if isinstance(label, str) else whole(label)
    numbered = all(whole(one) is not None for one in classes)
    if number is not None and numbered:
        name = str(number)
    if name in classes:
        return classes.index(name)
    if number is not None and not numbered and 0 <= number < len(classes):
        return number
    raise ValueError(f"labels, row {row} (counted from 0): {reprlib.repr(label)} is none of the classes of task {task.name!r}, "
                     f"{reprlib.repr(classes)}; give the name of one, or its index")
