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
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from distillkit.core.students import Batch, Params, Student
from distillkit.io.checks import check_flag, check_number, check_rate, check_whole
from distillkit.io.seeds import derive_seed, generator

State = dict[str, Any]
MOST_STEPS = 10**6  # of a recipe that somebody else wrote down


def _positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, not {value!r}")


def _clipped(grads: Params, clip_norm: float | None) -> Params:
    """Gradients scaled down to a global norm of ``clip_norm`` if they exceed it, as ``clip_grad_norm_`` does."""
    if clip_norm is None:
        return grads
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    scale = (clip_norm / (norm + 1e-6)).clamp_max(1.0)
    return {n: scale * g for n, g in grads.items()}


def _check_clip(clip_norm: float | None) -> None:
    if clip_norm is not None:
        _positive("clip_norm", clip_norm)


class Optimizer(Protocol):
    """An inner optimiser: a pair of pure functions, and the step size to start from.

    ``init(params)`` makes the state: a dict of numbers, tensors, or dicts of tensors by parameter name.  ``update`` returns
    new parameters and a new state, changes nothing in place, and can be differentiated with respect to all four arguments.
    A dataclass also shows its settings in a set's recipe.  :class:`SGD`, :class:`Momentum` and :class:`AdamW` are such.
    """

    @property
    def step_size(self) -> float: ...

    def init(self, params: Params) -> State: ...

    def update(self, params: Params, grads: Params, state: State, step_size: Any) -> tuple[Params, State]: ...


def check_optimizer(optimizer) -> None:
    """Raise TypeError unless ``optimizer`` is an :class:`Optimizer`."""
    missing = [name for name in ("init", "update") if not callable(getattr(optimizer, name, None))]
    if not isinstance(getattr(optimizer, "step_size", None), int | float):
        missing.append("step_size")
    if missing or isinstance(optimizer, type):
        raise TypeError(f"optimizer must be an object such as SGD(0.1), with init, update and step_size; {optimizer!r} "
                        f"{'is a class' if isinstance(optimizer, type) else 'lacks ' + ', '.join(missing)}")


@dataclasses.dataclass(frozen=True)
class SGD:
    """θ ← θ − η g.

    Args:
        step_size: η, used where no learned step sizes are given.
        clip_norm: largest global norm of the gradient, or None.
    """

    step_size: float = 0.1
    clip_norm: float | None = None

    def __post_init__(self):
        _positive("step_size", self.step_size)
        _check_clip(self.clip_norm)

    def init(self, params: Params) -> State:
        return {}

    def update(self, params: Params, grads: Params, state: State, step_size: float | Tensor) -> tuple[Params, State]:
        grads = _clipped(grads, self.clip_norm)
        return {n: p - step_size * grads[n] for n, p in params.items()}, state


