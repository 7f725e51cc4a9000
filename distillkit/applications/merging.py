"""Sets that were distilled apart, put together: merging, memory for a stream of tasks, and bringing knowledge up to date.

A distilled set stands for a corpus, so what one does with corpora can be asked of sets: join two, keep one when its
corpus is gone, exchange one for another.  None of it is given.  A set was learned to be trained on *alone*, by its own
few steps, for its own classes.

What joining does (:func:`merge`):

* *Classes* are told by their names: sets of the same classes share them, others are put side by side (:func:`united` does
  the same with tasks).
* *Label vectors* are extended in log space.  To an example of one task the classes of another are wrong answers, so they
  get no probability: a logit 30 below the example's own mass (``foreign`` gives them a share instead).  Among its own
  classes the vector stays as it was learned, temperature and all.
* *Step sizes.*  The loss of a merged set is a mean over all examples, in which a set's gradient counts by its share.  So
  step sizes add up, t by t: where all sets have the same size, each one's gradient is followed as far as when it was
  alone.  Now the sets pull at one network together, and that may be too far: :func:`rescaled` finds a common factor on the
  validation split.  Sets whose recipes differ in more than step sizes keep none when merged, and train as real text does.

A *stream* of tasks, each trained on when those before it are gone but for what a memory holds (:func:`continual`), is
judged by the accuracies R[k, j] on task j after task k (Lopez-Paz & Ranzato, 2017, "Gradient episodic memory"; Chaudhry et
al., 2018, "Riemannian walk for incremental learning"); see :class:`Stream`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Part, Unroll, from_recipe, inner_step, set_parts
from distillkit.core.optimizers import AdamW, Optimizer
from distillkit.core.problem import bound_step_sizes
from distillkit.core.student import Student
from distillkit.data.corpus import SPLITS
from distillkit.data.tasks import Task, task_of_rows
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.scoring import classified
from distillkit.io.checks import check_choice, check_whole
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator

FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
TUNING_SEEDS = 2
OPTIMIZER = AdamW(1e-3)
TRAINED_BY = ("steps", "optimizer", "batch_size", "dropout")  # what of a recipe says how to train
Kept = DistilledSet | Sequence[int]


# --- tasks -----------------------------------------------------------------------------------------------------------


def with_classes(task: Task, classes: Sequence[str] | Mapping[str, str]) -> Task:
    """The task restricted to some of its classes.

    Args:
        task: of classification.
        classes: their names in the order wanted; or {name: new name}, where several may be given one new name.

    Raises:
        ValueError: a name that is no class of the task, or fewer than two classes.
    """
    names = dict(classes) if isinstance(classes, Mapping) else {name: name for name in classes}
    for name in names:
        check_choice(f"a class of {task.name!r}", name, task.classes)
    new = tuple(dict.fromkeys(names.values()))
    label = {task.classes.index(old): new.index(name) for old, name in names.items()}
    rows = {s: [(t, label[y]) for t, y in _pairs(task, s) if y in label] for s in SPLITS}
    return _task(f"{task.name}[{', '.join(new)}]", new, rows, task, f"{task.origin}; of it the classes {', '.join(names)}")


def united(*tasks: Task) -> Task:
    """One task of the rows of several, one after the other; classes of the same name are the same class.

    Raises:
        ValueError: tasks that are not of classification, or of different ``max_length``.
    """
    if not tasks or any(task.kind != "classification" for task in tasks):
        raise ValueError("united takes tasks of classification, one at least")
    if len({task.max_length for task in tasks}) > 1:
        raise ValueError(f"max_length must be the same, not {[task.max_length for task in tasks]}; load the tasks with one")
    classes = _all_classes(task.classes for task in tasks)
    rows = {s: [(t, classes.index(task.classes[y])) for task in tasks for t, y in _pairs(task, s)] for s in SPLITS}
    return _task(" + ".join(t.name for t in tasks), classes, rows, tasks[0], " + ".join(t.origin for t in tasks))


def _pairs(task: Task, split: str):
    return zip(task.split(split)["text"][:], task.labels(split).tolist(), strict=True)


def _task(name: str, classes: tuple[str, ...], rows: dict, like: Task, origin: str) -> Task:
    if len(classes) < 2:
        raise ValueError(f"a task needs two classes or more, not {', '.join(classes) or 'none'}")
    return task_of_rows(name, classes, rows, max_length=like.max_length, origin=origin)


def _all_classes(groups) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in groups for name in group))


# --- sets ------------------------------------------------------------------------------------------------------------


def merge(*sets: DistilledSet, foreign: float = 0.0) -> DistilledSet:
    """One set of the examples of several, in that order, for the classes of all of them.

    Args:
        sets: distilled with, or selected for, the same student; with soft labels all, or with hard ones all.  What was
            merged before may be merged again.
        foreign: the share of probability that soft labels give, in equal parts, to classes of other sets; in [0, 1).

    Returns:
        a set with step sizes and a recipe where the sets' recipes differ in step sizes only (see the module).
        ``meta["parts"]`` remembers whose examples are whose; the classes are in the order of ``united``.

    Raises:
        ValueError: sets of different students or embedding tables, kinds of labels, or without classes.
    """
    if not sets or any(not s.meta.get("classes") for s in sets):
        raise ValueError("merge takes sets of labelled examples, one at least; this has none, or a set without classes")
    _check_one_table(sets)
    if len({s.soft for s in sets}) > 1:
        raise ValueError("some of the sets have soft labels and some hard ones; soften() those that are hard")
    if isinstance(foreign, bool) or not 0 <= foreign < 1:
        raise ValueError(f"foreign must be a share in [0, 1), not {foreign!r}")
    classes = _all_classes(s.meta["classes"] for s in sets)
    sets = tuple(s.in_classes(classes, "the merged set", foreign=foreign) for s in sets)
    length = max(s.embeds.shape[1] for s in sets)
    parts = [part for s in sets for part in _parts(s)]
    step_sizes, recipe = _joint_recipe(parts, sets[0].embeds.dtype)
    meta = {key: " + ".join(s.meta.get(key, "unknown") for s in sets) for key in ("task", "task_fingerprint")}
    meta |= {key: sets[0].meta[key] for key in ("student", "table_sha256") if all(s.meta.get(key) for s in sets)}
    meta |= {"classes": list(classes), "parts": parts} | ({"recipe": recipe} if recipe else {})
    meta |= {key: [value for s in sets for value in s.meta[key]] for key in ("labels", "text", "rows")
             if all(key in s.meta for s in sets)}

    def joined(name: str) -> Any:  # a tensor; None where a set has none, as with tokens
        values = [getattr(s, name) for s in sets]
        return None if any(v is None for v in values) else torch.cat([_lengthened(v, length) for v in values])

    return DistilledSet(joined("embeds"), joined("mask"), joined("free"), torch.cat([s.targets for s in sets]),
                        step_sizes=step_sizes, tokens=joined("tokens"), meta=meta)


def _check_one_table(sets: Sequence[DistilledSet]) -> None:
    """Raise ValueError unless all sets were made with one student, as far as they tell: its name, and its table."""
    across = "embeddings belong to the table they were made with; go through text: dk.retokenize each for one student"
    names = sorted({str(s.meta.get("student")) for s in sets})
    if len(names) > 1:
        raise ValueError(f"sets of different students, {reprlib.repr(names)}: {across}")
    tables = {s.meta["table_sha256"] for s in sets if s.meta.get("table_sha256")}
    if len(tables) > 1 or len({s.embeds.shape[-1] for s in sets}) > 1:
        raise ValueError(f"sets of different embedding tables, though all of student {reprlib.repr(names[0])}: {across}")


def _lengthened(value: Tensor, length: int) -> Tensor:
    """``value [m, l, …]`` with zeros up to ``length`` positions; a mask of False covers them."""
    filled = value.new_zeros(len(value), length, *value.shape[2:])
    filled[:, : value.shape[1]] = value
    return filled


def _parts(distilled: DistilledSet) -> list[dict]:
    """Whose the examples are, as JSON values: of each part its source, its size, and how it was trained on alone."""
    if "parts" in distilled.meta:
        return distilled.meta["parts"]
    recipe = distilled.meta.get("recipe")
    return [{
        "source": distilled.meta.get("task", "unknown"),
        "examples": len(distilled),
        "recipe": recipe and {key: recipe.get(key) for key in (*TRAINED_BY, "trainable", "weights")},
        "step_sizes": None if distilled.step_sizes is None else distilled.step_sizes.tolist(),
    }]


def _joint_recipe(parts: list[dict], dtype: torch.dtype) -> tuple[Tensor | None, dict | None]:
    """Step sizes (in the precision of embeddings of ``dtype``) and recipe of parts together; None and None where they have
    no recipe in common."""
    if any(p["recipe"] is None or p["step_sizes"] is None for p in parts):
        return None, None
    for part in parts:
        from_recipe(part["recipe"])  # one that nobody can follow is an error
    # The size an optimiser was made with is only where learned ones began.
    plain = [{**p["recipe"], "optimizer": {**p["recipe"]["optimizer"], "step_size": 1.0}} for p in parts]
    if any(recipe != plain[0] for recipe in plain):
        return None, None
    sizes = torch.tensor([p["step_sizes"] for p in parts], dtype=torch.promote_types(dtype, torch.float32))
    recipe = dict(parts[0]["recipe"])
    if recipe["batch_size"] is not None:
        recipe["batch_size"] *= len(parts)
    # Adam's steps are as long however small the gradient: there is no share to make up for.
    joint = sizes.mean(0) if recipe["optimizer"]["name"] == "AdamW" else sizes.sum(0)
    return joint, recipe


def without(merged: DistilledSet, source: str) -> DistilledSet:
    """A merged set without the examples of one source (the name of the task it was distilled for); classes stay.

    Raises:
        ValueError: no such source, or nothing would be left.
    """
    parts = _parts(merged)
    check_choice("source", source, [part["source"] for part in parts])
    owner = [part["source"] for part in parts for _ in range(part["examples"])]
    keep = torch.tensor([name != source for name in owner])
    left = [part for part in parts if part["source"] != source]
    if not left:
        raise ValueError(f"{source!r} is the only source of this set; without it nothing is left")
    step_sizes, recipe = _joint_recipe(left, merged.embeds.dtype)
    meta = {key: value for key, value in merged.meta.items() if key != "recipe"} | {"parts": left}
    for key in {"labels", "text", "rows"} & meta.keys():
        meta[key] = list(itertools.compress(meta[key], keep.tolist()))
    meta |= {"recipe": recipe} if recipe else {}
    tensors = {n: getattr(merged, n) for n in ("embeds", "mask", "free", "targets", "tokens")}
    kept: dict[str, Any] = {n: None if t is None else t[keep] for n, t in tensors.items()}
    return DistilledSet(**kept, step_sizes=step_sizes, meta=meta)


def replaced(merged: DistilledSet, source: str, new: DistilledSet, *, foreign: float = 0.0) -> DistilledSet:
    """A merged set in which another takes the place of one source: knowledge brought up to date without distilling again.

    Args:
        merged, source: as :func:`without` takes them.
        new: takes its place, at the end; its classes may be old or new ones.
        foreign: as in :func:`merge`.
    """
    return merge(without(merged, source), new, foreign=foreign)


def renamed(distilled: DistilledSet, names: Mapping[str, str]) -> DistilledSet:
    """The set with other names for some of its classes; by their names merging knows them.

    Raises:
        ValueError: a name that is no class of the set, or two classes of one name.
    """
    for name in names:
        check_choice("a class of the set", name, distilled.meta["classes"])
    classes = [names.get(name, name) for name in distilled.meta["classes"]]
    if len(set(classes)) < len(classes):
        raise ValueError(f"two classes would have one name: {', '.join(classes)}")
    return dataclasses.replace(distilled, meta={**distilled.meta, "classes": classes})


def with_recipe(distilled: DistilledSet, unroll: Unroll, student: Student) -> DistilledSet:
    """A set that has no recipe, such as real sentences, with that of ``unroll``: its steps, its step size at each.

    It lets :func:`rescaled` treat real and distilled sets alike.
    """
    recipe = {**unroll.recipe(), "trainable": student.trainable, "weights": student.weights}
    free = dataclasses.replace(distilled, step_sizes=None)
    sizes = bound_step_sizes(free, unroll, student)
    return dataclasses.replace(free, step_sizes=sizes, meta={**distilled.meta, "recipe": recipe})


def rescaled(
    distilled: DistilledSet,
    task: Task,
    student: Student,
    *,
    factors: Sequence[float] = FACTORS,
    seeds: Sequence[int] = tuple(range(TUNING_SEEDS)),
) -> tuple[DistilledSet, dict[float, float]]:
    """The set with all its step sizes times the factor that is best on the validation split.

    Args:
        distilled: with a recipe.
        task, student: to train and judge with.
        factors: to try; a tie goes to the one nearest 1.
        seeds: of the initialisations to judge on, from a stream of their own.

    Returns:
        the set, and the validation accuracy of each factor (minus the loss of the responses where there are no choices).
    """
    own = bound_step_sizes(distilled, from_recipe(_recipe_of(distilled)), student)
    tuning = [derive_seed("rescale", seed) for seed in seeds]
    sets = {factor: dataclasses.replace(distilled, step_sizes=factor * own) for factor in factors}
    found = {f: evaluate(s, task, student, seeds=tuning, recipe="own", split="validation").worth for f, s in sets.items()}
    best = max(found, key=lambda factor: (round(found[factor], 6), -abs(math.log(factor))))
    return sets[best], found


def _recipe_of(distilled: DistilledSet) -> dict:
    if "recipe" not in distilled.meta:
        raise ValueError("this set has no recipe whose step sizes could be scaled: its sources had none in common, or it "
                         "was selected; give it one with with_recipe, or evaluate it 'tuned'")
    return distilled.meta["recipe"]


# --- streams ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stream:
    """What a student knew on the way through a stream of tasks.

    Attributes:
        accuracy: R ``[seeds, tasks, tasks]``: of each seed, after task k, on the rows of task j, among the classes of all.
        settings: step size and weight it was trained with, and the validation accuracy of those tried.
    """

    accuracy: np.ndarray
    settings: dict

    @property
    def average(self) -> np.ndarray:
        """Mean over tasks of the accuracy at the end, of each seed (ACC of Lopez-Paz & Ranzato): ``[seeds]``."""
        return self.accuracy[:, -1].mean(-1)

    @property
    def forgetting(self) -> np.ndarray:
        """Mean over all tasks but the last of the best accuracy before the last task, less that at the end: ``[seeds]``.

        F of Chaudhry et al., equation 3; nan for a single task.
        """
        before, end = self.accuracy[:, :-1, :-1], self.accuracy[:, -1, :-1]
        return (before.max(1) - end).mean(-1) if before.size else np.full(len(self.accuracy), math.nan)

    @property
    def backward_transfer(self) -> np.ndarray:
        """Mean over all tasks but the last of the accuracy at the end, less that just after the task: ``[seeds]``.

        BWT of Lopez-Paz & Ranzato; nan for a single task.
        """
        just_after = self.accuracy.diagonal(axis1=1, axis2=2)[:, :-1]
        gain = self.accuracy[:, -1, :-1] - just_after
        return gain.mean(-1) if gain.size else np.full(len(self.accuracy), math.nan)


def continual(
    tasks: Sequence[Task],
    student: Student,
    memory: Sequence[Kept] | None = None,
    *,
    steps: int = 30,
    batch_size: int = 16,
    memory_batch: int = 16,
    optimizer: Optimizer = OPTIMIZER,
    step_sizes: Sequence[float] | None = None,
    weights: Sequence[float] = (0.5,),
    seeds: Sequence[int] = (0, 1, 2),
    split: str = "test",
) -> Stream:
    """Train one student on tasks one after the other, replaying what a memory holds of those that are over.

    Args:
        tasks: the stream; the student knows the classes of all from the start, and is never told which task a row is of.
        student: loaded for ``united(*tasks)``.
        memory: what is kept of each task but the last: a distilled or selected set, or rows of its training split; None:
            nothing is kept.
        steps, batch_size: of training on each task's real rows.
        memory_batch: examples replayed in a step, of all past tasks together, the same for every kind of memory.
        optimizer: starts afresh with each task.
        step_sizes, weights: of the optimiser (default: its own), and share of the replayed examples in the loss.  Where
            there are several, the pair with the best average at the end of the stream on the *validation* split is taken,
            with initialisations of their own: the same grid for every memory is the same tuning for every memory.
        seeds: of initialisations and batches.
        split: to score on.

    Raises:
        ValueError: a student of other classes, a memory of another number of tasks, a weight outside (0, 1).
    """
    tasks = list(tasks)
    whole = united(*tasks)
    student = student.for_task(whole)
    if memory is not None and len(memory) not in (len(tasks) - 1, len(tasks)):
        raise ValueError(f"memory must hold something for each of the {len(tasks)} tasks (the last may be left out), not for "
                         f"{len(memory)}")
    for name, value in (("steps", steps), ("batch_size", batch_size), ("memory_batch", memory_batch)):
        check_whole(name, value)
    if wrong := [w for w in weights if not 0 < w < 1]:
        raise ValueError(f"weights must be shares between 0 and 1, not {wrong[0]!r}")
    kept = None if memory is None else [_in_classes_of(whole, tasks, student, k, m) for k, m in enumerate(memory)]
    way = _Way(tasks, whole, student, kept, steps, batch_size, memory_batch, optimizer)
    grid = list(itertools.product(step_sizes or (optimizer.step_size,), weights if kept else weights[:1]))
    tried = {}
    if len(grid) > 1:
        for point in progress(grid, desc="tuning", unit="point", leave=False):
            tuning = [derive_seed("continual-tune", seed) for seed in range(TUNING_SEEDS)]
            tried[point] = float(np.mean([way(seed, *point, "validation", at_end=True) for seed in tuning]))
    step_size, weight = max(grid, key=lambda point: round(tried.get(point, 0.0), 6))
    found = np.stack([way(seed, step_size, weight, split) for seed in progress(seeds, desc="streams", leave=False)])
    noted = [{"step_size": s, "weight": w, "validation": round(v, 6)} for (s, w), v in tried.items()]
    return Stream(found, {"step_size": step_size, "weight": weight if kept else None, "tried": noted})


def rows_of_bytes(task: Task, nbytes: int, seed: int = 0) -> list[int]:
    """Random training rows, the classes in turn, as many as ``nbytes`` of UTF-8 text hold; all of them if they fit."""
    groups = task.rows_by_class("train")
    order = [rows[torch.randperm(len(rows), generator=generator("rows-of-bytes", seed, c)).numpy()].tolist()
             for c, rows in enumerate(groups)]
    texts, chosen = task.train["text"][:], []
    for row in (row for turn in itertools.zip_longest(*order) for row in turn if row is not None):
        nbytes -= len(texts[row].encode())
        if nbytes < 0:
            break
        chosen.append(row)
    return chosen


def _in_classes_of(whole: Task, tasks: list[Task], student: Student, k: int, kept: Kept) -> DistilledSet | Tensor:
    """What is kept of task k in the terms of all: a set for all classes, or rows of the united training split."""
    if isinstance(kept, DistilledSet):
        kept.check_table(student)
        return kept.in_classes(whole.classes, "the stream", foreign=0.0)
    return torch.as_tensor(kept, dtype=torch.long) + sum(len(task.train) for task in tasks[:k])


@dataclasses.dataclass(frozen=True)
class _Way:
    """One way through a stream, to be gone with several seeds and settings."""

    tasks: list[Task]
    whole: Task
    student: Student
    kept: list[DistilledSet | Tensor] | None
    steps: int
    batch_size: int
    memory_batch: int
    optimizer: Optimizer

    def __call__(self, seed: int, step_size: float, weight: float, split: str, at_end: bool = False) -> np.ndarray:
        """R of one seed: ``[tasks, tasks]``; ``at_end`` its last row alone, ``[1, tasks]``."""
        params, found = self.student.init(derive_seed("continual-init", seed)), []
        for k in range(len(self.tasks)):
            state = self.optimizer.init(params)
            for t in range(self.steps):
                draw = generator("continual-batch", seed, k, t)
                params, state, *_ = inner_step(self.student, self.optimizer, params, state, self._parts(k, weight, draw),
                                               step_size, in_place=True)
            if not at_end or k == len(self.tasks) - 1:
                found.append(self._scores(params, split))
        return np.array(found)

    def _parts(self, k: int, weight: float, draw: torch.Generator) -> list[Part]:
        """A step on task k: its real rows, and of each past task what is replayed."""
        rows = self.tasks[k].balanced_rows("train", self.batch_size, draw) + self._start(k, "train")
        memory = self.kept or []
        past = k if memory else 0
        parts = [self._real(1.0 - weight if past else 1.0, rows)]
        for j in range(past):
            kept, size = memory[j], max(1, self.memory_batch // past)
            chosen = torch.randperm(len(kept), generator=draw)[:size]
            parts += self._replayed(weight / past, kept, chosen) if len(chosen) else []
        return parts

    def _replayed(self, share: float, kept: DistilledSet | Tensor, chosen: Tensor) -> list[Part]:
        if isinstance(kept, Tensor):
            return [self._real(share, kept[chosen])]
        device, dtype = self.student.device, self.student.dtype
        targets = kept.targets.to(device, dtype if kept.soft else None)
        found = set_parts(chosen, kept.embeds.to(device, dtype), kept.mask.to(device), targets, micro_batch=None, dropout=None)
        return [(share, inputs, labels, seed) for _, inputs, labels, seed in found]

    def _real(self, share: float, rows: Tensor) -> Part:
        batch = self.whole.batch(self.student.tokenizer, "train", rows)
        return share, batch, batch["labels"].to(self.student.device), None

    def _start(self, k: int, split: str) -> int:
        return sum(len(task.split(split)) for task in self.tasks[:k])

    def _scores(self, params, split: str) -> list[float]:
        right = classified(self.student, params, self.whole, split)
        ends = np.cumsum([len(task.split(split)) for task in self.tasks])
        return [float(part.mean()) for part in np.split(right, ends[:-1])]
