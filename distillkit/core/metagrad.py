"""Meta-gradients: how the outer loss J(θ_T) reaches the distilled set φ through the training run.

Walk back the cotangents (λ, σ) of (θ, s), starting from (∇J(θ_T), 0).  At step t

1. the vector-Jacobian product of the *update* U gives the cotangents of θ_t, s_t, η_t and of the gradient g_t, called γ;
2. one *second-order product* of the loss along γ gives ∇²_θθ ℓ·γ, added to λ, and ∇²_φθ ℓ·γ, the meta-gradient of the
   examples and of their labels at that step.

Because U enters only through its own product, any optimiser will do.  Strategies are objects and differ in how they form
step 2 and in what they keep meanwhile:

* :class:`StoreAll` lets autograd walk through the whole run: the definition, and the oracle in tests; memory grows with T.
* :class:`Replay` keeps parameters and no graphs, and repeats each step when its turn comes: exact, and the memory of
  activations does not grow with T (Maclaurin et al., 2015, without the reversal; Engstrom et al., 2025).
* :class:`ForwardDifference` takes the product as a difference of two gradients: approximate, the cheapest on full
  parameters, and free of second derivatives, so that fused attention will do.
* :class:`Truncated` walks back through a window of steps only: biased, and cheaper by what it leaves out (Feng et al.,
  2024, "Embarrassingly simple dataset distillation", place the window at random).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from distillkit.core.inner import SGD, Optimizer, Part, State, inner_step, loss_and_grads, set_parts
from distillkit.core.students import Params, Student
from distillkit.io.checks import check_choice, check_flag, check_is, check_number, check_whole
from distillkit.io.seeds import derive_seed

ATTEMPTS = 4  # at finding an ε for one product
Kept = tuple[Params, list[Tensor]] | None


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
    def mean(cls, found: Sequence[MetaGradient]) -> MetaGradient:
        """The average of meta-gradients taken at several initialisations or experts."""

        def average(name: str) -> Any:
            values = [getattr(f, name) for f in found]
            return None if values[0] is None else sum(values) / len(values)

        return cls(*(average(f.name) for f in dataclasses.fields(cls)))


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One inner training run and the loss at its end: what a strategy differentiates.

    ``embeds [m, l, d]``, ``mask [m, l]``, ``targets`` and ``step_sizes [T]`` live on the student's device; ``rows`` holds
    T index tensors.  ``outer`` holds functions of θ_T whose values add up to the scalar J: one for each part of the real
    batch, so that no more than one part's activations need be alive.  ``micro_batch`` bounds the examples of an inner
    step that are alive at a time; ``dropout_seed`` switches dropout on, with masks drawn from it; ``state`` is the
    optimiser's state at the start, fresh where it is None.  ``seed`` is the address of this run, another one in each outer
    step: strategies that draw something draw it from there.
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

    @property
    def learns_labels(self) -> bool:
        return self.targets.is_floating_point()

    def phi(self) -> tuple[Tensor, ...]:
        """Fresh leaves of what is learned at each step: embeddings, and labels where they are soft."""
        return (_leaf(self.embeds), _leaf(self.targets)) if self.learns_labels else (_leaf(self.embeds),)

    def parts(self, t: int, phi: tuple[Tensor, ...] | None = None) -> Iterator[Part]:
        """The micro-batches of step t, made of the leaves ``phi`` if given."""
        embeds = phi[0] if phi else self.embeds
        targets = phi[1] if phi and self.learns_labels else self.targets
        dropout = None if self.dropout_seed is None else (self.dropout_seed, t)
        return set_parts(self.rows[t], embeds, self.mask, targets, micro_batch=self.micro_batch, dropout=dropout)

    def loss(self, params: Params, t: int, phi: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """ℓ(θ, φ_t) in parts that add up, with a graph."""
        for share, batch, labels, seed in self.parts(t, phi):
            yield share * self.student.loss(params, batch, labels, dropout_seed=seed)

    def step(self, t: int, params: Params, state: State, phi: tuple[Tensor, ...] = ()):
        """Inner step t without a graph; see :func:`~distillkit.core.inner.inner_step`."""
        parts = self.parts(t, phi)
        return inner_step(self.student, self.optimizer, params, state, parts, self.step_sizes[t], phi)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _leaves(params: Params) -> Params:
    return {n: p.detach().requires_grad_() for n, p in params.items()}


def _grad(outputs, inputs, **kwargs) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, inputs, allow_unused=True, materialize_grads=True, **kwargs))


def _need_double_backward(student: Student, strategy: str) -> None:
    # Fused attention raises deep inside autograd, in words that do not help; say it here.
    if student.attention != "eager":
        raise ValueError(
            f"{strategy} differentiates twice, and attention={student.attention!r} of student {student.name!r} has no "
            "second derivative; load the student with attention='eager', or use ForwardDifference"
        )


def _need_precision(student: Student, strategy: str) -> None:
    # bfloat16 keeps 8 bits: a training run of small steps mostly rounds to no step, and a difference of two gradients
    # to nothing.
    if student.dtype == torch.bfloat16:
        raise ValueError(
            f"{strategy} in bfloat16 would give a meta-gradient of rounding errors: load student {student.name!r} with "
            "dtype='float32'"
        )


def outer_loss_and_grads(problem: Problem, params: Params) -> tuple[float, Params]:
    """J(θ_T) and ∇J(θ_T), part by part."""
    leaves = _leaves(params)
    total, grads = 0.0, None
    for part in problem.outer:
        loss = part(leaves)
        found = _grad(loss, tuple(leaves.values()))
        total += float(loss.detach())
        grads = found if grads is None else [a + b for a, b in zip(grads, found, strict=True)]
    assert grads is not None  # there is a part at least
    return total, dict(zip(leaves, grads, strict=True))


class _Strategy:
    """What all strategies share: contributions of the steps are gathered into a meta-gradient."""

    def __call__(self, problem: Problem, start: int = 0, stop: int | None = None) -> MetaGradient:
        """The meta-gradient of ``problem``, its run ended after ``stop`` steps (default: all of them), and walked back
        no further than step ``start``.

        Raises:
            ValueError: the student's attention or precision does not allow this strategy.
        """
        stop = len(problem.rows) if stop is None else stop
        loss, steps = self.contributions(problem, start, stop)
        d_phi = [torch.zeros_like(p) for p in problem.phi()]
        d_steps = torch.zeros_like(problem.step_sizes)
        for t, found, d_step in steps:
            d_steps[t] = d_step
            for total, part in zip(d_phi, found, strict=True):
                total += part
        return MetaGradient(loss, d_phi[0], d_phi[1] if problem.learns_labels else None, d_steps)

    def contributions(self, problem: Problem, start: int, stop: int) -> tuple[float, Iterator]:
        """J, and for each step from the last to ``start``: (t, [∇ of φ through step t alone], ∇ of its step size)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class StoreAll(_Strategy):
    """Autograd through the whole unroll, every graph kept: exact, memory O(T)."""

    def contributions(self, problem: Problem, start: int, stop: int) -> tuple[float, Iterator]:
        """See :meth:`_Strategy.contributions`."""
        _need_double_backward(problem.student, "StoreAll")
        _need_precision(problem.student, "StoreAll")
        params, state = problem.start()
        for t in range(start):
            params, state, *_ = problem.step(t, params, state)
        params, sizes = _leaves(params), _leaf(problem.step_sizes)
        phis = [problem.phi() for _ in range(start, stop)]  # a copy for each step tells their contributions apart
        for t, phi in zip(range(start, stop), phis, strict=True):
            loss = sum(problem.loss(params, t, phi))
            grads = dict(zip(params, _grad(loss, tuple(params.values()), create_graph=True), strict=True))
            params, state = problem.optimizer.update(params, grads, state, sizes[t])
        loss = cast("Tensor", sum(part(params) for part in problem.outer))
        found = _grad(loss, (*(p for phi in phis for p in phi), sizes))
        width = len(phis[0])
        by_step = [found[i : i + width] for i in range(0, len(found) - 1, width)]
        return float(loss.detach()), ((t, by_step[t - start], found[-1][t]) for t in reversed(range(start, stop)))


