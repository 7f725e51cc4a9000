"""Looking at distilled sets: where their embeddings lie, what they attend to, and how they moved.

A picture of high-dimensional points is a claim about neighbours, so every view here comes with a number for what it claims:

* A map keeps some neighbourhoods and invents gaps between them, :func:`fitted_umap` (McInnes et al., 2018) most of all.
  :func:`neighbour_overlap` measures how far groups really are apart, and :func:`preservation` how many neighbours a map keeps.
* :func:`distance_to_words` has a yardstick: how far words are from each other.
* :func:`attention` gives the weights of every head; :func:`attention_entropy` and :func:`attention_shares` condense them
  (Clark et al., 2019).
* :func:`random_shift` is the control of a learned set: as far from real text, in a direction without meaning.
* :func:`history` follows a set through its snapshots.

Data in, arrays out; the figures are in the lessons that use them.
"""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import entr
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import check_array, check_consistent_length

from distillkit.core.distilled import DistilledSet
from distillkit.core.student import Batch, Params, Student
from distillkit.io.checks import check_choice, check_whole
from distillkit.io.seeds import generator
from distillkit.text.projection import METRICS, allowed_tokens, nearest_tokens

MAPS = ("umap", "pca")
NEIGHBORS = 15  # of each point, that UMAP preserves
SAMPLE = 1000  # words that distances between words are measured on
# Each function below that returns one of these describes its fields.
Overlap = namedtuple("Overlap", ("share", "chance"))
WordDistances = namedtuple("WordDistances", ("distances", "tokens", "yardstick"))
AttentionShares = namedtuple("AttentionShares", ("special", "content", "own", "previous", "next"))
History = namedtuple("History", ("steps", "free", "moved", "tokens", "flipped", "away", "labels"))


def fitted_umap(points: np.ndarray, seed: int = 0):
    """A UMAP fitted on ``points [n, d]`` in one thread; torch keeps its number of threads."""
    import umap  # takes seconds to compile, so it is imported only here

    threads = torch.get_num_threads()
    model = umap.UMAP(n_neighbors=min(NEIGHBORS, len(points) - 1), random_state=seed, n_jobs=1).fit(points)
    torch.set_num_threads(threads)  # numba sets the OpenMP threads of the whole process, torch's too, to the number of cores
    return model


def neighbour_overlap(
    points, groups: Sequence | np.ndarray, k: int, *, metric: str = "cosine", owners: Sequence | np.ndarray | None = None
) -> Overlap:
    """How many of a point's neighbours belong to its own group, in the original space and not in a picture of it.

    Args:
        points: ``[n, d]``.
        groups: the group of each point, n labels of any kind.
        k: neighbours per point, from 1 to n − 1.
        metric: ``"cosine"`` or ``"l2"``.
        owners: the example of each point, n labels; then only neighbours in other examples count, since positions of one
            example may lie together whatever their group.

    Returns:
        ``share``: the mean over points of the share of their ``k`` nearest other points that are in their group; ``chance``:
        its expectation if neighbours were drawn at random from the points that count.

    Raises:
        ValueError: another number of groups or owners than points, an unknown metric, or ``k`` out of range.
    """
    points, groups = _points(points), np.asarray(groups)
    check_consistent_length(points, groups, owners)
    owners = np.arange(len(points)) if owners is None else owners
    _, owners, sizes = np.unique(owners, return_inverse=True, return_counts=True)
    check_whole("k", k, most=len(points) - sizes.max(), meaning="the other points")
    # Among the nearest are some that do not count: as many as the largest example has but for the point itself.
    nearest = _nearest(points, min(k + int(sizes.max()) - 1, len(points) - 1), metric)
    counted = owners[nearest] != owners[:, None]
    first = counted & (counted.cumsum(1) <= k)
    same = groups[nearest] == groups[:, None]
    _, group, group_sizes = np.unique(groups, return_inverse=True, return_counts=True)
    _, pair, pair_sizes = np.unique(np.stack([group, owners]), axis=1, return_inverse=True, return_counts=True)
    chance = (group_sizes[group] - pair_sizes[pair.ravel()]) / (len(points) - sizes[owners])
    return Overlap(float((same & first).sum(1).mean() / k), float(chance.mean()))


