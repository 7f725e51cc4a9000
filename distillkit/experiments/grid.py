"""Many experiments of one kind as one command: a grid of cells, each an experiment of its own.

A cell of a :class:`GridJob` is a :class:`~distillkit.experiments.classification.ClassificationJob` that differs from the common
settings in a few: how many examples per class, how many tokens an example, how many inner steps (*scaling*), or which corpus
and which student (the *slides'* table).  Each is distilled, and scored beside the baselines of its own size.  All cells stand
in one result, written after every row; the same command goes on where it was stopped, also from that result alone, and may be
given single cells, rows or seeds to work on.

A cell whose corpus or model is not to be had here is skipped, with the reason printed, and says *not run*.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from distillkit.data.corpus import CorpusError
from distillkit.evaluation.selection import METHODS
from distillkit.experiments.classification import ClassificationJob, ClassificationRun
from distillkit.experiments.results import as_config, check_same_settings, markdown, read, write
from distillkit.experiments.runner import SELECTING, Run
from distillkit.experiments.settings import REQUIRED, Experiment, check_keys, names, option, settings, tupled
from distillkit.io.checks import check_choice
from distillkit.io.escaping import one_line, say
from distillkit.io.progress import progress
from distillkit.io.storage import Claim

KINDS = ("scaling", "slides")
BASE = "base"  # the name of the cell that differs in nothing


@settings()
class Grid(Experiment):
    """Base of the settings of a grid."""

    base: Mapping = option(REQUIRED, "settings that the cells share, as their kind of experiment takes them")

    run: ClassVar[type[Run]]  # of a cell

    def cells(self) -> dict[str, Any]:
        """The settings of every cell by its name, in the order they are run."""
        raise NotImplementedError


@settings(kind="scaling")
class GridJob(Grid):
    """Settings of a grid of experiments on classification; kinds differ in the table they are shown as."""

    product: Mapping | None = option(None, "{setting: values}; every combination is a cell, or one with its variations")
    around: Mapping | None = option(None, "{setting: values} varied one at a time from what base says, which is a cell too")

    run, kinds = ClassificationRun, KINDS

    def __post_init__(self):
        super().__post_init__()
        known = {*names(ClassificationJob)} - {"rows", "kind", "committed", "committed_rows"}
        for key, values in (("base", self.base), ("product", self.product or {}), ("around", self.around or {})):
            check_keys(key, values, known)
        for key in ("product", "around"):
            for setting, values in (getattr(self, key) or {}).items():
                if not isinstance(values, list | tuple) or not values:
                    raise ValueError(f"{key}: {setting} must be a list of values, not {values!r}")
        if self.kind == "slides" and not {"corpus", "student"} <= (self.product or {}).keys():
            raise ValueError("the slides' table is of a product of corpus and student; give both")
        self.cells()  # every one of them is checked before the first is run

    def cells(self) -> dict[str, ClassificationJob]:
        """The cells by name, such as ``corpus=imdb,student=roberta-base``, in the order they are run."""
        cells, axes = {}, self.product or {}
        defaults = {f.name: None if f.default is REQUIRED else f.default for f in dataclasses.fields(ClassificationJob)}
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            variations = [{}, *({key: value} for key, every in (self.around or {}).items() for value in every)]
            for change in variations:
                if all(self.base.get(key, defaults[key]) == value for key, value in change.items()):
                    change = {}  # the base itself
                key = ",".join(f"{k}={v}" for k, v in {**chosen, **change}.items()) or BASE
                cells.setdefault(key, self._cell(key, {**self.base, **chosen, **change}))
        return cells

    def _cell(self, key: str, values: dict) -> ClassificationJob:
        name = f"{self.name}-{re.sub(r'[^A-Za-z0-9_]+', '-', key)}"
        try:
            return ClassificationJob(name=name, rows=self.rows, **tupled(values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"cell {key}: {error}") from error


class GridRun:
    """A grid under way; its result is ``folder/<name>.json``, what the cells leave behind ``work/<name>``.

    Raises:
        ValueError: the result in ``folder`` has a cell of that name with other settings.
    """

    def __init__(self, job: Grid, folder: str | Path, work: str | Path):
        self.job, self.work = job, Path(work) / job.name
        self.path = Path(folder) / f"{job.name}.json"
        self.claim = Claim(self.work, wait=True, shared=True)
        cells = read(self.path)["cells"] if self.path.is_file() else {}
        self.result = {"config": as_config(job), "cells": cells}
        for key, cell in job.cells().items():
            if key in cells:
                check_same_settings(f"{self.path}: the cell {key}", cells[key]["config"], cell)

    def headline(self) -> str:
        """What is about to be run, in a line."""
        return f"{self.job.name}: {len(self.job.cells())} cells"

    def __call__(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> dict:
        """Make what is missing; returns the result.

        Args:
            only: names of cells, of rows, or both: these for now.
            seeds: only these seeds.
        """
        cells = self.job.cells()
        for name in only:
            check_choice("a cell or a row", name, (*cells, *self.job.rows))
        rows = [row for row in self.job.rows if row in only or not {*only} & {*self.job.rows}]
        chosen = {key: cell for key, cell in cells.items() if key in only or not {*only} & cells.keys()}
        with self.claim:
            for key, cell in progress(chosen.items(), desc="cells", unit="cell"):
                try:
                    self._make(key, cell, rows, [seed for seed in cell.seeds if not seeds or seed in seeds])
                except (CorpusError, FileNotFoundError, FloatingPointError) as error:
                    say(f"{key}: skipped: {one_line(error)}")
        return self.result

    def _make(self, key: str, cell, rows: Sequence[str], seeds: Sequence[int]) -> None:
        """Make those scores of a cell that are missing, written row by row."""
        if not seeds or not self.job.run.missing(self.result["cells"].get(key, {}), cell, rows, seeds):
            return
        run = self.job.run(cell, self._taken_up(key, cell), self.work)
        for row in rows:
            if twin := self._twin(key, cell, row):
                run.result["rows"].setdefault(row, twin)
            if run.missing(run.result, cell, [row], seeds) or twin:
                self._keep(key, run([row], seeds))

    def _keep(self, key: str, made: dict) -> None:
        """Write a cell into the result, beside the cells and rows that other processes may have written meanwhile."""
        # A curve of losses for each of dozens of cells would bury the scores.
        distilling = {n: {k: v for k, v in d.items() if k != "losses"} for n, d in made["distilling"].items()}
        cell = {k: v for k, v in made.items() if k != "text"} | {"distilling": distilling}
        with Claim(self.path, wait=True):  # beside the result, which other work folders may share
            others = read(self.path)["cells"] if self.path.is_file() else {}
            for part in ("rows", "distilling"):
                cell[part] = others.get(key, {}).get(part, {}) | cell[part]
            cell["rows"] = {row: cell["rows"][row] for row in self.job.rows if row in cell["rows"]}
            self.result["cells"] = {**self.result["cells"], **others, key: cell}
            write(self.path, self.result)

    def _taken_up(self, key: str, cell) -> Path:
        """The folder of the cells' own results, with what this one already has in it."""
        path = self.work / "cells" / f"{cell.name}.json"
        if not path.is_file() and key in self.result["cells"]:
            write(path, self.result["cells"][key])  # a result that came without its work, as a committed one does
        return path.parent

    def _twin(self, key: str, cell, row: str) -> dict | None:
        """The row of another cell that selected and trained on the very same sentences: one that differs in distilling only."""
        if row.split("/")[0] not in METHODS or self.job.run.by_seed:
            return None
        for other, settings_of_other in self.job.cells().items():
            score = self.result["cells"].get(other, {}).get("rows", {}).get(row)
            if other != key and score and all(getattr(cell, s) == getattr(settings_of_other, s) for s in SELECTING):
                return {"same_set_as": other, **score}
        return None


