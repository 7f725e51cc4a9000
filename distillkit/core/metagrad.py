"""Meta-gradients: how the outer loss J(θ_T) reaches the distilled set φ through the training run.

Walk back the cotangents (λ, σ) of (θ, s), starting from (∇J(θ_T), 0).  At step t (:func:`step_back`)

1. the vector-Jacobian product of the *update* U gives the cotangents of θ_t, s_t, η_t and of the gradient g_t, called γ;
2. one *second-order product* of the loss along γ gives ∇²_θθ ℓ·γ, which is added to λ, and ∇²_φθ ℓ·γ, the meta-gradient
   of the examples and of their labels at that step.

U enters only through its own product, so any optimiser will do.  A strategy is an object with one method,
``__call__(problem) -> MetaGradient``; those of this module differ in what they store, and in the product of step 2:

* :class:`StoreAll` lets autograd walk through the whole run: the definition, and the oracle in tests; memory grows with T.
* :class:`Replay` stores parameters and no graphs, and repeats each step on the way back: exact, and the memory of
  activations does not grow with T (Maclaurin et al., 2015, without the reversal; Engstrom et al., 2025).
* :class:`ForwardDifference` takes the product as a difference of two gradients: approximate, the cheapest on full
  parameters, and free of second derivatives, so that fused attention will do.
* :class:`Truncated` walks back through a window of steps only: biased, and cheaper by the steps it leaves out (Feng et al.,
  2024, "Embarrassingly simple dataset distillation", place the window at random).

Proofs in ``tests/test_metagrad.py``: ``test_store_all_is_the_derivative`` (differences of the outer loss) and
``test_replay_equals_store_all`` (the walk back against autograd through the whole run).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from distillkit.core.inner import Phi, grad, inner_step, leaves, loss_and_grads, summed, to_device
from distillkit.core.optimizers import SGD, State
from distillkit.core.problem import MetaGradient, Problem, leaf, outer_loss_and_grads
from distillkit.core.student import Params, Student
from distillkit.io.checks import check_choice, check_flag, check_is, check_number, check_whole, require
from distillkit.io.seeds import derive_seed

ATTEMPTS = 4  # at an ε for one product


@dataclasses.dataclass(frozen=True)
class StoreAll:
    """Autograd through the whole unroll, every graph kept: exact, memory O(T)."""

    def __call__(self, problem: Problem) -> MetaGradient:
        """The meta-gradient of ``problem``; a ValueError where the student's attention or precision does not allow it."""
        _need_second_derivatives(problem.student, "StoreAll")
        phi, step_sizes, (params, state) = problem.phi(), leaf(problem.step_sizes), problem.start()
        params = leaves(params)
        for t in range(len(problem.rows)):
            params, state, *_ = inner_step(problem.student, problem.optimizer, params, state, problem.parts(t, phi),
                                           step_sizes[t], differentiable=True)
        loss = cast("Tensor", sum(part(params) for part in problem.outer))
        *d_phi, d_step_sizes = grad(loss.sum(), (*phi.tensors(), step_sizes))
        return MetaGradient(loss=loss.tolist(), step_sizes=d_step_sizes, **phi.like(d_phi)._asdict())


class Step(NamedTuple):
    """Inner step t as the way back needs it: its beginning, and the gradients it took, where the strategy keeps them."""

    t: int
    params: Params
    state: State
    grads: Params | None = None
    d_phi: Phi | None = None


# The second-order product of a step: (γ, whether t = 0) → ∇²_θθ ℓ·γ (None if t = 0, where it is not needed) and ∇²_φθ ℓ·γ.
Product = Callable[[Params, bool], tuple[Params | None, Phi]]
# (problem, step, notes) → g_t and the product of that step; ``notes`` is a dict that goes from each step to the one before it.
Linearise = Callable[[Problem, Step, dict], tuple[Params, Product]]


