"""Many experiments of one kind as one command: a grid of cells, each an experiment of its own.

A cell is a :class:`~distillkit.experiments.classification.ClassificationJob` that differs from the common settings in a few:
how many examples a class, how many tokens an example, how many inner steps (*scaling*), or which corpus and which student (the
*slides'* table).  Each is distilled, and scored beside the baselines of its own size.  All cells stand in one result, written
after every row; the same command goes on where it was stopped, also from that result alone, and may be given single cells or
rows to work on.

A cell whose corpus or model is not to be had here is skipped, with the reason printed, and says *not run*.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distillkit.data.corpora import CorpusError
from distillkit.evaluation.selection import METHODS
from distillkit.experiments.classification import ClassificationJob, Run
from distillkit.experiments.results import Settings, _difference, comparable, read, write
from distillkit.experiments.settings import tupled
from distillkit.io.checks import check_choice
from distillkit.io.escaping import one_line, say
from distillkit.io.progress import progress
from distillkit.io.storage import Claim

KINDS = ("scaling", "slides")
# All that the score of a selected set depends on.
SELECTING = ("corpus", "limit", "student", "max_length", "per_class", "length", "seed", "eval_seeds")
BASE = "base"  # the name of the cell that differs in nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridJob(Settings):
    """Settings of a grid.

    Args:
        name: of the result file.
        base: settings that cells share, as :class:`~distillkit.experiments.classification.ClassificationJob` takes them,
          without name and rows.
        product: {setting: values}; every combination is a cell, or one with its variations.
        around: {setting: values} varied one at a time from what ``base`` says, which is a cell too.
        rows: of each cell, as ``method/recipe``.
        kind: ``"scaling"`` or ``"slides"``; they differ in the table they are shown as.
    """

    name: str
    base: Mapping
    product: Mapping | None = None
    around: Mapping | None = None
    rows: tuple[str, ...] = ("random/tuned", "k_center/tuned", "embeddings/own")
    kind: str = "scaling"

    def __post_init__(self):
        self.check_name()
        check_choice("kind", self.kind, KINDS)
        known = {f.name for f in dataclasses.fields(ClassificationJob)} - {"name", "rows", "committed", "committed_rows"}
        for key, values in (("base", self.base), ("product", self.product or {}), ("around", self.around or {})):
            if not isinstance(values, Mapping):
                raise ValueError(f"{key} must hold settings as 'key: value' lines, not {values!r}")
            if unknown := sorted(map(str, values.keys() - known)):
                raise ValueError(f"{key}: unknown setting {unknown[0]!r}; there are {', '.join(sorted(known))}")
        for key in ("product", "around"):
            for setting, values in (getattr(self, key) or {}).items():
                if not isinstance(values, list | tuple) or not values:
                    raise ValueError(f"{key}: {setting} must be a list of values, not {values!r}")
        if self.kind == "slides" and not {"corpus", "student"} <= (self.product or {}).keys():
            raise ValueError("the slides' table is of a product of corpus and student; give both")
        self.cells()  # every one of them is checked before the first is run

    def cells(self) -> dict[str, ClassificationJob]:
        """The cells by name, such as ``corpus=imdb,student=roberta-base``, in the order they are run."""
        found = {}
        axes = self.product or {}
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            variations = [{}, *({key: value} for key, every in (self.around or {}).items() for value in every)]
            for change in variations:
                if all(self.base.get(key, _default(key)) == value for key, value in change.items()):
                    change = {}  # the base itself
                key = ",".join(f"{k}={v}" for k, v in {**chosen, **change}.items()) or BASE
                found.setdefault(key, self._cell(key, {**self.base, **chosen, **change}))
        return found

    def _cell(self, key: str, settings: dict) -> ClassificationJob:
        name = f"{self.name}-{re.sub(r'[^A-Za-z0-9_]+', '-', key)}"
        try:
            return ClassificationJob(name=name, rows=self.rows, **tupled(settings))
        except (TypeError, ValueError) as error:
            raise ValueError(f"cell {key}: {error}") from error


def _default(key: str):
    field = next(f for f in dataclasses.fields(ClassificationJob) if f.name == key)
    return None if field.default is dataclasses.MISSING else field.default


class GridRun:
    """A grid under way; its result is ``folder/<name>.json``, what the cells leave behind ``work/<name>``.

    Raises:
        ValueError: the result that is there has a cell of that name with other settings.
    """

    def __init__(self, job: GridJob, folder: str | Path, work: str | Path):
        self.job, self.work = job, Path(work) / job.name
        self.path = Path(folder) / f"{job.name}.json"
        self.claim = Claim(self.work, wait=True, shared=True)
        there = read(self.path) if self.path.is_file() else {"cells": {}}
        self.result = {"config": json.loads(json.dumps(dataclasses.asdict(job))), "cells": there["cells"]}
        for key, cell in job.cells().items():
            self._check(key, cell)

    def __call__(self, only: tuple[str, ...] = (), seeds: tuple[int, ...] = ()) -> dict:
        """Make what is missing; returns the result.

        Args:
            only: names of cells, of rows, or both: these for now.
            seeds: only cells of these seeds.
        """
        cells = self.job.cells()
        for name in only:
            check_choice("a cell or a row", name, (*cells, *self.job.rows))
        chosen = {k: cell for k, cell in cells.items() if (k in only or not {*only} & cells.keys())
                  and (not seeds or cell.seed in seeds)}
        rows = [row for row in self.job.rows if row in only or not {*only} & {*self.job.rows}]
        with self.claim:
            for key in progress(chosen, desc="cells", unit="cell"):
                try:
                    self._make(key, cells[key], rows)
                except (CorpusError, FileNotFoundError, FloatingPointError) as error:
                    say(f"{key}: skipped: {one_line(error)}")
        return self.result

    def _make(self, key: str, cell: ClassificationJob, rows: list[str]) -> None:
        """Make those rows of a cell that are missing, written one by one."""
        rows = [row for row in rows if row not in self.result["cells"].get(key, {}).get("rows", {})]
        if not rows:
            return
        run = Run(cell, self._taken_up(key, cell), self.work)
        for row in rows:
            if twin := self._twin(key, cell, row):
                run.result["rows"][row] = twin
            self._keep(key, run((row,)))

    def _keep(self, key: str, made: dict) -> None:
        """Write a cell into the result, beside the cells and rows that other processes may have written meanwhile."""
        # A curve of losses for each of dozens of cells would bury the scores.
        distilling = {n: {k: v for k, v in d.items() if k != "losses"} for n, d in made["distilling"].items()}
        found = {k: v for k, v in made.items() if k != "text"} | {"distilling": distilling}
        with Claim(self.path, wait=True):  # beside the result, which other work folders may share
            others = read(self.path)["cells"] if self.path.is_file() else {}
            for part in ("rows", "distilling"):
                found[part] = others.get(key, {}).get(part, {}) | found[part]
            found["rows"] = {row: found["rows"][row] for row in self.job.rows if row in found["rows"]}
            self.result["cells"] = {**self.result["cells"], **others, key: found}
            write(self.path, self.result)

    def _taken_up(self, key: str, cell) -> Path:
        """The folder of the cells' own results, with what this one already has in it."""
        path = self.work / "cells" / f"{cell.name}.json"
        if not path.is_file() and key in self.result["cells"]:
            write(path, self.result["cells"][key])  # a result that came without its work, as a committed one does
        return path.parent

    def _twin(self, key: str, cell: ClassificationJob, row: str) -> dict | None:
        """The row of another cell that selected and trained on the very same sentences: one that differs in distilling only."""
        if row.split("/")[0] not in METHODS:
            return None
        for other, theirs in self.job.cells().items():
            found = self.result["cells"].get(other, {}).get("rows", {}).get(row)
            if other != key and found and all(getattr(cell, s) == getattr(theirs, s) for s in SELECTING):
                return {"same_set_as": other, **found}
        return None

    def _check(self, key: str, cell: ClassificationJob) -> None:
        """Refuse a cell of other settings; more rows may be asked of the same."""
        there = self.result["cells"].get(key, {}).get("config")
        here = json.loads(json.dumps(dataclasses.asdict(cell)))
        if there is not None and (theirs := comparable(there, cell)) != here:
            raise ValueError(f"{self.path} has the cell {key} with other settings ({_difference(theirs, here)}); give --fresh "
                             "to replace the result, or the job another name")


