"""The inner loop: how a student trains.

There is one inner step in the kit, :func:`inner_step`; distilling, recording experts, matching and evaluating all call it:

    g_t = ∇_θ ℓ(θ_t, φ_t)                        loss_and_grads
    θ_{t+1}, s_{t+1} = U(θ_t, s_t, g_t, η_t)     optimizer.update

:class:`Unroll` says how many steps there are, which optimiser makes them and which examples each step sees.  That the step can
be differentiated as a whole is proved by ``test_store_all_is_the_derivative`` in ``tests/test_metagrad.py``; that each
optimiser's update is the one of ``torch.optim``, by ``tests/test_inner.py``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from distillkit.core.optimizers import SGD, Optimizer, State, check_optimizer, described, optimizer_from
from distillkit.core.student import Batch, Params, Student
from distillkit.io.checks import check_flag, check_number, check_whole
from distillkit.io.seeds import derive_seed, generator

MOST_STEPS = 10**6  # of a recipe that somebody else wrote down


class Phi(NamedTuple):
    """What is learned at each inner step, or its gradient: ``embeds [m, l, d]``, ``targets [m, c]`` (None: hard labels), and
    ``attention [m, layers, heads, l]`` (None: no attention labels)."""

    embeds: Tensor
    targets: Tensor | None = None
    attention: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there, embeddings first."""
        return tuple(tensor for tensor in self if tensor is not None)

    def like(self, tensors: Iterable[Tensor]) -> Phi:
        """Other ``tensors``, such as gradients, in the places of those of :meth:`tensors`."""
        values = iter(tensors)
        return Phi(*(None if tensor is None else next(values) for tensor in self))


class Stepped(NamedTuple):
    """The result of an inner step, and the gradients it took of θ and, where they were asked for, of φ."""

    params: Params
    state: State
    grads: Params
    d_phi: Phi | None


# A micro-batch of a step: its share of the loss, inputs, targets, and the seed of its dropout masks (None: no dropout).
Part = tuple[float, Batch, Tensor, int | None]


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
        parts: the micro-batches of the step (:func:`set_parts`), built from the leaves ``phi`` where their gradient is wanted.
        in_place: an optimiser that has an ``update_`` may overwrite ``params`` and ``state``, which makes a step on few
            examples cheaper.
        differentiable: keep the graph, so that the result can be differentiated with respect to every input.
    """
    _, grads, d_phi = loss_and_grads(student, params, parts, phi, differentiable=differentiable)
    update = getattr(optimizer, "update_", optimizer.update) if in_place else optimizer.update
    with torch.set_grad_enabled(differentiable):
        params, state = update(params, grads, state, step_size)
    return Stepped(params, state, grads, d_phi)


def loss_and_grads(
    student: Student, params: Params, parts: Iterable[Part], phi: Phi | None = None, *, differentiable: bool = False
) -> tuple[Tensor, Params, Phi | None]:
    """ℓ(θ), g = ∇_θ ℓ, and ∇ of the leaves ``phi``, one micro-batch at a time.

    A micro-batch that does not fit into memory is computed again in halves, with a warning; the sum is the same up to
    rounding, but for dropout, whose masks belong to a micro-batch.

    Args:
        parts: made lazily, so that only one micro-batch's activations are alive.
        differentiable: keep the graph of g, which then depends on ``params`` themselves.
    """
    theta = params if differentiable else leaves(params)
    inputs = (*theta.values(), *(phi.tensors() if phi else ()))
    loss, *grads = summed(_of_part(student, theta, inputs, part, differentiable) for part in parts)
    return loss, dict(zip(theta, grads)), phi.like(grads[len(theta) :]) if phi else None


def _of_part(student: Student, theta: Params, inputs, part: Part, differentiable: bool, halved: bool = False) -> list[Tensor]:
    """A micro-batch's loss and the gradients of ``inputs``; where memory runs out, summed over its halves."""
    share, batch, targets, seed = part

    try:
        loss = share * student.loss(theta, batch, targets, dropout_seed=seed)
        # Halves are slices of one tensor and share its graph back to φ.
        grads = grad(loss, inputs, retain_graph=halved or differentiable, create_graph=differentiable)
        return [loss.detach(), *grads]
    except torch.OutOfMemoryError:
        cut = half_of(len(targets), dropout=seed is not None)
    loss = None  # frees the graph of the failed attempt
    halves = []
    for number, rows in enumerate((slice(cut), slice(cut, None))):
        half_seed = None if seed is None else derive_seed("dropout-half", seed, number)
        half_share = share * len(targets[rows]) / len(targets)
        halves.append((half_share, {n: t[rows] for n, t in batch.items()}, targets[rows], half_seed))
    return summed(_of_part(student, theta, inputs, half, differentiable, halved=True) for half in halves)


def half_of(examples: int, *, dropout: bool) -> int:
    """Half of the examples that did not fit into memory, with a warning; for a single one an error that says what to lower."""
    if examples == 1:
        raise torch.OutOfMemoryError(
            "out of memory with one example at a time (micro_batch=1): lower the set's length, the task's max_length or the "
            "steps of the unroll; give metagrad=Replay(every=4) or Truncated(window=2), which store less; or train less of the "
            "student (trainable='lora' or 'head')"
        )
    half = examples // 2
    warnings.warn(f"out of memory with {examples} examples at a time: they are computed again in parts of about {half}, which "
                  f"changes the gradient by rounding only{' (and the masks of dropout)' if dropout else ''}; set "
                  f"micro_batch={half} to avoid the failed attempt", stacklevel=4)
    return half


