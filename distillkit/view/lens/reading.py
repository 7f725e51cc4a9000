"""A text as two tokenizers cut it: where both begin a piece at the same place, and what the second one does not read.

Text is what moves from one model to another (:mod:`distillkit.applications.transfer`), and the other model cuts it into tokens
of its own.  Both cuts are compared on the characters of the text, so that they can be drawn one under the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from distillkit.core.distilled import DistilledSet
from distillkit.core.examples import special_frame
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.io.escaping import one_line
from distillkit.view.lens.film import ABSENT

SPACES = str.maketrans({" ": "␣", "▁": "␣", "\n": "⏎"})  # of tokens, which would be unseen


class Piece(NamedTuple):
    """A token: the characters ``start`` to ``end`` of its text, and whether the model reads them as they are."""

    start: int
    end: int
    read: bool


class Stretch(NamedTuple):
    """Positions whose text both tokenizers begin and end at the same characters; a position without text stands alone.

    Attributes:
        positions: of the first tokenizer's tokens.
        pieces: the text of the second one's, and whether each is read.
        alike: both have one piece here, or none.
    """

    positions: list[int]
    pieces: list[tuple[str, bool]]
    alike: bool


def words(tokenizer, ids: np.ndarray | Sequence[int]) -> list[str]:
    """Tokens as one reads them: byte-level ones as text, with a sign for a space or a new line; nothing for :data:`ABSENT`."""
    tokens = tokenizer.convert_ids_to_tokens(np.maximum(ids, 0).tolist())
    texts = [token if token.isascii() or token[0] == "▁" else tokenizer.convert_tokens_to_string([token]) for token in tokens]
    return ["" if i == ABSENT else _visible(text) for text, i in zip(texts, ids)]


def pieces(tokenizer, text: str, limit: int | None = None) -> list[Piece]:
    """The tokens of ``text`` without special ones.

    Args:
        tokenizer: a fast one, which knows the characters of its tokens.
        limit: how many tokens are read, the first ones, or the last ones if it is negative.  Default: all.

    Returns:
        A piece per token, without the spaces around its letters.  A piece is not read where the token is the tokenizer's
        unknown token or beyond the limit.  Tokens that share characters, such as the bytes of a rare letter, are one piece.
    """
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = range(len(coded["input_ids"]))
    within = places[limit:] if limit is not None and limit < 0 else places[:limit]
    result: list[Piece] = []
    for place, token, (start, end) in zip(places, coded["input_ids"], coded["offset_mapping"], strict=True):
        if text[start:end].strip():
            start += len(text[start:end]) - len(text[start:end].lstrip())
            end = start + len(text[start:end].rstrip())
        read = token != tokenizer.unk_token_id and place in within
        if result and start < result[-1].end:
            result[-1] = Piece(result[-1].start, max(end, result[-1].end), read and result[-1].read)
        elif start < end:
            result.append(Piece(start, end, read))
    return result


def room(text: str, label: str, task: Task, reader: Student) -> int:
    """How many tokens of a moved text ``reader`` reads, as a ``limit`` of :func:`pieces`; prompts are cut in front.

    Args:
        text, label: of an example; a class, or the response to the prompt, which needs room too.
        task, reader: as :func:`~distillkit.applications.transfer.retokenize` takes them.
    """
    prompt = task.kind == "instruction"
    length = task.max_length if prompt else min(task.max_length, reader.max_positions)
    moved = DistilledSet.from_text([text], [label], task, reader, length=length, soft_labels=False)
    tokens = int(moved.mask.sum()) - sum(map(len, special_frame(reader.tokenizer)))
    return -tokens if prompt else tokens


def stretches(tokenizer, ids: np.ndarray, reader, limit: Callable[[str], int] | None = None) -> list[Stretch]:
    """The text of tokens as another tokenizer cuts it.

    Args:
        tokenizer, ids: whose tokens, and the tokens ``[l]``, special ones and :data:`ABSENT` included.
        reader: the other tokenizer.
        limit: what :func:`pieces` takes, for the text.

    Returns:
        All positions in order.
    """
    fixed = np.isin(ids, [ABSENT, *tokenizer.all_special_ids])
    places, tokens = np.flatnonzero(~fixed), ids[~fixed].tolist()
    text = tokenizer.decode(tokens)
    # A token ends where the text of the tokens up to it ends; the bytes of a letter end together.
    lengths = [len(tokenizer.decode(tokens[: n + 1])) for n in range(len(tokens))]
    ends = np.maximum.accumulate(np.array(lengths, dtype=int))
    letters = [bool(text[start:end].strip()) for start, end in zip([0, *ends], ends)]
    parts = pieces(reader, text, limit(text) if limit and text.strip() else None)
    shown = [text[part.start : part.end] for part in parts]
    others = np.array([part.end for part in parts], dtype=int)
    cuts = np.intersect1d(ends, others)[:-1]  # what is behind the last one goes with it
    result = [Stretch([place], [], True) for place in np.flatnonzero(fixed).tolist()]
    token_stretch, piece_stretch = np.searchsorted(cuts, ends), np.searchsorted(cuts, others)
    for number in range(len(cuts) + 1 if tokens else 0):
        inside, read = np.flatnonzero(token_stretch == number), np.flatnonzero(piece_stretch == number)
        counts = sum(letters[n] for n in inside), sum(bool(shown[n].strip()) for n in read)
        result.append(Stretch(places[inside].tolist(), [(_visible(shown[n]), parts[n].read) for n in read],
                              counts[0] == counts[1] <= 1))
    return sorted(result)


def _visible(text: str) -> str:
    return one_line(text.translate(SPACES), 40)
