"""From one model to another: distilled tokens → text → the other model's tokens → train and score there.

Embeddings belong to the model they were learned with; words belong to everyone.  So what moves is the text, with its
labels.  Step sizes stay behind, since they were learned for the other model's loss, and the recipe with them: the other
model trains by the grid that every set without a recipe gets.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import cast

import datasets
import torch

from distillkit.checks import check_is
from distillkit.distilled import DistilledSet, decode, embed, from_rows, special_frame
from distillkit.evaluation import Evaluation, evaluate
from distillkit.inner import Unroll
from distillkit.students import Student
from distillkit.tasks import Task


def retokenize(distilled: DistilledSet, task: Task, student: Student) -> DistilledSet:
    """The set's text as ``student`` reads it.

    Args:
        distilled: a set with text, of any model.
        task: the task it was made for; texts are cut at its ``max_length``.
        student: whose tokenizer and embedding table to use.

    Returns:
        a set of the same texts and labels, soft labels included, without step sizes or recipe.
        ``meta["retokenized"]`` counts ``tokens_before`` and ``tokens_after`` (words' tokens, special ones apart), ``cut``,
        the examples that outgrew the length, and ``same_text``, those that read the same when decoded again.

    Raises:
        ValueError: the set holds free embeddings; the task is of another kind; a text that makes no token.
    """
    check_is("distilled", distilled, DistilledSet)
    check_is("task", task, Task)
    check_is("student", student, Student)
    texts = distilled.to_text()
    if ("responses" in distilled.meta) != (task.kind == "instruction"):
        raise ValueError(f"the set was made for another kind of task than {task.name!r}, which is {task.kind}")
    if task.kind == "instruction":
        found, lengths = _prompts(texts, task, student)
    else:
        found, lengths = _sentences(distilled, texts, task, student)
    words = [" ".join(text.split()) for text in found.meta["text"]]
    meta = {
        **found.meta,
        "retokenized": {
            "from": distilled.meta.get("student"),
            "tokens_before": int(distilled.free.sum()),
            "tokens_after": int(sum(lengths)),
            "cut": sum(length > int(kept) for length, kept in zip(lengths, found.free.sum(1), strict=True)),
            "same_text": sum(a == " ".join(b.split()) for a, b in zip(words, distilled.meta["text"], strict=True)),
        },
    }
    return dataclasses.replace(found, meta=meta)


def _sentences(distilled: DistilledSet, texts, task: Task, student: Student) -> tuple[DistilledSet, list[int]]:
    """Sentences between the special tokens of ``student``, and how many tokens each has uncut."""
    tokenizer = student.tokenizer
    before, after = special_frame(tokenizer)
    room = min(task.max_length, student.max_positions) - len(before) - len(after)
    bodies = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts["text"][:]]
    for number, (body, text) in enumerate(zip(bodies, texts["text"][:], strict=True)):
        if not body:
            raise ValueError(f"example {number}: the tokenizer of {student.name!r} makes no token of {text[:40]!r}")
    rows = [torch.tensor(before + body[:room] + after) for body in bodies]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=cast("int", tokenizer.pad_token_id or 0))
    place, sizes = torch.arange(ids.shape[1]), torch.tensor([len(row) for row in rows])[:, None]
    mask = place < sizes
    free = (place >= len(before)) & (place < sizes - len(after))
    kept = {k: distilled.meta[k] for k in ("classes", "labels")}
    meta = {**_origin(task, student), **kept, "text": decode(tokenizer, ids, free)}
    found = DistilledSet(embed(student, ids), mask, free, distilled.targets.clone(), tokens=ids, meta=meta)
    return found, [len(body) for body in bodies]


def _prompts(texts, task, student: Student) -> tuple[DistilledSet, list[int]]:
    """Prompts and responses as the training split of a task, which knows how ``student`` reads those."""
    rows = {"prompt": texts["prompt"][:], "response": texts["response"][:]}
    n = len(texts)
    rows |= {"choices": [[]] * n, "answer": [-1] * n, "group": [""] * n}
    train = datasets.Dataset.from_dict(rows, features=task.test.features)  # a task may have no training split
    stand_in = dataclasses.replace(task, train=train, _token_ids=weakref.WeakKeyDictionary())
    found = from_rows(stand_in, student, [range(n)])
    uncut = [student.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows["prompt"]]
    return dataclasses.replace(found, meta={**found.meta, **_origin(task, student)}), [len(ids) for ids in uncut]


def _origin(task: Task, student: Student) -> dict:
    return {"task": task.name, "task_fingerprint": task.fingerprint, "student": student.name}


def transfer(
    distilled: DistilledSet,
    task: Task,
    student: Student,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    recipe: str | Unroll = "tuned",
    split: str = "test",
) -> Evaluation:
    """Score a set's text on another model.

    Args:
        distilled: a set with text: projected, searched for, or selected.
        task: the task, which ``student`` was loaded for.
        student: the model to train.
        seeds: fresh initialisations (and orders) of it.
        recipe: ``"tuned"``, ``"standard"``, or a training of one's own; the set's own recipe belongs to the model it was
            learned with.
        split: ``"test"`` or ``"validation"``.

    Raises:
        ValueError: the set holds free embeddings, or ``recipe`` is another.
    """
    if not isinstance(recipe, Unroll) and recipe not in ("tuned", "standard"):
        raise ValueError("a set that moves to another model leaves its recipe behind: 'tuned', 'standard' or an Unroll, "
                         f"not {recipe!r}")
    return evaluate(retokenize(distilled, task, student), task, student, seeds=seeds, recipe=recipe, split=split)
