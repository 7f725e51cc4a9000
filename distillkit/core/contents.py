"""What a distilled set may hold.

A set comes from a stranger's file as easily as from a run of one's own, and right sums say nothing about its contents: a
NaN trains to a score of zero, and a class that does not exist ends in an error deep inside torch.  So every set is checked
when it is made, whoever makes it: the shapes, types and values of its tensors, and the types of what its ``meta`` says.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distillkit.data.tasks import NO_TARGET

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_VOCABULARY = 2**24  # more than any tokenizer has
SHA256 = re.compile("([0-9a-f]{64})?")
DEEPEST = 32  # levels of dictionaries and lists in ``meta``


def check_inputs(embeds: Tensor, mask: Tensor, free: Tensor, tokens: Tensor | None) -> None:
    """Raise ValueError unless embeddings, masks and token ids have the shapes and values that a set's may have."""
    _demand(embeds.ndim == 3 and embeds.dtype in FLOATS, "embeds must be floats [m, l, d]", embeds)
    _demand(embeds.numel() > 0, "embeds must hold an example, a position and a coordinate at least", embeds)
    _demand(bool(embeds.isfinite().all()), "embeds must be finite", embeds, ~embeds.isfinite())
    parts = {"mask": mask, "free": free} | ({} if tokens is None else {"tokens": tokens})
    for name, value in parts.items():
        if value.shape != embeds.shape[:2]:
            raise ValueError(f"shapes disagree with embeds {tuple(embeds.shape)}: {name} {tuple(value.shape)}")
    for name, value in (("mask", mask), ("free", free)):
        _demand(value.dtype == torch.bool, f"{name} must be True or False at each position", value)
    _demand(bool(mask.any(1).all()), "mask must leave a position of each example", mask, ~mask.any(1))
    _demand(not bool((free & ~mask).any()), "free must lie within mask; give free & mask", free, free & ~mask)
    if tokens is not None:
        _demand(tokens.dtype in (torch.int32, torch.int64), "tokens must be whole numbers", tokens)
        outside = (tokens < 0) | (tokens >= LARGEST_VOCABULARY)
        _demand(not bool(outside.any()), f"tokens must be ids from 0 to {LARGEST_VOCABULARY - 1}", tokens, outside)


def check_targets(targets: Tensor, examples: int, classes: int) -> None:
    """Raise ValueError unless targets are labels among ``classes`` (0: nobody has told their number), or responses."""
    if targets.shape[:1] != (examples,):
        raise ValueError(f"shapes disagree: there are {examples} examples, and targets {tuple(targets.shape)}")
    if targets.dtype in FLOATS:
        _demand(targets.ndim == 2 and targets.shape[1] > 0 and classes in (0, targets.shape[1]),
                f"soft targets must be [m, {classes or 'c'}], a logit of each class", targets)
        _demand(bool(targets.isfinite().all()), "targets must be finite", targets, ~targets.isfinite())
        return
    _demand(targets.dtype == torch.int64 and targets.ndim in (1, 2),
            "targets must be logits [m, c], int64 classes [m] or int64 response ids [m, r]", targets)
    if targets.ndim == 1:
        outside = (targets < 0) | (targets >= (classes or LARGEST_VOCABULARY))
        most = classes - 1 if classes else "c − 1"
        _demand(not bool(outside.any()), f"targets must be classes from 0 to {most}", targets, outside)
        return
    present = targets != NO_TARGET
    _demand(not classes and bool(present.any(1).all()),
            "responses must hold a token for each example, and belong to a set without classes", targets)
    outside = present & ((targets < 0) | (targets >= LARGEST_VOCABULARY))
    _demand(not bool(outside.any()), f"response ids must be from 0 to {LARGEST_VOCABULARY - 1}, filled up with {NO_TARGET}",
            targets, outside)


def check_attention(attention: Tensor, examples: int, length: int) -> None:
    """Raise ValueError unless attention labels are finite logits of every position, for each example, layer and head."""
    fits = attention.ndim == 4 and attention.dtype in FLOATS and attention.numel() > 0
    _demand(fits and (len(attention), attention.shape[-1]) == (examples, length),
            f"attention must be floats [{examples}, layers, heads, {length}]", attention)
    _demand(bool(attention.isfinite().all()), "attention must be finite", attention, ~attention.isfinite())


