"""From embeddings back to words: each learned embedding becomes its nearest vocabulary token.

The search runs over chunks of positions and of the vocabulary, so that memory stays bounded whatever their numbers.
Special tokens and unused rows of the table (``[unused12]``, padding rows) are no words and are left out.

Projection is where text distillation loses most: an embedding carries information in directions no token has.  Measure the
loss with :func:`~distillkit.evaluation.evaluate.evaluate`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.examples import decode, embed
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.io.checks import check_choice, check_is, check_whole

METRICS = ("l2", "cosine")
UNUSED = re.compile(r"^(\[unused\d+\]|<unused\d+>|madeupword\d+)$")


def allowed_tokens(tokenizer, vocabulary: int) -> Tensor:
    """Which of the table's ``vocabulary`` rows are words: ``[v]`` bool, False for special, unused and absent tokens."""
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    for token, i in tokenizer.get_vocab().items():
        if i < vocabulary and not UNUSED.match(token):
            allowed[i] = True
    allowed[[i for i in tokenizer.all_special_ids if i < vocabulary]] = False
    return allowed


def corpus_tokens(task: Task, student: Student, *, least: int = 2) -> Tensor:
    """Which tokens may stand in a text: words seen ``least`` times in the training split, ``[v]`` bool."""
    check_is("task", task, Task)
    check_is("student", student, Student)
    check_whole("least", least)
    allowed = allowed_tokens(student.tokenizer, len(student.embedding))
    counts = collections.Counter(i for ids in task.token_ids(student.tokenizer, "train") for i in ids)
    seen = torch.zeros_like(allowed)
    seen[[i for i, n in counts.items() if n >= least]] = True
    return allowed & seen


def choosable(student: Student, allowed: Tensor | None) -> Tensor:
    """Which tokens a search may choose: the words of the vocabulary, and of them those that are ``allowed``, ``[v]`` bool.

    Raises:
        ValueError: there is none.
        TypeError: ``allowed`` is no tensor.
    """
    words = allowed_tokens(student.tokenizer, len(student.embedding))
    if allowed is not None:
        check_is("allowed", allowed, Tensor)
        words = words & allowed.cpu()
    if not words.any():
        raise ValueError("allowed leaves no token to choose from")
    return words


def with_tokens(distilled: DistilledSet, student: Student, tokens: Tensor) -> DistilledSet:
    """The set with other ``tokens [m, l]``: their embeddings and their text."""
    distilled.check_table(student)
    text = decode(student.tokenizer, tokens, distilled.free)
    meta = {**distilled.meta, "text": text, "table_sha256": student.table_sha256}
    return dataclasses.replace(distilled, embeds=embed(student, tokens), tokens=tokens, meta=meta)


