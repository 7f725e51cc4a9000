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
from distillkit.evaluation.selection import select
from distillkit.experiments.building import load_corpus, unroll_of
from distillkit.experiments.results import by_row, by_set, markdown, number, of_the_corpus, rounded, spread
from distillkit.experiments.runner import Cell, Scores
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


class ContinualCell(Cell):
    """An experiment on merging, streams and updates."""

    def __init__(self, job: ContinualJob, work: Path, results: Path):
        self.job, corpus = job, load_corpus(job)
        self.tasks = [with_classes(corpus, group) for group in job.groups]
        whole_task = united(*self.tasks)
        super().__init__(job, work, results, whole_task, self._student(whole_task))
        self._students = [self._student(task) for task in self.tasks]

    def _student(self, task: Task) -> Student:
        return load_student(self.job.student, task, trainable=self.job.trainable)

    def score(self, method: str, recipe: str, seed: int) -> Scores:
        if recipe == "stream":
            return self._streamed(method, seed)
        if recipe == "update":
            return self._updated(method, seed)
        if method != "alone":
            return self._trained(self.set_of(method, seed), self.task, self.student, recipe)
        scores, notes = [], {}
        for distilled, task, student in zip(self._apart("embeddings", seed), self.tasks, self._students, strict=True):
            rows, notes[task.name] = self._trained(distilled, task, student, "own")
            scores += [row | {"task": task.name} for row in rows]
        return scores, notes

    def _trained(self, distilled: DistilledSet, task: Task, student: Student, recipe: str) -> Scores:
        if recipe != "own":
            return self.evaluated(distilled, recipe, task=task, student=student)
        if "recipe" not in distilled.meta:
            distilled = with_recipe(distilled, unroll_of(self.job), student)
        distilled, tried = rescaled(distilled, task, student)
        rows, note = self.evaluated(distilled, recipe, task=task, student=student)
        return rows, note | {"factors": {str(factor): rounded(score) for factor, score in tried.items()}}

    def _streamed(self, method: str, seed: int) -> Scores:
        job, memory = self.job, self._memory(method, seed)
        stream = continual(
            self.tasks, self.student, memory, steps=job.stream_steps, batch_size=job.stream_batch,
            memory_batch=job.memory_batch, optimizer=AdamW(job.stream_step_sizes[0], clip_norm=job.stream_clip),
            step_sizes=job.stream_step_sizes, weights=job.weights, seeds=job.eval_seeds,
        )
        remembered = [] if memory is None else memory[:-1]
        size = {"examples": sum(map(len, remembered)), "nbytes": sum(map(_nbytes, self.tasks, remembered))}
        values = zip(job.eval_seeds, stream.average, stream.forgetting, strict=True)
        rows = [{"init_seed": init, "accuracy": rounded(average), "forgetting": rounded(forgetting), **size}
                for init, average, forgetting in values]
        return rows, {"accuracy": stream.accuracy.mean(0).round(4).tolist(), "settings": stream.settings}

    def _memory(self, method: str, seed: int) -> Sequence[DistilledSet | Sequence[int]] | None:
        if method == "none":
            return None
        sets = self._apart(method if method in REAL else "embeddings", seed)
        if method == "bytes":
            return [rows_of_bytes(task, distilled.nbytes, seed) for task, distilled in zip(self.tasks, sets, strict=True)]
        return sets

    def _updated(self, method: str, seed: int) -> Scores:
        first, second, last = self.job.groups[0], self.job.groups[1], self.job.groups[-1]
        sets = self._apart("embeddings", seed)
        now = dict(zip(last, second, strict=True))
        merged = merge(sets[0], sets[1])
        if method == "after":
            merged = replaced(merged, sets[1].meta["task"], renamed(sets[-1], now))
        world = united(self.tasks[0], with_classes(self.tasks[-1], now))
        rows, note = self._trained(merged, world, self._student(world), "own")
        # Means over the initialisations, as accuracies by class are.
        share = {name: float(np.mean([note["groups"][c] for c in group])) for name, group in (("rest", first), ("new", second))}
        return [row | share for row in rows], note

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
        return self.distil(name, seed, self.start(seed, task, student), self.objective(task, student))


def _nbytes(task: Task, memory: DistilledSet | Sequence[int]) -> int:
    if isinstance(memory, DistilledSet):
        return memory.nbytes
    return sum(len(text.encode()) for text in task.train[memory]["text"])


def continual_table(result: Mapping) -> str:
    """The result as Markdown tables: merging, the stream, and the update."""
    values = {value: by_set(result, value) for value in ("accuracy", "forgetting", "new", "rest")}
    names, sizes, cell = [*values["accuracy"].index], by_row(result), next(iter(result["cells"].values()), {})

    def score(name: str, value: str = "accuracy") -> str:
        return (spread(values[value].loc[name]) or "not run") if name in names else ""

    def sets(*rows: str) -> str:
        return str(max(values["accuracy"].reindex([*rows]).count(axis=1)))

    methods = dict.fromkeys(name.split("/")[0] for name in names if name.endswith(("/own", "/tuned")))
    merging = [[method, score(f"{method}/own"), score(f"{method}/tuned"), sets(f"{method}/own", f"{method}/tuned")]
               for method in methods]
    stream = [[name.split("/")[0], number(sizes["examples"][name], ",.0f") or "", number(sizes["nbytes"][name], ",.0f") or "",
               of_the_corpus(sizes["nbytes"][name], cell), score(name), score(name, "forgetting"), sets(name)]
              for name in names if name.endswith("/stream")]
    update = [[f"{name.split('/')[0]} the update", score(name, "new"), score(name, "rest"), sets(name)]
              for name in names if name.endswith("/update")]
    tables = {
        ("trained on", "own, rescaled", "AdamW, tuned", "sets"): merging,
        ("memory", "examples", "bytes", "of the compressed corpus", "average accuracy", "forgetting", "sets"): stream,
        ("set", "the new", "the rest", "sets"): update,
    }
    return "\n\n".join(markdown(heads, lines) for heads, lines in tables.items() if lines)
