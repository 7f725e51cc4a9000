"""From one model to another: distilled tokens → text → the other model's tokens → train and score there.

Embeddings belong to the model they were learned with; words belong to everyone.  So what moves is the text, with its labels.
Or the embeddings themselves move, described by words that both models know (:mod:`distillkit.applications.anchors`).  Step
sizes stay behind, since they were learned for the other model's loss, and the recipe with them: the other model trains by the
grid that every set without a recipe gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from distillkit.applications.anchors import carry_over
from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Unroll
from distillkit.core.loading import load_student
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import Evaluation, evaluate
from distillkit.evaluation.recipes import Recipe
from distillkit.io.checks import check_are, check_choice, require


def retokenize(distilled: DistilledSet, task: Task, student: Student) -> DistilledSet:
    """The set's text as ``student`` reads it.

    Args:
        distilled: a set with text, of any model.
        task: the task it was made for; texts are cut at its ``max_length``.
        student: whose tokenizer and embedding table to use.

    Returns:
        a set of the same texts and labels, soft labels included, without step sizes, recipe or attention labels.
        ``meta["retokenized"]`` counts ``tokens_before`` and ``tokens_after`` (words' tokens, special ones apart), ``cut``,
        the examples that outgrew the length, and ``same_text``, those that read the same when decoded again.

    Raises:
        ValueError: the set holds free embeddings; the task is of another kind, or its classes have other names; a text that
            makes no token.
    """
    check_are(distilled=(distilled, DistilledSet), task=(task, Task), student=(student, Student))
    distilled = distilled.in_classes(task.classes, f"task {task.name!r}")
    texts = distilled.to_text()
    column, labels = ("prompt", "response") if task.kind == "instruction" else ("text", "label")
    length = task.max_length if task.kind == "instruction" else min(task.max_length, student.max_positions)
    moved = DistilledSet.from_text(texts[column], texts[labels], task, student, length=length, soft_labels=False)
    if task.kind == "classification":
        moved = dataclasses.replace(moved, targets=distilled.targets.clone())
    uncut = student.tokenizer(texts[column][:], add_special_tokens=False)["input_ids"]
    rows = distilled.meta.get("rows") if distilled.meta.get("task_fingerprint") == task.fingerprint else None
    pairs = zip(moved.meta["text"], distilled.meta["text"], strict=True)
    counts = {
        "from": distilled.meta.get("student"),
        "tokens_before": int(distilled.free.sum()),
        "tokens_after": sum(map(len, uncut)),
        "cut": sum(len(ids) > int(free) for ids, free in zip(uncut, moved.free.sum(1), strict=True)),
        "same_text": sum(after.split() == before.split() for after, before in pairs),
    }
    meta = {**moved.meta, **({} if rows is None else {"rows": rows}), "retokenized": counts}
    return dataclasses.replace(moved, meta=meta)


def transfer(
    distilled: DistilledSet, task: Task, student: Student, *, method: Literal["text", "anchors"] = "text",
    source: Student | None = None, seeds: Sequence[int] = (0, 1, 2), recipe: str | Unroll | Recipe = "tuned",
    split: str = "test",
) -> Evaluation:
    """Score a set on another model.

    Args:
        distilled: for ``"text"`` a set with text: projected, searched for, or selected; for ``"anchors"`` any set.
        task: the task, which ``student`` was loaded for.
        student: the model to train.
        method: ``"text"``: the other model's tokenizer reads the text.  ``"anchors"``: the embeddings are carried over
            (:func:`~distillkit.applications.anchors.carry_over`).
        source: for ``"anchors"``, the student that the set was made with; default: the one that the set names, loaded again.
        seeds: fresh initialisations (and orders) of it.
        recipe: as in :func:`~distillkit.evaluation.evaluate.evaluate`, but for ``"own"``: a set's own recipe belongs to the
            model it was learned with.
        split: ``"test"`` or ``"validation"``.

    Raises:
        ValueError: the set holds free embeddings, whose text is asked for; ``recipe`` is its own or none; ``source`` is not
            the student that the set was made with.
    """
    check_choice("method", method, ("text", "anchors"))
    if method == "text":
        require(source is None, "source is for method='anchors'; text moves without its model")
        return evaluate(retokenize(distilled, task, student), task, student, seeds=seeds, recipe=recipe, split=split)
    if source is None:
        require(distilled.meta.get("student"), "the set does not name the student it was made with; give it as source")
        source = load_student(distilled.meta["student"], task)
    carried = carry_over(distilled, task, student, source)
    return evaluate(carried, task, student, seeds=seeds, recipe=recipe, split=split)
