"""Scoring: how often a trained student is right on held-out real data.

Classification is scored by the largest logit.  Multiple choice is scored as ARC and MMLU are: the model answers with the
choice that has the highest log-likelihood after the prompt; a second score divides the log-likelihood by the number of
characters of the choice, so that long choices are not at a disadvantage.  Where several choices read the same, each of them is
right if one is.  Rows without choices have no accuracy.  They are scored by the *response loss*: the mean negative
log-likelihood of a response token.

Every function takes the parameters explicitly and draws nothing at random.  Rows of like length are read together, so that
little padding is computed, and a prompt is read once for all of its choices: they stand behind it, none sees another, and each
has the positions that it would have alone.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F

from distillkit.core.student import Params, Student
from distillkit.data.tasks import Task

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
    rows = np.arange(len(task.split(split))) if rows is None else rows
    if task.kind == "classification":
        right = classified(student, params, task, split, rows)
        return right, right
    questions = cast("InstructionTask", task)
    questions.check_choices(split, rows)
    plain, by_length = choice_scores(student, params, task, split, rows)
    return questions.are_right(split, rows, picks(plain)), questions.are_right(split, rows, picks(by_length))


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


def choice_scores(
    student: Student, params: Params, task: Task, split: str, rows: Rows, batch_size: int | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-likelihood of each choice of each row after its prompt, and the same per character of the choice.

    Args:
        rows: of the split.
        batch_size: rows at a time, as :func:`log_likelihoods` takes it.

    Returns:
        for each row an array with an entry per choice, twice.
    """
    prompts = task.token_ids(student.tokenizer, split)
    choices = [cast("InstructionTask", task).choice_ids(student.tokenizer, split, int(row)) for row in rows]
    scores = log_likelihoods(student, [prompts[int(row)] for row in rows], choices, params=params, batch_size=batch_size)
    return scores, per_character(scores, task, split, rows)


def log_likelihoods(
    student: Student, prompts: Sequence[list[int]], choices: Sequence[list[list[int]]], *, params: Params | None = None,
    memory=None, batch_size: int | None = None,
) -> list[np.ndarray]:
    """Log-likelihood of each choice of each prompt.

    Args:
        prompts: token ids of each prompt, at least one token each.
        choices: for each prompt, the token ids of each choice.
        params: the student's parameters; default: as pretrained.
        memory: keys and values of a context in front of all prompts, as the model returns them; not changed.
        batch_size: prompts at a time; with a ``memory``, choices (prompts, where choices are single tokens); default: 16 on a
            CPU (SmolLM2 read 1.5 times as many questions a second as with 64), 64 on a GPU.

    Returns:
        for each prompt an array with an entry per choice.
    """
    together = memory is None and _can_branch(student)
    return _likelihoods(student, prompts, choices, params, memory, batch_size, together)


class _Reading(NamedTuple):
    """Tokens to read at once, the position of each in its text, the continuation it belongs to (0: all), and the spots: at
    which place which token's probability is to be taken, for which prompt and choice."""

    tokens: list[int]
    positions: list[int]
    branches: list[int]
    spots: list[tuple[int, int, int, int]]


def _together(prompts: Sequence[list[int]], choices: Sequence[list[list[int]]]) -> list[_Reading]:
    """A reading for each prompt, with all of its choices behind it."""
    readings = []
    for row, (prompt, options) in enumerate(zip(prompts, choices, strict=True)):
        reading = _Reading([*prompt], [*range(len(prompt))], [0] * len(prompt), [])
        for number, choice in enumerate(options):
            places = [len(prompt) - 1, *range(len(reading.tokens), len(reading.tokens) + len(choice) - 1)]
            reading.spots.extend((place, token, row, number) for place, token in zip(places, choice, strict=True))
            reading.tokens.extend(choice[:-1])
            reading.positions.extend(range(len(prompt), len(prompt) + len(choice) - 1))
            reading.branches.extend([number + 1] * (len(choice) - 1))
        readings.append(reading)
    return readings


