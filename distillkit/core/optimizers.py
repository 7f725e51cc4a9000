"""Inner optimisers: pairs of pure functions, so that an update can be differentiated like any other function.

``init(params)`` makes the state and ``update(params, grads, state, step_size)`` returns new parameters and a new state, as in
optax.  :class:`Optimizer` says what an optimiser defined elsewhere must have.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from distillkit.core.student import Params
from distillkit.io.checks import check_flag, check_number, require

State = dict[str, Any]


class Optimizer(Protocol):
    """An inner optimiser: a pair of pure functions, and the step size to start from.

    ``init(params)`` makes the state: a dict of numbers, tensors, or dicts of tensors by parameter name.  ``update`` returns
    new parameters and a new state, changes nothing in place, and can be differentiated with respect to all four arguments.
    A dataclass also shows its settings in a set's recipe.  :class:`SGD`, :class:`Momentum` and :class:`AdamW` are examples.
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
    require(not missing and not isinstance(optimizer, type),
            f"optimizer must be an object such as SGD(0.1), with init, update and step_size; {optimizer!r} "
            f"{'is a class' if isinstance(optimizer, type) else 'lacks ' + ', '.join(missing)}", TypeError)


def _check_sizes(optimizer) -> None:
    """Raise ValueError unless the step size, and the clipping norm where there is one, are finite numbers above 0."""
    check_number("step_size", optimizer.step_size, without="least")
    if optimizer.clip_norm is not None:
        check_number("clip_norm", optimizer.clip_norm, without="least")


def _clipped(grads: Params, clip_norm: float | None) -> Params:
    """Gradients scaled down to a global norm of ``clip_norm`` if they exceed it, as ``clip_grad_norm_`` does."""
    if clip_norm is None:
        return grads
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    scale = (clip_norm / (norm + 1e-6)).clamp_max(1.0)
    return {n: scale * g for n, g in grads.items()}


def _zeros(params: Params) -> Params:
    return {n: torch.zeros_like(p) for n, p in params.items()}


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
        _check_sizes(self)

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
        nesterov: look ahead along u.
        clip_norm: largest global norm of the gradient, or None.
    """

    step_size: float = 0.05
    decay: float = 0.9
    nesterov: bool = False
    clip_norm: float | None = None

    def __post_init__(self):
        _check_sizes(self)
        check_number("decay", self.decay, most=1, without="most")
        check_flag("nesterov", self.nesterov)

    def init(self, params: Params) -> State:
        return {"u": _zeros(params)}

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
        _check_sizes(self)
        require(isinstance(self.betas, tuple | list) and len(self.betas) == 2,
                f"betas must be two numbers in [0, 1), not {self.betas!r}")
        for beta in self.betas:
            check_number("betas, both,", beta, most=1, without="most")
        for name in ("eps", "eps_root", "weight_decay"):
            check_number(name, getattr(self, name))

    def init(self, params: Params) -> State:
        return {"count": 0, "m": _zeros(params), "v": _zeros(params)}

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
        grads, steps_before = _clipped(grads, self.clip_norm), float(state["count"])
        matrices = [n for n, p in params.items() if p.ndim > 1]
        others = [n for n, p in params.items() if p.ndim <= 1]
        for names, weight_decay in ((matrices, self.weight_decay), (others, 0.0)):
            tensors = [[values[n] for n in names] for values in (params, grads, state["m"], state["v"])]
            counts = [torch.tensor(steps_before, device=params[n].device) for n in names]
            adamw(*tensors, [], counts, fused=True, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1],
                  lr=float(step_size), weight_decay=weight_decay, eps=self.eps, maximize=False)
        return params, {**state, "count": state["count"] + 1}


OPTIMIZERS = {kind.__name__: kind for kind in (SGD, Momentum, AdamW)}


def described(optimizer: Optimizer) -> dict:
    """The optimiser's name and settings as JSON values."""
    settings = dataclasses.asdict(optimizer) if dataclasses.is_dataclass(optimizer) else {"step_size": optimizer.step_size}
    return {"name": type(optimizer).__name__} | {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def optimizer_from(settings: dict) -> Optimizer:
    """The optimiser that :func:`described` wrote down."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    name = values.pop("name", None)
    require(name in OPTIMIZERS, f"the inner optimiser {name!r} is not one of this kit's ({', '.join(OPTIMIZERS)}); pass the "
            "optimiser itself, as recipe=Own(optimizer=...)")
    return OPTIMIZERS[name](**values)
