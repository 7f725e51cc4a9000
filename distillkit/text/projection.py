"""From embeddings back to words: each learned embedding becomes its nearest vocabulary token.

The search runs over chunks of positions and of the vocabulary, so that memory stays bounded whatever their numbers.
Special tokens and unused rows of the table (``[unused12]``, padding rows) are no words and are left out.

Projection is where text distillation loses most: an embedding carries information in directions no token has.  Measure the
loss with :func:`~distillkit.evaluation.evaluate.evaluate`.  Two remedies act while the set is learned: :class:`NeighborLoss`
pulls embeddings towards tokens, and :class:`ThroughProjection` trains the student on the nearest tokens, whose gradient moves
the embeddings behind them (the straight-through estimator of Bengio et al., 2013).  :func:`relabel` learns soft labels and step
sizes for a finished text by the same budget for every text, so that what labels gain is not credited to the words.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller
from distillkit.core.examples import decode, embed
from distillkit.core.objectives import Objective, Wrapper, check_objective
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.io.checks import check_are, check_choice, check_is, check_number, check_whole, require

METRICS = ("l2", "cosine")
QUERIES, ROWS = 1024, 4096  # queries and rows of the table that are compared at a time
UNUSED = re.compile(r"^(\[unused\d+\]|<unused\d+>|madeupword\d+)$")


def allowed_tokens(tokenizer, vocabulary: int) -> Tensor:
    """Which of the table's ``vocabulary`` rows are words: ``[v]`` bool, False for special, unused and absent tokens."""
    words = {i for token, i in tokenizer.get_vocab().items() if i < vocabulary and not UNUSED.match(token)}
    return torch.isin(torch.arange(vocabulary), torch.tensor(sorted(words - {*tokenizer.all_special_ids})))


def corpus_tokens(task: Task, student: Student, *, least: int = 2) -> Tensor:
    """Which tokens may stand in a text: words seen ``least`` times in the training split, ``[v]`` bool."""
    check_are(task=(task, Task), student=(student, Student))
    check_whole("least", least)
    ids = torch.tensor([i for ids in task.token_ids(student.tokenizer, "train") for i in ids])
    vocabulary = len(student.embedding)
    return allowed_tokens(student.tokenizer, vocabulary) & (ids.bincount(minlength=vocabulary) >= least)


def choosable(student: Student, allowed: Tensor | None) -> Tensor:
    """Which tokens a search may choose, ``[v]`` bool: words of the vocabulary that are also ``allowed`` (None: all words).

    Raises:
        ValueError: no token remains.
        TypeError: ``allowed`` is no tensor.
    """
    words = allowed_tokens(student.tokenizer, len(student.embedding))
    if allowed is not None:
        check_is("allowed", allowed, Tensor)
        words = words & allowed.cpu()
    require(words.any(), "allowed leaves no token to choose from")
    return words


def with_tokens(distilled: DistilledSet, student: Student, tokens: Tensor) -> DistilledSet:
    """The set with other ``tokens [m, l]``: their embeddings and their text."""
    distilled.check_table(student)
    # Real words that are not learned, as between prompt vectors and response, belong to the text too.
    special = torch.isin(tokens, torch.tensor(student.tokenizer.all_special_ids, dtype=torch.long))
    text = decode(student.tokenizer, tokens, distilled.free | distilled.mask & ~special)
    meta = {**distilled.meta, "text": text, "table_sha256": student.table_sha256}
    return dataclasses.replace(distilled, embeds=embed(student, tokens), tokens=tokens, meta=meta)


