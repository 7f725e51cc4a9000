"""Meta-gradients: how the outer loss J(θ_T) reaches the distilled set φ through the training run.

Walk back the cotangents (λ, σ) of (θ, s), starting from (∇J(θ_T), 0).  At step t

1. the vector-Jacobian product of the *update* U gives the cotangents of θ_t, s_t, η_t and of the gradient g_t, called γ;
2. one *second-order product* of the loss along γ gives ∇²_θθ ℓ·γ, added to λ, and ∇²_φθ ℓ·γ, the meta-gradient of the
   examples and of their labels at that step.

Because U enters only through its own product, any optimiser will do.  Strategies are objects and differ in how they form
step 2 and in what they keep meanwhile:

* :class:`StoreAll` lets autograd walk through the whole run: the definition, and the oracle in tests; memory grows with T.
* :class:`Replay` keeps the parameters θ_0 … θ_{T−1} and no graphs, and repeats each step when its turn comes: exact, and
  the memory of activations does not grow with T (Maclaurin et al., 2015, without the reversal; Engstrom et al., 2025).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distillkit.inner import Optimizer, State, inner_step, loss_and_grads
from distillkit.students import Params, Student


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


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One inner training run and the loss at its end: what a strategy differentiates.

    ``embeds [m, l, d]``, ``mask [m, l]``, ``targets`` and ``step_sizes [T]`` live on the student's device; ``rows`` holds
    T index tensors.  ``outer`` holds functions of θ_T whose values add up to the scalar J: one for each part of the real
    batch, so that no more than one part's activations need be alive.
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

    def batch(self, t: int, embeds: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows = self.rows[t].to(embeds.device)
        return {"inputs_embeds": embeds[rows], "attention_mask": self.mask[rows]}, targets[rows]

    @property
    def learns_labels(self) -> bool:
        return self.targets.is_floating_point()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _leaves(params: Params) -> Params:
    return {n: p.detach().requires_grad_() for n, p in params.items()}


def _need_double_backward(student: Student, strategy: str) -> None:
    # Fused attention raises deep inside autograd, in words that do not help; say it here.
    if student.attention != "eager":
        raise ValueError(
            f"{strategy} differentiates twice, and attention={student.attention!r} of student {student.name!r} has no "
            "second derivative; load the student with attention='eager'"
        )


def outer_loss_and_grads(problem: Problem, params: Params) -> tuple[float, Params]:
    """J(θ_T) and ∇J(θ_T), part by part."""
    leaves = _leaves(params)
    total, grads = 0.0, None
    for part in problem.outer:
        loss = part(leaves)
        found = torch.autograd.grad(loss, tuple(leaves.values()), allow_unused=True, materialize_grads=True)
        total += float(loss.detach())
        grads = found if grads is None else [a + b for a, b in zip(grads, found, strict=True)]
    return total, dict(zip(leaves, grads, strict=True))


@dataclasses.dataclass(frozen=True)
class StoreAll:
    """Autograd through the whole unroll, every graph kept: exact, memory O(T)."""

    def __call__(self, problem: Problem) -> MetaGradient:
        """The meta-gradient of ``problem``; raises ValueError where attention has no second derivative."""
        _need_double_backward(problem.student, "StoreAll")
        embeds, step_sizes = _leaf(problem.embeds), _leaf(problem.step_sizes)
        targets = _leaf(problem.targets) if problem.learns_labels else problem.targets
        params: Params = _leaves(problem.params)
        state: State = problem.optimizer.init(params)
        for t in range(len(problem.rows)):
            batch, labels = problem.batch(t, embeds, targets)
            _, grads = loss_and_grads(problem.student, params, batch, labels, create_graph=True)
            params, state = problem.optimizer.update(params, grads, state, step_sizes[t])
        loss = sum(part(params) for part in problem.outer)
        wanted = (embeds, step_sizes, targets) if problem.learns_labels else (embeds, step_sizes)
        found = torch.autograd.grad(loss, wanted, materialize_grads=True)
        return MetaGradient(float(loss.detach()), found[0], found[2] if problem.learns_labels else None, found[1])


@dataclasses.dataclass(frozen=True)
class Replay:
    """Exact, with the activations of one step at a time: keep θ_t, repeat each step on the way back."""

    def __call__(self, problem: Problem) -> MetaGradient:
        """The meta-gradient of ``problem``; raises ValueError where attention has no second derivative."""
        _need_double_backward(problem.student, "Replay")
        trace, params = self._forward(problem)
        loss, cotangents = outer_loss_and_grads(problem, params)
        sigma: list[Tensor] | None = None
        d_embeds = torch.zeros_like(problem.embeds)
        d_targets = torch.zeros_like(problem.targets) if problem.learns_labels else None
        d_steps = torch.zeros_like(problem.step_sizes)
        for t in reversed(range(len(problem.rows))):
            cotangents, sigma, d_steps[t] = self._back(problem, t, *trace[t], cotangents, sigma, d_embeds, d_targets)
        return MetaGradient(loss, d_embeds, d_targets, d_steps)

    @staticmethod
    def _forward(problem: Problem) -> tuple[list[tuple[Params, State]], Params]:
        params, state = problem.params, problem.optimizer.init(problem.params)
        trace = []
        for t in range(len(problem.rows)):
            trace.append((params, state))
            batch, labels = problem.batch(t, problem.embeds, problem.targets)
            params, state, _ = inner_step(
                problem.student, problem.optimizer, params, state, batch, labels, problem.step_sizes[t]
            )
        return trace, params

    @staticmethod
    def _back(problem, t, params, state, cotangents, sigma, d_embeds, d_targets):
        """One step backwards; adds to ``d_embeds`` and ``d_targets`` in place."""
        theta, embeds = _leaves(params), _leaf(problem.embeds)
        targets = _leaf(problem.targets) if problem.learns_labels else problem.targets
        batch, labels = problem.batch(t, embeds, targets)
        _, grads = loss_and_grads(problem.student, theta, batch, labels, create_graph=True)
        direct, gamma, sigma, d_step = _update_vjp(
            problem.optimizer, params, state, grads, problem.step_sizes[t], cotangents, sigma
        )
        wanted = (*theta.values(), embeds, *((targets,) if problem.learns_labels else ()))
        product = torch.autograd.grad(
            tuple(grads.values()), wanted, grad_outputs=gamma, allow_unused=True, materialize_grads=True
        )
        d_embeds += product[len(theta)]
        if d_targets is not None:
            d_targets += product[-1]
        cotangents = {n: d + p for (n, d), p in zip(direct.items(), product[: len(theta)], strict=True)}
        return cotangents, sigma, d_step


def _state_tensors(state: State) -> list[Tensor]:
    """The tensors of an optimiser's state, in a fixed order."""
    return [t for value in state.values() if isinstance(value, dict) for t in value.values()]


