"""Results: one JSON file per experiment, which grows score by score.

A result holds ``config`` (the settings), ``cells`` and ``scores``.  A cell is one experiment with settings, a corpus and
sets of its own: a grid has many, every other kind has one, named as the experiment.  Of each cell the file says the settings,
the corpus by name and hash, the machine, the versions and the date; its ``notes`` hold what is not a score, by ``method seed``
(losses, seconds and text of a set) and by ``row seed`` (accuracy by class, and how the students were trained).

``scores`` is one tidy table with a row for each trained and scored student; :data:`COLUMNS` are its columns, and an experiment
may add others.  A field that is not known is left out.  All printed tables, intervals and figures are computed from it by
pandas.  Sets and initialisations are different sources of spread: :func:`by_set` gives a row's score for each set, the mean
over its initialisations, from which spreads over sets come; :func:`by_row` describes all students of a row together.
Differences are paired by set seed, with a 95 % interval by Student's t.  Means and deviations have six digits, as scores have.
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
from contextlib import suppress
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import spearmanr, t

from distillkit.applications.costs import text_bytes
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import Evaluation
from distillkit.experiments.settings import Settings
from distillkit.io.checkpoint import first_difference
from distillkit.io.storage import StorageError, save_text, sealed, unsealed

COLUMNS = (
    "experiment", "cell", "row", "corpus", "source", "target", "method", "recipe", "per_class", "length", "set_seed",
    "init_seed", "split", "accuracy", "seconds", "flops", "examples", "nbytes", "settings_hash", "machine",
)
# Settings that say which scores a run makes, not how its sets are made.
SCORES = ("name", "rows", "seeds", "eval_seeds", "full_seeds", "committed", "committed_rows", "standard_steps", "together",
          "tuned_grid", "also", "also_limit")
VERSIONED = ("torch", "transformers", "datasets", "numpy", "scikit-learn")
FEWEST = 5  # sets, below which a rank correlation says nothing
LEAST_SETS = 3  # sets, below which an interval of a gain says nothing
REPLACE = "give --fresh to replace it, or the run another name"


def take_up(path: Path | None, job, cells: Mapping[str, Settings]) -> dict:
    """The result at ``path`` to go on with, or else an empty one of ``job``, whose cells are ``cells``.

    Raises:
        ValueError: a cell was made with other settings, which the message names; or the file holds no table of scores.
    """
    config = as_config(job)
    if path is None or not path.is_file():
        return {"config": config, "cells": {}, "scores": []}
    stored = read(path)
    if not {"cells", "scores"} <= stored.keys():
        raise ValueError(f"{path} has no table of scores: distillkit 0.1 wrote it, the last version that reads it; {REPLACE}")
    for key, settings in cells.items():
        if key in stored["cells"]:
            where = path if len(cells) == 1 else f"{path}: the cell {key}"
            check_same_settings(where, stored["cells"][key]["config"], settings)
    return stored | {"config": config}


def new_cell(settings: Settings, task: Task) -> dict:
    """What a result says of a cell before it has any score."""
    return {
        "config": as_config(settings),
        "corpus": corpus_of(task),
        "training_text": weight(task),
        **environment(),
        "notes": {},
    }


def corpus_of(task: Task) -> dict:
    """What a cell says of its corpus."""
    return {"name": task.name, "sha256": task.fingerprint,
            "rows": {split: len(task.split(split)) for split in ("train", "validation", "test")}}


def weight(task: Task) -> dict:
    """Bytes of the training rows, labels or responses included: ``bytes`` as they are, ``compressed`` by xz."""
    columns = ("text", "label") if task.kind == "classification" else ("prompt", "response")
    rows = list(zip(*(task.train[column][:] for column in columns), strict=True))
    return {"bytes": text_bytes(rows, "none"), "compressed": text_bytes(rows)}


def of_the_corpus(nbytes: float, cell: Mapping) -> str | None:
    """The bytes of a set as a share of the compressed training text, for a table; None for nan."""
    return None if math.isnan(nbytes) else f"{nbytes / cell['training_text']['compressed']:.2%}"


def environment() -> dict:
    """Machine, versions of what is installed, and date, as a cell says them."""
    versions = {}
    for package in VERSIONED:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"machine": {"processor": processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
            "versions": versions | {"python": platform.python_version()}, "date": time.strftime("%Y-%m-%d")}


def now() -> str:
    """The time in UTC, by which the newer one of two scores is known."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


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
    if difference := first_difference(stored, as_config(settings)):
        raise ValueError(f"{where} is of a run with other settings: {difference}; {REPLACE}")


