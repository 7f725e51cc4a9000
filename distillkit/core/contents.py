"""What a distilled set may hold.

A set comes from a stranger's folder as easily as from a run of one's own, and right sums say nothing about its contents: a
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
DEEPEST = 32  # levels of dictionaries and lists in ``meta``


def check_shapes(embeds: Tensor, mask: Tensor, free: Tensor, targets: Tensor, tokens: Tensor | None) -> None:
    """Raise ValueError unless the shapes of a set's tensors agree."""
    if embeds.ndim != 3 or embeds.dtype not in FLOATS:
        raise ValueError(f"embeds must be floats [m, l, d], not {embeds.dtype} {tuple(embeds.shape)}")
    if 0 in embeds.shape:
        raise ValueError(f"embeds must hold an example, a position and a coordinate at least, not {tuple(embeds.shape)}")
    parts = {"mask": mask, "free": free} | ({} if tokens is None else {"tokens": tokens})
    wrong = {name: value for name, value in parts.items() if value.shape != embeds.shape[:2]}
    wrong |= {"targets": targets} if targets.shape[:1] != embeds.shape[:1] else {}
    if wrong:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in wrong.items())
        raise ValueError(f"shapes disagree with embeds {tuple(embeds.shape)}: {shapes}")


def check_inputs(embeds: Tensor, mask: Tensor, free: Tensor, tokens: Tensor | None) -> None:
    """Raise ValueError unless embeddings, masks and token ids hold what a set's may hold."""
    if not bool(embeds.isfinite().all()):
        example, position, _ = (~embeds.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"embeds must be finite, and example {example}, position {position} is not")
    for name, value in (("mask", mask), ("free", free)):
        if value.dtype != torch.bool:
            raise ValueError(f"{name} must be True or False at each position, not {value.dtype}")
    if not bool(mask.any(1).all()):
        raise ValueError(f"mask must leave a position of each example, and leaves none of {int((~mask.any(1)).nonzero()[0])}")
    if bool((free & ~mask).any()):
        example, position = (free & ~mask).nonzero()[0].tolist()
        raise ValueError(f"free must lie within mask, and example {example}, position {position} does not; give free & mask")
    if tokens is None:
        return
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens must be whole numbers, not {tokens.dtype}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= LARGEST_VOCABULARY:
        raise ValueError(f"tokens must be ids from 0 to {LARGEST_VOCABULARY - 1}, not {int(tokens.min())} to "
                         f"{int(tokens.max())}")


def check_targets(targets: Tensor, classes: int) -> None:
    """Raise ValueError unless targets are labels among ``classes`` (0: nobody has told their number), or responses."""
    if targets.dtype in FLOATS:
        if targets.ndim != 2 or not targets.shape[1] or classes not in (0, targets.shape[1]):
            raise ValueError(f"soft targets must be [m, {classes or 'c'}], a logit of each class, not {tuple(targets.shape)}")
        if not bool(targets.isfinite().all()):
            example = int((~targets.isfinite()).nonzero()[0, 0])
            raise ValueError(f"targets must be finite, and those of example {example} are not")
        return
    if targets.dtype != torch.int64 or targets.ndim not in (1, 2):
        raise ValueError(f"targets must be logits [m, c], int64 classes [m] or int64 response ids [m, r], not {targets.dtype} "
                         f"{tuple(targets.shape)}")
    if targets.ndim == 1:
        if int(targets.min()) < 0 or classes and int(targets.max()) >= classes:
            raise ValueError(f"targets must be classes from 0 to {classes - 1 if classes else 'c − 1'}, not "
                             f"{int(targets.min())} to {int(targets.max())}")
        return
    said = targets != NO_TARGET
    if classes or not bool(said.any(1).all()):
        raise ValueError("responses must hold a token for each example, and belong to a set without classes")
    if int(targets[said].min()) < 0 or int(targets[said].max()) >= LARGEST_VOCABULARY:
        raise ValueError(f"response ids must be from 0 to {LARGEST_VOCABULARY - 1}, filled up with {NO_TARGET}")


