"""Meta-gradients: how the outer loss J(θ_T) reaches the distilled set φ through the training run.

Walk back the cotangents (λ, σ) of (θ, s), starting from (∇J(θ_T), 0).  At step t

1. the vector-Jacobian product of the *update* U gives the cotangents of θ_t, s_t, η_t and of the gradient g_t, called γ;
2. one *second-order product* of the loss along γ gives ∇²_θθ ℓ·γ, which is added to λ, and ∇²_φθ ℓ·γ, the meta-gradient
   of the examples and of their labels at that step.

U enters only through its own product, so any optimiser will do.  :class:`_StepByStep` is that walk.  A strategy says what it
stores of each step, and forms the product of step 2:

* :class:`StoreAll` lets autograd walk through the whole run: the definition, and the oracle in tests; memory grows with T.
* :class:`Replay` stores parameters and no graphs, and repeats each step when its turn comes: exact, and the memory of
  activations does not grow with T (Maclaurin et al., 2015, without the reversal; Engstrom et al., 2025).
* :class:`ForwardDifference` takes the product as a difference of two gradients: approximate, the cheapest on full
  parameters, and free of second derivatives, so that fused attention will do.
* :class:`Truncated` walks back through a window of steps only: biased, and cheaper by what it leaves out (Feng et al.,
  2024, "Embarrassingly simple dataset distillation", place the window at random).

A strategy of your own is any function of a :class:`~distillkit.core.problem.Problem` that returns a
:class:`~distillkit.core.problem.MetaGradient`; give it to an objective as ``metagrad=``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from distillkit.core.inner import Phi, inner_step, loss_and_grads
from distillkit.core.optimizers import SGD, State
from distillkit.core.problem import MetaGradient, Problem, grad, leaf, leaves, outer_loss_and_grads
from distillkit.core.student import Params, Student
from distillkit.io.checks import check_choice, check_flag, check_is, check_number, check_whole
from distillkit.io.seeds import derive_seed

ATTEMPTS = 4  # at an ε for one product


class Step(NamedTuple):
    """Inner step t as the way back finds it: where it began, and the gradients it took, where the strategy keeps them."""

    t: int
    params: Params
    state: State
    grads: Params | None = None
    d_phi: Phi | None = None


class Contribution(NamedTuple):
    """What the meta-gradient owes to step t alone: the gradient of φ through this step, and of the step's size."""

    t: int
    phi: Phi
    step_size: Tensor


# The second-order product of one step: (γ, whether the step is the first) → ∇²_θθ ℓ·γ (None at the first step) and ∇²_φθ ℓ·γ.
Product = Callable[[Params, bool], tuple[list[Tensor] | None, Phi]]


