"""Joining sets that were distilled apart: merging, replay in a stream of tasks, and exchanging a part of a set.

A distilled set stands for a corpus, so sets can be joined, replayed when their corpus is gone, and exchanged.  None of this
works by itself: a set was learned to be trained on *alone*, by its own few steps, for its own classes.

:func:`merge` joins sets like this:

* *Classes* are matched by name: sets of the same classes share them, other classes are put side by side (:func:`united` does
  the same with tasks).
* *Soft labels* are extended in log space.  For an example of one task the classes of another are wrong answers.  They get a
  logit 30 below the example's own mass, which is no probability, or the share ``foreign``.  Among its own classes the label
  stays as it was learned.
* *Step sizes* add up, step by step.  The loss of a merged set is a mean over all examples, in which the gradient of a set
  counts by its share; so the sum follows each gradient as far as when its set was alone, where all sets have the same size.
  All sets move one network now, and that may be too far: :func:`rescaled` finds a common factor on the validation split.
  Sets whose recipes differ in more than step sizes have no recipe when merged, and train as real text does.

In a *stream* (:func:`continual`) a student trains on one task after the other, and of earlier tasks only a memory is left.
The measure is the accuracy R[k, j] on task j after task k (Lopez-Paz & Ranzato, 2017, "Gradient episodic memory"; Chaudhry
et al., 2018, "Riemannian walk for incremental learning"); see :class:`Stream`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Part, Unroll, from_recipe, inner_step, set_parts
from distillkit.core.optimizers import AdamW, Optimizer
from distillkit.core.problem import bound_step_sizes, equal_step_sizes
from distillkit.core.student import Student
from distillkit.data.corpus import SPLITS
from distillkit.data.tasks import Task, task_of_rows
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.scoring import classified
from distillkit.io.checks import check_choice, check_number, check_whole
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator

FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
TUNING_SEEDS = 2
OPTIMIZER = AdamW(1e-3)
TRAINED_BY = ("steps", "optimizer", "batch_size", "dropout", "trainable", "weights", "attention_weight")  # of a recipe


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
    if len(new) < 2:
        raise ValueError(f"a task needs two classes or more, not {', '.join(new) or 'none'}")
    label = {task.classes.index(old): new.index(name) for old, name in names.items()}
    rows = {split: [(text, label[y]) for text, y in _pairs(task, split) if y in label] for split in SPLITS}
    return task_of_rows(f"{task.name}[{', '.join(new)}]", new, rows, max_length=task.max_length,
                        origin=f"{task.origin}; of it the classes {', '.join(names)}")


def united(*tasks: Task) -> Task:
    """One task of the rows of several, one after the other; classes of the same name are the same class.

    Raises:
        ValueError: tasks that are not of classification, or of different ``max_length``.
    """
    if not tasks or any(task.kind != "classification" for task in tasks):
        raise ValueError("united takes tasks of classification, one at least")
    if len({task.max_length for task in tasks}) > 1:
        raise ValueError(f"max_length must be the same, not {[task.max_length for task in tasks]}; load the tasks with one")
    classes = tuple(dict.fromkeys(name for task in tasks for name in task.classes))
    label = [[classes.index(name) for name in task.classes] for task in tasks]
    rows = {split: [(text, label[k][y]) for k, task in enumerate(tasks) for text, y in _pairs(task, split)] for split in SPLITS}
    return task_of_rows(" + ".join(task.name for task in tasks), classes, rows, max_length=tasks[0].max_length,
                        origin=" + ".join(task.origin for task in tasks))


def _pairs(task: Task, split: str) -> Iterable[tuple[str, int]]:
    return zip(task.split(split)["text"][:], task.labels(split).tolist(), strict=True)


def merge(*sets: DistilledSet, foreign: float = 0.0) -> DistilledSet:
    """One set of the examples of several, in that order, for the classes of all of them.

    Args:
        sets: distilled with, or selected for, the same student; with soft labels all, or with hard ones all; with attention
            labels all, or none.  What was merged before may be merged again.
        foreign: the share of probability that soft labels give, in equal parts, to classes of other sets; in [0, 1).

    Returns:
        a set with step sizes and a recipe where the sets' recipes differ in step sizes only (see the module).
        ``meta["parts"]`` remembers whose examples are whose; the classes are in the order of ``united``.

    Raises:
        ValueError: sets of different students or embedding tables, kinds of labels, or without classes.
    """
    if not sets or any(not s.meta.get("classes") for s in sets):
        raise ValueError("merge takes sets of labelled examples, one at least; this has none, or a set without classes")
    # Of the same student, embedding table and width, as far as they are known.
    names = {str(s.meta.get("student")) for s in sets}
    tables = {s.meta["table_sha256"] for s in sets if s.meta.get("table_sha256")}
    widths = {s.embeds.shape[-1] for s in sets}
    if max(len(names), len(tables), len(widths)) > 1:
        raise ValueError(f"sets of different students or embedding tables ({reprlib.repr(sorted(names))}, {sorted(widths)} "
                         "wide): embeddings belong to the table they were made with; go through text: dk.retokenize each for "
                         "one student")
    if len({s.soft for s in sets}) > 1:
        raise ValueError("some of the sets have soft labels and some hard ones; soften() those that are hard")
    if len({s.attention is None for s in sets}) > 1:
        raise ValueError("some of the sets have attention labels and some none; give dataclasses.replace(set, attention=None)")
    check_number("foreign: the share of probability", foreign, most=1, without="most")
    classes = list(dict.fromkeys(name for s in sets for name in s.meta["classes"]))
    sets = tuple(s.in_classes(classes, "the merged set", foreign=foreign) for s in sets)
    length = max(s.embeds.shape[1] for s in sets)
    meta = {key: " + ".join(s.meta.get(key, "unknown") for s in sets) for key in ("task", "task_fingerprint")}
    meta |= {key: sets[0].meta[key] for key in ("student", "table_sha256") if all(s.meta.get(key) for s in sets)}
    meta |= {key: [value for s in sets for value in s.meta[key]] for key in ("labels", "text", "rows")
             if all(key in s.meta for s in sets)}

    def joined(name: str) -> Any:  # a tensor; None where a set has none, as with tokens
        values = [getattr(s, name) for s in sets]
        if any(value is None for value in values):
            return None
        # Zeros up to the longest set's length; a mask of False covers them.
        width = (0, 0) * (name == "embeds")
        return torch.cat([F.pad(v, width + (0, length - v.shape[-1 - (name == "embeds")])) for v in values])

    tensors = {name: joined(name) for name in ("embeds", "mask", "free", "tokens", "attention")}
    parts = [part for s in sets for part in _parts(s)]
    return _of_parts(parts, tensors | {"targets": torch.cat([s.targets for s in sets])}, meta | {"classes": classes})


def _of_parts(parts: list[dict], tensors: dict[str, Any], meta: dict) -> DistilledSet:
    """A set of several parts, with the step sizes and the recipe that they have in common."""
    step_sizes, recipe = _joint_recipe(parts, tensors["embeds"].dtype)
    return DistilledSet(**tensors, step_sizes=step_sizes, meta=meta | {"parts": parts} | ({"recipe": recipe} if recipe else {}))


def _parts(distilled: DistilledSet) -> list[dict]:
    """The parts of a set as JSON values: source, number of examples, recipe and step sizes of each."""
    if "parts" in distilled.meta:
        return distilled.meta["parts"]
    recipe = distilled.meta.get("recipe")
    return [{
        "source": distilled.meta.get("task", "unknown"),
        "examples": len(distilled),
        "recipe": recipe and {key: recipe[key] for key in TRAINED_BY if key in recipe},
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
    check_choice("source", source, [part["source"] for part in _parts(merged)])
    parts = [part for part in _parts(merged) if part["source"] != source]
    if not parts:
        raise ValueError(f"{source!r} is the only source of this set; without it nothing is left")
    owners = [part["source"] for part in _parts(merged) for _ in range(part["examples"])]
    remain = torch.tensor([owner != source for owner in owners])
    tensors = {name: getattr(merged, name) for name in ("embeds", "mask", "free", "targets", "tokens", "attention")}
    tensors = {name: None if tensor is None else tensor[remain] for name, tensor in tensors.items()}
    meta = {key: value for key, value in merged.meta.items() if key != "recipe"}
    meta |= {key: list(itertools.compress(meta[key], remain)) for key in ("labels", "text", "rows") if key in meta}
    return _of_parts(parts, tensors, meta)


def replaced(merged: DistilledSet, source: str, new: DistilledSet) -> DistilledSet:
    """A merged set in which another set replaces one source, without distilling again.

    Args:
        merged, source: as :func:`without` takes them.
        new: takes its place, at the end; its classes may be old or new ones.
    """
    return merge(without(merged, source), new)


def renamed(distilled: DistilledSet, names: Mapping[str, str]) -> DistilledSet:
    """The set with other names for some of its classes; merging matches classes by name.

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
    """A set without a recipe, such as real sentences, with the recipe of ``unroll`` and its step size at each step.

    It lets :func:`rescaled` treat real and distilled sets alike.
    """
    recipe = {**unroll.recipe(), "trainable": student.trainable, "weights": student.weights}
    sizes = equal_step_sizes(distilled, unroll.steps, unroll.optimizer.step_size, student)
    return dataclasses.replace(distilled, step_sizes=sizes, meta={**distilled.meta, "recipe": recipe})


