"""The outer loop: gradient descent on the distilled set itself.

Each outer step asks the objective for a meta-gradient at a fresh student initialisation and a fresh real batch, and
Adam moves three things along it: the embeddings at the free positions, the soft labels, and the step sizes of the inner
loop.  Step sizes are owned here as softplus(raw), so that they cannot become negative, which is how several published
distillation codes run into NaN.

The loop is an iterator of records, so that a notebook can plot while it runs, a script can stop it, and a checkpoint
folder can take it up again at the step where it ended.

A step either happens or does not: embeddings, labels, step sizes, Adam's moments and the record change together, in one
assignment, so that whatever ends a run (Ctrl-C, a closed loop, memory that ran out, a loss that is not a number) leaves
the last complete step to be saved.  What only a checkpoint can survive, such as a killed process, costs the steps since
the last one; they are made again, to the bit, since every draw has an address (:mod:`distillkit.io.seeds`).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.objectives import bound_step_sizes, check_objective, fitted, meta_gradient
from distillkit.core.optimizers import AdamW
from distillkit.io.checks import check_choice, check_is, check_rate, check_whole
from distillkit.io.escaping import say
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed
from distillkit.io.signals import ending_signals
from distillkit.io.storage import Claim, StorageError, is_vacant, load_folder, remove_orphans, save_folder, save_text, unwritten

LEARNABLE = ("embeds", "targets", "step_sizes")
KIND = "distiller-checkpoint"
RUNAWAY = 1e4  # factor between a step size and the one it started from that no useful one has
ADAM = AdamW(betas=(0.9, 0.99))
NONFINITE = ("stop", "skip")
PATIENCE = 10  # steps skipped in a row that say the trouble is not the batch's
VERSIONED = ("torch", "transformers", "numpy")


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One outer step: its number (from 1), the loss before it, its terms by name (without their weights), the norm of the
    embeddings' meta-gradient, the step sizes after it, and the seconds it took.

    A step that was skipped has the term ``"skipped"``, and NaN for what was not finite."""

    step: int
    loss: float
    terms: dict[str, float]
    grad_norm: float
    step_sizes: tuple[float, ...]
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Made:
    """All that outer steps change: the values by name (step sizes as they are before softplus), Adam's moments of those
    that are learned, and the records."""

    values: dict[str, Tensor]
    moments: dict[str, dict[str, Any]]
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
        learn: which of ``"embeds"``, ``"targets"``, ``"step_sizes"`` to learn.  Hard targets cannot be, and the default
            leaves them out.
        schedule: factor on all learning rates as a function of progress in 0..1 towards the ``n`` of ``run(n)``; so with
            the default decay ``run(100)`` and then ``run(200)`` is not one run of 200 steps.
        regularizers: terms added to the loss that look at the set alone, such as
            :class:`~distillkit.text.projection.NeighborLoss`.
        seed: draws initialisations and batches.
        checkpoint_dir: folder to save to, and to resume from where it holds a run; the same settings are demanded.
            It holds the settings, the versions of what computes, the values, and all records.  Beside it are a log,
            ``<name>.log.jsonl``, with a line of settings and then one for each record as it is made, and the lock that
            keeps other runs out while this one runs.
        checkpoint_every: outer steps between checkpoints; the last complete step is saved too when a run ends early.
        nonfinite: what to do where loss, gradient or new values are not finite.  ``"stop"``: raise FloatingPointError.
            ``"skip"``: change nothing, record the step with the term ``"skipped"``, and go on with the next, whose
            initialisation and batch are others; after ten in a row stop all the same.  May be changed at a resume.
        writes: whether this process writes checkpoint and log.  Of several processes on one run, rank 0 does; another one
            reads the checkpoint, and where it ends early and nobody holds the folder any more, it saves its last complete step.

    Attributes:
        claim: the lock on ``checkpoint_dir`` (None without one); a run takes it, and a ``with`` block may hold it longer.

    Raises:
        ValueError: settings that cannot be, or a checkpoint made with other settings, naming which.
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
        learn: Sequence[str] = LEARNABLE,
        schedule: Callable[[float], float] = cosine,
        regularizers: Sequence = (),
        seed: int = 0,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 50,
        nonfinite: str = "stop",
        writes: bool = True,
    ):
        check_is("distilled", distilled, DistilledSet)
        check_objective(objective)
        if learn is LEARNABLE and not distilled.soft:
            learn = tuple(n for n in LEARNABLE if n != "targets")
        if isinstance(learn, str) or not isinstance(learn, Sequence) or not learn or any(n not in LEARNABLE for n in learn):
            raise ValueError(f"learn must name some of {', '.join(LEARNABLE)}, not {learn!r}")
        if "targets" in learn and not distilled.soft:
            raise ValueError("hard targets cannot be learned: use set.soften(), or leave 'targets' out of learn")
        for name, rate, of in zip(("lr", "label_lr", "step_size_lr"), (lr, label_lr, step_size_lr), LEARNABLE):
            if rate is not None or name == "lr":
                check_rate(f"{name}: the learning rate of {of}", rate)
        self.rates = {"embeds": lr, "targets": 5 * lr if label_lr is None else label_lr}
        self.rates["step_sizes"] = 2 * lr if step_size_lr is None else step_size_lr
        check_whole("checkpoint_every", checkpoint_every)
        check_choice("nonfinite", nonfinite, NONFINITE)
        derive_seed("distil", seed)  # an error now if it is none
        if not callable(schedule):
            raise TypeError(f"schedule must be a function of the progress in 0..1, not {schedule!r}")
        if not isinstance(regularizers, list | tuple) or not all(callable(term) for term in regularizers):
            raise TypeError(f"regularizers must be a list of terms such as NeighborLoss, not {regularizers!r}")
        self.objective, self.schedule, self.seed = objective, schedule, seed
        self.regularizers = tuple(regularizers)
        self.learn = tuple(n for n in LEARNABLE if n in learn)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.checkpoint_every, self.nonfinite, self.writes = checkpoint_every, nonfinite, writes
        distilled = fitted(distilled, objective)
        self._start = copy.deepcopy(distilled)
        self._settings = self._describe(distilled)
        values = {
            "embeds": distilled.embeds.clone(),
            "targets": distilled.targets.clone(),
            "step_sizes": _inverse_softplus(self._first_step_sizes(distilled)),
        }
        self._made = _Made(values, {}, [])
        self._saved = 0  # steps in the checkpoint
        self.claim = None if self.checkpoint_dir is None else Claim(self.checkpoint_dir)
        self._resume()

    @property
    def records(self) -> list[StepRecord]:
        """One of each outer step made so far."""
        return self._made.records

    @property
    def step(self) -> int:
        """Outer steps made so far."""
        return len(self.records)

    @property
    def distilled(self) -> DistilledSet:
        """The set as it is now (a copy), with the recipe that trains on it in ``meta["recipe"]``."""
        moved = self.step > 0 and "embeds" in self.learn
        meta = {k: v for k, v in self._start.meta.items() if not (moved and k == "text")}
        meta["recipe"] = {**self.objective.recipe(), "distiller": self._settings, "outer_steps": self.step}
        return copy.deepcopy(
            DistilledSet(
                embeds=self._made.values["embeds"],
                mask=self._start.mask,
                free=self._start.free,
                targets=self._made.values["targets"],
                step_sizes=self._step_sizes(),
                tokens=None if moved else self._start.tokens,
                meta=meta,
            )
        )

    def run(self, n: int) -> Generator[StepRecord, None, None]:
        """Make outer steps until ``n`` in all have been made, yielding a record of each.

        With a ``checkpoint_dir``, a run that ends before (by Ctrl-C, SIGTERM or SIGHUP, by an error, or because the loop over
        it was left) saves its last complete step and says on stderr how to go on.

        Raises:
            FloatingPointError: the loss, a gradient or a value is not finite, or the step sizes have run to zero or to
                infinity; values and checkpoint are the last good ones.
            StorageError: another run works in ``checkpoint_dir``, or the checkpoint cannot be written.
        """
        check_whole("n", n, least=0)
        with (self.writes and self.claim) or nullcontext(), ending_signals():
            self._take_up()
            try:
                with progress(total=n, initial=self.step, desc="distilling", unit="step") as bar:
                    while self.step < n:
                        record = self._one(n)
                        self._log(record)
                        if self.writes and (self.step % self.checkpoint_every == 0 or self.step == n):
                            self._save()
                        bar.update()
                        bar.set_postfix(loss=f"{record.loss:.3f}")
                        yield record
            except BaseException:
                self._leave(n)
                raise

    def save(self) -> None:
        """Write a checkpoint of the whole run to ``checkpoint_dir``.

        Raises:
            StorageError: another run works there, or it cannot be written.
        """
        if self.claim is None:
            raise ValueError("this distiller has no checkpoint_dir to save to")
        with self.claim:
            self._save()

    def _save(self) -> None:
        if self.checkpoint_dir is None:
            return
        made = self._made
        tensors = {f"value.{name}": value for name, value in made.values.items()}
        for name, state in made.moments.items():
            tensors |= {f"adam.{name}.count": torch.tensor(state["count"])}
            tensors |= {f"adam.{name}.{key}": state[key][name] for key in ("m", "v")}
        data = {"settings": self._settings, "versions": _versions(), "records": [_as_json(r) for r in made.records]}
        save_folder(self.checkpoint_dir, kind=KIND, tensors=tensors, data=data)
        self._saved = len(made.records)

    def _leave(self, n: int) -> None:
        """Save what an early end would lose, and say how to go on."""
        if self.claim is None:
            return
        # Where another process writes, it holds the folder for as long as it lives, and saves the step itself.
        with nullcontext() if self.writes else suppress(StorageError), self.claim:
            if not self.writes:
                self._resume()
            if self.step > self._saved:
                self._save()
            if self.step < n:
                say(f"distilling ended after outer step {self.step} of {n}, which is saved in {self.checkpoint_dir}; to go on, "
                    f"make a Distiller with the same settings and call run({n})", error=True)

    def _one(self, n: int) -> StepRecord:
        """Make a step: all of it, or nothing where an exception ends it."""
        begun, made, step = time.perf_counter(), self._made, self.step + 1
        current = self._current()
        outer = meta_gradient(
            current, self.objective, seed=derive_seed("distil", self.seed, self.step), on_retry=self._use
        )
        grads = {"embeds": outer.embeds, "targets": outer.targets, "step_sizes": outer.step_sizes}
        norm = float(outer.embeds.norm())
        loss, terms = outer.loss, {"outer": outer.loss}
        for term in self.regularizers:
            weight = term.weight_at(self.step / n)
            terms[term.name], gradient = term(current)
            loss += weight * terms[term.name]
            grads["embeds"] = grads["embeds"] + weight * gradient.to(grads["embeds"])
        values, moments = made.values, made.moments
        finite = math.isfinite(loss) and all(g is None or bool(g.isfinite().all()) for g in grads.values())
        if finite:
            values, moments = self._moved(grads, self.schedule(self.step / n))
            finite = all(bool(value.isfinite().all()) for value in values.values())
        if not finite:
            assert current.step_sizes is not None  # a distiller's set always has them
            self._stop_or_skip(
                f"outer step {step}: loss {loss}, gradient norm {norm}, step sizes "
                f"{[round(s, 5) for s in current.step_sizes.tolist()]}; lower lr or the inner step size"
            )
            values, moments, terms = made.values, made.moments, terms | {"skipped": 1.0}
        sizes = tuple(_positive(values["step_sizes"]).tolist())
        start = self._first_step_sizes(self._start)
        if max(sizes) > RUNAWAY * float(start.max()) or max(sizes) * RUNAWAY < float(start.min()):
            raise FloatingPointError(
                f"outer step {step}: the step sizes have run from {[round(s, 5) for s in start.tolist()]} to "
                f"{[float(f'{s:.3g}') for s in sizes]}, where training stands still or diverges: this student cannot follow "
                "what is asked of it; lower step_size_lr, start from the size that search_step_size finds, or take more "
                "inner steps or an optimiser of the expert's kind"
            )
        record = StepRecord(step, loss, terms, norm, sizes, time.perf_counter() - begun)
        if not finite:
            record = _from_json(_as_json(record))  # as it comes back from a checkpoint
        self._made = _Made(values, moments, [*made.records, record])
        return record

    def _use(self, objective) -> None:
        """Go on with ``objective``: the same one in parts that memory has room for."""
        self.objective = objective

    def _moved(self, grads: dict[str, Tensor | None], factor: float) -> tuple[dict, dict]:
        """The values after Adam's step along ``grads``, and its moments then; those there are stay as they are."""
        values, moments = dict(self._made.values), {}
        for name in self.learn:
            value, gradient = values[name], grads[name]
            assert gradient is not None  # only hard targets have none, and they are not learned
            gradient = gradient.to(value.device, value.dtype)
            if name == "embeds":
                gradient = gradient * self._start.free.unsqueeze(-1)
            if name == "step_sizes":  # chain rule through softplus
                gradient = gradient * value.sigmoid()
            state = self._made.moments.get(name) or ADAM.init({name: value})
            moved, moments[name] = ADAM.update({name: value}, {name: gradient}, state, self.rates[name] * factor)
            values |= moved
        return values, moments

    def _stop_or_skip(self, message: str) -> None:
        skipped = 1
        while skipped <= self.step and "skipped" in self.records[-skipped].terms:
            skipped += 1
        if self.nonfinite == "skip" and skipped < PATIENCE:
            warnings.warn(f"skipped: {message}", stacklevel=4)
            return
        raise FloatingPointError(message if self.nonfinite == "stop" else f"{skipped} steps in a row; the last: {message}")

    def _current(self) -> DistilledSet:
        # Not made anew: values were checked when they were made, and a step says itself what is not finite.
        current = copy.copy(self._start)
        current.embeds, current.targets = self._made.values["embeds"], self._made.values["targets"]
        current.step_sizes, current.tokens = self._step_sizes(), None
        return current

    def _first_step_sizes(self, start: DistilledSet) -> Tensor:
        return bound_step_sizes(start, self.objective.unroll, getattr(self.objective, "student", None))

    def _step_sizes(self) -> Tensor:
        return _positive(self._made.values["step_sizes"])

    def _describe(self, distilled: DistilledSet) -> dict:
        settings = {
            "objective": self.objective.recipe(),
            "rates": self.rates,
            "learn": list(self.learn),
            "regularizers": [term.describe() for term in self.regularizers],
            "schedule": getattr(self.schedule, "__name__", repr(self.schedule)),
            "seed": self.seed,
            "start": {
                "examples": len(distilled),
                "length": distilled.embeds.shape[1],
                "task": distilled.meta.get("task"),
                "sha256": digest(distilled),
            },
            "task_fingerprint": distilled.meta.get("task_fingerprint"),
        }
        return json.loads(json.dumps(settings))

    def _take_up(self) -> None:
        """What a run does first in its folder: clear away what killed ones left, and begin the log where the values are."""
        if self.checkpoint_dir is None:
            return
        self._resume()  # another run may have gone on since this object was made
        if not self.writes:
            return
        remove_orphans(self.checkpoint_dir)
        head = {"settings": self._settings, "versions": _versions()}
        lines = [json.dumps(line, ensure_ascii=False) for line in (head, *(_as_json(r) for r in self.records))]
        # Written anew, the log loses a line that a kill cut short, and the steps after the checkpoint, which are made again.
        save_text(self.log_file, "\n".join(lines) + "\n")

    def _log(self, record: StepRecord) -> None:
        if self.checkpoint_dir is None or not self.writes:
            return
        try:
            with self.log_file.open("a", encoding="utf-8") as log:
                log.write(json.dumps(_as_json(record)) + "\n")
        except OSError as error:
            raise unwritten(self.log_file, error) from error

    def _resume(self) -> None:
        """Take up the checkpoint, if it has more steps than have been made here."""
        if self.checkpoint_dir is None or is_vacant(self.checkpoint_dir):
            return
        stored = load_folder(self.checkpoint_dir, kind=KIND)
        try:
            theirs, versions = stored.data["settings"], stored.data.get("versions", _versions())
            records = [_from_json(r) for r in stored.data["records"]]
            values = {name: stored.tensors[f"value.{name}"] for name in self._made.values}
            learned = {name.split(".")[1] for name in stored.tensors if name.startswith("adam.")}
            moments = {name: {"count": int(stored.tensors[f"adam.{name}.count"]),
                              **{key: {name: stored.tensors[f"adam.{name}.{key}"]} for key in ("m", "v")}}
                       for name in LEARNABLE if name in learned}
        except (KeyError, TypeError) as error:
            raise StorageError(f"{self.checkpoint_dir} is no checkpoint of this distillkit: it has no {error}; choose another "
                               "checkpoint_dir") from error
        different = [k for k in self._settings if theirs.get(k) != self._settings[k]]
        if different:
            k = different[0]
            raise ValueError(
                f"{self.checkpoint_dir} holds a run with other settings: {k} is {theirs.get(k)!r} there and "
                f"{self._settings[k]!r} here; resume with the same settings or choose another checkpoint_dir"
            )
        self._saved = len(records)
        if len(records) <= self.step:
            return
        if versions != _versions():
            warnings.warn(f"{self.checkpoint_dir} was made with {versions}, and goes on with {_versions()}: what comes may "
                          "differ by rounding from an uninterrupted run", stacklevel=3)
        self._made = _Made(values, moments, records)

    @property
    def log_file(self) -> Path:
        """Where the log is, a JSON value a line: the settings and versions, then the records."""
        if self.claim is None:
            raise ValueError("this distiller has no checkpoint_dir, beside which a log would be")
        return self.claim.path.with_name(f"{self.claim.path.name}.log.jsonl")