@dataclasses.dataclass(frozen=True)
class _Walk(_Strategy):
    """Keep parameters, walk back step by step.  Subclasses say how one second-order product is formed."""

    every: int = 1
    host: bool = False

    def __post_init__(self):
        check_whole("every", self.every)
        check_flag("host", self.host)

    def contributions(self, problem: Problem, start: int, stop: int) -> tuple[float, Iterator]:
        """See :meth:`_Strategy.contributions`."""
        self.check(problem.student)
        walk = self._new_walk(problem)
        params, state = problem.start()
        kept_sets: dict[int, tuple[Params, State, Kept]] = {}
        for t in range(stop):
            keep = t >= start and (t - start) % self.every == 0
            new = walk.forward(t, params, state) if t >= start else problem.step(t, params, state)
            if keep:
                kept_sets[t] = self._store((params, state, new[2] if self.every == 1 else None))
            params, state = new[0], new[1]
        loss, cotangents = outer_loss_and_grads(problem, params)
        return loss, self._back(problem, walk, kept_sets, start, stop, cotangents)

    def _back(self, problem, walk, kept_sets, start, stop, cotangents):
        device, sigma = problem.student.device, None
        for first in sorted(kept_sets, reverse=True):
            segment = [_moved(kept_sets.pop(first), device)]
            if self.every > 1:  # the steps in between are made again
                segment = list(walk.again(first, min(first + self.every, stop), *segment[0][:2]))
            for t in reversed(range(first, first + len(segment))):
                params, state, kept = segment.pop()
                cotangents, sigma, d_phi, d_step = walk.back(t, params, state, kept, cotangents, sigma, t == start)
                yield t, d_phi, d_step

    def _store(self, kept) -> tuple[Params, State, Kept]:
        return _moved(kept, torch.device("cpu")) if self.host else kept

    def check(self, student: Student) -> None:
        """Raise ValueError if this strategy cannot differentiate ``student``."""
        raise NotImplementedError

    def _new_walk(self, problem: Problem) -> _Walker:
        raise NotImplementedError


