"""What settings describe, built: corpus, strategy, recipe, inner loop, and the set that learning starts from."""

from __future__ import annotations

from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Unroll
from distillkit.core.metagrad import ForwardDifference, Replay
from distillkit.core.optimizers import SGD, Optimizer
from distillkit.core.student import Student
from distillkit.data.load import load_task
from distillkit.data.tasks import Task
from distillkit.evaluation.recipes import Standard, Tuned
from distillkit.evaluation.selection import select
from distillkit.experiments.settings import Data


def load_corpus(settings: Data, *, seed: int = 0) -> Task:
    """The task that settings name."""
    return load_task(settings.corpus, max_length=settings.max_length, limit=settings.limit, seed=seed,
                     text_column=settings.text_column, label_column=settings.label_column)


def strategy(metagrad: str | None):
    """The strategy of meta-gradients that settings name; None, by which an objective takes what suits its student."""
    return {"replay": Replay(), "forward_difference": ForwardDifference()}.get(metagrad or "")


def recipe_of(settings, recipe):
    """The recipe "standard" or "tuned" with the steps and the grid that settings name; any other recipe as it is."""
    if recipe == "standard":
        return Standard(least_steps=settings.standard_steps)
    return Tuned(settings.tuned_grid) if recipe == "tuned" else recipe


def unroll_of(settings, *, steps: int | None = None, optimizer: Optimizer | None = None, **more) -> Unroll:
    """The inner loop that settings describe, by default of SGD; ``more`` is as :class:`~distillkit.core.inner.Unroll` takes."""
    return Unroll(steps or settings.unroll_steps, optimizer=optimizer or SGD(settings.first_step_size(steps)),
                  batch_size=settings.inner_batch, **more)


def start_of(settings, task: Task, student: Student, seed: int) -> DistilledSet:
    """The examples that distilling starts from, as settings say; classes become soft labels."""
    if settings.start == "random":
        return DistilledSet.from_real(task, student, **settings.size(seed))
    selected = select(task, student, settings.start, **settings.size(seed))
    return selected.soften() if task.classes else selected
