"""Real examples, chosen well: the baseline that any distilled set has to beat.

* ``random``: any sentences of the class.
* ``k_center`` (Sener & Savarese, 2018): start from the sentence nearest the class mean, then keep adding the one
  farthest from all chosen so far: cover the class.
* ``herding`` (Welling, 2009): keep adding the sentence that brings the mean of the chosen nearest the class mean.
* ``k_means``: the sentences nearest the centres of k-means clusters, as many clusters per class as examples.
* ``less`` (Xia et al., 2024): the sentences whose gradients point where the validation loss falls
  (:mod:`distillkit.evaluation.influence`); it takes several gradients per training row.
* ``keywords``: no sentences but the words by which a linear classifier tells the classes apart
  (:mod:`distillkit.evaluation.words`); classification only.

``k_center``, ``herding`` and ``k_means`` work on L2-normalised sentence representations of the student (mean of its last
hidden states).  Sentences shorter than the budget are filled up with further real ones, for every method alike (see
:meth:`distillkit.core.distilled.DistilledSet.from_rows`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.examples import examples_per_class, special_frame
from distillkit.core.optimizers import described
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.influence import LESS, influence
from distillkit.evaluation.scoring import by_size
from distillkit.evaluation.words import keyword_lines
from distillkit.io.checks import check_are, check_choice
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed

METHODS = ("random", "k_center", "herding", "k_means")
SELECTIONS = (*METHODS, "keywords")  # without gradients
REAL_METHODS = (*METHODS, "less")
ALL_METHODS = (*REAL_METHODS, "keywords")


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
    """A selection of the training split as a set with hard labels and no recipe.

    Args:
        method: ``"random"``, ``"k_center"``, ``"herding"``, ``"k_means"``, ``"less"`` or ``"keywords"``.
        per_class, fraction, length, seed: as in :meth:`DistilledSet.from_real`.  ``k_center``, ``herding`` and ``keywords``
            choose the same for every seed; the seed then decides only what short sentences are filled up with.

    ``"less"`` compares gradients of what the student trains; the paper's method takes a student with ``trainable="lora"``.
    Of an instruction task it serves each validation group in turn, see :func:`round_robin`.

    Raises:
        ValueError: an unknown method, more examples than the task has, or ``"keywords"`` for a task without classes.
    """
    check_are(task=(task, Task), student=(student, Student))
    check_choice("method", method, ALL_METHODS)
    k, settings = examples_per_class(task, per_class, fraction), {}
    if method == "random":
        selected = DistilledSet.from_real(task, student, per_class=per_class, fraction=fraction, length=length,
                                          soft_labels=False, seed=seed)
    elif method == "keywords":
        selected = _keywords(task, student, k, length)
    else:
        if method == "less":
            scores = influence(task, student.for_task(task), seed=seed)
            settings = {"trainable": student.trainable, **dataclasses.asdict(LESS), "optimizer": described(LESS.optimizer)}
            rows = [pool[round_robin(scores[pool], k)] for pool in task.rows_by_class("train")]
        else:
            pick = {"k_center": k_center, "herding": herding, "k_means": functools.partial(k_means, seed=seed)}[method]
            x = sentence_features(task, student)
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


def k_means(x: np.ndarray, k: int, *, seed: int = 0) -> np.ndarray:
    """Medoids: for each of ``k`` k-means centres of ``x [n, d]`` the index of the nearest row that is not chosen yet.

    The centres are the best of ten starts of k-means++; ``seed`` draws the starts.
    """
    from sklearn.cluster import KMeans  # a second to import

    start = derive_seed("k-means", seed) % 2**32
    distinct = min(k, len(np.unique(x, axis=0)))  # fewer centres than examples where sentences repeat
    centers = KMeans(distinct, n_init=10, random_state=start).fit(x).cluster_centers_
    chosen: list[int] = []
    for place in range(k):
        distance = np.linalg.norm(x - centers[place % distinct], axis=1)
        distance[chosen] = np.inf
        chosen.append(int(np.argmin(distance)))
    return np.array(chosen)


def round_robin(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of ``k`` rows of ``scores [n, groups]``: each group in turn takes the unused row with its highest score.

    Greedy round-robin is what serves every validation group at low budgets (arXiv 2602.14696); taking the highest scores
    whatever their group can leave groups without any row.
    """
    orders = [iter(np.argsort(-column, kind="stable").tolist()) for column in scores.T]
    chosen: dict[int, None] = {}  # in the order of the choices
    for turn in range(k):
        chosen[next(row for row in orders[turn % len(orders)] if row not in chosen)] = None
    return np.array([*chosen])


def _keywords(task: Task, student: Student, k: int, length: int | None) -> DistilledSet:
    """``k`` lines of keywords for each class, each of at most ``length`` tokens."""
    room = (length or task.max_length) - sum(map(len, special_frame(student.tokenizer)))
    lines = keyword_lines(task, student.tokenizer, k, room)
    labels = [label for label in range(len(task.classes)) for _ in range(k)]
    return DistilledSet.from_text(sum(lines, []), [task.classes[label] for label in labels], task, student, length=length,
                                  soft_labels=False)


def sentence_features(task: Task, student: Student, split: str = "train") -> np.ndarray:
    """L2-normalised representations ``[n, d]`` of a split under the student's pretrained body; remembered."""
    key = f"features:{task.fingerprint}:{task.max_length}:{split}"
    if key not in student.cache:
        features = over_rows(task, student, student.features, split)
        student.cache[key] = torch.nn.functional.normalize(features, dim=1).numpy()
    return student.cache[key]


def over_rows(task: Task, student: Student, read: Callable, split: str = "train") -> Tensor:
    """What ``read``, a method of the student, gives for batches of a split: ``[rows, …]`` float32 on the CPU, in its order.

    The rows of a bootstrap are looked up among those of the corpus it was drawn from, which is read once.
    """
    if task.resampled is not None and split == "train":
        corpus, rows = task.resampled
        key = f"{read.__name__}:{corpus.fingerprint}:{corpus.max_length}"
        if key not in student.cache:
            student.cache[key] = over_rows(corpus, student, read)
        return student.cache[key][rows]
    lengths = [len(i) for i in task.token_ids(student.tokenizer, split)]
    batches = list(by_size(range(len(lengths)), lengths.__getitem__, 128))
    with torch.no_grad():
        values = torch.cat([read(task.batch(student.tokenizer, split, rows)).float().cpu()
                            for rows in progress(batches, desc="reading the corpus", leave=False)])
    return torch.empty_like(values).index_copy_(0, torch.tensor(sum(batches, [])), values)
