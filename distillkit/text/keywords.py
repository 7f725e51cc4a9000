"""Searched keywords: lines of a word classifier's words, some of them changed for others as a judge asks.

The keywords with the largest weights (``select(…, "keywords")``) are the best cheap text at one example per class.  They are
chosen one by one, by a classifier that is no student.  :func:`search_keywords` changes a few words of a line at a time and asks
a judge about the set as a whole.  Candidates are words of the classifier too, so that the text stays readable and no odd piece
of a word can exploit the judge; a :class:`~distillkit.text.judges.JointJudge` of several encoders leaves even less to exploit.
"""

from __future__ import annotations

import collections
import dataclasses
import functools

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.words import weighted_words
from distillkit.io.checks import check_is, check_wholes, require
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator
from distillkit.text.judges import Judge, Swap, check_search, swapped
from distillkit.text.projection import with_tokens
from distillkit.text.swaps import combined

AT_ONCE = 3  # most words that a candidate changes


@dataclasses.dataclass(frozen=True, order=True)
class Change:
    """Some words of one example for others."""

    example: int
    swaps: tuple[Swap, ...]


def search_keywords(
    distilled: DistilledSet, task: Task, student: Student, judge: Judge, *, steps: int = 40, candidates: int = 24,
    words: int = 300, seed: int = 0,
) -> DistilledSet:
    """Lines of words with the lowest outer loss of a judge, from the lines of a set on.

    A step looks at all lines in turn, in an order drawn anew.  A candidate changes one to three words of a line for words of
    its class, drawn by their weights.  What makes the judge's loss on fresh real rows lower goes in, as in
    :class:`~distillkit.text.swaps.SwapSearch`.  Only words of a single token come and go, so that lines keep their length.

    Args:
        distilled: where to start, such as a selection of ``"keywords"``.
        judge: whose outer loss to go by: any with the methods ``losses`` and ``describe``.
        steps: of the search.
        candidates: changes judged in a step.
        words: with the largest weights in each class, those of a single token of which are candidates.

    Returns:
        a set with the labels that ``distilled`` has and no recipe; the losses of the search, before and after each step, are in
        ``meta["search"]``.

    Raises:
        ValueError: a set whose text has other tokens than it, or a class without words of a single token.
    """
    check_is("task", task, Task)
    check_search(distilled, student, judge, "losses")
    check_wholes(steps=steps, candidates=candidates, words=words)
    text = distilled.in_classes(task.classes, f"task {task.name!r}")
    text.label_names()  # a set that does not tell them is an error
    vocabulary, losses = [_single_tokens(of_class[:words], student) for of_class in weighted_words(task)], []
    for name, of_class in zip(task.classes, vocabulary, strict=True):
        require(of_class, f"class {name!r} of task {task.name!r} has no keyword of a single token")
    offered = [vocabulary[label] for label in text.meta["labels"]]
    for step in progress(range(steps), desc="searching words", unit="step"):
        draw = generator("keywords-drawn", seed, step)
        order = torch.randperm(len(text), generator=draw).tolist()
        lines = [order[n % len(order)] for n in range(candidates)]
        places = {line: _whole_words(text, line, student) for line in lines}
        changes = [_change(text.tokens[line], line, places[line], offered[line], draw) for line in lines]
        judged = functools.partial(_losses, judge, text, derive_seed("keywords", seed, step))
        before, *each = judged([[], *([change] for change in changes)])
        chosen, after = combined(changes, each, before, judged)
        text = with_tokens(text, student, swapped(text, [swap for change in chosen for swap in change.swaps]))
        losses.append([round(before, 4), round(after, 4)])
    meta = {name: value for name, value in text.meta.items() if name not in ("recipe", "selection")}
    meta["search"] = {"judge": judge.describe(), "steps": steps, "candidates": candidates, "words": words, "losses": losses}
    return dataclasses.replace(text, step_sizes=None, meta=meta)


def _single_tokens(words: list[tuple[str, float]], student: Student) -> dict[int, float]:
    """Token → weight of the words that are one token."""
    pieces = student.tokenizer([f" {word}" for word, _ in words], add_special_tokens=False)["input_ids"] if words else []
    return {ids[0]: weight for ids, (_, weight) in zip(pieces, words, strict=True) if len(ids) == 1}


def _whole_words(text: DistilledSet, line: int, student: Student) -> Tensor:
    """Positions of a line where a word of a single token stands."""
    encoded = student.tokenizer(text.meta["text"][line], add_special_tokens=False)
    places = text.free[line].nonzero().squeeze(1)
    require(encoded["input_ids"] == text.tokens[line, places].tolist(),
            f"the text of example {line} does not read as its tokens; start from lines of words, such as dk.select(task, "
            'student, "keywords")')
    sizes = collections.Counter(encoded.word_ids())
    return places[torch.tensor([sizes[word] == 1 for word in encoded.word_ids()], dtype=torch.bool)]


def _change(tokens: Tensor, line: int, places: Tensor, offered: dict[int, float], draw: torch.Generator) -> Change:
    """One to three words at ``places`` for words that the line does not have yet, drawn by their weights."""
    used = {*tokens.tolist()}
    weights = {token: weight for token, weight in offered.items() if token not in used}
    number = min(1 + int(torch.randint(AT_ONCE, (), generator=draw)), len(weights), len(places))
    if not number:
        return Change(line, ())
    positions = places[torch.randperm(len(places), generator=draw)[:number]].tolist()
    drawn = torch.multinomial(torch.tensor([*weights.values()]), number, generator=draw).tolist()
    new = [[*weights][place] for place in drawn]
    return Change(line, tuple(Swap(line, position, token) for position, token in zip(positions, new, strict=True)))


def _losses(judge: Judge, text: DistilledSet, seed: int, groups: list[list[Change]]) -> list[float]:
    """The outer loss after each of several groups of changes."""
    return judge.losses(text, [[swap for change in group for swap in change.swaps] for group in groups], seed)