class _Strategy:
    """What all strategies share: the contributions of the steps add up to the meta-gradient."""

    def __call__(self, problem: Problem) -> MetaGradient:
        """The meta-gradient of ``problem``.

        Raises:
            ValueError: the student's attention or precision does not allow this strategy.
        """
        loss, steps = self.contributions(problem, 0, len(problem.rows))
        total = [torch.zeros_like(p) for p in problem.phi().tensors()]
        d_steps = torch.zeros_like(problem.step_sizes)
        for t, d_phi, d_step in steps:
            d_steps[t] = d_step
            for tensor, part in zip(total, d_phi.tensors(), strict=True):
                tensor += part
        d_phi = Phi(*total)
        return MetaGradient(loss, d_phi.embeds, d_phi.targets, d_steps)

    def contributions(self, problem: Problem, start: int, stop: int) -> tuple[float, Iterator[Contribution]]:
        """J after the run ended with step ``stop`` − 1, and what each step contributes, from the last back to ``start``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class StoreAll(_Strategy):
    """Autograd through the whole unroll, every graph kept: exact, memory O(T)."""

    def contributions(self, problem: Problem, start: int, stop: int) -> tuple[float, Iterator[Contribution]]:
        """See :meth:`_Strategy.contributions`."""
        _need_double_backward(problem.student, "StoreAll")
        _need_precision(problem.student, "StoreAll")
        params, state = problem.start()
        for t in range(start):
            params, state, *_ = problem.step(t, params, state)
        params, sizes = leaves(params), leaf(problem.step_sizes)
        phis = [problem.phi() for _ in range(start, stop)]  # a copy for each step tells their contributions apart
        for t, phi in zip(range(start, stop), phis, strict=True):
            params, state, *_ = inner_step(problem.student, problem.optimizer, params, state, problem.parts(t, phi), sizes[t],
                                           differentiable=True)
        loss = cast("Tensor", sum(part(params) for part in problem.outer))
        *d_phis, d_sizes = grad(loss, (*(tensor for phi in phis for tensor in phi.tensors()), sizes))
        width = len(problem.phi().tensors())
        by_step = [Phi(*d_phis[i : i + width]) for i in range(0, len(d_phis), width)]
        return float(loss.detach()), (Contribution(t, by_step[t - start], d_sizes[t]) for t in reversed(range(start, stop)))


@dataclasses.dataclass(frozen=True)
class _StepByStep(_Strategy):
    """Store parameters on the way there, walk back step by step.  Strategies fill in what they keep and the product.

    Args:
        every: store every k-th parameter set only and repeat the steps in between: about one more gradient a step, and
            T/k + k sets instead of T.
        host: store them in host memory.
    """

    every: int = 1
    host: bool = False

    def __post_init__(self):
        check_whole("every", self.every)
        check_flag("host", self.host)

    def check(self, student: Student) -> None:
        """Raise ValueError if this strategy cannot differentiate ``student``."""
        raise NotImplementedError

    def keeps(self, problem: Problem) -> tuple[str, ...]:
        """Which gradients of an inner step the way back needs: some of ``"grads"``, ``"d_phi"``."""
        raise NotImplementedError

    def linearise(self, problem: Problem, step: Step, notes: dict[str, float]) -> tuple[Params, Product]:
        """g_t, and the second-order product of ℓ at step t; ``notes`` go from each step to the one walked after it."""
        raise NotImplementedError

    def contributions(self, problem: Problem, start: int, stop: int) -> tuple[float, Iterator[Contribution]]:
        """See :meth:`_Strategy.contributions`."""
        self.check(problem.student)
        params, state = problem.start()
        stored = []
        for t in range(stop):
            step, params, state = self._forward(problem, t, params, state, keep=t >= start and self.every == 1)
            if t >= start and (t - start) % self.every == 0:
                stored.append(_to(torch.device("cpu"), step) if self.host else step)
        loss, cotangents = outer_loss_and_grads(problem, params)
        return loss, self._backward(problem, stored, start, stop, cotangents)

    def _backward(self, problem: Problem, stored: list[Step], start: int, stop: int, cotangents: Params):
        sigma, notes = None, {}
        while stored:
            steps = [_to(problem.student.device, stored.pop())]
            if self.every > 1:
                steps = self._repeated(problem, *steps, stop)
            while steps:
                cotangents, sigma, contribution = self._back(problem, steps.pop(), cotangents, sigma, notes, start)
                yield contribution

    def _back(self, problem: Problem, step: Step, cotangents: Params, sigma, notes: dict[str, float], start: int):
        """Step t backwards: from the cotangents of (θ_{t+1}, s_{t+1}) to those of (θ_t, s_t) and the step's contribution."""
        grads, product = self.linearise(problem, step, notes)
        direct, gamma, sigma, d_step = update_vjp(
            problem.optimizer, step.params, step.state, grads, problem.step_sizes[step.t], cotangents, sigma
        )
        along_theta, d_phi = product(gamma, step.t == start)  # at the first step the cotangent of θ is not needed
        if along_theta is not None:
            cotangents = {n: d + p for (n, d), p in zip(direct.items(), along_theta, strict=True)}
        return cotangents, sigma, Contribution(step.t, d_phi, d_step)

    def _forward(self, problem: Problem, t: int, params: Params, state: State, *, keep: bool) -> tuple[Step, Params, State]:
        """Inner step t, with the gradients that are kept, and where it leads."""
        names = self.keeps(problem) if keep else ()
        stepped = problem.step(t, params, state, problem.phi() if "d_phi" in names else None)
        step = Step(t, params, state, **{name: getattr(stepped, name) for name in names})
        return step, stepped.params, stepped.state

    def _repeated(self, problem: Problem, first: Step, stop: int) -> list[Step]:
        """The steps from ``first`` to the next stored one, made again from the parameters stored there."""
        steps, params, state = [], first.params, first.state
        end = min(first.t + self.every, stop)
        for t in range(first.t, end):
            if t == end - 1 and not self.keeps(problem):  # where this step leads is not needed
                return [*steps, Step(t, params, state)]
            step, params, state = self._forward(problem, t, params, state, keep=True)
            steps.append(step)
        return steps


