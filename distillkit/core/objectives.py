"""Objectives: what a distilled set is scored by while it is learned.

Both train a student on the set and send a gradient back through that training run; they differ in where it starts and in
the loss at its end.

:class:`BPTT` is the direct one, *backpropagation through time*: train a student on the set, take its loss on a batch of
real data, and send the gradient back through the training run (Maclaurin et al., 2015; Wang et al., 2018, "Dataset
distillation"; for text Sucholutsky & Schonlau, 2021, and Maekawa et al., 2023).  Each call draws a fresh initialisation
and a fresh real batch from its seed, because a set distilled for one known initialisation is good for that one only.

:class:`TrajectoryMatching` is less direct and steadier: start at an expert's weights, train on the set, and end near the
weights that the expert had later (Cazenavette et al., 2022; for instruction tuning Yao et al., 2025, "Transferable text data
distillation by trajectory matching").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.experts import Experts, real_parts
from distillkit.core.inner import Unroll, half_of, inner_step, to_device
from distillkit.core.metagrad import suited
from distillkit.core.mixture import Mixture
from distillkit.core.optimizers import State, optimizer_from
from distillkit.core.problem import MetaGradient, Problem, RealLoss, equal_step_sizes, inner_problem, solved
from distillkit.core.stacked import meta_gradients
from distillkit.core.student import Params, Student
from distillkit.data.tasks import Task
from distillkit.io.checks import check_choice, check_flag, check_is, check_number, check_whole, require
from distillkit.io.seeds import derive_seed, generator


class Objective(Protocol):
    """What :class:`BPTT`, :class:`TrajectoryMatching` and any objective defined elsewhere have in common.

    ``student`` trains on the set as ``unroll`` says; ``problems`` are the inner training runs of one outer step;
    ``metagrad`` forms the meta-gradient of each, and their mean is the step's; ``recipe`` is how to train on the distilled
    set, as JSON values.
    """

    @property
    def student(self) -> Student: ...

    @property
    def unroll(self) -> Unroll | Mixture: ...

    @property
    def metagrad(self) -> Callable[[Problem], MetaGradient]: ...

    def problems(self, distilled: DistilledSet, seed: int) -> Iterator[Problem]: ...

    def recipe(self) -> dict: ...


def check_objective(objective) -> None:
    """Raise TypeError unless ``objective`` is an :class:`Objective`; only its own methods need a ``student``."""
    missing = [n for n in ("metagrad", "problems", "recipe") if not callable(getattr(objective, n, None))]
    missing += [] if isinstance(getattr(objective, "unroll", None), Unroll | Mixture) else ["unroll"]
    require(not missing, f"objective must be one such as BPTT or TrajectoryMatching, not {objective!r}; it lacks "
            f"{', '.join(missing)}", TypeError)


class Wrapper:
    """Base of an objective that changes another one, its ``objective``: what it does not define itself is the other's."""

    objective: Objective

    def __getattr__(self, name: str):
        if name == "objective":  # not set yet, as in a copy
            raise AttributeError(name)
        return getattr(self.objective, name)


