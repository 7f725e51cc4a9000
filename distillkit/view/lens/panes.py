"""What the panes of :class:`~distillkit.view.lens.lens.Lens` show of one example: attention, candidate words, training value.

Losses come from a judge (:mod:`distillkit.text.judges`).  A :class:`~distillkit.text.judges.FrozenJudge` reads only the
changed example, so that ten candidates cost ten sentences; any other judge is asked for the loss of each whole set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas
import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.student import Params, Student
from distillkit.data.tasks import Task
from distillkit.evaluation.recipes import as_recipe
from distillkit.io.checks import require
from distillkit.io.seeds import derive_seed
from distillkit.text.judges import FrozenJudge
from distillkit.text.projection import allowed_tokens, nearest_tokens, with_tokens
from distillkit.view.lens.film import ABSENT
from distillkit.view.lens.reading import words
from distillkit.view.measures import attention

LEVELS = 255  # steps of an attention weight as the front end gets it
Tell = Callable[[float], None]  # called with the share of the work that is done


def one_example(distilled: DistilledSet, example: int) -> DistilledSet:
    """One example as a set of its own, without step sizes and text; raises ValueError for one that the set lacks."""
    require(0 <= example < len(distilled), f"this set has {len(distilled)} examples, and none with the number {example + 1}")
    part = slice(example, example + 1)
    return DistilledSet(**{name: getattr(distilled, name)[part] for name in ("embeds", "mask", "free", "targets")})


def real_text(first: DistilledSet, task: Task | None, student: Student) -> DistilledSet:
    """The real text of a film, of its first frame: the training rows that it was taken from, if they are known, else itself."""
    rows, labels = first.meta.get("rows"), first.meta.get("labels")
    if first.tokens is not None or task is None or not rows or len(rows) != len(first):
        return first
    chosen = np.array(rows)
    by_class = [chosen[np.array(labels) == label] for label in range(len(task.classes))] if labels else [chosen]
    return DistilledSet.from_rows(task, student, by_class, length=first.mask.shape[1])


def heads(student: Student, examples: Sequence[DistilledSet], params: Params | None = None) -> np.ndarray:
    """Attention in several sets of one example each, of one length, as uint8 ``[n, layers, heads, l, l]``: 255 is weight 1.

    Args:
        student, params: as :func:`~distillkit.view.measures.attention` takes them.
        examples: as :func:`one_example` returns them; a shorter one gets zeros.
    """
    length = max(example.mask.shape[1] for example in examples)
    weights = [attention(student, example, params)[0] for example in examples]
    grown = [np.pad(w, ((0, 0), (0, 0), (0, length - w.shape[-1]), (0, length - w.shape[-1]))) for w in weights]
    return np.rint(np.stack(grown) * LEVELS).astype(np.uint8)


def replaced(distilled: DistilledSet, student: Student, example: int, position: int, token: int) -> DistilledSet:
    """The set with ``token`` at one learned position; the other positions keep their embeddings or tokens.

    Raises:
        ValueError: a position that is not learned, or a token that the table does not have.
    """
    _check_position(distilled, example, position)
    require(0 <= token < len(student.embedding),
            f"token {token!r} is no row of the table, which has {len(student.embedding)}; choose one of its rows")
    if distilled.tokens is None:
        embeds = distilled.embeds.clone()
        embeds[example, position] = student.embedding[token]
        return dataclasses.replace(distilled, embeds=embeds)
    tokens = distilled.tokens.clone()
    tokens[example, position] = token
    return with_tokens(distilled, student, tokens)


def _check_position(distilled: DistilledSet, example: int, position: int) -> None:
    require([example, position] in distilled.free.nonzero().tolist(),
            f"example {example!r} has no learned position {position!r}; choose one of distilled.free.nonzero()")


def candidates(
    distilled: DistilledSet, student: Student, example: int, position: int, *, k: int = 8, more: Sequence[int] = (),
    judge=None, tell: Tell | None = None,
) -> pandas.DataFrame:
    """The words nearest to a learned position, nearest first, and the outer loss of the set with each of them in its place.

    Args:
        distilled: a set in ``student``'s embedding space, of embeddings or of tokens.
        example, position: a learned position.
        k: number of nearest words.
        more: ids of further tokens, added at the end whatever their distance.
        judge: such as :class:`~distillkit.text.judges.FrozenJudge`; default: no losses.
        tell: called with the share of the losses that are there.

    Returns:
        A row per word: ``token`` id, ``word``, Euclidean ``distance``, and with a judge ``loss`` and its ``change``.

    Raises:
        ValueError: a position that is not learned, or a set of another table.
    """
    distilled.check_table(student)
    _check_position(distilled, example, position)
    table = student.embedding
    embedding = distilled.embeds[example, position].to(table.device, table.dtype)
    nearest, _ = nearest_tokens(embedding[None], table, k=k, allowed=allowed_tokens(student.tokenizer, len(table)))
    ids = list(dict.fromkeys([*nearest[0].tolist(), *more]))
    # From the difference: the distances of the search lose digits where they are small.
    distances = (embedding - table[ids]).float().norm(dim=1).tolist()
    choices = pandas.DataFrame({"token": ids, "word": words(student.tokenizer, ids), "distance": distances})
    if judge is not None:
        variants = [distilled, *(replaced(distilled, student, example, position, token) for token in ids)]
        loss, *losses = variant_losses(judge, variants, example, tell)
        choices["loss"], choices["change"] = losses, [value - loss for value in losses]
    return choices


def without(distilled: DistilledSet, example: int, position: int) -> DistilledSet:
    """The set without one position of an example: those behind it move up, so that the padding stays at the end."""
    length = distilled.mask.shape[1]
    order = torch.tensor([*range(position), *range(position + 1, length), position])
    moved = {name: getattr(distilled, name) for name in ("embeds", "mask", "free", "tokens", "attention")}
    for name, values in moved.items():
        if values is not None:
            moved[name] = values.clone()
            moved[name][example] = values[example][..., order] if name == "attention" else values[example][order]
    moved["mask"][example, -1] = moved["free"][example, -1] = False
    return dataclasses.replace(distilled, **moved)


def training_values(distilled: DistilledSet, example: int, judge, tell: Tell | None = None) -> np.ndarray:
    """Training value of each position of an example: how much the outer loss rises when the position is left out.

    Returns:
        ``[l]``; a positive value: the position helps.  NaN where it is fixed or absent.
    """
    positions = distilled.free[example].nonzero().squeeze(1).tolist()
    variants = [distilled, *(without(distilled, example, position) for position in positions)]
    loss, *losses = variant_losses(judge, variants, example, tell)
    values = np.full(distilled.mask.shape[1], np.nan)
    values[positions] = np.array(losses) - loss
    return values


def variant_losses(judge, variants: Sequence[DistilledSet], example: int, tell: Tell | None = None) -> list[float]:
    """Outer losses of sets that differ in one example; the first is the set itself.

    Args:
        judge: any judge; one without gradients takes sets with tokens only.
        variants: the sets.
        example: where they differ.
        tell: called with the share that is done.
    """
    tell = tell or (lambda share: None)
    if isinstance(judge, FrozenJudge):
        base, rows = judge.features(variants[0]), []
        for place, part in enumerate(variants):
            rows.append(judge.features(one_example(part, example)))
            tell((place + 1) / (len(variants) + 1))
        x = base.repeat(len(variants), 1, 1)
        x[:, example] = torch.cat(rows)
        with torch.no_grad():
            return judge.head_losses(x, judge.labels(variants[0]), 0).tolist()
    losses = []
    for place, part in enumerate(variants):
        losses.append(outer_loss(judge, part))
        tell((place + 1) / len(variants))
    return losses


def outer_loss(judge, distilled: DistilledSet) -> float:
    """The outer loss of a set on the real rows of one address, the same for every set."""
    if distilled.tokens is None:  # a copy, because the judge marks the embeddings for gradients
        return judge.gradient(dataclasses.replace(distilled, embeds=distilled.embeds.clone()), 0)[0]
    return judge.losses(distilled, [[]], 0)[0]


def trained(distilled: DistilledSet, student: Student, task: Task | None, tell: Tell | None = None) -> tuple[Params, str]:
    """Parameters of a fresh student trained on a set, by the recipe that it carries, else by the standard one; and its name.

    Raises:
        ValueError: the set's classes are not the student's, or its recipe trains other parameters.
    """
    recipe = as_recipe("own" if "recipe" in distilled.meta else "standard")
    plan = recipe.plan(distilled.for_student(student), task, student)(0)
    run = plan.train(student, student.init(derive_seed("evaluate-init", 0)))  # as for the first seed of an evaluation
    for step in range(len(plan.step_sizes)):
        params = next(run)
        (tell or (lambda share: None))((step + 1) / len(plan.step_sizes))
    return params, plan.recipe["name"]


def predicted(student: Student, params: Params, distilled: DistilledSet, example: int) -> dict[str, float]:
    """The probability of each class, by name, that a classifier with ``params`` gives to one example."""
    names, _, _ = labels_of(distilled.for_student(student))
    part = one_example(distilled, example)
    with torch.no_grad():
        logits = student.logits(params, {"inputs_embeds": part.embeds, "attention_mask": part.mask.long()})
    return dict(zip(names, logits[0].float().softmax(0).tolist()))


def labels_of(distilled: DistilledSet) -> tuple[list[str], list[int], Tensor | None]:
    """Names of classes, the class of each example, and label probabilities ``[m, c]``; of an instruction set the responses.

    A set that does not say which examples are whose has its most probable classes.
    """
    if "responses" in distilled.meta:
        names = list(dict.fromkeys(distilled.meta["responses"]))
        return names, [names.index(response) for response in distilled.meta["responses"]], None
    probabilities = distilled.probabilities()
    names = [str(name) for name in distilled.meta.get("classes") or range(probabilities.shape[1])]
    return names, list(distilled.meta.get("labels") or probabilities.argmax(1).tolist()), probabilities


def common_labels(sets: Sequence[DistilledSet]) -> tuple[list[str], np.ndarray, list[Tensor | None]]:
    """The labels of several sets in the classes of all of them, which may be in another order in each.

    Returns:
        names of the c classes; the class of each example ``[sets, m]``, -1 for one that a set lacks; and for each set its label
        probabilities ``[examples, c]``, or None.
    """
    parts = [labels_of(state) for state in sets]
    names = list(dict.fromkeys(name for classes, _, _ in parts for name in classes))
    labels, probabilities = np.full((len(sets), max(map(len, sets))), ABSENT), []
    for row, (classes, numbers, shares) in zip(labels, parts):
        place = [names.index(name) for name in classes]
        row[: len(numbers)] = [place[number] for number in numbers]
        if shares is not None:
            shares = shares.new_zeros(len(shares), len(names)).index_copy(1, torch.tensor(place), shares)
        probabilities.append(shares)
    return names, labels, probabilities
