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

from collections.abc import Mapping, Sequence
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
from distillkit.core.loading import load_student
from distillkit.core.optimizers import AdamW
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.selection import select
from distillkit.experiments.results import as_json, markdown, means, spread
from distillkit.experiments.runner import Run, load_corpus, unroll_of
from distillkit.experiments.settings import (
    REQUIRED,
    Data,
    Experiment,
    Inner,
    Outer,
    Scoring,
    SetSeeds,
    Size,
    filled,
    option,
    positive,
    settings,
    whole,
)

REAL = ("random", "k_center")
MEMORIES = ("none", "distilled", *REAL, "bytes")
ROWS = (
    *(f"{m}/{r}" for m in ("merged", "joint", *REAL) for r in ("own", "tuned")), "alone/own",
    *(f"{m}/stream" for m in MEMORIES), "before/update", "after/update",
)


@settings(kind="continual", rows=ROWS, trainable="full")
class ContinualJob(Experiment, Data, Size, Inner, Outer, SetSeeds, Scoring):
    """Settings of one experiment.

    The stream clips gradients: a student that is sure of the last task finds the next one very wrong, and AdamW would take
    small steps for long after such gradients.
    """

    groups: tuple = option(REQUIRED, "the tasks: lists of two or more classes each, three tasks or more for an update")
    stream_steps: int = whole(30, "steps of each task of the stream")
    stream_batch: int = whole(16, "examples of a task in a step of the stream")
    memory_batch: int = whole(8, "remembered examples in a step of the stream")
    stream_step_sizes: tuple[float, ...] = filled((3e-4, 1e-3), "step sizes of the stream; validation chooses")
    stream_clip: float = positive(1.0, "largest norm of a gradient in the stream")
    weights: tuple[float, ...] = filled((0.3, 0.6), "weights of replay; validation chooses one")

    def __post_init__(self):
        super().__post_init__()
        if len(self.groups) < 2 or any(isinstance(g, str) or len(g) < 2 for g in self.groups):
            raise ValueError(f"groups must be two or more lists of two or more classes, not {self.groups!r}")
        if any(row.endswith("/update") for row in self.rows) and (
            len(self.groups) < 3 or len(self.groups[1]) != len(self.groups[-1])
        ):
            raise ValueError("the rows of an update need three groups, the second as large as the last")


