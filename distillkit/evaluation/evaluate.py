"""Honest scores: train fresh students on a set, score them on held-out real data.

:func:`evaluate` is the whole protocol.  For each seed it draws a fresh student, trains it as the recipe says
(:mod:`distillkit.evaluation.recipes`), and scores it on a split that neither the set nor the recipe has seen
(:mod:`distillkit.evaluation.scoring`).  A recipe gives a plan, and the plan makes the kit's one inner step.

A score belongs to a recipe, so every :class:`Evaluation` names its own.  Initialisations for scoring, for tuning and for
distilling come from disjoint seed streams.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from torch.utils.flop_counter import FlopCounterMode

from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Unroll, inner_step
from distillkit.core.student import Params, Student
from distillkit.data.tasks import Task
from distillkit.evaluation.recipes import Plan, Recipe, as_recipe
from distillkit.evaluation.scoring import answered, has_accuracy, mean_and_std, response_loss
from distillkit.io.checks import check_are, check_is, check_seeds, require
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The score of a set under one recipe.

    Classes and multiple choice are scored by accuracy.  Where the scored split has rows without choices, ``losses`` holds the
    scores instead; ``mean``, ``std`` and each of ``scores`` are then nan, and ``groups`` is empty.

    Attributes:
        mean, std: accuracy over the seeds, std with n − 1 (nan for one seed).
        scores: one accuracy per seed.
        groups: accuracy by class, or by kind of question or subject, mean over the seeds.
        seconds: duration of one training run without scoring, mean over the seeds.
        flops: floating-point operations of one training run.
        examples, nbytes: size of what was trained on.
        recipe: how it was trained, as JSON values.
        normalized: multiple choice by length-normalised log-likelihood, one accuracy per seed; otherwise None.
        losses: where there are no choices: mean negative log-likelihood (nats) of the split's response tokens, one value
            per seed; otherwise None.
        also: accuracy of the same students on further tasks, if there are any: the name of each, and one accuracy per seed.
    """

    mean: float
    std: float
    scores: tuple[float, ...]
    groups: dict[str, float]
    seconds: float
    flops: int
    examples: int
    nbytes: int
    recipe: dict
    normalized: tuple[float, ...] | None = None
    losses: tuple[float, ...] | None = None
    also: dict[str, tuple[float, ...]] | None = None

    @property
    def loss(self) -> float | None:
        """The mean of ``losses``."""
        return None if self.losses is None else float(np.mean(self.losses))

    @property
    def worth(self) -> float:
        """One number to compare evaluations on one split by, the higher the better: accuracy, or minus the response loss."""
        return self.mean if self.loss is None else -self.loss

    def score_text(self) -> str:
        """The score in words: mean ± std, without std for a single seed."""
        mean, std = mean_and_std(self.losses or self.scores)
        spread = f" ± {std:.3f}" if len(self.scores) > 1 else ""
        if self.losses is None:
            return f"{mean:.3f}{spread}"
        return f"response loss {mean:.3f}{spread}, perplexity {math.exp(mean):.3g}"

    def __str__(self) -> str:
        return f"{self.score_text()} (n={len(self.scores)}, {self.recipe['name']})"


def evaluate(
    distilled: DistilledSet | None,
    task: Task,
    student: Student,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    recipe: str | Unroll | Recipe | None = None,
    split: str = "test",
    also: Sequence[Task] = (),
) -> Evaluation:
    """Train a fresh student per seed on the set, score each on ``split``.

    The score is accuracy, or the loss of the responses where an instruction task has rows without choices.

    Args:
        distilled: the set; None trains on the task's whole training split (recipe ``"standard"``).
        seeds: one fresh initialisation each, all different.
        recipe: how to train: :class:`~distillkit.evaluation.recipes.Own`, ``Standard``, ``Tuned``, ``Fixed``, their shorthands
            ``"own"``, ``"standard"``, ``"tuned"`` or an :class:`~distillkit.core.inner.Unroll`, or any other
            :class:`~distillkit.evaluation.recipes.Recipe`.  Default: own where one is stored, otherwise tuned.
        split: ``"test"``, ``"validation"`` or ``"train"``.
        also: further tasks of multiple choice, such as MMLU, whose ``split`` the same trained students answer.

    Raises:
        ValueError: ``"own"`` for a set without a recipe, an unknown recipe or split, no seeds or repeated ones, another
            model's embeddings, classes of other names.  The same class names in another order are matched by name.  Or a
            further task of another kind, or with rows without choices.
    """
    if distilled is not None:
        check_is("distilled", distilled, DistilledSet)
    check_are(task=(task, Task), student=(student, Student))
    check_seeds("seeds", seeds)
    student = student.for_task(task)
    distilled = None if distilled is None else distilled.for_student(student)
    task.split(split)  # an unknown name is an error before anything is trained
    _check_further(also, student, split)
    plan_of_seed = as_recipe(_default_recipe(distilled) if recipe is None else recipe).plan(distilled, task, student)
    accuracy, outcomes, further, seconds = has_accuracy(task, split), [], [], []
    for seed in progress(seeds, desc="evaluating", unit="run", leave=False):
        plan = plan_of_seed(seed)
        start = student.init(derive_seed("evaluate-init", seed))
        begin = time.perf_counter()
        *_, params = collections.deque(plan.train(student, start), maxlen=1)
        seconds.append(time.perf_counter() - begin)
        outcomes.append((answered if accuracy else response_loss)(student, params, task, split))
        further.append([float(answered(student, params, other, split)[0].mean()) for other in also])
    fields = {"scores": (math.nan,) * len(seeds), "groups": {}, "losses": tuple(outcomes)}
    if accuracy:
        fields = _accuracies(task, split, outcomes)
    mean, std = mean_and_std(fields["scores"])
    columns = ("text",) if task.kind == "classification" else ("prompt", "response")
    return Evaluation(
        mean, std, **fields,
        seconds=float(np.mean(seconds)),
        flops=_flops(plan, student, params),
        examples=len(task.train) if distilled is None else len(distilled),
        nbytes=sum(len(text.encode()) for c in columns for text in task.train[c]) if distilled is None else distilled.nbytes,
        recipe=plan.recipe,
        also=dict(zip((other.name for other in also), zip(*further, strict=True), strict=True)) or None,
    )


