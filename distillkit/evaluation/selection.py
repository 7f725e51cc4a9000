"""Real examples, chosen well: the baseline that any distilled set has to beat.

* ``random``: any sentences of the class.
* ``k_center`` (Sener & Savarese, 2018): start from the sentence nearest the class mean, then keep adding the one
  farthest from all chosen so far: cover the class.
* ``herding`` (Welling, 2009): keep adding the sentence that brings the mean of the chosen nearest the class mean.
* ``less`` (Xia et al., 2024): the sentences whose gradients point where the validation loss falls
  (:mod:`distillkit.evaluation.influence`); it takes several gradients a training row.

``k_center`` and ``herding`` work on L2-normalised sentence representations of the student (mean of its last hidden states).
Texts shorter than the budget are filled up with further real sentences, for every method alike (see
:meth:`distillkit.core.distilled.DistilledSet.from_rows`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.examples import examples_per_class
from distillkit.core.optimizers import described
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.influence import LESS, influence
from distillkit.evaluation.scoring import by_size
from distillkit.io.checks import check_are, check_choice
from distillkit.io.progress import progress

METHODS = ("random", "k_center", "herding")
ALL_METHODS = (*METHODS, "less")


def select(
    task: Task,
    student: Student,
    method: str,
    *,
    per_class: int | None = None,
    fraction: float | None = None,
    length: int | None = None,
    seed: int = 0,
) -> DistilledSet:
    """Real training sentences as a set with hard labels and no recipe.

    Args:
        method: ``"random"``, ``"k_center"``, ``"herding"`` or ``"less"``.
        per_class, fraction, length, seed: as in :meth:`DistilledSet.from_real`.  ``k_center`` and ``herding`` choose the
            same sentences for every seed; the seed then decides only what short ones are filled up with.

    ``"less"`` compares gradients of what the student trains; the paper's method takes a student with ``trainable="lora"``.

    Raises:
        ValueError: an unknown method, or more examples than the task has.
    """
    check_are(task=(task, Task), student=(student, Student))
    check_choice("method", method, ALL_METHODS)
    k, settings = examples_per_class(task, per_class, fraction), {}
    if method == "random":
        selected = DistilledSet.from_real(task, student, per_class=per_class, fraction=fraction, length=length,
                                          soft_labels=False, seed=seed)
    else:
        if method == "less":
            scores = influence(task, student.for_task(task), seed=seed)
            settings = {"trainable": student.trainable, **dataclasses.asdict(LESS), "optimizer": described(LESS.optimizer)}
            rows = [pool[np.argsort(-scores[pool], kind="stable")[:k]] for pool in task.rows_by_class("train")]
        else:
            x, pick = sentence_features(task, student), {"k_center": k_center, "herding": herding}[method]
            rows = [pool[pick(x[pool], k)] for pool in task.rows_by_class("train")]
        selected = DistilledSet.from_rows(task, student, rows, length=length, seed=seed)
    selected.meta["selection"] = {"method": method, "seed": seed, **settings}
    return selected


def k_center(x: np.ndarray, k: int) -> np.ndarray:
    """Greedy k-centre: indices of ``k`` rows of ``x [n, d]``, the first nearest the mean, each next farthest from all."""
    chosen = [int(np.argmin(np.linalg.norm(x - x.mean(0), axis=1)))]
    distance = np.linalg.norm(x - x[chosen[0]], axis=1)
    while len(chosen) < k:
        distance[chosen] = -1.0  # a duplicate of a chosen row is at distance 0 and may still be chosen
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(x - x[chosen[-1]], axis=1))
    return np.array(chosen)


def herding(x: np.ndarray, k: int) -> np.ndarray:
    """Herding: indices of ``k`` rows of ``x [n, d]`` whose running mean stays nearest the mean of all."""
    mean, total = x.mean(0), np.zeros(x.shape[1])
    chosen: list[int] = []
    for size in range(1, k + 1):
        gap = np.linalg.norm(mean - (total + x) / size, axis=1)
        gap[chosen] = np.inf
        chosen.append(int(np.argmin(gap)))
        total += x[chosen[-1]]
    return np.array(chosen)


def sentence_features(task: Task, student: Student) -> np.ndarray:
    """L2-normalised representations ``[n, d]`` of the training split under the student's pretrained body; remembered."""
    key = f"features:{task.fingerprint}:{task.max_length}"
    if key not in student.cache:
        features = over_training_rows(task, student, student.features)
        student.cache[key] = torch.nn.functional.normalize(features, dim=1).numpy()
    return student.cache[key]


def over_training_rows(task: Task, student: Student, read: Callable) -> Tensor:
    """What ``read`` gives for batches of the training split: ``[rows, …]`` float32 on the CPU, in the split's order."""
    lengths = [len(i) for i in task.token_ids(student.tokenizer, "train")]
    batches = list(by_size(range(len(lengths)), lengths.__getitem__, 128))
    with torch.no_grad():
        values = torch.cat([read(task.batch(student.tokenizer, "train", rows)).float().cpu()
                            for rows in progress(batches, desc="reading the corpus", leave=False)])
    return torch.empty_like(values).index_copy_(0, torch.tensor(sum(batches, [])), values)
