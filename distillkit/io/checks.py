"""Checks of arguments that many modules share: each error names the value and what it must be."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence


def require(condition: object, message: str, kind: type[Exception] = ValueError) -> None:
    """Raise an error of ``kind`` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise kind(message)


def check_whole(name: str, value, *, least: int = 1, most: int | None = None, meaning: str = "") -> None:
    """Raise ValueError unless ``value`` is a whole number from ``least`` to ``most`` (None: no limit)."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most):
        return
    limit = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name} must be a whole number {limit}{f' ({meaning})' if meaning else ''}, not {value!r}")


def limits_by_split(limit, splits: Sequence[str]) -> dict[str, int]:
    """The most rows of each split that ``limit`` limits: a whole number for all ``splits``, a mapping that names some, or None.

    Raises ValueError for a split that there is none of, and for a number below 1.
    """
    limits = limit if isinstance(limit, Mapping) else dict.fromkeys(splits, limit)
    for split, most in limits.items():
        check_choice("each split in limit", split, splits)
        if most is not None:
            check_whole(f"limit of the {split} split", most)
    return {split: most for split, most in limits.items() if most is not None}


def check_choice(name: str, value, allowed) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def check_number(name: str, value, *, least: float = 0.0, most: float = math.inf, without: str = "") -> None:
    """Raise ValueError unless ``value`` is a finite number from ``least`` to ``most``, ``without`` those named (``"least"``,
    ``"most"`` or both)."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    left_out = [end for name, end in (("least", least), ("most", most)) if name in without]
    if number and least <= value <= most and value not in left_out:
        return
    left, right = "(" if "least" in without else "[", ")" if "most" in without or most == math.inf else "]"
    raise ValueError(f"{name} must be a number in {left}{least:g}, {most:g}{right}, not {value!r}")


def check_flag(name: str, value) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")


def check_seeds(name: str, value) -> None:
    """Raise ValueError unless ``value`` is a sequence of different whole numbers, one at least."""
    whole = isinstance(value, Sequence) and all(isinstance(s, int) and not isinstance(s, bool) for s in value)
    if not whole or not value or len({*value}) < len(value):  # a seed that is repeated would pass for a spread of 0
        raise ValueError(f"{name} must name at least one seed, each once, such as (0, 1, 2), not {value!r}")


def check_is(name: str, value, kind: type) -> None:
    """Raise TypeError unless ``value`` is a ``kind``, told by the beginning of what it is instead."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, not the {type(value).__name__} {reprlib.repr(value)}")


def check_are(**arguments: tuple) -> None:
    """:func:`check_is` for several arguments, each given as ``name=(value, kind)``."""
    for name, (value, kind) in arguments.items():
        check_is(name, value, kind)


def check_wholes(**arguments) -> None:
    """:func:`check_whole` for several arguments of at least 1, each given as ``name=value``."""
    for name, value in arguments.items():
        check_whole(name, value)
