"""Results: settings from a YAML file, and a JSON file that grows row by row.

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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from distillkit.core.distilled import DistilledSet
from distillkit.core.students import Student
from distillkit.data.instruction import InstructionTask
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import Evaluation
from distillkit.experiments.settings import Settings
from distillkit.experiments.settings import kind_of as kind_of
from distillkit.io.checks import check_choice
from distillkit.io.progress import progress
from distillkit.io.storage import Claim, StorageError, save_text, sealed, unsealed

VERSIONED = ("torch", "transformers", "datasets", "numpy", "scikit-learn")


def take_up(path: Path, settings: Settings, task) -> dict:
    """The result at ``path`` to go on with, or a fresh one.

    Raises:
        ValueError: the result that is there was made with other settings or another corpus; says in what they differ.
    """
    config = json.loads(json.dumps(dataclasses.asdict(settings)))
    fresh = {
        "config": config,
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
    found = read(path)
    theirs = comparable(found.get("config", {}), settings)
    for key, there, here in (("config", theirs, config), ("corpus", found.get("corpus"), fresh["corpus"])):
        if there != here:
            raise ValueError(
                f"{path} is the result of a run with another {key} ({_difference(there, here)}); give --fresh "
                "to replace it, or the job another name"
            )
    return {**found, "config": config}


def comparable(config: dict, settings: Settings) -> dict:
    """The stored ``config`` of a result as ``settings`` would be stored if they were the same: a setting that came later had
    its default, and more rows may be asked of the same run."""
    defaults = {f.name: f.default for f in dataclasses.fields(settings) if f.default is not dataclasses.MISSING}
    rows = getattr(settings, "rows", ())
    return {**json.loads(json.dumps(defaults)), **config, "rows": list(rows)}


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


class SeededRun:
    """A job under way whose every score belongs to a seed; scores are written to ``folder/<name>.json`` as they are made.

    Args:
        job: the settings, with ``seeds`` and ``rows`` as ``method/recipe``.
        folder: where its result goes; one that is there already is gone on with.
        work: where experts, checkpoints and sets go, ``work/<name>``.
        task, student: what it is about.

    Raises:
        ValueError: the result that is there was made with other settings or another corpus; or there are rows without choices,
            which these tables, being of accuracy, have no score for.
    """

    def __init__(self, job: Settings, folder: str | Path, work: str | Path, task: Task, student: Student):
        if isinstance(task, InstructionTask):
            for split in ("validation", "test"):
                task.check_choices(split)
        self.job, self.work, self.task, self.student = job, Path(work) / job.name, task, student
        self.path = Path(folder) / f"{job.name}.json"
        self.claim = Claim(self.work, wait=True, shared=True)
        self.result = take_up(self.path, job, task)
        self._sets: dict[tuple[str, int], DistilledSet] = {}

    def __call__(self, only: tuple[str, ...] = (), seeds: tuple[int, ...] = ()) -> dict:
        """Make every score that is missing, or those of the rows and seeds that are named; returns the result.

        Processes with the same folder of results may work on different seeds of one result at the same time.
        """
        for row in only:
            check_choice("a row", row, self.job.rows)
        if unknown := [seed for seed in seeds if seed not in self.job.seeds]:
            raise ValueError(f"no seed {unknown[0]!r} in this job; it has {', '.join(map(str, self.job.seeds))}")
        rows = [row for row in self.job.rows if not only or row in only]
        wanted = [(seed, row) for seed in seeds or self.job.seeds for row in rows]
        missing = [(seed, row) for seed, row in wanted if str(seed) not in self.result["rows"].get(row, {})]
        with self.claim:
            for seed, row in progress(missing, desc="scores", unit="score"):
                method, recipe = row.split("/")
                self._add(row, seed, self._scored(method, recipe, seed))
        return self.result

    def set_of(self, method: str, seed: int) -> DistilledSet:
        """The set of a method and a seed; distilled or selected at its first use."""
        key = (method, seed)
        if key not in self._sets:
            self._sets[key] = self._make(method, seed)
        return self._sets[key]

    def _add(self, row: str, seed: int, score: dict) -> None:
        """Write a score, and take over what other processes have written meanwhile."""
        with Claim(self.path, wait=True):  # beside the result, which other work folders may share
            result = take_up(self.path, self.job, self.task)
            result["rows"].setdefault(row, {})[str(seed)] = score
            result["distilling"] |= self.result["distilling"]
            result["rows"] = {name: result["rows"][name] for name in self.job.rows if name in result["rows"]}
            write(self.path, result)
            self.result = result

    def _scored(self, method: str, recipe: str, seed: int) -> dict:
        raise NotImplementedError

    def _make(self, method: str, seed: int) -> DistilledSet:
        raise NotImplementedError


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


def _difference(theirs, ours: dict) -> str:
    """The first setting in which two differ, in words."""
    if not isinstance(theirs, dict):
        return "it has none"
    key = next(k for k in {**ours, **theirs} if (k in theirs, theirs.get(k)) != (k in ours, ours.get(k)))
    there, here = (repr(values[key]) if key in values else "absent" for values in (theirs, ours))
    return f"{key}: {there} there, {here} here"


def as_json(found: Evaluation) -> dict:
    """An evaluation as JSON values, floats at six digits, null for what is not a number."""
    row = dataclasses.asdict(found)
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