def step_back(
    problem: Problem, step: Step, cotangents: Params, sigma: list | None, linearise: Linearise, notes: dict
) -> tuple[Params, list | None, Phi, Tensor]:
    """From the cotangents λ, σ of (θ_{t+1}, s_{t+1}) to those of (θ_t, s_t), and the gradients of φ and η at step t."""
    grads, product = linearise(problem, step, notes)
    cotangents, gamma, sigma, d_step_size = update_vjp(
        problem.optimizer, step.params, step.state, grads, problem.step_sizes[step.t], cotangents, sigma
    )
    along_theta, d_phi = product(gamma, step.t == 0)
    if along_theta is not None:
        cotangents = {n: c + along_theta[n] for n, c in cotangents.items()}
    return cotangents, sigma, d_phi, d_step_size


def update_vjp(optimizer, params: Params, state: State, grads: Params, step_size: Tensor, cotangents: Params,
               sigma: list | None) -> tuple[Params, Params, list, Tensor]:
    """Vector-Jacobian product of (θ', s') = U(θ, s, g, η): the cotangents of θ, g, s (a list) and η.

    ``sigma`` holds the cotangents of the floats of s', in the order of their tree; None at the last step: nothing follows it.
    """
    if type(optimizer) is SGD and optimizer.clip_norm is None:  # θ' = θ − ηg, known without autograd's passes
        d_step = -sum(torch.dot(cotangents[n].flatten(), g.detach().flatten()) for n, g in grads.items())
        return cotangents, {n: -step_size * cotangents[n] for n in grads}, [], cast("Tensor", d_step)
    values, tree = tree_flatten(state)
    values = [value.detach().requires_grad_() if _is_float(value) else value for value in values]
    theta, gradients, eta = leaves(params), leaves(grads), leaf(step_size)
    new, new_state = optimizer.update(theta, gradients, tree_unflatten(values, tree), eta)
    outputs = [(new[n], cotangents[n]) for n in new]
    if sigma is not None:
        outputs += zip(filter(_is_float, tree_flatten(new_state)[0]), sigma, strict=True)
    outputs = [(value, cotangent) for value, cotangent in outputs if value.requires_grad]
    inputs = (*theta.values(), *gradients.values(), *filter(_is_float, values), eta)
    products = grad([value for value, _ in outputs], inputs, grad_outputs=[cotangent for _, cotangent in outputs])
    n = len(theta)
    return dict(zip(theta, products)), dict(zip(gradients, products[n:])), products[2 * n : -1], products[-1]


def walk_back(problem: Problem, linearise: Linearise, keep: tuple[str, ...], every: int, host: bool) -> MetaGradient:
    """The meta-gradient of ``problem``: train, store where steps begin, and sum what :func:`step_back` gives for each.

    Args:
        linearise: how g_t and the second-order product of a step are computed.
        keep: gradients of the forward pass that the way back needs: some of ``"grads"``, ``"d_phi"``.
        every, host: as for :class:`Replay`.
    """
    stored, loss, cotangents = _train(problem, keep, every, host)
    total, d_step_sizes = [torch.zeros_like(p) for p in problem.phi().tensors()], torch.zeros_like(problem.step_sizes)
    sigma, notes, t = None, {}, len(problem.rows)
    while stored:
        steps = [to_device(stored.pop(), problem.student.device)]
        if every > 1:  # repeat the steps up to t − 1; the last one is run only if its gradients are kept
            begin = steps.pop()
            steps = list(_steps(problem, begin, t if keep else t - 1, keep))[: t - begin.t]
        while steps:
            t -= 1
            cotangents, sigma, d_phi, d_step_sizes[t] = step_back(problem, steps.pop(), cotangents, sigma, linearise, notes)
            for tensor, part in zip(total, d_phi.tensors(), strict=True):
                tensor += part
    return MetaGradient(loss=loss, step_sizes=d_step_sizes, **problem.phi().like(total)._asdict())


def _train(problem: Problem, keep: tuple[str, ...], every: int, host: bool) -> tuple[list[Step], float, Params]:
    """Every k-th step of the training run, J(θ_T) and ∇J(θ_T)."""
    stored, end = [], len(problem.rows)
    for step in _steps(problem, Step(0, *problem.start()), end, keep if every == 1 else ()):
        if step.t < end and step.t % every == 0:
            stored.append(to_device(step, "cpu") if host else step)
    return stored, *outer_loss_and_grads(problem, step.params)