def _with_tensors(state: State, tensors: list[Tensor]) -> State:
    """``state`` with its tensors replaced by ``tensors``, in the order of :func:`_state_tensors`."""
    supply = iter(tensors)
    return {k: {n: next(supply) for n in v} if isinstance(v, dict) else v for k, v in state.items()}


def _update_vjp(optimizer, params, state, grads, step_size, cotangents, sigma):
    """Vector-Jacobian product of (θ', s') = U(θ, s, g, η): cotangents of θ (a dict), g, s (lists) and η."""
    theta = _leaves(params)
    gs = {n: g.detach().requires_grad_() for n, g in grads.items()}
    state_in = [s.detach().requires_grad_() for s in _state_tensors(state)]
    eta = step_size.detach().clone().requires_grad_()
    new, new_state = optimizer.update(theta, gs, _with_tensors(state, state_in), eta)
    outputs, seeds = list(new.values()), [cotangents[n] for n in new]
    if sigma is not None:  # at the last step nothing depends on the state any more
        outputs, seeds = outputs + _state_tensors(new_state), seeds + sigma
    inputs = (*theta.values(), *gs.values(), *state_in, eta)
    found = torch.autograd.grad(outputs, inputs, grad_outputs=seeds, allow_unused=True, materialize_grads=True)
    n = len(theta)
    return dict(zip(theta, found[:n], strict=True)), found[n : 2 * n], list(found[2 * n : -1]), found[-1]