def check_step_sizes(step_sizes: Tensor) -> None:
    """Raise ValueError unless step sizes are finite and above 0, one at least."""
    floats = step_sizes.ndim == 1 and len(step_sizes) > 0 and step_sizes.dtype in FLOATS
    _demand(floats, "step_sizes must be floats [t]", step_sizes)
    wrong = ~(step_sizes.isfinite() & (step_sizes > 0))
    _demand(not bool(wrong.any()), "step_sizes must be positive and finite", step_sizes, wrong)


def _demand(fits: bool, rule: str, value: Tensor, wrong: Tensor | None = None) -> None:
    """Raise ValueError with the ``rule`` unless a tensor ``fits``, by its type and shape or by the first ``wrong`` place."""
    if not fits and wrong is None:
        raise ValueError(f"{rule}, not {value.dtype} {tuple(value.shape)}")
    if not fits:
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{rule}; at {list(place)} (counted from 0) it is {value[place].tolist()}")


def check_meta(meta: Mapping[str, Any], examples: int) -> None:
    """Raise ValueError unless what ``meta`` says has the types and lengths that readers of a set rely on."""
    recipe, classes = meta.get("recipe"), meta.get("classes")
    number = len(classes) if _strings(classes) else 0
    distiller = recipe.get("distiller") if isinstance(recipe, dict) else None

    def rows_of(value: Any, end: int) -> bool:
        return _wholes(value, end) and len(value) == examples

    rules: list[tuple[Any, str, str, Callable[[Any], bool]]] = [
        *((meta, key, "text", lambda v: isinstance(v, str)) for key in ("task", "task_fingerprint", "student")),
        (meta, "table_sha256", "64 hexadecimal digits", lambda v: isinstance(v, str) and bool(SHA256.fullmatch(v))),
        (meta, "classes", "a list of different names", lambda v: _strings(v) and len({*v}) == len(v)),
        # An instruction set has an empty list of labels.
        (meta, "labels", f"a number of a class for each of {examples} examples",
         lambda v: rows_of(v, number or LARGEST_VOCABULARY) or v in ([], ()) and not number),
        *((meta, key, f"a text for each of {examples} examples", lambda v: _strings(v) and len(v) == examples)
          for key in ("text", "responses")),
        (meta, "rows", f"a row of the corpus for each of {examples} examples", lambda v: rows_of(v, 2**62)),
        *((meta, key, "a dictionary", lambda v: isinstance(v, dict))
          for key in ("recipe", "selection", "search", "projection", "retokenized")),
        *((recipe, key, "a dictionary", lambda v: isinstance(v, dict)) for key in ("optimizer", "distiller")),
        (distiller, "learn", "a list of names", _strings),
        (meta, "parts", f"parts of {examples} examples in all", lambda v: _parts(v, examples)),
    ]
    for values, key, what, fits in rules:
        if isinstance(values, Mapping) and key in values and not fits(values[key]):
            raise ValueError(f"meta: {key} must be {what}, not {reprlib.repr(values[key])}")


def check_depth(value: Any) -> None:
    """Raise ValueError where JSON values are nested so deeply that copying or writing them would fail."""
    level = [value]
    for _ in range(DEEPEST):
        level = [part for one in level if isinstance(one, dict | list)
                 for part in (one.values() if isinstance(one, dict) else one)]
    if level:
        raise ValueError(f"meta is nested more than {DEEPEST} levels deep")


def _strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _wholes(value: Any, end: int) -> bool:
    return isinstance(value, list | tuple) and all(type(one) is int and 0 <= one < end for one in value)


def _parts(value: Any, examples: int) -> bool:
    """Whether a value is a list of merged parts with a source, examples, a recipe and step sizes each."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return False
    plain = all(
        isinstance(part.get("source"), str) and type(part.get("examples")) is int and part["examples"] > 0
        and isinstance(part.get("recipe"), dict | None) and isinstance(part.get("step_sizes"), list | None)
        and all(type(size) is float and 0 < size < math.inf for size in part.get("step_sizes") or ())
        for part in value
    )
    return plain and sum(part["examples"] for part in value) == examples