def _steps(problem: Problem, first: Step, stop: int, keep: tuple[str, ...]) -> Iterator[Step]:
    """The steps from ``first`` to ``stop`` − 1 with the gradients in ``keep``, and the beginning of step ``stop``."""
    params, state = first.params, first.state
    for t in range(first.t, stop):
        stepped = problem.step(t, params, state, problem.phi() if "d_phi" in keep else None)
        step = Step(t, params, state, **{name: getattr(stepped, name) for name in keep})
        params, state = stepped.params, stepped.state
        del stepped  # gradients that are not kept are freed
        yield step
    yield Step(stop, params, state)


@dataclasses.dataclass(frozen=True)
class Replay:
    """Exact, with the activations of one step at a time: store θ_t, repeat each step on the way back.

    Args:
        every: store every k-th parameter set only (T/k + k sets instead of T), for about one more gradient per step.
        host: store them in host memory.
    """

    every: int = 1
    host: bool = False

    def __post_init__(self):
        check_whole("every", self.every)
        check_flag("host", self.host)

    def __call__(self, problem: Problem) -> MetaGradient:
        """The meta-gradient of ``problem``; a ValueError where the student's attention or precision does not allow it."""
        _need_second_derivatives(problem.student, "Replay")
        # The graph of one micro-batch gives g_t again; those of several are not alive at once.
        return walk_back(problem, _exact, ("grads",) if problem.micro_batch else (), self.every, self.host)


def _exact(problem: Problem, step: Step, notes: dict) -> tuple[Params, Product]:
    """g_t and its product, reverse over reverse, one micro-batch's graph at a time."""
    theta, phi = leaves(step.params), problem.phi()
    graphs: Iterable = (grad(loss, tuple(theta.values()), create_graph=True) for loss in problem.loss(theta, step.t, phi))
    grads = step.grads
    if grads is None:
        graphs = list(graphs)
        grads = dict(zip(theta, graphs[0], strict=True))

    def product(gamma: Params, at_start: bool) -> tuple[Params | None, Phi]:
        inputs = phi.tensors() if at_start else (*phi.tensors(), *theta.values())
        products = summed(grad(gradient, inputs, grad_outputs=list(gamma.values())) for gradient in graphs)
        along_phi, along_theta = products[: len(phi.tensors())], products[len(phi.tensors()) :]
        return None if at_start else dict(zip(theta, along_theta, strict=True)), phi.like(along_phi)

    return grads, product