def committed(config: str | Path, folder: str | Path) -> dict:
    """The result in ``folder`` of the grid that a file of settings describes; one without cells where there is none yet."""
    job = GridJob.from_yaml(config)
    path = Path(folder) / f"{job.name}.json"
    if path.is_file():
        return read(path)
    return {"config": json.loads(json.dumps(dataclasses.asdict(job))), "cells": {}}


def along(result: Mapping, axis: str, row: str) -> dict:
    """A row's mean accuracy along one setting: {value: accuracy}, over cells that differ from the base in nothing else.

    Several seeds are averaged; values whose cells have not been run are left out.
    """
    base, found = result["config"]["base"], {}
    for key, cell in result["cells"].items():
        changed = {k.split("=")[0] for k in key.split(",")} - {axis, "seed", BASE}
        if not changed & {*(result["config"]["around"] or {})} and row in cell["rows"]:
            found.setdefault(cell["config"].get(axis, base.get(axis)), []).append(cell["rows"][row]["mean"])
    return {value: float(np.mean(means)) for value, means in sorted(found.items())}


def scaling_table(result: Mapping) -> str:
    """A scaling grid as a Markdown table: a line a cell, seeds of one cell together."""
    job = _job(result)
    lines = [
        f"| cell | examples a class | tokens | inner steps | bytes | {' | '.join(job.rows)} | sets |",
        "|---|" + "---:|" * (len(job.rows) + 5),
    ]
    groups: dict[str, list[str]] = {}
    for key in job.cells():
        plain = ",".join(part for part in key.split(",") if not part.startswith("seed=")) or BASE
        groups.setdefault(plain, []).append(key)
    for name, keys in groups.items():
        cell = job.cells()[keys[0]]
        made = [result["cells"][key]["rows"] for key in keys if key in result["cells"]]
        sizes = [rows["embeddings/own"]["nbytes"] for rows in made if "embeddings/own" in rows]
        scores = [_mean([rows[row]["mean"] for rows in made if row in rows]) for row in job.rows]
        size = f"{sizes[0]:,}" if sizes else ""
        lines.append(f"| {name} | {cell.per_class} | {cell.length} | {cell.unroll_steps} | {size} | {' | '.join(scores)} | "
                     f"{len(made)} |")
    return "\n".join(lines)