def write(path: Path, result: Mapping) -> None:
    """Write a result, all or nothing, with the SHA-256 of its content; StorageError if it cannot be written."""
    values = {key: [] if key == "scores" else value for key, value in sealed(result).items()}
    # A line for each score, so that a change of the file shows which scores changed.
    rows = ",\n  ".join(map(json.dumps, result.get("scores", ())))
    save_text(path, json.dumps(values, indent=1).replace('"scores": []', f'"scores": [\n  {rows}\n ]', 1) + "\n")


def read(path: Path) -> dict:
    """The result that :func:`write` wrote; StorageError if any character of it has changed since."""
    try:
        return unsealed(path.read_bytes())
    except ValueError as error:
        raise StorageError(f"{path} is damaged: {error}; take it from a copy (a committed one: git checkout), or make it again "
                           "with --fresh") from error


def rows_of(evaluation: Evaluation, seeds: Sequence[int]) -> tuple[list[dict], dict]:
    """A row of the table for each of the students of an evaluation, whose initialisations are ``seeds``, and the note beside.

    ``seconds`` is the mean over the initialisations.
    """
    values = as_json(evaluation)
    shared = {key: values[key] for key in ("seconds", "flops", "examples", "nbytes")}
    rows = [{"init_seed": seed, "accuracy": score, **shared} for seed, score in zip(seeds, values["scores"], strict=True)]
    for row, score in zip(rows, values.get("normalized", ()), strict=False):
        row["normalized"] = score
    for name, scores in values.get("also", {}).items():
        for row, score in zip(rows, scores, strict=True):
            row[also_column(name)] = score
    return rows, {key: values[key] for key in ("groups", "recipe")}


def also_column(name: str) -> str:
    """The column of the accuracy of the same students on a further task."""
    return f"accuracy on {name}"


def as_json(evaluation: Evaluation) -> dict:
    """An evaluation as JSON values, floats at six digits but for the recipe's, null for what is not a number."""
    values = {key: value for key, value in dataclasses.asdict(evaluation).items() if value is not None}
    six_digits = {"parse_float": lambda text: round(float(text), 6), "parse_constant": lambda _: None}
    return json.loads(json.dumps(values), **six_digits) | {"recipe": values["recipe"]}


def rounded(value: float) -> float | None:
    """``value`` at six digits; None for what is not a number."""
    return round(value, 6) if math.isfinite(value) else None