def _split(found: list[Tensor], phi: int) -> tuple[list[Tensor], list[Tensor]]:
    """What belongs to θ (nothing, if not asked for) and what to the ``phi`` tensors of φ, which come last."""
    return found[:-phi], found[-phi:]


class _Walker:
    """One walk there and back over a problem; holds what passes from one step to the next."""

    keeps_gradients = False
    keeps_phi = False

    def __init__(self, problem: Problem):
        self.problem = problem

    def forward(self, t: int, params: Params, state: State) -> tuple[Params, State, Kept]:
        """An inner step, and what the way back wants of it."""
        phi = self.problem.phi() if self.keeps_phi else ()
        params, state, grads, d_phi = self.problem.step(t, params, state, phi)
        return params, state, (grads, d_phi) if self.keeps_gradients else None

    def again(self, first: int, stop: int, params: Params, state: State) -> Iterator[tuple[Params, State, Kept]]:
        """The steps from ``first`` on, repeated from the parameters kept there."""
        for t in range(first, stop):
            if t == stop - 1 and not self.keeps_gradients:  # where that step leads is not wanted
                yield params, state, None
                return
            new, new_state, kept = self.forward(t, params, state)
            yield params, state, kept
            params, state = new, new_state

    def back(self, t, params, state, kept, cotangents, sigma, first: bool):
        """Step t backwards: cotangents of θ_t and s_t, and the contributions to φ and η_t.

        Nothing comes before the ``first`` step, so what its product along θ would be is not formed.
        """
        grads, product = self.linearise(t, params, kept)
        direct, gamma, sigma, d_step = update_vjp(
            self.problem.optimizer, params, state, grads, self.problem.step_sizes[t], cotangents, sigma
        )
        along_theta, d_phi = product(gamma, first)
        cotangents = {n: d + p for (n, d), p in zip(direct.items(), along_theta, strict=True)} if along_theta else {}
        return cotangents, sigma, d_phi, d_step

    def linearise(self, t: int, params: Params, kept: Kept):
        """g_t, and the function (γ, first) → (∇²_θθ ℓ·γ, ∇²_φθ ℓ·γ), the former empty at the first step."""
        raise NotImplementedError


class _ReverseOverReverse(_Walker):
    def linearise(self, t, params, kept):
        problem, theta, phi = self.problem, _leaves(params), self.problem.phi()
        (loss,) = problem.loss(theta, t, phi)
        total = _grad(loss, tuple(theta.values()), create_graph=True)

        def product(gamma: list[Tensor], first: bool):
            wanted = phi if first else (*theta.values(), *phi)
            return _split(_grad(total, wanted, grad_outputs=gamma), len(phi))

        return dict(zip(theta, total, strict=True)), product


