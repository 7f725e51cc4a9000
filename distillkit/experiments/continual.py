"""Sets distilled apart and put together, measured: merging, replay in a stream of tasks, an update of what is known.

A corpus is cut into groups of classes, each of which is a task; a set is distilled for each alone.  One *seed* of this
experiment is another random start and another distillation of every set.

* ``merged``: the sets merged, one student trained on the whole.  ``joint``: one set of as many examples distilled for all
  classes together, with as many outer steps as each of the others had, which comes to the same compute.  ``random``,
  ``k_center``: as many real sentences.  ``alone``: each set on its own task, chance being higher there.  Under the recipe
  ``own`` each takes the same number of SGD steps, and a factor on its step sizes is chosen on the validation split; real
  sentences start from the size that distilling starts from.  ``tuned`` is the AdamW grid that every set can have.
* ``stream``: the tasks one after the other, with a memory of those that are over: ``none``, ``distilled``, as many real
  examples (``random``, ``k_center``), or real rows of as many ``bytes``.  Where there are several step sizes or weights of
  replay, they are chosen on the validation split, from the same grid for all.
* ``update``: the classes of the second group change what they mean, to what the last group was.  ``before`` is the first
  two sets merged, ``after`` has the second one replaced.  Both are scored on the world as it is after the change.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distillkit.applications.merging import (
    continual,
    merge,
    renamed,
    replaced,
    rescaled,
    rows_of_bytes,
    united,
    with_classes,
    with_recipe,
)
from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller
from distillkit.core.inner import SGD, AdamW, Unroll
from distillkit.core.objectives import BPTT
from distillkit.core.students import Student, load_student
from distillkit.data.load import load_task
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.selection import select
from distillkit.experiments.classification import STRATEGIES
from distillkit.experiments.results import SeededRun, Settings, as_json
from distillkit.io.checks import check_choice, check_whole
from distillkit.io.storage import is_vacant

REAL = ("random", "k_center")
MEMORIES = ("none", "distilled", *REAL, "bytes")
ROWS = (
    *(f"{m}/{r}" for m in ("merged", "joint", *REAL) for r in ("own", "tuned")), "alone/own",
    *(f"{m}/stream" for m in MEMORIES), "before/update", "after/update",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinualJob(Settings):
    """Settings of one experiment.

    Args:
        name: of the result file.
        corpus, limit, max_length, student, trainable: as ``load_task`` and ``load_student`` take them.
        groups: the tasks: lists of two or more classes each, three tasks or more for an update.
        per_class, length: size of every set: examples of a class, tokens an example.
        seeds: one set of everything each.
        eval_seeds: fresh initialisations that each set is scored on.
        unroll_steps, step_size, metagrad, outer_steps, outer_batch, lr: of every distillation, as for
            :class:`~distillkit.experiments.classification.ClassificationJob`.
        stream_steps, stream_batch, memory_batch: as :func:`~distillkit.applications.merging.continual` takes them.
        stream_step_sizes, weights: its grid.
        stream_clip: largest norm of a gradient there.  A student that is sure of the last task finds the next one very wrong,
            and AdamW would take small steps for long after such gradients.
        rows: which rows, as ``method/recipe``.
    """

    name: str
    corpus: str
    student: str
    groups: tuple
    trainable: str = "full"
    limit: int | None = None
    max_length: int = 32
    per_class: int = 1
    length: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    eval_seeds: tuple[int, ...] = (0, 1, 2)
    unroll_steps: int = 3
    step_size: float = 0.2
    metagrad: str = "replay"
    outer_steps: int = 100
    outer_batch: int = 48
    lr: float = 0.08
    stream_steps: int = 30
    stream_batch: int = 16
    memory_batch: int = 8
    stream_step_sizes: tuple[float, ...] = (3e-4, 1e-3)
    stream_clip: float = 1.0
    weights: tuple[float, ...] = (0.3, 0.6)
    rows: tuple[str, ...] = ROWS
    kind: str = "continual"

    def __post_init__(self):
        self.check_name()
        check_choice("kind", self.kind, ("continual",))
        check_choice("metagrad", self.metagrad, STRATEGIES)
        for row in self.rows:
            check_choice("a row", row, ROWS)
        for key in ("max_length", "per_class", "length", "unroll_steps", "outer_steps", "outer_batch", "stream_steps",
                    "stream_batch", "memory_batch"):
            check_whole(key, getattr(self, key))
        self.check_positive("step_size", "lr", "stream_clip")
        if len(self.groups) < 2 or any(isinstance(g, str) or len(g) < 2 for g in self.groups):
            raise ValueError(f"groups must be two or more lists of two or more classes, not {self.groups!r}")
        if any(row.endswith("/update") for row in self.rows) and (
            len(self.groups) < 3 or len(self.groups[1]) != len(self.groups[-1])
        ):
            raise ValueError("the rows of an update need three groups, the second as large as the last")
        for key in ("seeds", "eval_seeds", "stream_step_sizes", "weights"):
            if not getattr(self, key):
                raise ValueError(f"{key} must not be empty")


class ContinualRun(SeededRun):
    """Such an experiment under way; see :class:`~distillkit.experiments.results.SeededRun`."""

    def __init__(self, job: ContinualJob, folder: str | Path, work: str | Path):
        corpus, self.job = load_task(job.corpus, max_length=job.max_length, limit=job.limit), job
        self.tasks = [with_classes(corpus, group) for group in job.groups]
        whole = united(*self.tasks)
        super().__init__(job, folder, work, whole, self._student(whole))
        self._students = [self._student(task) for task in self.tasks]

    def _student(self, task: Task) -> Student:
        return load_student(self.job.student, task, trainable=self.job.trainable)

    def _scored(self, method: str, recipe: str, seed: int) -> dict:
        if recipe == "stream":
            return self._streamed(method, seed)
        if recipe == "update":
            return self._updated(method, seed)
        if method == "alone":
            pairs = zip(self._apart("embeddings", seed), self.tasks, self._students, strict=True)
            found = [self._evaluated(s, task, student, "own") for s, task, student in pairs]
            return {"method": method, "mean": float(np.mean([f["mean"] for f in found])),
                    "groups": {task.name: f["mean"] for task, f in zip(self.tasks, found, strict=True)}}
        return {"method": method, **self._evaluated(self.set_of(method, seed), self.task, self.student, recipe)}

    def _evaluated(self, set_: DistilledSet, task: Task, student: Student, recipe: str) -> dict:
        tried = None
        if recipe == "own":
            set_ = set_ if "recipe" in set_.meta else with_recipe(set_, self._unroll(), student)
            set_, tried = rescaled(set_, task, student)
        found = as_json(evaluate(set_, task, student, seeds=self.job.eval_seeds, recipe=recipe))
        return found if tried is None else {**found, "factors": {str(k): round(v, 6) for k, v in tried.items()}}

    def _streamed(self, method: str, seed: int) -> dict:
        job = self.job
        kept = {"none": lambda: None, "distilled": lambda: self._apart("embeddings", seed),
                "bytes": lambda: [rows_of_bytes(task, s.nbytes, seed)
                                  for task, s in zip(self.tasks, self._apart("embeddings", seed), strict=True)]}
        memory = kept[method]() if method in kept else self._apart(method, seed)
        found = continual(
            self.tasks, self.student, memory, steps=job.stream_steps, batch_size=job.stream_batch,
            memory_batch=job.memory_batch, optimizer=AdamW(job.stream_step_sizes[0], clip_norm=job.stream_clip),
            step_sizes=job.stream_step_sizes, weights=job.weights, seeds=job.eval_seeds,
        )
        return {
            "method": method,
            "mean": float(found.average.mean()),
            "forgetting": float(found.forgetting.mean()),
            "backward_transfer": float(found.backward_transfer.mean()),
            "accuracy": found.accuracy.mean(0).round(4).tolist(),
            "examples": 0 if memory is None else sum(len(m) for m in memory[:-1]),
            "nbytes": 0 if memory is None else sum(map(self._nbytes, self.tasks, memory[:-1])),
            "settings": found.settings,
        }

    @staticmethod
    def _nbytes(task: Task, kept: DistilledSet | Sequence[int]) -> int:
        if isinstance(kept, DistilledSet):
            return kept.nbytes
        return sum(len(text.encode()) for text in task.train[kept]["text"])

    def _updated(self, method: str, seed: int) -> dict:
        first, second, last = self.job.groups[0], self.job.groups[1], self.job.groups[-1]
        sets = self._apart("embeddings", seed)
        now = dict(zip(last, second, strict=True))
        found = merge(sets[0], sets[1])
        if method == "after":
            found = replaced(found, sets[1].meta["task"], renamed(sets[-1], now))
        world = united(self.tasks[0], with_classes(self.tasks[-1], now))
        row = self._evaluated(found, world, self._student(world), "own")
        share = {name: float(np.mean([row["groups"][c] for c in group])) for name, group in (("rest", first), ("new", second))}
        return {"method": method, **row, **share}

    def _make(self, method: str, seed: int) -> DistilledSet:
        if method == "merged":
            return merge(*self._apart("embeddings", seed))
        if method in REAL:
            return select(self.task, self.student, method, **self._size(seed))
        return self._distilled("joint", self.task, self.student, seed)

    def _apart(self, method: str, seed: int) -> list[DistilledSet]:
        """A set of each task alone: distilled, or selected."""
        pairs = enumerate(zip(self.tasks, self._students, strict=True))
        if method in REAL:
            return [select(task, student, method, **self._size(seed)) for _, (task, student) in pairs]
        return [self._distilled(f"task{k}", task, student, seed) for k, (task, student) in pairs]

    def _distilled(self, name: str, task: Task, student: Student, seed: int) -> DistilledSet:
        job, folder = self.job, self.work / f"{name}-{seed}"
        if is_vacant(folder):
            distiller = Distiller(
                DistilledSet.from_real(task, student, **self._size(seed)),
                BPTT(task, student, self._unroll(), metagrad=STRATEGIES[job.metagrad], batch_size=job.outer_batch), lr=job.lr,
                seed=seed,
                checkpoint_dir=self.work / f"checkpoint-{name}-{seed}",
            )
            for _ in distiller.run(job.outer_steps):
                pass
            distiller.distilled.save(folder)
            self.result["distilling"][f"{name} {seed}"] = {
                "steps": job.outer_steps, "seconds": round(sum(r.seconds for r in distiller.records), 1),
                "losses": [round(r.loss, 4) for r in distiller.records],
            }
        return DistilledSet.load(folder)

    def _unroll(self) -> Unroll:
        return Unroll(self.job.unroll_steps, optimizer=SGD(self.job.step_size))

    def _size(self, seed: int) -> dict:
        return {"per_class": self.job.per_class, "length": self.job.length, "seed": seed}


def continual_table(result: dict) -> str:
    """The result as Markdown tables: merging, the stream, and the update."""
    rows, names = result["rows"], result["config"]["rows"]
    merging = ["| trained on | own, rescaled | AdamW, tuned | sets |", "|---|---:|---:|---:|"]
    for method in dict.fromkeys(n.split("/")[0] for n in names if n.endswith(("/own", "/tuned"))):
        cells = [_spread(rows, names, f"{method}/{recipe}", "mean") for recipe in ("own", "tuned")]
        merging.append(f"| {method} | {' | '.join(cells)} | {_count(rows, method, ('own', 'tuned'))} |")
    stream = ["| memory | examples | bytes | average accuracy | forgetting | sets |", "|---|---:|---:|---:|---:|---:|"]
    for name in (n for n in names if n.endswith("/stream")):
        made = [*rows.get(name, {}).values()]
        size = f"{made[0]['examples']:,} | {made[0]['nbytes']:,}" if made else " | "
        cells = [_spread(rows, names, name, key) for key in ("mean", "forgetting")]
        stream.append(f"| {name.split('/')[0]} | {size} | {' | '.join(cells)} | {len(made)} |")
    update = ["| set | the new | the rest | sets |", "|---|---:|---:|---:|"]
    for name in (n for n in names if n.endswith("/update")):
        cells = [_spread(rows, names, name, key) for key in ("new", "rest")]
        update.append(f"| {name.split('/')[0]} the update | {' | '.join(cells)} | {len(rows.get(name, {}))} |")
    tables = [table for table in (merging, stream, update) if len(table) > 2]
    return "\n".join(itertools.chain.from_iterable([*table, ""] for table in tables)).rstrip("\n")


def _spread(rows: dict, names: Sequence[str], name: str, key: str) -> str:
    """Mean and spread of a number over seeds."""
    values = [row[key] for row in rows.get(name, {}).values()]
    if not values:
        return "not run" if name in names else ""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def _count(rows: dict, method: str, recipes: Sequence[str]) -> int:
    return max(len(rows.get(f"{method}/{recipe}", {})) for recipe in recipes)
