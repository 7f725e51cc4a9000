"""Real sentences as distilled text: chosen by a judge, or nearest to what was learned.

:func:`search_sentences` changes one whole sentence at a time for another *real* one, judged as swaps of tokens are.  The result
was written by people, so it cannot exploit what is odd about the judge's representations, as single tokens do.
:func:`nearest_sentences` replaces each example by the nearest real sentence of its class, as a reference.
:func:`search_pairs` chooses the real pairs of an instruction task by the outer loss itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.objectives import Objective, trained_loss
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.influence import groups_of_questions
from distillkit.evaluation.selection import sentence_features
from distillkit.io.checks import check_are, check_is, check_number, check_whole, check_wholes, require
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator
from distillkit.text.judges import FrozenJudge, check_search
from distillkit.text.swaps import combined

EXAMPLES = 16  # examples that a step looks at

@dataclasses.dataclass(frozen=True, order=True)
class Sentence:
    """Sentence ``new``, a number in the pool, for the one that is ``example``."""

    example: int
    new: int


def search_sentences(
    distilled: DistilledSet, task: Task, student: Student, judge: FrozenJudge, *, steps: int = 100, candidates: int = 64,
    sentences: int = 2048, pool: DistilledSet | None = None, seed: int = 0,
) -> DistilledSet:
    """Real sentences with the lowest outer loss of a judge: whole sentences are changed for others of their class.

    A step looks at sixteen examples, drawn anew.  The judge's gradient in their representations says which sentences of the
    pool look better; of those, ``candidates`` are judged by the outer loss on fresh real rows, and what makes it lower goes in,
    as in :class:`~distillkit.text.swaps.SwapSearch`.  The pool is read once, so that a step costs no forward pass.

    Args:
        distilled: where to start, such as a set that herding selected.
        judge: whose representations and outer loss to go by: a :class:`~distillkit.text.judges.FrozenJudge`, or any judge with
            its ``features``, ``labels`` and ``head_losses``.
        steps: of the search.
        candidates: sentences judged in a step.
        sentences: size of the pool, drawn from the training split in equal shares and filled up to the set's length.
        pool: other sentences to choose from, of every class of ``distilled``, such as those of
            :func:`~distillkit.text.writing.write_sentences` as a set; the result is as long as the longer of the two.
        seed: draws the pool, examples, candidates and real rows.

    Returns:
        a set with the labels that ``distilled`` has and no recipe; the losses of the search, before and after each step,
        are in ``meta["search"]``.

    Raises:
        TypeError: a judge without representations.
        ValueError: a pool without sentences of a class.
    """
    check_is("task", task, Task)
    check_search(distilled, student, judge, "features", "labels", "head_losses")
    check_wholes(steps=steps, candidates=candidates, sentences=sentences)
    start = distilled.in_classes(task.classes, f"task {task.name!r}")
    start.label_names()  # a set that does not tell them is an error
    labels = judge.labels(start)
    if pool is None:
        pool = _pool(task, student, sentences, start.embeds.shape[1], seed)
    else:
        check_is("pool", pool, DistilledSet)
        pool.check_table(student)
        pool = pool.in_classes(task.classes, f"task {task.name!r}")
        lacking = {*start.label_names()} - {*pool.label_names()}
        require(not lacking, f"pool: it has no sentence of {', '.join(map(repr, sorted(lacking)))}")
    x = torch.cat([judge.features(pool), judge.features(start)])  # [pool and set, n·d]
    of_class = [torch.tensor([i for i, name in enumerate(pool.label_names()) if name == label]) for label in task.classes]
    offered = [of_class[label] for label in start.meta["labels"]]  # of each example, the sentences of its class
    now = torch.arange(len(pool), len(x))  # where each example stands in x
    losses = []
    for step in progress(range(steps), desc="choosing sentences", unit="step"):
        address, draw = derive_seed("sentences", seed, step), generator("sentences-drawn", seed, step)
        features = x[now].clone().requires_grad_()
        (slope,) = torch.autograd.grad(judge.head_losses(features[None], labels, address)[0], features)
        changes = _changes(x, now, slope, offered, candidates, draw)
        judged = functools.partial(_losses, judge, x, labels, address, now)
        before, *each = judged([[], *([change] for change in changes)])
        chosen, after = combined(changes, each, before, judged)
        now = _changed(now, chosen)
        losses.append([round(before, 4), round(after, 4)])
    return _picked(pool, start, now, {"judge": judge.describe(), "steps": steps, "sentences": len(pool), "losses": losses})


def search_pairs(
    distilled: DistilledSet, task: Task, student: Student, objective: Objective, *, steps: int = 40, share: float = 0.1,
    length: int | None = None, seed: int = 0,
) -> DistilledSet:
    """Real prompts with responses that have the lowest outer loss of an objective: a hill climb over whole pairs.

    A step exchanges some pairs for others of the training split with the same answer (where answers are many, of the same
    group), trains the student on the set, and keeps the exchange if the outer loss is lower.  Nothing is differentiated, so
    that the text remains real and a step costs one inner loop.  What the objective draws stays the same throughout;
    trajectory matching, which draws no real batch, cannot reward pairs for standing in it.

    Args:
        distilled: selected pairs of ``task`` to start from, with their ``meta["rows"]``.
        objective: such as :class:`~distillkit.core.objectives.TrajectoryMatching`.
        steps: exchanges that are tried.
        share: of the pairs that a step exchanges, in (0, 1].
        length: longer prompts lose tokens in front, as in :meth:`~distillkit.core.distilled.DistilledSet.from_real`.
        seed: draws the exchanges, and what the objective draws.

    Returns:
        a selection of as many pairs; ``meta["search"]`` holds the outer losses before the search and of each exchange.

    Raises:
        ValueError: a task with classes, or a set that does not name its rows.
    """
    check_are(distilled=(distilled, DistilledSet), task=(task, Task), student=(student, Student))
    check_whole("steps", steps)
    check_number("share", share, most=1, without="least")
    require(task.kind == "instruction", f"task {task.name!r} has classes; use search_sentences")
    require("rows" in distilled.meta, "the set does not name the training rows it was taken from; start from dk.select")
    groups = groups_of_questions(task, "train")

    def of(rows: list[int]) -> tuple[DistilledSet, float]:
        pairs = DistilledSet.from_rows(task, student, [rows], length=length)
        return pairs, float(np.mean([trained_loss(p) for p in objective.problems(pairs, derive_seed("pairs", seed))]))

    rows = list(distilled.meta["rows"])
    chosen, least = of(rows)
    losses = [least]
    for step in progress(range(steps), desc="choosing pairs", unit="step"):
        draw, exchanged = generator("pairs-exchanged", seed, step), list(rows)
        for place in torch.randperm(len(rows), generator=draw)[: max(1, round(share * len(rows)))].tolist():
            unused = np.setdiff1d(np.flatnonzero(groups == groups[rows[place]]), exchanged)
            if len(unused):
                exchanged[place] = int(unused[int(torch.randint(len(unused), (), generator=draw))])
        pairs, loss = of(exchanged)
        losses.append(loss)
        if loss < least:
            rows, chosen, least = exchanged, pairs, loss
    chosen.meta["search"] = {"steps": steps, "share": share, "seed": seed, "losses": [round(loss, 4) for loss in losses]}
    return chosen


def _changes(
    x: Tensor, now: Tensor, slope: Tensor, offered: list[Tensor], candidates: int, draw: torch.Generator
) -> list[Sentence]:
    """Changes to judge: for some examples, sentences drawn from those that look best by the gradient ``slope [m, n·d]``."""
    changes: list[Sentence] = []
    share = max(1, candidates // min(EXAMPLES, len(now)))
    for i in torch.randperm(len(now), generator=draw)[:EXAMPLES].tolist():
        used = torch.tensor([*now.tolist(), *(change.new for change in changes)])
        gains = slope[i] @ x[now[i]] - x[offered[i]] @ slope[i]
        gains[torch.isin(offered[i], used)] = -math.inf  # no sentence stands twice
        best = gains.topk(min(6 * share, len(gains)))
        likely = offered[i][best.indices[best.values > -math.inf]]  # a sentence is a long way: the sign tells little
        changes += [Sentence(i, int(n)) for n in likely[torch.randperm(len(likely), generator=draw)[:share]]]
    return changes


def _losses(
    judge: FrozenJudge, x: Tensor, labels: Tensor, seed: int, now: Tensor, groups: Sequence[Sequence[Sentence]]
) -> list[float]:
    """The outer loss after each of several groups of changes to the sentences that stand at ``now`` in ``x``."""
    with torch.no_grad():
        return judge.head_losses(x[torch.stack([_changed(now, group) for group in groups])], labels, seed).tolist()


def _changed(now: Tensor, changes: Sequence[Sentence]) -> Tensor:
    now = now.clone()
    for change in changes:
        now[change.example] = change.new
    return now


def _pool(task: Task, student: Student, sentences: int, length: int, seed: int) -> DistilledSet:
    rows = task.balanced_rows("train", min(sentences, len(task.train)), generator("sentence-pool", seed)).numpy()
    labels = task.labels("train")[rows]
    by_class = [rows[labels == c] for c in range(len(task.classes))]
    return DistilledSet.from_rows(task, student, by_class, length=length, seed=seed)


def _picked(pool: DistilledSet, start: DistilledSet, now: Tensor, search: dict) -> DistilledSet:
    """The examples at ``now`` of the pool and the start, one behind the other."""
    meta = {k: v for k, v in start.meta.items() if k not in ("recipe", "selection", "rows")}
    for key in {"text", "rows"} & start.meta.keys() & pool.meta.keys():
        values = [*pool.meta[key], *start.meta[key]]
        meta[key] = [values[i] for i in now]
    parts = {}
    for name in ("embeds", "mask", "free", "tokens"):
        first, last = getattr(pool, name).transpose(1, -1), getattr(start, name).transpose(1, -1)
        longest = max(first.shape[-1], last.shape[-1])
        first, last = (torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in (first, last))
        parts[name] = torch.cat([first, last])[now].transpose(1, -1).contiguous()
    return dataclasses.replace(start, **parts, step_sizes=None, meta=meta | {"search": search})


def nearest_sentences(distilled: DistilledSet, task: Task, student: Student) -> DistilledSet:
    """For each example the real training sentence of its class whose representation is nearest, each used once.

    Args:
        distilled: a set of a classification task, embeddings or text.

    Returns:
        a set of real sentences with hard labels and no recipe.
    """
    check_are(distilled=(distilled, DistilledSet), task=(task, Task), student=(student, Student))
    distilled.check_table(student)
    distilled = distilled.in_classes(task.classes, f"task {task.name!r}")
    real = sentence_features(task, student)
    with torch.no_grad():
        x = student.features({"inputs_embeds": distilled.embeds, "attention_mask": distilled.mask.long()})
    x = torch.nn.functional.normalize(x.float(), dim=1).cpu().numpy()
    names, rows = np.array(distilled.label_names()), []
    for name, pool in zip(task.classes, task.rows_by_class("train"), strict=True):
        chosen: list[int] = []
        for example in np.flatnonzero(names == name):
            near = pool[np.argsort(-(real[pool] @ x[example]), kind="stable")]
            chosen.append(int(next(row for row in near if row not in chosen)))
        rows.append(chosen)
    sentences = DistilledSet.from_rows(task, student, rows, length=distilled.embeds.shape[1])
    sentences.meta["selection"] = {"method": "nearest sentences"}
    return sentences
