"""Several processes on one distillation: each takes some of the initialisations, and their meta-gradients are averaged.

An outer step at several initialisations (``BPTT(inits=8)``, ``TrajectoryMatching(segments=8)``) is a mean of independent
meta-gradients, so it can be spread over processes, GPUs or machines.  Every rank runs the same program: the same set, the
same :class:`~distillkit.core.distiller.Distiller`, the same draws, since every draw has an address.  Only the sum of the
meta-gradients is exchanged (all-reduced over gloo); it is as small as a distilled set.  The result is that of one process
up to rounding, and a run may go on with another number of processes than it began with::

    with team() as ranks:                                  # torchrun, accelerate launch, or a single process
        objective = ranks.shared(BPTT(task, student, unroll, inits=8))
        distiller = Distiller(start, objective, checkpoint=file, writes=ranks.leads)
        for record in distiller.run(100):
            print(record.loss)

All ranks read the checkpoint, so all must see its file; rank 0 writes it.  With each meta-gradient the ranks compare their
outer step, settings and sets, and a difference is an error that names it.

A rank that ends, by an error or a signal, says so in the store that all ranks share, and the others raise :class:`RankLost`
when they next exchange something.  A rank that is killed, or whose machine is lost, stops its heartbeat, and is missed after
``timeout`` seconds even in the middle of a long step.  Whoever then holds the last complete step writes it: rank 0, or, where
rank 0 is gone, the first survivor to lock the file.
"""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.estimate import members
from distillkit.core.objectives import Wrapper, meta_gradient
from distillkit.core.problem import MetaGradient, bound_step_sizes
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import Evaluation, evaluate
from distillkit.evaluation.scoring import mean_and_std
from distillkit.io.seeds import derive_seed
from distillkit.io.signals import ending_signals

START = timedelta(minutes=30)  # for all processes to have started
DRIFT = 1e-5  # relative difference between ranks that rounding does not explain
COMPARED = ("outer step", "settings or corpus", "embeddings", "step sizes", "labels", "attention labels")
_blocks = itertools.count()


class RankLost(ConnectionError):
    """Another process of the team has ended, or cannot be reached."""


class Team:
    """The processes of a run, seen from the one with number ``rank`` among ``size``; made by :func:`team`.

    Attributes:
        rank, size: this process's number, and how many there are.
        failure: why the run cannot go on, once a rank has been missed.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None, timeout: float = 30):
        self.rank, self.size, self.failure = rank, size, ""
        self._store, self._timeout, self._meetings, self._attentive = store, timeout, 0, False

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def shared(self, objective):
        """``objective`` with its initialisations or segments spread over the team."""
        return objective if self.size == 1 else Shared(objective, self)

    def evaluate(
        self, distilled: DistilledSet | None, task: Task, student: Student, *, seeds: Sequence[int] = (0, 1, 2), **options
    ) -> Evaluation:
        """``evaluate`` with the seeds spread over the team; every rank returns the whole result.

        Raises:
            ValueError: as ``evaluate``; there are fewer seeds than processes.
            RankLost: another process has ended.
        """
        if len(seeds) < self.size:
            raise ValueError(f"{len(seeds)} seeds are too few for {self.size} processes; give as many seeds or start fewer")
        with self.attentive():
            part = evaluate(distilled, task, student, seeds=seeds[self.rank :: self.size], **options)
        by_seed = torch.zeros(3, len(seeds), dtype=torch.float64)
        for row, values in zip(by_seed, (part.scores, part.normalized, part.losses)):
            if values is not None:
                row[self.rank :: self.size] = torch.tensor(values, dtype=torch.float64)
        means = torch.tensor([part.seconds, *part.groups.values()], dtype=torch.float64)
        total = self.sum(torch.cat([by_seed.flatten(), means * len(part.scores) / len(seeds)]))
        scores, normalized, losses = total[: by_seed.numel()].view(by_seed.shape).tolist()
        seconds, *groups = total[by_seed.numel() :].tolist()
        mean, std = mean_and_std(scores)
        return dataclasses.replace(
            part,
            mean=mean,
            std=std,
            scores=tuple(scores),
            groups=dict(zip(part.groups, groups, strict=True)),
            seconds=seconds,
            normalized=None if part.normalized is None else tuple(normalized),
            losses=None if part.losses is None else tuple(losses),
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the team of a CPU tensor, on every rank.

        Raises:
            RankLost: another process has ended.
        """
        if self.size > 1:
            with self.attentive():
                try:
                    self._meet()
                    dist.all_reduce(tensor)
                except RuntimeError as error:  # what the store and gloo raise where a connection is closed
                    raise self._lost(str(error)) from error
        return tensor

    def wait(self) -> None:
        """Return when every process has come here."""
        self.sum(torch.zeros(1))

    @contextlib.contextmanager
    def attentive(self) -> Iterator[None]:
        """Within the block :class:`RankLost` is raised as soon as a rank is missed; outside it, at the next block."""
        outside, self._attentive = self._attentive, True
        try:
            self.check()
            yield
        finally:
            self._attentive = outside

    def check(self, *_) -> None:
        """Raise RankLost if a rank has been missed and this process waits for it (also as a signal handler)."""
        if self.failure and self._attentive:
            raise self._lost(self.failure)

    def _meet(self) -> None:
        """Wait until all ranks have come here, in a loop that signals can end: gloo's own waiting cannot be interrupted."""
        assert self._store is not None  # there are several ranks
        self._meetings += 1
        self._store.add("arrived", 1)
        while True:
            ended = self._store.add("ended", 0)  # asked first: whoever ended after this meeting had arrived
            if self._store.add("arrived", 0) >= self._meetings * self.size:
                return
            if ended:
                raise self._lost("it has ended")
            time.sleep(0.005)

    def _lost(self, reason: str) -> RankLost:
        return RankLost(f"process {self.rank} of {self.size} has lost another one ({reason}): look at that one's own message, "
                        "and start all of them again to go on from the checkpoint")

    def listen(self, store: dist.Store, ended: threading.Event) -> None:
        """Give signs of life until ``ended``, and note a rank that gives none; runs in a thread of its own."""
        beats, heard = [-1] * self.size, [0.0] * self.size
        while not (ended.wait(self._timeout / 15) or self.failure):
            try:
                for rank, last in enumerate(beats):
                    beats[rank] = store.add(f"beat {rank}", int(rank == self.rank))
                    heard[rank] = heard[rank] if beats[rank] == last else time.monotonic()
            except RuntimeError as error:
                self.failure = str(error)
            silence = time.monotonic() - min(heard)
            if silence > self._timeout:
                self.failure = f"no sign of life of process {heard.index(min(heard))} for {silence:.0f} seconds"
        if self.failure:
            _thread.interrupt_main(signal.SIGURG)  # runs `check` in the main thread