def preservation(points, flat, k: int, *, rows: np.ndarray | None = None) -> float:
    """The mean share of a point's ``k`` nearest other points that are among its ``k`` nearest on a map too; 1: all of them.

    A map that shuffles the points would keep k / (n − 1).

    Args:
        points: ``[n, d]``.
        flat: ``[n, 2]``, the map.
        k: from 1 to n − 1.
        rows: indices of the points whose neighbours are compared, among all points; default: every point.
    """
    points, flat = _points(points), _points(flat)
    check_consistent_length(points, flat)
    shared = _nearest(points, k, "l2", rows)[:, :, None] == _nearest(flat, k, "l2", rows)[:, None, :]
    return float(shared.any(2).mean())


def _points(points) -> np.ndarray:
    """``points``, an array, tensor or list ``[n, d]``, as float64; raises ValueError for another shape or values not finite."""
    return check_array(torch.as_tensor(points).detach().cpu().double().numpy())


def _nearest(points: np.ndarray, k: int, metric: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Indices ``[n, k]`` of the nearest other points, of all points or of some ``rows``."""
    check_choice("metric", metric, METRICS)
    check_whole("k", k, most=len(points) - 1, meaning="the other points")
    search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine" if metric == "cosine" else "euclidean")
    if rows is None:
        return search.fit(points).kneighbors(return_distance=False)  # without a query, a point is not its own neighbour
    nearest = search.fit(points).kneighbors(points[rows], k + 1, return_distance=False)
    others = nearest != rows[:, None]
    others[others.all(1), -1] = False  # of several points at one place, the point itself may not be among the nearest
    return nearest[others].reshape(-1, k)


def distance_to_words(distilled: DistilledSet, student: Student) -> WordDistances:
    """Euclidean distance of each free position to its nearest word, beside how far words are from each other.

    A distance well below the yardstick lies inside the cell of a word; one well above it lies far from every word.

    Args:
        distilled: a set in ``student``'s embedding space.

    Returns:
        ``distances [n]`` of the free positions in reading order; ``tokens [n]``, the ids of their nearest words; and the
        ``yardstick``, which :func:`word_distance` returns.
    """
    distilled.check_table(student)
    table = student.embedding
    allowed = allowed_tokens(student.tokenizer, len(table))
    free = distilled.embeds[distilled.free].to(table.device, table.dtype)
    ids = nearest_tokens(free, table, allowed=allowed)[0].squeeze(1)
    # From the difference: the distances of the search lose digits where they are small.
    distances = (free - table[ids.to(table.device)]).float().norm(dim=1)

    return WordDistances(distances.cpu().numpy(), ids.numpy(), word_distance(student))


def word_distance(student: Student) -> float:
    """The median Euclidean distance between a word and the word nearest to it, of :data:`SAMPLE` words drawn at random."""
    if "word-distance" not in student.cache:
        table = student.embedding
        allowed = allowed_tokens(student.tokenizer, len(table))
        words = allowed.nonzero().squeeze(1)
        words = words[torch.randperm(len(words), generator=generator("yardstick", 0))[:SAMPLE]]
        _, away = nearest_tokens(table[words.to(table.device)], table, k=2, allowed=allowed)
        student.cache["word-distance"] = float(away[:, 1].median())  # the first is the word itself
    return student.cache["word-distance"]


def random_shift(learned: DistilledSet, start: DistilledSet, seed: int = 0, *, together: bool = True) -> DistilledSet:
    """The control of a learned set: each position of ``start`` shifted at random, as far as it moved while it was learned.

    Args:
        learned: a set that was learned from ``start``.
        start: the real examples.
        seed: of the directions.
        together: one direction for all positions of an example, which become alike; False: a direction for each position.

    Returns:
        the shifted set, whose positions are as far from those of ``start`` as those of ``learned`` are.

    Raises:
        ValueError: sets of different shape.
    """
    if learned.embeds.shape != start.embeds.shape:
        raise ValueError(f"learned has shape {tuple(learned.embeds.shape)}, start {tuple(start.embeds.shape)}; give the set "
                         "that learned was started from")
    examples, length, width = start.embeds.shape
    direction = torch.randn(examples, 1 if together else length, width, generator=generator("random-shift", seed))
    distance = (learned.embeds - start.embeds).norm(dim=-1, keepdim=True)
    return dataclasses.replace(start, embeds=start.embeds + distance * direction / direction.norm(dim=-1, keepdim=True),
                               tokens=None)


def attention(student: Student, examples: DistilledSet | Batch, params: Params | None = None) -> np.ndarray:
    """Attention weights of every head: row i of a matrix says where position i looks.

    Args:
        student: an encoder or a decoder.  One loaded with ``attention="sdpa"``, whose fused kernels never form the weights,
            is switched to ``"eager"`` for this one pass.
        examples: a distilled set, or a batch as :meth:`Student.logits` takes it.
        params: as :meth:`Student.init` returns them; default: the weights the student was loaded with.

    Returns:
        ``[examples, layers, heads, l, l]``, in the order of the examples' own positions (decoders are run with their padding
        in front).  Rows of present positions sum to 1; rows and columns of absent ones are 0.  That is
        examples · layers · heads · l² numbers: give a large set in parts.
    """
    if isinstance(examples, DistilledSet):
        examples.check_table(student)
        examples = {"inputs_embeds": examples.embeds, "attention_mask": examples.mask}
    kwargs, config = student._inputs(examples) | {"output_attentions": True}, student.module.config
    loaded_with, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            layers = torch.func.functional_call(student.module, params or {}, kwargs=kwargs).attentions
    finally:
        config._attn_implementation = loaded_with
    weights = torch.stack([layer.to(torch.promote_types(layer.dtype, torch.float32)) for layer in layers], 1)
    mask = examples["attention_mask"].to(student.device) != 0
    if student.causal:
        _, source = student._to_the_right(mask)
        place = source.argsort(1)[:, None, None]  # where each position of the examples stands in the pass
        weights = weights.take_along_dim(place[..., None], 3).take_along_dim(place[..., None, :], 4)
    present = mask[:, None, None, :, None] & mask[:, None, None, None, :]
    return (weights * present).cpu().numpy()


def attention_entropy(weights, mask) -> np.ndarray:
    """Entropy of each head's attention in nats, the mean over present positions: 0 looks at one place, ln l at all alike.

    Args:
        weights: ``[examples, layers, heads, l, l]``, as :func:`attention` returns them.
        mask: ``[examples, l]``, the present positions.

    Returns:
        ``[examples, layers, heads]``.
    """
    weights, mask = _weights(weights, mask)
    return _mean(entr(weights).sum(-1), mask[:, None, None])


def attention_shares(weights, mask, special) -> AttentionShares:
    """Where attention goes: means over present positions (Clark et al., 2019, "What does BERT look at?").

    Args:
        weights: ``[examples, layers, heads, l, l]``, as :func:`attention` returns them.
        mask: ``[examples, l]``, the present positions.
        special: ``[examples, l]``, the positions with special tokens (of a distilled set ``mask & ~free``).

    Returns:
        Shares of the weight, each ``[examples, layers, heads]`` in 0..1.  ``special`` and ``content`` add up to 1; ``own``,
        ``previous`` and ``next`` position are parts of the same whole, cut the other way.  Shares of the previous and of the
        next position are means over the positions that have one.
    """
    weights, mask = _weights(weights, mask)
    special = np.asarray(special, dtype=bool) & mask

    def at(offset: int) -> np.ndarray:
        """The mean weight on the position ``offset`` further on."""
        present = np.diagonal(mask[:, :, None] & mask[:, None, :], offset, axis1=1, axis2=2)
        return _mean(np.diagonal(weights, offset, axis1=-2, axis2=-1), present[:, None, None])

    def on(keys: np.ndarray) -> np.ndarray:
        return _mean((weights * keys[:, None, None, None, :]).sum(-1), mask[:, None, None])

    return AttentionShares(on(special), on(mask & ~special), at(0), at(-1), at(1))


def _weights(weights, mask) -> tuple[np.ndarray, np.ndarray]:
    weights, mask = np.asarray(weights, dtype=np.float64), np.asarray(mask, dtype=bool)
    if weights.ndim != 5 or weights.shape[0] != len(mask) or weights.shape[3:] != (mask.shape[1],) * 2:
        raise ValueError(
            f"weights of shape {weights.shape} do not fit a mask of shape {mask.shape}; they must be "
            "[examples, layers, heads, l, l] and [examples, l], as measures.attention and the set's mask are"
        )
    return weights, mask


def _mean(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The mean over the last axis of the values selected by ``where``; 0 where none is."""
    return (values * where).sum(-1) / where.sum(-1).clip(1)


