"""Objectives: what a distilled set is scored by while it is learned.

Both train a student on the set and send a gradient back through that training run; they differ in where it starts and in
what is asked of its end.

:class:`BPTT` is the direct one, *backpropagation through time*: train a student on the set, take its loss on a batch of
real data, and send the gradient back through the training run (Maclaurin et al., 2015; Wang et al., 2018, "Dataset
distillation"; for text Sucholutsky & Schonlau, 2021, and Maekawa et al., 2023).  Each call draws a fresh initialisation
and a fresh real batch from its seed, because a set distilled for one known initialisation is good for that one only.

:class:`TrajectoryMatching` asks for less and is steadier: start where an expert was, train on the set, and arrive where the
expert went (Cazenavette et al., 2022; for instruction tuning Yao et al., 2025, "Transferable text data distillation by
trajectory matching").
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.experts import Experts, moved, real_parts
from distillkit.core.inner import Unroll, inner_step
from distillkit.core.metagrad import recommend
from distillkit.core.optimizers import optimizer_from
from distillkit.core.problem import MetaGradient, Problem
from distillkit.core.student import Params, Student
from distillkit.data.tasks import Task
from distillkit.io.checks import check_choice, check_is, check_number, check_whole
from distillkit.io.seeds import derive_seed, generator


class Objective(Protocol):
    """What :class:`BPTT`, :class:`TrajectoryMatching` and whatever takes their place have in common.

    ``student`` trains on the set, in the way of ``unroll``; ``problems`` are the inner training runs of one outer step;
    ``metagrad`` forms the meta-gradient of each, and their mean is the step's; ``recipe`` is how to train on what is
    distilled, as JSON values.
    """

    @property
    def student(self) -> Student: ...

    @property
    def unroll(self) -> Unroll: ...

    @property
    def metagrad(self) -> Callable[[Problem], MetaGradient]: ...

    def problems(self, distilled: DistilledSet, seed: int) -> Iterator[Problem]: ...

    def recipe(self) -> dict: ...


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
        unroll: how it trains.
        metagrad: the strategy that forms the meta-gradient (:mod:`distillkit.core.metagrad`); default: the one that
            :func:`~distillkit.core.metagrad.recommend` names for the student.
        batch_size: real examples an outer step.
        micro_batch: how many of them at a time; the gradient is the same, memory and padding are less.
        inits: initialisations whose meta-gradients are averaged in one outer step, on the same real batch.
    """

    task: Task
    student: Student
    unroll: Unroll
    _: dataclasses.KW_ONLY
    metagrad: Callable[[Problem], MetaGradient] | None = None
    batch_size: int = 64
    micro_batch: int = 16
    inits: int = 1

    def __post_init__(self):
        _check_parts(self)
        for name in ("micro_batch", "inits"):
            check_whole(name, getattr(self, name))
        check_whole("batch_size", self.batch_size, most=len(self.task.split("train")), meaning="the training rows")

    def problems(self, distilled: DistilledSet, seed: int) -> Iterator[Problem]:
        """One problem for each of the ``inits``, made when its turn comes."""
        return (self.problem(distilled, seed, member) for member in range(self.inits))

    def problem(self, distilled: DistilledSet, seed: int, member: int = 0) -> Problem:
        """The inner training run and outer loss that ``seed`` stands for; ``member`` counts the ``inits``."""
        student, task = self.student, self.task
        rows = task.balanced_rows("train", self.batch_size, generator("distil-batch", seed))
        # Rows of like length together: short sentences are not padded to the longest of the batch.
        lengths = task.token_ids(student.tokenizer, "train")
        rows = sorted(rows.tolist(), key=lambda row: len(lengths[row]))
        parts = [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)]
        outer = [self._part(part) for part in parts]
        return inner_problem(distilled, student, self.unroll, derive_seed("distil-init", seed, member), outer)

    def _part(self, rows: list[int]):
        """The share of the outer loss that ``rows`` contribute, as a function of the parameters."""
        real = self.task.batch(self.student.tokenizer, "train", rows)
        labels = real["labels"].to(self.student.device)
        share = len(rows) / self.batch_size

        def loss(params: Params) -> torch.Tensor:
            return share * self.student.loss(params, real, labels)

        return loss

    def recipe(self) -> dict:
        """How to train on what this objective distils, as JSON values."""
        return _recipe(self, outer_batch_size=self.batch_size, inits=self.inits)


