"""Scoring: what a trained student says of held-out real data.

Classification is scored by the largest logit.  Multiple choice is scored as ARC and MMLU are: the model answers with the
choice that has the highest log-likelihood after the prompt; a second score divides the log-likelihood by the number of
characters of the choice, so that long choices are not at a disadvantage.  Where several choices read the same, each of them is
right if one is.  Rows without choices have no accuracy.  They are scored by the *response loss*: the mean negative
log-likelihood of a response token.

Every function takes the parameters explicitly and draws nothing at random.  Rows of like length are read together, so that
little padding is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from distillkit.core.student import Params, Student
from distillkit.data.tasks import NO_TARGET, Task

if TYPE_CHECKING:
    from distillkit.data.instruction import InstructionTask

Rows = Sequence[int] | np.ndarray


def has_accuracy(task: Task, split: str) -> bool:
    """Whether a split is scored by accuracy: rows with classes, or rows that all have choices."""
    return task.kind == "classification" or not len(cast("InstructionTask", task).without_choices(split))


def worth(student: Student, params: Params, task: Task, split: str, rows: Rows | None = None) -> float:
    """One number to compare trainings by, the higher the better: accuracy, or minus the response loss."""
    if has_accuracy(task, split):
        return float(answered(student, params, task, split, rows)[0].mean())
    return -response_loss(student, params, task, split, rows)


def answered(
    student: Student, params: Params, task: Task, split: str, rows: Rows | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each row is answered rightly, by plain log-likelihood and by log-likelihood per character.

    Args:
        rows: n rows of the split; default: all.

    Returns:
        two arrays ``[n]`` bool, which are the same for classification.

    Raises:
        ValueError: rows of an instruction task without choices.
    """
    rows = np.arange(len(task.split(split))) if rows is None else np.asarray(rows)
    if task.kind == "classification":
        right = classified(student, params, task, split, rows)
        return right, right
    questions = cast("InstructionTask", task)
    questions.check_choices(split, rows)
    plain, by_length = (
        questions.are_right(split, rows, picks(scores)) for scores in choice_scores(student, params, task, split, rows)
    )
    return plain, by_length


def classified(
    student: Student, params: Params, task: Task, split: str, rows: Rows | None = None, batch_size: int = 256
) -> np.ndarray:
    """Whether each row is classified rightly, ``[n]`` bool; a row whose logits hold a NaN is not.

    Args:
        rows: n rows of the split; default: all.
        batch_size: rows at a time.
    """
    lengths = [len(ids) for ids in task.token_ids(student.tokenizer, split)]
    rows = np.arange(len(lengths)) if rows is None else np.asarray(rows)
    right = np.zeros(len(rows), dtype=bool)
    with torch.no_grad():
        for places in by_size(range(len(rows)), lambda place: lengths[rows[place]], batch_size):
            batch = task.batch(student.tokenizer, split, rows[places])
            logits = student.logits(params, batch).cpu()
            right[places] = ((logits.argmax(-1) == batch["labels"]) & ~logits.isnan().any(-1)).numpy()
    return right


def choice_accuracy(student: Student, params: Params, task: Task, split: str) -> tuple[float, float]:
    """Share of a split's multiple-choice rows that ``params`` answer rightly, plainly and by length.

    Raises:
        ValueError: rows without choices.
    """
    plain, by_length = answered(student, params, task, split)
    return float(plain.mean()), float(by_length.mean())


def choice_scores(
    student: Student, params: Params, task: Task, split: str, rows: Rows, batch_size: int = 256
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-likelihood of each choice of each row after its prompt, and the same per character of the choice.

    Args:
        rows: of the split.
        batch_size: choices at a time (rows, where each choice is a single token).

    Returns:
        for each row an array with an entry per choice, twice; a NaN counts as −∞.
    """
    tokenizer = student.tokenizer
    choices = [cast("InstructionTask", task).choice_ids(tokenizer, split, int(row)) for row in rows]
    scores = [np.empty(len(ids)) for ids in choices]
    prompt_lengths = [len(task.token_ids(tokenizer, split)[int(row)]) for row in rows]
    # Where every choice is a single token, one reading of the prompt gives the scores of all of them.
    single = [place for place, ids in enumerate(choices) if all(len(choice) == 1 for choice in ids)]
    longer = [(place, i) for place in sorted({*range(len(rows))} - {*single}) for i in range(len(choices[place]))]
    with torch.no_grad():
        for part in by_size(single, prompt_lengths.__getitem__, batch_size):
            batch = task.batch(tokenizer, split, [int(rows[place]) for place in part])
            next_token = student.next_token(params, batch).double().cpu().numpy()
            for place, of_token in zip(part, next_token, strict=True):
                scores[place][:] = [of_token[token] for (token,) in choices[place]]
        for part in by_size(longer, lambda item: prompt_lengths[item[0]] + len(choices[item[0]][item[1]]), batch_size):
            batch = task.batch(tokenizer, split, [int(rows[place]) for place, _ in part])
            targets = [torch.tensor(choices[place][i]) for place, i in part]
            targets = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=NO_TARGET)
            likelihoods = student.log_likelihood(params, batch, targets).sum(1).double().cpu().numpy()
            for (place, i), likelihood in zip(part, likelihoods, strict=True):
                scores[place][i] = likelihood
    scores = without_nan(scores)
    return scores, per_character(scores, task, split, rows)


def response_loss(
    student: Student, params: Params, task: Task, split: str, rows: Rows | None = None, batch_size: int = 16
) -> float:
    """Mean negative log-likelihood (nats) of a response token after its prompt, over all tokens of the responses.

    Args:
        rows: of the split; default: all.
        batch_size: rows at a time.
    """
    responses = cast("InstructionTask", task).response_ids(student.tokenizer, split)
    rows = [int(row) for row in (range(len(task.split(split))) if rows is None else rows)]
    total = 0.0
    with torch.no_grad():
        for part in by_size(rows, lambda row: len(responses[row]), batch_size):
            batch = task.batch(student.tokenizer, split, part)
            total -= student.log_likelihood(params, batch, batch["labels"]).double().sum().item()
    return total / sum(len(responses[row]) for row in rows)


def without_nan(scores: list[np.ndarray]) -> list[np.ndarray]:
    """Log-likelihoods in which a NaN counts as −∞."""
    return [np.nan_to_num(row_scores, nan=-np.inf, neginf=-np.inf) for row_scores in scores]


def per_character(scores: list[np.ndarray], task: Task, split: str, rows: Rows) -> list[np.ndarray]:
    """Log-likelihoods of the choices of ``rows``, each divided by the number of characters of its choice."""
    choices = task.split(split)["choices"]
    return [s / [len(choice) for choice in choices[int(row)]] for s, row in zip(scores, rows, strict=True)]


def picks(scores: list[np.ndarray]) -> list[int]:
    """The likeliest choice of each row; −1, which is no choice, where none has a finite score."""
    return [int(np.argmax(s)) if np.isfinite(s).any() else -1 for s in scores]


def by_size(items: Iterable, size: Callable[[Any], int], batch_size: int) -> Iterator[list]:
    """Batches of items of like ``size``, the smallest first; the padding in a batch is then little."""
    in_order = sorted(items, key=size)
    yield from (in_order[i : i + batch_size] for i in range(0, len(in_order), batch_size))
