"""Results: a JSON file that grows row by row, and what tables are made of.

A result holds the settings it was made with, the corpus by name and hash, the machine, the versions, and a row for each
score.  It is written after every row, so that a run that was interrupted goes on with the first row it has not got, and
nothing is ever added to a result of other settings or another corpus.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from distillkit.evaluation.evaluate import Evaluation
from distillkit.experiments.settings import Settings
from distillkit.experiments.settings import kind_of as kind_of
from distillkit.io.storage import StorageError, save_text, sealed, unsealed

REPLACE = "give --fresh to replace it, or the run another name"
VERSIONED = ("torch", "transformers", "datasets", "numpy", "scikit-learn")


def take_up(path: Path, settings: Settings, task) -> dict:
    """The result at ``path`` to go on with, or a fresh one.

    Raises:
        ValueError: the result at ``path`` was made with other settings or another corpus; says in what they differ.
    """
    fresh = {
        "config": as_config(settings),
        "corpus": {
            "name": task.name,
            "sha256": task.fingerprint,
            "rows": {s: len(task.split(s)) for s in ("train", "validation", "test")},
        },
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "versions": {p: importlib.metadata.version(p) for p in VERSIONED} | {"python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
        "rows": {},
        "distilling": {},
    }
    if not path.is_file():
        return fresh
    stored = read(path)
    check_same_settings(path, stored.get("config", {}), settings)
    if change := difference(stored.get("corpus"), fresh["corpus"]):
        raise ValueError(f"{path} is the result of a run with another corpus ({change}); {REPLACE}")
    return {**stored, "config": fresh["config"]}


def as_config(settings: Settings) -> dict:
    """Settings as JSON stores them."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def check_same_settings(where, config: Mapping, settings: Settings) -> None:
    """Raise ValueError unless the stored ``config`` equals ``settings``: a setting that came later had its default, and more
    rows may be asked of the same run."""
    defaults = {f.name: f.default for f in dataclasses.fields(settings) if f.default is not dataclasses.MISSING}
    stored = {**json.loads(json.dumps(defaults)), **config, "rows": list(getattr(settings, "rows", ()))}
    if change := difference(stored, as_config(settings)):
        raise ValueError(f"{where} is of a run with other settings ({change}); {REPLACE}")


def difference(stored, current: Mapping) -> str | None:
    """The first setting in which two differ, in words; None where they are equal."""
    if stored == current:
        return None
    if not isinstance(stored, Mapping):
        return "it has none"
    key = next(k for k in {**current, **stored} if (k in stored, stored.get(k)) != (k in current, current.get(k)))
    then, now = (repr(values[key]) if key in values else "absent" for values in (stored, current))
    return f"{key}: {then} there, {now} here"


def write(path: Path, result: dict) -> None:
    """Write a result, all or nothing, with the SHA-256 of what it says; StorageError if it cannot be written."""
    save_text(path, json.dumps(sealed(result), indent=1) + "\n")


def read(path: Path) -> dict:
    """The result that :func:`write` wrote.

    Raises:
        StorageError: one character of it is another than was written, or it is no result.
    """
    remedy = "take it from a copy (a committed one: git checkout), or make it again with --fresh"
    try:
        return unsealed(path.read_bytes())
    except ValueError as error:
        raise StorageError(f"{path} is damaged: {error}; {remedy}") from error


def paired_difference(rows: dict, one: str, other: str) -> tuple[float, float]:
    """Mean of the differences between two rows at the same seeds, and half the width of its 95 % interval (Student's t).

    The half width is infinite for fewer than two common seeds.
    """
    from scipy.stats import t

    seeds = rows[one].keys() & rows[other].keys()
    differences = np.array([rows[one][seed]["mean"] - rows[other][seed]["mean"] for seed in sorted(seeds)])
    if len(differences) < 2:
        return float(differences.mean()) if len(differences) else math.nan, math.inf
    spread = differences.std(ddof=1) / math.sqrt(len(differences))
    return float(differences.mean()), float(t.ppf(0.975, len(differences) - 1) * spread)


def shown(mean: float, half: float) -> str:
    """What :func:`paired_difference` found, for a table."""
    return f"{mean:+.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else " (one set)")


def means(rows: Mapping, name: str, key: str = "mean") -> list[float]:
    """A number of each set of a row; none where the row has not run."""
    return [score[key] for score in rows.get(name, {}).values()]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over sets, for a table; of one set the value alone, of none nothing."""
    if not values:
        return ""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str | None]], align: str = "l") -> list[str]:
    """The lines of a Markdown table.

    Args:
        heads: titles of the columns.
        lines: cells of each line; None is a cell of nothing but a space.
        align: ``l`` or ``r`` for each of the first columns; the others are aligned to the right.
    """
    rule = "|".join("---" if place == "l" else "---:" for place in align.ljust(len(heads), "r"))
    body = ("|".join(" " if cell is None else f" {cell} " for cell in cells) for cells in (heads, *lines))
    first, *others = [f"|{line}|" for line in body]
    return [first, f"|{rule}|", *others]


def as_json(evaluation: Evaluation) -> dict:
    """An evaluation as JSON values, floats at six digits, null for what is not a number."""
    row = dataclasses.asdict(evaluation)
    for key in ("mean", "std", "seconds"):
        row[key] = _rounded(row[key])
    for key in ("normalized", "losses"):
        if row[key] is None:
            del row[key]
    for key in {"scores", "normalized", "losses"} & row.keys():
        row[key] = [_rounded(s) for s in row[key]]
    row["groups"] = {k: _rounded(v) for k, v in row["groups"].items()}
    return row


def _rounded(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()})"


MARKED = re.compile(r"(<!-- (\w+): ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str, folder: str | Path, *, marker: str, draw: Callable[[dict], str]) -> str:
    """``text`` with the block after each ``<!-- marker: name -->`` replaced by ``draw`` of that result in ``folder``."""

    def block(found: re.Match) -> str:
        if found[2] != marker:
            return found[0]
        path = Path(folder) / f"{found[3]}.json"
        content = draw(read(path)) if path.is_file() else "*not run*"
        return f"{found[1]}{content}\n{found[4]}"

    return MARKED.sub(block, text)