def processor() -> str:
    """The name of the GPU, or the kind of CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


# --- tables --------------------------------------------------------------------------------------------------------------


def frame(result: Mapping) -> pd.DataFrame:
    """The scores of a result, with all columns of :data:`COLUMNS` and those it has besides."""
    scores = pd.DataFrame(result["scores"])
    return scores.reindex(columns=[*COLUMNS, *(name for name in scores.columns if name not in COLUMNS)])


def classes_of(result: Mapping) -> list[str]:
    """The classes, or kinds of questions, that a result tells apart."""
    notes = (note for cell in result["cells"].values() for note in cell["notes"].values())
    return [*next(note["groups"] for note in notes if "groups" in note)]


def by_set(result: Mapping, value: str = "accuracy", cell: str | None = None) -> pd.DataFrame:
    """Mean of a column over the initialisations of each set: a line for each row of the settings, a column for each set seed.

    Args:
        value: the column.
        cell: of a grid, the cell; default all, if no row stands in two.

    Raises:
        ValueError: no cell is named, and a row stands in several: other sizes or corpora under one name.
    """
    chosen = _of_cell(result, cell)
    if value not in chosen or chosen[value].isna().all():
        return pd.DataFrame(index=result["config"]["rows"])
    return chosen.pivot_table(index="row", columns="set_seed", values=value).round(6).reindex(result["config"]["rows"])


def _of_cell(result: Mapping, cell: str | None) -> pd.DataFrame:
    """The scores of a cell, or of all cells, if each row stands in one of them."""
    scores = frame(result)
    if cell is not None:
        return scores[scores["cell"] == cell]
    cells = scores.groupby("row", sort=False)["cell"].unique()
    for row, several in cells[cells.map(len) > 1].items():
        raise ValueError(f"the row {row!r} stands in the cells {', '.join(map(repr, several))}; name one with cell=…")
    return scores


def by_row(result: Mapping, cell: str | None = None) -> pd.DataFrame:
    """What there is to say of each row: ``mean`` and ``std`` (n − 1) over all its students, their number, and its first size.

    The lines are the rows of the settings; ``mean`` is nan where a row has not run.  ``cell`` and errors: as :func:`by_set`.
    """
    groups = _of_cell(result, cell).groupby("row")
    first = groups[["method", "recipe", "examples", "nbytes", "seconds", "flops"]].first()
    summary = groups["accuracy"].agg(["mean", "std", "size"]).round(6)
    return first.join(summary).reindex(result["config"]["rows"])


def spread(values: pd.Series, digits: int = 3) -> str:
    """Mean ± standard deviation (n − 1) in words; of one value that alone, of none nothing."""
    values = values.dropna()
    deviation = f" ± {round(values.std(), 6):.{digits}f}" if len(values) > 1 else ""
    return f"{round(values.mean(), 6):.{digits}f}{deviation}" if len(values) else ""


def number(value: float, form: str) -> str | None:
    """A number for a table, as :func:`format` takes ``form``; None, an empty cell, for nan."""
    return None if math.isnan(value) else format(value, form)


def paired_difference(sets: pd.DataFrame, one: str, other: str, comparisons: int = 1) -> tuple[float, float]:
    """Mean of the differences between two rows at the same set seeds, and half the width of its 95 % interval (Student's t).

    Args:
        sets: as :func:`by_set` gives it.
        comparisons: how many differences one sentence or table speaks of; all their intervals hold together with 95 %
            (Bonferroni).

    Returns:
        nan where the rows have no set in common; an infinite half width for a single one.
    """
    pair = sets.reindex([one, other])
    differences = (pair.loc[one] - pair.loc[other]).dropna()
    quantile = t.ppf(1 - 0.025 / comparisons, len(differences) - 1)
    half = quantile * differences.sem() if len(differences) > 1 else math.inf
    return float(differences.mean()), float(half)


def beats(sets: pd.DataFrame, one: str, other: str, comparisons: int = 1) -> bool:
    """Whether one row is above another by more than half of the 95 % interval; never with fewer than :data:`LEAST_SETS`."""
    mean, half = paired_difference(sets, one, other, comparisons)
    return has_interval(sets, one, other) and mean > half


def has_interval(sets: pd.DataFrame, one: str, other: str) -> bool:
    """Whether two rows have enough sets in common for an interval of their difference, :data:`LEAST_SETS`."""
    return _in_common(sets, one, other) >= LEAST_SETS


def _in_common(sets: pd.DataFrame, one: str, other: str) -> int:
    return int(sets.reindex([one, other]).notna().all().sum())


def gain(sets: pd.DataFrame, one: str, other: str, comparisons: int = 1) -> str:
    """:func:`paired_difference` in words; without an interval for fewer than three sets, nothing for none in common.

    Args:
        comparisons: how many gains with an interval are shown together, by which it is corrected (Bonferroni).
    """
    mean, half = paired_difference(sets, one, other, comparisons)
    count = _in_common(sets, one, other)
    interval = f" ± {half:.3f}" if has_interval(sets, one, other) else " (one set)" if count == 1 else " (two sets)"
    return f"{mean:+.3f}{interval}" if count else ""


def corrected(comparisons: int) -> str:
    """What a table says of its intervals."""
    return f"corrected for {comparisons} comparison{'s' * (comparisons != 1)} (Bonferroni)"


def rank_correlation(one: pd.Series, other: pd.Series) -> float | None:
    """Spearman's rank correlation of two values of the same sets; None for fewer than :data:`FEWEST` sets."""
    paired = pd.concat([one, other], axis=1).dropna()
    return float(spearmanr(*paired.to_numpy().T).statistic) if len(paired) >= FEWEST else None


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str | None]], align: str = "l") -> str:
    """A Markdown table.

    Args:
        heads: titles of the columns.
        lines: cells of each line; None is a cell with nothing but a space.
        align: ``l`` or ``r`` for each of the first columns; the others are aligned to the right.
    """
    rule = "|".join("---" if place == "l" else "---:" for place in align.ljust(len(heads), "r"))
    body = ("|".join(" " if cell is None else f" {cell} " for cell in cells) for cells in (heads, *lines))
    first, *others = [f"|{line}|" for line in body]
    return "\n".join([first, f"|{rule}|", *others])


MARKED = re.compile(r"(<!-- (\w+): ([\w -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str, folder: str | Path, *, marker: str, draw: Callable[..., str]) -> str:
    """``text`` with the block after each ``<!-- marker: name … -->`` replaced by ``draw`` of these results in ``folder``."""

    def block(match: re.Match) -> str:
        if match[2] != marker:
            return match[0]
        paths = [Path(folder) / f"{name}.json" for name in match[3].split()]
        content = draw(*map(read, paths)) if all(path.is_file() for path in paths) else "*not run*"
        return f"{match[1]}{content}\n{match[4]}"

    return MARKED.sub(block, text)
