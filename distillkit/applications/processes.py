"""Several processes on one distillation: each takes some of the initialisations, and their meta-gradients are averaged.

An outer step at several initialisations (``BPTT(inits=8)``, ``TrajectoryMatching(segments=8)``) is a mean of independent
meta-gradients, and so can be spread over processes, GPUs or machines.  Rank 0 *leads*: it owns the set, the outer optimiser
and the checkpoint, as one process would.  The other ranks *serve*: they are told the set and the seed of each step, form
their share of the meta-gradients, and send their sum.  What is exchanged is as small as a distilled set, so gloo carries it
over any network.  The gradient is that of one process up to rounding, whatever the number of ranks, and a run may go on
with another number of them than it began with::

    with team() as ranks:                                  # torchrun, accelerate launch, or a single process
        objective = ranks.shared(BPTT(task, student, unroll, inits=8))
        if ranks.leads:
            with objective:                                # at its end the others are sent home
                for record in Distiller(start, objective, checkpoint=file).run(100):
                    print(record.loss)
        else:
            objective.serve(start)

A rank that is lost, by a crash or a cable, ends the run on all others with :class:`RankLost`; the checkpoint holds the last
complete step, and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Unroll
from distillkit.core.objectives import Objective, fitted, meta_gradient
from distillkit.core.problem import MetaGradient, bound_step_sizes
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import Evaluation, evaluate
from distillkit.io.signals import ending_signals

STOP, STEP = 0, 1


class RankLost(ConnectionError):
    """Another process of the team has ended, or cannot be reached."""


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes of a run, seen from the one with number ``rank`` among ``size``."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def shared(self, objective) -> Shared:
        """``objective`` with its initialisations or segments spread over the team."""
        return Shared(objective, self)

    def evaluate(
        self, distilled: DistilledSet | None, task: Task, student: Student, *, seeds: Sequence[int] = (0, 1, 2), **options
    ) -> Evaluation | None:
        """``evaluate`` with the seeds spread over the team; the result on rank 0, None elsewhere.

        Raises:
            ValueError: as ``evaluate``; there are fewer seeds than processes.
            RankLost: another process has ended.
        """
        if len(seeds) < self.size:
            raise ValueError(f"{len(seeds)} seeds are too few for {self.size} processes; give as many seeds or start fewer")
        mine = range(self.rank, len(seeds), self.size)
        found = evaluate(distilled, task, student, seeds=[seeds[i] for i in mine], **options)
        by_seed = torch.zeros(3, len(seeds), dtype=torch.float64)
        for row, values in zip(by_seed, (found.scores, found.normalized, found.losses)):
            if values is not None:
                row[list(mine)] = torch.tensor(values, dtype=torch.float64)
        means = torch.tensor([found.seconds, *found.groups.values()], dtype=torch.float64) * len(mine) / len(seeds)
        total = self.sum(torch.cat([by_seed.flatten(), means]))
        scores, normalized, losses = total[: by_seed.numel()].view(by_seed.shape).tolist()
        means = total[by_seed.numel() :].tolist()
        if not self.leads:
            return None
        return dataclasses.replace(
            found,
            mean=float(np.mean(scores)),
            std=float(np.std(scores, ddof=1)) if len(seeds) > 1 else float("nan"),
            scores=tuple(scores),
            groups=dict(zip(found.groups, means[1:], strict=True)),
            seconds=means[0],
            normalized=None if found.normalized is None else tuple(normalized),
            losses=None if found.losses is None else tuple(losses),
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the team of a CPU tensor, on every rank."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(tensor)
        return tensor

    def told(self, tensor: Tensor) -> Tensor:
        """What rank 0 has in a CPU tensor of this shape and type, on every rank."""
        if self.size > 1:
            with self._together():
                dist.broadcast(tensor, src=0)
        return tensor

    def wait(self) -> None:
        """Return when every process has come here."""
        self.sum(torch.zeros(1))

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo has no kind of its own for it
            raise RankLost(
                f"process {self.rank} of {self.size} has lost touch with the others: one of them, or the network, has ended; "
                f"look at its own message, and start all of them again to go on from the checkpoint ({error})"
            ) from error


@contextlib.contextmanager
def team(timeout: float = 1800) -> Iterator[Team]:
    """The processes that ``torchrun`` or ``accelerate launch`` has started, or a team of one.

    Each takes the GPU of its local rank, where there are any.  A process that is told to end (SIGTERM, as ``torchrun`` does
    to the others when one is lost, or SIGHUP) unwinds, so that a checkpoint is still written.

    Args:
        timeout: seconds that a rank waits for the others before it takes them for lost; above what one's share of an outer
            step takes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(0, 1)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        with ending_signals():
            yield Team(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


class Shared:
    """An objective whose meta-gradient the whole team forms; made by :meth:`Team.shared`.

    On rank 0 it stands in the place of the ``objective`` it wraps, inside a ``with`` block; elsewhere it serves.  Its recipe
    is the wrapped objective's, so that a checkpoint belongs to a run and not to a number of processes.
    """

    def __init__(self, objective, team: Team):
        self.objective, self.team = objective, team

    @property
    def student(self) -> Student:
        return self.objective.student

    @property
    def unroll(self) -> Unroll:
        return self.objective.unroll

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, kind, *_) -> None:
        """Send the others home; if one of them is lost already, all are."""
        if self.team.leads and kind is not RankLost:
            with contextlib.suppress(RankLost):
                self.team.told(torch.tensor([STOP, 0]))

    def problems(self, distilled: DistilledSet, seed: int) -> Iterator[tuple[DistilledSet, int]]:
        """The outer step as one piece, which is taken apart where the meta-gradient is formed."""
        return iter([(distilled, seed)])

    def recipe(self) -> dict:
        return self.objective.recipe()

    def serve(self, distilled: DistilledSet) -> None:
        """Form this rank's share of each outer step until rank 0 says that it was the last.

        Args:
            distilled: the set that rank 0 starts from, which gives the shapes of what is exchanged.

        Raises:
            RankLost: another process has ended.
        """
        distilled = fitted(distilled, self)  # as rank 0's Distiller has it
        while True:
            order, seed = self.team.told(torch.zeros(2, dtype=torch.int64)).tolist()
            if order == STOP:
                return
            self._round(self._told(distilled), seed)

    def metagrad(self, step: tuple[DistilledSet, int]) -> MetaGradient:
        """The meta-gradient of the step that :meth:`problems` gives, formed by the whole team."""
        distilled, seed = step
        self.team.told(torch.tensor([STEP, seed]))
        return self._round(self._told(distilled), seed)

    def _told(self, distilled: DistilledSet) -> DistilledSet:
        """The set of rank 0."""
        sizes = bound_step_sizes(distilled, self.objective.unroll, self.student)
        found = {"embeds": distilled.embeds, "step_sizes": sizes} | ({"targets": distilled.targets} if distilled.soft else {})
        found = {name: self.team.told(value.detach().cpu().clone()) for name, value in found.items()}
        return dataclasses.replace(distilled, tokens=None, **found)

    def _round(self, distilled: DistilledSet, seed: int) -> MetaGradient:
        """The mean over all members, of which this rank forms those that are its turn."""
        members = _members(self.objective)
        count = len(range(self.team.rank, members, self.team.size))
        assert distilled.step_sizes is not None  # rank 0 has told them
        shapes = {"loss": (), "embeds": distilled.embeds.shape, "step_sizes": distilled.step_sizes.shape}
        shapes |= {"targets": distilled.targets.shape} if distilled.soft else {}
        total = [torch.zeros(shape, dtype=torch.float64) for shape in shapes.values()]
        if count:
            own = meta_gradient(distilled, _Share(self.objective, self.team), seed=seed)
            parts = [torch.as_tensor(getattr(own, name), dtype=torch.float64).detach().cpu() for name in shapes]
            total = [part * count / members for part in parts]
        flat = self.team.sum(torch.cat([part.reshape(-1) for part in total]))
        parts = dict(zip(shapes, flat.split([part.numel() for part in total]), strict=True))
        found = {name: part.reshape(shapes[name]).to(distilled.embeds.dtype) for name, part in parts.items() if name != "loss"}
        return MetaGradient(loss=float(parts["loss"]), targets=found.pop("targets", None), **found)


@dataclasses.dataclass(frozen=True, eq=False)
class _Share:
    """The members of an outer step that are one rank's turn."""

    objective: Objective
    team: Team

    @property
    def student(self) -> Student:
        return self.objective.student

    @property
    def unroll(self) -> Unroll:
        return self.objective.unroll

    @property
    def metagrad(self):
        return self.objective.metagrad

    def problems(self, distilled: DistilledSet, seed: int) -> Iterator:
        return itertools.islice(self.objective.problems(distilled, seed), self.team.rank, None, self.team.size)

    def recipe(self) -> dict:
        return self.objective.recipe()


def _members(objective) -> int:
    """Initialisations or segments of an outer step."""
    inner = getattr(objective, "objective", objective)  # a wrapper, such as ThroughProjection
    return inner.inits if hasattr(inner, "inits") else inner.segments
