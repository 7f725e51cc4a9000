"""The outer loop: gradient descent on the distilled set itself.

Each outer step asks the objective for a meta-gradient at a fresh student initialisation and a fresh real batch, and
Adam moves three things along it: the embeddings at the free positions, the soft labels, and the step sizes of the inner
loop.  Step sizes are owned here as softplus(raw), so that they cannot become negative, which is how several published
distillation codes run into NaN.

The loop is an iterator of records, so that a notebook can plot while it runs, a script can stop it, and a checkpoint
folder can take it up again at the step where it ended.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distillkit.checks import check_whole
from distillkit.distilled import DistilledSet
from distillkit.objectives import bound_step_sizes, meta_gradient
from distillkit.progress import progress
from distillkit.seeds import derive_seed
from distillkit.storage import is_vacant, load_folder, save_folder

LEARNABLE = ("embeds", "targets", "step_sizes")
KIND = "distiller-checkpoint"
RUNAWAY = 1e4  # factor between a step size and the one it started from that no useful one has
BETAS = (0.9, 0.99)


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


def cosine(progress: float) -> float:
    """Decay from 1 to 0.02 along half a cosine; ``progress`` in 0..1."""
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def constant(progress: float) -> float:
    """No decay."""
    return 1.0


class Distiller:
    """Learns a distilled set.

    Args:
        distilled: where to start; it is copied, not changed.
        objective: what to learn it by.
        lr: outer learning rate of the embeddings (Adam).
        label_lr: of the label logits; default: 5 × ``lr``.
        step_size_lr: of the raw step sizes; default: 2 × ``lr``.
        learn: which of ``"embeds"``, ``"targets"``, ``"step_sizes"`` to learn.  Hard targets cannot be, and the default
            leaves them out.
        schedule: factor on all learning rates as a function of progress in 0..1 towards the ``n`` of ``run(n)``; so with
            the default decay ``run(100)`` and then ``run(200)`` is not one run of 200 steps.
        regularizers: terms added to the loss that look at the set alone, such as
            :class:`~distillkit.neighbors.NeighborLoss`.
        seed: draws initialisations and batches.
        checkpoint_dir: folder to save to, and to resume from where it holds a run; the same settings are demanded.
        checkpoint_every: outer steps between checkpoints.

    Raises:
        ValueError: settings that cannot be, or a checkpoint made with other settings, naming which.
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
    ):
        if learn is LEARNABLE and not distilled.soft:
            learn = tuple(n for n in LEARNABLE if n != "targets")
        unknown = set(learn) - set(LEARNABLE)
        if unknown or not learn:
            raise ValueError(f"learn must name some of {', '.join(LEARNABLE)}, not {tuple(learn)!r}")
        if "targets" in learn and not distilled.soft:
            raise ValueError("hard targets cannot be learned: use set.soften(), or leave 'targets' out of learn")
        self.rates = {"embeds": lr, "targets": 5 * lr if label_lr is None else label_lr}
        self.rates["step_sizes"] = 2 * lr if step_size_lr is None else step_size_lr
        for name, rate in self.rates.items():
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"the learning rate of {name} must be a finite number of 0 or more, not {rate!r}")
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, not {checkpoint_every!r}")
        self.objective, self.schedule, self.seed = objective, schedule, seed
        self.regularizers = tuple(regularizers)
        self.learn = tuple(n for n in LEARNABLE if n in learn)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.checkpoint_every = checkpoint_every
        self.records: list[StepRecord] = []
        self._start = copy.deepcopy(distilled)
        self._settings = self._describe(distilled)
        self._values = {
            "embeds": distilled.embeds.clone(),
            "targets": distilled.targets.clone(),
            "step_sizes": _inverse_softplus(bound_step_sizes(distilled, objective.unroll)),
        }
        self._adam = torch.optim.Adam(
            [{"params": [self._values[n]], "name": n} for n in self.learn], betas=BETAS, lr=lr
        )
        if self.checkpoint_dir is not None and not is_vacant(self.checkpoint_dir):
            self._resume()

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
                embeds=self._values["embeds"].detach(),
                mask=self._start.mask,
                free=self._start.free,
                targets=self._values["targets"].detach(),
                step_sizes=self._step_sizes(),
                tokens=None if moved else self._start.tokens,
                meta=meta,
            )
        )

    def run(self, n: int) -> Iterator[StepRecord]:
        """Make outer steps until ``n`` in all have been made, yielding a record of each.

        Raises:
            FloatingPointError: the loss or a gradient is not finite, or the step sizes have run to zero or to infinity;
                the checkpoint keeps the last good values.
        """
        check_whole("n", n, least=0)
        with progress(total=n, initial=self.step, desc="distilling", unit="step") as bar:
            while self.step < n:
                record = self._one(n)
                self.records.append(record)
                if self.checkpoint_dir is not None and (self.step % self.checkpoint_every == 0 or self.step == n):
                    self.save()
                bar.update()
                bar.set_postfix(loss=f"{record.loss:.3f}")
                yield record

    def save(self) -> None:
        """Write a checkpoint of the whole run to ``checkpoint_dir``."""
        if self.checkpoint_dir is None:
            raise ValueError("this distiller has no checkpoint_dir to save to")
        tensors = {f"value.{n}": v.detach() for n, v in self._values.items()}
        for name, value in ((n, self._values[n]) for n in self.learn):
            tensors |= {f"adam.{name}.{k}": v for k, v in self._adam.state.get(value, {}).items()}
        data = {"settings": self._settings, "records": [dataclasses.asdict(r) for r in self.records]}
        save_folder(self.checkpoint_dir, kind=KIND, tensors=tensors, data=data)

    def _one(self, n: int) -> StepRecord:
        begun = time.perf_counter()
        current = self._current()
        found = meta_gradient(current, self.objective, seed=derive_seed("distil", self.seed, self.step))
        grads = {"embeds": found.embeds, "targets": found.targets, "step_sizes": found.step_sizes}
        norm = float(found.embeds.norm())
        loss, terms = found.loss, {"outer": found.loss}
        for term in self.regularizers:
            weight = term.weight_at(self.step / n)
            terms[term.name], gradient = term(current)
            loss += weight * terms[term.name]
            grads["embeds"] = grads["embeds"] + weight * gradient.to(grads["embeds"])
        finite = all(g is None or bool(g.isfinite().all()) for g in grads.values())
        if not (finite and math.isfinite(loss)):
            raise FloatingPointError(
                f"outer step {self.step + 1}: loss {loss}, gradient norm {norm}, step sizes "
                f"{[round(s, 5) for s in current.step_sizes.tolist()]}; lower lr or the inner step size"
            )
        factor = self.schedule(self.step / n)
        for group in self._adam.param_groups:
            name = group["name"]
            group["lr"] = self.rates[name] * factor
            value = self._values[name]
            value.grad = grads[name].to(value.device, value.dtype)
            if name == "embeds":
                value.grad = value.grad * self._start.free.unsqueeze(-1)
            if name == "step_sizes":  # chain rule through softplus
                value.grad = value.grad * value.sigmoid()
        self._adam.step()
        sizes = tuple(self._step_sizes().tolist())
        start = bound_step_sizes(self._start, self.objective.unroll)
        if max(sizes) > RUNAWAY * float(start.max()) or max(sizes) * RUNAWAY < float(start.min()):
            raise FloatingPointError(
                f"outer step {self.step + 1}: the step sizes have run from {[round(s, 5) for s in start.tolist()]} to "
                f"{[float(f'{s:.3g}') for s in sizes]}, where training stands still or diverges: this student cannot follow "
                "what is asked of it; lower step_size_lr, start from the size that search_step_size finds, or take more "
                "inner steps or an optimiser of the expert's kind"
            )
        return StepRecord(
            self.step + 1, loss, terms, norm, sizes, time.perf_counter() - begun
        )

    def _current(self) -> DistilledSet:
        return dataclasses.replace(
            self._start,
            embeds=self._values["embeds"],
            targets=self._values["targets"],
            step_sizes=self._step_sizes(),
            tokens=None,
        )

    def _step_sizes(self) -> Tensor:
        raw = self._values["step_sizes"]
        return torch.nn.functional.softplus(raw).clamp_min(torch.finfo(raw.dtype).tiny)  # far below 0 it rounds to 0

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
                "task": distilled.meta["task"],
                "sha256": digest(distilled),
            },
            "task_fingerprint": distilled.meta["task_fingerprint"],
        }
        return json.loads(json.dumps(settings))

    def _resume(self) -> None:
        stored = load_folder(self.checkpoint_dir, kind=KIND)
        theirs = stored.data["settings"]
        different = [k for k in self._settings if theirs.get(k) != self._settings[k]]
        if different:
            k = different[0]
            raise ValueError(
                f"{self.checkpoint_dir} holds a run with other settings: {k} is {theirs.get(k)!r} there and "
                f"{self._settings[k]!r} here; resume with the same settings or choose another checkpoint_dir"
            )
        for name, value in self._values.items():
            value.copy_(stored.tensors[f"value.{name}"])
        for name in self.learn:
            prefix = f"adam.{name}."
            found = {k.removeprefix(prefix): v for k, v in stored.tensors.items() if k.startswith(prefix)}
            if found:
                self._adam.state[self._values[name]] = found
        self.records = [StepRecord(**{**r, "step_sizes": tuple(r["step_sizes"])}) for r in stored.data["records"]]


def digest(distilled: DistilledSet) -> str:
    """SHA-256 of a set's tensors."""
    found = hashlib.sha256()
    for field in dataclasses.fields(distilled):
        value = getattr(distilled, field.name)
        if isinstance(value, Tensor):
            found.update(f"{field.name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _inverse_softplus(positive: Tensor) -> Tensor:
    """raw such that softplus(raw) = ``positive``."""
    return positive.detach().clone() + torch.log(-torch.expm1(-positive.detach()))
