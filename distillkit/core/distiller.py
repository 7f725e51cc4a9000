"""The outer loop: gradient descent on the distilled set itself.

Each outer step asks the objective for a meta-gradient at a fresh student initialisation and a fresh real batch, and
Adam moves up to four things along it: the embeddings at the free positions, the soft labels, the step sizes of the inner
loop, and attention labels.  Step sizes are owned here as softplus(raw), so that they cannot become negative, which is how
several published distillation codes run into NaN.

The loop is an iterator of records, so that a notebook can plot while it runs, a script can stop it, and a checkpoint can
take it up again at the step where it ended.

A step either happens or does not: embeddings, labels, step sizes, Adam's moments and the record change together, in one
assignment, so that whatever ends a run (Ctrl-C, a closed loop, memory that ran out, a loss that is not a number) leaves
the last complete step to be saved.  What only a checkpoint can survive, such as a killed process, costs the steps since
the last one; they are made again, to the bit, since every draw has an address (:mod:`distillkit.io.seeds`).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.objectives import check_objective, fitted, meta_gradient
from distillkit.core.optimizers import AdamW
from distillkit.core.problem import MetaGradient, bound_step_sizes
from distillkit.core.stacked import meta_gradients
from distillkit.io.checkpoint import Checkpoint
from distillkit.io.checks import check_flag, check_is, check_number, check_whole, require
from distillkit.io.seeds import derive_seed

LEARNABLE = ("embeds", "targets", "step_sizes", "attention")
KIND = "distiller-checkpoint"
SMALLEST = 1e-12  # norm of a gradient that is scaled to 1; step sizes that a run did not take have a gradient of 0
RUNAWAY = 1e4  # factor between a step size and the one it started from that no useful one has
ADAM = AdamW(betas=(0.9, 0.99))
MOMENTS = ("m", "v")


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One outer step: its number (from 1), the loss before it, its terms by name (without their weights), the norm of the
    embeddings' meta-gradient, the step sizes after it, and the seconds it took."""

    step: int
    loss: float
    terms: dict[str, float]
    grad_norm: float
    step_sizes: tuple[float, ...]
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class RunState:
    """All that outer steps change: the values by name (step sizes as they are before softplus), Adam's state for each of
    those that are learned, and the records."""

    values: dict[str, Tensor]
    adam: dict[str, dict[str, Any]]
    records: list[StepRecord]


def cosine(progress: float) -> float:
    """Decay from 1 to 0.02 along half a cosine; ``progress`` in 0..1."""
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def constant(progress: float) -> float:
    """No decay."""
    return 1.0


