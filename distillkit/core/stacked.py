"""Several training runs at once: their parameters stacked, each kernel called once for all of them.

A small student on a GPU is bound by the number of kernels it starts, not by what they compute: one outer step of a set of six
sentences takes about as long as one of sixty.  So sets, or several initialisations of one set, can share their kernels.  Each
run is a *member*.  Parameters get a new first axis, ``[n, …]``; ``torch.func.vmap`` lets the model and the inner optimiser see
one member at a time; and as no member's loss depends on another's parameters, the gradient of the sum of the losses holds the
gradient of each.  A strategy of :mod:`distillkit.core.metagrad` takes the stacked :class:`~distillkit.core.problem.Problem` as
any other.

Exact strategies give what they give for each member alone, up to rounding.
:class:`~distillkit.core.metagrad.ForwardDifference` chooses one ε for all members, by their joint norms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from distillkit.core.optimizers import Optimizer, State
from distillkit.core.problem import MetaGradient, Problem, RealLoss, solved
from distillkit.core.student import Batch, Params, Student
from distillkit.data.tasks import NO_TARGET
from distillkit.io.checks import require


class StackedStudent:
    """``members`` copies of a student with parameters of their own, ``[n, …]``; what it does not define is the student's."""

    def __init__(self, student: Student, members: int):
        self.student, self.members = student, members

    def __getattr__(self, name: str):
        if name == "student":  # not set yet, as in a copy
            raise AttributeError(name)
        return getattr(self.student, name)

    def losses(self, params: Params, batch: Batch, targets: Tensor) -> Tensor:
        """The loss of each member, ``[n]``, on its own part of a batch ``[n · b, …]``."""
        parts = {name: values.unflatten(0, (self.members, -1)) for name, values in batch.items()}
        return torch.func.vmap(self.student.loss)(params, parts, targets.unflatten(0, (self.members, -1)))

    def loss(self, params: Params, batch: Batch, targets: Tensor, *, dropout_seed: int | None = None) -> Tensor:
        """The sum of :meth:`losses`; there is no dropout."""
        require(dropout_seed is None, "stacked runs have no dropout; take dropout=False, or run them one after the other")
        return self.losses(params, batch, targets).sum()


@dataclasses.dataclass(frozen=True)
class StackedOptimizer:
    """An inner optimiser that sees one member at a time; ``step_size`` is ``[n]``."""

    optimizer: Optimizer

    @property
    def step_size(self) -> float:
        return self.optimizer.step_size

    def init(self, params: Params) -> State:
        return self.optimizer.init(params)

    def update(self, params: Params, grads: Params, state: State, step_size: Tensor) -> tuple[Params, State]:
        """As :meth:`~distillkit.core.optimizers.Optimizer.update`; what of the state is no tensor is common to all members."""
        shared: dict[str, Any] = {}

        def of_member(params: Params, grads: Params, tensors: list[Tensor], step_size: Tensor):
            new, new_state = self.optimizer.update(params, grads, _with_tensors(state, tensors), step_size)
            shared["state"] = new_state
            return new, _tensors(new_state)

        new, tensors = torch.func.vmap(of_member)(params, grads, _tensors(state), step_size)
        return new, _with_tensors(shared["state"], tensors)


def _tensors(state: State) -> list[Tensor]:
    return [value for value in tree_flatten(state)[0] if isinstance(value, Tensor)]


def _with_tensors(state: State, tensors: Sequence[Tensor]) -> State:
    """``state`` with its tensors replaced, in the order of :func:`_tensors`."""
    values, tree = tree_flatten(state)
    replaced = iter(tensors)
    return tree_unflatten([next(replaced) if isinstance(value, Tensor) else value for value in values], tree)


def stackable(problems: Sequence[Problem]) -> bool:
    """Whether problems differ only in what can be stacked: parameters, sets of one shape, and real batches of one size."""
    if not all(isinstance(problem, Problem) for problem in problems):
        return False
    first = problems[0]
    plain = all(p.micro_batch is None and p.dropout_seed is None and p.state is None and not p.first_step
                and p.unused_sizes is None for p in problems)
    return plain and all(
        p.student.module is first.student.module
        and p.optimizer == first.optimizer
        and _sizes(p) == _sizes(first)
        and len(p.rows) == len(first.rows) and all(map(torch.equal, p.rows, first.rows))
        and all(isinstance(part, RealLoss) for part in p.outer)
        and [(part.share, len(part.labels)) for part in p.outer] == [(part.share, len(part.labels)) for part in first.outer]
        for p in problems
    )


def _sizes(problem: Problem) -> tuple:
    """What the sets of stacked problems have in common; responses, which are hard targets, may be of any length."""
    targets = problem.targets
    labels = problem.attention is not None and problem.attention.shape
    soft = targets.is_floating_point() and targets.shape
    return problem.embeds.shape, problem.step_sizes.shape, targets.dtype, soft, labels, problem.attention_weight


def stack(problems: Sequence[Problem]) -> Problem:
    """n problems that are :func:`stackable` as one, whose sets ``[n · m, l, d]`` follow each other; step sizes are ``[T, n]``.

    A strategy that draws takes the first problem's seed for all.
    """
    first, members = problems[0], len(problems)
    student, size = StackedStudent(first.student, members), len(first.embeds)
    return dataclasses.replace(
        first,
        student=student,
        optimizer=StackedOptimizer(first.optimizer),
        params={name: torch.stack([p.params[name] for p in problems]) for name in first.params},
        step_sizes=torch.stack([p.step_sizes for p in problems], 1),
        rows=[torch.cat([rows + member * size for member in range(members)]) for rows in first.rows],
        outer=[_stacked_loss(student, parts) for parts in zip(*(p.outer for p in problems), strict=True)],
        embeds=torch.cat([p.embeds for p in problems]),
        mask=torch.cat([p.mask for p in problems]),
        targets=_joined([p.targets for p in problems], NO_TARGET),
        attention=None if first.attention is None else torch.cat([p.attention for p in problems]),
    )


def _stacked_loss(student: StackedStudent, parts: Sequence[RealLoss]) -> Callable[[Params], Tensor]:
    """The share of the outer losses ``[n]`` that one part of each member's real batch contributes."""
    batch = {name: _joined([part.batch[name] for part in parts], 0) for name in parts[0].batch if name != "labels"}
    labels = _joined([part.labels for part in parts], NO_TARGET)
    return lambda params: parts[0].share * student.losses(params, batch, labels)


def _joined(tensors: Sequence[Tensor], fill: int) -> Tensor:
    """Rows of several tensors below each other, short ones filled up on the right."""
    if tensors[0].ndim == 1:
        return torch.cat([*tensors])
    return pad_sequence([row for tensor in tensors for row in tensor], batch_first=True, padding_value=fill)


def meta_gradients(strategy: Callable[[Problem], MetaGradient], problems: Sequence[Problem]) -> list[MetaGradient]:
    """The meta-gradient of each problem: all computed at once where they are :func:`stackable`, else one after the other."""
    members = len(problems)
    if members == 1 or not stackable(problems):
        return [solved(strategy, problem) for problem in problems]
    joint = strategy(stack(problems))
    embeds, targets, attention = ([None] * members if values is None else values.chunk(members)
                                  for values in (joint.embeds, joint.targets, joint.attention))
    return [MetaGradient(*values)
            for values in zip(joint.loss, embeds, targets, joint.step_sizes.unbind(1), attention, strict=True)]