def lengths_of(mask: Tensor) -> np.ndarray:
    """The number of tokens of each example up to its last, ``[m]``, on the host."""
    return ((np.asarray(mask.cpu()) != 0) * np.arange(1, mask.shape[1] + 1)).max(1)


def set_parts(
    rows: Tensor | np.ndarray, embeds: Tensor, mask: Tensor, targets: Tensor, *, micro_batch: int | None,
    dropout: tuple | None, lengths: np.ndarray | None = None, attention: Tensor | None = None, attention_weight: float = 1.0,
) -> Iterator[Part]:
    """The micro-batches of one step on a distilled set: examples of similar length together, without common padding.

    Args:
        rows: the examples of the step, indices on the host.
        embeds, mask, targets: the set, on one device.
        micro_batch: examples at a time, or None for all.
        dropout: the address of the dropout masks, (seed, step), or None for no dropout.
        lengths: :func:`lengths_of` the mask, whose reading waits for the device, and cannot be done inside a transform of
            ``torch.func``; default: read here.
        attention, attention_weight: the set's attention labels, if it has any, and the weight of their loss.
    """
    lengths = lengths_of(mask) if lengths is None else lengths
    order, size = np.asarray(rows), micro_batch or len(rows)
    if size < len(order):
        order = order[np.argsort(lengths[order], kind="stable")]
    for i, start in enumerate(range(0, len(order), size)):
        seed = None if dropout is None else derive_seed("dropout", *dropout, i)
        part = order[start : start + size]
        end = lengths[part].max()
        inputs = {"inputs_embeds": embeds[part, :end], "attention_mask": mask[part, :end]}
        if attention is not None:
            # A weight for each example, so that halves and members of a batch take theirs along.
            inputs |= {"attention_labels": attention[part, ..., :end],
                       "attention_weight": torch.full((len(part),), attention_weight, device=embeds.device, dtype=embeds.dtype)}
        yield len(part) / len(rows), inputs, targets[part], seed


def leaves(params: Params) -> Params:
    """Parameters that collect gradients; they share their memory with ``params``."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def grad(outputs, inputs, **options) -> list[Tensor]:
    """``torch.autograd.grad``, with zeros for inputs that the outputs do not depend on."""
    return list(torch.autograd.grad(outputs, inputs, allow_unused=True, materialize_grads=True, **options))


def summed(rows: Iterable[list]) -> list:
    """Sums by place over lists of tensors or numbers, which may be made one after the other."""
    total = None
    for row in rows:
        total = row if total is None else [a + b for a, b in zip(total, row, strict=True)]
    assert total is not None  # a step has at least one micro-batch
    return total


def to_device(values: Any, device: torch.device | str) -> Any:
    """Nested dicts and tuples, such as parameters or an optimiser's state, with every tensor on ``device``."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), values)


@dataclasses.dataclass(frozen=True)
class Unroll:
    """T steps of the inner loop: how a student trains.

    Args:
        steps: T ≥ 1.
        optimizer: :class:`SGD`, :class:`Momentum`, :class:`AdamW`, or another :class:`Optimizer`.
        batch_size: examples per step; None: the whole distilled set at each step.  Otherwise each pass goes through the
            set in a seeded order that is the same whenever the set is trained on.
        micro_batch: examples whose activations are alive at a time; the gradient is the same.
        dropout: train with the model's dropout; off by default, since its noise hides the gradient of a set.
        attention_weight: weight of the loss of attention labels, where a set has any.
    """

    steps: int
    _: dataclasses.KW_ONLY
    optimizer: Optimizer = SGD()
    batch_size: int | None = None
    micro_batch: int | None = None
    dropout: bool = False
    attention_weight: float = 1.0

    def __post_init__(self):
        check_whole("steps", self.steps)
        check_number("attention_weight", self.attention_weight)
        for name in ("batch_size", "micro_batch"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        check_flag("dropout", self.dropout)
        check_optimizer(self.optimizer)

    def rows(self, examples: int, order: int = 0) -> list[Tensor]:
        """Which examples each step sees: T index tensors into a set of ``examples``; 0 is the order sets are distilled in."""
        if self.batch_size is None or self.batch_size >= examples:
            return [torch.arange(examples)] * self.steps
        rows: list[Tensor] = []
        batches = -(-examples // self.batch_size)
        for epoch in range(-(-self.steps // batches)):
            address = (order, epoch) if order else (epoch,)
            rows += torch.randperm(examples, generator=generator("inner-order", *address)).split(self.batch_size)
        return rows[: self.steps]

    def recipe(self) -> dict:
        """What a reader needs to train as this does, as JSON values."""
        settings = {name: getattr(self, name) for name in ("steps", "optimizer", "batch_size", "dropout")}
        if self.attention_weight != 1:
            settings["attention_weight"] = self.attention_weight
        return settings | {"optimizer": described(self.optimizer)}


def from_recipe(recipe: dict, optimizer: Optimizer | None = None) -> Unroll:
    """The :class:`Unroll` that ``Unroll.recipe()`` described (read from a saved set).

    Args:
        optimizer: in the place of the one it describes.

    Raises:
        ValueError: it describes none, or one of more than ``MOST_STEPS`` steps.
    """
    try:
        check_whole("steps", recipe["steps"], most=MOST_STEPS)
        return Unroll(recipe["steps"], optimizer=optimizer or optimizer_from(recipe["optimizer"]),
                      batch_size=recipe["batch_size"], dropout=recipe.get("dropout", False),
                      attention_weight=recipe.get("attention_weight", 1.0))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the recipe does not say how to train: {error}; or choose another recipe than the set's own, which "
                         "ignores its learned step sizes") from error