class Distiller:
    """Learns a distilled set.

    Args:
        distilled: where to start; it is copied, not changed.  Its labels take the order of the objective's classes.
        objective: what to learn it by.
        lr: outer learning rate of the embeddings (Adam).
        label_lr: of the label logits; default: 5 × ``lr``.
        step_size_lr: of the raw step sizes; default: 2 × ``lr``.
        attention_lr: of the attention labels, where the set has any; default: ``lr``.
        learn: which of ``"embeds"``, ``"targets"``, ``"step_sizes"``, ``"attention"`` to learn.  Hard targets cannot be, nor
            attention labels that are not there, and the default leaves them out.
        schedule: factor on all learning rates as a function of progress in 0..1 towards the ``n`` of ``run(n)``; so with
            the default decay ``run(100)`` and then ``run(200)`` is not one run of 200 steps.
        clip: the most that a meta-gradient may exceed the median of the last ten in norm; a larger one is scaled down to it.
            Long training runs on a set are nearly chaotic, so that now and then a meta-gradient is a hundred times too large,
            after which Adam would stand still for a hundred steps (Metz et al., 2019).  Default: no limit.
        normalize: scale the meta-gradients of embeddings, labels and step sizes to norm 1 in every step.  Draws of a
            :class:`~distillkit.core.mixture.Mixture` have norms that differ by factors of thousands; after a large one Adam
            would hardly follow the others.
        regularizers: terms added to the loss that look at the set alone, such as
            :class:`~distillkit.text.projection.NeighborLoss`.
        seed: draws initialisations and batches.
        checkpoint: file to save to, and to resume from where it exists; the same settings are demanded.  The records are
            in a log beside it (:mod:`distillkit.io.checkpoint`).
        checkpoint_every: outer steps between checkpoints; the last complete step is saved too when a run ends early.
        writes: whether this process writes checkpoint and log.  Of several processes on one run, rank 0 does; another one
            reads the checkpoint, and where it ends early and nobody holds the file any more, it saves its last complete step.

    Attributes:
        checkpoint: the :class:`~distillkit.io.checkpoint.Checkpoint`, with its ``path``, ``log`` and ``claim``.

    Raises:
        ValueError: settings that cannot be, or a checkpoint made with other settings, naming the first difference.
        StorageError: a checkpoint that cannot be trusted.
    """

    def __init__(
        self,
        distilled: DistilledSet,
        objective,
        *,
        lr: float = 0.02,
        label_lr: float | None = None,
        step_size_lr: float | None = None,
        attention_lr: float | None = None,
        learn: Sequence[str] = LEARNABLE,
        schedule: Callable[[float], float] = cosine,
        clip: float | None = None,
        normalize: bool = False,
        regularizers: Sequence = (),
        seed: int = 0,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 50,
        writes: bool = True,
    ):
        check_is("distilled", distilled, DistilledSet)
        check_objective(objective)
        self.learn = _learned(distilled, learn)
        for name, rate, values in zip(("lr", "label_lr", "step_size_lr", "attention_lr"),
                                      (lr, label_lr, step_size_lr, attention_lr), LEARNABLE, strict=True):
            if rate is not None or name == "lr":
                check_number(f"{name}: the learning rate of {values}", rate)
        if clip is not None:
            check_number("clip", clip, without="least")
        check_whole("checkpoint_every", checkpoint_every)
        check_flag("normalize", normalize)
        check_flag("writes", writes)
        derive_seed("distil", seed)  # an error now if it is none
        require(callable(schedule), f"schedule must be a function of the progress in 0..1, not {schedule!r}", TypeError)
        require(isinstance(regularizers, list | tuple) and all(callable(term) for term in regularizers),
                f"regularizers must be a list of terms such as NeighborLoss, not {regularizers!r}", TypeError)
        self.rates = {"embeds": lr, "targets": 5 * lr if label_lr is None else label_lr,
                      "step_sizes": 2 * lr if step_size_lr is None else step_size_lr}
        if distilled.attention is not None:
            self.rates["attention"] = lr if attention_lr is None else attention_lr
        self.objective, self.schedule, self.clip, self.normalize, self.seed = objective, schedule, clip, normalize, seed
        self.regularizers = tuple(regularizers)
        self._start = copy.deepcopy(fitted(distilled, objective))
        self._first_step_sizes = bound_step_sizes(self._start, objective.unroll, getattr(objective, "student", None))
        values = {"embeds": self._start.embeds, "targets": self._start.targets,
                  "step_sizes": _inverse_softplus(self._first_step_sizes)}
        if self._start.attention is not None:
            values["attention"] = self._start.attention
        self._state = RunState(values, {}, [])
        # Of the next step, and its share of the seconds, where it is computed beside those of other sets.
        self.next_gradient: tuple[MetaGradient, float] | None = None
        self.checkpoint = Checkpoint(checkpoint, kind=KIND, settings=self._describe(), every=checkpoint_every,
                                     activity="distilling", writes=writes)
        self.checkpoint.resume(self)

    @property
    def records(self) -> list[StepRecord]:
        """One of each outer step made so far."""
        return self._state.records

    @property
    def step(self) -> int:
        """Outer steps made so far."""
        return len(self.records)

    @property
    def distilled(self) -> DistilledSet:
        """The set as it is now (a copy), with the recipe that trains on it in ``meta["recipe"]``."""
        moved = self.step > 0 and "embeds" in self.learn
        current = self.current
        current.tokens = None if moved else self._start.tokens
        current.meta = {k: v for k, v in self._start.meta.items() if not (moved and k == "text")}
        current.meta["recipe"] = {**self.objective.recipe(), "distiller": self.checkpoint.settings, "outer_steps": self.step}
        return copy.deepcopy(current)

    def run(self, n: int) -> Generator[StepRecord, None, None]:
        """Make outer steps until ``n`` in all have been made, yielding a record of each.

        With a checkpoint, a run that ends before (by Ctrl-C, SIGTERM or SIGHUP, by an error, or because the loop over it was
        left) saves its last complete step and says on stderr how to go on.

        Raises:
            FloatingPointError: the loss, a gradient or a value is not finite, or the step sizes have run to zero or to
                infinity; values and checkpoint are the last good ones.
            StorageError: another run uses the checkpoint, or it cannot be written.
        """
        check_whole("n", n, least=0)
        yield from self.checkpoint.steps(self, n)

    def make_step(self, n: int) -> StepRecord:
        """Make one of ``n`` steps: all of it, or nothing where an exception ends it."""
        begun, step, current = time.perf_counter(), self.step + 1, self.current
        if self.next_gradient is None:
            outer = meta_gradient(current, self.objective, seed=self.next_seed, on_retry=self._use)
        else:
            (outer, seconds), self.next_gradient = self.next_gradient, None
            begun -= seconds
        gradients = {name: getattr(outer, name) for name in self._state.values}
        grads = {n: None if gradient is None else gradient.to(self._state.values[n]) for n, gradient in gradients.items()}
        loss, terms, norm = outer.loss, {"outer": outer.loss}, float(grads["embeds"].norm())
        grads = {name: None if gradient is None else self._scaled(gradient, norm) for name, gradient in grads.items()}
        for term in self.regularizers:
            weight = term.weight_at(self.step / n)
            terms[term.name], gradient = term(current)
            loss += weight * terms[term.name]
            grads["embeds"] = grads["embeds"] + weight * gradient.to(grads["embeds"])
        values, adam = self._moved(grads, self.schedule(self.step / n))
        finite = all(tensor is None or bool(tensor.isfinite().all()) for tensor in (*grads.values(), *values.values()))
        require(finite and math.isfinite(loss), f"outer step {step}: loss {loss}, gradient norm {norm}, step sizes "
                f"{_rounded(_positive(self._state.values['step_sizes']))}; lower lr or the inner step size", FloatingPointError)
        sizes = _positive(values["step_sizes"])
        start = self._first_step_sizes
        if float(sizes.max()) > RUNAWAY * float(start.max()) or float(sizes.max()) * RUNAWAY < float(start.min()):
            raise FloatingPointError(
                f"outer step {step}: the step sizes have run from {_rounded(start)} to {_rounded(sizes)}, where training "
                "stands still or diverges: this student cannot follow what is asked of it; lower step_size_lr, start from the "
                "size that search_step_size finds, or take more inner steps or an optimiser of the expert's kind"
            )
        record = StepRecord(step, loss, terms, norm, tuple(sizes.tolist()), time.perf_counter() - begun)
        self._state = RunState(values, adam, [*self.records, record])
        return record

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """All that steps change but the records, for the checkpoint."""
        tensors = {f"value.{name}": value for name, value in self._state.values.items()}
        for name, adam in self._state.adam.items():
            tensors |= {f"{moment}.{name}": adam[moment][name] for moment in MOMENTS}
        return tensors, {"counts": {name: adam["count"] for name, adam in self._state.adam.items()}}

    def restore(self, tensors: dict[str, Tensor], data: dict, records: list[dict]) -> None:
        """Become what :meth:`state` returned."""
        values = {name: tensors[f"value.{name}"] for name in self._state.values}
        adam = {name: {"count": count} | {moment: {name: tensors[f"{moment}.{name}"]} for moment in MOMENTS}
                for name, count in data["counts"].items()}
        self._state = RunState(values, adam, [_record(fields) for fields in records])

    def _use(self, objective) -> None:
        """Go on with ``objective``: the same one in parts that memory has room for."""
        self.objective = objective

    def _scaled(self, gradient: Tensor, norm: float) -> Tensor:
        """A gradient as Adam is to see it, after ``normalize`` or ``clip``; ``norm`` is that of the embeddings' gradient."""
        if self.normalize:
            return gradient / gradient.norm().clamp_min(SMALLEST)
        if self.clip is None or not self.records or not 0 < norm < math.inf:
            return gradient
        most = self.clip * statistics.median(record.grad_norm for record in self.records[-10:])
        return gradient * min(1.0, most / norm) if most > 0 else gradient

    def _moved(self, grads: dict[str, Tensor | None], factor: float) -> tuple[dict, dict]:
        """The values after Adam's step along ``grads``, and its state then; the current ones stay as they are."""
        values, adam = dict(self._state.values), {}
        for name in self.learn:
            value, gradient = values[name], grads[name]
            assert gradient is not None  # only hard targets have none, and they are not learned
            if name == "embeds":
                gradient = gradient * self._start.free.unsqueeze(-1)
            if name == "step_sizes":  # chain rule through softplus
                gradient = gradient * value.sigmoid()
            state = self._state.adam.get(name) or ADAM.init({name: value})
            new, adam[name] = ADAM.update({name: value}, {name: gradient}, state, self.rates[name] * factor)
            values |= new
        return values, adam

    @property
    def next_seed(self) -> int:
        """The address of what the next outer step draws."""
        return derive_seed("distil", self.seed, self.step)

    @property
    def current(self) -> DistilledSet:
        """The set as it is now, sharing its tensors with the run."""
        # Not made anew: values were checked when they were made, and a step says itself what is not finite.
        current, values = copy.copy(self._start), self._state.values
        current.embeds, current.targets, current.tokens = values["embeds"], values["targets"], None
        current.step_sizes, current.attention = _positive(values["step_sizes"]), values.get("attention")
        return current

    def _describe(self) -> dict:
        return {
            "objective": self.objective.recipe(),
            "rates": self.rates,
            "learn": self.learn,
            "regularizers": [term.describe() for term in self.regularizers],
            "schedule": getattr(self.schedule, "__name__", repr(self.schedule)),
            **({} if self.clip is None else {"clip": self.clip}),
            **({"normalize": True} if self.normalize else {}),  # older checkpoints do not say it
            "seed": self.seed,
            "start": {
                "examples": len(self._start),
                "length": self._start.embeds.shape[1],
                "task": self._start.meta.get("task"),
                "sha256": digest(self._start),
            },
            "task_fingerprint": self._start.meta.get("task_fingerprint"),
        }