class _MicroBatched(_Walker):
    """Reverse over reverse, one micro-batch's graphs at a time; γ comes from the gradient kept on the way there."""

    keeps_gradients = True

    def linearise(self, t, params, kept):
        problem = self.problem
        assert kept is not None  # since keeps_gradients

        def product(gamma: list[Tensor], first: bool):
            theta, phi, total = _leaves(params), problem.phi(), None
            wanted = phi if first else (*theta.values(), *phi)
            for part in problem.loss(theta, t, phi):
                grads = _grad(part, tuple(theta.values()), create_graph=True)
                found = _grad(grads, wanted, grad_outputs=gamma)
                total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
            assert total is not None  # there is a part at least
            return _split(total, len(phi))

        return kept[0], product


@dataclasses.dataclass(frozen=True)
class Replay(_Walk):
    """Exact, with the activations of one step at a time: keep θ_t, repeat each step on the way back.

    Args:
        every: keep every k-th parameter set only and repeat the steps in between: about one more gradient a step, and
            T/k + k sets instead of T.
        host: keep them in host memory.
    """

    def check(self, student: Student) -> None:
        """See :meth:`_Walk.check`."""
        _need_double_backward(student, "Replay")
        _need_precision(student, "Replay")

    def _new_walk(self, problem: Problem) -> _Walker:
        return _MicroBatched(problem) if problem.micro_batch else _ReverseOverReverse(problem)


@dataclasses.dataclass(frozen=True)
class ForwardDifference(_Walk):
    """∇²ℓ·γ ≈ (∇ℓ(θ_t + εγ/‖γ‖) − ∇ℓ(θ_t))·‖γ‖/ε, for θ, φ and labels together: first-order gradients only.

    The gradient at θ_t is the one of the forward pass, so a step costs two gradients; a central one, with θ_t ± ε, three.
    The error has two parts: the curvature's own change over ε, and rounding, amplified by 1/ε.  The rule for ε balances
    them: it is chosen so that the gradient changes by ``change`` of its own norm.  How fast it changes along γ is guessed
    from the step made before on the way back; where it then changes by more than three times as much, the product is
    taken again with the ε that this tells; the first step made takes ε = 0.03 √u ‖θ‖, u being the unit of the
    floating-point type (1e-5 ‖θ‖ in float32).  Where training has come to rest, the gradient is no measure for its own
    change: no ε is below 4 u ‖θ‖, which moves the parameters by a few bits, and a step that would want less takes a
    central difference, for which 0.03 √u ‖θ‖ is the least.

    It needs a smooth model: where θ_t and θ_t + ε lie on two sides of a ReLU's kink, the gradient jumps, and the jump is
    divided by ε (DistilBERT's head and OPT have ReLU units; BERT, RoBERTa, Llama have none).

    Args:
        central: difference of θ_t + ε and θ_t − ε, at every step (True) or none (False): error of second order in ε, half
            as much work again.  None: by the rule above.
        change: the relative change of the gradient that ε aims at.
        every, host: as for :class:`Replay`.
    """

    central: bool | None = None
    change: float = 0.003

    def __post_init__(self):
        super().__post_init__()
        check_number("change", self.change, most=1, without="least and most")
        if self.central is not None:
            check_flag("central", self.central)

    def check(self, student: Student) -> None:
        """See :meth:`_Walk.check`."""
        _need_precision(student, "ForwardDifference")

    def _new_walk(self, problem: Problem) -> _Walker:
        return _Difference(problem, self.central, self.change)

    def report_error(self, problem: Problem) -> list[dict[str, float]]:
        """This strategy beside :class:`Replay` on one problem, step by step (first step first).

        Returns:
            for each inner step: ``step``, ``cosine`` and ``error`` (relative, in norm) of its contribution to the
            embeddings' meta-gradient, and ``share``, its norm as a share of the largest.
        """
        return compare(self, Replay(), problem)


