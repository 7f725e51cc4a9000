"""Objectives: what a distilled set is scored by while it is learned.

:class:`BPTT` is the direct one, *backpropagation through time*: train a student on the set, take its loss on a batch of
real data, and send the gradient back through the training run (Maclaurin et al., 2015; Wang et al., 2018, "Dataset
distillation"; for text Sucholutsky & Schonlau, 2021, and Maekawa et al., 2023).  Each call draws a fresh initialisation
and a fresh real batch from its seed, because a set distilled for one known initialisation is good for that one only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from distillkit.distilled import DistilledSet
from distillkit.inner import Unroll
from distillkit.metagrad import MetaGradient, Problem
from distillkit.seeds import derive_seed, generator
from distillkit.students import Params, Student
from distillkit.tasks import Task


@dataclasses.dataclass(frozen=True, eq=False)
class BPTT:
    """Loss on real training data after the inner loop.

    Args:
        task: where the real batches come from (its training split, classes balanced).
        student: what trains on the set.
        unroll: how it trains.
        batch_size: real examples an outer step.
        micro_batch: how many of them at a time; the gradient is the same, memory and padding are less.
        inits: initialisations whose meta-gradients are averaged in one outer step, on the same real batch.
    """

    task: Task
    student: Student
    unroll: Unroll
    _: dataclasses.KW_ONLY
    batch_size: int = 64
    micro_batch: int = 16
    inits: int = 1

    def __post_init__(self):
        for name in ("micro_batch", "inits"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not isinstance(self.batch_size, int) or not 1 <= self.batch_size <= len(self.task.train):
            raise ValueError(
                f"batch_size must be a whole number from 1 to the {len(self.task.train)} training rows, "
                f"not {self.batch_size!r}"
            )

    def problems(self, distilled: DistilledSet, seed: int) -> Iterator[Problem]:
        """One problem for each of the ``inits``, made when its turn comes."""
        return (self.problem(distilled, seed, member) for member in range(self.inits))

    def problem(self, distilled: DistilledSet, seed: int, member: int = 0) -> Problem:
        """The inner training run and outer loss that ``seed`` stands for; ``member`` counts the ``inits``."""
        student, task = self.student, self.task
        rows = task.balanced_rows("train", self.batch_size, generator("distil-batch", seed))
        # Rows of like length together: short sentences are not padded to the longest of the batch.
        lengths = task.token_ids(student.tokenizer, "train")
        rows = sorted(rows.tolist(), key=lambda row: len(lengths[row]))
        parts = [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)]
        outer = [self._part(part) for part in parts]
        return inner_problem(distilled, student, self.unroll, derive_seed("distil-init", seed, member), outer)

    def _part(self, rows: list[int]):
        """The share of the outer loss that ``rows`` contribute, as a function of the parameters."""
        real = self.task.batch(self.student.tokenizer, "train", rows)
        labels = real["labels"].to(self.student.device)
        share = len(rows) / self.batch_size

        def loss(params: Params) -> torch.Tensor:
            return share * self.student.loss(params, real, labels)

        return loss

    def recipe(self) -> dict:
        """How to train on what this objective distils, as JSON values."""
        return {
            "objective": type(self).__name__,
            "student": self.student.name,
            "trainable": self.student.trainable,
            "weights": self.student.weights,
            "outer_batch_size": self.batch_size,
            "inits": self.inits,
            "metagrad": repr(self.unroll.metagrad),
            **self.unroll.recipe(),
        }


def inner_problem(distilled: DistilledSet, student: Student, unroll: Unroll, init_seed: int, outer) -> Problem:
    """Bind a set to a student: the training run from ``student.init(init_seed)`` on the set, and ``outer`` at its end."""
    if distilled.embeds.shape[-1] != student.width:
        raise ValueError(
            f"the set's embeddings are {distilled.embeds.shape[-1]} wide, student {student.name!r} wants "
            f"{student.width}: they belong to another model; go through text (dk.project, then that student)"
        )
    move = {"device": student.device, "dtype": student.dtype}
    return Problem(
        student=student,
        optimizer=unroll.optimizer,
        params=student.init(init_seed),
        embeds=distilled.embeds.to(**move),
        mask=distilled.mask.to(student.device),
        targets=distilled.targets.to(**move) if distilled.soft else distilled.targets.to(student.device),
        step_sizes=bound_step_sizes(distilled, unroll).to(**move),
        rows=unroll.rows(len(distilled)),
        outer=outer,
        micro_batch=unroll.micro_batch,
        dropout_seed=init_seed if unroll.dropout else None,
    )


def bound_step_sizes(distilled: DistilledSet, unroll: Unroll) -> torch.Tensor:
    """The set's own step sizes, ``[t]``, or the optimiser's at every step if it has none yet."""
    if distilled.step_sizes is None:
        return torch.full((unroll.steps,), float(unroll.optimizer.step_size))
    if len(distilled.step_sizes) != unroll.steps:
        raise ValueError(
            f"the set carries {len(distilled.step_sizes)} step sizes but the unroll has {unroll.steps} steps; use the "
            "unroll it was distilled with, or set step_sizes to None"
        )
    return distilled.step_sizes


def meta_gradient(distilled: DistilledSet, objective, *, seed: int = 0) -> MetaGradient:
    """Gradient of the objective with respect to the set, at one seeded initialisation and real batch.

    Args:
        distilled: the set φ.
        objective: :class:`BPTT`.
        seed: stands for the student's initialisation and the real batch.
    """
    metagrad = objective.unroll.metagrad
    return MetaGradient.mean([metagrad(problem) for problem in objective.problems(distilled, seed)])