@contextlib.contextmanager
def team(timeout: float = 30) -> Iterator[Team]:
    """The processes that ``torchrun`` or ``accelerate launch`` has started, or a team of one.

    Each takes the GPU of its local rank, where there are any.  A process that is told to end (SIGTERM, as ``torchrun`` does
    to the others when one is lost, or SIGHUP) unwinds, so that a checkpoint is still written.

    Args:
        timeout: seconds without a sign of life after which a rank counts as lost.  Steps may take longer.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    rendezvous, rank, size = next(dist.rendezvous("env://", timeout=START))
    dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    store = dist.PrefixStore(f"team {next(_blocks)}", rendezvous)  # torchrun's store outlives a block
    ranks, ended = Team(rank, size, store, timeout), threading.Event()
    previous = signal.signal(signal.SIGURG, ranks.check)
    listener = threading.Thread(target=ranks.listen, args=(store.clone(), ended), daemon=True)
    listener.start()
    try:
        with ending_signals():
            yield ranks
    finally:
        ended.set()
        with contextlib.suppress(RuntimeError):  # the store is gone with the process that held it
            store.add("ended", 1)
        listener.join(timeout)
        signal.signal(signal.SIGURG, previous)
        dist.destroy_process_group()


class Shared(Wrapper):
    """An objective whose meta-gradient the whole team forms; made by :meth:`Team.shared`.

    All else is the wrapped objective's, its recipe too: a checkpoint belongs to a run and not to a number of processes.
    """

    def __init__(self, objective, team: Team):
        self.objective, self.team = objective, team

    def problems(self, distilled: DistilledSet, seed: int) -> Iterator[tuple[DistilledSet, int]]:
        """The outer step as one piece, which is taken apart where the meta-gradient is formed."""
        return iter([(distilled, seed)])

    def metagrad(self, step: tuple[DistilledSet, int]) -> MetaGradient:
        """The mean over all members of the outer step that :meth:`problems` gives; this rank forms those that are its turn.

        Raises:
            ValueError: the ranks are at different steps, or have other settings or sets.
            RankLost: another process has ended.
        """
        distilled, seed = step
        rank, size, count = self.team.rank, self.team.size, members(self.objective)
        learned = [distilled.embeds, bound_step_sizes(distilled, self.unroll, self.student)]
        optional = {"targets": distilled.targets if distilled.soft else None, "attention": distilled.attention}
        optional = {name: value for name, value in optional.items() if value is not None}
        learned += optional.values()
        shapes = [(size, 2 + len(learned)), (1,), *(value.shape for value in learned)]
        states, *sums = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        if turns := range(rank, count, size):
            with self.team.attentive():
                share = meta_gradient(distilled, _Share(self.objective, self.team), seed=seed, on_retry=self._shrink)
            for total, mean in zip(sums, (share.loss, share.embeds, share.step_sizes, *(getattr(share, n) for n in optional))):
                total += torch.as_tensor(mean, dtype=torch.float64, device="cpu").detach() * (len(turns) / count)
        settings = derive_seed("settings", json.dumps([self.recipe(), distilled.meta.get("task_fingerprint")]))
        norms = [float(value.double().norm()) for value in learned]
        states[rank] = torch.tensor([seed, settings, *norms], dtype=torch.float64)
        flat = self.team.sum(torch.cat([states.flatten(), *(total.flatten() for total in sums)]))
        states, loss, *gradients = map(Tensor.view, flat.split([math.prod(shape) for shape in shapes]), shapes)
        for rank, column in ((states - states[0]).abs() > DRIFT * states[0].abs()).nonzero().tolist():
            raise ValueError(f"process {rank} differs from process 0 in its {COMPARED[column]}; start all processes with the "
                             "same arguments and versions, and with a checkpoint that all of them can read")
        embeds, step_sizes, *others = (gradient.to(distilled.embeds.dtype) for gradient in gradients)
        labels = {"targets": None} | dict(zip(optional, others, strict=True))
        return MetaGradient(float(loss), embeds=embeds, step_sizes=step_sizes, **labels)

    def _shrink(self, share: _Share) -> None:
        self.objective = share.objective  # in parts that memory has room for


@dataclasses.dataclass(eq=False)
class _Share(Wrapper):
    """The members of an outer step that are one rank's turn."""

    objective: Any
    team: Team

    def problems(self, distilled: DistilledSet, seed: int) -> Iterator:
        return itertools.islice(self.objective.problems(distilled, seed), self.team.rank, None, self.team.size)