@dataclasses.dataclass(frozen=True)
class ForwardDifference:
    """∇²ℓ·γ ≈ (∇ℓ(θ_t + εγ/‖γ‖) − ∇ℓ(θ_t))·‖γ‖/ε, for θ, φ and labels together: first-order gradients only.

    The gradient at θ_t is the one of the forward pass, so a step costs two gradients; a central difference, with θ_t ± ε,
    costs three.  The error has two parts: the curvature's own change over ε, and rounding, amplified by 1/ε.  ε is chosen
    by three rules, in which u is the unit of the floating-point type:

    1. Step T − 1, the first that is walked, takes ε = 0.03 √u ‖θ‖ (1e-5 ‖θ‖ in float32).
    2. Every other step aims at a gradient that changes by ``change`` of its norm, by the slope along γ of the step walked
       before.  If the gradient changes by more than three times the aim, the product is computed again.
    3. ε is never below 4 u ‖θ‖, which moves the parameters by a few bits.  A step that asks for less (its gradient is almost
       zero) takes a central difference, with an ε of at least 0.03 √u ‖θ‖.

    It needs a smooth model: where a ReLU's kink lies between θ_t and θ_t + ε, the gradient jumps, and the jump is divided by
    ε (DistilBERT's head and OPT have ReLU units; BERT, RoBERTa, Llama have none).  :meth:`report_error` measures the error.

    Args:
        every, host: as for :class:`Replay`.
        central: difference of θ_t + ε and θ_t − ε, at every step (True) or none (False): error of second order in ε, half
            as much work again.  None: by the rule above.
        change: the relative change of the gradient that ε aims at, in (0, 1).
    """

    every: int = 1
    host: bool = False
    central: bool | None = None
    change: float = 0.003

    def __post_init__(self):
        check_whole("every", self.every)
        check_flag("host", self.host)
        check_number("change", self.change, most=1, without="least and most")
        if self.central is not None:
            check_flag("central", self.central)

    def __call__(self, problem: Problem) -> MetaGradient:
        """The meta-gradient of ``problem``; a ValueError where the student's precision does not allow it."""
        _need_precision(problem.student, "ForwardDifference")
        return walk_back(problem, self._linearise, ("grads", "d_phi"), self.every, self.host)

    def _linearise(self, problem: Problem, step: Step, notes: dict) -> tuple[Params, Product]:
        return cast("Params", step.grads), functools.partial(self._product, problem, step, notes)

    def _product(self, problem: Problem, step: Step, notes: dict, gamma: Params, at_start: bool) -> tuple[Params | None, Phi]:
        """One difference, and more where ε was wrong; the slope ‖∇²ℓ·γ‖ / ‖γ‖ is noted for the next step."""
        norm, size, scale = _norms(gamma, cast("Params", step.grads), step.params)
        if norm == 0.0:
            return None, problem.phi().like(map(torch.zeros_like, problem.phi().tensors()))
        unit = torch.finfo(next(iter(gamma.values())).dtype).eps
        for _ in range(ATTEMPTS):
            least, epsilon, central = self.epsilon(scale, size, notes.get("slope"), unit)
            along_theta, along_phi = _difference(problem, step, gamma, epsilon / norm, central, phi_only=at_start)
            if at_start:
                return None, along_phi
            notes["slope"] = _norms(along_theta)[0] / norm
            if not notes["slope"] * epsilon > 3 * self.change * size or epsilon <= least:
                break
        return along_theta, along_phi

    def epsilon(self, scale: float, size: float, slope: float | None, unit: float) -> tuple[float, float, bool]:
        """The least ε, the one to take, and whether the difference is to be central.

        Args:
            scale, size: ‖θ‖ and ‖g‖.
            slope: ‖∇²ℓ·γ‖ / ‖γ‖ at step t + 1, which was walked before; None at step T − 1.
            unit: of the floating-point type.
        """
        safe, least = 0.03 * math.sqrt(unit) * scale, 4 * unit * scale
        if not slope:
            return least, safe, bool(self.central)
        aim = self.change * size / slope
        at_rest = aim < least  # a gradient of next to nothing is no measure for its own change
        central = at_rest if self.central is None else self.central
        least = safe if central else least
        # At most 1e-4 ‖θ‖: along a flat direction ε would grow without end.
        return least, min(max(aim, least), 1e-4 * scale), central

    def report_error(self, problem: Problem) -> list[dict[str, float]]:
        """This strategy beside :class:`Replay` on one problem, step by step; see :func:`compare`."""
        return compare(step_contributions(self, problem), step_contributions(Replay(), problem))


def _difference(problem: Problem, step: Step, gamma: Params, h: float, central: bool, *, phi_only: bool) -> tuple[Params, Phi]:
    """(∇(θ + hγ) − ∇(θ)) / h, or the central form, where ∇ is the gradient of θ (empty if ``phi_only``) and of φ."""

    def gradient(h: float) -> list[Tensor]:
        theta, phi = {n: torch.add(p, gamma[n], alpha=h) for n, p in step.params.items()}, problem.phi()
        if phi_only:
            return summed(grad(loss, phi.tensors()) for loss in problem.loss(theta, step.t, phi))
        _, grads, d_phi = loss_and_grads(problem.student, theta, problem.parts(step.t, phi), phi)
        return [*grads.values(), *cast("Phi", d_phi).tensors()]

    names = [] if phi_only else list(gamma)
    middle = [*(cast("Params", step.grads)[n] for n in names), *cast("Phi", step.d_phi).tensors()]
    ahead, behind = gradient(h), gradient(-h) if central else middle
    slopes = [(a - b) / (2 * h if central else h) for a, b in zip(ahead, behind, strict=True)]
    return dict(zip(names, slopes)), cast("Phi", step.d_phi).like(slopes[len(names) :])