@dataclasses.dataclass(frozen=True)
class Momentum:
    """u ← μu + g,  θ ← θ − ηu, or with ``nesterov`` θ ← θ − η(g + μu): the form of ``torch.optim.SGD``.

    Args:
        step_size: η, used where no learned step sizes are given.
        decay: μ in [0, 1).
        clip_norm: largest global norm of the gradient, or None.
    """

    step_size: float = 0.05
    decay: float = 0.9
    nesterov: bool = False
    clip_norm: float | None = None

    def __post_init__(self):
        _positive("step_size", self.step_size)
        _check_clip(self.clip_norm)
        check_number("decay", self.decay, most=1, without="most")
        check_flag("nesterov", self.nesterov)

    def init(self, params: Params) -> State:
        return {"u": {n: torch.zeros_like(p) for n, p in params.items()}}

    def update(self, params: Params, grads: Params, state: State, step_size: float | Tensor) -> tuple[Params, State]:
        grads = _clipped(grads, self.clip_norm)
        u = {n: self.decay * state["u"][n] + g for n, g in grads.items()}
        step = {n: grads[n] + self.decay * u[n] for n in u} if self.nesterov else u
        return {n: p - step_size * step[n] for n, p in params.items()}, {"u": u}


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, algorithm 2).

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  θ ← θ − η (m̂ / (√(v̂ + ε_root) + ε) + λθ).

    ``eps_root`` sits inside the root: the derivative of √v̂ at v̂ = 0 is infinite, so differentiating through this update
    needs it above 0 (Engstrom et al., 2025, section 3).  With ``eps_root = 0`` it takes the steps of ``torch.optim.AdamW``.
    Weight decay acts on matrices only, not on biases and norms, the usual practice when fine-tuning transformers.
    """

    step_size: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self):
        _positive("step_size", self.step_size)
        _check_clip(self.clip_norm)
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), not {self.betas!r}")
        for beta in self.betas:
            check_number("betas, both,", beta, most=1, without="most")
        for name in ("eps", "eps_root", "weight_decay"):
            check_rate(name, getattr(self, name))

    def init(self, params: Params) -> State:
        zeros = {n: torch.zeros_like(p) for n, p in params.items()}
        return {"count": 0, "m": zeros, "v": dict(zeros)}

    def update(self, params: Params, grads: Params, state: State, step_size: float | Tensor) -> tuple[Params, State]:
        b1, b2 = self.betas
        grads = _clipped(grads, self.clip_norm)
        t = state["count"] + 1
        m = {n: b1 * state["m"][n] + (1 - b1) * g for n, g in grads.items()}
        v = {n: b2 * state["v"][n] + (1 - b2) * g * g for n, g in grads.items()}
        new = {}
        for n, p in params.items():
            direction = m[n] / (1 - b1**t) / ((v[n] / (1 - b2**t) + self.eps_root).sqrt() + self.eps)
            if self.weight_decay and p.ndim > 1:
                direction = direction + self.weight_decay * p
            new[n] = p - step_size * direction
        return new, {"count": t, "m": m, "v": v}

    def update_(self, params: Params, grads: Params, state: State, step_size: float | Tensor) -> tuple[Params, State]:
        """:meth:`update` in place, by torch's fused kernel: for a run that nobody differentiates or looks back into.

        It overwrites ``params`` and the moments in ``state``, and differs from :meth:`update` by rounding.
        """
        if self.eps_root or not all(p.is_floating_point() and p.is_contiguous() for p in params.values()):
            return self.update(params, grads, state, step_size)
        grads, t = _clipped(grads, self.clip_norm), state["count"] + 1
        if not state["count"]:  # zeros that :meth:`init` shares between the moments
            state = {"m": {n: torch.zeros_like(p) for n, p in params.items()},
                     "v": {n: torch.zeros_like(p) for n, p in params.items()}}
        for decays in (True, False):  # matrices, then biases and norms
            names = [n for n, p in params.items() if (p.ndim > 1) == decays]
            if not names:
                continue
            adamw(
                [params[n] for n in names], [grads[n] for n in names], [state["m"][n] for n in names],
                [state["v"][n] for n in names], [], [torch.tensor(float(t - 1), device=params[n].device) for n in names],
                fused=True, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1], lr=float(step_size),
                weight_decay=self.weight_decay if decays else 0.0, eps=self.eps, maximize=False,
            )
        return params, {"count": t, "m": state["m"], "v": state["v"]}


OPTIMIZERS = {kind.__name__: kind for kind in (SGD, Momentum, AdamW)}


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


def described(optimizer: Optimizer) -> dict:
    """The optimiser as JSON values (a tuple would come back as a list)."""
    settings = dataclasses.asdict(optimizer) if dataclasses.is_dataclass(optimizer) else {"step_size": optimizer.step_size}
    return {"name": type(optimizer).__name__} | {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def optimizer_from(settings: dict) -> Optimizer:
    """The optimiser that :func:`described` wrote down."""
    settings = dict(settings)
    name = settings.pop("name", None)
    kind = OPTIMIZERS.get(name)
    if kind is None:
        raise ValueError(f"the inner optimiser {name!r} is none of this kit's ({', '.join(OPTIMIZERS)}); give the object "
                         "itself, in an Unroll")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return kind(**given)


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