@dataclasses.dataclass(frozen=True)
class Replay(_StepByStep):
    """Exact, with the activations of one step at a time: store θ_t, repeat each step on the way back.

    Args:
        every: store every k-th parameter set only and repeat the steps in between: about one more gradient a step, and
            T/k + k sets instead of T.
        host: store them in host memory.
    """

    def check(self, student: Student) -> None:
        """See :meth:`_StepByStep.check`."""
        _need_double_backward(student, "Replay")
        _need_precision(student, "Replay")

    def keeps(self, problem: Problem) -> tuple[str, ...]:
        """g_t, where several micro-batches' graphs are not alive at once; the graph of a single one gives it again."""
        return ("grads",) if problem.micro_batch else ()

    def linearise(self, problem: Problem, step: Step, notes: dict[str, float]) -> tuple[Params, Product]:
        """Reverse over reverse, one micro-batch's graphs at a time."""
        theta, phi = leaves(step.params), problem.phi()
        graphs = (grad(loss, tuple(theta.values()), create_graph=True) for loss in problem.loss(theta, step.t, phi))
        grads = step.grads
        if grads is None:
            graphs = list(graphs)
            grads = dict(zip(theta, *graphs, strict=True))

        def product(gamma: Params, first: bool):
            inputs = phi.tensors() if first else (*theta.values(), *phi.tensors())
            total = None
            for micro_batch in graphs:
                parts = grad(micro_batch, inputs, grad_outputs=list(gamma.values()))
                total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
            assert total is not None  # there is a micro-batch at least
            return (None, Phi(*total)) if first else (total[: len(theta)], Phi(*total[len(theta) :]))

        return grads, product


