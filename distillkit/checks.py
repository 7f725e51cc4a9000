"""Checks of arguments that many modules share: each error names the value and what it must be."""

from __future__ import annotations


def check_whole(name: str, value, *, least: int = 1, most: int | None = None, meaning: str = "") -> None:
    """Raise ValueError unless ``value`` is a whole number from ``least`` to ``most`` (None: no limit)."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most):
        return
    limit = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name} must be a whole number {limit}{f' ({meaning})' if meaning else ''}, not {value!r}")


def check_choice(name: str, value, allowed) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
