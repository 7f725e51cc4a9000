"""The state of Lens as the front end gets it once: JSON, and the buffer that its arrays lie in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distillkit.core.distilled import DistilledSet
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.io.escaping import one_line
from distillkit.text.projection import corpus_tokens
from distillkit.view.figures import ROLE_COLOURS
from distillkit.view.lens import panes, still
from distillkit.view.lens.film import ABSENT, Film
from distillkit.view.lens.maps import Map
from distillkit.view.lens.reading import words
from distillkit.view.lens.wire import packed, scaled


def contents(film: Film, maps: Mapping[str, Map], real: DistilledSet, student: Student, task: Task | None, *,
             judge, reader: Student | None) -> tuple[dict, bytes]:
    """The state as JSON, and the buffer that its ``arrays`` (name → type, shape, first byte) lie in."""
    real_tokens = tokens_of(real, film)
    ids = np.unique(np.concatenate([film.tokens.ravel(), real_tokens.ravel(), *(flat.words for flat in maps.values())]))
    ids = ids[ids != ABSENT]

    def indices(tokens: np.ndarray) -> np.ndarray:
        return np.where(tokens == ABSENT, ABSENT, np.searchsorted(ids, tokens)).astype(np.int32)

    classes, labels, probabilities = panes.common_labels(film.sets)
    in_text = np.isin(ids, corpus_tokens(task, student, least=1).nonzero() if task is not None else real_tokens)
    arrays = {"tokens": indices(film.tokens), "distances": film.distances.astype(np.float32),
              "moved": film.moved.astype(np.float32), "learned": film.learned.astype(np.uint8),
              "labels": labels.astype(np.int32), "in_text": in_text.astype(np.uint8), "real": indices(real_tokens)}
    shown = {}
    for method, flat in maps.items():
        places, scale = scaled(method, flat.background, flat.points)
        arrays |= {f"{method}.words": indices(flat.words), **places}
        shown[method] = {"preserved": flat.preserved, "shuffled": flat.shuffled, "scale": scale}
    content = {
        "frames": list(film.names), "choices": film.choices, "words": "\n".join(words(student.tokenizer, ids)),
        "classes": [one_line(name, 60) for name in classes], "maps": shown, "yardstick": film.yardstick,
        "has_judge": judge is not None, "reader": reader and one_line(reader.name, 40),
        "classifies": student.kind == "classification",
        "probabilities": [None if p is None else np.round(p.tolist(), 4).tolist() for p in probabilities],
        "colours": ROLE_COLOURS | {"classes": still.CLASS_COLOURS},
    }
    return packed(content, arrays)


def tokens_of(real: DistilledSet, film: Film) -> np.ndarray:
    """The tokens ``[m, l]`` of the real text, nearest words where it has none; -1 for an absent position."""
    tokens = film.tokens[0, : len(real), : real.mask.shape[1]] if real.tokens is None else real.tokens.numpy()
    return np.where(real.mask, tokens, ABSENT)
