"""Learned embeddings in another model's space: each vector is described by words that both vocabularies have.

Embeddings belong to one table.  Nearest-token projection makes them portable and loses most of what was learned.  The
alternative are *anchors*, words that are a single token for both tokenizers.  Anchor i has a vector x_i in the source's table
and y_i in the target's.  A learned vector x is described by its whitened inner products with the anchors,

    r_i(x) = (x_i − μ)ᵀ Σ⁻¹ (x − μ),        μ, Σ: mean and covariance of the x_i,

and carried to y = ν + (1/n) Σ_i r_i(x) (y_i − ν), where ν is the mean of the y_i.  This is the linear map that takes the
source's anchors to the target's with the least squared error; where one table is a rotation of the other, it is that rotation.
That relations to anchors can carry learned prompts is the idea of *Zero-shot continuous prompt transfer* (arXiv 2310.01691),
which describes by cosines and searches for the vector by gradient descent.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.examples import embed, framed, special_frame
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.io.checks import check_are, require


def shared_words(source, target) -> tuple[list[str], list[int], list[int]]:
    """Words that are a single token for both tokenizers, as they stand inside a sentence, and their ids in each.

    Args:
        source, target: tokenizers.
    """
    pieces = source.batch_decode([[number] for number in range(len(source))], skip_special_tokens=True)
    words = sorted({piece.strip() for piece in pieces if piece.strip().isalpha()})
    of_source, of_target = single_tokens(source, words), single_tokens(target, words)
    shared = [word for word in words if word in of_source and word in of_target]
    return shared, [of_source[word] for word in shared], [of_target[word] for word in shared]


def single_tokens(tokenizer, words: list[str]) -> dict[str, int]:
    """The id of each word that is one token behind a space, or (where a tokenizer writes the space itself) at the beginning."""
    ids: dict[str, int] = {}
    for space in ("", " "):  # the last one counts
        encoded = tokenizer([space + word for word in words], add_special_tokens=False)["input_ids"]
        ids |= {word: row[0] for word, row in zip(words, encoded, strict=True)
                if len(row) == 1 and row[0] != tokenizer.unk_token_id}
    return ids


def anchor_map(source: Tensor, target: Tensor, vectors: Tensor) -> tuple[Tensor, float]:
    """Vectors of the source's space in the target's.

    Args:
        source: anchors ``[n, d]``.
        target: the same anchors ``[n, e]``.
        vectors: ``[…, d]``.

    Returns:
        ``[…, e]``, and the share of the variance of ``target`` that the map of ``source`` explains, in [0, 1].
    """
    source, target = source.double(), target.double()
    mean, new_mean = source.mean(0), target.mean(0)
    matrix = torch.linalg.lstsq(source - mean, target - new_mean, driver="gelsd").solution
    rest = (source - mean) @ matrix + new_mean - target
    explained = 1 - float(rest.square().sum() / (target - new_mean).square().sum())
    return (vectors.double() - mean) @ matrix + new_mean, explained


def carry_over(distilled: DistilledSet, task: Task, student: Student, source: Student) -> DistilledSet:
    """A set's embeddings in the space of another student, between that student's own special tokens.

    Args:
        distilled: a set of ``source``, learned or of text; sentences longer than ``student`` can read lose positions behind,
            prompts in front, as text does.
        task: the task it was made for.
        student: the student to carry it to.
        source: the student it was made with.

    Returns:
        a set with the same labels, without tokens, step sizes, recipe or attention labels.  ``meta["carried"]`` names the
        source, the number of ``anchors``, the share of variance ``explained``, and the positions ``cut``.

    Raises:
        ValueError: a set of another table, or tokenizers that share fewer words than the source's embeddings have numbers.
    """
    check_are(distilled=(distilled, DistilledSet), task=(task, Task), student=(student, Student), source=(source, Student))
    distilled.check_table(source)
    distilled = distilled.in_classes(task.classes, f"task {task.name!r}")
    words, old, new = shared_words(source.tokenizer, student.tokenizer)
    require(len(words) >= source.width, f"the tokenizers of {source.name!r} and {student.name!r} share {len(words)} words, "
            f"fewer than the {source.width} numbers of an embedding; move text instead (method='text')")
    old_rows, new_rows = (embed(model, torch.tensor(ids)) for model, ids in ((source, old), (student, new)))
    before, after = special_frame(student.tokenizer)
    after = [] if task.kind == "instruction" else after
    room = min(task.max_length, student.max_positions) - len(before) - len(after)
    labels = distilled.meta["responses"] if task.kind == "instruction" else distilled.label_names()
    frame = DistilledSet.from_text(["a"] * len(distilled), labels, task, student, soft_labels=False)
    counts = distilled.free.sum(1).clamp(max=room)
    mask, free = framed(counts, len(before), len(after))
    embeds = torch.zeros(*mask.shape, student.width, dtype=frame.embeds.dtype)
    specials = embed(student, torch.tensor([*before, *after], dtype=torch.long))
    vectors, explained = anchor_map(old_rows, new_rows, distilled.embeds)
    for row, count in enumerate(counts.tolist()):
        body = vectors[row][distilled.free[row]]
        body = (body[-count:] if task.kind == "instruction" else body[:count]).to(embeds)
        embeds[row][mask[row]] = torch.cat([specials[: len(before)], body, specials[len(before) :]])
    meta = {key: value for key, value in frame.meta.items() if key != "text"}
    carried = {"from": source.name, "anchors": len(words), "explained": round(explained, 4),
               "cut": int(distilled.free.sum() - counts.sum())}
    targets = frame.targets if task.kind == "instruction" else distilled.targets.clone()
    return dataclasses.replace(frame, embeds=embeds, mask=mask, free=free, targets=targets, tokens=None,
                               meta=meta | {"carried": carried})
