"""Inner optimisers: pairs of pure functions, so that an update can be differentiated like any other function.

``init(params)`` makes the state and ``update(params, grads, state, step_size)`` returns new parameters and a new state, as in
optax.  :class:`Optimizer` says what is asked of one defined elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from distillkit.core.student import Params
from distillkit.io.checks import check_flag, check_number, check_rate

State = dict[str, Any]


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