def _check_parts(objective) -> None:
    """Whatever can be asked for a loss is a student, and trajectory matching asks nothing of a task but to be the experts'."""
    if objective.task is not None and not isinstance(getattr(objective.task, "kind", None), str):
        raise TypeError(f"task must be what load_task returns, not {objective.task!r}")
    if not callable(getattr(objective.student, "loss", None)):
        raise TypeError(f"student must be what load_student returns, not {objective.student!r}")
    check_is("unroll", objective.unroll, Unroll)
    if isinstance(objective.student, Student) and isinstance(objective.task, Task):
        object.__setattr__(objective, "student", objective.student.for_task(objective.task))
    if objective.metagrad is None:
        object.__setattr__(objective, "metagrad", recommend(objective.student)[0])
    if not callable(objective.metagrad):
        raise TypeError(f"metagrad must be a strategy such as Replay() or ForwardDifference(), not {objective.metagrad!r}")


STUDENT_STATES = ("fresh", "expert")
DISTANCES = ("whole", "tensor")
STILL = 1e-6  # of the largest root mean square move of a tensor


@dataclasses.dataclass(frozen=True, eq=False)
class TrajectoryMatching:
    """Distance to where an expert went, as a share of how far it went.

    A call draws an expert and a start snapshot from its seed, trains a student from there on the set for N steps
    (``unroll.steps``), and returns ‖θ_N − θ*_end‖² / ‖θ*_start − θ*_end‖², where the expert's end lies ``expert_epochs``
    further on its path.  1 is what standing still gives, 0 is arrival.

    The paper fixes this much; number of steps, segment length and which parameters are matched are this kit's choices.

    Args:
        task, student: what the experts were recorded with.
        unroll: how the student trains.  An optimiser of the experts' kind follows them more easily.
        experts: as :func:`~distillkit.core.experts.record_experts` or ``Experts.load`` give them.
        metagrad: the strategy that forms the meta-gradient, as for :class:`BPTT`.
        expert_epochs: length of the segment to match, in the expert's epochs; may be a fraction, down to one snapshot.
        max_start_epoch: latest epoch a segment may start at; default: the latest that leaves room for it.
        student_state: ``"fresh"``: the student's optimiser starts empty; ``"expert"``: with the expert's state at that
            point, for which it must be of the same kind.
        distance: ``"whole"``: one ratio of sums over all parameters, which the largest movers rule; ``"tensor"``: the mean
            of the ratios of the single tensors that moved.
        match: says by its name whether a parameter is matched; default: all that are trained.
        segments: expert segments whose meta-gradients are averaged in one outer step.
    """

    task: Task
    student: Student
    unroll: Unroll
    experts: Experts
    _: dataclasses.KW_ONLY
    metagrad: Callable[[Problem], MetaGradient] | None = None
    expert_epochs: float = 1
    max_start_epoch: float | None = None
    student_state: str = "fresh"
    distance: str = "whole"
    match: Callable[[str], bool] | None = None
    segments: int = 1

    def __post_init__(self):
        _check_parts(self)
        if not isinstance(getattr(self.experts, "settings", None), dict):
            raise TypeError(f"experts must be what record_experts or Experts.load returns, not {self.experts!r}")
        self.experts.check(self.student, self.task)
        check_number("expert_epochs", self.expert_epochs, without="least")
        if self.max_start_epoch is not None:
            check_number("max_start_epoch", self.max_start_epoch)
        if self.match is not None and not callable(self.match):
            raise TypeError(f"match must be a function of a parameter's name, not {self.match!r}")
        check_choice("student_state", self.student_state, STUDENT_STATES)
        check_choice("distance", self.distance, DISTANCES)
        check_whole("segments", self.segments)
        per_epoch, there = self.experts.settings["snapshots_per_epoch"], self.experts.epochs
        length = self.expert_epochs * per_epoch
        if not (math.isfinite(length) and length >= 1 and abs(length - round(length)) < 1e-9):
            raise ValueError(f"expert_epochs must be a whole number of snapshots, {per_epoch} of which make an epoch, not "
                             f"{self.expert_epochs!r}")
        if self.expert_epochs > there:
            raise ValueError(f"expert_epochs={self.expert_epochs!r}, but the experts in {self.experts.folder} were trained "
                             f"for {there} epochs; record more, or match less")
        latest = there - self.expert_epochs
        if self.max_start_epoch is not None and not 0 <= self.max_start_epoch <= latest:
            raise ValueError(f"max_start_epoch must lie between 0 and {latest:g} for segments of {self.expert_epochs:g} of "
                             f"{there} epochs, not {self.max_start_epoch!r}")
        theirs = self.experts.settings["optimizer"]["name"]
        if self.student_state == "expert" and theirs != type(self.unroll.optimizer).__name__:
            raise ValueError(f"student_state='expert' hands over the state of {theirs}, which "
                             f"{type(self.unroll.optimizer).__name__} cannot use; give the unroll an {theirs}")
        if not self._matched():
            raise ValueError("match leaves no parameter to be matched; it is asked by name, such as "
                             f"{self.student.trained_names[0]!r}")

    def segment(self, seed: int, member: int = 0) -> tuple[int, int, int]:
        """The expert that ``seed`` draws, and the snapshots its segment starts and ends at."""
        per_epoch = self.experts.settings["snapshots_per_epoch"]
        length = round(self.expert_epochs * per_epoch)
        latest = self.experts.snapshots - 1 - length
        if self.max_start_epoch is not None:
            latest = min(latest, math.floor(self.max_start_epoch * per_epoch + 1e-9))
        expert = derive_seed("match-expert", seed, member) % len(self.experts)
        start = derive_seed("match-start", seed, member) % (latest + 1)
        return expert, start, start + length

    def problems(self, distilled: DistilledSet, seed: int) -> Iterator[Problem]:
        """One problem for each of the ``segments``, made when its turn comes."""
        return (self.problem(distilled, *self.segment(seed, member), seed=derive_seed("match-run", seed, member))
                for member in range(self.segments))

    def problem(self, distilled: DistilledSet, expert: int, start: int, end: int, *, seed: int = 0) -> Problem:
        """The inner training run from snapshot ``start`` of ``expert``, and its distance to snapshot ``end``.

        ``seed`` is for what the run draws, such as dropout: a segment comes again in later outer steps, its masks do not.
        """
        params, state = self._from(expert, start)
        outer = [self._distance(params, self._target(expert, end))]
        return inner_problem(
            distilled, self.student, self.unroll, seed, outer, params=params,
            state=state if self.student_state == "expert" else None,
        )

    def replayed(self, expert: int, start: int, end: int) -> float:
        """The loss of a student that repeats the expert's own steps on its own batches: 0, but for rounding."""
        params, state = first, _ = self._from(expert, start)
        size = self.experts.settings["optimizer"]["step_size"]
        optimizer = optimizer_from(self.experts.settings["optimizer"])
        for rows in self.experts.batches(expert, start, end):
            params, state, *_ = inner_step(
                self.student, optimizer, params, state, real_parts(self.task, self.student, rows), size
            )
        with torch.no_grad():
            return float(self._distance(first, self._target(expert, end))(params))

    def recipe(self) -> dict:
        """How to train on what this objective distils, as JSON values."""
        known_otherwise = ("parameters", "embedding", "tokenizer")
        experts = {k: v for k, v in self.experts.settings.items() if k not in known_otherwise}
        return _recipe(
            self,
            expert_epochs=self.expert_epochs,
            max_start_epoch=self.max_start_epoch,
            student_state=self.student_state,
            distance=self.distance,
            matched=len(self._matched()),
            segments=self.segments,
            experts={**experts, "sha256": self.experts.sha256},
        )

    def _matched(self) -> list[str]:
        return [n for n in self.student.trained_names if self.match is None or self.match(n)]

    def _from(self, expert: int, index: int):
        params, state = moved(self.experts.snapshot(expert, index), self.student.device)
        return {n: params[n].to(self.student.dtype) for n in self.student.trained_names}, state

    def _target(self, expert: int, index: int) -> Params:
        params, _ = self.experts.snapshot(expert, index, state=False)
        return {n: params[n].to(self.student.device, self.student.dtype) for n in self._matched()}

    def _distance(self, start: Params, end: Params) -> Callable[[Params], Tensor]:
        """The normalised squared distance to ``end``, as a function of the parameters."""
        went = {n: (start[n] - e).square().sum() for n, e in end.items()}
        if self.distance == "whole":
            total = cast("Tensor", sum(went.values()))
            weights = dict.fromkeys(end, 1 / total)
        else:
            # A tensor that only rounding moved, such as attention's key biases, has nowhere to go.
            moves = {n: float((w / end[n].numel()).sqrt()) for n, w in went.items()}
            moving = [n for n in end if moves[n] > STILL * max(moves.values())]
            weights = {n: 1 / (went[n] * len(moving)) for n in moving}
        if not weights or not all(torch.isfinite(w) for w in weights.values()):
            raise ValueError("the expert did not move between the two snapshots, so there is nothing to match")

        def loss(params: Params) -> Tensor:
            return cast("Tensor", sum(w * (params[n] - end[n]).square().sum() for n, w in weights.items()))

        return loss