class ContinualRun(Run):
    """Such an experiment under way; see :class:`~distillkit.experiments.runner.Run`."""

    job: ContinualJob

    def __init__(self, job: ContinualJob, folder: str | Path, work: str | Path):
        corpus, self.job = load_corpus(job), job
        self.tasks = [with_classes(corpus, group) for group in job.groups]
        whole_task = united(*self.tasks)
        super().__init__(job, folder, work, whole_task, self._student(whole_task))
        self._students = [self._student(task) for task in self.tasks]

    def _student(self, task: Task) -> Student:
        return load_student(self.job.student, task, trainable=self.job.trainable)

    def score(self, method: str, recipe: str, seed: int) -> dict:
        if recipe == "stream":
            return self._streamed(method, seed)
        if recipe == "update":
            return self._updated(method, seed)
        if method == "alone":
            pairs = zip(self._apart("embeddings", seed), self.tasks, self._students, strict=True)
            alone = {task.name: self._evaluated(s, task, student, "own")["mean"] for s, task, student in pairs}
            return {"method": method, "mean": float(np.mean([*alone.values()])), "groups": alone}
        return {"method": method, **self._evaluated(self.set_of(method, seed), self.task, self.student, recipe)}

    def _evaluated(self, set_: DistilledSet, task: Task, student: Student, recipe: str) -> dict:
        tried = None
        if recipe == "own":
            set_ = set_ if "recipe" in set_.meta else with_recipe(set_, unroll_of(self.job), student)
            set_, tried = rescaled(set_, task, student)
        score = as_json(evaluate(set_, task, student, seeds=self.job.eval_seeds, recipe=recipe))
        return score if tried is None else {**score, "factors": {str(k): round(v, 6) for k, v in tried.items()}}

    def _streamed(self, method: str, seed: int) -> dict:
        job = self.job
        memories = {"none": lambda: None, "distilled": lambda: self._apart("embeddings", seed),
                    "bytes": lambda: [rows_of_bytes(task, s.nbytes, seed)
                                      for task, s in zip(self.tasks, self._apart("embeddings", seed), strict=True)]}
        memory = memories[method]() if method in memories else self._apart(method, seed)
        stream = continual(
            self.tasks, self.student, memory, steps=job.stream_steps, batch_size=job.stream_batch,
            memory_batch=job.memory_batch, optimizer=AdamW(job.stream_step_sizes[0], clip_norm=job.stream_clip),
            step_sizes=job.stream_step_sizes, weights=job.weights, seeds=job.eval_seeds,
        )
        return {
            "method": method,
            "mean": float(stream.average.mean()),
            "forgetting": float(stream.forgetting.mean()),
            "backward_transfer": float(stream.backward_transfer.mean()),
            "accuracy": stream.accuracy.mean(0).round(4).tolist(),
            "examples": 0 if memory is None else sum(len(m) for m in memory[:-1]),
            "nbytes": 0 if memory is None else sum(map(self._nbytes, self.tasks, memory[:-1])),
            "settings": stream.settings,
        }

    @staticmethod
    def _nbytes(task: Task, memory: DistilledSet | Sequence[int]) -> int:
        if isinstance(memory, DistilledSet):
            return memory.nbytes
        return sum(len(text.encode()) for text in task.train[memory]["text"])

    def _updated(self, method: str, seed: int) -> dict:
        first, second, last = self.job.groups[0], self.job.groups[1], self.job.groups[-1]
        sets = self._apart("embeddings", seed)
        now = dict(zip(last, second, strict=True))
        merged = merge(sets[0], sets[1])
        if method == "after":
            merged = replaced(merged, sets[1].meta["task"], renamed(sets[-1], now))
        world = united(self.tasks[0], with_classes(self.tasks[-1], now))
        row = self._evaluated(merged, world, self._student(world), "own")
        share = {name: float(np.mean([row["groups"][c] for c in group])) for name, group in (("rest", first), ("new", second))}
        return {"method": method, **row, **share}

    def create(self, method: str, seed: int) -> DistilledSet:
        if method == "merged":
            return merge(*self._apart("embeddings", seed))
        return self._learned(method, self.task, self.student, seed)

    def _apart(self, method: str, seed: int) -> list[DistilledSet]:
        """A set of each task alone: distilled, or selected."""
        pairs = [*zip(self.tasks, self._students, strict=True)]
        if method in REAL:
            return [select(task, student, method, **self.job.size(seed)) for task, student in pairs]
        return [self.saved(f"task{k}", seed, lambda k=k, pair=pair: self._learned(f"task{k}", *pair, seed))
                for k, pair in enumerate(pairs)]

    def _learned(self, name: str, task: Task, student: Student, seed: int) -> DistilledSet:
        start = DistilledSet.from_real(task, student, **self.job.size(seed))
        return self.distil(name, seed, start, self.objective(task, student))


def continual_table(result: Mapping) -> str:
    """The result as Markdown tables: merging, the stream, and the update."""
    rows, names = result["rows"], result["config"]["rows"]

    def cell(name: str, key: str) -> str:
        return spread(means(rows, name, key)) or ("not run" if name in names else "")

    merging, stream, update = [], [], []
    for method in dict.fromkeys(n.split("/")[0] for n in names if n.endswith(("/own", "/tuned"))):
        both = [f"{method}/own", f"{method}/tuned"]
        merging.append([method, *(cell(name, "mean") for name in both), str(max(len(rows.get(name, {})) for name in both))])
    for name in (n for n in names if n.endswith("/stream")):
        size = [f"{means(rows, name, key)[0]:,}" if rows.get(name) else "" for key in ("examples", "nbytes")]
        stream.append([name.split("/")[0], *size, cell(name, "mean"), cell(name, "forgetting"), str(len(rows.get(name, {})))])
    for name in (n for n in names if n.endswith("/update")):
        update.append([f"{name.split('/')[0]} the update", cell(name, "new"), cell(name, "rest"), str(len(rows.get(name, {})))])
    tables = [
        (["trained on", "own, rescaled", "AdamW, tuned", "sets"], merging),
        (["memory", "examples", "bytes", "average accuracy", "forgetting", "sets"], stream),
        (["set", "the new", "the rest", "sets"], update),
    ]
    return "\n\n".join("\n".join(markdown(heads, lines)) for heads, lines in tables if lines)