def slides_table(result: Mapping) -> str:
    """The slides' table in Markdown: a line for each corpus and way of training, a column for each student."""
    job = _job(result)
    axes = job.product or {}
    students = axes["student"]
    lines = [f"| corpus | trained on | {' | '.join(students)} |", "|---|---|" + "---:|" * len(students)]
    for corpus in axes["corpus"]:
        for row in job.rows:
            cells = []
            for student in students:
                keys = [k for k, cell in job.cells().items() if (cell.corpus, cell.student) == (corpus, student)]
                made = [result["cells"][k]["rows"].get(row) for k in keys if k in result["cells"]]
                cells.append(_with_spread([found for found in made if found]))
            lines.append(f"| {corpus} | {row} | {' | '.join(cells)} |")
    machines = sorted({cell["machine"]["processor"] for cell in result["cells"].values()})
    return "\n".join([*lines, "", f"Made on: {', '.join(machines) or 'nothing has been run yet'}."])


def _job(result: Mapping) -> GridJob:
    settings: dict[str, Any] = {k: tuple(v) if k == "rows" else v for k, v in result["config"].items()}
    return GridJob(**settings)


def _mean(scores: list[float]) -> str:
    return f"{np.mean(scores):.3f}" if scores else "not run"


def _with_spread(rows: list[dict]) -> str:
    """Mean over sets; of a single one with the spread over its seeds."""
    if len(rows) == 1 and rows[0]["std"] is not None:
        return f"{rows[0]['mean']:.3f} ± {rows[0]['std']:.3f}"
    return _mean([row["mean"] for row in rows])