def _recipe(objective, **own) -> dict:
    """What the recipes of all objectives hold, with what is the ``own`` of one in the middle."""
    student, unroll = objective.student, objective.unroll
    return {
        "objective": type(objective).__name__,
        "student": student.name,
        "trainable": student.trainable,
        "weights": student.weights,
        **own,
        "metagrad": repr(objective.metagrad),
        **unroll.recipe(),
    }


def search_step_size(
    distilled: DistilledSet, objective, *, candidates: Sequence[float], seed: int = 0, tries: int = 3
) -> tuple[float, dict[float, float]]:
    """The inner step size to start from: the candidate with the lowest outer loss of the set as it is.

    Args:
        distilled: the set, before it is distilled; its own step sizes are not looked at.
        objective: such as :class:`BPTT` or :class:`TrajectoryMatching`; see :class:`Objective`.
        candidates: step sizes to try, such as ``(0.01, 0.03, 0.1, 0.3, 1.0)``.
        seed, tries: the addresses of the initialisations, batches or segments that the losses are means of.

    Returns:
        the best candidate, and the mean loss of each (infinite where training diverged).
    """
    check_is("distilled", distilled, DistilledSet)
    check_objective(objective)
    check_whole("tries", tries)
    if not isinstance(candidates, Sequence) or not candidates:
        raise ValueError(f"candidates must be step sizes to try, such as (0.01, 0.1, 1.0), not {candidates!r}")
    for size in candidates:
        check_number("candidates, each of them,", size, without="least")
    losses: dict[float, float] = {}
    for size in candidates:
        sizes = equal_step_sizes(distilled, objective.unroll.steps, size, getattr(objective, "student", None))
        trial, outer_losses = dataclasses.replace(distilled, step_sizes=sizes), []
        for member in range(tries):
            for problem in objective.problems(trial, derive_seed("search-step-size", seed, member)):
                outer_losses.append(trained_loss(problem))
        mean = sum(outer_losses) / len(outer_losses)
        losses[size] = mean if math.isfinite(mean) else math.inf
    best = min(losses, key=losses.__getitem__)
    if math.isinf(losses[best]):
        raise ValueError(f"training diverges at every step size tried, {', '.join(map(str, candidates))}; try smaller ones")
    return best, losses