def nearest_tokens(
    queries: Tensor,
    table: Tensor,
    *,
    k: int = 1,
    metric: str = "l2",
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of an embedding table; the search takes about 16 kB · (1024 + d) of memory.

    Args:
        queries: ``[n, d]``.
        table: ``[v, d]``, on any device; queries are moved to it.
        metric: ``"l2"``: Euclidean distance; ``"cosine"``: 1 − cosine.
        allowed: ``[v]`` bool; rows to choose from, default all.

    Returns:
        ids ``[n, k]`` and distances ``[n, k]``, nearest first, on the CPU.

    Raises:
        ValueError: unknown metric, widths that differ, or fewer than ``k`` rows to choose from.
    """
    check_choice("metric", metric, METRICS)
    check_are(queries=(queries, Tensor), table=(table, Tensor))
    allowed = torch.ones(len(table), dtype=torch.bool) if allowed is None else allowed
    check_is("allowed", allowed, Tensor)
    check_whole("k", k)
    require(queries.shape[-1] == table.shape[-1],
            f"queries are {queries.shape[-1]} wide, the embedding table {table.shape[-1]}")
    candidates = allowed.nonzero().squeeze(1).to(table.device)
    require(len(candidates) >= k, f"k={k} neighbours asked for, but only {len(candidates)} tokens are allowed")
    dtype = torch.promote_types(table.dtype, torch.float32)  # half precision cannot tell neighbours apart
    nearest = []
    for block in queries.to(table.device, dtype).split(QUERIES):
        distances, ids = table.new_empty(len(block), 0, dtype=dtype), candidates.new_empty(len(block), 0)
        for chunk in candidates.split(ROWS):
            near, place = _distances(block, table[chunk].to(dtype), metric).topk(min(k, len(chunk)), largest=False)
            distances, order = torch.cat([distances, near], 1).sort(dim=1, stable=True)
            ids = torch.cat([ids, chunk[place]], 1).gather(1, order)
            distances, ids = distances[:, :k], ids[:, :k]
        nearest.append((ids.cpu(), distances.cpu()))
    ids, distances = zip(*nearest, strict=True)
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
        check_number(f"the weight of NeighborLoss at progress {progress:g}", weight)
        return float(weight)

    def __call__(self, distilled: DistilledSet) -> tuple[float, Tensor]:
        """The mean over free positions of ‖e − nearest‖², unweighted, and its gradient ``[m, l, d]``."""
        distilled.check_table(self.student)
        free = distilled.embeds[distilled.free]
        words, _ = nearest_tokens(free, self.student.embedding, allowed=choosable(self.student, None))
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
        A set with ``tokens`` and text, embeddings equal to those tokens', and the same labels of both kinds, step sizes
        and recipe; ``meta["projection"]`` holds the metric and the mean distance moved.

    Raises:
        ValueError: an unknown metric, or a set that was made with another embedding table.
    """
    check_are(distilled=(distilled, DistilledSet), student=(student, Student))
    distilled.check_table(student)
    free, fixed = distilled.free, distilled.mask & ~distilled.free
    tokens = torch.full(distilled.mask.shape, cast("int", student.tokenizer.pad_token_id or 0))
    words, distances = nearest_tokens(
        distilled.embeds[free], student.embedding, metric=metric, allowed=choosable(student, None)
    )
    tokens[free] = words.squeeze(1)
    if fixed.any():  # these never moved: their own rows are at distance 0
        tokens[fixed] = nearest_tokens(distilled.embeds[fixed], student.embedding, metric=metric)[0].squeeze(1)
    text = with_tokens(distilled, student, tokens)
    text.meta["projection"] = {"metric": metric, "mean_distance": float(distances.mean()) if len(distances) else 0.0}
    return text


@dataclasses.dataclass(frozen=True, eq=False)
class ThroughProjection(Wrapper):
    """An objective whose students train on the nearest tokens of the embeddings that are learned.

    Use it in the place of the ``objective`` it wraps.  The meta-gradient is that of the projected set; the
    :class:`~distillkit.core.distiller.Distiller` applies it to the embeddings behind, which in time cross into another token's
    cell.  The end is a set to be projected.

    Args:
        objective: such as :class:`~distillkit.core.objectives.BPTT`.
    """

    objective: Objective

    def __post_init__(self):
        check_objective(self.objective)

    def problems(self, distilled: DistilledSet, seed: int):
        """The wrapped objective's problems of the projected set."""
        return self.objective.problems(project(distilled, self.student), seed)

    def recipe(self) -> dict:
        """The wrapped objective's recipe, with the projection noted."""
        return {**self.objective.recipe(), "through_projection": "l2"}


def relabel(
    distilled: DistilledSet, objective, *, steps: int, lr: float = 0.08, seed: int = 0, **settings
) -> DistilledSet:
    """Learn soft labels and step sizes for a set whose examples stay as they are.

    Learned labels gain accuracy that the words do not, so a comparison of texts is fair only if all of them get labels.

    Args:
        distilled: hard labels are softened first; its step sizes are dropped.
        objective, steps, lr, seed, settings: as :class:`~distillkit.core.distiller.Distiller` takes them.
    """
    check_is("distilled", distilled, DistilledSet)
    check_whole("steps", steps, least=0)
    start = dataclasses.replace(distilled if distilled.soft else distilled.soften(), step_sizes=None)
    distiller = Distiller(start, objective, lr=lr, learn=("targets", "step_sizes"), seed=seed, **settings)
    for _ in distiller.run(steps):
        pass
    return distiller.distilled