def nearest_tokens(
    queries: Tensor,
    table: Tensor,
    *,
    k: int = 1,
    metric: str = "l2",
    allowed: Tensor | None = None,
    query_chunk: int = 1024,
    table_chunk: int = 4096,
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of an embedding table.

    Args:
        queries: ``[n, d]``.
        table: ``[v, d]``, on any device; queries are moved to it.
        metric: ``"l2"``: Euclidean distance; ``"cosine"``: 1 − cosine.
        allowed: ``[v]`` bool; rows to choose from, default all.
        query_chunk, table_chunk: rows at a time; memory is about
            4 · table_chunk · (query_chunk + d) bytes.

    Returns:
        ids ``[n, k]`` and distances ``[n, k]``, nearest first, on the CPU.

    Raises:
        ValueError: unknown metric, widths that differ, or fewer than ``k`` rows to choose from.
    """
    check_choice("metric", metric, METRICS)
    for name, value in (("queries", queries), ("table", table), *([] if allowed is None else [("allowed", allowed)])):
        check_is(name, value, Tensor)
    for name, value in (("k", k), ("query_chunk", query_chunk), ("table_chunk", table_chunk)):
        check_whole(name, value)
    if queries.shape[-1] != table.shape[-1]:
        raise ValueError(f"queries are {queries.shape[-1]} wide, the embedding table {table.shape[-1]}")
    candidates = torch.arange(len(table)) if allowed is None else allowed.nonzero().squeeze(1).cpu()
    if len(candidates) < k:
        raise ValueError(f"k={k} neighbours asked for, but only {len(candidates)} tokens are allowed")
    dtype = torch.promote_types(table.dtype, torch.float32)  # half precision cannot tell neighbours apart
    ids, distances = [], []
    for block in queries.split(query_chunk):
        best_d = torch.empty(len(block), 0, dtype=dtype, device=table.device)
        best_i = torch.empty(len(block), 0, dtype=torch.long, device=table.device)
        for chunk in candidates.to(table.device).split(table_chunk):
            d = _distances(block.to(table.device, dtype), table[chunk].to(dtype), metric)
            near, where = d.topk(min(k, len(chunk)), largest=False)
            best_d, order = torch.cat([best_d, near], 1).sort(dim=1, stable=True)
            best_i = torch.cat([best_i, chunk[where]], 1).gather(1, order)
            best_d, best_i = best_d[:, :k], best_i[:, :k]
        ids.append(best_i.cpu())
        distances.append(best_d.cpu())
    return torch.cat(ids), torch.cat(distances)


def _distances(queries: Tensor, rows: Tensor, metric: str) -> Tensor:
    if metric == "cosine":
        return 1 - torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(rows, dim=1).T
    squared = queries.square().sum(1, keepdim=True) - 2 * queries @ rows.T + rows.square().sum(1)
    return squared.clamp_min(0).sqrt()


@dataclasses.dataclass(frozen=True, eq=False)
class NeighborLoss:
    """Pulls each learned embedding towards the vocabulary: the mean squared distance to its nearest token's embedding.

    After the neighbour term of Yao et al. (2025); its exact form there is not known to us, this one is our choice.

    Args:
        student: whose embedding table.
        weight: factor of the term, 0 or more, or a function of the progress in 0..1 (such as one that grows, so that the
            embeddings first find what to say and then words for it).
    """

    student: Student
    _: dataclasses.KW_ONLY
    weight: float | Callable[[float], float]
    name = "neighbor"

    def __post_init__(self):
        check_is("student", self.student, Student)
        self.weight_at(0.0)

    def weight_at(self, progress: float) -> float:
        """The factor at a progress in 0..1."""
        weight = self.weight(progress) if callable(self.weight) else self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"the weight of NeighborLoss must be a finite number of 0 or more, not {weight!r} at progress "
                             f"{progress:g}")
        return float(weight)

    def __call__(self, distilled: DistilledSet) -> tuple[float, Tensor]:
        """The mean over free positions of ‖e − nearest‖², unweighted, and its gradient ``[m, l, d]``."""
        distilled.check_table(self.student)
        table = self.student.embedding
        free = distilled.embeds[distilled.free]
        words, _ = nearest_tokens(free, table, allowed=allowed_tokens(self.student.tokenizer, len(table)))
        gap = free - embed(self.student, words.squeeze(1)).to(free.dtype)
        gradient = torch.zeros_like(distilled.embeds)
        gradient[distilled.free] = 2 * gap / max(1, len(gap))
        return float(gap.square().sum() / max(1, len(gap))), gradient

    def describe(self) -> dict:
        """The settings as JSON values: a function's weight at eleven points."""
        return {"name": type(self).__name__, "weight": [self.weight_at(i / 10) for i in range(11)]}


def project(distilled: DistilledSet, student: Student, *, metric: str = "l2") -> DistilledSet:
    """Replace each learned embedding by its nearest word's.

    Args:
        distilled: a set in ``student``'s embedding space.
        student: whose table and tokenizer to use.
        metric: ``"l2"`` or ``"cosine"``.

    Returns:
        A set with ``tokens`` and text, embeddings equal to those tokens', labels, step sizes and recipe kept;
        ``meta["projection"]`` tells the metric and the mean distance moved.

    Raises:
        ValueError: an unknown metric, or a set that was made with another embedding table.
    """
    check_is("distilled", distilled, DistilledSet)
    check_is("student", student, Student)
    check_choice("metric", metric, METRICS)
    distilled.check_table(student)
    table = student.embedding
    tokens = torch.full(distilled.mask.shape, cast("int", student.tokenizer.pad_token_id or 0))
    words, moved = nearest_tokens(
        distilled.embeds[distilled.free], table, metric=metric, allowed=allowed_tokens(student.tokenizer, len(table))
    )
    tokens[distilled.free] = words.squeeze(1)
    fixed = distilled.mask & ~distilled.free  # these never moved: their own rows are at distance 0
    if fixed.any():
        tokens[fixed] = nearest_tokens(distilled.embeds[fixed], table, metric=metric)[0].squeeze(1)
    meta = {**distilled.meta, "table_sha256": student.table_sha256}
    meta["text"] = decode(student.tokenizer, tokens, distilled.free)
    meta["projection"] = {"metric": metric, "mean_distance": float(moved.mean()) if len(moved) else 0.0}
    return dataclasses.replace(distilled, embeds=embed(student, tokens), tokens=tokens, meta=meta)