@dataclasses.dataclass(frozen=True)
class ForwardDifference(_StepByStep):
    """∇²ℓ·γ ≈ (∇ℓ(θ_t + εγ/‖γ‖) − ∇ℓ(θ_t))·‖γ‖/ε, for θ, φ and labels together: first-order gradients only.

    The gradient at θ_t is the one of the forward pass, so a step costs two gradients; a central one, with θ_t ± ε, three.
    The error has two parts: the curvature's own change over ε, and rounding, amplified by 1/ε.  The rule for ε balances
    them: the gradient shall change by ``change`` of its own norm.  How fast it changes along γ is guessed from the step
    walked before; where it then changes by more than three times as much, the product is taken again with the ε that this
    tells; the first step walked takes ε = 0.03 √u ‖θ‖, u being the unit of the floating-point type (1e-5 ‖θ‖ in float32).
    Where training has come to rest, the gradient is no measure for its own change: no ε is below 4 u ‖θ‖, which moves the
    parameters by a few bits, and a step that asks for less takes a central difference, for which 0.03 √u ‖θ‖ is the least.

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
        """See :meth:`_StepByStep.check`."""
        _need_precision(student, "ForwardDifference")

    def keeps(self, problem: Problem) -> tuple[str, ...]:
        """The gradient at θ_t, one side of the difference."""
        return ("grads", "d_phi")

    def linearise(self, problem: Problem, step: Step, notes: dict[str, float]) -> tuple[Params, Product]:
        """One difference, and more where ε was wrong; the slope ‖∇²ℓ·γ‖ / ‖γ‖ is noted for the next step."""
        assert step.grads is not None and step.d_phi is not None  # since they are kept
        grads, d_phi = step.grads, step.d_phi

        def product(gamma: Params, first: bool):
            norm, size, scale = _norm(gamma.values()), _norm(grads.values()), _norm(step.params.values())
            if norm == 0.0:
                return [torch.zeros_like(g) for g in gamma.values()], Phi(*(torch.zeros_like(p) for p in d_phi.tensors()))
            unit = torch.finfo(problem.params[next(iter(gamma))].dtype).eps
            least, epsilon, central = self.epsilon(scale, size, notes.get("slope"), unit)
            if first:
                return None, Phi(*_difference(problem, step, gamma, epsilon / norm, central, phi_only=True))
            for _ in range(ATTEMPTS):
                both = _difference(problem, step, gamma, epsilon / norm, central)
                notes["slope"] = _norm(both[: len(gamma)]) / norm
                if not notes["slope"] * epsilon > 3 * self.change * size or epsilon <= least:
                    break
                least, epsilon, central = self.epsilon(scale, size, notes["slope"], unit)  # steeper than at the step before
            return both[: len(gamma)], Phi(*both[len(gamma) :])

        return grads, product

    def epsilon(self, scale: float, size: float, slope: float | None, unit: float) -> tuple[float, float, bool]:
        """The least ε, the one to take, and whether the difference is to be central.

        Args:
            scale, size: ‖θ‖ and ‖g‖.
            slope: ‖∇²ℓ·γ‖ / ‖γ‖ at the step walked before; None at the first.
            unit: of the floating-point type.
        """
        first, least = 0.03 * math.sqrt(unit) * scale, 4 * unit * scale
        if not slope:
            return least, first, bool(self.central)
        aim = self.change * size / slope
        at_rest = aim < least  # a gradient of next to nothing is no measure for its own change
        central = at_rest if self.central is None else self.central
        least = first if central else least
        # Not far, either: along a flat direction ε would grow without end.
        return least, min(max(aim, least), 1e-4 * scale), central

    def report_error(self, problem: Problem) -> list[dict[str, float]]:
        """This strategy beside :class:`Replay` on one problem, step by step (first step first).

        Returns:
            for each inner step: ``step``, ``cosine`` and ``error`` (relative, in norm) of its contribution to the
            embeddings' meta-gradient, and ``share``, its norm as a share of the largest.
        """
        return compare(self, Replay(), problem)


def _difference(problem: Problem, step: Step, gamma: Params, h: float, central: bool, *, phi_only=False) -> list[Tensor]:
    """(∇(θ + hγ) − ∇(θ)) / h, or the central form, where ∇ is the gradient of θ and φ, or of φ only."""
    assert step.grads is not None and step.d_phi is not None  # since they are kept

    def gradient(h: float) -> list[Tensor]:
        theta, phi = {n: torch.add(p, gamma[n], alpha=h) for n, p in step.params.items()}, problem.phi()
        if phi_only:
            parts = [grad(part, phi.tensors()) for part in problem.loss(theta, step.t, phi)]
            return [cast("Tensor", sum(tensors)) for tensors in zip(*parts, strict=True)]
        _, grads, d_phi = loss_and_grads(problem.student, theta, problem.parts(step.t, phi), phi)
        return [*grads.values(), *cast("Phi", d_phi).tensors()]

    here = [*(() if phi_only else step.grads.values()), *step.d_phi.tensors()]
    ahead, behind = gradient(h), gradient(-h) if central else here
    return [(a - b) / (2 * h if central else h) for a, b in zip(ahead, behind, strict=True)]


@dataclasses.dataclass(frozen=True)
class Truncated(_Strategy):
    """Back through a window of steps only; what the others contribute is left out, so the meta-gradient is biased.

    Args:
        window: how many steps.
        inner: the strategy that walks through them: one of this module, or an object with its ``contributions``.
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
        if not callable(getattr(self.inner, "contributions", None)):
            raise TypeError(f"inner must be a strategy with contributions, such as Replay(), not {self.inner!r}")

    def contributions(self, problem: Problem, start: int, stop: int) -> tuple[float, Iterator[Contribution]]:
        """See :meth:`_Strategy.contributions`."""
        if self.place == "random" and stop - start > self.window:
            if problem.seed is None:
                raise ValueError("Truncated(place='random') draws its window from the seed of a Problem, which has none; give "
                                 "it one that changes with the outer step")
            stop = start + self.window + derive_seed("window", problem.seed) % (stop - start - self.window + 1)
        return self.inner.contributions(problem, max(start, stop - self.window), stop)