class _Difference(_Walker):
    keeps_gradients = True
    keeps_phi = True

    def __init__(self, problem: Problem, central: bool | None, change: float):
        super().__init__(problem)
        self.central, self.change = central, change
        self.dtype = next(iter(problem.params.values())).dtype
        self.slope: float | None = None  # ‖∇²ℓ·γ‖ / ‖γ‖ at the last step made

    def linearise(self, t, params, kept):
        assert kept is not None  # since keeps_gradients
        grads, d_phi = kept

        def product(gamma: list[Tensor], first: bool):
            norm, size = _norm(gamma), _norm(grads.values())
            if norm == 0.0:
                return [torch.zeros_like(g) for g in gamma], [torch.zeros_like(p) for p in d_phi]
            scale, here = _norm(params.values()), [*grads.values(), *d_phi]
            least, epsilon, central = self._choose(scale, size)
            if first:
                return [], self._difference(t, params, d_phi, gamma, epsilon / norm, central, phi_only=True)
            for _ in range(ATTEMPTS):
                found = self._difference(t, params, here, gamma, epsilon / norm, central)
                self.slope = _norm(found[: len(gamma)]) / norm
                change = self.slope * epsilon
                if not change > 3 * self.change * size or epsilon <= least:
                    break
                least, epsilon, central = self._choose(scale, size)  # the direction is steeper than the last one was
            return _split(found, len(d_phi))

        return grads, product

    def _difference(self, t, params, here, gamma, step, central, phi_only: bool = False) -> list[Tensor]:
        """(∇(θ + step·γ) − ∇(θ)) / step, or the central form; ``here`` is the gradient at θ, of θ and φ (or φ only)."""
        there = self._at(t, params, gamma, step, phi_only)
        back = self._at(t, params, gamma, -step, phi_only) if central else here
        return [(a - b) / (2 * step if central else step) for a, b in zip(there, back, strict=True)]

    def _choose(self, scale: float, size: float) -> tuple[float, float, bool]:
        """The least ε, the one to take, and whether the difference is to be central, for ‖θ‖ = scale and ‖g‖ = size."""
        unit = torch.finfo(self.dtype).eps
        first, least = 0.03 * math.sqrt(unit) * scale, 4 * unit * scale
        if not self.slope:
            return least, first, bool(self.central)
        wanted = self.change * size / self.slope
        at_rest = wanted < least  # a gradient of next to nothing is no measure for its own change
        central = at_rest if self.central is None else self.central
        least = first if central else least
        # Not far, either: along a flat direction ε would grow without end.
        return least, min(max(wanted, least), 1e-4 * scale), central

    def _at(self, t: int, params: Params, gamma: list[Tensor], step: float, phi_only: bool) -> list[Tensor]:
        moved = {n: torch.add(p, g, alpha=step) for (n, p), g in zip(params.items(), gamma, strict=True)}
        phi, problem = self.problem.phi(), self.problem
        if phi_only:
            found = [_grad(part, phi) for part in problem.loss(moved, t, phi)]
            return [cast("Tensor", sum(g)) for g in zip(*found, strict=True)]
        _, grads, d_phi = loss_and_grads(problem.student, moved, problem.parts(t, phi), phi)
        return [*grads.values(), *d_phi]


@dataclasses.dataclass(frozen=True)
class Truncated(_Strategy):
    """Back through a window of steps only; what the others contribute is left out, so the meta-gradient is biased.

    Args:
        window: how many steps.
        inner: the strategy that walks through them.
        place: ``"last"``: the end of the run.  ``"random"``: the run ends after a random number of steps, from ``window``
            to all of them with equal chances, and the window is its end (RaT-BPTT).  It is drawn from the problem's seed,
            so it changes from one outer step to the next, whatever the student draws.
    """

    window: int
    inner: _Strategy = Replay()
    place: str = "last"

    def __post_init__(self):
        check_whole("window", self.window)
        check_choice("place", self.place, ("last", "random"))
        if not isinstance(self.inner, _Strategy):
            raise TypeError(f"inner must be a strategy such as Replay(), not {self.inner!r}")

    def contributions(self, problem: Problem, start: int, stop: int) -> tuple[float, Iterator]:
        """See :meth:`_Strategy.contributions`."""
        if self.place == "random" and stop - start > self.window:
            if problem.seed is None:
                raise ValueError("Truncated(place='random') draws its window from the seed of a Problem, which has none; give "
                                 "it one that changes with the outer step")
            stop = start + self.window + derive_seed("window", problem.seed) % (stop - start - self.window + 1)
        return self.inner.contributions(problem, max(start, stop - self.window), stop)


