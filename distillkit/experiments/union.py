"""Two results of one experiment as one, such as those of a GPU that was at hand for some minutes and the committed ones.

A score has a place: cell, row and set seed; in a table of costs, student, contender and T.  Places of either result are in the
union.  Where both have a place, the newer one counts, by the time in its note; without a time it is the older one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from distillkit.experiments.results import read, write
from distillkit.io.checkpoint import first_difference
from distillkit.io.checks import require
from distillkit.io.storage import StorageError


def merge(source: str | Path, into: str | Path) -> list[str]:
    """Merge every result in ``source`` into those of the same name in ``into``; returns a line about each.

    Raises:
        FileNotFoundError: there are no results in ``source``.
        ValueError: two results were made with other settings; nothing is changed then.
        StorageError: a result is damaged.
    """
    paths = sorted(Path(source).glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"no results in {source}; name a folder that the suite has written")
    results, lines = {}, []
    for path in paths:
        target, added = Path(into) / path.name, read(path)
        stored = read(target) if target.is_file() else None
        try:
            results[target] = added if stored is None else united(stored, added)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, StorageError):
                raise
            raise ValueError(f"{path} and {target} cannot be merged: {error}; nothing was changed; merge --into another "
                             "folder") from error
        before, after = (len(_places(result)) for result in (stored or {}, results[target]))
        lines.append(f"{target}: {after} scores, {after - before} of them new")
    for target, result in results.items():
        write(target, result)
    return lines


def united(stored: Mapping, added: Mapping) -> dict:
    """The union of two results of one experiment.

    Raises:
        ValueError: they differ in settings, corpus, or (tables of costs) versions or machine; the first difference is named.
    """
    for key in ("kind", "settings", "versions", "config"):
        _check_equal(stored.get(key), added.get(key), key)
    if "entries" in stored:
        _check_equal(stored["machine"]["processor"], added["machine"]["processor"], "processor")
        entries = _union(stored["entries"], added["entries"], lambda entry: (entry["student"], entry["trainable"]), _one_entry)
        return {**added, **stored, "entries": entries}
    cells = _union(stored["cells"].items(), added["cells"].items(), lambda item: item[0], _one_cell)
    newer = {place for place in _places(added) if _made(added, place) > _made(stored, place)}
    kept = [score for score in stored["scores"] if _place(score) not in newer]
    scores = kept + [score for score in added["scores"] if _place(score) in newer | (_places(added) - _places(stored))]
    return {**added, **stored, "cells": dict(cells), "scores": sorted(scores, key=_place)}


def _union(stored, added, place: Callable, one: Callable) -> list:
    """Members of both, those of one place made ``one``."""
    union = {place(member): member for member in stored}
    for member in added:
        union[place(member)] = one(union[place(member)], member) if place(member) in union else member
    return list(union.values())


def _one_entry(stored: Mapping, added: Mapping) -> dict:
    """A student's table of costs."""
    rows = _union(stored["rows"], added["rows"], lambda row: (row["steps"], row["contender"]), _newer)
    return {**added, **stored, "rows": sorted(rows, key=lambda row: row["steps"])}


def _newer(stored: Mapping, added: Mapping) -> Mapping:
    return added if added.get("made", "") > stored.get("made", "") else stored


def _one_cell(stored: tuple[str, Mapping], added: tuple[str, Mapping]) -> tuple[str, Mapping]:
    """A cell with the notes of both, of each score those of the newer one."""
    (key, here), (_, other) = stored, added
    for name in ("config", "corpus"):
        _check_equal(here.get(name), other.get(name), f"cell {key}: {name}")
    notes = _union(here["notes"].items(), other["notes"].items(), lambda item: item[0],
                   lambda one, another: (one[0], _newer(one[1], another[1])))
    return key, {**here, "notes": dict(notes)}


def _place(score: Mapping) -> tuple[str, str, int]:
    return score["cell"], score["row"], score["set_seed"]


def _places(result: Mapping) -> set[tuple]:
    rows = {(entry["student"], entry["trainable"], row["steps"], row["contender"])
            for entry in result.get("entries", ()) for row in entry["rows"]}
    return rows | {_place(score) for score in result.get("scores", ())}


def _made(result: Mapping, place: tuple[str, str, int]) -> str:
    """When a score was made, or nothing."""
    cell, row, seed = place
    return result["cells"].get(cell, {"notes": {}})["notes"].get(f"{row} {seed}", {}).get("made", "")


def _check_equal(stored, added, name: str) -> None:
    difference = first_difference(stored, added, name)
    require(not difference, f"other {name}: {difference}")
