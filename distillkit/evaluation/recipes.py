"""Recipes: how a fresh student is trained on a set before it is scored.

A score belongs to a recipe, so a recipe is an object and every score records it:

* :class:`Own`: the recipe stored with a distilled set, its learned step sizes included.
* :class:`Standard`: AdamW fine-tuning with published settings (Devlin et al., 2019; Mosbach et al., 2021).
* :class:`Tuned`: AdamW at the best point of a grid, judged on the validation split.  The same grid for every set gives a set
  without a recipe, such as selected real sentences, a fair chance.
* :class:`Fixed`: the optimiser and the steps of an :class:`~distillkit.core.inner.Unroll`.

A custom recipe is any object with the method ``plan`` of :class:`Recipe`.  The method looks at the set, the task and the
student once and returns a function from a seed to a :class:`Plan`; :func:`~distillkit.evaluation.evaluate.evaluate` asks for
one plan per seed, trains it and scores the result.  The strings "own", "standard" and "tuned" are shorthand (:data:`NAMED`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Part, Unroll, from_recipe, inner_step, lengths_of, set_parts
from distillkit.core.optimizers import AdamW, Optimizer, check_optimizer, described
from distillkit.core.problem import bound_step_sizes
from distillkit.core.student import Params, Student
from distillkit.data.tasks import Task
from distillkit.evaluation.scoring import has_accuracy, worth
from distillkit.io.checks import check_is, check_number, check_whole, check_wholes, require
from distillkit.io.deadline import Deadline
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator

GRIDS = {"classification": {"step_size": (1e-4, 3e-4, 1e-3), "steps": (10, 30, 60)},
         "instruction": {"step_size": (3e-4, 1e-3, 3e-3), "steps": (30, 60, 120)}}
EPOCHS = 3  # passes of the standard recipe
BATCH, MICRO_BATCH = 32, 16  # 16 examples of like length at a time: less padding


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training run.

    Attributes:
        optimizer: makes the steps.
        step_sizes: one for each of the t steps, ``[t]``.
        feed: step number → the micro-batches that the step sees, as :func:`~distillkit.core.inner.set_parts` gives them.
        recipe: how the run trains, as JSON values with a ``name``; noted in the score.
    """

    optimizer: Optimizer
    step_sizes: Tensor
    feed: Callable[[int], Iterable[Part]]
    recipe: dict

    def train(self, student: Student, params: Params) -> Iterator[Params]:
        """The parameters after each step; the next step may overwrite them, so read them before it."""
        state = self.optimizer.init(params)
        for t, step_size in enumerate(self.step_sizes):
            params, state, *_ = inner_step(student, self.optimizer, params, state, self.feed(t), step_size, in_place=True)
            yield params


class Recipe(Protocol):
    """The interface of a recipe."""

    def plan(self, distilled: DistilledSet | None, task: Task, student: Student) -> Callable[[int], Plan]:
        """Decide how to train on a set; returns a function from the seed of a run to its plan.

        Args:
            distilled: the set, its classes in the student's order; None: the task's whole training split.
            task: what the student is scored on.  Look at its validation split for choices, never at its test split.
            student: draws its initialisation elsewhere, from the same seed.
        """