def distil_together(distillers: Sequence[Distiller], n: int) -> Iterator[list[StepRecord]]:
    """Run several distillers side by side until each has made ``n`` outer steps; their meta-gradients are computed at once.

    Each saves to its own checkpoint and goes on from it as in :meth:`~distillkit.core.distiller.Distiller.run`.  Where memory
    runs out, the round is computed one set after the other.

    Args:
        distillers: of sets of one shape, whose objectives share a student and a strategy.

    Yields:
        in each round the records of those that were not done.
    """
    strategy = distillers[0].objective.metagrad
    require(all(d.objective.metagrad == strategy for d in distillers),
            "the distillers form their meta-gradients in different ways; give their objectives one metagrad")
    runs = {distiller: distiller.run(n) for distiller in distillers}
    try:
        while active := [distiller for distiller in distillers if distiller.step < n]:
            begun = time.perf_counter()
            problems = [[*d.objective.problems(fitted(d.current, d.objective), d.next_seed)] for d in active]
            try:
                gradients = iter(meta_gradients(strategy, [problem for of_one in problems for problem in of_one]))
                means = [MetaGradient.mean([next(gradients) for _ in of_one]) for of_one in problems]
            except torch.OutOfMemoryError:
                means = []  # each distiller computes its own
            del problems
            seconds = (time.perf_counter() - begun) / len(active)
            for distiller, mean in zip(active, means, strict=False):
                distiller.next_gradient = mean, seconds
            yield [next(runs[distiller]) for distiller in active]
        for run in runs.values():
            next(run, None)
    finally:
        for run in runs.values():
            run.close()