@dataclasses.dataclass(frozen=True, eq=False)
class BPTT:
    """Loss on real training data after the inner loop.

    Args:
        task: where the real batches come from (its training split, classes balanced).
        student: what trains on the set.
        unroll: how it trains; a :class:`~distillkit.core.mixture.Mixture` draws that afresh in each outer step.
        metagrad: the strategy that forms the meta-gradient (:mod:`distillkit.core.metagrad`); default: the one that
            :func:`~distillkit.core.estimate.recommend` names for the student.
        batch_size: real examples per outer step.
        micro_batch: how many of them at a time; the gradient is the same, memory and padding are less.  Default: all on a
            GPU, where one large kernel is faster than several small ones; 16 elsewhere.
        inits: initialisations whose meta-gradients are averaged in one outer step, on the same real batch.
        stacked: compute the ``inits`` at once (:mod:`distillkit.core.stacked`), in memory for all of them; pays on a GPU.
    """

    task: Task
    student: Student
    unroll: Unroll | Mixture
    _: dataclasses.KW_ONLY
    metagrad: Callable[[Problem], MetaGradient] | None = None
    batch_size: int = 64
    micro_batch: int | None = None
    inits: int = 1
    stacked: bool = False

    def __post_init__(self):
        _check_parts(self)
        check_flag("stacked", self.stacked)
        if self.micro_batch is None:
            object.__setattr__(self, "micro_batch", self.batch_size if self.student.device.type == "cuda" else 16)
        for name in ("micro_batch", "inits"):
            check_whole(name, getattr(self, name))
        check_whole("batch_size", self.batch_size, most=len(self.task.split("train")), meaning="the training rows")

    def problems(self, distilled: DistilledSet, seed: int) -> Iterator[Problem]:
        """One problem for each of the ``inits``, built one after the other."""
        return (self.problem(distilled, seed, member) for member in range(self.inits))

    def problem(self, distilled: DistilledSet, seed: int, member: int = 0) -> Problem:
        """The inner training run and outer loss of ``seed``; ``member`` counts the ``inits``."""
        rows = self.task.balanced_rows("train", self.batch_size, generator("distil-batch", seed))
        # Rows of similar length together: short sentences are not padded to the longest of the batch.
        token_ids = self.task.token_ids(self.student.tokenizer, "train")
        rows = sorted(rows.tolist(), key=lambda row: len(token_ids[row]))
        outer = [self._loss(rows[i : i + self.micro_batch]) for i in range(0, len(rows), self.micro_batch)]
        return inner_problem(distilled, self.student, self.unroll, derive_seed("distil-init", seed, member), outer)

    def _loss(self, rows: list[int]) -> RealLoss:
        real = self.task.batch(self.student.tokenizer, "train", rows)
        return RealLoss(self.student, len(rows) / self.batch_size, real, real["labels"].to(self.student.device))

    def recipe(self) -> dict:
        """How to train on a set that this objective distils, as JSON values."""
        return _recipe(self, outer_batch_size=self.batch_size, inits=self.inits)


