"""Many experiments on classification as one command: a grid of cells.

A cell of a :class:`GridJob` is a :class:`~distillkit.experiments.classification.ClassificationJob` that differs from the common
settings in a few: how many examples per class, how many tokens an example, how many inner steps (*scaling*), or which corpus
and which student (the *slides'* table).  Each is distilled, and scored beside the baselines of its own size.  All cells stand
in one result, written after every row; the same command goes on where it was stopped, also from that result alone, and may be
given single cells, rows or seeds to work on.

A cell whose corpus or model cannot be had here is skipped, with the reason printed, and says *not run*.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from distillkit.experiments.classification import ClassificationJob
from distillkit.experiments.results import take_up
from distillkit.experiments.runner import Grid
from distillkit.experiments.settings import REQUIRED, check_keys, names, option, settings
from distillkit.experiments.table import frame, markdown, spread

BASE = "base"  # the name of the cell that differs in nothing


@settings(kind="scaling")
class GridJob(Grid):
    """Settings of a grid of experiments on classification; kinds differ in the table they are shown as."""

    product: Mapping | None = option(None, "{setting: values}; every combination is a cell, or one with its variations")
    around: Mapping | None = option(None, "{setting: values} varied one at a time from what base says, which is a cell too")

    kinds = ("scaling", "slides")

    def __post_init__(self):
        super().__post_init__()
        known = {*names(ClassificationJob)} - {"rows", "kind", "committed", "committed_rows"}
        axes = {"product": self.product or {}, "around": self.around or {}}
        for key, values in {"base": self.base, **axes}.items():
            check_keys(key, values, known)
        for key, values in axes.items():
            for setting, choices in values.items():
                if not isinstance(choices, list | tuple) or not choices:
                    raise ValueError(f"{key}: {setting} must be a list of values, not {choices!r}")
        if self.kind == "slides" and not {"corpus", "student"} <= axes["product"].keys():
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
            return ClassificationJob(name=name, rows=self.rows, **values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"cell {key}: {error}") from error


def committed(config: str | Path, folder: str | Path) -> dict:
    """The result in ``folder`` of the grid that a file of settings describes; one without cells where there is none yet."""
    job = GridJob.from_yaml(config)
    return take_up(Path(folder) / f"{job.name}.json", job, job.cells())


def scaling_table(result: Mapping) -> str:
    """A scaling grid as a Markdown table: a line for each cell, its seeds together."""
    job, scores = GridJob(**result["config"]), frame(result)
    scores["place"] = scores["cell"].map(without_seed)
    lines = {}
    for key, cell in job.cells().items():
        of_cell = scores[scores["place"] == without_seed(key)]
        means, sizes = of_cell.groupby("row")["accuracy"].mean(), of_cell[of_cell["method"] == "embeddings"]["nbytes"]
        lines[without_seed(key)] = [
            without_seed(key), str(cell.per_class), str(cell.length or cell.max_length), str(cell.unroll_steps),
            f"{sizes.iloc[0]:,}" if len(sizes) else "",
            *(f"{means[row]:.3f}" if row in means else "not run" for row in job.rows), str(of_cell["cell"].nunique())]
    heads = ["cell", "examples a class", "tokens", "inner steps", "bytes", *job.rows, "sets"]
    return markdown(heads, [*lines.values()])


def without_seed(key: str) -> str:
    """The name of a cell without its set seed."""
    return ",".join(part for part in key.split(",") if not part.startswith("seed=")) or BASE


def slides_table(result: Mapping) -> str:
    """The slides' table in Markdown: a line for each corpus and way of training, a column for each student.

    Mean over sets; of a single one with the spread over its initialisations.
    """
    config, scores, lines = result["config"], frame(result), []
    for corpus, row in itertools.product(config["product"]["corpus"], config["rows"]):
        line = [corpus, row]
        for student in config["product"]["student"]:
            keys = [key for key, cell in result["cells"].items()
                    if (cell["config"]["corpus"], cell["config"]["student"]) == (corpus, student)]
            chosen = scores[scores["cell"].isin(keys) & (scores["row"] == row)]
            score = chosen["accuracy"] if chosen["cell"].nunique() == 1 else pd.Series(chosen["accuracy"].mean())
            line.append(spread(score) or "not run")
        lines.append(line)
    machines = ", ".join(sorted(scores["machine"].dropna().unique())) or "nothing has been run yet"
    return f"{markdown(['corpus', 'trained on', *config['product']['student']], lines, 'll')}\n\nMade on: {machines}."