def _record(fields: dict) -> StepRecord:
    """A record from JSON, where a number that is not finite is a word."""
    terms = {name: float(value) for name, value in fields["terms"].items()}
    numbers = {name: float(fields[name]) for name in ("loss", "grad_norm")}
    return StepRecord(**{**fields, **numbers, "terms": terms, "step_sizes": tuple(fields["step_sizes"])})


def digest(distilled: DistilledSet) -> str:
    """SHA-256 of a set's tensors."""
    total = hashlib.sha256()
    for field in dataclasses.fields(distilled):
        value = getattr(distilled, field.name)
        if isinstance(value, Tensor):
            total.update(f"{field.name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _positive(raw: Tensor) -> Tensor:
    """softplus(``raw``), which far below 0 would round to 0."""
    return torch.nn.functional.softplus(raw).clamp_min(torch.finfo(raw.dtype).tiny)


def _learned(distilled: DistilledSet, learn: Sequence[str]) -> tuple[str, ...]:
    """The names of what is learned, in the order of :data:`LEARNABLE`; by default all that the set has."""
    fixed = {"targets": not distilled.soft, "attention": distilled.attention is None}
    if learn is LEARNABLE:
        return tuple(name for name in LEARNABLE if not fixed.get(name))
    names = isinstance(learn, Sequence) and not isinstance(learn, str) and learn and all(n in LEARNABLE for n in learn)
    require(names, f"learn must name some of {', '.join(LEARNABLE)}, not {learn!r}")
    require(distilled.soft or "targets" not in learn,
            "hard targets cannot be learned: use set.soften(), or leave 'targets' out of learn")
    require(distilled.attention is not None or "attention" not in learn,
            "the set has no attention labels to learn: use set.with_attention(student), or leave 'attention' out of learn")
    return tuple(name for name in LEARNABLE if name in learn)


def _inverse_softplus(positive: Tensor) -> Tensor:
    """raw such that softplus(raw) = ``positive``."""
    return positive.detach().clone() + torch.log(-torch.expm1(-positive.detach()))


def _rounded(sizes: Tensor) -> list[float]:
    return [float(f"{size:.3g}") for size in sizes.tolist()]
