"""What a strategy differentiates: one inner training run, and the loss at its end.

A :class:`Problem` binds a distilled set to a student: where training starts, which examples each step sees, and the outer
loss J(θ_T).  A :class:`MetaGradient` is the answer, ∇J with respect to embeddings, soft labels and step sizes.
:mod:`distillkit.core.metagrad` computes one from the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Part, Phi, Stepped, Unroll, grad, inner_step, leaves, lengths_of, set_parts, summed
from distillkit.core.mixture import Mixture
from distillkit.core.optimizers import Optimizer, State
from distillkit.core.student import Batch, Params, Student
from distillkit.io.checks import require
from distillkit.io.seeds import derive_seed


@dataclasses.dataclass(frozen=True)
class MetaGradient:
    """Gradient of the outer loss with respect to a distilled set.

    Attributes:
        loss: J(θ_T), a float; of stacked runs (:mod:`distillkit.core.stacked`) the list of theirs.
        embeds: ``[m, l, d]``.
        targets: ``[m, c]`` for soft labels, None for hard ones.
        step_sizes: ``[t]``, with respect to the positive step sizes themselves.
        attention: ``[m, layers, heads, l]``, None for a set without attention labels.
    """

    loss: float
    embeds: Tensor
    targets: Tensor | None
    step_sizes: Tensor
    attention: Tensor | None = None

    @classmethod
    def mean(cls, members: Sequence[MetaGradient]) -> MetaGradient:
        """The average of meta-gradients taken at several initialisations or experts."""
        fields = zip(*(vars(member).values() for member in members), strict=True)
        return cls(*(None if values[0] is None else sum(values) / len(values) for values in fields))


@dataclasses.dataclass(frozen=True, eq=False)
class RealLoss:
    """The share of the outer loss that some real rows contribute, as a function of the parameters."""

    student: Student
    share: float
    batch: Batch
    labels: Tensor

    def __call__(self, params: Params) -> Tensor:
        return self.share * self.student.loss(params, self.batch, self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One inner training run and the loss at its end.

    Args:
        student, optimizer: what trains, and how.
        params: θ_0.
        embeds, mask, targets, step_sizes: the set φ, ``[m, l, d]``, ``[m, l]``, ``[m, c]`` or ``[m]``, and ``[T]``, on the
            student's device.
        rows: the examples of each step, T index tensors.
        outer: functions of θ_T whose values add up to the scalar J: one for each part of the real batch, so that only one
            part's activations are alive at a time.
        micro_batch: the most examples of an inner step that are alive at a time; None: all.
        dropout_seed: the seed that dropout masks are drawn from; None: no dropout.
        state: the optimiser's state at the start; None: a fresh one.
        seed: the address of this run, which differs between outer steps: strategies draw from it.
        first_step: how many steps of the run came before ``params``, where this is a window of a longer run.
        unused_sizes: the set's own step sizes ``[t]``, where this run does not take them (:mod:`distillkit.core.mixture`).
        attention, attention_weight: the set's attention labels ``[m, layers, heads, l]``, and the weight of their loss.
    """

    student: Student
    optimizer: Optimizer
    params: Params
    embeds: Tensor
    mask: Tensor
    targets: Tensor
    step_sizes: Tensor
    rows: list[Tensor]
    outer: Sequence[Callable[[Params], Tensor]]
    micro_batch: int | None = None
    dropout_seed: int | None = None
    state: State | None = None
    seed: int | None = None
    first_step: int = 0
    unused_sizes: Tensor | None = None
    attention: Tensor | None = None
    attention_weight: float = 1.0

    def __post_init__(self):
        # What the host needs of each step is read once: a read waits for the device.
        object.__setattr__(self, "lengths", lengths_of(self.mask))
        object.__setattr__(self, "orders", [np.asarray(rows) for rows in self.rows])

    def start(self) -> tuple[Params, State]:
        """Parameters and optimiser state at the beginning of the run."""
        return self.params, self.optimizer.init(self.params) if self.state is None else self.state

    def phi(self) -> Phi:
        """Fresh leaves of what is learned at each step."""
        return Phi(leaf(self.embeds), leaf(self.targets) if self.targets.is_floating_point() else None,
                   None if self.attention is None else leaf(self.attention))

    def parts(self, t: int, phi: Phi | None = None) -> Iterator[Part]:
        """The micro-batches of step t, made of the leaves ``phi`` where they are passed."""
        embeds = self.embeds if phi is None else phi.embeds
        targets = self.targets if phi is None or phi.targets is None else phi.targets
        dropout = None if self.dropout_seed is None else (self.dropout_seed, self.first_step + t)
        return set_parts(self.orders[t], embeds, self.mask, targets, micro_batch=self.micro_batch, dropout=dropout,
                         lengths=self.lengths, attention=self.attention if phi is None else phi.attention,
                         attention_weight=self.attention_weight)

    def loss(self, params: Params, t: int, phi: Phi) -> Iterator[Tensor]:
        """ℓ(θ, φ_t) in parts that add up, with a graph."""
        for share, batch, labels, seed in self.parts(t, phi):
            yield share * self.student.loss(params, batch, labels, dropout_seed=seed)

    def step(self, t: int, params: Params, state: State, phi: Phi | None = None) -> Stepped:
        """Inner step t without a graph; see :func:`~distillkit.core.inner.inner_step`."""
        return inner_step(self.student, self.optimizer, params, state, self.parts(t, phi), self.step_sizes[t], phi)

    def trained(self, steps: int) -> tuple[Params, State]:
        """Parameters and optimiser state after so many steps."""
        params, state = self.start()
        for t in range(steps):
            params, state, *_ = self.step(t, params, state)
        return params, state

    def window(self, start: int, stop: int) -> Problem:
        """The steps from ``start`` to ``stop`` − 1 as a problem of their own, after training through those before."""
        params, state = self.trained(start)
        return dataclasses.replace(self, params=params, state=state, rows=self.rows[start:stop],
                                   step_sizes=self.step_sizes[start:stop], first_step=self.first_step + start)

    def with_copies(self) -> Problem:
        """The same run, in which each step sees a copy of the set of its own, so that gradients of φ are told apart by step."""
        steps, examples = len(self.rows), len(self.embeds)
        names = ("embeds", "mask", "targets", *(("attention",) if self.attention is not None else ()))
        copies = {name: torch.cat([getattr(self, name)] * steps) for name in names}
        return dataclasses.replace(self, rows=[rows + t * examples for t, rows in enumerate(self.rows)], **copies)