@dataclasses.dataclass(frozen=True)
class Truncated:
    """Back through a window of steps only; the gradient through the others is left out, so the meta-gradient is biased.

    Args:
        window: how many steps.
        inner: the strategy for the steps of the window.
        place: ``"last"``: the end of the run.  ``"random"``: the run ends after a random number of steps, from ``window``
            to all of them with equal chances, and the window is its end (RaT-BPTT).  It is drawn from the problem's seed,
            so it changes from one outer step to the next, whatever the student draws.
    """

    window: int
    inner: Callable[[Problem], MetaGradient] = Replay()
    place: str = "last"

    def __post_init__(self):
        check_whole("window", self.window)
        check_choice("place", self.place, ("last", "random"))
        require(callable(self.inner), f"inner must be a strategy such as Replay(), not {self.inner!r}", TypeError)

    def __call__(self, problem: Problem) -> MetaGradient:
        """The meta-gradient of ``problem``; a ValueError where a random window has no seed or ``inner`` raises one."""
        stop = len(problem.rows)
        if self.place == "random" and stop > self.window:
            require(problem.seed is not None, "Truncated(place='random') draws from the seed of a Problem: set one")
            stop = self.window + derive_seed("window", problem.seed) % (stop - self.window + 1)
        start = max(0, stop - self.window)
        windowed = self.inner(problem.window(start, stop))
        d_step_sizes = torch.zeros_like(problem.step_sizes)
        d_step_sizes[start:stop] = windowed.step_sizes
        return dataclasses.replace(windowed, step_sizes=d_step_sizes)


def suited(student: Student) -> tuple[Callable[[Problem], MetaGradient], str]:
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
    few, many = {"full": ("two", "four"), "lora": ("two", "three")}.get(student.trainable, ("three", "three and a half"))
    return ForwardDifference(), f"it costs about {few} gradients a step where an exact product costs {many}"


def step_contributions(strategy: Callable[[Problem], MetaGradient], problem: Problem) -> Tensor:
    """The part of the embeddings' meta-gradient that each inner step contributes, ``[T, m, l, d]``."""
    return strategy(problem.with_copies()).embeds.unflatten(0, (len(problem.rows), len(problem.embeds)))


def compare(contributions: Tensor, exact: Tensor) -> list[dict[str, float]]:
    """Two strategies on one problem, inner step by inner step (first step first).

    Args:
        contributions, exact: :func:`step_contributions` of a strategy and of an exact one such as :class:`Replay`.

    Returns:
        for each inner step: ``step``, ``cosine`` and ``error`` (relative, in norm) of its contribution to the embeddings'
        meta-gradient, and ``share``, the norm of the exact one as a share of the largest.
    """
    tiny = torch.finfo(torch.float64).tiny
    a, b = contributions.flatten(1).double(), exact.flatten(1).double()
    size = b.norm(dim=1)
    # Not torch's cosine_similarity, whose ε of 1e-8 counts for more than small contributions do.
    cosine = (a * b).sum(1) / (a.norm(dim=1) * size).clamp_min(tiny)
    error = (a - b).norm(dim=1) / size.clamp_min(tiny)
    columns = {"cosine": cosine, "error": error, "share": size / size.max().clamp_min(tiny)}
    return [{"step": t} | {name: float(column[t]) for name, column in columns.items()} for t in range(len(exact))]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _norms(*groups: Params) -> list[float]:
    """The norm of each group of tensors, all of them read from the device at once."""
    norms = torch.stack([torch.stack(torch._foreach_norm([*group.values()])) for group in groups])
    return norms.double().square().sum(1).sqrt().tolist()


def _need_second_derivatives(student: Student, strategy: str) -> None:
    require(student.attention == "eager", f"{strategy} differentiates twice, and attention={student.attention!r} of student "
            f"{student.name!r} has no second derivative; load it with attention='eager', or use ForwardDifference")
    _need_precision(student, strategy)


def _need_precision(student: Student, strategy: str) -> None:
    # bfloat16 has 8 bits: a training run of small steps mostly rounds to no step, and a difference of two gradients to 0.
    require(student.dtype != torch.bfloat16, f"{strategy} in bfloat16 would give a meta-gradient of rounding errors: load "
            f"student {student.name!r} with dtype='float32'")