def committed(config: str | Path, folder: str | Path) -> dict:
    """The result in ``folder`` of the grid that a file of settings describes; one without cells where there is none yet."""
    job = GridJob.from_yaml(config)
    path = Path(folder) / f"{job.name}.json"
    return read(path) if path.is_file() else {"config": as_config(job), "cells": {}}


def along(result: Mapping, axis: str, row: str) -> dict:
    """A row's mean accuracy along one setting: {value: accuracy}, over cells that differ from the base in nothing else.

    Several seeds are averaged; values whose cells have not been run are left out.
    """
    base, means = result["config"]["base"], {}
    for key, cell in result["cells"].items():
        changed = {k.split("=")[0] for k in key.split(",")} - {axis, "seed", BASE}
        if not changed & {*(result["config"]["around"] or {})} and row in cell["rows"]:
            means.setdefault(cell["config"].get(axis, base.get(axis)), []).append(cell["rows"][row]["mean"])
    return {value: float(np.mean(scores)) for value, scores in sorted(means.items())}


def scaling_table(result: Mapping) -> str:
    """A scaling grid as a Markdown table: a line a cell, seeds of one cell together."""
    job = GridJob(**tupled(result["config"]))
    groups: dict[str, list[str]] = {}
    for key in job.cells():
        plain = ",".join(part for part in key.split(",") if not part.startswith("seed=")) or BASE
        groups.setdefault(plain, []).append(key)
    lines = []
    for name, keys in groups.items():
        cell = job.cells()[keys[0]]
        made = [result["cells"][key]["rows"] for key in keys if key in result["cells"]]
        sizes = [rows["embeddings/own"]["nbytes"] for rows in made if "embeddings/own" in rows]
        scores = [_mean([rows[row]["mean"] for rows in made if row in rows]) for row in job.rows]
        lines.append([name, str(cell.per_class), str(cell.length or cell.max_length), str(cell.unroll_steps),
                      f"{sizes[0]:,}" if sizes else "", *scores, str(len(made))])
    return "\n".join(markdown(["cell", "examples a class", "tokens", "inner steps", "bytes", *job.rows, "sets"], lines))


def slides_table(result: Mapping) -> str:
    """The slides' table in Markdown: a line for each corpus and way of training, a column for each student."""
    job = GridJob(**tupled(result["config"]))
    axes, lines = job.product or {}, []
    for corpus, row in itertools.product(axes["corpus"], job.rows):
        cells = []
        for student in axes["student"]:
            keys = [k for k, cell in job.cells().items() if (cell.corpus, cell.student) == (corpus, student)]
            rows = [result["cells"][k]["rows"].get(row) for k in keys if k in result["cells"]]
            cells.append(_with_spread([score for score in rows if score]))
        lines.append([corpus, row, *cells])
    machines = sorted({cell["machine"]["processor"] for cell in result["cells"].values()})
    return "\n".join([*markdown(["corpus", "trained on", *axes["student"]], lines, "ll"), "",
                      f"Made on: {', '.join(machines) or 'nothing has been run yet'}."])


def _mean(scores: list[float]) -> str:
    return f"{np.mean(scores):.3f}" if scores else "not run"


def _with_spread(rows: list[dict]) -> str:
    """Mean over sets; of a single one with the spread over its seeds."""
    if len(rows) == 1 and rows[0]["std"] is not None:
        return f"{rows[0]['mean']:.3f} ± {rows[0]['std']:.3f}"
    return _mean([row["mean"] for row in rows])