def solved(strategy: Callable[[Problem], MetaGradient], problem: Problem) -> MetaGradient:
    """∇J by ``strategy``; it is 0 for step sizes that the run did not take.  Objectives may have problems of other kinds."""
    gradient = strategy(problem)
    if not isinstance(problem, Problem) or problem.unused_sizes is None:
        return gradient
    return dataclasses.replace(gradient, step_sizes=torch.zeros_like(problem.unused_sizes))


def inner_problem(
    distilled: DistilledSet, student: Student, unroll: Unroll, seed: int, outer, *, params=None, state=None
) -> Problem:
    """Bind a set to a student: the training run on the set, and ``outer`` at its end.

    It starts from ``student.init(seed)`` with a fresh optimiser, or from ``params`` and ``state``; everything else that is
    drawn in the run is drawn from ``seed`` too: of a :class:`~distillkit.core.mixture.Mixture` the recipe, and the order of the
    examples where that is not the central one.
    """
    distilled, order, unused_sizes = distilled.for_student(student), 0, None
    if isinstance(unroll, Mixture):
        mixture, (unroll, is_central) = unroll, unroll.draw(seed)
        if not is_central:
            order, unused_sizes = derive_seed("mixture-order", seed), bound_step_sizes(distilled, mixture.central, student)
            distilled = dataclasses.replace(distilled, step_sizes=None)
    return Problem(
        student=student,
        optimizer=unroll.optimizer,
        params=student.init(seed) if params is None else params,
        step_sizes=bound_step_sizes(distilled, unroll, student).to(student.device, student.dtype),
        rows=unroll.rows(len(distilled), order),
        outer=outer,
        micro_batch=unroll.micro_batch,
        dropout_seed=seed if unroll.dropout else None,
        state=state,
        seed=seed,
        unused_sizes=unused_sizes,
        attention_weight=unroll.attention_weight,
        **distilled.tensors_on(student.device, student.dtype),
    )


def equal_step_sizes(distilled: DistilledSet, steps: int, size: float, student: Student | None = None) -> Tensor:
    """``size`` at each of the ``steps``: float64 where the set or the ``student`` that trains on it is, float32 otherwise."""
    exact = torch.float64 in (distilled.embeds.dtype, None if student is None else student.dtype)
    return torch.full((steps,), float(size), dtype=torch.float64 if exact else torch.float32)


def bound_step_sizes(distilled: DistilledSet, unroll: Unroll, student: Student | None = None) -> Tensor:
    """The set's own step sizes, ``[t]``, or the optimiser's at every step if it has none yet."""
    if distilled.step_sizes is None:
        return equal_step_sizes(distilled, unroll.steps, unroll.optimizer.step_size, student)
    require(len(distilled.step_sizes) == unroll.steps,
            f"the set carries {len(distilled.step_sizes)} step sizes but the unroll has {unroll.steps} steps; use the unroll "
            "it was distilled with, or set step_sizes to None")
    return distilled.step_sizes


def leaf(tensor: Tensor) -> Tensor:
    """A copy of a tensor that collects a gradient of its own."""
    return tensor.detach().clone().requires_grad_()


def outer_loss_and_grads(problem: Problem, params: Params) -> tuple[float, Params]:
    """J(θ_T) and ∇J(θ_T), part by part; where runs are stacked, the list of their losses."""
    theta = leaves(params)

    def loss_and_grads(part: Callable[[Params], Tensor]) -> list:
        loss = part(theta)
        return [loss.detach(), *grad(loss.sum(), tuple(theta.values()))]

    loss, *grads = summed(map(loss_and_grads, problem.outer))
    return loss.tolist(), dict(zip(theta, grads, strict=True))