@dataclasses.dataclass(frozen=True, eq=False)
class TrajectoryMatching:
    """Distance to the weights that an expert reached, as a share of the distance that the expert went.

    A call draws an expert and a start snapshot from its seed, trains a student from there on the set for N steps
    (``unroll.steps``), and returns ‖θ_N − θ*_end‖² / ‖θ*_start − θ*_end‖², where the expert's end lies ``expert_epochs``
    later on its path.  A student that does not move has loss 1; one that arrives has loss 0.

    The paper fixes this much; number of steps and segment length are this kit's choices.

    Args:
        task, student: what the experts were recorded with.
        unroll: how the student trains.  An optimiser of the experts' kind follows them more easily.
        experts: as :func:`~distillkit.core.experts.record_experts` or ``Experts.load`` return them.
        metagrad: the strategy that forms the meta-gradient, as for :class:`BPTT`.
        expert_epochs: length of the segment to match, in the expert's epochs; may be a fraction, down to one snapshot.
        max_start_epoch: latest epoch a segment may start at; default: the latest that leaves room for it.
        student_state: ``"fresh"``: the student's optimiser starts empty; ``"expert"``: with the expert's state at that
            point, for which it must be of the same kind.
        distance: ``"whole"``: one ratio of sums over all parameters, which the largest movers dominate; ``"tensor"``: the
            mean of the ratios of the single tensors that moved.
        segments: expert segments whose meta-gradients are averaged in one outer step.
    """

    task: Task
    student: Student
    unroll: Unroll | Mixture
    experts: Experts
    _: dataclasses.KW_ONLY
    metagrad: Callable[[Problem], MetaGradient] | None = None
    expert_epochs: float = 1
    max_start_epoch: float | None = None
    student_state: str = "fresh"
    distance: str = "whole"
    segments: int = 1

    def __post_init__(self):
        _check_parts(self)
        require(isinstance(getattr(self.experts, "settings", None), dict),
                f"experts must be what record_experts or Experts.load returns, not {self.experts!r}", TypeError)
        self.experts.check(self.student, self.task)
        check_choice("student_state", self.student_state, ("fresh", "expert"))
        check_choice("distance", self.distance, ("whole", "tensor"))
        check_whole("segments", self.segments)
        check_number("expert_epochs", self.expert_epochs, most=self.experts.epochs, without="least")
        if self.max_start_epoch is not None:
            check_number("max_start_epoch", self.max_start_epoch, most=self.experts.epochs - self.expert_epochs)
        per_epoch = self.experts.settings["snapshots_per_epoch"]
        require(self._length >= 1 and abs(self._length - self.expert_epochs * per_epoch) < 1e-9,
                f"expert_epochs must be a whole number of snapshots, {per_epoch} of which make an epoch, not "
                f"{self.expert_epochs!r}")
        recorded, optimizer = self.experts.settings["optimizer"]["name"], type(self.unroll.optimizer).__name__
        require(self.student_state == "fresh" or recorded == optimizer,
                f"student_state='expert' hands over the state of {recorded}, which {optimizer} cannot use; give the unroll an "
                f"{recorded}")

    @property
    def _length(self) -> int:
        """Snapshots from the start of a segment to its end."""
        return round(self.expert_epochs * self.experts.settings["snapshots_per_epoch"])

    def segment(self, seed: int, member: int = 0) -> tuple[int, int, int]:
        """The expert that ``seed`` draws, and the snapshots its segment starts and ends at."""
        latest = self.experts.snapshots - 1 - self._length
        if self.max_start_epoch is not None:
            latest = min(latest, math.floor(self.max_start_epoch * self.experts.settings["snapshots_per_epoch"] + 1e-9))
        expert = derive_seed("match-expert", seed, member) % len(self.experts)
        start = derive_seed("match-start", seed, member) % (latest + 1)
        return expert, start, start + self._length

    def problems(self, distilled: DistilledSet, seed: int) -> Iterator[Problem]:
        """One problem for each of the ``segments``, built one after the other."""
        return (self.problem(distilled, *self.segment(seed, member), seed=derive_seed("match-run", seed, member))
                for member in range(self.segments))

    def problem(self, distilled: DistilledSet, expert: int, start: int, end: int, *, seed: int = 0) -> Problem:
        """The inner training run from snapshot ``start`` of ``expert``, and its distance to snapshot ``end``.

        ``seed`` is for draws of the run, such as dropout: a segment comes again in later outer steps, its masks do not.
        """
        params, state = self._snapshot(expert, start)
        outer = [self._distance(params, self._snapshot(expert, end, state=False)[0])]
        return inner_problem(distilled, self.student, self.unroll, seed, outer, params=params,
                             state=state if self.student_state == "expert" else None)

    def replayed(self, expert: int, start: int, end: int) -> float:
        """The loss of a student that repeats the expert's own steps on its own batches: 0, but for rounding."""
        first, state = self._snapshot(expert, start)
        params, optimizer = first, optimizer_from(self.experts.settings["optimizer"])
        for rows in self.experts.batches(expert, start, end):
            parts = real_parts(self.task, self.student, rows)
            params, state, *_ = inner_step(self.student, optimizer, params, state, parts, optimizer.step_size)
        with torch.no_grad():
            return float(self._distance(first, self._snapshot(expert, end, state=False)[0])(params))

    def recipe(self) -> dict:
        """How to train on a set that this objective distils, as JSON values."""
        fields = ("expert_epochs", "max_start_epoch", "student_state", "distance")
        recorded_elsewhere = ("parameters", "embedding", "tokenizer")
        experts = {k: v for k, v in self.experts.settings.items() if k not in recorded_elsewhere}
        return _recipe(self, **{name: getattr(self, name) for name in fields}, segments=self.segments,
                       experts={**experts, "sha256": self.experts.sha256})

    def _snapshot(self, expert: int, index: int, *, state: bool = True) -> tuple[Params, State]:
        """Parameters in the student's precision, and the optimiser's state if asked for, on the student's device."""
        params, moments = to_device(self.experts.snapshot(expert, index, state=state), self.student.device)
        return {n: params[n].to(self.student.dtype) for n in self.student.trained_names}, moments

    def _distance(self, start: Params, end: Params) -> Callable[[Params], Tensor]:
        """The normalised squared distance to ``end`` as a function of the parameters."""
        moves = {n: (start[n] - end[n]).square().sum() for n in self.student.trained_names}
        if self.distance == "whole":
            weights = dict.fromkeys(moves, 1 / cast("Tensor", sum(moves.values())))
        else:
            # Tensors that only rounding moved, such as attention's key biases, are left out.
            spreads = torch.stack([move / end[n].numel() for n, move in moves.items()]).sqrt().tolist()
            moving = [n for n, spread in zip(moves, spreads, strict=True) if spread > STILL * max(spreads)]
            weights = {n: 1 / (moves[n] * len(moving)) for n in moving}
        require(weights and bool(torch.stack([*weights.values()]).isfinite().all()),
                "the expert did not move between the two snapshots, so there is nothing to match")
        return lambda params: cast("Tensor", sum(w * (params[n] - end[n]).square().sum() for n, w in weights.items()))