@dataclasses.dataclass(frozen=True)
class Own:
    """The recipe a distilled set carries, with its learned step sizes.

    Args:
        optimizer: the inner optimiser, if it is one of your own: a stored recipe holds its name only.  Default: the one
            that the set's recipe describes.
    """

    optimizer: Optimizer | None = None

    def __post_init__(self):
        if self.optimizer is not None:
            check_optimizer(self.optimizer)

    def plan(self, distilled: DistilledSet | None, task: Task, student: Student) -> Callable[[int], Plan]:
        """As :meth:`Recipe.plan`; raises ValueError for a set without a recipe, or one that trains other parameters."""
        distilled = _checked_set(distilled, self)
        require("recipe" in distilled.meta,
                "recipe='own' asked for, but this set carries none (a selected set has none, and one that moves to another "
                "model leaves its own behind); use 'tuned' or 'standard'")
        stored = distilled.meta["recipe"]
        require(stored.get("trainable", student.trainable) == student.trainable,
                f"recipe='own' trains {stored.get('trainable')!r} parameters, the student was loaded with trainable="
                f"{student.trainable!r}; load the student with the set's value, or choose another recipe")
        unroll = from_recipe(stored, self.optimizer)
        step_sizes = bound_step_sizes(distilled, unroll, student)
        recipe = {"name": "own", "step_sizes": step_sizes.tolist(), **unroll.recipe()}
        return lambda seed: set_plan(distilled, student, unroll, recipe, seed=seed, step_sizes=step_sizes)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The optimiser, step size and steps of an :class:`~distillkit.core.inner.Unroll`; learned step sizes are ignored."""

    unroll: Unroll

    def __post_init__(self):
        check_is("unroll", self.unroll, Unroll)

    def plan(self, distilled: DistilledSet | None, task: Task, student: Student) -> Callable[[int], Plan]:
        """As :meth:`Recipe.plan`."""
        distilled, recipe = _checked_set(distilled, self), {"name": "unroll", **self.unroll.recipe()}
        return lambda seed: set_plan(distilled, student, self.unroll, recipe, seed=seed)


@dataclasses.dataclass(frozen=True)
class Standard:
    """AdamW fine-tuning with published settings, linear warm-up over a tenth of the steps and linear decay.

    AdamW has weight decay 0.01 and step size 5e-5 for classifiers (Devlin et al., 2019), 2e-4 for LoRA (Dettmers et al., 2023),
    and 1e-3 for all parameters of language models as small as the offline ones.

    Three epochs of a few examples train nothing (Mosbach et al., 2021), so there is a least number of steps.  A language
    model that knows its subject loses more than it gains by many passes over a few pairs, so its least number is lower.

    There are three passes over the set.

    Args:
        least_steps: steps in any case; default: 200 for classifiers, 60 for language models.

    Raises:
        ValueError: a number of steps below 1.
    """

    least_steps: int | None = None

    def __post_init__(self):
        if self.least_steps is not None:
            check_whole("least_steps", self.least_steps)

    def plan(self, distilled: DistilledSet | None, task: Task, student: Student) -> Callable[[int], Plan]:
        """As :meth:`Recipe.plan`; the seed also decides the order of the examples."""
        language = student.kind != "classification"
        examples = len(task.split("train")) if distilled is None else len(distilled)
        steps = max(EPOCHS * -(-examples // BATCH), self.least_steps or (60 if language else 200))
        optimizer = AdamW(5e-5 if not language else 2e-4 if student.trainable == "lora" else 1e-3, weight_decay=0.01)
        step_sizes = warm_up_and_decay(steps, optimizer.step_size)
        recipe = {"name": "standard", "steps": steps, "optimizer": described(optimizer), "batch_size": BATCH,
                  "schedule": "linear warm-up over 10 % of the steps, linear decay"}
        if distilled is None:
            return lambda seed: Plan(optimizer, step_sizes, _all_rows(task, student, steps, seed), recipe)
        unroll = Unroll(steps, optimizer=optimizer, batch_size=BATCH, micro_batch=MICRO_BATCH)
        return lambda seed: set_plan(distilled, student, unroll, recipe, seed=seed, order=seed, step_sizes=step_sizes)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """AdamW with the constant step size and the number of steps that score best on the validation split.

    The score of a grid point is the mean of accuracy, or of minus the response loss, over the initialisations (one where the
    student draws nothing at random).  The initialisations come from their own seed stream.  The validation rows are balanced
    over the classes.  Of equal points the one with fewer steps wins, then the one with the smaller step size.

    Args:
        grid: {"step_size": sizes, "steps": numbers of steps}; default: the one of :data:`GRIDS` for the kind of task.
        initialisations: that each point is tried on.
        rows: the most validation rows that are scored.

    Raises:
        ValueError: a grid without one of its two lists, or a number out of range.
    """

    grid: Mapping[str, Sequence] | None = None
    _: dataclasses.KW_ONLY
    initialisations: int = 2
    rows: int = 300

    def __post_init__(self):
        check_wholes(initialisations=self.initialisations, rows=self.rows)
        if self.grid is None:
            return
        lists = isinstance(self.grid, Mapping) and all(isinstance(v, Sequence) and v for v in self.grid.values())
        require(lists and {*self.grid} == {"step_size", "steps"},
                f"grid must list step_size and steps, such as {GRIDS['classification']}, not {self.grid!r}")
        for step_size in self.grid["step_size"]:
            check_number("grid['step_size']", step_size, without="least")
        for steps in self.grid["steps"]:
            check_whole("grid['steps']", steps)

    def plan(self, distilled: DistilledSet | None, task: Task, student: Student) -> Callable[[int], Plan]:
        """As :meth:`Recipe.plan`; the seed also decides the order of the examples."""
        distilled, grid = _checked_set(distilled, self), self.grid or GRIDS[student.kind]
        scores = self._scores(distilled, task, student, grid)
        # A loss that is not a number is the worst.
        means = {p: np.round(np.nan_to_num(np.mean(values), nan=-np.inf, neginf=-np.inf), 6) for p, values in scores.items()}
        steps, step_size = best = max(means, key=lambda point: (means[point], -point[0], -point[1]))
        validation, unroll = float(np.mean(scores[best])), _adamw(steps, step_size)
        recipe = {"name": "tuned", **unroll.recipe(), "grid": {name: list(values) for name, values in grid.items()}}
        recipe |= {"validation": validation} if has_accuracy(task, "validation") else {"validation_loss": -validation}
        return lambda seed: set_plan(distilled, student, unroll, recipe, seed=seed, order=seed)

    def _scores(self, distilled, task: Task, student: Student, grid) -> dict[tuple[int, float], list[float]]:
        """The validation score of each grid point (steps, step size) under each initialisation."""
        recipes = [(AdamW(step_size), steps) for step_size in grid["step_size"] for steps in grid["steps"]]
        scores = grid_scores(distilled, task, student, recipes, split="validation", rows=tuning_rows(task, self.rows),
                             starts=tuning_starts(student, self.initialisations))
        return {(steps, optimizer.step_size): values for (optimizer, steps), values in scores.items()}


def tuning_rows(task: Task, most: int) -> np.ndarray:
    """The validation rows, at most so many, that choices are made on; balanced over the classes."""
    return task.balanced_rows("validation", min(most, len(task.validation)), generator("tune-rows", 0)).numpy()


def tuning_starts(student: Student, initialisations: int) -> list[int]:
    """Seeds of the initialisations that choices are made on: one where the student draws nothing at random."""
    return [derive_seed("tune-init", seed) for seed in range(initialisations if student.draws else 1)]


def grid_scores(
    distilled: DistilledSet, task: Task, student: Student, recipes: Iterable[tuple[Optimizer, int]], *,
    split: str, starts: Sequence[int], rows: np.ndarray | None = None,
) -> dict[tuple[Optimizer, int], list[float]]:
    """The score of a set under each recipe, a value for each initialisation.

    Args:
        distilled: the set, its classes in the student's order.
        recipes: optimisers, which train with their own step size throughout, and numbers of steps.
        split, rows: what is scored; default: all rows of the split.
        starts: seeds of the initialisations, as ``student.init`` takes them.
    """
    steps_of, scores = collections.defaultdict(set), collections.defaultdict(list)
    for optimizer, steps in recipes:
        steps_of[optimizer].add(steps)
    for optimizer, steps in progress(steps_of.items(), desc="recipes", unit="step size", leave=False):
        unroll = Unroll(max(steps), optimizer=optimizer, batch_size=BATCH, micro_batch=MICRO_BATCH)
        plan = set_plan(distilled, student, unroll, {}, seed=0)
        for start in starts:
            # As the step size is constant, one run passes through all numbers of steps.
            for taken, params in enumerate(plan.train(student, student.init(start)), start=1):
                if taken in steps:
                    scores[optimizer, taken].append(worth(student, params, task, split, rows))
    return scores


NAMED: Mapping[str, Recipe] = {"own": Own(), "standard": Standard(), "tuned": Tuned()}


def as_recipe(recipe) -> Recipe:
    """A recipe from its name, from an :class:`~distillkit.core.inner.Unroll` (:class:`Fixed`), or as it is.

    Raises:
        ValueError: none of these.
    """
    if isinstance(recipe, Unroll):
        return Fixed(recipe)
    chosen = NAMED.get(recipe) if isinstance(recipe, str) else recipe
    require(callable(getattr(chosen, "plan", None)) and not isinstance(chosen, type),
            f"recipe must be {', '.join(map(repr, NAMED))}, an Unroll, or an object with plan, not {recipe!r}")
    return cast("Recipe", chosen)


@dataclasses.dataclass(frozen=True)
class Until:
    """A recipe whose training runs end with :class:`~distillkit.io.deadline.TimeUp` at the first step after a deadline."""

    recipe: Recipe | Unroll | str
    deadline: Deadline

    def plan(self, distilled: DistilledSet | None, task: Task, student: Student) -> Callable[[int], Plan]:
        """As :meth:`Recipe.plan`."""
        plan_of_seed = as_recipe(self.recipe).plan(distilled, task, student)

        def timed(seed: int) -> Plan:
            plan = plan_of_seed(seed)

            def feed(t: int):
                self.deadline.check()
                return plan.feed(t)

            return dataclasses.replace(plan, feed=feed)

        return timed


def set_plan(
    distilled: DistilledSet, student: Student, unroll: Unroll, recipe: dict, *, seed: int, order: int = 0,
    step_sizes: Tensor | None = None,
) -> Plan:
    """The plan that trains on a set by the optimiser and the batches of ``unroll``.

    Args:
        recipe: to note in the score.
        seed: of dropout masks.
        order: of the batches; 0 is the order that sets are distilled in.
        step_sizes: of each step, ``[t]``; default: the optimiser's at every step, not those that the set has learned.
    """
    if step_sizes is None:
        step_sizes = bound_step_sizes(dataclasses.replace(distilled, step_sizes=None), unroll, student)
    tensors, rows = distilled.tensors_on(student.device, student.dtype), unroll.rows(len(distilled), order)
    lengths = lengths_of(distilled.mask)
    masks = derive_seed("evaluate-dropout", seed)

    def feed(t: int) -> Iterable[Part]:
        dropout = (masks, t) if unroll.dropout else None
        return set_parts(rows[t], **tensors, micro_batch=unroll.micro_batch, dropout=dropout, lengths=lengths,
                         attention_weight=unroll.attention_weight)

    return Plan(unroll.optimizer, step_sizes, feed, recipe)


def warm_up_and_decay(steps: int, step_size: float) -> Tensor:
    """Step sizes ``[steps]`` that rise linearly over a tenth of the steps and then fall linearly."""
    t = torch.arange(1, steps + 1, dtype=torch.float32)
    warm = max(1, steps // 10)
    return step_size * torch.minimum(t / warm, (steps + 1 - t) / (steps + 1 - warm))


def _checked_set(distilled: DistilledSet | None, recipe: Recipe) -> DistilledSet:
    if distilled is None:
        raise ValueError(f"the full training split is trained on by recipe='standard' only, not {recipe!r}")
    return distilled


def _adamw(steps: int, step_size: float) -> Unroll:
    return Unroll(steps, optimizer=AdamW(step_size), batch_size=BATCH, micro_batch=MICRO_BATCH)


def _all_rows(task: Task, student: Student, steps: int, seed: int) -> Callable[[int], list[Part]]:
    """The feed of a run over the training split: every row once per epoch, in an order drawn from ``seed``.

    A batch holds rows of like length among 16 batches' worth, which leaves little padding.
    """
    draw, batches = generator("full-data-order", seed), []
    lengths = torch.tensor([len(ids) for ids in task.token_ids(student.tokenizer, "train")])
    while len(batches) < steps:
        pools = torch.randperm(len(lengths), generator=draw).split(16 * BATCH)
        epoch = [batch for pool in pools for batch in pool[lengths[pool].argsort(stable=True)].split(BATCH)]
        batches += [epoch[i] for i in torch.randperm(len(epoch), generator=draw)]

    def feed(t: int) -> list[Part]:
        batch = task.batch(student.tokenizer, "train", batches[t])
        return [(1.0, batch, batch["labels"].to(student.device), None)]

    return feed
