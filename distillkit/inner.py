"""The inner loop: how a student trains.

There is one inner step in the kit.  Distilling, recording experts, matching them and evaluating all call it:

    g_t = ∇_θ ℓ(θ_t, φ_t)          loss_and_grads
    θ_{t+1}, s_{t+1} = U(θ_t, s_t, g_t, η_t)        optimizer.update

An optimiser is a pair of pure functions, ``init(params)`` and ``update(params, grads, state, step_size)``, so that U can
be differentiated like any other function.  :class:`Unroll` says how many steps there are, which optimiser makes them,
which examples each step sees, and how the gradient finds its way back (:mod:`distillkit.metagrad`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from distillkit.seeds import generator
from distillkit.students import Batch, Params, Student

State = dict[str, Any]


def _positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, not {value!r}")


@dataclasses.dataclass(frozen=True)
class SGD:
    """θ ← θ − η g.

    Args:
        step_size: η, used where no learned step sizes are given.
    """

    step_size: float = 0.1

    def __post_init__(self):
        _positive("step_size", self.step_size)

    def init(self, params: Params) -> State:
        return {}

    def update(self, params: Params, grads: Params, state: State, step_size: float | Tensor) -> tuple[Params, State]:
        return {n: p - step_size * grads[n] for n, p in params.items()}, state


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

    def __post_init__(self):
        _positive("step_size", self.step_size)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), not {self.betas!r}")
        for name in ("eps", "eps_root", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)!r}")

    def init(self, params: Params) -> State:
        zeros = {n: torch.zeros_like(p) for n, p in params.items()}
        return {"count": 0, "m": zeros, "v": dict(zeros)}

    def update(self, params: Params, grads: Params, state: State, step_size: float | Tensor) -> tuple[Params, State]:
        b1, b2 = self.betas
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


Optimizer = SGD | AdamW
OPTIMIZERS = {"SGD": SGD, "AdamW": AdamW}


def loss_and_grads(
    student: Student, params: Params, batch: Batch, targets: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Params]:
    """ℓ(θ, φ) and g = ∇_θ ℓ; with ``create_graph`` both stay differentiable."""
    loss = student.loss(params, batch, targets)
    grads = torch.autograd.grad(
        loss, tuple(params.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return loss, dict(zip(params, grads, strict=True))


def inner_step(
    student: Student,
    optimizer: Optimizer,
    params: Params,
    state: State,
    batch: Batch,
    targets: Tensor,
    step_size: float | Tensor,
) -> tuple[Params, State, Tensor]:
    """One training step without a graph; returns new parameters, new optimiser state and the loss before the step."""
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    loss, grads = loss_and_grads(student, leaves, batch, targets)
    with torch.no_grad():
        params, state = optimizer.update(params, grads, state, step_size)
    return params, state, loss.detach()


def from_recipe(recipe: dict, metagrad=None) -> Unroll:
    """The :class:`Unroll` that ``Unroll.recipe()`` described (read from a saved set)."""
    settings = dict(recipe["optimizer"])
    kind = OPTIMIZERS.get(settings.pop("name", None))
    if kind is None:
        raise ValueError(f"unknown inner optimiser in recipe: {recipe['optimizer']!r}; known: {', '.join(OPTIMIZERS)}")
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    extra = {} if metagrad is None else {"metagrad": metagrad}
    return Unroll(recipe["steps"], optimizer=kind(**settings), batch_size=recipe["batch_size"], **extra)


@dataclasses.dataclass(frozen=True)
class Unroll:
    """T steps of the inner loop.

    Args:
        steps: T ≥ 1.
        optimizer: :class:`SGD` or :class:`AdamW`.
        metagrad: how the meta-gradient is formed; see :mod:`distillkit.metagrad`.
        batch_size: examples a step; None: the whole distilled set at each step.  Otherwise each pass goes through the
            set in a seeded order that is the same whenever the set is trained on.
    """

    steps: int
    _: dataclasses.KW_ONLY
    optimizer: Optimizer = SGD()
    metagrad: Any = None
    batch_size: int | None = None

    def __post_init__(self):
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value is None and name == "batch_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.metagrad is None:
            from distillkit.metagrad import Replay

            object.__setattr__(self, "metagrad", Replay())

    def rows(self, examples: int) -> list[Tensor]:
        """Which examples each step sees: T index tensors into a set of ``examples``."""
        if self.batch_size is None or self.batch_size >= examples:
            return [torch.arange(examples)] * self.steps
        rows: list[Tensor] = []
        for epoch in range(self.steps):
            order = torch.randperm(examples, generator=generator("inner-order", epoch))
            rows += order.split(self.batch_size)
            if len(rows) >= self.steps:
                break
        return rows[: self.steps]

    def recipe(self) -> dict:
        """What a reader needs to train as this does, as JSON values."""
        optimizer = {"name": type(self.optimizer).__name__, **dataclasses.asdict(self.optimizer)}
        return {"steps": self.steps, "optimizer": optimizer, "batch_size": self.batch_size}