def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in VERSIONED} | {"python": platform.python_version()}


def _as_json(record: StepRecord) -> dict:
    """A record as strict JSON values, which have no NaN."""
    found = dataclasses.asdict(record)
    found["terms"] = {name: _finite(value) for name, value in record.terms.items()}
    return found | {"loss": _finite(record.loss), "grad_norm": _finite(record.grad_norm)}


def _from_json(found: dict) -> StepRecord:
    def number(value):
        return math.nan if value is None else value

    terms = {name: number(value) for name, value in found["terms"].items()}
    again = {"loss": number(found["loss"]), "grad_norm": number(found["grad_norm"]), "terms": terms}
    values: dict[str, Any] = {**found, **again, "step_sizes": tuple(found["step_sizes"])}
    return StepRecord(**values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def digest(distilled: DistilledSet) -> str:
    """SHA-256 of a set's tensors."""
    found = hashlib.sha256()
    for field in dataclasses.fields(distilled):
        value = getattr(distilled, field.name)
        if isinstance(value, Tensor):
            found.update(f"{field.name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _positive(raw: Tensor) -> Tensor:
    """softplus(``raw``), which far below 0 would round to 0."""
    return torch.nn.functional.softplus(raw).clamp_min(torch.finfo(raw.dtype).tiny)


def _inverse_softplus(positive: Tensor) -> Tensor:
    """raw such that softplus(raw) = ``positive``."""
    return positive.detach().clone() + torch.log(-torch.expm1(-positive.detach()))