def history(snapshots: Sequence[DistilledSet], student: Student) -> History:
    """How a set moved from its first snapshot on, which words its positions passed through, and how its labels changed.

    Args:
        snapshots: two or more states of one set in order; ``distiller.distilled`` is a copy.
        student: the model whose words are the nearest ones.

    Returns:
        ``steps [s]``, outer steps made at each snapshot (0, 1, 2, … where the sets do not record them);
        ``free [m, l]``, the learned positions;
        ``moved [s, m, l]``, Euclidean distance of each position from where it was at the first snapshot;
        ``tokens [s, m, l]``, the id of the nearest word of each free position, -1 elsewhere;
        ``flipped [s, m, l]``, whether that word differs from the one at the snapshot before, False at the first;
        ``away [s]``, the share of free positions whose nearest word differs from the one at the first snapshot;
        ``labels [s, m, c]``, the label probabilities, or None without soft labels.

    Raises:
        ValueError: fewer than two snapshots, snapshots that are not of one set, or not in ``student``'s embedding space.
    """
    if len(snapshots) < 2:
        raise ValueError(f"a history needs at least two snapshots, not {len(snapshots)}; keep distiller.distilled as it runs")
    first, free = snapshots[0], snapshots[0].free
    for place, snapshot in enumerate(snapshots):
        snapshot.check_table(student)
        if snapshot.embeds.shape != first.embeds.shape or not torch.equal(snapshot.free, free):
            raise ValueError(f"snapshot {place} is of another set: its embeddings {tuple(snapshot.embeds.shape)} or learned "
                             f"positions differ from those of snapshot 0, {tuple(first.embeds.shape)}")
    embeds = torch.stack([snapshot.embeds for snapshot in snapshots])
    allowed = allowed_tokens(student.tokenizer, len(student.embedding))
    tokens = torch.full(embeds.shape[:3], -1)
    nearest, _ = nearest_tokens(embeds[:, free].flatten(0, 1), student.embedding, allowed=allowed)
    tokens[:, free] = nearest.view(len(snapshots), -1)
    return History(
        steps=np.array([s.meta.get("recipe", {}).get("outer_steps", place) for place, s in enumerate(snapshots)]),
        free=free.numpy(),
        moved=(embeds - first.embeds).norm(dim=-1).numpy(),
        tokens=tokens.numpy(),
        flipped=np.diff(tokens, axis=0, prepend=tokens[:1]) != 0,
        away=(tokens != tokens[0])[:, free].double().mean(1).numpy(),
        labels=torch.stack([s.targets.softmax(-1) for s in snapshots]).numpy() if first.soft else None,
    )