def suited(student: Student) -> tuple[_Strategy, str]:
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


def compare(strategy, oracle, problem: Problem) -> list[dict[str, float]]:
    """Two strategies on one problem, inner step by inner step; see :meth:`ForwardDifference.report_error`."""
    ours, exact = ({c.t: c.phi.embeds for c in s.contributions(problem, 0, len(problem.rows))[1]} for s in (strategy, oracle))
    largest = max(float(d.norm()) for d in exact.values())
    tiny = torch.finfo(torch.float64).tiny
    report = []
    for t in sorted(exact):
        a, b = ours[t].flatten().double(), exact[t].flatten().double()
        # Not torch's cosine_similarity, whose ε of 1e-8 counts for more than small contributions do.
        cosine = float(a @ b / (a.norm() * b.norm()).clamp_min(tiny))
        error = float((a - b).norm() / b.norm().clamp_min(tiny))
        report.append({"step": t, "cosine": cosine, "error": error, "share": float(b.norm()) / (largest or 1.0)})
    return report


def update_vjp(optimizer, params: Params, state: State, grads: Params, step_size: Tensor, cotangents: Params, sigma):
    """Vector-Jacobian product of (θ', s') = U(θ, s, g, η): the cotangents of θ, g (both by name), s (a list) and η.

    ``sigma`` holds the cotangents of the floating-point tensors of s', in the order of their tree; None at the last step,
    since nothing depends on the state any more.
    """
    if type(optimizer) is SGD and optimizer.clip_norm is None:  # θ' = θ − ηg, known without autograd's passes
        d_step = -sum(torch.dot(cotangents[n].flatten(), g.detach().flatten()) for n, g in grads.items())
        return cotangents, {n: -step_size * cotangents[n] for n in grads}, [], d_step
    values, tree = tree_flatten(state)
    learned = [i for i, value in enumerate(values) if _is_float(value)]
    theta, gradients, eta = leaves(params), leaves(grads), leaf(step_size)
    for i in learned:
        values[i] = values[i].detach().requires_grad_()
    new, new_state = optimizer.update(theta, gradients, tree_unflatten(values, tree), eta)
    outputs = [(new[n], cotangents[n]) for n in new]
    if sigma is not None:
        outputs += zip(filter(_is_float, tree_flatten(new_state)[0]), sigma, strict=True)
    outputs = [(value, cotangent) for value, cotangent in outputs if value.requires_grad]
    inputs = (*theta.values(), *gradients.values(), *(values[i] for i in learned), eta)
    products = grad([value for value, _ in outputs], inputs, grad_outputs=[cotangent for _, cotangent in outputs])
    n = len(theta)
    return dict(zip(theta, products[:n])), dict(zip(gradients, products[n : 2 * n])), products[2 * n : -1], products[-1]


def _is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _to(device: torch.device, step: Step) -> Step:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), step)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(t)) ** 2 for t in tensors))


def _need_double_backward(student: Student, strategy: str) -> None:
    # Fused attention raises deep inside autograd, in words that do not help; say it here.
    if student.attention != "eager":
        raise ValueError(
            f"{strategy} differentiates twice, and attention={student.attention!r} of student {student.name!r} has no "
            "second derivative; load the student with attention='eager', or use ForwardDifference"
        )


def _need_precision(student: Student, strategy: str) -> None:
    # bfloat16 has 8 bits: a training run of small steps mostly rounds to no step, and a difference of two gradients to 0.
    if student.dtype == torch.bfloat16:
        raise ValueError(
            f"{strategy} in bfloat16 would give a meta-gradient of rounding errors: load student {student.name!r} with "
            "dtype='float32'"
        )
