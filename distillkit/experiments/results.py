"""Results: one JSON file per experiment, which grows score by score.

A result holds ``config`` (the settings), ``cells`` and ``scores``.  A cell is one experiment with settings, a corpus and
sets of its own: a grid has many, every other kind has one, named as the experiment.  Of each cell the file says the settings,
the corpus by name and hash, the machine, the versions and the date; its ``notes`` hold what is not a score, by ``method seed``
(losses, seconds and text of a set) and by ``row seed`` (accuracy by class, and how the students were trained).

``scores`` is one tidy table with a row for each trained and scored student; :data:`COLUMNS` are its columns, and an experiment
may add others.  A field that is not known is left out.  Tables are computed from it (:mod:`distillkit.experiments.table`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from distillkit.evaluation.evaluate import Evaluation
from distillkit.experiments.settings import Settings
from distillkit.io.storage import StorageError, save_text, sealed, unsealed

COLUMNS = (
    "experiment", "cell", "row", "corpus", "source", "target", "method", "recipe", "per_class", "length", "set_seed",
    "init_seed", "split", "accuracy", "seconds", "flops", "examples", "nbytes", "settings_hash", "machine",
)
# Settings that say which scores a run makes, not how its sets are made.
SCORES = ("name", "rows", "seeds", "eval_seeds", "full_seeds", "committed", "committed_rows", "standard_steps",
          "tuned_grid")
REPLACE = "give --fresh to replace it, or the run another name"
VERSIONED = ("torch", "transformers", "datasets", "numpy", "scikit-learn")


def take_up(path: Path, job, cells: Mapping[str, Settings]) -> dict:
    """The result at ``path`` to go on with, or an empty one of ``job``, whose cells are ``cells``.

    Raises:
        ValueError: a cell was made with other settings, which the message names; or the file holds no table of scores.
    """
    config = as_config(job)
    if not path.is_file():
        return {"config": config, "cells": {}, "scores": []}
    stored = read(path)
    if not {"cells", "scores"} <= stored.keys():
        raise ValueError(f"{path} has no table of scores: distillkit 0.1 wrote it, the last version that reads it; {REPLACE}")
    for key, settings in cells.items():
        if key in stored["cells"]:
            where = path if len(cells) == 1 else f"{path}: the cell {key}"
            check_same_settings(where, stored["cells"][key]["config"], settings)
    return stored | {"config": config}


def new_cell(settings: Settings, task) -> dict:
    """What a result says of a cell before it has any score."""
    return {
        "config": as_config(settings),
        "corpus": {"name": task.name, "sha256": task.fingerprint,
                   "rows": {split: len(task.split(split)) for split in ("train", "validation", "test")}},
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "versions": {p: importlib.metadata.version(p) for p in VERSIONED} | {"python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
        "notes": {},
    }


def as_config(settings: Settings) -> dict:
    """Settings as JSON stores them."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def settings_hash(settings: Settings) -> str:
    """The first 16 digits of the SHA-256 of the settings by which sets are made."""
    values = {name: value for name, value in as_config(settings).items() if name not in SCORES}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def check_same_settings(where, config: Mapping, settings: Settings) -> None:
    """Raise ValueError unless the stored ``config`` equals ``settings``.

    A setting that is not stored had its default.  Other rows may be asked of the same run.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(settings) if f.default is not dataclasses.MISSING}
    stored = {**json.loads(json.dumps(defaults)), **config, "rows": list(getattr(settings, "rows", ()))}
    if change := difference(stored, as_config(settings)):
        raise ValueError(f"{where} is of a run with other settings ({change}); {REPLACE}")


def difference(stored: Mapping, current: Mapping) -> str | None:
    """The first key in which two mappings differ, in words; None where they are equal."""
    for key in {**current, **stored}:
        if (key in stored, stored.get(key)) != (key in current, current.get(key)):
            then, now = (repr(values[key]) if key in values else "absent" for values in (stored, current))
            return f"{key}: {then} there, {now} here"
    return None


def write(path: Path, result: Mapping) -> None:
    """Write a result, all or nothing, with the SHA-256 of its content; StorageError if it cannot be written."""
    text = json.dumps(sealed(result), indent=1)
    if rows := result.get("scores"):  # a line each, so that a change of the file shows which scores changed
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        text = json.dumps(sealed(result) | {"scores": []}, indent=1).replace('"scores": []', f'"scores": [\n  {lines}\n ]', 1)
    save_text(path, text + "\n")


def read(path: Path) -> dict:
    """The result that :func:`write` wrote; StorageError if any character of it has changed since."""
    try:
        return unsealed(path.read_bytes())
    except ValueError as error:
        remedy = "take it from a copy (a committed one: git checkout), or make it again with --fresh"
        raise StorageError(f"{path} is damaged: {error}; {remedy}") from error


def rows_of(evaluation: Evaluation, seeds: Sequence[int]) -> tuple[list[dict], dict]:
    """A row of the table for each of the students of an evaluation, whose initialisations are ``seeds``, and the note beside.

    ``seconds`` is the mean over the initialisations.
    """
    values = as_json(evaluation)
    shared = {key: values[key] for key in ("seconds", "flops", "examples", "nbytes")}
    rows = [{"init_seed": seed, "accuracy": score, **shared} for seed, score in zip(seeds, values["scores"], strict=True)]
    for row, score in zip(rows, values.get("normalized", ()), strict=False):
        row["normalized"] = score
    return rows, {key: values[key] for key in ("groups", "recipe")}


def as_json(evaluation: Evaluation) -> dict:
    """An evaluation as JSON values, floats at six digits, null for what is not a number."""
    values = {key: value for key, value in dataclasses.asdict(evaluation).items() if value is not None}
    for key, value in values.items():
        if isinstance(value, float):
            values[key] = rounded(value)
        elif isinstance(value, tuple):
            values[key] = [rounded(score) for score in value]
    return values | {"groups": {name: rounded(score) for name, score in evaluation.groups.items()}}


def rounded(value: float) -> float | None:
    """``value`` at six digits; None for what is not a number."""
    return round(value, 6) if math.isfinite(value) else None


def processor() -> str:
    """The name of the GPU, or the kind of CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


MARKED = re.compile(r"(<!-- (\w+): ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str, folder: str | Path, *, marker: str, draw: Callable[[dict], str]) -> str:
    """``text`` with the block after each ``<!-- marker: name -->`` replaced by ``draw`` of that result in ``folder``."""

    def block(match: re.Match) -> str:
        if match[2] != marker:
            return match[0]
        path = Path(folder) / f"{match[3]}.json"
        content = draw(read(path)) if path.is_file() else "*not run*"
        return f"{match[1]}{content}\n{match[4]}"

    return MARKED.sub(block, text)