STILL = 1e-6  # of the largest root mean square move of a tensor


def _check_parts(objective) -> None:
    """Check the arguments that all objectives share, and fill in the default strategy and the order of the classes."""
    # A task is needed only where the objective draws real rows from it, and anything with a loss can be a student.
    require(objective.task is None or isinstance(getattr(objective.task, "kind", None), str),
            f"task must be what load_task returns, not {objective.task!r}", TypeError)
    require(callable(getattr(objective.student, "loss", None)),
            f"student must be what load_student returns, not {objective.student!r}", TypeError)
    require(isinstance(objective.unroll, Unroll | Mixture),
            f"unroll must be an Unroll or a Mixture, not {objective.unroll!r}", TypeError)
    if isinstance(objective.student, Student) and isinstance(objective.task, Task):
        object.__setattr__(objective, "student", objective.student.for_task(objective.task))
    if objective.metagrad is None:
        object.__setattr__(objective, "metagrad", suited(objective.student)[0])
    require(callable(objective.metagrad),
            f"metagrad must be a strategy such as Replay() or ForwardDifference(), not {objective.metagrad!r}", TypeError)


def _recipe(objective, **settings) -> dict:
    """The values that the recipes of all objectives hold, with the ``settings`` of one in the middle."""
    student = objective.student
    return {"objective": type(objective).__name__, "student": student.name, "trainable": student.trainable,
            "weights": student.weights, **settings, "metagrad": repr(objective.metagrad), **objective.unroll.recipe()}


def search_step_size(
    distilled: DistilledSet, objective, *, candidates: Sequence[float], seed: int = 0, tries: int = 3
) -> tuple[float, dict[float, float]]:
    """The inner step size to start from: the candidate with the lowest outer loss of the set as it is.

    Args:
        distilled: the set, before it is distilled; its own step sizes are ignored.
        objective: such as :class:`BPTT` or :class:`TrajectoryMatching`; see :class:`Objective`.
        candidates: step sizes to try, such as ``(0.01, 0.03, 0.1, 0.3, 1.0)``.
        seed, tries: the addresses of the initialisations, batches or segments that the losses are means of.

    Returns:
        the best candidate, and the mean loss of each (infinite where training diverged).
    """
    check_is("distilled", distilled, DistilledSet)
    check_objective(objective)
    check_whole("tries", tries)
    require(isinstance(candidates, Sequence) and candidates,
            f"candidates must be step sizes to try, such as (0.01, 0.1, 1.0), not {candidates!r}")
    losses: dict[float, float] = {}
    for size in candidates:
        check_number("candidates, each of them,", size, without="least")
        sizes = equal_step_sizes(distilled, objective.unroll.steps, size, getattr(objective, "student", None))
        trial, outer_losses = dataclasses.replace(distilled, step_sizes=sizes), []
        for member in range(tries):
            problems = objective.problems(trial, derive_seed("search-step-size", seed, member))
            outer_losses += [trained_loss(problem) for problem in problems]
        mean = sum(outer_losses) / len(outer_losses)
        losses[size] = mean if math.isfinite(mean) else math.inf
    best = min(losses, key=losses.__getitem__)
    require(math.isfinite(losses[best]),
            f"training diverges at every step size tried, {', '.join(map(str, candidates))}; try smaller ones")
    return best, losses