def check_step_sizes(step_sizes: Tensor) -> None:
    """Raise ValueError unless step sizes are finite and above 0, one at least."""
    if step_sizes.ndim != 1 or not len(step_sizes) or step_sizes.dtype not in FLOATS:
        raise ValueError(f"step_sizes must be floats [t], not {step_sizes.dtype} {tuple(step_sizes.shape)}")
    if not bool((step_sizes.isfinite() & (step_sizes > 0)).all()):
        raise ValueError(f"step_sizes must be positive and finite, not {step_sizes[:8].tolist()}")


def check_meta(meta: Mapping[str, Any], examples: int) -> None:
    """Raise ValueError unless what ``meta`` says has the types and lengths that readers of a set rely on."""
    _demand(meta, ("task", "task_fingerprint", "student"), "text", lambda v: isinstance(v, str))
    _demand(meta, ("table_sha256",), "64 hexadecimal digits",
            lambda v: isinstance(v, str) and re.fullmatch("([0-9a-f]{64})?", v) is not None)
    _demand(meta, ("classes",), "a list of different names", lambda v: _strings(v) and len(set(v)) == len(v))
    classes = len(meta.get("classes", ()))
    _demand(meta, ("labels",), f"a number of a class for each of {examples} examples",  # an instruction set has an empty list
            lambda v: _wholes(v, classes or LARGEST_VOCABULARY) and (len(v) == examples or not v and not classes))
    _demand(meta, ("text", "responses"), f"a text for each of {examples} examples",
            lambda v: _strings(v) and len(v) == examples)
    _demand(meta, ("rows",), f"a row of the corpus for each of {examples} examples",
            lambda v: _wholes(v, 2**62) and len(v) == examples)
    _demand(meta, ("recipe", "selection", "search", "projection", "retokenized"), "a dictionary", lambda v: isinstance(v, dict))
    recipe = meta.get("recipe", {})
    _demand(recipe, ("optimizer", "distiller"), "a dictionary", lambda v: isinstance(v, dict))
    _demand(recipe.get("distiller", {}), ("learn",), "a list of names", _strings)
    _demand(meta, ("parts",), f"parts of {examples} examples in all", lambda v: _parts(v, examples))


def check_depth(value: Any) -> None:
    """Raise ValueError where JSON values are nested so deeply that copying or writing them would fail."""
    level = [value]
    for _ in range(DEEPEST):
        level = [part for one in level if isinstance(one, dict | list)
                 for part in (one.values() if isinstance(one, dict) else one)]
    if level:
        raise ValueError(f"meta is nested more than {DEEPEST} levels deep")


def _demand(values: Mapping[str, Any], keys: tuple[str, ...], what: str, fits: Callable[[Any], bool]) -> None:
    """Raise ValueError unless each of ``keys`` that there is among ``values`` has a value that ``fits``."""
    for key in keys:
        if key in values and not fits(values[key]):
            raise ValueError(f"meta: {key} must be {what}, not {reprlib.repr(values[key])}")


def _strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _wholes(value: Any, end: int) -> bool:
    return isinstance(value, list | tuple) and all(type(one) is int and 0 <= one < end for one in value)


def _parts(value: Any, examples: int) -> bool:
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return False
    plain = all(
        isinstance(part.get("source"), str) and type(part.get("examples")) is int and part["examples"] > 0
        and isinstance(part.get("recipe"), dict | None) and _sizes(part.get("step_sizes"))
        for part in value
    )
    return plain and sum(part["examples"] for part in value) == examples


def _sizes(value: Any) -> bool:
    """Whether a value is None or a list of step sizes."""
    return value is None or isinstance(value, list) and all(type(one) is float and 0 < one < math.inf for one in value)
