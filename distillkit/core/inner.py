"""The inner loop: how a student trains.

There is one inner step in the kit.  Distilling, recording experts, matching them and evaluating all call it:

    g_t = ∇_θ ℓ(θ_t, φ_t)                        loss_and_grads
    θ_{t+1}, s_{t+1} = U(θ_t, s_t, g_t, η_t)     optimizer.update

An optimiser is a pair of pure functions, ``init(params)`` and ``update(params, grads, state, step_size)``, so that U can
be differentiated like any other function.  :class:`Unroll` says how many steps there are, which optimiser makes them and
which examples each step sees.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from distillkit.core.optimizers import SGD, Optimizer, State, check_optimizer, described, optimizer_from
from distillkit.core.student import Batch, Params, Student
from distillkit.io.checks import check_flag, check_whole
from distillkit.io.seeds import derive_seed, generator

MOST_STEPS = 10**6  # of a recipe that somebody else wrote down


class Phi(NamedTuple):
    """What is learned at each inner step, or its gradient: ``embeds [m, l, d]``, ``targets [m, c]`` (None: hard labels)."""

    embeds: Tensor
    targets: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """The embeddings, and the labels where they are soft."""
        return (self.embeds,) if self.targets is None else (self.embeds, self.targets)


class Stepped(NamedTuple):
    """Where an inner step leads, and the gradients it took of θ and, where they were asked for, of φ."""

    params: Params
    state: State
    grads: Params
    d_phi: Phi | None


# A micro-batch of a step: its share of the loss, inputs, targets, and the seed of its dropout masks (None: no dropout).
Part = tuple[float, Batch, Tensor, int | None]


def set_parts(
    rows: Tensor, embeds: Tensor, mask: Tensor, targets: Tensor, *, micro_batch: int | None, dropout: tuple | None
) -> Iterator[Part]:
    """The micro-batches of one step on a distilled set: examples of like length together, without common padding.

    Args:
        rows: the examples of the step, an index tensor.
        embeds, mask, targets: the set, on one device.
        micro_batch: examples at a time, or None for all.
        dropout: the address of the dropout masks, (seed, step), or None for no dropout.
    """
    rows = rows.to(embeds.device)
    ends = ((mask != 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)[rows]
    if micro_batch is not None and micro_batch < len(rows):
        ends, order = ends.sort(stable=True)
        rows = rows[order]
    size = micro_batch or len(rows)
    for i, (part, longest) in enumerate(zip(rows.split(size), ends.split(size), strict=True)):
        seed = None if dropout is None else derive_seed("dropout", *dropout, i)
        end = int(longest.max())
        inputs = {"inputs_embeds": embeds[part, :end], "attention_mask": mask[part, :end]}
        yield len(part) / len(rows), inputs, targets[part], seed


def _halves(part: Part) -> list[Part]:
    """A micro-batch in two; raises the exception that is being handled where it is a single example."""
    share, batch, targets, seed = part
    examples = len(targets)
    if examples == 1:
        raise
    cut = examples // 2
    warnings.warn(f"out of memory with {examples} examples at a time: they are taken again in parts of {examples - cut}, which "
                  f"changes the gradient by rounding only{'' if seed is None else ' (and the masks of dropout)'}; set "
                  f"micro_batch={cut} to spare the failed attempt", stacklevel=3)
    found = []
    for number, chosen in enumerate((slice(None, cut), slice(cut, None))):
        own = None if seed is None else derive_seed("dropout-half", seed, number)
        size = len(targets[chosen])
        found.append((share * size / examples, {n: t[chosen] for n, t in batch.items()}, targets[chosen], own))
    return found


def loss_and_grads(
    student: Student, params: Params, parts: Iterable[Part], phi: Phi | None = None, *, differentiable: bool = False
) -> tuple[Tensor, Params, Phi | None]:
    """ℓ(θ), g = ∇_θ ℓ, and ∇ of the leaves ``phi``, one micro-batch at a time.

    ``parts`` must be built from ``phi`` (and lazily, so that only one micro-batch's activations are alive).  A micro-batch
    that memory has no room for is taken again in halves, with a warning; but for dropout, whose masks belong to a
    micro-batch, the sum is the same up to rounding.  ``differentiable`` keeps the graph of g, which then depends on
    ``params`` themselves.
    """
    leaves = params if differentiable else {n: p.detach().requires_grad_() for n, p in params.items()}
    inputs, loss, total = (*leaves.values(), *(phi.tensors() if phi else ())), 0.0, None
    for whole in parts:
        waiting, halved = [whole], False
        while waiting:
            share, batch, targets, seed = waiting.pop()
            part = None  # the graph of the one before goes
            try:
                part = share * student.loss(leaves, batch, targets, dropout_seed=seed)
                # Halves are slices of one tensor, whose way back to ``phi`` all of them take.
                grads = torch.autograd.grad(part, inputs, allow_unused=True, materialize_grads=True,
                                            retain_graph=halved or differentiable, create_graph=differentiable)
            except torch.OutOfMemoryError:
                waiting += reversed(_halves((share, batch, targets, seed)))
                halved = True
                continue
            loss = loss + part.detach()
            total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
    assert isinstance(loss, Tensor) and total is not None  # there is a part at least
    n = len(leaves)
    return loss, dict(zip(leaves, total[:n], strict=True)), Phi(*total[n:]) if phi else None


def inner_step(
    student: Student,
    optimizer: Optimizer,
    params: Params,
    state: State,
    parts: Iterable[Part],
    step_size: float | Tensor,
    phi: Phi | None = None,
    *,
    in_place: bool = False,
    differentiable: bool = False,
) -> Stepped:
    """The inner step: new parameters and optimiser state, and the gradients it took with respect to θ and ``phi``.

    Args:
        in_place: an optimiser that has an ``update_`` may overwrite ``params`` and ``state``, which makes a step on few
            examples cheaper.
        differentiable: keep the graph, so that what comes out can be differentiated with respect to what went in.
    """
    _, grads, d_phi = loss_and_grads(student, params, parts, phi, differentiable=differentiable)
    update = getattr(optimizer, "update_", optimizer.update) if in_place else optimizer.update
    with torch.set_grad_enabled(differentiable):
        params, state = update(params, grads, state, step_size)
    return Stepped(params, state, grads, d_phi)


def from_recipe(recipe: dict) -> Unroll:
    """The :class:`Unroll` that ``Unroll.recipe()`` described (read from a saved set).

    Raises:
        ValueError: it describes none, or one of more than ``MOST_STEPS`` steps.
    """
    try:
        check_whole("steps", recipe["steps"], most=MOST_STEPS)
        return Unroll(recipe["steps"], optimizer=optimizer_from(recipe["optimizer"]), batch_size=recipe["batch_size"],
                      dropout=recipe.get("dropout", False))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the recipe does not say how to train ({error}); choose another recipe than the set's own") from error


@dataclasses.dataclass(frozen=True)
class Unroll:
    """T steps of the inner loop: how a student trains.

    Args:
        steps: T ≥ 1.
        optimizer: :class:`SGD`, :class:`Momentum`, :class:`AdamW`, or another :class:`Optimizer`.
        batch_size: examples a step; None: the whole distilled set at each step.  Otherwise each pass goes through the
            set in a seeded order that is the same whenever the set is trained on.
        micro_batch: examples whose activations are alive at a time; the gradient is the same.
        dropout: train with the model's dropout; off, since a set has to be learned through the noise.
    """

    steps: int
    _: dataclasses.KW_ONLY
    optimizer: Optimizer = SGD()
    batch_size: int | None = None
    micro_batch: int | None = None
    dropout: bool = False

    def __post_init__(self):
        for name in ("steps", "batch_size", "micro_batch"):
            value = getattr(self, name)
            if value is None and name != "steps":
                continue
            check_whole(name, value)
        check_flag("dropout", self.dropout)
        check_optimizer(self.optimizer)

    def rows(self, examples: int, order: int = 0) -> list[Tensor]:
        """Which examples each step sees: T index tensors into a set of ``examples``; 0 is the order sets are distilled in."""
        if self.batch_size is None or self.batch_size >= examples:
            return [torch.arange(examples)] * self.steps
        rows: list[Tensor] = []
        for epoch in range(self.steps):
            address = (order, epoch) if order else (epoch,)
            rows += torch.randperm(examples, generator=generator("inner-order", *address)).split(self.batch_size)
            if len(rows) >= self.steps:
                break
        return rows[: self.steps]

    def recipe(self) -> dict:
        """What a reader needs to train as this does, as JSON values."""
        return {
            "steps": self.steps,
            "optimizer": described(self.optimizer),
            "batch_size": self.batch_size,
            "dropout": self.dropout,
        }