def trained_loss(problem: Problem) -> float:
    """The outer loss after the inner training run, without any gradient of it."""
    params, state = problem.start()
    for t in range(len(problem.rows)):
        params, state, *_ = problem.step(t, params, state)
    with torch.no_grad():
        return float(sum(part(params) for part in problem.outer))


def inner_problem(
    distilled: DistilledSet, student: Student, unroll: Unroll, seed: int, outer, *, params=None, state=None
) -> Problem:
    """Bind a set to a student: the training run on the set, and ``outer`` at its end.

    It starts from ``student.init(seed)`` with a fresh optimiser, or from ``params`` and ``state``; whatever else is drawn
    in the run is drawn from ``seed`` too.
    """
    distilled = distilled.for_student(student)
    move = {"device": student.device, "dtype": student.dtype}
    return Problem(
        student=student,
        optimizer=unroll.optimizer,
        params=student.init(seed) if params is None else params,
        embeds=distilled.embeds.to(**move),
        mask=distilled.mask.to(student.device),
        targets=distilled.targets.to(**move) if distilled.soft else distilled.targets.to(student.device),
        step_sizes=bound_step_sizes(distilled, unroll, student).to(**move),
        rows=unroll.rows(len(distilled)),
        outer=outer,
        micro_batch=unroll.micro_batch,
        dropout_seed=seed if unroll.dropout else None,
        state=state,
        seed=seed,
    )


def equal_step_sizes(distilled: DistilledSet, steps: int, size: float, student: Student | None = None) -> torch.Tensor:
    """``size`` at each of the ``steps``: float64 where the set or the ``student`` that trains on it is, float32 otherwise."""
    exact = torch.float64 in (distilled.embeds.dtype, None if student is None else student.dtype)
    return torch.full((steps,), float(size), dtype=torch.float64 if exact else torch.float32)