def rescaled(
    distilled: DistilledSet, task: Task, student: Student, *, factors: Sequence[float] = FACTORS,
    seeds: Sequence[int] = range(TUNING_SEEDS),
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
    if "recipe" not in distilled.meta:
        raise ValueError("this set has no recipe whose step sizes could be scaled: its sources had none in common, or it "
                         "was selected; give it one with with_recipe, or evaluate it 'tuned'")
    sizes = bound_step_sizes(distilled, from_recipe(distilled.meta["recipe"]), student)
    tuning = [derive_seed("rescale", seed) for seed in seeds]
    sets = {factor: dataclasses.replace(distilled, step_sizes=factor * sizes) for factor in factors}
    worth = {f: evaluate(s, task, student, seeds=tuning, recipe="own", split="validation").worth for f, s in sets.items()}
    best = max(worth, key=lambda factor: (round(worth[factor], 6), -abs(math.log(factor))))
    return sets[best], worth


@dataclasses.dataclass(frozen=True)
class Stream:
    """The accuracies of a student on its way through a stream of tasks.

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
        """Mean over earlier tasks of the best accuracy before the last, less that at the end (Chaudhry's F): ``[seeds]``."""
        return (self.accuracy[:, :-1, :-1].max(1) - self.accuracy[:, -1, :-1]).mean(-1)


def continual(
    tasks: Sequence[Task], student: Student, memory: Sequence[DistilledSet | Sequence[int]] | None = None, *,
    steps: int = 30, batch_size: int = 16, memory_batch: int = 16, optimizer: Optimizer = OPTIMIZER,
    step_sizes: Sequence[float] | None = None, weights: Sequence[float] = (0.5,), seeds: Sequence[int] = (0, 1, 2),
) -> Stream:
    """Train one student on one task after the other, replaying a memory of the earlier ones.

    Args:
        tasks: the stream, two or more; the student knows the classes of all from the start, and never which task a row is of.
        student: loaded for ``united(*tasks)``.
        memory: what is kept of each task: a distilled or selected set, or rows of its training split; None: nothing is kept.
            That of the last task is never looked at.
        steps, batch_size: of training on each task's real rows.
        memory_batch: examples replayed in a step, of all past tasks together, the same for every kind of memory.
        optimizer: starts afresh with each task.
        step_sizes, weights: of the optimiser (default: its own), and share of the replayed examples in the loss.  Where
            there are several, the pair with the best average at the end of the stream on the *validation* split is taken,
            with initialisations of their own: the same grid for every memory is the same tuning for every memory.
        seeds: of initialisations and batches; each is scored on the test split.

    Raises:
        ValueError: a student of other classes, a memory of another number of tasks, a weight outside (0, 1).
    """
    if len(tasks) < 2 or memory is not None and len(memory) != len(tasks):
        raise ValueError(f"a stream has two tasks or more, and a memory of each of them; these are {len(tasks)} tasks and "
                         f"{len(memory or ())} memories")
    whole = united(*tasks)
    student = student.for_task(whole)
    for name, value in (("steps", steps), ("batch_size", batch_size), ("memory_batch", memory_batch)):
        check_whole(name, value)
    for weight in weights:
        check_number("weights: each share of the loss", weight, most=1, without="least and most")
    replayed = []  # sets for all classes, or rows of the united training split
    for examples, start in zip(memory or (), _starts(tasks, "train")):
        if isinstance(examples, DistilledSet):
            examples.check_table(student)
            replayed.append(examples.in_classes(whole.classes, "the stream", foreign=0.0))
        else:
            replayed.append(torch.as_tensor(examples, dtype=torch.long) + start)
    run = _Run(tasks, whole, student, replayed, steps, batch_size, memory_batch, optimizer)
    grid = list(itertools.product(step_sizes or (optimizer.step_size,), weights if replayed else weights[:1]))
    worth = dict.fromkeys(grid, 0.0)
    tuning = [derive_seed("continual-tune", seed) for seed in range(TUNING_SEEDS)]
    for point in progress(grid, desc="tuning", unit="point", leave=False) if len(grid) > 1 else ():
        worth[point] = float(np.mean([run(seed, *point, "validation", last_only=True) for seed in tuning]))
    step_size, weight = max(grid, key=lambda point: round(worth[point], 6))
    accuracy = np.stack([run(seed, step_size, weight, "test") for seed in progress(seeds, desc="streams", leave=False)])
    tried = [{"step_size": size, "weight": w, "validation": round(value, 6)} for (size, w), value in worth.items()]
    return Stream(accuracy, {"step_size": step_size, "weight": weight if replayed else None,
                             "tried": tried if len(grid) > 1 else []})


def rows_of_bytes(task: Task, nbytes: int, seed: int = 0) -> list[int]:
    """Random training rows, the classes in turn, as many as ``nbytes`` of UTF-8 text hold; all of them if they fit."""
    order = [rows[torch.randperm(len(rows), generator=generator("rows-of-bytes", seed, c)).numpy()].tolist()
             for c, rows in enumerate(task.rows_by_class("train"))]
    rows = [row for turn in itertools.zip_longest(*order) for row in turn if row is not None]
    texts = task.train["text"][:]
    ends = np.cumsum([len(texts[row].encode()) for row in rows])
    return rows[: int(np.searchsorted(ends, nbytes, side="right"))]


def _starts(tasks: Sequence[Task], split: str) -> list[int]:
    """The first row of each task in the united task, and the number of all rows."""
    return list(itertools.accumulate((len(task.split(split)) for task in tasks), initial=0))


@dataclasses.dataclass(frozen=True)
class _Run:
    """One run through a stream, to be made with several seeds and settings."""

    tasks: Sequence[Task]
    whole: Task
    student: Student
    memory: list[DistilledSet | Tensor]
    steps: int
    batch_size: int
    memory_batch: int
    optimizer: Optimizer

    def __call__(self, seed: int, step_size: float, weight: float, split: str, last_only: bool = False) -> np.ndarray:
        """R of one seed: ``[tasks, tasks]``; with ``last_only`` its last row, ``[1, tasks]``."""
        params, accuracies = self.student.init(derive_seed("continual-init", seed)), []
        for k in range(len(self.tasks)):
            state = self.optimizer.init(params)
            for t in range(self.steps):
                parts = self.parts(k, weight, generator("continual-batch", seed, k, t))
                params, state, *_ = inner_step(self.student, self.optimizer, params, state, parts, step_size, in_place=True)
            if not last_only or k == len(self.tasks) - 1:
                correct = np.split(classified(self.student, params, self.whole, split), _starts(self.tasks, split)[1:-1])
                accuracies.append([float(rows.mean()) for rows in correct])
        return np.array(accuracies)

    def parts(self, k: int, weight: float, draw: torch.Generator) -> list[Part]:
        """The parts of a step on task k: real rows, and replayed examples of each past task in equal shares of ``weight``."""
        rows = self.tasks[k].balanced_rows("train", self.batch_size, draw) + _starts(self.tasks, "train")[k]
        past, device, dtype = self.memory[:k], self.student.device, self.student.dtype
        parts = [self._real(1.0 - weight if past else 1.0, rows)]
        for examples in past:
            chosen = torch.randperm(len(examples), generator=draw)[: max(1, self.memory_batch // len(past))]
            if isinstance(examples, Tensor):
                parts += [self._real(weight / len(past), examples[chosen])] if len(chosen) else []
                continue
            ((_, *part),) = set_parts(chosen, **examples.tensors_on(device, dtype), micro_batch=None, dropout=None)
            parts.append((weight / len(past), *part))
        return parts

    def _real(self, share: float, rows: Tensor) -> Part:
        batch = self.whole.batch(self.student.tokenizer, "train", rows)
        return share, batch, batch["labels"].to(self.student.device), None