def _check_further(also: Sequence[Task], student: Student, split: str) -> None:
    """Raise TypeError or ValueError unless a student can be scored by accuracy on each of the further tasks."""
    require(isinstance(also, Sequence), f"also must list tasks, not {also!r}", TypeError)
    for other in also:
        check_is("each of also", other, Task)
        student.for_task(other)
        require(has_accuracy(other, split), f"also: task {other.name!r} has rows without choices in its split {split!r}, and "
                "its score is an accuracy; add choices, or leave the task out")
    names = [other.name for other in also]
    require(len({*names}) == len(names), f"also names a task twice: {', '.join(names)}; scores are kept by name")


def _default_recipe(distilled: DistilledSet | None) -> str:
    if distilled is None or "recipe" in distilled.meta:
        return "standard" if distilled is None else "own"
    if distilled.step_sizes is not None:
        warnings.warn("the set has step sizes and no stored recipe that uses them, so it is scored under the tuned recipe; "
                      "pass recipe=… to choose another", stacklevel=3)
    return "tuned"


def _accuracies(task: Task, split: str, outcomes: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The accuracies of an :class:`Evaluation` from the result of :func:`answered` for each run."""
    plain, by_length = (np.stack(right).astype(float) for right in zip(*outcomes, strict=True))  # [seeds, rows]
    classes = task.kind == "classification"
    group = np.array(task.classes)[task.labels(split)] if classes else np.array(task.split(split)["group"][:])
    shares = pd.DataFrame(plain.T).groupby(group, sort=False).mean().mean(axis=1)
    return {"scores": tuple(plain.mean(1).tolist()), "groups": shares.reindex(task.classes or shares.index).to_dict(),
            "normalized": None if classes else tuple(by_length.mean(1).tolist())}


def flop_counter() -> FlopCounterMode:
    """A counter of floating-point operations in total, forward and backward."""
    counter, total_only = FlopCounterMode(display=False), cast("Any", contextlib.nullcontext())
    # Counts by module need hooks on every module's inputs, which fail where an input is a parameter (DeBERTa's positions).
    total_only.parents = {"Global"}
    counter.mod_tracker = total_only
    return counter


def _flops(plan: Plan, student: Student, params: Params) -> int:
    """Operations of a training run, counted on up to eight evenly spaced steps; the values of ``params`` do not matter."""
    steps = len(plan.step_sizes)
    sample = range(0, steps, -(-steps // 8))
    return sum(_flops_of_step(plan, student, params, t) for t in sample) * steps // len(sample)


def _flops_of_step(plan: Plan, student: Student, params: Params, t: int) -> int:
    """Operations of step ``t``; steps of one optimiser on micro-batches of the same shapes are counted once per student."""
    parts = list(plan.feed(t))
    shapes = [({name: tuple(tensor.shape) for name, tensor in batch.items()}, tuple(targets.shape), targets.dtype)
              for _, batch, targets, _ in parts]
    key = f"flops: {plan.optimizer!r} {shapes}"
    if key not in student.cache:
        with flop_counter() as counter:
            inner_step(student, plan.optimizer, params, plan.optimizer.init(params), parts, plan.step_sizes[t])
        student.cache[key] = counter.get_total_flops()
    return student.cache[key]