def bound_step_sizes(distilled: DistilledSet, unroll: Unroll, student: Student | None = None) -> torch.Tensor:
    """The set's own step sizes, ``[t]``, or the optimiser's at every step if it has none yet."""
    if distilled.step_sizes is None:
        return equal_step_sizes(distilled, unroll.steps, unroll.optimizer.step_size, student)
    if len(distilled.step_sizes) != unroll.steps:
        raise ValueError(
            f"the set carries {len(distilled.step_sizes)} step sizes but the unroll has {unroll.steps} steps; use the "
            "unroll it was distilled with, or set step_sizes to None"
        )
    return distilled.step_sizes


def fitted(distilled: DistilledSet, objective) -> DistilledSet:
    """The set as the student of ``objective`` trains on it; as it is where an objective of the caller's own names none."""
    student = getattr(objective, "student", None)
    return distilled if student is None else distilled.for_student(student)


def check_objective(objective) -> None:
    """Raise TypeError unless ``objective`` is an :class:`Objective`; only its own methods need a ``student``."""
    missing = [n for n in ("metagrad", "problems", "recipe") if not callable(getattr(objective, n, None))]
    if missing or not isinstance(getattr(objective, "unroll", None), Unroll):
        raise TypeError(f"objective must be one such as BPTT or TrajectoryMatching, not {objective!r}; it lacks "
                        f"{', '.join(missing or ['unroll'])}")


def meta_gradient(
    distilled: DistilledSet, objective, *, seed: int = 0, on_retry: Callable[[Objective], None] | None = None
) -> MetaGradient:
    """Gradient of the objective with respect to the set, at one seeded initialisation and real batch.

    Where memory runs out, the same batch is taken again in parts of half the size, with a warning.  The gradient is the
    same up to rounding (but for dropout, whose masks belong to the parts).

    Args:
        distilled: the set φ.
        objective: such as :class:`BPTT` or :class:`TrajectoryMatching`; see :class:`Objective`.
        seed: stands for the student's initialisation and the real batch, or for expert and segment.
        on_retry: called with the objective in smaller parts, which saves the failed attempt where it is used from then on.

    Raises:
        torch.OutOfMemoryError: single examples do not fit either.
    """
    check_is("distilled", distilled, DistilledSet)
    check_objective(objective)
    if on_retry is not None and not callable(on_retry):
        raise TypeError(f"on_retry must be a function of an objective, not {on_retry!r}")
    own = fitted(distilled, objective)
    while True:
        try:
            gradient = MetaGradient.mean([objective.metagrad(problem) for problem in objective.problems(own, seed)])
            if own is distilled or gradient.targets is None:
                return gradient
            back = [own.meta["classes"].index(name) for name in distilled.meta["classes"]]
            return dataclasses.replace(gradient, targets=gradient.targets[:, back])
        except torch.OutOfMemoryError as error:
            objective = _halved(objective, len(distilled), error)
        if on_retry is not None:
            on_retry(objective)
        # Here the exception is gone, and with it the tensors that its frames held.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _halved(objective, examples: int, error: Exception):
    """``objective`` with half as many examples alive at a time; raises ``error`` where one is left."""
    if not dataclasses.is_dataclass(type(objective)):
        raise error
    inner = getattr(objective, "objective", None)
    if inner is not None:  # a wrapper, such as ThroughProjection
        return dataclasses.replace(objective, objective=_halved(inner, examples, error))
    unroll = objective.unroll
    sizes = {"unroll.micro_batch": unroll.micro_batch or min(unroll.batch_size or examples, examples)}
    if hasattr(objective, "micro_batch"):
        sizes["micro_batch"] = min(objective.micro_batch, objective.batch_size)
    largest = max(sizes.values())
    if largest == 1:
        raise error
    size = largest // 2
    warnings.warn(
        f"out of memory with {largest} examples at a time: the same batch is taken again in parts of {size}, which changes "
        f"the gradient by rounding only{' (and the masks of dropout)' if unroll.dropout else ''}; set micro_batch={size} to "
        "spare the failed attempt", stacklevel=3,
    )
    own = {"micro_batch": min(sizes["micro_batch"], size)} if "micro_batch" in sizes else {}
    return dataclasses.replace(objective, unroll=dataclasses.replace(unroll, micro_batch=size), **own)
