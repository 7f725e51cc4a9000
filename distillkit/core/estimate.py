"""What a distillation will cost on this machine: minutes and memory, measured before the long work begins.

An outer step of T inner steps costs a fixed part (an initialisation, the outer loss) and a part for each inner step: the
gradients that the strategy takes of it, and the copies of the parameters that it stores.  So two short runs on the task's
real shapes are measured, of two and of three inner steps, and the line through them is followed to T.  A strategy that
walks back through a window of steps pays for the rest by a plain training step each.

Seconds are those of this machine as busy as it is now.  Bytes are those of live tensors at their peak: the student's own
weights, activations, gradients, and all copies of the parameters.  The process itself, and a kernel's scratch memory on a
CPU, come on top.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Unroll
from distillkit.core.metagrad import Truncated, suited
from distillkit.core.objectives import BPTT, check_objective, fitted
from distillkit.core.problem import Problem, outer_loss_and_grads
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.io.checks import check_is, check_whole
from distillkit.io.escaping import say
from distillkit.io.memory import LiveBytes


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What ``steps`` outer steps will cost.

    Attributes:
        seconds: of all outer steps, in one process.
        nbytes: the most bytes of tensors alive at once.
        steps, inner_steps: outer steps, and inner steps of each.
        device: that was measured.
    """

    seconds: float
    nbytes: int
    steps: int
    inner_steps: int
    device: str

    def __str__(self) -> str:
        length = f"{self.seconds / 60:.1f} minutes" if self.seconds < 7200 else f"{self.seconds / 3600:.1f} hours"
        size = f"{self.nbytes / 1e6:,.0f} MB" if self.nbytes < 1e9 else f"{self.nbytes / 1e9:.1f} GB"
        return (f"about {length} and {size} of tensors on {self.device}, for {self.steps} outer steps of {self.inner_steps} "
                "inner steps")


def recommend(
    student: Student,
    task: Task | None = None,
    *,
    unroll: Unroll | None = None,
    distilled: DistilledSet | None = None,
    outer_steps: int = 100,
) -> tuple[Callable, str]:
    """The strategy that suits a student, and why in a sentence; with a task also what distilling with it will cost here.

    Args:
        student: what trains on the set.
        task: to measure :class:`~distillkit.core.objectives.BPTT` on, with its default batch.  It takes a few seconds.
        unroll: how the student trains; default ``Unroll(10)``.
        distilled: the set to learn, whose shape counts; default: one example per class, or eight prompts.
        outer_steps: to predict minutes for.

    Raises:
        ValueError: no strategy suits: the student is in bfloat16.
    """
    check_is("student", student, Student)
    strategy, reason = suited(student)
    if task is None:
        return strategy, reason
    check_is("task", task, Task)
    check_whole("outer_steps", outer_steps)
    size = {"per_class": 1} if task.classes else {"fraction": min(1.0, 8 / len(task.train))}
    start = DistilledSet.from_real(task, student, **size) if distilled is None else distilled
    unroll = Unroll(10) if unroll is None else unroll
    objective = BPTT(task, student, unroll, metagrad=strategy, batch_size=min(64, len(task.train)))
    return strategy, f"{reason}; {estimate(start, objective, outer_steps)}"


def estimate(distilled: DistilledSet, objective, steps: int) -> Estimate:
    """Minutes and memory of ``steps`` outer steps of ``objective`` on ``distilled``, from two short runs that are measured.

    Args:
        distilled: the set to learn; its shape counts and its values do not.
        objective: such as :class:`~distillkit.core.objectives.BPTT`; see :class:`~distillkit.core.objectives.Objective`.
        steps: outer steps.

    Raises:
        torch.OutOfMemoryError: not even three inner steps fit.
    """
    check_is("distilled", distilled, DistilledSet)
    check_objective(objective)
    check_whole("steps", steps)
    distilled, student = fitted(distilled, objective), objective.student
    strategy, inner_steps = objective.metagrad, objective.unroll.steps
    window = inner_steps
    if isinstance(strategy, Truncated):
        strategy, window = strategy.inner, min(strategy.window, inner_steps)

    def problem() -> Problem:
        return next(iter(objective.problems(distilled, 0)))

    def run(length: int) -> None:
        whole = problem()
        strategy(dataclasses.replace(whole.window(0, length), outer=whole.outer[-1:]))  # the longest real sentences

    sample = problem()  # what a corpus is asked for the first time, such as its tokens, is not asked again
    parts, middle = len(sample.outer), sample.outer[len(sample.outer) // 2 :][:1]
    params, state = sample.start()
    few, more = min(window, 2), min(window, 3)
    few_seconds, few_bytes = _measured(lambda: run(few), student.device)
    more_seconds, more_bytes = _measured(lambda: run(more), student.device)
    plain_seconds, _ = _measured(lambda: sample.step(0, params, state), student.device)
    outer = dataclasses.replace(sample, outer=middle)
    outer_seconds, _ = _measured(lambda: outer_loss_and_grads(outer, params), student.device)
    every = getattr(strategy, "every", 1)
    stored = window if every == 1 else math.ceil(window / every) + every
    seconds = few_seconds + (window - few) * max(plain_seconds, more_seconds - few_seconds)  # a busy machine hides differences
    seconds += (parts - 1) * outer_seconds + (inner_steps - window) * plain_seconds
    nbytes = few_bytes + max(0, stored - few) * max(0, more_bytes - few_bytes)
    nbytes += sum(tensor.nbytes for tensor in (*student.module.parameters(), *student.module.buffers()))
    return Estimate(seconds * members(objective) * steps, nbytes, steps, inner_steps, str(student.device))


def announce(distilled: DistilledSet, objective, steps: int) -> None:
    """Say on stderr what :func:`estimate` predicts, where the run is long enough: measuring takes about two outer steps."""
    if steps >= 20:
        with suppress(torch.OutOfMemoryError):  # the run itself goes on in smaller parts
            say(f"distilling takes {estimate(distilled, objective, steps)}", error=True)


def members(objective) -> int:
    """How many meta-gradients an outer step is the mean of: initialisations of BPTT, segments of trajectory matching."""
    inner = getattr(objective, "objective", objective)  # a wrapper, such as ThroughProjection
    return inner.inits if hasattr(inner, "inits") else getattr(inner, "segments", 1)


def _measured(run: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds of the fastest of three runs (of one, where it is long), and the most bytes that a run holds at once."""

    def timed() -> float:
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    seconds = [timed()]
    with LiveBytes() as live:  # counting slows small models down, so it is not timed
        run()
    seconds += [timed() for _ in range(2)] if seconds[0] < 0.5 else []
    return min(seconds), live.total.peak
