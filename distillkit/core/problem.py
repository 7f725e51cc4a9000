"""What a strategy differentiates: one inner training run, and the loss at its end.

A :class:`Problem` binds a distilled set to a student: where training starts, which examples each step sees, and the outer
loss J(θ_T).  A :class:`MetaGradient` is the answer, ∇J with respect to embeddings, soft labels and step sizes.
:mod:`distillkit.core.metagrad` leads from one to the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distillkit.core.inner import Part, Phi, Stepped, inner_step, set_parts
from distillkit.core.optimizers import Optimizer, State
from distillkit.core.student import Params, Student


@dataclasses.dataclass(frozen=True)
class MetaGradient:
    """Gradient of the outer loss with respect to a distilled set.

    Attributes:
        loss: J(θ_T), a float.
        embeds: ``[m, l, d]``.
        targets: ``[m, c]`` for soft labels, None for hard ones.
        step_sizes: ``[t]``, with respect to the positive step sizes themselves.
    """

    loss: float
    embeds: Tensor
    targets: Tensor | None
    step_sizes: Tensor

    @classmethod
    def mean(cls, members: Sequence[MetaGradient]) -> MetaGradient:
        """The average of meta-gradients taken at several initialisations or experts."""

        def average(name: str) -> Any:
            values = [getattr(member, name) for member in members]
            return None if values[0] is None else sum(values) / len(values)

        return cls(*(average(field.name) for field in dataclasses.fields(cls)))


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One inner training run and the loss at its end.

    ``embeds [m, l, d]``, ``mask [m, l]``, ``targets`` and ``step_sizes [T]`` live on the student's device; ``rows`` holds
    T index tensors.  ``outer`` holds functions of θ_T whose values add up to the scalar J: one for each part of the real
    batch, so that only one part's activations are alive at a time.  ``micro_batch`` bounds the examples of an inner step
    that are alive at a time; ``dropout_seed`` switches dropout on, with masks drawn from it; ``state`` is the optimiser's
    state at the start, fresh where it is None.  ``seed`` is the address of this run and differs between outer steps:
    strategies that draw something draw it from there.
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

    def start(self) -> tuple[Params, State]:
        """Where the training run begins."""
        return self.params, self.optimizer.init(self.params) if self.state is None else self.state

    def phi(self) -> Phi:
        """Fresh leaves of what is learned at each step."""
        return Phi(leaf(self.embeds), leaf(self.targets) if self.targets.is_floating_point() else None)

    def parts(self, t: int, phi: Phi | None = None) -> Iterator[Part]:
        """The micro-batches of step t, made of the leaves ``phi`` if given."""
        embeds = self.embeds if phi is None else phi.embeds
        targets = self.targets if phi is None or phi.targets is None else phi.targets
        dropout = None if self.dropout_seed is None else (self.dropout_seed, t)
        return set_parts(self.rows[t], embeds, self.mask, targets, micro_batch=self.micro_batch, dropout=dropout)

    def loss(self, params: Params, t: int, phi: Phi) -> Iterator[Tensor]:
        """ℓ(θ, φ_t) in parts that add up, with a graph."""
        for share, batch, labels, seed in self.parts(t, phi):
            yield share * self.student.loss(params, batch, labels, dropout_seed=seed)

    def step(self, t: int, params: Params, state: State, phi: Phi | None = None) -> Stepped:
        """Inner step t without a graph; see :func:`~distillkit.core.inner.inner_step`."""
        return inner_step(self.student, self.optimizer, params, state, self.parts(t, phi), self.step_sizes[t], phi)


def leaf(tensor: Tensor) -> Tensor:
    """A copy of a tensor that collects a gradient of its own."""
    return tensor.detach().clone().requires_grad_()


def leaves(params: Params) -> Params:
    """Parameters that collect gradients; they share their memory with ``params``."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def grad(outputs, inputs, **options) -> list[Tensor]:
    """``torch.autograd.grad``, with zeros for inputs that the outputs do not depend on."""
    return list(torch.autograd.grad(outputs, inputs, allow_unused=True, materialize_grads=True, **options))


def outer_loss_and_grads(problem: Problem, params: Params) -> tuple[float, Params]:
    """J(θ_T) and ∇J(θ_T), part by part."""
    theta = leaves(params)
    total, grads = 0.0, None
    for part in problem.outer:
        loss = part(theta)
        part_grads = grad(loss, tuple(theta.values()))
        total += float(loss.detach())
        grads = part_grads if grads is None else [a + b for a, b in zip(grads, part_grads, strict=True)]
    assert grads is not None  # there is a part at least
    return total, dict(zip(theta, grads, strict=True))
