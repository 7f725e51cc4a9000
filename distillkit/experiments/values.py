"""Whether a value is what a setting's annotation says: the types that settings use, and limits beside them.

Settings come from YAML, which has lists where Python has tuples, and whole numbers where a float is meant.  These two are
converted; nothing else is, so that text is never taken for a number, nor true for 1.
"""

from __future__ import annotations

import collections.abc
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

LIMITS: dict[str, Callable] = {  # of a value; whether it holds
    "ge": lambda value, least: value >= least,
    "gt": lambda value, least: value > least,
    "le": lambda value, most: value <= most,
    "finite": lambda value, _: abs(value) < float("inf"),
    "least": lambda value, least: len(value) >= least,
    "most": lambda value, most: len(value) <= most,
    "seeds": lambda value, _: value and len({*value}) == len(value),  # one that is repeated would pass for a spread of 0
    "pattern": lambda value, pattern: re.search(pattern, value),
}
WORDS = {"ge": "be greater than or equal to {}", "gt": "be greater than {}", "le": "be at most {}",
         "finite": "be finite",
         "least": "have at least {} item(s)", "most": "have at most {} characters",
         "seeds": "name at least one seed, each once", "pattern": "match pattern '{}'"}
NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


class Misfit(ValueError):
    """What a value must do or be, in words that follow "must", and the value that does not."""

    def __init__(self, demand: str, value: Any):
        super().__init__(f"{demand}, not {reprlib.repr(value)}")
        self.value = value


def fitted(value: Any, kind: Any) -> Any:
    """The value as the annotation ``kind`` has it.

    ``kind`` is a type of :data:`NAMES`, ``tuple``, ``dict`` or ``Mapping``, with or without the kinds of their parts,
    ``Literal``, a union of such, or ``Annotated`` with limits, ``("ge", 1)``.

    Raises:
        Misfit: it does not fit.
    """
    base, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if base is typing.Annotated:
        value = fitted(value, parts[0])
        within(value, dict(parts[1:]))
        return value
    if base in (typing.Union, types.UnionType):
        return _first_fit(value, parts)
    if base is typing.Literal:
        if not isinstance(value, str) or value not in parts:
            raise Misfit(f"be {_either(parts)}", value)
        return value
    if base is tuple:
        return _tuple(value, parts)
    if base in (dict, collections.abc.Mapping):
        return _mapping(value, parts)
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, base) or isinstance(value, bool) and base is not bool:
        raise Misfit(f"be a valid {NAMES[base]}", value)
    return value


def within(value: Any, limits: Mapping[str, Any]) -> None:
    """Raise :class:`Misfit` for a value beyond one of the ``limits``, of which none is of ``None``."""
    for name, limit in limits.items():
        if value is not None and not LIMITS[name](value, limit):
            raise Misfit(WORDS[name].format(limit), value)


def _first_fit(value: Any, kinds: tuple) -> Any:
    misfits = []
    for kind in kinds:
        try:
            return fitted(value, kind)
        except Misfit as misfit:
            misfits.append(misfit)
    raise next((misfit for misfit in misfits if misfit.value is not value), misfits[0])  # that of a part says more


def _tuple(value: Any, kinds: tuple) -> tuple:
    if not isinstance(value, list | tuple):
        raise Misfit("be a valid tuple", value)
    if not kinds:
        return tuple(value)
    kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
    if len(kinds) != len(value):
        raise Misfit(f"have {len(kinds)} values", value)
    return tuple(fitted(part, kind) for part, kind in zip(value, kinds, strict=True))


def _mapping(value: Any, kinds: tuple) -> Any:
    if not isinstance(value, Mapping):
        raise Misfit("be a valid dictionary", value)
    return {fitted(key, kinds[0]): fitted(part, kinds[1]) for key, part in value.items()} if kinds else value


def _either(values: tuple) -> str:
    *first, last = map(repr, values)
    return f"{', '.join(first)} or {last}" if first else last