def recommend(student: Student) -> tuple[_Strategy, str]:
    """The strategy that suits a student, and why in a sentence.

    Raises:
        ValueError: none suits: the student is in bfloat16.
    """
    check_is("student", student, Student)
    _need_precision(student, "Every strategy")
    if student.attention != "eager":
        return ForwardDifference(), f"attention={student.attention!r} has no second derivative, and differences need none"
    if student.trainable == "head":
        return Replay(), "with a frozen body an exact product costs three gradients a step, a difference four"
    if student.has_kinks:
        return Replay(), "its ReLU units make the gradient jump where a difference of gradients steps across a kink"
    if student.dtype == torch.float64:
        return Replay(), "float64 is for proofs, and Replay is exact"
    exact = "four" if student.trainable == "full" else "three"
    return ForwardDifference(), f"it costs two gradients a step where an exact product costs {exact}"


def compare(strategy: _Strategy, oracle: _Strategy, problem: Problem) -> list[dict[str, float]]:
    """Two strategies on one problem, inner step by inner step; see :meth:`ForwardDifference.report_error`."""
    found = [{t: d[0] for t, d, _ in s.contributions(problem, 0, len(problem.rows))[1]} for s in (strategy, oracle)]
    largest = max(float(d.norm()) for d in found[1].values())
    report = []
    for t in sorted(found[1]):
        ours, theirs = found[0][t].flatten().double(), found[1][t].flatten().double()
        # Not torch's cosine_similarity, whose ε of 1e-8 counts for more than small contributions do.
        cosine = float(ours @ theirs / (ours.norm() * theirs.norm()).clamp_min(torch.finfo(torch.float64).tiny))
        error = float((ours - theirs).norm() / theirs.norm().clamp_min(torch.finfo(torch.float64).tiny))
        report.append({"step": t, "cosine": cosine, "error": error, "share": float(theirs.norm()) / (largest or 1.0)})
    return report


def _norm(tensors) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(t)) ** 2 for t in tensors))


def _moved(kept, device) -> Any:
    """Parameters, state and kept gradients on ``device``, whatever their nesting."""
    if isinstance(kept, Tensor):
        return kept.to(device)
    if isinstance(kept, dict):
        return {k: _moved(v, device) for k, v in kept.items()}
    if isinstance(kept, tuple | list):
        return type(kept)(_moved(v, device) for v in kept)
    return kept


def _state_tensors(state: State) -> list[Tensor]:
    """The tensors of an optimiser's state, in a fixed order."""
    return [t for value in state.values() if isinstance(value, dict) for t in value.values()]


def _with_tensors(state: State, tensors: list[Tensor]) -> State:
    """``state`` with its tensors replaced by ``tensors``, in the order of :func:`_state_tensors`."""
    supply = iter(tensors)
    return {k: {n: next(supply) for n in v} if isinstance(v, dict) else v for k, v in state.items()}


def update_vjp(optimizer, params, state, grads, step_size, cotangents, sigma):
    """Vector-Jacobian product of (θ', s') = U(θ, s, g, η): cotangents of θ (a dict), g, s (lists) and η."""
    if optimizer == SGD(optimizer.step_size):  # θ' = θ − ηg, known without autograd's passes over every parameter
        d_step = -sum(torch.dot(cotangents[n].flatten(), g.detach().flatten()) for n, g in grads.items())
        return cotangents, [-step_size * cotangents[n] for n in grads], [], d_step
    theta = _leaves(params)
    gs = {n: g.detach().requires_grad_() for n, g in grads.items()}
    state_in = [s.detach().requires_grad_() for s in _state_tensors(state)]
    eta = step_size.detach().clone().requires_grad_()
    new, new_state = optimizer.update(theta, gs, _with_tensors(state, state_in), eta)
    outputs, seeds = list(new.values()), [cotangents[n] for n in new]
    if sigma is not None:  # at the last step nothing depends on the state any more
        outputs, seeds = outputs + _state_tensors(new_state), seeds + sigma
    found = _grad(outputs, (*theta.values(), *gs.values(), *state_in, eta), grad_outputs=seeds)
    n = len(theta)
    return dict(zip(theta, found[:n], strict=True)), found[n : 2 * n], found[2 * n : -1], found[-1]