def trained_loss(problem: Problem) -> float:
    """The outer loss after the inner training run, without any gradient of it."""
    params, _ = problem.trained(len(problem.rows))
    with torch.no_grad():
        return float(sum(part(params) for part in problem.outer))


def fitted(distilled: DistilledSet, objective) -> DistilledSet:
    """The set as the student of ``objective`` trains on it; unchanged where an objective defined elsewhere names no student."""
    student = getattr(objective, "student", None)
    return distilled if student is None else distilled.for_student(student)


def meta_gradient(
    distilled: DistilledSet, objective, *, seed: int = 0, on_retry: Callable[[Objective], None] | None = None
) -> MetaGradient:
    """Gradient of the objective with respect to the set, at one seeded initialisation and real batch.

    Where memory runs out, the same batch is computed again in parts of half the size, with a warning.  The gradient is the
    same up to rounding (but for dropout, whose masks belong to the parts).

    Args:
        distilled: the set φ.
        objective: such as :class:`BPTT` or :class:`TrajectoryMatching`; see :class:`Objective`.
        seed: stands for the student's initialisation and the real batch, or for expert and segment.
        on_retry: called with the objective in smaller parts, so that its caller can go on with it and avoid failed attempts.

    Raises:
        torch.OutOfMemoryError: single examples do not fit either.
    """
    check_is("distilled", distilled, DistilledSet)
    check_objective(objective)
    require(on_retry is None or callable(on_retry), f"on_retry must be a function of an objective, not {on_retry!r}", TypeError)
    ordered = fitted(distilled, objective)
    try:
        problems = objective.problems(ordered, seed)
        if getattr(objective, "stacked", False):
            gradients = meta_gradients(objective.metagrad, [*problems])
        else:  # one after the other, so that the memory of one is enough
            gradients = [solved(objective.metagrad, problem) for problem in problems]
        gradient = MetaGradient.mean(gradients)
    except torch.OutOfMemoryError:
        smaller = _in_halves(objective, len(distilled))
    else:
        if ordered is distilled or gradient.targets is None:
            return gradient
        columns = [ordered.meta["classes"].index(name) for name in distilled.meta["classes"]]
        return dataclasses.replace(gradient, targets=gradient.targets[:, columns])
    # The exception is gone, and with it the tensors that its frames held.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if on_retry is not None:
        on_retry(smaller)
    return meta_gradient(distilled, smaller, seed=seed, on_retry=on_retry)


def _in_halves(objective, examples: int):
    """``objective`` with half as many examples alive at a time; where one is left, an error that says what to lower."""
    if not dataclasses.is_dataclass(objective):
        raise
    wrapped = getattr(objective, "objective", None)  # as in ThroughProjection
    if wrapped is not None:
        return dataclasses.replace(objective, objective=_in_halves(wrapped, examples))
    unroll = objective.unroll
    inner = unroll.micro_batch or min(unroll.batch_size or examples, examples)
    outer = min(objective.micro_batch, objective.batch_size) if hasattr(objective, "micro_batch") else 0
    size = half_of(max(inner, outer), dropout=unroll.dropout)
    changes = {"micro_batch": min(outer, size)} if outer else {}
    return dataclasses.replace(objective, unroll=dataclasses.replace(unroll, micro_batch=size), **changes)
