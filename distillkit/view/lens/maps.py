"""Words and learned positions in one plane for all frames of a film, with numbers that say what to believe of it.

A projection is fitted once, on words alone, and learned positions are placed in it, so that no frame moves the others.  UMAP
(McInnes et al., 2018) is fitted on fewer words than PCA, those of the real text first, because it is slow.  The numbers are of
the original space: :func:`own_class`; and of the map: the share of neighbours that it keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.student import Student
from distillkit.io.checks import check_choice
from distillkit.io.seeds import generator
from distillkit.text.projection import allowed_tokens
from distillkit.view.lens.film import ABSENT, Film
from distillkit.view.measures import MAPS, fitted_umap, neighbour_overlap, preservation, random_shift

WORDS = {"pca": 30_000, "umap": 3_000}  # the most words that are on a map
SAMPLE = 300  # words, and as many learned positions, whose neighbours are counted
CLOSE = 10  # neighbours that are counted


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """A flat map.

    Attributes:
        method: ``"pca"`` or ``"umap"``.
        words: ids ``[n]`` of the words on it.
        background: ``[n, 2]``, where they are.
        points: ``[f, p, 2]``, where the learned positions are in each frame; NaN where a frame lacks one.
        place: from points ``[n, d]`` to the plane ``[n, 2]``: the fitted projection.
        preserved: frame → share of the :data:`CLOSE` nearest neighbours of words and learned positions that are neighbours on
            the map; of the last step of a run, of each of several sets.
        shuffled: the share that a map in random order keeps.
    """

    method: str
    words: np.ndarray
    background: np.ndarray
    points: np.ndarray
    place: Callable[[np.ndarray], np.ndarray]
    preserved: dict[int, float]
    shuffled: float

    def at(self, token: int, student: Student) -> np.ndarray:
        """Where a word is, ``[2]``, on the map or not."""
        spot = np.flatnonzero(self.words == token)
        return self.background[spot[0]] if len(spot) else self.place(student.embedding[[token]].float().cpu().numpy())[0]

    def with_frames(self, film: Film) -> Map:
        """This map with the further frames of a longer film."""
        more = _placed(film, range(len(self.points), len(film.sets)), self.place)
        return dataclasses.replace(self, points=np.concatenate([self.points, more]))


def words_for(film: Film, student: Student, real: DistilledSet | None, most: int) -> Tensor:
    """Ids of at most ``most`` words, sorted: the nearest ones of the film, those of ``real``, and others at random."""
    allowed = allowed_tokens(student.tokenizer, len(student.embedding))
    first = torch.from_numpy(np.unique(film.tokens[film.tokens != ABSENT]))
    if real is not None and real.tokens is not None:
        first = torch.cat([first, real.tokens[real.mask]]).unique()
    first = first[allowed[first]]
    others = allowed.clone()
    others[first] = False
    rest = others.nonzero().squeeze(1)
    rest = rest[torch.randperm(len(rest), generator=generator("lens-words", 0))[: max(0, most - len(first))]]
    return torch.cat([first, rest]).sort().values


def make_map(film: Film, student: Student, method: str = "pca", *, real: DistilledSet | None = None, seed: int = 0) -> Map:
    """Lay out a film.

    Args:
        film: of a set in ``student``'s embedding space.
        method: ``"pca"`` or ``"umap"``.
        real: real text, whose words are on the map.
        seed: of UMAP.

    Raises:
        ValueError: an unknown method.
    """
    check_choice("method", method, MAPS)
    words = words_for(film, student, real, WORDS[method])
    rows = student.embedding[words.to(student.device)].float().cpu().numpy()
    if method == "pca":
        model = PCA(2, svd_solver="covariance_eigh").fit(rows)
        background = model.transform(rows)
    else:
        model = fitted_umap(rows, seed)
        background = model.embedding_
    points = _placed(film, range(len(film.sets)), model.transform)
    preserved, last = {}, len(points) - 1
    for frame in range(last + 1) if film.choices else [last]:
        present = np.flatnonzero(np.isfinite(points[frame]).all(1))
        space = np.concatenate([rows, film.embeds(frame).numpy()[present]])
        flat = np.concatenate([background, points[frame][present]])
        k, draw = min(CLOSE, len(space) - 1), np.random.default_rng(seed)
        counted = np.concatenate([draw.permutation(part)[:SAMPLE] for part in np.split(np.arange(len(space)), [len(rows)])])
        preserved[frame] = preservation(space, flat, k, rows=counted)
    return Map(method, words.numpy(), np.asarray(background, np.float32), points, model.transform, preserved,
               k / (len(space) - 1))


def _placed(film: Film, frames: Iterable[int], place: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Where the learned positions of frames are, ``[f, p, 2]``; NaN where a frame lacks one."""
    embeds = np.stack([film.embeds(frame).numpy() for frame in frames])
    points = np.full((*embeds.shape[:2], 2), np.nan, dtype=np.float32)
    present = np.isfinite(embeds).all(2)
    if present.any():
        points[present] = place(embeds[present])  # at once: UMAP takes as long for ten points as for a thousand
    return points


def own_class(film: Film, frame: int, classes: Sequence[int]) -> dict[str, float] | None:
    """How many of a learned position's nearest positions in *other* examples are of its class.

    Args:
        film: whose first frame is where learning started.
        frame: which one.
        classes: of each example.

    Returns:
        the ``share``, its expectation by ``chance``, and the share of a ``control`` whose positions are each moved as far in a
        random direction (:func:`~distillkit.view.measures.random_shift` apart; NaN in the first frame and for sets of other
        shapes or other rows); None where no class has two examples.
    """
    state, start = film.sets[frame], film.sets[0]
    if len(set(classes)) == len(classes) or len(classes) != len(state):
        return None
    owners = state.free.nonzero()[:, 0].numpy()
    groups = np.asarray(classes)[owners]
    k = min(CLOSE, len(owners) - int(np.bincount(owners).max()))

    def counted(some: DistilledSet):
        return neighbour_overlap(some.embeds[some.free], groups, k, metric="l2", owners=owners)

    overlap, control = counted(state), float("nan")
    moved = state is not start and state.meta.get("rows") == start.meta.get("rows")
    if moved and state.embeds.shape == start.embeds.shape and torch.equal(state.free, start.free):
        control = counted(random_shift(state, start, together=False)).share
    return {"share": overlap.share, "chance": overlap.chance, "control": control}