def _apart(prompts: Sequence[list[int]], choices: Sequence[list[list[int]]]) -> list[_Reading]:
    """A reading for each choice of each prompt; one-token choices share one."""
    spots: dict[tuple[int, ...], list] = collections.defaultdict(list)
    for row, (prompt, options) in enumerate(zip(prompts, choices, strict=True)):
        for number, choice in enumerate(options):
            spots[*prompt, *choice[:-1]] += [(place, token, row, number)
                                             for place, token in enumerate(choice, len(prompt) - 1)]
    return [_Reading([*tokens], [*range(len(tokens))], [0] * len(tokens), found) for tokens, found in spots.items()]


def _padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)


def _likelihoods(student: Student, prompts: Sequence[list[int]], choices: Sequence[list[list[int]]], params: Params | None,
                 memory, batch_size: int | None, together: bool) -> list[np.ndarray]:
    """What :func:`log_likelihoods` gives, from one reading for all choices of a prompt or from one for each."""
    likelihoods = [np.zeros(len(options)) for options in choices]
    readings = (_together if together else _apart)(prompts, choices)
    if batch_size is None:
        batch_size = 16 if student.device.type == "cpu" else 64
    for part in by_size(readings, lambda reading: len(reading.tokens), batch_size):
        ids, positions, branches = (_padded([getattr(reading, name) for reading in part], filler)
                                    for name, filler in (("tokens", 0), ("positions", -1), ("branches", 0)))
        first = min(place for reading in part for place, *_ in reading.spots)
        kwargs: dict[str, Any] = {"logits_to_keep": ids.shape[1] - first, "use_cache": memory is not None}
        if together:
            kwargs |= student.branching_inputs(ids, positions, branches)
        else:  # padding stands behind, where no token of interest looks
            kwargs["inputs_embeds"] = student.scaled(F.embedding(ids.to(student.device), student.embedding))
            kwargs["past_key_values"] = past = copy.deepcopy(memory)  # as reading adds to it
            if past is not None:
                past.batch_repeat_interleave(len(part))
        where = [(n, place - first, *spot) for n, reading in enumerate(part) for place, *spot in reading.spots]
        n, place, token, row, choice = zip(*where, strict=True)
        with torch.no_grad():
            logits = torch.func.functional_call(student.module, params or {}, kwargs=kwargs).logits[[*n], [*place]]
            log_p = logits.log_softmax(-1).gather(1, torch.tensor(token, device=logits.device)[:, None])[:, 0]
        for r, c, value in zip(row, choice, log_p.double().cpu().tolist(), strict=True):
            likelihoods[r][c] += value
    return likelihoods


def _can_branch(student: Student) -> bool:
    """Whether the student reads several choices behind one prompt as it reads each alone; tried once, on a few tokens."""
    if student.builds_masks:
        return False
    if "branches" not in student.cache:
        few = student, [[5, 6, 7], [8, 9]], [[[3, 4, 5], [6, 3, 7]], [[4, 3], [5, 6, 8, 9]]], None, None, 2
        try:
            alone, together = (np.concatenate(_likelihoods(*few, way)) for way in (False, True))
            student.cache["branches"] = bool(np.allclose(alone, together, rtol=1e-3))
        except (RuntimeError, ValueError, TypeError):  # a model that does not take such a mask, or such positions
            student.cache["branches"] = False
    return student.cache["branches"]


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


def per_character(scores: list[np.ndarray], task: Task, split: str, rows: Rows) -> list[np.ndarray]:
    """Log-likelihoods of the choices of ``rows``, each divided by the number of characters of its choice."""
    choices = task.split(split)["choices"]
    return [s / [len(choice) for choice in choices[int(row)]] for s, row in zip(scores, rows, strict=True)]


def picks(scores: list[np.ndarray]) -> list[int]:
    """The likeliest choice of each row, never one with a NaN; −1, which is no choice, where none has a finite score."""
    scores = [np.nan_to_num(s, nan=-np.inf, neginf=-np.inf) for s in scores]
    return [int(np.argmax(s)) if np.isfinite(s).any() else -1 for s in scores]


def mean_and_std(scores: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation with n − 1 (nan for a single score)."""
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else float("nan")


def by_size(items: Iterable, size: Callable[[Any], int], batch_size: int) -> Iterator[list]:
    """Batches of items of like ``size``, the smallest first; the padding in a batch is then little."""
    in_order = sorted(items, key=size)
    return (in_order[i : i + batch_size] for i in range(0, len(in_order), batch_size))
